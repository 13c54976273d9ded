"""The K largest scores over many tensors, exactly K of them, and quantiles of the same scores.

Scores are float32. Equal ones are taken from the earlier tensor first, and within a tensor from the lower index; 0 and
-0 are equal. The bits of a score become an integer key that orders as the score does. Three passes count the keys by
their digits of 11, 11 and 10 bits, each pass below the digits that are known: that leaves the K-th largest key, and how
many lie above it. A last pass collects. No sort, and never a copy of all scores.

Counts are integers: the result does not depend on the number of threads, and is the same on every backend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.formats import VALUE_DTYPES

SCORES = {"magnitude": False, "value": False, "difference": True, "product": True, "outer": True}
"""Names of scores, and whether they take a second tensor: |a|, a, |a - b|, |a b| and rᵢ cⱼ."""

PASSES = ((21, 11), (10, 11), (0, 10))
"""Lowest bit and number of bits of each digit of a key."""
BUCKETS = 2048
NAN_KEY = 0xFFFFFFFF
"""Above the key of infinity by more than the highest digit shows: NaN alone has that digit."""
EXCLUDED_KEY = 0
"""Below the key of -infinity likewise."""

CHUNK_ELEMENTS = 1 << 20
"""Elements that the reference works on at a time."""


@dataclass(frozen=True)
class Scored:
    """One tensor and what its scores are made of.

    Attributes:
        score: a name of `SCORES`.
        a: contiguous, flat.
        other: likewise, of the size of ``a`` but for the score "outer"; ``None`` where the score takes none.
        exclude: [n] int64, strictly ascending flat indices that are passed over; ``None``: none.
    """

    score: str
    a: Tensor
    other: Tensor | None
    exclude: Tensor | None

    @property
    def elements(self) -> int:
        """How many scores there are, excluded ones included."""
        if self.score == "outer":
            assert self.other is not None
            return self.a.numel() * self.other.numel()
        return self.a.numel()


def select_top(
    tensors: Sequence[Tensor],
    k: int,
    *,
    score: str = "magnitude",
    other: Sequence[Tensor] | None = None,
    exclude: Sequence[Tensor | None] | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """Where the ``k`` largest scores are, over all tensors together; exactly ``k`` of them.

    Args:
        tensors: a, each float32, bfloat16 or float16, any shape and strides; [rows] for "outer".
        k: how many, 0 included.
        score: ``"magnitude"`` |a|, ``"value"`` a, ``"difference"`` |a - b|, ``"product"`` |a b|, or ``"outer"`` rᵢ cⱼ
            of the matrix [rows, columns] that is never formed.
        other: b, each of the shape of its tensor; [columns] for "outer".
        exclude: for each tensor strictly ascending flat indices (row-major, int64) that are not taken, or ``None``.
        backend: name of the backend that must run it; ``None`` lets the table decide.

    Returns:
        For each tensor its flat indices (row-major; row * columns + column for "outer"), ascending, int64.

    Raises:
        ValueError: fewer than ``k`` scores; a score is NaN; unknown ``score``; shapes or devices do not fit.
        TypeError: a dtype or type does not fit.
        BackendError: a forced backend cannot run the call.
    """
    scored = _scored("select_top", tensors, score, other, exclude)
    available = _available(scored)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"select_top: k must be an int, got {type(k).__name__}")
    if not 0 <= k <= available:
        raise ValueError(f"select_top: k must be between 0 and the number of scores, {available}; got {k}")
    if k == 0:
        _check_not_nan("select_top", _histograms(scored, *PASSES[0], 0, backend))
        return [torch.empty(0, dtype=torch.int64, device=entry.a.device) for entry in scored]
    bound = _find_bound("select_top", scored, k, backend)
    ties = _share_ties(bound.equal, k - sum(bound.above))
    return [
        _collect(entry, bound.key, above, taken, backend)
        for entry, above, taken in zip(scored, bound.above, ties, strict=True)
    ]


def quantile_of(
    tensors: Sequence[Tensor],
    q: float,
    *,
    score: str = "magnitude",
    other: Sequence[Tensor] | None = None,
    exclude: Sequence[Tensor | None] | None = None,
    backend: str | None = None,
) -> float:
    """The score at position ⌊q (n - 1)⌋ of all n scores in ascending order: a quantile that is one of the scores.

    Args and errors are those of :func:`select_top`; ``q`` is from 0 (the smallest) to 1 (the largest).

    Raises:
        ValueError: also where ``q`` is out of range, or there is no score.
    """
    scored = _scored("quantile_of", tensors, score, other, exclude)
    available = _available(scored)
    if not 0 <= q <= 1:
        raise ValueError(f"quantile_of: q must be between 0 and 1, got {q}")
    if available == 0:
        raise ValueError("quantile_of: there is no score to take a quantile of")
    position = math.floor(q * (available - 1))
    return _score_of_key(_find_bound("quantile_of", scored, available - position, backend).key)


# ---- checks


def _scored(
    caller: str,
    tensors: Sequence[Tensor],
    score: str,
    other: Sequence[Tensor] | None,
    exclude: Sequence[Tensor | None] | None,
) -> list[Scored]:
    if score not in SCORES:
        raise ValueError(f"{caller}: score must be one of {sorted(SCORES)}, got {score!r}")
    if SCORES[score] != (other is not None):
        needs = "needs other, one tensor for each" if SCORES[score] else "takes no other"
        raise ValueError(f"{caller}: score {score!r} {needs}")
    others = [None] * len(tensors) if other is None else list(other)
    excluded = [None] * len(tensors) if exclude is None else list(exclude)
    for name, values in (("other", others), ("exclude", excluded)):
        if len(values) != len(tensors):
            raise ValueError(f"{caller}: {name} must have one for each of {len(tensors)} tensors, got {len(values)}")
    return [
        _one_scored(caller, position, score, a, b, out)
        for position, (a, b, out) in enumerate(zip(tensors, others, excluded, strict=True))
    ]


def _one_scored(caller: str, position: int, score: str, a: Any, b: Any, exclude: Any) -> Scored:
    _check_tensor(caller, f"tensors[{position}]", a)
    if b is not None:
        _check_tensor(caller, f"other[{position}]", b)
        _check_fit(caller, position, score, a, b)
    flat = a.detach().reshape(-1).contiguous()
    entry = Scored(score, flat, None if b is None else b.detach().reshape(-1).contiguous(), None)
    if exclude is None:
        return entry
    _check_exclude(caller, f"exclude[{position}]", exclude, entry)
    return Scored(score, entry.a, entry.other, exclude.contiguous())


def _check_tensor(caller: str, name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{caller}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in VALUE_DTYPES:
        raise TypeError(f"{caller}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{caller}: {name} must be dense, got {tensor.layout}")


def _check_fit(caller: str, position: int, score: str, a: Tensor, b: Tensor) -> None:
    if b.device != a.device:
        raise ValueError(f"{caller}: tensors[{position}] is on {a.device} and other[{position}] on {b.device}")
    if score == "outer":
        if a.dim() != 1 or b.dim() != 1:
            raise ValueError(
                f"{caller}: score 'outer' takes tensors[{position}] [rows] and other[{position}] [columns]; "
                f"got {list(a.shape)} and {list(b.shape)}"
            )
    elif b.shape != a.shape:
        raise ValueError(
            f"{caller}: other[{position}] must have the shape of its tensor, {list(a.shape)}; got {list(b.shape)}"
        )


def _check_exclude(caller: str, name: str, exclude: Any, entry: Scored) -> None:
    if not isinstance(exclude, Tensor) or exclude.dtype != torch.int64 or exclude.dim() != 1:
        raise TypeError(f"{caller}: {name} must be a tensor [n] of int64")
    if exclude.device != entry.a.device:
        raise ValueError(f"{caller}: {name} is on {exclude.device} and its tensor on {entry.a.device}")
    if exclude.numel() == 0:
        return
    if bool((exclude.diff() <= 0).any()):
        raise ValueError(f"{caller}: {name} must ascend strictly; sort it and drop duplicates: indices.unique()")
    first, last = int(exclude[0]), int(exclude[-1])
    if first < 0 or last >= entry.elements:
        raise ValueError(f"{caller}: {name} must be within 0 and {entry.elements - 1}, got {first} to {last}")


def _available(scored: Sequence[Scored]) -> int:
    return sum(entry.elements - (0 if entry.exclude is None else entry.exclude.numel()) for entry in scored)


def _check_not_nan(caller: str, histograms: Tensor) -> None:
    """Takes the counts of the highest digit, whose last bucket is NaN's."""
    for position, count in enumerate(histograms[:, NAN_KEY >> PASSES[0][0]].tolist()):
        if count > 0:
            raise ValueError(f"{caller}: {count} scores of tensors[{position}] are NaN, which has no place in an order")


