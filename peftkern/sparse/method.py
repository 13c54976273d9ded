"""What the methods that train sparse deltas have in common: freezing the rest, checkpoints, and the result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from peftkern.formats.sparse_indices import SparseIndices
from peftkern.nn.sparse_linear import SparseDelta
from peftkern.select import resume
from peftkern.select.method import Method
from peftkern.sparse.layers import attach, base_layer
from peftkern.sparse.resume import load_deltas, state_of_deltas
from peftkern.sparse.update import SparseUpdate


class SparseMethod(Method):
    """Base class of methods whose result is a set of sparse deltas.

    A subclass calls `take` in its `prepare`, and overrides `state` and `load_state` where it remembers more than the
    deltas. A checkpoint of the optimizer holds that state; see `peftkern.select.resume`.

    Attributes:
        deltas: by name of their layer; empty before `prepare`.
    """

    label = ""
    """Name of the method in files."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.deltas: dict[str, SparseDelta] = {}
        self._name = name
        self._dense: tuple[str, ...] = ()
        self._asked: dict[str, bool] = {}
        self._saving: resume.Saving | None = None

    def take(self, model: nn.Module, indices: Mapping[str, SparseIndices], others: Iterable[nn.Parameter] = ()) -> None:
        """Attach deltas, and let nothing be trained but them and ``others``.

        Raises:
            ValueError: they cannot be attached; the model is as it was.
        """
        asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        trained = list(others)
        self.deltas = attach(model, indices, self._name)
        self._asked = asked
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in (*trained, *(delta.values for delta in self.deltas.values())):
            parameter.requires_grad_(True)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The values of the deltas."""
        self.prepared()
        return (delta.values for delta in self.deltas.values())

    def start(self, optimizer: torch.optim.Optimizer, steps: int | None = None) -> None:
        """Begin, or go on from the checkpoint that ``optimizer`` has loaded.

        Raises:
            RuntimeError: no model was prepared.
            RuntimeError: too, where several processes train together: each would choose entries of its own.
            ValueError: the checkpoint is of another method or of other layers, or holds nothing of the method.
        """
        method = type(self).__name__
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            processes = torch.distributed.get_world_size()
            if processes > 1:
                raise RuntimeError(
                    f"{method}: {processes} processes train together, and each would choose entries from its own "
                    "batches; train in one process"
                )
        super().start(optimizer, steps)
        state = resume.take_from(optimizer, method)
        if state is not None:
            self.load_state(state)
        elif self.steps_done > 0:
            raise ValueError(
                f"{method}: training goes on after update {self.steps_done}, but the optimizer has loaded nothing of "
                f"this method; go on from a checkpoint with the optimizer's state (not save_only_model), or make a new "
                f"{method}"
            )
        self._stop_saving()
        self._saving = resume.Saving(optimizer, method, self.state)

    def _stop_saving(self) -> None:
        if self._saving is not None:
            self._saving.close()
        self._saving = None

    def finish(self) -> None:
        """The deltas stay. Everything asks for a gradient as it did before, but for the weights beneath them."""
        model = self.prepared()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._asked.get(name, parameter.requires_grad))
        for name in self.deltas:
            weight = base_layer(model.get_submodule(name))._parameters.get("weight")
            if weight is not None:
                weight.requires_grad_(False)
        self._stop_saving()
        self.optimizer = None

    def update(self) -> SparseUpdate:
        """What was trained, to be saved, added to other updates, and applied to the base.

        Raises:
            RuntimeError: no model was prepared.
        """
        model = self.prepared()
        metadata = {"steps": self.steps_done}
        return SparseUpdate.from_model(model, self._name, dense=self._dense, method=self.label, metadata=metadata)

    # ---- between runs

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: numbers, words, tensors, and lists and dictionaries of them."""
        return {"steps_done": self.steps_done, "deltas": state_of_deltas(self.deltas)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go back to where `state` was read.

        Raises:
            ValueError: it is of other layers.
        """
        load_deltas(type(self).__name__, self.deltas, state["deltas"])
        self.steps_done = state["steps_done"]
