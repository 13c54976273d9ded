"""Cases of ``gpu-numerics``: the worst relative error of GPU kernels against float64, without a GPU.

The Triton kernels are executed from the IR that Triton compiles them to (by ttsem; with a GPU they run on that), and
the CUDA kernels by an emulator. Both are part of the tests, so this benchmark runs from a checkout.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from peftkern.bench.case import Measurement
from peftkern.bench.errors import BenchError, DisagreementError
from peftkern.bench.result import Quantity
from peftkern.gpu_check import processes, run
from peftkern.gpu_check.errors import CheckError
from peftkern.gpu_check.references import LIMITS

_TESTS = Path("tests") / "gpu_offline"
_SECONDS = 1200.0


def cases() -> Iterator[Measurement]:
    """Measurements of ``gpu-numerics``; beside each figure stands its limit.

    Raises:
        BenchError: this is no checkout, or nothing here executes the kernels.
        DisagreementError: an error is beyond its limit.
    """
    try:
        root = run.checkout()
    except CheckError as error:
        raise BenchError(str(error)) from error
    yield from _measure("Triton kernels", [*_executor(), str(_TESTS / "executed_errors.py")], root)
    yield from _measure("CUDA kernels", [sys.executable, str(_TESTS / "emulated_errors.py")], root)


def _executor() -> list[str]:
    if torch.cuda.is_available():
        return [sys.executable]
    if importlib.util.find_spec("ttsem") is None:
        raise BenchError(
            "without a GPU this benchmark needs ttsem, which executes Triton kernels; install it with: "
            "pip install --no-deps --ignore-requires-python ttsem==0.1.0"
        )
    return [sys.executable, "-m", "ttsem.sanitize"]


def _measure(kernels: str, command: list[str], root: Path) -> Iterator[Measurement]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "errors.json"
        separator = ["--"] if "ttsem.sanitize" in command else []
        done = processes.run([*command, *separator, str(file)], root, _SECONDS, {"TRITON_DEFAULT_FP_FUSION": "1"})
        if done.code != 0 or not file.exists():
            raise BenchError(f"the {kernels} could not be executed: {done.tail()}")
        found = json.loads(file.read_text(encoding="utf-8"))
    for dtype, errors in found["errors"].items():
        limit = LIMITS[getattr(torch, dtype)]
        worst = max(math.inf if math.isnan(error) else error for error in errors)
        case = f"{kernels} by {found['executor']}, {dtype}, limit {limit:.0e}"
        if not worst <= limit:
            raise DisagreementError(f"{case}: {worst:.1e}")
        yield Measurement(case, "relative error", Quantity.DIFFERENCE, [worst], [limit])