# ---- the passes


@dataclass(frozen=True)
class _Bound:
    """The key of the k-th largest score, and for each tensor how many keys are above it and how many equal it."""

    key: int
    above: list[int]
    equal: list[int]


def _histograms(scored: Sequence[Scored], shift: int, bits: int, prefix: int, backend: str | None) -> Tensor:
    """[tensors, 2048] int64 on the CPU: see :func:`score_histogram_reference`."""
    if not scored:
        return torch.zeros(0, BUCKETS, dtype=torch.int64)
    device = scored[0].a.device
    counts = [
        registry.run("score_histogram", entry, shift, bits, prefix, backend=backend).to(device) for entry in scored
    ]
    return torch.stack(counts).cpu()


def _find_bound(caller: str, scored: Sequence[Scored], k: int, backend: str | None) -> _Bound:
    """k is from 1 to the number of scores."""
    prefix, remaining = 0, k
    above = torch.zeros(len(scored), dtype=torch.int64)
    for shift, bits in PASSES:
        histograms = _histograms(scored, shift, bits, prefix, backend)
        if shift == PASSES[0][0]:
            _check_not_nan(caller, histograms)
            histograms[:, EXCLUDED_KEY] = 0
        totals = histograms.sum(dim=0)
        from_top = totals.flip(0).cumsum(0)
        digit = BUCKETS - 1 - int((from_top < remaining).sum())
        above += histograms[:, digit + 1 :].sum(dim=1)
        remaining -= int(totals[digit + 1 :].sum())
        prefix = prefix << bits | digit
        equal = histograms[:, digit]
    return _Bound(prefix, above.tolist(), equal.tolist())


