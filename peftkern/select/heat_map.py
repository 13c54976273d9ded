"""The heat map of a policy, layers x kinds of tensors, in three panels: importance, cost, share of the time trained.

Tensors outside of blocks have rows of their own below, as wide as the panel. Grey: no such tensor, or nothing known;
light blue: 0 or less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkern.select.places import OUTSIDE

if TYPE_CHECKING:
    from peftkern.select.view import SelectionView, TensorView

_ROW, _COLUMN = 0.22, 0.36
"""Inches."""

_LOGARITHMIC_FROM = 100.0
"""Largest over smallest value from which a linear scale would show the largest ones only."""

_UNKNOWN, _NOT_POSITIVE = "0.9", "lightsteelblue"


@dataclass(frozen=True)
class _Panel:
    """``value`` of the tensors of a cell, ``None`` where nothing is known. ``scale``: limits, else the values'."""

    title: str
    colours: str
    value: Callable[[Sequence[TensorView]], float | None]
    scale: tuple[float, float] | None = None


def draw(shown: SelectionView, path: Path) -> None:
    """Write the heat map as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(shown)
    rows = len(shown.places.layers) + len(shown.places.outside)
    columns = max(len(shown.places.kinds), 4)
    size = (1.6 + len(panels) * (columns * _COLUMN + 0.9), 1.9 + rows * _ROW)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no window system, and no global state of pyplot
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw_panel(figure, axes, panel, shown)
    _mark_selected(all_axes[-1], shown)
    all_axes[0].set_yticks(range(rows), [*shown.places.layers, *shown.places.outside], fontsize=7)
    all_axes[0].set_ylabel("layer")
    figure.suptitle(f"{shown.now}  (update {shown.steps_done} now)", fontsize=9)
    figure.savefig(path, format="png")


def _panels(shown: SelectionView) -> list[_Panel]:
    unit = next(iter(shown.units), None)
    return [
        _Panel("importance", "viridis", _importance),
        _Panel("cost of the gradient" + (f", {unit}" if unit else ""), "cividis", lambda tensors: _cost(tensors, unit)),
        _Panel("share of updates that train it (○ now)", "Greens", _share, (0.0, 1.0)),
    ]


def _importance(tensors: Sequence[TensorView]) -> float | None:
    known = [tensor.importance for tensor in tensors if tensor.importance is not None]
    return sum(known) if known else None


def _cost(tensors: Sequence[TensorView], unit: str | None) -> float | None:
    known = [tensor.costs[unit] for tensor in tensors if unit is not None and unit in tensor.costs]
    return sum(known) if known else None


def _share(tensors: Sequence[TensorView]) -> float | None:
    return sum(tensor.share for tensor in tensors) / len(tensors)


def _grid(shown: SelectionView, value: Callable[[Sequence[TensorView]], Any]) -> list[list[Any]]:
    """``value`` at every place, ``None`` where no tensor is; a tensor outside of blocks fills its row."""
    kinds = shown.places.kinds
    values = {place: value(tensors) for place, tensors in shown.cells().items()}
    layers = [[values.get((layer, kind)) for kind in kinds] for layer in shown.places.layers]
    return layers + [[values[OUTSIDE, kind]] * max(len(kinds), 1) for kind in shown.places.outside]


def _draw_panel(figure: Any, axes: Any, panel: _Panel, shown: SelectionView) -> None:
    import matplotlib
    import numpy as np

    values = np.array([[math.nan if v is None else v for v in row] for row in _grid(shown, panel.value)], dtype=float)
    norm = _norm(values, panel.scale)
    not_positive = (values <= 0) & (panel.scale is None)
    values = np.where(not_positive, norm.vmin / 2, np.minimum(values, norm.vmax))  # a logarithmic scale has no 0
    colours = matplotlib.colormaps[panel.colours].with_extremes(bad=_UNKNOWN, under=_NOT_POSITIVE)
    image = axes.imshow(values, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    extend = "min" if bool(not_positive.any()) else "neither"
    figure.colorbar(image, ax=axes, location="bottom", extend=extend, aspect=30, pad=0.02).ax.tick_params(labelsize=7)
    axes.set_title(panel.title, fontsize=9)
    axes.set_xticks(range(len(shown.places.kinds)), shown.places.kinds, rotation=90, fontsize=7)
    if shown.places.layers and shown.places.outside:
        axes.axhline(len(shown.places.layers) - 0.5, color="white", linewidth=3)


def _norm(values: Any, scale: tuple[float, float] | None) -> Any:
    """Colours from the smallest to the largest positive value; 0 and below have a colour of their own."""
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    if scale is not None:
        return Normalize(*scale)
    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        return Normalize(1.0, 2.0)
    low, high = float(positive.min()), float(positive.max())
    if low == high:
        low, high = low / 2, high * 2
    return LogNorm(low, high) if high / low >= _LOGARITHMIC_FROM else Normalize(low, high)


def _mark_selected(axes: Any, shown: SelectionView) -> None:
    grid = _grid(shown, lambda tensors: any(tensor.selected for tensor in tensors))
    points = [(x, y) for y, row in enumerate(grid) for x, on in enumerate(row) if on]
    if points:
        axes.scatter(*zip(*points, strict=True), s=14, facecolors="white", edgecolors="black", linewidths=0.7)
