"""Weights as kernel arguments: pointers in tuples, one entry per member of a group, and what kernels are made for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from peftkern.formats import QuantizedTensor, codebook
from peftkern.formats.quantized_tensor import FOUR_BIT_FORMATS, has_whole_blocks
from peftkern.ops.lora_linear import Weight

DENSE, FOUR_BIT, INT8_BLOCKWISE, INT8 = 0, 1, 2, 3
"""Values of the kernels' ``FORMAT``."""


@dataclass(frozen=True)
class WeightKind:
    """What a kernel is compiled for. Weights of one kind can share a launch.

    Attributes:
        format: ``DENSE``, ``FOUR_BIT``, ``INT8_BLOCKWISE`` or ``INT8``.
        codes: name of the format whose codebook is used; empty without one.
        block_size: elements per scale; 0 for ``DENSE`` and ``INT8``.
        nested_block_size: scales per scale of the scales; 0 without double quantization.
        whole_blocks: whether every row is a whole number of blocks.
        dtype: of a dense weight.
    """

    format: int
    codes: str
    block_size: int
    nested_block_size: int
    whole_blocks: bool
    dtype: torch.dtype | None

    def constants(self) -> dict[str, Any]:
        """The kernels' constants."""
        return {
            "FORMAT": self.format,
            "BLOCK_SIZE": self.block_size,
            "NESTED_BLOCK_SIZE": self.nested_block_size,
            "WHOLE_BLOCKS": self.whole_blocks,
        }


NO_WEIGHT = WeightKind(DENSE, "", 0, 0, True, None)
"""What a kernel is compiled for that leaves the base product out."""


def weight_kind(weight: Weight) -> WeightKind:
    """The kind of one weight."""
    if isinstance(weight, Tensor):
        return _kind(DENSE, "", 0, 0, True, weight.dtype)
    if weight.format == "int8":
        return _kind(INT8, "", 0, 0, True, None)
    nested = weight.double_quantization
    return _kind(
        FOUR_BIT if weight.format in FOUR_BIT_FORMATS else INT8_BLOCKWISE,
        weight.format,
        weight.block_size,
        0 if nested is None else nested.block_size,
        has_whole_blocks(weight.shape, weight.block_size),
        None,
    )


_kind = lru_cache(maxsize=256)(WeightKind)
"""Kinds are asked for several times in a call, and are few."""


@dataclass(frozen=True)
class WeightArguments:
    """The weights of a group, all of one kind, as kernels take them.

    Attributes:
        kind: of every one of them.
        pointers: the kernels' ``weight`` tuple: codes or values, scales, absmax of the scales, offset of the scales
            (each a tuple with one tensor per member), codebook, codebook of the scales.
        row_strides: elements from row to row of a dense weight, bytes for codes.
        tensors: everything that a launch reads, each once.
    """

    kind: WeightKind
    pointers: tuple[Any, ...]
    row_strides: tuple[int, ...]
    tensors: tuple[Tensor, ...]


@lru_cache(maxsize=64)
def device_codebook(format: str, device: torch.device) -> Tensor:
    """The values of a format's codes on ``device``, [16] or [256] float32."""
    return codebook(format, device).contiguous()


def weight_arguments(weights: Sequence[Weight]) -> WeightArguments:
    """Gather weights of one kind. What is not contiguous is copied."""
    kind = weight_kind(weights[0])
    if kind.format == DENSE:
        matrices = tuple(_with_unit_stride(weight) for weight in weights if isinstance(weight, Tensor))
        # The other pointers are never read; a kernel takes no empty ones.
        pointers = (matrices, matrices, matrices, matrices, matrices[0], matrices[0])
        return WeightArguments(kind, pointers, tuple(m.stride(0) for m in matrices), matrices)
    return _quantized_arguments(kind, [weight for weight in weights if isinstance(weight, QuantizedTensor)])


def _with_unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _quantized_arguments(kind: WeightKind, weights: Sequence[QuantizedTensor]) -> WeightArguments:
    packed = tuple(weight.packed.contiguous() for weight in weights)
    scales = tuple(weight.scales.contiguous() for weight in weights)
    device = packed[0].device
    book = device_codebook(kind.codes, device) if kind.codes else scales[0]
    absmax, offset, scale_book = scales, scales, scales[0]
    tensors = [*packed, *scales]
    nested = [weight.double_quantization for weight in weights if weight.double_quantization is not None]
    if nested:
        absmax = tuple(entry.absmax.contiguous() for entry in nested)
        offset = tuple(entry.offset for entry in nested)
        scale_book = device_codebook("int8_blockwise", device)
        tensors += [*absmax, *offset]
    columns = [weight.shape[-1] for weight in weights]
    row_strides = tuple(count // 2 if kind.format == FOUR_BIT else count for count in columns)
    pointers = (packed, scales, absmax, offset, book, scale_book)
    return WeightArguments(kind, pointers, row_strides, tuple(tensors))
