"""Which GPU a tensor is on, and what GPUs can do: the rates that the estimates of :mod:`roofline` start from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_TERA, _GIGA = 1e12, 1e9


@dataclass(frozen=True)
class DeviceKey:
    """A model of GPU. ``assumed``: no tensor is on it, launches are only counted as if they ran there."""

    name: str
    capability: tuple[int, int]
    assumed: bool = False


@dataclass(frozen=True)
class Rates:
    """What one model of GPU can do at most, as its maker states it.

    Attributes:
        capability: compute capability.
        name: part of the names of the GPUs that the row is for; the empty one is for all others of this capability.
        model: the GPU that the figures are of.
        bandwidth: of the memory, bytes/s.
        half: FLOP/s of the tensor cores on dense bfloat16 or float16 operands with float32 sums.
        tf32: the same on float32 operands that are rounded to TF32.
        single: FLOP/s in float32, without tensor cores.
        multiprocessors: how many there are.
        clock: boost clock, Hz.
        decode: instructions per decoded weight in the main loop of a product of 128 x 128 x 64 tiles, all that the loop
            does included: counted in the compiled kernels (``peftkern bench aot-instructions``).
    """

    capability: tuple[int, int]
    name: str
    model: str
    bandwidth: float
    half: float
    tf32: float
    single: float
    multiprocessors: int
    clock: float
    decode: float

    @property
    def issue(self) -> float:
        """Instructions of a warp per second: four schedulers in each multiprocessor, one instruction per clock each."""
        return 4 * self.multiprocessors * self.clock


def _row(
    capability: tuple[int, int],
    name: str,
    model: str,
    bandwidth: float,
    half: float,
    tf32: float,
    single: float,
    multiprocessors: int,
    clock: float,
    decode: float,
) -> Rates:
    """A row in GB/s, TFLOP/s and GHz, as data sheets state them."""
    tera = (half * _TERA, tf32 * _TERA, single * _TERA)
    return Rates(capability, name, model, bandwidth * _GIGA, *tera, multiprocessors, clock * _GIGA, decode)


_SM80, _SM86, _SM90 = 10.6, 10.1, 9.3
"""Counted in the compiled kernels, on sm_80; on sm_86, 89 and 120, which have two stages; on sm_90. On sm_100 the loop
cannot be told apart in the machine code: the figure of sm_90 is assumed."""

RATES = (
    # NVIDIA's data sheets and architecture white papers; tensor rates without sparsity. The first row that fits counts.
    # GeForce cards sum products of half precision in float32 at half the rate that their headlines give.
    # Columns: capability, name, model, GB/s, TFLOP/s (half, tf32, single), multiprocessors, GHz, instructions.
    _row((8, 0), "A100-SXM4-80GB", "A100 80 GB", 2039, 312, 156, 19.5, 108, 1.41, _SM80),
    _row((8, 0), "A100 80GB PCIe", "A100 80 GB PCIe", 1935, 312, 156, 19.5, 108, 1.41, _SM80),
    _row((8, 0), "A30", "A30", 933, 165, 82, 10.3, 56, 1.44, _SM80),
    _row((8, 0), "", "A100 40 GB", 1555, 312, 156, 19.5, 108, 1.41, _SM80),
    _row((8, 6), "RTX 3090", "RTX 3090", 936, 71, 35.6, 35.6, 82, 1.70, _SM86),
    _row((8, 6), "RTX A6000", "RTX A6000", 768, 154.8, 77.4, 38.7, 84, 1.80, _SM86),
    _row((8, 6), "NVIDIA A40", "A40", 696, 149.7, 74.8, 37.4, 84, 1.74, _SM86),
    _row((8, 6), "", "A10", 600, 125, 62.5, 31.2, 72, 1.70, _SM86),
    _row((8, 9), "RTX 4090", "RTX 4090", 1008, 165, 82.6, 82.6, 128, 2.52, _SM86),
    _row((8, 9), "L40S", "L40S", 864, 362, 183, 91.6, 142, 2.52, _SM86),
    _row((8, 9), "", "L4", 300, 121, 60, 30.3, 58, 2.04, _SM86),
    _row((9, 0), "H200", "H200", 4800, 989, 494, 67, 132, 1.83, _SM90),
    _row((9, 0), "H100 PCIe", "H100 PCIe", 2000, 756, 378, 51, 114, 1.755, _SM90),
    _row((9, 0), "H100 NVL", "H100 NVL", 3900, 835, 417, 60, 132, 1.785, _SM90),
    _row((9, 0), "", "H100 SXM", 3350, 989, 494, 67, 132, 1.83, _SM90),
    _row((10, 0), "", "B200", 8000, 2250, 1100, 75, 148, 1.85, _SM90),
    _row((12, 0), "", "RTX 5090", 1792, 209.5, 104.8, 104.8, 170, 2.41, _SM86),
)


def rates_of(device: DeviceKey) -> Rates:
    """The row for a GPU. A capability without rows takes those of the greatest one below it, or of the least one."""
    known = {row.capability for row in RATES}
    capability = max((one for one in known if one <= device.capability), default=min(known))
    return next(row for row in RATES if row.capability == capability and row.name in device.name)


# ---- the device of a call


H100 = DeviceKey("NVIDIA H100 80GB HBM3", (9, 0), assumed=True)
"""Stands for the device of tensors without memory."""

_assumed: list[DeviceKey] = [H100]


@contextmanager
def assumed(device: DeviceKey) -> Iterator[None]:
    """Inside, tensors on the ``meta`` device count as on ``device``."""
    _assumed.append(device)
    try:
        yield
    finally:
        _assumed.pop()


def device_key(tensor: Tensor) -> DeviceKey:
    """The GPU that ``tensor`` is on; on the ``meta`` device the assumed one."""
    return _assumed[-1] if tensor.is_meta else _present(tensor.get_device())


@lru_cache(maxsize=16)
def _present(index: int) -> DeviceKey:
    return DeviceKey(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))
