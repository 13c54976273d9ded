"""A whole tuning: what the user asked for, the measurements, and the file that they go to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from peftkern.backends.triton import crossover, measured
from peftkern.backends.triton.devices import DeviceKey, device_key
from peftkern.formats.quantized_tensor import FORMATS
from peftkern.tune import shapes
from peftkern.tune.errors import TuneError
from peftkern.tune.measure import Measure, Measured, measure_all
from peftkern.tune.operands import Subject

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_DENSE = "dense"


def require_gpu() -> DeviceKey:
    """The GPU that is measured: the current one.

    Raises:
        TuneError: there is none.
    """
    if not torch.cuda.is_available():
        raise TuneError(
            "there is no GPU to measure: PyTorch finds no CUDA device here; without one the CPU kernels run, which "
            "need no tuning"
        )
    return device_key(torch.empty(0, device="cuda"))


def subjects(model: str | None, texts: Sequence[str], format: str, dtype: str, rank: int) -> list[Subject]:
    """What to measure.

    Args:
        model: whose layers; ``None`` for Llama-3-8B's.
        texts: shapes as :func:`peftkern.tune.shapes.parse` takes them, instead of a model.
        format: of the weights, or ``"dense"``.
        dtype: of the activations.
        rank: of the adapters.

    Raises:
        TuneError: an argument names nothing known; both a model and shapes.
    """
    if model is not None and texts:
        raise TuneError("give either MODEL or --shape, not both")
    if format not in (*FORMATS, _DENSE):
        raise TuneError(f"--format must be one of {', '.join(sorted((*FORMATS, _DENSE)))}; got {format!r}")
    if dtype not in _DTYPES:
        raise TuneError(f"--dtype must be one of {', '.join(_DTYPES)}; got {dtype!r}")
    groups = [shapes.parse(text) for text in texts] or (shapes.of_model(model) if model else shapes.LLAMA_3_8B)
    return [Subject(group, None if format == _DENSE else format, _DTYPES[dtype], rank) for group in groups]


def token_counts(text: str) -> list[int]:
    """Rising numbers of tokens from ``N,N,...``.

    Raises:
        TuneError: the text is something else.
    """
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = []
    if not counts or counts[0] < 1:
        raise TuneError(f"--tokens must be positive numbers with commas between them, got {text!r}")
    return counts


@dataclass(frozen=True)
class Tuning:
    """The GPU, what is measured on it, and at how many tokens."""

    device: DeviceKey
    subjects: Sequence[Subject]
    tokens: Sequence[int]

    def run(self, measure: Measure, done: Callable[[], None]) -> tuple[list[Measured], Path]:
        """Measure everything, then write the table; what was found, and the file.

        Args:
            measure: takes one time.
            done: called after each.

        Raises:
            TuneError: the file cannot be written.
        """
        found = list(measure_all(self.subjects, self.tokens, measure, done))
        try:
            file = measured.save([one.row for one in found], self.device)
        except OSError as error:
            raise TuneError(
                f"cannot write {measured.table_file()} ({error}); PEFTKERN_CACHE names another folder"
            ) from error
        crossover.forget()
        return found, file


def describe_bands(row: measured.Row) -> str:
    """The bands in words, for example ``few to 64, fused to 384, staged``."""
    return ", ".join(band.path if band.up_to is None else f"{band.path} to {band.up_to}" for band in row.bands)
