"""What each tensor's gradient and each stretch of the error's path take, in seconds, measured on the model itself.

    step(S) = c + a · Σ seconds of the operators that S needs + Σ seconds of the updates of S

Every operator of a real forward and backward pass is timed, and charged as in :mod:`peftkern.select.trace`; those that
do the same with the same shapes count alike. Timed one by one they leave out what lies between them, and memory that is
kept, freed and paged in anew. So whole steps are timed as well, with everything trained and with the least; a and c
follow from the two. What a forward pass takes longer because it keeps more for the backward pass is in a, what every
step takes is in c.

The update of a tensor is timed on another one of its size in an optimizer of the same kind.
"""

from __future__ import annotations

import copy
import logging
import statistics
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.select.cost_graph import CostGraph
from peftkern.select.trace import (
    Batch,
    Loss,
    Trace,
    asking,
    gradients_put_aside,
    left_alone,
    model_loss,
    trace,
    without_hooks,
)

logger = logging.getLogger("peftkern")


def measure(
    model: nn.Module,
    batch: Batch,
    graph: CostGraph,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    loss: Loss | None = None,
    repeats: int = 3,
) -> CostGraph:
    """The costs of a training step of ``model`` in seconds, of the segments and tensors of ``graph``.

    Takes as long as about ``1 + 1.5 * repeats`` steps. Parameters, their gradients, buffers, the optimizer and random
    number generators are afterwards as before.

    Args:
        model: as for `record`.
        batch: of the shape that is trained on; a smaller one has other costs, and not in proportion.
        graph: that `record` gave for this model.
        optimizer: whose updates are counted as well; ``None``: none are.
        loss: as for `record`.
        repeats: how many times whole steps and updates are timed; medians are taken. Operators are timed in one
            pass: of them only the shares count.

    Raises:
        ValueError: ``repeats`` is below 1, or the graph is of other tensors; and as `record` does.
    """
    names = tuple(graph.by_name)
    unknown = set(names) - {name for name, _ in model.named_parameters()}
    if unknown:
        raise ValueError(f"measure: the graph has a tensor {min(unknown)!r}, and the model has none")
    if repeats < 1:
        raise ValueError(f"measure: repeats must be at least 1, got {repeats}")
    loss = loss or model_loss
    device = next(model.parameters()).device
    with left_alone(model), gradients_put_aside(model):
        timed = _with_costs(graph, *_operator_seconds(model, batch, names, loss, device))
        least = [timed.smallest()[0]]
        full_seconds, least_seconds = _step_seconds(model, batch, (names, least), loss, repeats, device)
    scale, constant = _fit(timed, least, full_seconds, least_seconds)
    updates = {} if optimizer is None else update_seconds(model, optimizer, names, repeats)
    return replace(
        timed,
        forward=constant,
        segments=tuple(replace(segment, cost=scale * segment.cost) for segment in timed.segments),
        tensors=tuple(replace(t, cost=scale * t.cost + updates.get(t.name, 0.0)) for t in timed.tensors),
    )


def _fit(timed: CostGraph, least: Sequence[str], full_seconds: float, least_seconds: float) -> tuple[float, float]:
    """a and c."""
    full, little = timed.backward(timed.by_name), timed.backward(least)
    scale = (full_seconds - least_seconds) / (full - little) if full > little else 1.0
    if scale <= 0:
        logger.warning("measure: training everything took no longer than training %s; is the machine busy?", least[0])
        scale = 1.0
    return scale, max(least_seconds - scale * little, 0.0)


# ---- operators one by one


