"""What runs the training: GPUs by their makers' figures, this machine's CPU by what was measured on it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from peftkern.plan.errors import PlanError

CPU = "cpu"

_CONTEXT_BYTES, _ROUNDED_UP = 500e6, 0.1
"""What CUDA and the libraries on it take of a GPU's memory before the first tensor, and what its allocator and the
kernels' own scratch take beside tensors, as a share of those: an estimate. Four steps that an H100 ran took 5 to 9%
more at their peak than the tensors that are followed here."""

_REACHED_FLOPS, _REACHED_BANDWIDTH = 0.6, 0.8
"""Shares of the makers' figures that programs reach; an estimate."""


@dataclass(frozen=True)
class Rates:
    """How fast a device is.

    Attributes:
        products: FLOP/s of matrix products, by dtype of the operands.
        packed: the same with a quantized weight.
        attention: the same of fused attention.
        pointwise: FLOP/s of everything else.
        bandwidth: bytes/s, read and written.
        launch: seconds that every operator takes at least.
    """

    products: Mapping[str, float]
    packed: Mapping[str, float]
    attention: float
    pointwise: float
    bandwidth: float
    launch: float


@dataclass(frozen=True)
class Device:
    """Attributes:
    name: as `peftkern.plan` takes it.
    memory: bytes; ``None``: not known here.
    context: bytes of it that no tensor gets.
    rounded_up: what is taken beside the tensors, as a share of their bytes.
    rates: of the operators.
    measured: whether the rates were measured; if not, they are the makers' figures, derated.
    """

    name: str
    memory: float | None
    context: float
    rounded_up: float
    rates: Rates
    measured: bool

    def beside(self, tensors: float) -> float:
        """Bytes that are taken beside ``tensors`` bytes of them."""
        return self.context + self.rounded_up * tensors

    @property
    def is_gpu(self) -> bool:
        """Whether it is one of the table of GPUs."""
        return self.name != CPU


@dataclass(frozen=True)
class _Gpu:
    """By its maker: GB of memory, GB/s, and TFLOP/s dense, sums in float32. ``half``: of bfloat16 and float16."""

    memory: float
    bandwidth: float
    half: float
    single: float
    bfloat16: float | None = None
    """Where it differs from float16."""

    def rates(self) -> Rates:
        half = _REACHED_FLOPS * 1e12 * self.half
        single = _REACHED_FLOPS * 1e12 * self.single
        bfloat16 = half if self.bfloat16 is None else _REACHED_FLOPS * 1e12 * self.bfloat16
        products = {"float16": half, "bfloat16": bfloat16, "float32": single}
        return Rates(products, products, half, single, _REACHED_BANDWIDTH * 1e9 * self.bandwidth, 5e-6)


_GPUS: Mapping[str, _Gpu] = {
    "t4": _Gpu(16, 320, 65, 8.1, bfloat16=8.1),
    "rtx-3090": _Gpu(24, 936, 71, 35.6),
    "rtx-4090": _Gpu(24, 1008, 165, 82.6),
    "rtx-5090": _Gpu(32, 1792, 209, 104.8),
    "l4": _Gpu(24, 300, 121, 30.3),
    "l40s": _Gpu(48, 864, 362, 91.6),
    "a100-40gb": _Gpu(40, 1555, 312, 19.5),
    "a100-80gb": _Gpu(80, 2039, 312, 19.5),
    "h100": _Gpu(80, 3350, 989, 67),
    "h200": _Gpu(141, 4800, 989, 67),
    "b200": _Gpu(180, 8000, 2250, 80),
}
"""Makers' data sheets; of A100, H100, H200 and B200 the SXM form."""

NAMES = (CPU, *_GPUS)


def find(name: str) -> Device:
    """The device of this name; the CPU is measured on first use.

    Raises:
        PlanError: there is none.
    """
    key = name.lower().replace("_", "-").replace(" ", "-")
    if key == CPU:
        from peftkern.plan.calibration import cpu_rates

        return Device(CPU, None, 0.0, 0.0, cpu_rates(), measured=True)
    if key not in _GPUS:
        close = difflib.get_close_matches(key, NAMES, 1)
        guess = f"did you mean {close[0]!r}? " if close else ""
        raise PlanError(f"device {name!r} is not known; {guess}There are {', '.join(NAMES)}")
    gpu = _GPUS[key]
    return Device(key, gpu.memory * 1e9, _CONTEXT_BYTES, _ROUNDED_UP, gpu.rates(), measured=False)


_STANDS_IN = "rtx-3090"


def of_this_machine(resident: float) -> Device:
    """The GPU that PyTorch runs on, or the CPU, for budgets that count all that a process takes.

    A GPU that is not in the table has the rates of another one, and a name that says so; they order the options all
    the same.

    Args:
        resident: bytes of memory that this process has taken already, which no tensor gets on a CPU.
    """
    import torch

    if not torch.cuda.is_available():
        return replace(find(CPU), context=resident)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    known = key_of(properties.name)
    device = find(known or _STANDS_IN)
    name = known or f"{properties.name}, at the rates of an {_STANDS_IN}"
    return replace(device, name=name, memory=float(properties.total_memory))


def key_of(gpu: str) -> str | None:
    """What the table calls a GPU, by the name that its driver gives it; ``None``: it is not in the table."""
    words = set(re.split(r"[^a-z0-9]+", gpu.lower()))
    return next((key for key in _GPUS if words.issuperset(key.split("-"))), None)
