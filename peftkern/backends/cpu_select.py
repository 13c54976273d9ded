"""Scores and importance on the CPU: for ``csrc/cpu/isa/select.inl.h`` and ``importance.inl.h``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.backends import cpu, registry
from peftkern.ops.select_top import BUCKETS, Scored

_SCORE_CODE = {"magnitude": 0, "value": 1, "difference": 2, "product": 3, "outer": 4}
_TERM_CODE = {"sum": 0, "square": 1, "product": 2, "difference": 3}
"""As in csrc/cpu/kernels.h."""


# ---- scores


def _supports_scored(entry: Scored, *_rest: Any) -> str | None:
    return cpu.supports_values(entry.a)


def _scores_tuple(entry: Scored) -> tuple[tuple[Any, ...], list[Tensor]]:
    """The scores for the native call, and the tensors that have to live as long as it."""
    a = entry.a.resolve_neg()
    other = None if entry.other is None else entry.other.resolve_neg()
    columns = entry.other.numel() if entry.score == "outer" and entry.other is not None else 0
    exclude = torch.empty(0, dtype=torch.int64, device=a.device) if entry.exclude is None else entry.exclude
    values = (_SCORE_CODE[entry.score], cpu.values_tuple(a), cpu.values_tuple(other), columns, entry.elements)
    return (*values, exclude.data_ptr(), exclude.numel()), [a, exclude, *([] if other is None else [other])]


@registry.register("score_histogram", "cpu", supports=_supports_scored)
def score_histogram(entry: Scored, shift: int, bits: int, prefix: int) -> Tensor:
    """See :func:`peftkern.ops.select_top.score_histogram_reference`."""
    counts = torch.zeros(BUCKETS, dtype=torch.int64, device=entry.a.device)
    if entry.elements > 0:
        scores, alive = _scores_tuple(entry)
        threads = torch.get_num_threads()
        cpu.native.score_histogram(cpu.chosen_isa(), scores, shift, bits, prefix, counts.data_ptr(), threads)
        del alive
    return counts


@registry.register("score_collect", "cpu", supports=_supports_scored)
def score_collect(entry: Scored, key: int, ties: int, count: int) -> Tensor:
    """See :func:`peftkern.ops.select_top.score_collect_reference`."""
    indices = torch.empty(count, dtype=torch.int64, device=entry.a.device)
    if count > 0:
        scores, alive = _scores_tuple(entry)
        threads = torch.get_num_threads()
        cpu.native.score_collect(cpu.chosen_isa(), scores, key, ties, indices.data_ptr(), count, threads)
        del alive
    return indices


# ---- importance


def _importance_tuple(
    gradient: Tensor, kind: str, other: Tensor | None, rows: int, saved: Tensor | None = None
) -> tuple[tuple[Any, ...], list[Tensor | None]]:
    """The terms for the native call, and the tensors that have to live as long as it."""
    gradient = gradient.resolve_neg().contiguous()
    other, saved = (None if tensor is None else tensor.resolve_neg().contiguous() for tensor in (other, saved))
    columns = gradient.numel() // max(rows, 1)
    address = 0 if saved is None else saved.data_ptr()
    terms = (_TERM_CODE[kind], cpu.values_tuple(gradient), cpu.values_tuple(other), address, rows, columns)
    return terms, [gradient, other, saved]


def _row_sums(gradient: Tensor, kind: str, other: Tensor | None, rows: int, saved: Tensor | None = None) -> Tensor:
    """[rows] float64."""
    sums = torch.zeros(rows, dtype=torch.float64, device=gradient.device)
    if gradient.numel() > 0:
        terms, alive = _importance_tuple(gradient, kind, other, rows, saved)
        cpu.native.sum_importance(cpu.chosen_isa(), terms, sums.data_ptr(), torch.get_num_threads())
        del alive
    return sums


@registry.register("accumulate_importance", "cpu", supports=cpu.supports_values)
def accumulate_importance(total: Tensor, gradient: Tensor, kind: str, other: Tensor | None) -> None:
    """See :func:`peftkern.ops.importance.accumulate_importance_`. What is not contiguous is copied first."""
    if total.shape != gradient.shape:
        total.copy_(total.double() + _row_sums(gradient, kind, other, total.numel()))
    elif total.numel() > 0:
        terms, alive = _importance_tuple(gradient, kind, other, 1)
        cpu.native.add_importance(cpu.chosen_isa(), terms, total.data_ptr(), torch.get_num_threads())
        del alive


@registry.register("importance_dot", "cpu", supports=cpu.supports_values)
def importance_dot(gradient: Tensor, delta: Tensor) -> Tensor:
    """See :func:`peftkern.ops.importance.importance_dot`. What is not contiguous is copied first."""
    return _row_sums(gradient, "product", delta, 1)[0].float()


@registry.register("probe_dot", "cpu", supports=cpu.supports_values)
def probe_dot(gradient: Tensor, weight: Tensor, saved: Tensor) -> Tensor:
    """See :func:`peftkern.ops.importance.probe_dot`. What is not contiguous is copied first."""
    return _row_sums(gradient, "difference", weight, 1, saved)[0].float()
