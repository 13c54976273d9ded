"""``peftkern tune``: measure on this GPU which path computes each product fastest, and keep the result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from peftkern.cli.errors import one_line_errors
from peftkern.tune import run
from peftkern.tune.measure import TOKENS, Measured, OnDevice, measurements
from peftkern.tune.timer import CudaTimer

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def tune(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Measure the linear layers of this model. [default: Llama-3-8B's]"),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="OUTxIN", help="A shape instead; OUT+OUTxIN for layers that share x. Repeatable."),
    ] = None,
    format: Annotated[
        str, typer.Option(help="Format of the weights: nf4, fp4, int8, int8_blockwise or dense.")
    ] = "nf4",
    dtype: Annotated[str, typer.Option(help="Of the activations: bfloat16, float16 or float32.")] = "bfloat16",
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
    tokens: Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of tokens to measure at.")] = ",".join(
        map(str, TOKENS)
    ),
    debug: Debug = False,
) -> None:
    """Measure which path computes each product fastest on this GPU. Later runs on it use what was found."""
    console = Console()
    with one_line_errors(debug):
        subjects = run.subjects(model, shape or [], format, dtype, rank)
        counts = run.token_counts(tokens)
        device = run.require_gpu()
        console.print(f"{device.name}: {len(subjects)} products, both directions", highlight=False)
        found, file = _measure(run.Tuning(device, subjects, counts), console)
        _print(found, file, console)


def _measure(tuning: run.Tuning, console: Console) -> tuple[Sequence[Measured], Path]:
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=measurements(tuning.subjects, tuning.tokens))
        return tuning.run(OnDevice(CudaTimer()), lambda: progress.advance(task))


def _print(found: Sequence[Measured], file: Path, console: Console) -> None:
    table = Table("layers", "direction", "fastest path by tokens", box=None)
    for one in found:
        table.add_row(str(one.subject.group), one.row.direction, escape(run.describe_bands(one.row)))
    console.print(table, highlight=False)
    console.print(
        f"written to {escape(str(file))}; delete it to go back to the estimates", highlight=False, soft_wrap=True
    )
