"""Times every path of every product over a range of tokens, and finds where one overtakes the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from peftkern.backends.triton import crossover
from peftkern.backends.triton.crossover import FEW_TOKENS, Path, Product
from peftkern.backends.triton.measured import Band, Row
from peftkern.backends.triton.roofline import Direction, arithmetic_of
from peftkern.tune.operands import Operands, Subject, make
from peftkern.tune.timer import Timer

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")

TOKENS = (1, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
"""Where paths are timed."""

_NOISE = 1.02
"""Medians that differ by less than this factor count as equal; of equals the path with fewer launches is taken."""


class Measure(Protocol):
    """Seconds of one product by one path."""

    def __call__(self, subject: Subject, direction: Direction, tokens: int, path: Path) -> float: ...


class OnDevice:
    """Measures on a GPU. Operands are kept until another subject or number of tokens is asked for."""

    def __init__(self, timer: Timer, device: str = "cuda") -> None:
        self._timer = timer
        self._device = device
        self._kept: tuple[Subject, int] | None = None
        self._operands: list[Operands] = []

    def __call__(self, subject: Subject, direction: Direction, tokens: int, path: Path) -> float:
        if self._kept != (subject, tokens):
            self._operands = []  # before the new ones take their memory
            first = make(subject, tokens, self._device)
            self._operands = first.copies(self._timer.copies(first.bytes_touched))
            self._kept = (subject, tokens)
        calls: list[Callable[[], object]] = [
            operands.forward if direction == "forward" else operands.input_gradient for operands in self._operands
        ]
        with crossover.forced(path):
            return self._timer.seconds(calls)


@dataclass(frozen=True)
class Measured:
    """What was measured for one product: seconds by tokens and path, and the row that follows from them."""

    subject: Subject
    seconds: Mapping[int, Mapping[Path, float]]
    row: Row


def measurements(subjects: Sequence[Subject], tokens: Sequence[int]) -> int:
    """How many times :func:`measure_all` takes."""
    return sum(
        len(paths(subject, direction, count)) for subject in subjects for direction in DIRECTIONS for count in tokens
    )


def measure_all(
    subjects: Sequence[Subject], tokens: Sequence[int], measure: Measure, done: Callable[[], None]
) -> Iterator[Measured]:
    """Measure subject by subject; ``done`` is called after each time that was taken."""
    for subject in subjects:
        taken: dict[Direction, dict[int, dict[Path, float]]] = {direction: {} for direction in DIRECTIONS}
        for count in tokens:
            for direction in DIRECTIONS:
                times: dict[Path, float] = {}
                for path in paths(subject, direction, count):
                    times[path] = measure(subject, direction, count, path)
                    done()
                taken[direction][count] = times
        for direction in DIRECTIONS:
            yield Measured(subject, taken[direction], _row(subject, direction, fit(taken[direction])))


def paths(subject: Subject, direction: Direction, tokens: int) -> list[Path]:
    """The paths that can compute a product, those with fewer launches first."""
    return crossover.possible_paths(product(subject, direction, tokens))


def product(subject: Subject, direction: Direction, tokens: int) -> Product:
    """The product as the crossover table knows it."""
    group = subject.group
    shape = (group.out_features, group.in_features, len(group.outputs))
    return Product(direction, tokens, *shape, subject.format is not None, arithmetic_of(subject.dtype))


def fit(seconds: Mapping[int, Mapping[Path, float]]) -> tuple[Band, ...]:
    """The bands of tokens in which one path is the fastest.

    Between two numbers of tokens with different winners the border is their geometric mean. The last band is open.
    """
    winners = [(tokens, _fastest(seconds[tokens])) for tokens in sorted(seconds)]
    bands = []
    for (tokens, path), (following, other) in pairwise(winners):
        if path != other:
            border = math.isqrt(tokens * following)
            bands.append(Band(min(border, FEW_TOKENS) if path == Path.FEW else border, path))
    return (*bands, Band(None, winners[-1][1]))


def _fastest(times: Mapping[Path, float]) -> Path:
    limit = min(times.values()) * _NOISE
    return next(path for path, value in times.items() if value <= limit)


def _row(subject: Subject, direction: Direction, bands: tuple[Band, ...]) -> Row:
    of = product(subject, direction, 1)
    return Row(direction, of.out_features, of.in_features, of.members, of.quantized, of.arithmetic, bands)
