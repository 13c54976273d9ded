"""The entry point, and the table of commands."""

from __future__ import annotations

from typing import Annotated

import typer

from peftkern import __version__
from peftkern.cli.bench import bench
from peftkern.cli.demo import demo
from peftkern.cli.doctor import doctor
from peftkern.cli.finetune import finetune
from peftkern.cli.plan import plan
from peftkern.cli.tune import tune

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peftkern {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Kernels for parameter-efficient fine-tuning: fine-tune, compare, and see what runs where."""


for _command in (demo, finetune, plan, bench, tune, doctor):
    app.command()(_command)
