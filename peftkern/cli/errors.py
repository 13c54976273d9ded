"""One line per error, and an exit code that says whose fault it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from peftkern.bench.errors import BenchError
from peftkern.finetune.errors import InputError, InterruptedRunError, RunError
from peftkern.plan.errors import PlanError
from peftkern.tune.errors import TuneError

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Print what goes wrong in this context as one line and leave with an exit code; with ``debug``, raise it."""
    try:
        yield
    except (InputError, PlanError) as error:
        _leave(error, str(error), BAD_INPUT, debug)
    except InterruptedRunError as error:
        _leave(error, str(error), INTERRUPTED, debug)
    except (RunError, BenchError, TuneError) as error:
        _leave(error, str(error), FAILED, debug)
    except KeyboardInterrupt as error:
        _leave(error, "interrupted", INTERRUPTED, debug)
    except typer.Exit:
        raise
    except Exception as error:
        _leave(error, f"{type(error).__name__}: {error} (--debug shows where)", FAILED, debug)


def _leave(error: BaseException, message: str, code: int, debug: bool) -> None:
    if debug:
        raise error
    one_line = " ".join(message.split())
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(one_line)}", highlight=False)
    raise typer.Exit(code) from error
