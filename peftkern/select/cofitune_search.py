"""Which layers and modules CoFiTune trains: a greedy walk down a tree, with a score of your own.

First every range of layers is tried with all modules, and the best is kept; there, attention and feed-forward network
are tried alone; then, if asked for, the kept set with one module less, as long as that is better.

Source: CoFiTune, Zhang et al. 2024 (arXiv:2404.10306). The score there is the sum of how well the task is
learned and how much of the general abilities is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from peftkern.patch.table import format_table
from peftkern.select.cofitune import MODULES, RANGES

_HALVES = (("q", "k", "v"), ("up", "down"))

Score = Callable[[str, str], float]


@dataclass(frozen=True)
class Trial:
    """``CoFiTune(layers, modules)`` and its score."""

    layers: str
    modules: str
    score: float


@dataclass(frozen=True)
class SearchResult:
    """The best trial, and all of them in order. ``str()`` is a table."""

    best: Trial
    trials: tuple[Trial, ...]

    def __str__(self) -> str:
        lines = [[t.layers, t.modules, f"{t.score:.4g}" + (" (best)" if t == self.best else "")] for t in self.trials]
        return format_table(["layers", "modules", "score"], lines)


def cofitune_search(score: Score, refine: bool = False) -> SearchResult:
    """Search ``layers`` and ``modules`` of `CoFiTune`. Of equal scores the one that was tried first wins.

    Args:
        score: of ``layers`` and ``modules``, larger is better: train a fresh model with them and evaluate it. It is
            called once for each: 9 times, and up to 5 times more with ``refine``.
        refine: go on to single modules.

    Raises:
        ValueError: a score is not a number.
    """
    trials: list[Trial] = []

    def attempt(layers: str, roles: tuple[str, ...]) -> Trial:
        modules = ",".join(roles)
        value = float(score(layers, modules))
        if math.isnan(value):
            raise ValueError(f"cofitune_search: the score of layers={layers!r}, modules={modules!r} is not a number")
        trials.append(Trial(layers, modules, value))
        return trials[-1]

    best = _best([attempt(layers, tuple(MODULES)) for layers in RANGES])
    best = _best([best, *(attempt(best.layers, half) for half in _HALVES)])
    while refine:
        children = [attempt(best.layers, child) for child in _children(best)]
        better = _best([best, *children])
        if better == best:
            break
        best = better
    return SearchResult(best, tuple(trials))


def _best(trials: list[Trial]) -> Trial:
    return max(trials, key=lambda trial: trial.score)


def _children(trial: Trial) -> list[tuple[str, ...]]:
    roles = trial.modules.split(",")
    return [tuple(r for r in roles if r != left_out) for left_out in reversed(roles)] if len(roles) > 1 else []
