"""``peftkern bench``: run benchmarks by name against the peer, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peftkern.bench import report, runner
from peftkern.bench.errors import BenchError
from peftkern.bench.registry import BENCHMARKS, Benchmark, find, require_packages
from peftkern.bench.result import Result

_DEFAULT_OUTPUT = Path("bench-output")


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Benchmarks to run, as --list names them. All without a name."),
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the rows as JSON.")] = None,
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder for bench.md and bench.png.")
    ] = _DEFAULT_OUTPUT,
    list_names: Annotated[bool, typer.Option("--list", help="List the benchmarks and stop.")] = False,
) -> None:
    """Time peftkern beside PEFT + bitsandbytes, in the same run on the same data, and report the ratios."""
    console = Console()
    if list_names:
        console.print(_names_table())
        return
    try:
        failed = _run(find(names or []), json, output, console)
    except BenchError as error:
        _print_error(str(error))
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        _print_error("interrupted; nothing was written")
        raise typer.Exit(130) from None
    if failed:
        raise typer.Exit(1)


def _run(benchmarks: Sequence[Benchmark], json: Path | None, output: Path, console: Console) -> bool:
    """Run, print and write; whether some benchmark failed. What the others measured is written all the same."""
    require_packages(benchmarks)
    markdown_path, chart_path = output / "bench.md", output / "bench.png"
    for path in (markdown_path, chart_path, *([json] if json else [])):
        report.check_writable(path)
    results: list[Result] = []
    failed = False
    for benchmark in benchmarks:
        try:
            results += _run_one(benchmark, console)
        except BenchError as error:
            failed = True
            _print_error(f"{benchmark.name}: {error}")
    if not results:
        return failed
    report.write_markdown(results, report.describe_machine(), markdown_path)
    report.write_chart(results, chart_path)
    written = [markdown_path, chart_path]
    if json is not None:
        report.write_json(results, json)
        written.append(json)
    console.print(_results_table(results))
    console.print(report.RATIO_NOTE, style="dim")
    console.print("Written: " + ", ".join(str(path) for path in written))
    return failed


def _run_one(benchmark: Benchmark, console: Console) -> list[Result]:
    results: list[Result] = []
    with console.status(f"{benchmark.name}: starting"):
        for result in runner.run(benchmark):
            results.append(result)
            console.print(f"{result.name}: {result.case}: {report.ratio_text(result)}", highlight=False)
    return results


def _names_table() -> Table:
    table = Table("name", "what it measures")
    for benchmark in BENCHMARKS.values():
        table.add_row(benchmark.name, benchmark.summary)
    return table


def _results_table(results: Sequence[Result]) -> Table:
    table = Table("benchmark", "case")
    for heading in ("ours", "peer", "unit", "ratio", "min", "max"):
        table.add_column(heading, justify="left" if heading == "unit" else "right", no_wrap=True)
    for result in results:
        numbers = (report.number(result.ours), report.number(result.peer), result.unit)
        spread = (report.ratio_text(result), report.number(result.min), report.number(result.max))
        table.add_row(result.name, result.case, *numbers, *spread)
    return table


def _print_error(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False)
