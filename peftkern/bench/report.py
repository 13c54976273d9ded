"""Write the rows of a run: JSON for programs, Markdown for people, a PNG chart."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from peftkern.bench.errors import BenchError
from peftkern.bench.result import Quantity, Result

JSON_FIELDS = ("name", "case", "ours", "peer", "unit", "ratio", "min", "max")

RATIO_NOTE = (
    "Each side's figure is the median of samples taken in turn (peer, ours, peer, ours, ...). The ratio is that of the "
    "two medians: peer/ours for times and ours/peer for rates (more is better), ours/peer for memory and counts (less "
    "is better) and for losses and shares (1 is right); for a difference it is the largest difference itself. min and "
    "max are the smallest and the largest ratio of a single pair of neighbouring samples. Figures that are counted in "
    "compiled kernels have no peer: beside ours stands the figure to reach."
)

_PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes")


def as_records(results: Iterable[Result]) -> list[dict[str, Any]]:
    """The rows as plain dictionaries with the keys of :data:`JSON_FIELDS`."""
    return [{field: getattr(result, field) for field in JSON_FIELDS} for result in results]


def check_writable(path: Path) -> None:
    """Raise :class:`BenchError` unless a file can be written at ``path``, before an hour is spent on its content."""
    if path.is_dir():
        raise BenchError(f"{path} is a folder; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror or error}; choose another folder") from error


def write_json(results: Sequence[Result], path: Path) -> None:
    """Write the rows as a JSON list. Either the whole file is there afterwards, or what was there before."""
    text = json.dumps(as_records(results), indent=2) + "\n"
    _write_whole(path, lambda file: file.write(text.encode()))


def write_markdown(results: Sequence[Result], machine: str, path: Path) -> None:
    """Write the rows as a Markdown table below a line that describes the machine."""
    text = markdown(results, machine)
    _write_whole(path, lambda file: file.write(text.encode()))


def write_chart(results: Sequence[Result], path: Path) -> None:
    """Draw the ratios as bars: times and rates, memory, counts. Where 1 or 0 is right there is nothing to see."""
    figure = _draw(results)
    _write_whole(path, lambda file: figure.savefig(file, format="png", dpi=150, bbox_inches="tight"))


def _write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write beside ``path`` and rename, so that a full disk or an interruption leaves no torn file."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            temporary = Path(file.name)
            try:
                write(file)
                file.flush()
                os.chmod(temporary, 0o644)
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror or error}; choose another folder") from error


def describe_machine() -> str:
    """Processor, threads, our kernels and the versions of both sides, in one line."""
    import torch

    from peftkern import __version__
    from peftkern.backends import cpu

    kernels = f"kernels for {cpu.chosen_isa()}" if cpu.available() else "no native kernels"
    versions = ", ".join([f"peftkern {__version__}", *(f"{package} {_version(package)}" for package in _PACKAGES)])
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{_processor()} ({capability}), {torch.get_num_threads()} threads, {kernels}; {versions}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


_DIGITS = ((100, 0), (10, 1), (1, 2), (0.1, 3))
"""Decimals of numbers from this size on."""


def number(value: float) -> str:
    """Three significant digits, without an exponent where a person would not use one."""
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.2e}"
    digits = next((digits for bound, digits in _DIGITS if abs(value) >= bound), 4)
    return f"{value:.{digits}f}"


def ratio_text(result: Result) -> str:
    """The ratio as a person reads it: ``1.41x``, or the bare difference."""
    if result.quantity is Quantity.DIFFERENCE:
        return number(result.ratio)
    if result.quantity is Quantity.LOSS:
        return f"{result.ratio:.6f}"
    return f"{number(result.ratio)}x"


def markdown(results: Sequence[Result], machine: str) -> str:
    """The whole Markdown text: the machine, the table, and how to read it."""
    lines = [
        "# peftkern bench",
        "",
        machine,
        "",
        "| benchmark | case | ours | peer | unit | ratio | min | max |",
        "|---|---|---:|---:|---|---:|---:|---:|",
    ]
    lines += [_markdown_row(result) for result in results]
    return "\n".join([*lines, "", RATIO_NOTE, ""])


def _markdown_row(result: Result) -> str:
    cells = (
        result.name,
        result.case,
        number(result.ours),
        number(result.peer),
        result.unit,
        ratio_text(result),
        number(result.min),
        number(result.max),
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


_PANELS = (
    ("times as fast as the peer (more is better)", (Quantity.TIME, Quantity.RATE)),
    ("our memory / the peer's (less is better)", (Quantity.MEMORY,)),
    ("our count / the peer's, or the figure to reach (less is better)", (Quantity.COUNT,)),
)


def _draw(results: Sequence[Result]) -> Any:
    # The figure's own canvas instead of pyplot: pyplot would pick a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(title, [row for row in results if row.quantity in quantities]) for title, quantities in _PANELS]
    panels = [(title, rows) for title, rows in panels if rows] or [("nothing to draw", [])]
    heights = [max(len(rows), 1) for _, rows in panels]
    figure = Figure(figsize=(9.0, 1.2 * len(panels) + 0.3 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axis, (title, rows) in zip(axes[:, 0], panels, strict=True):
        _draw_panel(axis, title, rows)
    return figure


def _draw_panel(axis: Any, title: str, rows: Sequence[Result]) -> None:
    ratios = [row.ratio for row in rows]
    below = [row.ratio - row.min for row in rows]
    above = [row.max - row.ratio for row in rows]
    names = list(dict.fromkeys(row.name for row in rows))
    colours = [f"C{names.index(row.name) % 10}" for row in rows]
    bars = axis.barh(range(len(rows)), ratios, xerr=(below, above), color=colours, error_kw={"lw": 0.8, "capsize": 2})
    axis.bar_label(bars, [ratio_text(row) for row in rows], padding=3, fontsize=7)
    axis.set_yticks(range(len(rows)), [f"{row.name}: {row.case}" for row in rows], fontsize=7)
    axis.margins(x=0.12)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.axvline(1.0, color="black", lw=0.8)
    axis.set_xlabel(title)
