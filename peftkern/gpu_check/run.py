"""The stages of the check, in order, under one time limit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import peftkern
from peftkern.backends.triton.devices import DeviceKey, device_key, rates_of
from peftkern.finetune.versions import versions
from peftkern.gpu_check import build, numerics, peers, plan
from peftkern.gpu_check.errors import CheckError
from peftkern.gpu_check.items import Bench, Item
from peftkern.gpu_check.processes import run_shares
from peftkern.gpu_check.report import LOG_NAME, Report
from peftkern.tune.timer import CudaTimer

SECONDS = 440
"""What one run takes at most, unless told otherwise."""

_BUILD_SHARE, _TESTS_SHARE, _COMPILE_SHARE = 0.25, 0.4, 0.15
"""Of all the time, at most this for a stage; what it leaves is there for the timings."""

_PACKAGES = ("torch", "triton", "peft", "transformers", "bitsandbytes")


@dataclass(frozen=True)
class Limit:
    """When time is up."""

    seconds: float
    start: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - self.start)

    def share(self, part: float) -> float:
        """Seconds for a stage: this part of all time, or what is left."""
        return max(1.0, min(part * self.seconds, self.left()))


def checkout() -> Path:
    """The folder that holds sources and tests.

    Raises:
        CheckError: this package was not imported from a checkout.
    """
    root = Path(peftkern.__file__).resolve().parents[1]
    for needed in ("setup.py", "csrc", str(numerics.TESTS)):
        if not (root / needed).exists():
            raise CheckError(f"{root} holds no {needed}: run this from a checkout, as in PYTHONPATH=. python3 -m ...")
    return root


def require_gpu() -> DeviceKey:
    """The GPU that is checked.

    Raises:
        CheckError: there is none.
    """
    if not torch.cuda.is_available():
        raise CheckError("there is no GPU to check: PyTorch finds no CUDA device here (--dry-run shows what would run)")
    return device_key(torch.empty(0, device="cuda"))


def check(device: DeviceKey, root: Path, output: Path, limit: Limit, say: Callable[[str], None]) -> Report:
    """Run every stage on the GPU, writing the report after each."""
    report = Report(device.name, rates_of(device), versions(_PACKAGES))
    report.notes += [f"not compared with {name}: {why}" for name, why in peers.missing().items()]
    processes = max(1, min(14, (os.cpu_count() or 1) - 2))
    say("building")
    report.build = build.build(root, build.FOLDER, device.capability, limit.share(_BUILD_SHARE))
    report.write(output)
    say(f"testing every kernel against float64, {processes} processes")
    report.numerics = numerics.run(root, processes, limit.share(_TESTS_SHARE), output / LOG_NAME)
    report.write(output)
    say("compiling what is timed")
    compiled = run_shares(_WARM_UP, processes, root, limit.share(_COMPILE_SHARE))
    report.notes += [
        f"compiling, share {number}: {'not done in time' if one.code is None else one.tail(5)}"
        for number, one in enumerate(compiled, 1)
        if one.code != 0
    ]
    torch.manual_seed(0)
    time_items(plan.items(), Bench(CudaTimer(), "cuda", peers.names()), report, limit, say)
    report.seconds = limit.seconds - limit.left()
    report.write(output)
    return report


_WARM_UP = ("-m", "peftkern.gpu_check", "--warm-up")


def warm_up(share: str, items: Sequence[Item]) -> None:
    """Run the items of one share once, so that their kernels are compiled and kept in Triton's cache.

    Args:
        share: ``I/N``: this is number I of N processes.
        items: everything that is timed.
    """
    number, count = map(int, share.split("/"))
    for item in items[number - 1 :: count]:
        item.run_once("cuda")
    torch.cuda.synchronize()


def time_items(items: Sequence[Item], bench: Bench, report: Report, limit: Limit, say: Callable[[str], None]) -> None:
    """Time item by item into ``report``, as long as the next one fits into the time; the others are named there."""
    for item in items:
        if plan.expected_seconds(item, item.launches(), report.rates, bench.peers) > limit.left():
            report.skipped.append(item.title)
            continue
        try:
            report.rows += item.rows(bench)
        except Exception as error:  # one kernel that fails must not hide what the others do
            report.failures.append(f"{item.title}: {type(error).__name__}: {str(error)[:500]}")
        say(f"{item.title} ({limit.left():.0f} s left)")
    if report.skipped:
        report.notes.append(f"time was up: {len(report.skipped)} of {len(items)} items were not timed")
