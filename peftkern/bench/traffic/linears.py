"""What of a counted step belongs to the linear layers with adapters, and to which part of their work.

The feed-forward block is where they meet other work, its gate: silu, the product with it, and their gradients. One
operation of ours is gate and layer in one. There the kernels tell which is which, and of what is kept for the backward
pass, what the gate itself works on is the gate's, on either side; all else is the layer's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from peftkern.bench.traffic.counter import Kernel, Saved, Step
from peftkern.bench.traffic.layer import LINEARS

_BLOCK = "mlp"
_GATE = frozenset({"aten::silu", "aten::mul", "aten::silu_backward", "silu_mul_kernel", "silu_mul_backward_kernel"})
_GATE_WORKS_ON = ("gate_proj", "up_proj", "act_fn")
_PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"})


class Part(StrEnum):
    """What a kernel of a linear layer is for."""

    BASE = "base products"
    DEQUANTIZE = "dequantize"
    ADAPTER = "adapter products"
    REST = "adds, scaling, casts, copies"


_PARTS_OF_OURS = {
    "project_kernel": Part.ADAPTER,
    "product_kernel": Part.BASE,
    "pull_kernel": Part.ADAPTER,
    "input_gradient_kernel": Part.BASE,
    "push_kernel": Part.ADAPTER,
    "sum_parts_kernel": Part.ADAPTER,
    "dequantize_blocks_kernel": Part.DEQUANTIZE,
}
"""Products of the base weight hold the adapter's in the same sum."""


@dataclass(frozen=True)
class Total:
    """Sums over launches."""

    launches: int
    bytes: int
    flops: int


def of_linears(step: Step) -> list[Kernel]:
    """Launches of the seven linear layers."""
    return [kernel for kernel in step.kernels if _is_of_linear(kernel)]


def of_others(step: Step) -> list[Kernel]:
    """Launches of the rest of the decoder layer."""
    return [kernel for kernel in step.kernels if not _is_of_linear(kernel)]


def saved_bytes(step: Step) -> int:
    """Memory that the linear layers keep for the backward pass; what several of them keep counts once."""
    return sum({saved.storage: saved.bytes for saved in step.saved if _is_kept_by_linear(saved)}.values())


def saved_bytes_with_block(step: Step) -> int:
    """The same with the feed-forward block around three of them."""
    kept = (saved for saved in step.saved if _BLOCK in saved.module.split(".") or _is_inside(saved.module))
    return sum({saved.storage: saved.bytes for saved in kept}.values())


def saved_bytes_of_layer(step: Step) -> int:
    """Memory that the whole decoder layer keeps for the backward pass: norms, rotary embedding and attention too."""
    return sum({saved.storage: saved.bytes for saved in step.saved}.values())


def total(kernels: Iterable[Kernel]) -> Total:
    """Launches, bytes and floating-point operations."""
    listed = list(kernels)
    return Total(len(listed), sum(kernel.bytes for kernel in listed), sum(kernel.flops for kernel in listed))


def breakdown(kernels: Sequence[Kernel]) -> dict[Part, Total]:
    """The launches of linear layers by what they are for."""
    return {part: total(kernel for kernel in kernels if part_of(kernel) is part) for part in Part}


def part_of(kernel: Kernel) -> Part:
    """What a launch of a linear layer is for.

    Raises:
        KeyError: a Triton kernel that nobody has said this of.
    """
    namespace, separator, _ = kernel.name.partition("::")
    if not separator:
        return _PARTS_OF_OURS[kernel.name]
    if namespace == "bitsandbytes" or _adds_offset_of_scales(kernel):
        return Part.DEQUANTIZE
    if kernel.name in _PRODUCTS:
        return Part.ADAPTER if _is_adapter(kernel.module) else Part.BASE
    return Part.REST


def _adds_offset_of_scales(kernel: Kernel) -> bool:
    """The one-dimensional sum in a base layer, which undoes the double quantization; gradients that meet have more."""
    return kernel.name in ("aten::add", "aten::add_") and len(kernel.shape) == 1 and "base_layer" in kernel.module


def _is_adapter(module: str) -> bool:
    return "lora_A" in module or "lora_B" in module


def _is_of_linear(kernel: Kernel) -> bool:
    if is_in_block(kernel.module):
        return kernel.name not in _GATE
    return _is_inside(kernel.module)


def _is_kept_by_linear(saved: Saved) -> bool:
    if is_in_block(saved.module):
        return saved.maker.rpartition(".")[2] not in _GATE_WORKS_ON
    return _is_inside(saved.module)


def is_in_block(module: str) -> bool:
    """Whether this is the feed-forward block, outside of its linear layers."""
    return _BLOCK in module.split(".") and not _is_inside(module)


def _is_inside(module: str) -> bool:
    return not set(LINEARS).isdisjoint(module.split("."))
