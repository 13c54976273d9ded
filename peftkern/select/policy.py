"""What every policy is that chooses, again and again, which parameters of a model are trained.

    class Random(Policy):
        def select(self) -> Selection:
            return self.selected(some of self.candidates)

A policy is a `Method`: a callback of transformers' Trainer, and a loop of one's own runs it with `step`. When a
selection is due, the policy looks at the batch that the model is just called with (`observe`), chooses (`select`) and
lets the choice take effect (`apply`), in front of that forward pass: whoever calls the model, and whatever wraps it,
the same code runs, and no data loader is touched.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from peftkern.select import resume
from peftkern.select.cost_graph import CostGraph
from peftkern.select.execution import Execution, check_between_updates
from peftkern.select.history import history_as_data, history_from_data
from peftkern.select.method import Method, logger
from peftkern.select.record import record
from peftkern.select.savings import PowerMeter, Savings, compute_savings, selection_logs
from peftkern.select.selection import Selection
from peftkern.select.trainer_log import TrainerLog
from peftkern.select.view import SelectionView, view_history

UNITS = ("steps", "epochs")


class Policy(Method):
    """Base class of policies. A subclass overrides `select`, and what it needs of the other functions.

    Candidates are the parameters that require a gradient when the model is prepared. The optimizer holds all of them,
    so that its checkpoints fit any selection. A checkpoint of the optimizer holds the selection in force and when the
    next one is due as well: training that goes on from it is training that was never interrupted. In a loop of one's
    own, load the optimizer's state before `start`.

    Where several processes train together, the selection of the first one counts. `DistributedDataParallel` needs
    ``find_unused_parameters=True``; see `peftkern.select.execution`.

    Args:
        interval: selections are this far apart; ``None``: one selection for the whole run.
        interval_unit: ``"steps"``, which are updates, or ``"epochs"``. A loop of one's own says with `next_epoch` where
            those begin.
        parked: whether parameters that go keep the state of their optimizer; see `Execution.apply`.

    Attributes:
        candidates: names of the parameters that can be chosen; empty before `prepare`.
        selection: in force; ``None`` before the first.
        history: of all selections, those before the checkpoint that training goes on from included, the oldest first.
        passes: forward and backward passes in one update, for the savings. The Trainer's number is known by itself.
        record_costs: set it, and FLOPs are recorded on the first batch where the policy itself looks at no costs, so
            that savings are known.

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(self, interval: int | None = None, interval_unit: str = "steps", *, parked: bool = True) -> None:
        super().__init__()
        name = type(self).__name__
        if interval is not None and (isinstance(interval, bool) or not isinstance(interval, int) or interval < 1):
            raise ValueError(f"{name}: interval must be None or a whole number from 1 on, got {interval!r}")
        if interval_unit not in UNITS:
            raise ValueError(f"{name}: interval_unit must be one of {list(UNITS)}, got {interval_unit!r}")
        self.interval, self.interval_unit, self.parked = interval, interval_unit, parked
        self.candidates: tuple[str, ...] = ()
        self.selection: Selection | None = None
        self.history: list[Selection] = []
        self._execution: Execution | None = None
        self._next: int | None = None
        self._epoch = 0
        self._is_selecting = False
        self._saving: resume.Saving | None = None
        self._hook: Any = None
        self.passes = 1
        self.record_costs = False
        self._log = TrainerLog(self.logs)

    # ---- what a policy decides

    def observe(self, batch: Mapping[str, Any]) -> None:
        """Take note of what `select` needs to know of ``batch``, which the model is about to be called with.

        The model may be called and weights may change here, as long as weights, gradients, optimizer and random
        numbers are as before when it returns.
        """

    def select(self) -> Selection:
        """What is trained from now on, some of ``candidates``; `selected` makes it of names."""
        raise NotImplementedError(f"{type(self).__name__}: select() must return a Selection")

    def apply(self, selection: Selection) -> None:
        """Let ``selection`` take effect; it may be one of a checkpoint."""
        self.execution().apply(selection.names, self.optimizer, parked=self.parked)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: numbers, words, tensors, and lists and dictionaries of them."""
        return {
            "steps_done": self.steps_done,
            "epoch": self._epoch,
            "next": self._next,
            "history": history_as_data(self.history),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go back to where `state` was read; `start` calls it."""
        self.steps_done, self._epoch, self._next = state["steps_done"], state["epoch"], state["next"]
        history = history_from_data(state["history"])
        if history:
            self._check_names(history[-1].names)
            self.history = history[:-1]
            self._put_in_force(history[-1])

    def selected(self, names: Iterable[str], **facts: Any) -> Selection:
        """A `Selection` of this policy: the candidates that ``names`` holds, in the model's order.

        Args:
            facts: further attributes of `Selection`.

        Raises:
            ValueError: a name is none of a candidate.
        """
        chosen = set(names)
        self._check_names(chosen)
        in_order = tuple(name for name in self.candidates if name in chosen)
        return Selection(type(self).__name__, in_order, self.candidates, **{"step": self.steps_done, **facts})

    def known_costs(self) -> Mapping[str, CostGraph]:
        """Costs of the last selection, by unit: none before the first. A checkpoint holds them."""
        return self.history[-1].costs if self.history else {}

    def _check_names(self, names: Iterable[str]) -> None:
        unknown = set(names).difference(self.candidates)
        if unknown:
            raise ValueError(f"{type(self).__name__}: {min(unknown)} is none of the candidates")

    # ---- what it has done

    def logs(self) -> dict[str, float]:
        """The selection in force and what was saved, as numbers for a log; see `peftkern.select.selection_logs`.

        The Trainer's logs of a training loss have them by themselves.
        """
        return selection_logs(self.history, self.steps_done, self.passes)

    def savings(self, watts: float | PowerMeter | None = None, grams_per_kwh: float | None = None) -> Savings:
        """What was saved since training began, against training all candidates; see `peftkern.select.compute_savings`.

        Raises:
            ValueError: an argument is one that `compute_savings` refuses.
        """
        return compute_savings(self.history, self.steps_done, self.passes, watts, grams_per_kwh)

    def view(self, watts: float | PowerMeter | None = None, grams_per_kwh: float | None = None) -> SelectionView:
        """All selections, to print, draw and save; see `peftkern.select.view`.

        Raises:
            ValueError: nothing has been selected, or an argument is one that `compute_savings` refuses.
        """
        return view_history(self.history, self.steps_done, self.passes, watts, grams_per_kwh)

    # ---- from beginning to end

    def prepare(self, model: nn.Module) -> None:
        """Take note of the candidates: the parameters that require a gradient.

        Raises:
            ValueError: there is none.
            RuntimeError: this object has prepared another model.
        """
        candidates = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        if not candidates:
            raise ValueError(f"{type(self).__name__}: no parameter of the model requires a gradient")
        super().prepare(model)
        if self._execution is None:  # otherwise prepared, and not finished
            self._execution = Execution(model)
            self.candidates = candidates

    def parameters(self) -> Iterator[nn.Parameter]:
        """What the optimizer has to hold: all candidates."""
        by_name = dict(self.prepared().named_parameters())
        return (by_name[name] for name in self.candidates)

    def start(self, optimizer: torch.optim.Optimizer, steps: int | None = None) -> None:
        """Begin, or go on from the checkpoint that ``optimizer`` has loaded.

        Raises:
            RuntimeError: no model was prepared.
            ValueError: the checkpoint is of another method.
        """
        super().start(optimizer, steps)
        self._let_go()
        self.selection, self.history = None, []
        self._next = self._now()
        state = resume.take_from(optimizer, type(self).__name__)
        if state is not None:
            self.load_state(state)
        self._saving = resume.Saving(optimizer, type(self).__name__, self.state)
        # a compiled model would trace what a selection takes: fake tensors, autograd's graph, the solver
        before_forward = torch.compiler.disable(self._before_forward)  # type: ignore[no-untyped-call]
        self._hook = self.prepared().register_forward_pre_hook(before_forward, with_kwargs=True)

    def finish(self) -> None:
        """Every parameter requires a gradient as it did before, and no hook is left."""
        self.execution().undo()
        self._let_go()
        self._execution, self.optimizer = None, None

    def _let_go(self) -> None:
        if self._saving is not None:
            self._saving.close()
        if self._hook is not None:
            self._hook.remove()
        self._saving = self._hook = None

    def execution(self) -> Execution:
        """What lets a selection take effect.

        Raises:
            RuntimeError: `prepare` has not been called.
        """
        self.prepared()
        if self._execution is None:
            raise RuntimeError(f"{type(self).__name__}: has finished; call prepare(model) to begin anew")
        return self._execution

    # ---- when a selection is due

    def next_epoch(self) -> None:
        """An epoch begins, another than the first. The Trainer says so by itself."""
        self._epoch += 1

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._epoch = math.floor(state.epoch + 1e-6)

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
        self._epoch = 0
        super().on_train_begin(args, state, control, optimizer, **kwargs)
        self.passes = args.gradient_accumulation_steps
        self._log.enter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_new = self.selection is not None and self.selection.step == self.steps_done - 1
        if is_new and args.logging_strategy != "no":
            control.should_log = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._log.leave()
        super().on_train_end(args, state, control, **kwargs)

    def _now(self) -> int:
        return self.steps_done if self.interval_unit == "steps" else self._epoch

    def _is_due(self) -> bool:
        return self._next is not None and self._now() >= self._next

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_due() and model.training and torch.is_grad_enabled() and not self._is_selecting:
            check_between_updates(model)
            self._is_selecting = True
            self.execution().skip_idle_regions()
            try:
                batch = _as_batch(model, args, kwargs)
                self.observe(batch)
                self._put_in_force(_of_the_first_process(self._with_costs(self.select(), batch)))
            finally:
                self._is_selecting = False
            self._next = None if self.interval is None else self._now() + self.interval

    def _with_costs(self, selection: Selection, batch: Mapping[str, Any]) -> Selection:
        if selection.costs or not self.record_costs:
            return selection
        costs = self.known_costs() or {"flops": record(self.prepared(), batch, candidates=self.candidates)}
        return replace(selection, costs=costs)

    def _put_in_force(self, selection: Selection) -> None:
        self.apply(selection)
        self.selection = selection
        self.history.append(selection)
        logger.info("%s", selection)


def _as_batch(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by their names."""
    names = inspect.signature(model.forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _of_the_first_process(selection: Selection) -> Selection:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return selection
    box = [selection]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
