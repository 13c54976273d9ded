"""``peftkern finetune``: train a model on data of one's own, with quantized LoRA or another method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from peftkern.cli.errors import one_line_errors
from peftkern.cli.options import with_settings
from peftkern.cli.quiet import quiet_libraries

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@with_settings
def finetune(
    settings: Mapping[str, Any],
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="YAML file with any of these settings; options override it."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Fine-tune MODEL on --data: quantized LoRA, which writes an ordinary PEFT adapter, or another --method.

    Data are rows with a column 'messages', columns 'prompt' and 'response', or a column 'text', or one long plain text.
    """
    from peftkern.finetune import run
    from peftkern.finetune.config import FinetuneConfig, given_settings

    with one_line_errors(debug):
        if not debug:
            quiet_libraries()
        given = given_settings(config, settings)
        run.finetune(FinetuneConfig(**given), Console(), given)
