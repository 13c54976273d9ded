"""Plans as stacked bars, one for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftkern.plan.result import Plan


def draw(plans: Sequence[Plan], path: Path) -> None:
    """Write a PNG file with a bar for the peak of each plan and one for its loading."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.6 + 0.9 * len(plans)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no window system, and no global state of pyplot
    axes = figure.subplots()
    for row, plan in enumerate(plans):
        left = 0.0
        for index, (name, value) in enumerate({**plan.parts, "beside": plan.beside}.items()):
            size = value / 1e9
            axes.barh(2 * row, size, left=left, color=f"C{index}", label=name if row == 0 else None)
            left += size
        axes.barh(2 * row + 1, plan.load / 1e9, color="C0", alpha=0.6)
        room = plan.budget if plan.budget is not None else plan.device_memory
        if room is not None:
            axes.axvline(room / 1e9, color="black", linestyle="--", linewidth=1)
    labels = [label for _ in plans for label in ("a step", "loading")]
    axes.set_yticks(range(2 * len(plans)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("GB at the peak (dashed: what there is)")
    axes.set_title("\n".join(plan.title for plan in plans), fontsize=9)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, format="png")
