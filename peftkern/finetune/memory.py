"""Memory that this process uses, in MB of 10^6 bytes."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_MEGABYTE = 1_000_000


def resident_mb() -> float:
    """Resident memory now."""
    import psutil

    return float(psutil.Process().memory_info().rss) / _MEGABYTE


def reset_peak() -> None:
    """Let :func:`peak_resident_mb` and :func:`peak_gpu_mb` start again from here, where the system allows it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    # Linux only, and not in every container; without it the peak also counts what was before
    if _CLEAR.exists():
        try:
            _CLEAR.write_text("5")
        except OSError:
            return


def peak_resident_mb() -> float:
    """The highest resident memory since :func:`reset_peak`, or, where that is not possible, of the process."""
    if _STATUS.exists():
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
        if "VmHWM" in fields:
            return int(fields["VmHWM"].split()[0]) * 1024 / _MEGABYTE
    import psutil

    memory = psutil.Process().memory_info()
    return float(getattr(memory, "peak_wset", memory.rss)) / _MEGABYTE


def peak_gpu_mb() -> float | None:
    """The most memory that torch held on the GPU since :func:`reset_peak`; ``None`` without a GPU."""
    import torch

    return torch.cuda.max_memory_allocated() / _MEGABYTE if torch.cuda.is_available() else None
