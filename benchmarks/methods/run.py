"""Run every method for the same number of steps on the same data, and write a table: see README.md here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from peftkern.finetune.docstrings import docstring_data
from peftkern.finetune.gguf import smollm2_file

BATCH_SIZE, MAX_LENGTH = 4, 256
TRAIN, HELD_OUT = 320, 32


@dataclass(frozen=True)
class Run:
    """A row of the table. ``recipe`` is a function of recipes.py that needs more than ``peftkern finetune`` takes."""

    method: str
    learning_rate: float
    remark: str = ""
    options: str = ""
    quantization: str = "nf4"
    targets: str = "all-linear"
    recipe: bool = False


RUNS: Mapping[str, Run] = {
    "lora": Run("lora", 5e-4, "r=16, NF4 base"),
    "full": Run("full", 5e-5, "dense base", quantization="none"),
    "hft": Run("hft", 5e-5, "dense base; embedding trained", quantization="none"),
    "hft-frozen": Run("hft", 5e-5, "dense base; embedding frozen", "embeddings=freeze", "none"),
    "cofitune": Run("cofitune", 1e-4, "dense base; up and down of the second quarter of layers", quantization="none"),
    "spdf": Run("spdf", 1e-3, "dense base, half of the linear weights zero", "sparsity=0.5", "none"),
    "lt-sft": Run("lt-sft", 5e-4, "dense base; 0.5% of the linear weights", "density=0.005,full_share=0.5", "none"),
    "spiel": Run("spiel", 1e-3, "NF4 base; 0.5% of the linear weights", "density=0.005,period=8,window=3"),
    "rosa": Run("rosa", 5e-4, "NF4 base; r=16 and 0.3%", "density=0.003"),
    "dsee": Run("dsee", 5e-4, "NF4 base; r=16 and 16 entries on q and v; pruned half-way", targets="q_proj,v_proj"),
    "skill-grafting": Run("skill-grafting", 0.0, "0.1% of the changes of `full`", recipe=True),
    "freeze-as-guard": Run("freeze-as-guard", 0.0, "dense base; guards against docstrings", recipe=True),
    "d-pruner": Run("d-pruner", 0.0, "dense base; a tenth of the linear weights dropped, not trained", recipe=True),
}

COLUMNS = ("method", "held-out loss before", "after", "trained", "s / step", "peak MB", "")


def command(run: Run, data: Path, output: Path, steps: int) -> list[str]:
    """The command line of a run."""
    if run.recipe:
        script = str(Path(__file__).with_name("recipes.py"))
        return [sys.executable, script, run.method, str(data), str(output), str(steps)]
    settings: Mapping[str, Any] = {
        "method": run.method,
        "data": data / "train.jsonl",
        "eval-data": data / "held_out.jsonl",
        "output": output,
        "quantization": run.quantization,
        "target-modules": run.targets,
        "learning-rate": run.learning_rate,
        "max-steps": steps,
        "batch-size": BATCH_SIZE,
        "max-length": MAX_LENGTH,
        "warmup": 0.1,
        "checkpoint-every": 10 * steps,
        **({"method-options": run.options} if run.options else {}),
    }
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return [str(Path(sys.executable).with_name("peftkern")), "finetune", str(smollm2_file()), *options]


def row_of(name: str, run: Run, summary: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table, from what the run wrote."""
    return {
        "method": name,
        "before": summary["held_out_loss"]["before"]["loss"],
        "after": summary["held_out_loss"]["after"]["loss"],
        "trained": summary["trained"],
        "seconds_per_step": summary["seconds"]["training"] / summary["steps"],
        "peak_mb": summary["peak_memory_mb"]["resident"],
        "remark": run.remark,
    }


def table(rows: Sequence[Mapping[str, Any]], steps: int) -> str:
    """The rows in Markdown."""
    lines = [
        f"{steps} steps of batch {BATCH_SIZE}",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in rows:
        cells = (
            f"`{row['method']}`",
            f"{row['before']:.4f}",
            f"{row['after']:.4f}",
            f"{row['trained']:,}",
            f"{row['seconds_per_step']:.2f}",
            f"{row['peak_mb']:.0f}",
            row["remark"],
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Rows to run; all by default.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the table and what the runs write.")] = Path(
        "methods-output"
    ),
    steps: Annotated[int, typer.Option(help="Optimizer steps of each method.")] = 24,
) -> None:
    """Run methods on SmolLM2-135M and write a table of them."""
    console = Console()
    unknown = [name for name in names or () if name not in RUNS]
    if unknown:
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; there are {', '.join(RUNS)}")
    data, results = docstring_data(TRAIN, HELD_OUT), output / "methods.json"
    output.mkdir(parents=True, exist_ok=True)
    rows = {row["method"]: row for row in json.loads(results.read_text())} if results.is_file() else {}
    for name in track(names or list(RUNS), "methods", console=console):
        folder = output / name
        line = command(RUNS[name], data, folder, steps)
        if not RUNS[name].recipe:
            line.append("--overwrite")
        with (output / f"{name}.log").open("w") as log:
            subprocess.run(line, stdout=log, stderr=subprocess.STDOUT, check=True)
        rows[name] = row_of(name, RUNS[name], json.loads((folder / "summary.json").read_text()))
        done = [rows[known] for known in RUNS if known in rows]
        results.write_text(json.dumps(done, indent=2) + "\n")
        (output / "methods.md").write_text(table(done, steps))
    console.print((output / "methods.md").read_text())


if __name__ == "__main__":
    typer.run(main)
