"""What bitsandbytes makes of a tensor, in our dataclass. It is a development dependency: without it the tests fail."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from peftkern.formats import FOUR_BIT_FORMATS, DoubleQuantization, QuantizedTensor, packed_shape, scales_shape


def quantize(w: Tensor, format: str, block_size: int = 64, double_quant: bool = False) -> QuantizedTensor:
    if format == "int8":
        packed, scales, _ = bnb.int8_vectorwise_quant(w)
        return QuantizedTensor(packed, scales, format, w.shape, w.dtype, w.shape[1])
    if format in FOUR_BIT_FORMATS:
        packed, state = bnb.quantize_4bit(w, blocksize=block_size, compress_statistics=double_quant, quant_type=format)
    else:
        packed, state = bnb.quantize_blockwise(w, blocksize=block_size, nested=double_quant)
    return QuantizedTensor(
        packed.view(packed_shape(w.shape, format, block_size)),
        state.absmax.view(scales_shape(w.shape, format, block_size)),
        format,
        w.shape,
        w.dtype,
        block_size,
        DoubleQuantization(state.state2.absmax, state.offset) if double_quant else None,
    )


def _scale_state(q: QuantizedTensor) -> bnb.QuantState | None:
    nested = q.double_quantization
    if nested is None:
        return None
    return bnb.QuantState(
        nested.absmax, code=bnb.create_dynamic_map(), blocksize=nested.block_size, dtype=torch.float32
    )


def dequantize(q: QuantizedTensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """Its values, as if they were one row unless ``shape`` says else: its CPU code mixes up the scales of rows."""
    if q.format == "int8":
        return bnb.int8_vectorwise_dequant(q.packed, q.scales).to(q.dtype)
    state = bnb.QuantState(
        q.scales.view(-1),
        shape=torch.Size(shape or (1, q.shape.numel())),
        code=bnb.create_dynamic_map(),
        blocksize=q.block_size,
        quant_type=q.format,
        dtype=q.dtype,
        offset=None if q.double_quantization is None else q.double_quantization.offset,
        state2=_scale_state(q),
    )
    if q.format not in FOUR_BIT_FORMATS:
        return bnb.dequantize_blockwise(q.packed, state)
    with torch.compiler.set_stance("force_eager"):  # it compiles its path for big blocks, which takes seconds
        return bnb.dequantize_4bit(q.packed.reshape(-1, 1), state).reshape(shape or q.shape)
