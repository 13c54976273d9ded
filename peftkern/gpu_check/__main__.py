"""The command line of the check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftkern.gpu_check import dry_run, peers, plan, run
from peftkern.gpu_check.errors import CheckError
from peftkern.gpu_check.report import JSON_NAME, MARKDOWN_NAME

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    only_say: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("gpu-check-output"),
    seconds: Annotated[
        float, typer.Option(min=10, help="What it may take; no timing starts that would pass it.")
    ] = run.SECONDS,
    share: Annotated[str | None, typer.Option("--warm-up", hidden=True)] = None,
) -> None:
    """Build, check every number and time every kernel on the GPU of this machine."""
    limit = run.Limit(seconds)
    if only_say:
        for line in dry_run.lines(plan.items(), peers.names()):
            typer.echo(line)
        return
    try:
        device = run.require_gpu()
        if share is not None:
            run.warm_up(share, plan.items())
            return
        report = run.check(device, run.checkout(), output, limit, typer.echo)
    except CheckError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(report.as_markdown())
    typer.echo(f"{'passed' if report.passed else 'FAILED'}; see {output / JSON_NAME} and {output / MARKDOWN_NAME}")
    if not report.passed:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
