"""What one PyTorch operator does on a GPU: whether it launches a kernel, and the bytes that the kernel moves.

Every operator that is not known to be free counts as one launch that reads its operands and writes its results, each
byte once. Free are views, whatever merely hands out memory, and whatever returns its operand as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_HANDS_OUT_MEMORY = frozenset(
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
)
_IGNORES_OPERAND = frozenset(
    f"aten::{name}"
    for name in ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "rand_like", "randn_like")
)
"""Operators that look at the shape of their operand and not at its values."""

_OVERWRITES = frozenset(f"aten::{name}" for name in ("copy_", "fill_", "zero_", "resize_", "uniform_", "normal_"))
"""Operators that write their first operand without reading it."""


@dataclass(frozen=True)
class Cost:
    """Bytes and floating-point operations of one launch."""

    bytes_read: int
    bytes_written: int
    flops: int


def cost(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Cost | None:
    """What ``operator`` moves on the ``meta`` device, or ``None`` where it launches nothing.

    Args:
        operator: a ``torch._ops.OpOverload`` that the dispatcher was called with.
        args, kwargs: its arguments.
        out: what it returned.
    """
    name = operator._schema.name
    if name in _HANDS_OUT_MEMORY:
        return None
    read, overwritten, updated = _operands(operator, args, kwargs)
    written = [*overwritten, *updated]
    operands = {_storage(tensor) for tensor in tensors(args) + tensors(kwargs)}
    created = [tensor for tensor in tensors(out) if _storage(tensor) not in operands]
    if not written and not created:
        return None
    if not any(tensor.is_meta for tensor in (*read, *written, *created)):
        return None
    formula = flop_registry.get(operator._overloadpacket)
    flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
    return Cost(_bytes([*read, *updated]), _bytes([*written, *created]), flops)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in arguments or results, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _operands(
    operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Operands that are only read, only written, and both."""
    name = operator._schema.name
    read: list[Tensor] = []
    overwritten: list[Tensor] = []
    updated: list[Tensor] = []
    for position, argument in enumerate(operator._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        if argument.alias_info is None or not argument.alias_info.is_write:
            read += [] if name in _IGNORES_OPERAND else tensors(value)
        elif argument.is_out or name in _OVERWRITES:
            overwritten += tensors(value)
        else:
            updated += tensors(value)
    return read, overwritten, updated


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(operands: Iterable[Tensor]) -> int:
    """Bytes that are touched. An operand given twice is read once, and so is one that was expanded."""
    distinct = {(_storage(t), t.storage_offset(), t.shape, t.stride()): t for t in operands if t.is_meta}
    return sum(_touched_elements(tensor) * tensor.element_size() for tensor in distinct.values())


def _touched_elements(tensor: Tensor) -> int:
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride != 0 or size == 0 else 1
    return count
