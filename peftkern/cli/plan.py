"""``peftkern plan``: what training will take, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from peftkern.cli.errors import one_line_errors
from peftkern.cli.quiet import quiet_libraries


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_CONFIG", help="A model of transformers; its configuration alone is read.")
    ],
    method: Annotated[str, typer.Option(help="What is trained: lora, full or sparse.")] = "lora",
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = 16,
    target_modules: Annotated[str, typer.Option(help="Names of layers, with commas between, or all-linear.")] = (
        "all-linear"
    ),
    density: Annotated[float, typer.Option(help="Of sparse deltas.")] = 0.01,
    quantization: Annotated[
        str | None,
        typer.Option(
            help="nf4, fp4, int8, none, or auto with a budget. [default: nf4, and none for full]", show_default=False
        ),
    ] = None,
    block_size: Annotated[int, typer.Option(help="Weights for each scale.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Scales are quantized as well.")] = True,
    embeddings: Annotated[
        str | None, typer.Option(help="Format of the embeddings, as int8. [default: dense]", show_default=False)
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="Format of the head, as int8. [default: dense]", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="[default: float32 on the CPU, else bfloat16]", show_default=False)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="[default: 1, or what the budget allows]", show_default=False)
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="[default: 1024, or what the budget allows]", show_default=False)
    ] = None,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Activations are computed again.")] = False,
    optimizer: Annotated[str, typer.Option(help="AdamW, AdamW8bit or SGD.")] = "AdamW",
    logits: Annotated[bool, typer.Option(help="Whether the model gives logits in training.")] = True,
    recompute: Annotated[
        str | None, typer.Option(help="What gated blocks make again: mlp or up.", show_default=False)
    ] = None,
    patched: Annotated[bool, typer.Option(help="Whether it runs on the fused kernels.")] = True,
    labelled: Annotated[float, typer.Option(help="Share of the tokens that have a label.")] = 1.0,
    device: Annotated[str, typer.Option(help="cpu, or a GPU such as rtx-4090, a100-80gb, h100.")] = "cpu",
    budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Find what fits into it, as 12GB.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Write a picture.", show_default=False)
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers.", show_default=False)
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Predict memory and time of training a model, and find what fits into a budget."""
    with one_line_errors(debug):
        quiet_libraries()
        import peftkern

        console = Console()
        with console.status("following a training step"):
            found = peftkern.plan(
                model,
                method=method,
                rank=rank,
                target_modules=target_modules if target_modules == "all-linear" else target_modules.split(","),
                density=density,
                quantization=quantization,
                block_size=block_size,
                double_quant=double_quant,
                embeddings=embeddings,
                head=head,
                dtype=dtype,
                batch=batch,
                length=length,
                gradient_checkpointing=gradient_checkpointing,
                optimizer=optimizer,
                logits=logits,
                recompute=recompute,
                patched=patched,
                labelled=labelled,
                device=device,
                budget=budget,
            )
        for file in (output, json):
            if file is not None:
                found.save(file)
        console.print(found.table())
        console.print(escape(found.speed), highlight=False)
        if found.patch_call:
            console.print(escape(found.patch_call), highlight=False, soft_wrap=True)
