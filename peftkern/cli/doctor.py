"""``peftkern doctor``: what is installed, what is built, and what would run where."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peftkern.cli import facts


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Show versions, instruction sets, GPU, and which backend would run each operation. Exit code 0 if usable."""
    found = facts.gather()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(found, Console())
    if not found["usable"]:
        raise typer.Exit(1)


def _print(found: Mapping[str, Any], console: Console) -> None:
    for warning in _warnings(found):
        console.print(f"[bold white on red] WARNING [/] {escape(warning)}\n", highlight=False, soft_wrap=True)
    for title, rows in (("versions", _version_rows(found)), ("CPU", _cpu_rows(found)), ("GPU", _gpu_rows(found))):
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        for name, value in rows:
            table.add_row(name, escape(value))
        console.print(table, highlight=False)
    if found["gpu_products"]:
        title = "what would run on the GPU, in bfloat16"
        table = Table("operation", "weight", "runs on", title=title, title_justify="left", box=None)
        for row in found["gpu_products"]:
            table.add_row(row["operation"], row["weight"], escape(row["kernels"]))
        console.print(table, highlight=False)
    table = Table("operation", "input", "runs on", "why", title="what would run where", title_justify="left", box=None)
    for row in found["operations"]:
        table.add_row(row["operation"], row["input"], row["backend"] or "[red]nothing[/]", escape(row["reason"]))
    console.print(table, highlight=False)


def _warnings(found: Mapping[str, Any]) -> Iterator[str]:
    processor = found["cpu"]
    if not processor["native_module"]:
        yield (
            "the native kernels are missing, so everything runs on the slow reference implementation: "
            f"{processor['native_module_missing_because']}"
        )
    elif processor["chosen"] is None:
        yield f"no instruction set can be used: {processor['not_chosen_because']}"
    if not found["usable"]:
        yield "some operations cannot run at all; see the table below"


def _version_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, version or "not installed") for name, version in found["versions"].items()]


def _cpu_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    processor = found["cpu"]
    rows = [
        ("processor", processor["processor"]),
        ("native kernels", "built" if processor["native_module"] else "MISSING"),
        ("instruction sets built", ", ".join(processor["built"]) or "none"),
        ("instruction sets that run here", ", ".join(processor["supported"]) or "none"),
        ("instruction set in use", processor["chosen"] or "none"),
        ("threads", str(processor["threads"])),
        ("float32 matmul precision", processor["float32_matmul_precision"]),
    ]
    return [*rows, *((f"{name} is set to", value) for name, value in found["environment"].items())]


def _gpu_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(gpu["name"], f"sm {gpu['capability']}, {gpu['memory_mb']} MB") for gpu in found["gpu"]]
    kernels = found["gpu_kernels"]
    triton, cuda = kernels["triton"], kernels["cuda"]
    return [
        *(rows or [("none", "everything runs on the CPU")]),
        ("Triton kernels", triton["missing_because"] or f"compiled at first use, for {_names(triton['compiles_for'])}"),
        ("CUDA kernels", cuda["missing_because"] or f"built for {_names(cuda['built_for'])}"),
    ]


def _names(architectures: Sequence[str]) -> str:
    return ", ".join(f"sm_{architecture}" for architecture in architectures)