class _Stopwatch:
    """Seconds of each operator; on a GPU between two events."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._kinds: list[Hashable] = []
        self._begin: Any = None

    def start(self) -> None:
        self._begin = self._now()

    def stop(self, kind: Hashable) -> None:
        self._spans.append((self._begin, self._now()))
        self._kinds.append(kind)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self) -> list[float]:
        """Of each operator the median of its kind: layers are alike, and what disturbs one pass hits few of them."""
        spans: dict[Hashable, list[float]] = defaultdict(list)
        for kind, span in zip(self._kinds, self._span_seconds(), strict=True):
            spans[kind].append(span)
        medians = {kind: statistics.median(each) for kind, each in spans.items()}
        return [medians[kind] for kind in self._kinds]

    def _span_seconds(self) -> list[float]:
        if not self._on_gpu:
            return [end - begin for begin, end in self._spans]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in self._spans]


def _operator_seconds(
    model: nn.Module, batch: Batch, names: Sequence[str], loss: Loss, device: torch.device
) -> tuple[Trace, list[float]]:
    """What was watched, and the seconds of each of its charges."""
    stopwatch = _Stopwatch(device)
    seen = trace(model, batch, names, loss, stopwatch)
    seconds = stopwatch.seconds()
    return seen, [charge.share * seconds[charge.call] for charge in seen.charges]


def _with_costs(graph: CostGraph, seen: Trace, costs: Sequence[float]) -> CostGraph:
    """``graph`` with the costs of the charges of ``seen``; those that every step has are left out."""
    bits = {name: 1 << index for index, name in enumerate(seen.names)}
    users = [0] * len(graph.segments)
    for name, bit in bits.items():
        for index in graph.needed([name]):
            users[index] |= bit
    segment_of = {tensors: index for index, tensors in enumerate(users)}
    tensor_of = {bit: name for name, bit in bits.items()}
    segments, tensors = [0.0] * len(users), dict.fromkeys(bits, 0.0)
    everything = (1 << len(bits)) - 1
    for charge, cost in zip(seen.charges, costs, strict=True):
        if charge.tensors in tensor_of:
            tensors[tensor_of[charge.tensors]] += cost
        elif charge.tensors & everything != everything and charge.tensors <= everything:
            known = segment_of.get(charge.tensors)
            nearest = _smallest_above(charge.tensors, users) if known is None else known
            if nearest is not None:
                segments[nearest] += cost
    return CostGraph(
        "seconds",
        0.0,
        tuple(replace(segment, cost=cost) for segment, cost in zip(graph.segments, segments, strict=True)),
        tuple(replace(tensor, cost=tensors[tensor.name]) for tensor in graph.tensors),
    )


def _smallest_above(tensors: int, users: Sequence[int]) -> int | None:
    """The segment of the fewest tensors with all of ``tensors`` among them."""
    fitting = [index for index, of_segment in enumerate(users) if tensors & ~of_segment == 0]
    return min(fitting, key=lambda index: users[index].bit_count(), default=None)


# ---- whole steps


def _step_seconds(
    model: nn.Module,
    batch: Batch,
    selections: Sequence[Sequence[str]],
    loss: Loss,
    repeats: int,
    device: torch.device,
) -> list[float]:
    """Of forward, backward and clearing the gradients, for each selection; in turn, so that a drift meets all alike."""
    samples: list[list[float]] = [[] for _ in selections]
    for _ in range(repeats):
        for names, seconds in zip(selections, samples, strict=True):
            with asking(model, names), without_hooks(model), torch.enable_grad():
                seconds.append(_seconds_of(lambda: _step(model, batch, loss), device))
    return [statistics.median(seconds) for seconds in samples]


def _step(model: nn.Module, batch: Batch, loss: Loss) -> None:
    loss(model, batch).backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        parameter.grad = None


def _seconds_of(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


# ---- the optimizer

_SAMPLE = 1 << 23
"""Entries whose update is timed at most: more than fits into caches."""
_SMALL = 16
"""How many of the smallest tensors are timed for what a tensor takes whatever its size."""


def update_seconds(
    model: nn.Module, optimizer: torch.optim.Optimizer, names: Sequence[str], repeats: int = 3
) -> dict[str, float]:
    """Seconds of the update of each parameter of ``names``: a part for each entry, and one for each tensor.

    Nothing that ``optimizer`` holds is touched. Parameters that it does not hold take those of its first group.
    """
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    parameters = dict(model.named_parameters())
    sizes = {name: parameters[name].numel() for name in names}
    by_size = sorted(names, key=sizes.__getitem__)
    samples = [_fill(reversed(by_size), sizes), by_size[:_SMALL]]
    seconds = [_update_seconds(optimizer, [parameters[name] for name in sample], repeats) for sample in samples]
    per_entry, per_tensor = _line([(len(s), sum(sizes[n] for n in s)) for s in samples], seconds)
    return {name: per_tensor + per_entry * size for name, size in sizes.items()}


def _fill(names: Iterator[str], sizes: Mapping[str, int]) -> list[str]:
    """The first of ``names`` up to `_SAMPLE` entries; one in any case."""
    chosen: list[str] = []
    for name in names:
        if not chosen or sum(sizes[each] for each in chosen) + sizes[name] <= _SAMPLE:
            chosen.append(name)
    return chosen


def _line(counts: Sequence[tuple[int, int]], seconds: Sequence[float]) -> tuple[float, float]:
    """Seconds per entry and per tensor that explain those of (tensors, entries); neither is negative."""
    (many, large), (few, small) = counts
    determinant = large * few - many * small
    if determinant > 0:
        per_entry = (seconds[0] * few - seconds[1] * many) / determinant
        per_tensor = (seconds[1] * large - seconds[0] * small) / determinant
        if per_entry >= 0 and per_tensor >= 0:
            return per_entry, per_tensor
    return seconds[0] / large if large else 0.0, 0.0


def _update_seconds(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], repeats: int) -> float:
    twin = _twin(optimizer, parameters)
    step: Callable[[Any], object] = type(twin).step  # not the object's own, which a scheduler may have wrapped
    device = parameters[0].device
    step(twin)  # makes its state
    return statistics.median(_seconds_of(lambda: step(twin), device) for _ in range(repeats))


def _twin(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """An optimizer of the same settings over parameters of the same sizes, with gradients and without hooks."""
    twin = copy.copy(optimizer)
    group_of = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    members: list[list[Tensor]] = [[] for _ in optimizer.param_groups]
    for parameter in parameters:
        stand_in = nn.Parameter(torch.zeros_like(parameter))
        stand_in.grad = torch.full_like(stand_in, 1e-3)
        members[group_of.get(id(parameter), 0)].append(stand_in)
    groups = zip(optimizer.param_groups, members, strict=True)
    twin.param_groups = [{**group, "params": own} for group, own in groups]
    twin.state = defaultdict(dict)
    twin._optimizer_step_pre_hooks = OrderedDict()
    twin._optimizer_step_post_hooks = OrderedDict()
    return twin
