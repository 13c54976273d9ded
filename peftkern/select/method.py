"""What every training method is: a callback of transformers' Trainer that also runs in a loop of one's own.

    Trainer(model, ..., callbacks=[method]).train()

    method.prepare(model)                                   # decides what is trained
    optimizer = peftkern.optim.AdamW(method.parameters(), lr=1e-4)
    method.start(optimizer, steps=1000)
    for batch in batches:
        loss = method.step(model, batch)                    # forward, backward, update
    method.finish()

Both ways run the same four functions: `prepare`, `start`, `before_update` and `after_update`, then `finish`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

logger = logging.getLogger("peftkern")


class Method(TrainerCallback):  # type: ignore[misc]
    """Base class of training methods. A subclass overrides what it needs of the five functions.

    Attributes:
        model: that was prepared; ``None`` before.
        optimizer: that trains it; ``None`` before `start`.
        steps: how many updates the run will have; ``None`` where that is not known.
        steps_done: updates so far.
    """

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.steps: int | None = None
        self.steps_done = 0

    # ---- what a method decides

    def prepare(self, model: nn.Module) -> None:
        """Decide what is trained, before an optimizer is made. Either finishes or leaves ``model`` as it was.

        Raises:
            RuntimeError: this object has prepared another model.
        """
        if self.model is not None and self.model is not model:
            raise RuntimeError(f"{type(self).__name__}: has prepared another model; make a new object for this one")
        self.model = model

    def start(self, optimizer: torch.optim.Optimizer, steps: int | None = None) -> None:
        """Take note of the optimizer and of the number of updates that the run will have.

        Raises:
            RuntimeError: no model was prepared.
        """
        self.prepared()
        self.optimizer = optimizer
        self.steps = steps

    def before_update(self) -> None:
        """Runs with complete gradients, in front of the optimizer."""

    def after_update(self) -> None:
        """Runs behind the optimizer, gradients still there."""

    def finish(self) -> None:
        """Runs at the end of training: what is left is the trained model, without hooks or helpers."""

    # ---- plain loop

    def parameters(self) -> Iterator[nn.Parameter]:
        """What the optimizer has to train now."""
        return (parameter for parameter in self.prepared().parameters() if parameter.requires_grad)

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """One update on ``batch``, which ``model(**batch)`` must give a loss for. Returns the loss, detached.

        Raises:
            RuntimeError: `prepare` or `start` has not been called.
        """
        optimizer = self.started()
        loss: Tensor = model(**batch).loss
        loss.backward()  # type: ignore[no-untyped-call]
        self.before_update()
        optimizer.step()
        self._updated()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _updated(self) -> None:
        self.steps_done += 1
        self.after_update()

    def prepared(self) -> nn.Module:
        """The model.

        Raises:
            RuntimeError: `prepare` has not been called.
        """
        if self.model is None:
            raise RuntimeError(f"{type(self).__name__}: call prepare(model) before the optimizer is made")
        return self.model

    def started(self) -> torch.optim.Optimizer:
        """The optimizer.

        Raises:
            RuntimeError: `start` has not been called.
        """
        if self.optimizer is None:
            raise RuntimeError(f"{type(self).__name__}: call start(optimizer) before the first step")
        return self.optimizer

    # ---- Trainer events

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        # the Trainer makes its optimizer later, from the parameters that require a gradient
        self.prepare(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
        self.steps_done = state.global_step
        # accelerate wraps the optimizer
        self.start(getattr(optimizer, "optimizer", optimizer), state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before_update()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._updated()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.finish()
