"""What can go wrong in a fine-tuning run, apart by whose fault it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """What was asked for cannot be done; the message names the setting or the file, and what would work."""


class RunError(RuntimeError):
    """The run failed on its way; the message says what is left on disk."""


class InterruptedRunError(RunError):
    """The run was stopped on request after a checkpoint was written."""


# of torch.save (two of its versions) and of safetensors, which raise no OSError
_DISK_MESSAGES = ("inline_container.cc", "PytorchStreamWriter", "Error while serializing")


def is_write_failure(error: BaseException) -> bool:
    """Whether ``error`` is what the system, safetensors or torch raise when a file cannot be written."""
    return isinstance(error, OSError) or any(text in str(error) for text in _DISK_MESSAGES)


@contextmanager
def describe_write_failures(what: str, folder: Path, hint: str) -> Iterator[None]:
    """Turn a failure to write inside this context into a :class:`RunError` that names the folder and the way out."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RunError) or not is_write_failure(error):
            raise
        raise RunError(f"cannot write {what} to {folder} ({error}); {hint}") from error
