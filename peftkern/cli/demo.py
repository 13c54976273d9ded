"""``peftkern demo``: the whole line on a real model and real data, in a few minutes on two CPU cores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peftkern.cli.errors import one_line_errors
from peftkern.cli.finetune import Debug
from peftkern.cli.quiet import quiet_libraries

if TYPE_CHECKING:
    from peftkern.demo.compare import Comparison
    from peftkern.demo.demonstration import Sample

_DEFAULT_OUTPUT = Path("demo-output")


def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for adapter, loss.png, summary.json, demo.json.")
    ] = _DEFAULT_OUTPUT,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 40,
    compare: Annotated[bool, typer.Option("--compare/--no-compare", help="Compare with PEFT + bitsandbytes.")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted demo.")] = False,
    debug: Debug = False,
) -> None:
    """Teach SmolLM2-135M to write one-line docstrings: quantized LoRA beside PEFT + bitsandbytes."""
    from peftkern.demo.demonstration import demonstrate

    console = Console()
    with one_line_errors(debug):
        if not debug:
            quiet_libraries()
        shown = demonstrate(output, steps, compare, resume, console)
        for number, sample in enumerate(shown.samples, start=1):
            _print_sample(number, sample, console)
        if shown.comparison is not None:
            _print_comparison(shown.comparison, console)


def _print_sample(number: int, sample: Sample, console: Console) -> None:
    console.print(f"\n[bold]held-out sample {number}[/]")
    console.print(sample.prompt, markup=False, highlight=False, style="dim")
    table = Table(show_header=False, box=None)
    for name, text in (("before", sample.before), ("after", sample.after), ("the real one", sample.reference)):
        table.add_row(name, escape(text))
    console.print(table, highlight=False)


def _print_comparison(comparison: Comparison, console: Console) -> None:
    console.print("\n[bold]this run against PEFT + bitsandbytes[/] (the same weights and batch, in turn; medians)")
    table = Table("", "peftkern", "PEFT + bitsandbytes", "unit", "ratio")
    for row in comparison.rows:
        table.add_row(row.name, f"{row.ours:.4g}", f"{row.peer:.4g}", row.unit, f"{row.ratio:.2f}")
    if comparison.rows:
        console.print(table, highlight=False)
        for row in comparison.rows:
            console.print(f"{row.name}: {row.case}", markup=False, highlight=False)
        console.print("ratio: peer / ours for times, so more is better; ours / peer for memory, so less is better")
    for problem in comparison.problems:
        console.print(problem, markup=False, highlight=False)
