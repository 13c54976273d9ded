"""One update of an optimizer on trial: parameters become what it would make of them, and the optimizer learns nothing.

How that is done depends on the optimizer:

* `peftkern.optim.AdamW` and `AdamW8bit` have it as one kernel, which leaves the old values in the gradient's memory.
* Of torch's `SGD`, `Adam` and `AdamW` every entry is updated by itself. A twin of the optimizer updates one piece of a
  tensor after the other, with a copy of the piece's state: there is never more than one piece twice.
* Of any other optimizer a twin with a copy of all its state makes one step, and the old values are kept beside the new
  ones. That is logged, since it takes memory.

The twin has the optimizer's class and attributes but parameters, state and hooks of its own.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.optim import AdamW, AdamW8bit
from peftkern.select.method import logger

_OWN = (AdamW, AdamW8bit)
_BY_ENTRY = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
_PIECE = 1 << 20
"""Entries of a piece."""

Saved = dict[nn.Parameter, Tensor]
"""What parameters were before a step on trial."""


class ProbeStep:
    """Steps on trial of ``optimizer``.

    A parameter that the optimizer does not train has the numbers of its first group and no state, as it would after
    `hand_over`. Where a learning rate is 0, as at the start of a warm-up, it is the group's ``initial_lr``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # accelerate wraps the optimizer
        self.optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self._groups = [_without_warm_up(group) for group in self.optimizer.param_groups]
        self._group_of = {id(p): index for index, group in enumerate(self._groups) for p in group["params"]}

    @property
    def by_tensor(self) -> bool:
        """Whether one tensor can be stepped without the others: `swap_`."""
        return type(self.optimizer) in (*_OWN, *_BY_ENTRY)

    def step_all_(self, parameters: Sequence[nn.Parameter]) -> Saved:
        """Step ``parameters`` by their gradients, which are gone afterwards. Returns what they were.

        Where this raises, all is as before but for the gradients.
        """
        if not self.by_tensor:
            return self._step_twin(parameters)
        shared = _shared_memory(parameters)
        saved: Saved = {}
        try:
            for parameter in parameters:
                gradient, parameter.grad = parameter.grad, None
                assert gradient is not None
                if gradient.untyped_storage().data_ptr() in shared:
                    gradient = gradient.clone()
                self.swap_(parameter, parameter, gradient)
                saved[parameter] = gradient
        except BaseException:
            put_back(saved)
            raise
        return saved

    @torch.no_grad()
    def swap_(self, parameter: nn.Parameter, values: Tensor, gradient: Tensor) -> None:
        """``values`` of ``parameter`` become what a step makes of them, and ``gradient`` what they were.

        Where this raises, ``values`` are as before.
        """
        group = self._groups[self._group_of.get(id(parameter), 0)]
        if isinstance(self.optimizer, AdamW):
            self.optimizer.probe_(parameter, values, gradient, group)
            return
        done: list[tuple[Tensor, Tensor]] = []
        state = self.optimizer.state.get(parameter, {})
        try:
            for begin, end in _pieces(values, gradient, state):
                old, incoming = _piece(values, begin, end), _piece(gradient, begin, end)
                new = old.clone()
                new.grad = incoming
                self._twin([{**group, "params": [new]}], {new: _state_piece(state, values.shape, begin, end)}).step()
                new.grad = None
                incoming.copy_(old)
                old.copy_(new)
                done.append((old, incoming))
        except BaseException:
            for old, incoming in done:
                old.copy_(incoming)
            raise

    def _step_twin(self, parameters: Sequence[nn.Parameter]) -> Saved:
        logger.warning(
            "the probe copies the weights and the state of %s, which it does not know by tensor; peftkern.optim.AdamW "
            "and torch's SGD, Adam and AdamW are probed without copies",
            type(self.optimizer).__name__,
        )
        saved = {parameter: parameter.detach().clone() for parameter in parameters}
        members: list[list[nn.Parameter]] = [[] for _ in self._groups]
        for parameter in parameters:
            members[self._group_of.get(id(parameter), 0)].append(parameter)
        groups = [
            {**copy.deepcopy({name: value for name, value in group.items() if name != "params"}), "params": own}
            for group, own in zip(self._groups, members, strict=True)
        ]
        own_state = self.optimizer.state
        state = {parameter: copy.deepcopy(own_state[parameter]) for parameter in parameters if parameter in own_state}
        try:
            self._twin(groups, state).step()
        except BaseException:
            put_back(saved)
            raise
        finally:
            for parameter in parameters:
                parameter.grad = None
        return saved

    def _twin(self, groups: list[dict[str, Any]], state: Mapping[Any, Any]) -> torch.optim.Optimizer:
        kind = type(self.optimizer)
        twin: torch.optim.Optimizer = object.__new__(kind)
        twin.__dict__.update(self.optimizer.__dict__)
        # schedulers put a counting step on the object
        twin.__dict__.pop("step", None)
        hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
        twin.__dict__.update({name: OrderedDict() for name in hooks})
        twin.__dict__.update(param_groups=groups, state=defaultdict(dict, state))
        return twin


@torch.no_grad()
def put_back(saved: Saved) -> None:
    """Undo a step on trial, bit for bit."""
    for parameter, values in saved.items():
        parameter.copy_(values)


def _without_warm_up(group: dict[str, Any]) -> dict[str, Any]:
    lr, initial = group.get("lr"), group.get("initial_lr")
    if lr is None or float(lr) != 0 or not initial:
        return group
    logger.info("the learning rate is 0 now, as at the start of a warm-up; the probe steps with initial_lr %s", initial)
    return {**group, "lr": initial}


def _shared_memory(parameters: Iterable[nn.Parameter]) -> set[int]:
    """Addresses of memory that is not one gradient's alone: slices of one result can be those of several parameters."""
    tensors = [tensor for p in parameters for tensor in (p, p.grad) if tensor is not None]
    counts = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors)
    return {address for address, count in counts.items() if count > 1}


def _pieces(values: Tensor, gradient: Tensor, state: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Where pieces begin and end; one piece where the tensors do not lie in memory in one order."""
    matrices = [t for t in state.values() if isinstance(t, Tensor) and t.shape == values.shape]
    if not all(tensor.is_contiguous() for tensor in (values, gradient, *matrices)):
        return [(0, values.numel())]
    return [(begin, min(begin + _PIECE, values.numel())) for begin in range(0, values.numel(), _PIECE)]


def _piece(tensor: Tensor, begin: int, end: int) -> Tensor:
    """A view; of all of it where that is what is asked for."""
    whole = end - begin == tensor.numel()
    return tensor.detach() if whole else tensor.detach().view(-1)[begin:end]


def _state_piece(state: Mapping[str, Any], shape: torch.Size, begin: int, end: int) -> dict[str, Any]:
    """A copy of the state of a piece."""
    return {
        name: _piece(value, begin, end).clone()
        if isinstance(value, Tensor) and name != "step" and value.shape == shape
        else copy.deepcopy(value)
        for name, value in state.items()
    }