def _share_ties(equal: Sequence[int], wanted: int) -> list[int]:
    """How many of its equal scores each tensor gives, the earlier ones first."""
    before = accumulate(equal, initial=0)
    return [max(0, min(count, wanted - taken)) for count, taken in zip(equal, before, strict=False)]


def _collect(entry: Scored, key: int, above: int, ties: int, backend: str | None) -> Tensor:
    if above + ties == 0:
        return torch.empty(0, dtype=torch.int64, device=entry.a.device)
    indices: Tensor = registry.run("score_collect", entry, key, ties, above + ties, backend=backend)
    return indices


# ---- keys


def _score_of_key(key: int) -> float:
    bits = key ^ (0x80000000 if key & 0x80000000 else 0xFFFFFFFF)
    return torch.tensor(bits - (1 << 32 if bits & 0x80000000 else 0), dtype=torch.int32).view(torch.float32).item()


def _keys(scores: Tensor) -> Tensor:
    """float32 scores as int64 keys, from 0 to 2³² - 1, that order alike."""
    bits = (scores + 0.0).view(torch.int32).long()  # -0 + 0 is +0
    return torch.where(scores.isnan(), NAN_KEY, torch.where(bits < 0, ~bits & 0xFFFFFFFF, bits | 0x80000000))


def _scores(entry: Scored, begin: int, end: int) -> Tensor:
    if entry.other is None:
        a = entry.a[begin:end].float()
        return a.abs() if entry.score == "magnitude" else a
    if entry.score == "outer":
        flat = torch.arange(begin, end, device=entry.a.device)
        columns = entry.other.numel()
        return entry.a[flat // columns].float() * entry.other[flat % columns].float()
    a, b = entry.a[begin:end].float(), entry.other[begin:end].float()
    return (a - b if entry.score == "difference" else a * b).abs()


def _chunks(entry: Scored) -> Iterator[tuple[int, Tensor]]:
    """The first index of each piece, and its keys."""
    for begin in range(0, entry.elements, CHUNK_ELEMENTS):
        end = min(begin + CHUNK_ELEMENTS, entry.elements)
        keys = _keys(_scores(entry, begin, end))
        if entry.exclude is not None:
            within = torch.searchsorted(entry.exclude, torch.tensor([begin, end], device=keys.device)).tolist()
            keys[entry.exclude[within[0] : within[1]] - begin] = EXCLUDED_KEY
        yield begin, keys


# ---- reference


@registry.register("score_histogram", "reference")
def score_histogram_reference(entry: Scored, shift: int, bits: int, prefix: int) -> Tensor:
    """How many keys have each value of a digit, among those with ``prefix`` above the digit: [2048] int64.

    Args:
        entry: the scores; excluded ones have key 0, NaN has key 2³² - 1.
        shift: lowest bit of the digit.
        bits: its number of bits.
        prefix: what the bits above the digit must be; 0 for the highest digit, which has none above.
    """
    counts = torch.zeros(BUCKETS, dtype=torch.int64, device=entry.a.device)
    for _, keys in _chunks(entry):
        digits = keys[keys >> (shift + bits) == prefix] >> shift & ((1 << bits) - 1)
        counts += torch.bincount(digits, minlength=BUCKETS)
    return counts


@registry.register("score_collect", "reference")
def score_collect_reference(entry: Scored, key: int, ties: int, count: int) -> Tensor:
    """Ascending indices, [count] int64, of the keys above ``key`` and of the first ``ties`` that equal it."""
    found = []
    for begin, keys in _chunks(entry):
        equal = keys == key
        taken = equal & (equal.cumsum(0) <= ties)
        ties -= int(taken.sum())
        found.append(((keys > key) | taken).nonzero().reshape(-1) + begin)
    indices = torch.cat(found)
    assert indices.numel() == count
    return indices
