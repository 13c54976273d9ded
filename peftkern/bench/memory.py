"""Peak resident memory of training SmolLM2-135M, each side in fresh processes of its own.

glibc keeps freed memory, and so the peak of a process says as much about the allocator's mood as about the program. The
first rows are measured with freed memory returned to the system, on both sides; the default follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from peftkern.bench import fresh_process, smollm2
from peftkern.bench.case import Measurement
from peftkern.bench.errors import BenchError
from peftkern.bench.result import Quantity

FREED_MEMORY_RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SETTINGS: Mapping[str, Mapping[str, str]] = {"freed memory returned": FREED_MEMORY_RETURNED, "default malloc": {}}

PAIRS = 2
STEPS = 2  # the optimizer's state exists from the end of the first one

LEAN = ", ".join([*(f"{name}={value!r}" for name, value in smollm2.LEAN.items()), "return_freed_memory()"])

PEAK, PEAK_OF_STEPS, AFTER_LOADING = "peak, loading and steps", "peak of the steps", "after loading"
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def resident_megabytes(field: str) -> float:
    """Resident memory of this process in MB (10^6 bytes): ``field`` is ``VmRSS`` for now, ``VmHWM`` for the peak.

    Not ``ru_maxrss``: that one starts at the size of the process that started this one.

    Raises:
        BenchError: this system does not say.
    """
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError as error:
        raise BenchError(f"peak memory is read from {_STATUS}, which only Linux has") from error
    values = [line.split() for line in lines if line.startswith(f"{field}:")]
    if not values:
        raise BenchError(f"{_STATUS} has no line {field}")
    return int(values[0][1]) * 1024 / 1e6


def reset_peak() -> None:
    """Let the peak start again from what is resident now.

    Raises:
        BenchError: the kernel does not allow it.
    """
    try:
        _CLEAR.write_text("5")
    except OSError as error:
        raise BenchError(f"cannot reset the peak of resident memory through {_CLEAR}: {error.strerror}") from error


def train_and_watch(side: str, folder: str, steps: int, batch: int, length: int) -> dict[str, float]:
    """Load one of `smollm2.LOOPS` in this process, train it, and report resident memory in MB.

    Runs in a fresh process.
    """
    batches = smollm2.make_batches(folder, steps, batch, length)
    loop = smollm2.LOOPS[side](folder)
    after_loading, loading_peak = resident_megabytes("VmRSS"), resident_megabytes("VmHWM")
    reset_peak()
    for ids in batches:
        loop.step(ids)
    steps_peak = resident_megabytes("VmHWM")
    return {AFTER_LOADING: after_loading, PEAK_OF_STEPS: steps_peak, PEAK: max(loading_peak, steps_peak)}


def measure_memory(
    checkpoint: smollm2.Checkpoint,
    setting: str,
    pairs: int = PAIRS,
    steps: int = STEPS,
    batch: int = smollm2.BATCH,
    length: int = smollm2.LENGTH,
    ours: str = "ours",
    peer: str = "peer",
    what: str = "",
) -> list[Measurement]:
    """Run two of `smollm2.LOOPS` in turn in fresh processes, ``pairs`` times; one measurement per figure.

    ``what`` says in the names of the cases how ours differs from the ordinary.
    """
    samples: dict[str, list[dict[str, float]]] = {peer: [], ours: []}
    for _ in range(pairs):
        for side in samples:
            samples[side].append(_one_run(side, checkpoint.folder, setting, steps, batch, length))
    note = "".join(f", {text}" for text in (what, checkpoint.note) if text)
    return [
        Measurement(
            f"{figure}, batch {batch} x {length} ({setting}){note}",
            "MB",
            Quantity.MEMORY,
            [sample[figure] for sample in samples[ours]],
            [sample[figure] for sample in samples[peer]],
        )
        for figure in (PEAK, PEAK_OF_STEPS, AFTER_LOADING)
    ]


def _one_run(side: str, folder: str, setting: str, steps: int, batch: int, length: int) -> dict[str, float]:
    arguments = {"side": side, "folder": folder, "steps": steps, "batch": batch, "length": length}
    figures: dict[str, float] = fresh_process.call(
        "peftkern.bench.memory:train_and_watch", arguments, SETTINGS[setting]
    )
    return figures


def cases() -> Iterator[Measurement]:
    """Measurements of ``memory-smollm2``."""
    with smollm2.checkpoint() as checkpoint:
        for setting in SETTINGS:
            yield from measure_memory(checkpoint, setting, ours="ours lean", what=LEAN)
        for setting in SETTINGS:
            yield from measure_memory(checkpoint, setting)
