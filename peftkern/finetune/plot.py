"""The loss curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_STRETCHES = 8  # a running mean over an eighth of the run is smooth and still follows


def draw_loss_curve(
    path: Path, losses: Sequence[tuple[int, float]], before: float | None, after: float | None, title: str
) -> None:
    """Draw (step, training loss) pairs and the loss on held-out data before and after, and write a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no window system, and no global state of pyplot
    axes = figure.add_subplot()
    steps, values = [step for step, _ in losses], [value for _, value in losses]
    axes.plot(steps, values, color="tab:blue", linewidth=0.8, alpha=0.4, label="training, per step")
    width = max(1, len(values) // _STRETCHES)
    if width > 1:
        means = _running_means(values, width)
        axes.plot(steps[width - 1 :], means, color="tab:blue", linewidth=1.8, label=f"mean of {width} steps")
    if before is not None and after is not None:
        last = max(steps, default=0)
        axes.plot([0, last], [before, after], "o--", color="tab:orange", label="held out, before and after")
        for step, value, side in ((0, before, "left"), (last, after, "right")):
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1}
            axes.annotate(f"{value:.3f}", (step, value), (0, 8), textcoords="offset points", ha=side, bbox=box)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


def _running_means(values: Sequence[float], width: int) -> list[float]:
    """Means of ``width`` values each, ending at each value that has so many before it."""
    return [sum(values[end - width : end]) / width for end in range(width, len(values) + 1)]
