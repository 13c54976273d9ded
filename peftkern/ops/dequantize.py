"""Dequantization: value = codebook[code] * scale of its block; int8: value = code * scale / 127.

Computed in float32 and rounded once to the result's dtype, bit-identical to bitsandbytes 0.50, except that
bitsandbytes 0.50.2 on a CPU takes the wrong scales for rows that are no whole number of blocks (it reads the scales as
if each row began a block) and flushes denormal bfloat16 results to zero. The format decides: blocks run through the
tensor in row-major order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.formats import FOUR_BIT_FORMATS, VALUE_DTYPES, DoubleQuantization, QuantizedTensor, codebook
from peftkern.ops.quantize import CHUNK_ELEMENTS

RESULT_DTYPES = (*VALUE_DTYPES, torch.float64)

ONE_OVER_127 = 0.007874015718698502
"""The float32 next to 1 / 127."""


def dequantize(q: QuantizedTensor, dtype: torch.dtype | None = None, *, backend: str | None = None) -> Tensor:
    """The numbers that a quantized tensor stands for. Not differentiable.

    Args:
        q: what :func:`peftkern.ops.quantize` returned, or the same from a checkpoint.
        dtype: float32, bfloat16, float16 or float64; ``None`` is ``q.dtype``. In float64 the product of code and
            float32 scale is exact (int8: rounded once by the division by 127).
        backend: name of the backend that must run it; ``None`` lets the table decide.

    Returns:
        ``q.shape`` in ``dtype``, contiguous, on ``q.device``.

    Raises:
        TypeError: ``q`` is no QuantizedTensor, or ``dtype`` is none of those above.
        ValueError: a field of ``q`` does not fit the others; the message names it.
        BackendError: a forced backend cannot run the call.
    """
    if not isinstance(q, QuantizedTensor):
        raise TypeError(f"dequantize: q must be a QuantizedTensor, got {type(q).__name__}")
    q.validate()
    dtype = q.dtype if dtype is None else dtype
    if dtype not in RESULT_DTYPES:
        raise TypeError(f"dequantize: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    nested = q.double_quantization
    result: Tensor = torch.ops.peftkern.dequantize(
        q.packed,
        q.scales,
        None if nested is None else nested.absmax,
        None if nested is None else nested.offset,
        q.format,
        q.block_size,
        0 if nested is None else nested.block_size,
        q.shape,
        dtype,
        backend,
    )
    return result


def row_blocks(weight: Tensor | QuantizedTensor, rows: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """``weight``, a matrix, ``rows`` rows at a time: a dense one as it is, a quantized one decoded to ``dtype``.

    All at once where rows of a quantized one share blocks.
    """
    weight = weight.detach() if isinstance(weight, Tensor) else weight
    if isinstance(weight, QuantizedTensor):
        if not weight.has_own_rows:
            yield dequantize(weight, dtype)
            return
        weight = weight.with_plain_scales()
    for first in range(0, weight.shape[0], rows):
        end = min(first + rows, weight.shape[0])
        yield weight[first:end] if isinstance(weight, Tensor) else dequantize(weight.rows(first, end), dtype)


# ---- reference


@registry.register("dequantize", "reference")
def dequantize_reference(q: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """:func:`dequantize` in plain PyTorch, without its checks. Temporary memory does not grow with the tensor."""
    dtype = q.dtype if dtype is None else dtype
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    result = torch.empty(q.shape, dtype=dtype, device=q.device)
    if q.format == "int8":
        _dequantize_rows(q, result, compute_dtype)
    else:
        _dequantize_blocks(q, result.view(-1), compute_dtype)
    return result


def _dequantize_blocks(q: QuantizedTensor, result: Tensor, compute_dtype: torch.dtype) -> None:
    table = codebook(q.format, q.device).to(compute_dtype)
    scales = q.scale_values().reshape(-1).to(compute_dtype)
    packed = q.packed.reshape(-1)
    for begin in range(0, result.numel(), CHUNK_ELEMENTS):
        end = min(begin + CHUNK_ELEMENTS, result.numel())
        codes = _codes(packed, q.format, begin, end)
        padded = torch.nn.functional.pad(codes, (0, -codes.numel() % q.block_size))
        values = table.index_select(0, padded.int()).view(-1, q.block_size)
        values *= scales[begin // q.block_size :][: values.shape[0], None]
        result[begin:end] = values.view(-1)[: end - begin]


def _codes(packed: Tensor, format: str, begin: int, end: int) -> Tensor:
    """Codes of the elements [begin, end), one a byte; ``begin`` is even."""
    if format not in FOUR_BIT_FORMATS:
        return packed[begin:end]
    pairs = packed[begin // 2 : (end + 1) // 2]
    return torch.stack([pairs >> 4, pairs & 15], dim=1).view(-1)[: end - begin]


def _dequantize_rows(q: QuantizedTensor, result: Tensor, compute_dtype: torch.dtype) -> None:
    step = max(CHUNK_ELEMENTS // max(q.shape[1], 1), 1)
    for begin in range(0, q.shape[0], step):
        values = q.packed[begin : begin + step].to(compute_dtype) * q.scales[begin : begin + step, None]
        result[begin : begin + step] = values / 127 if compute_dtype == torch.float64 else values * ONE_OVER_127


# ---- operator


@torch.library.custom_op(
    "peftkern::dequantize",
    mutates_args=(),
    schema="(Tensor packed, Tensor scales, Tensor? scales_absmax, Tensor? scales_offset, str format, int block_size, "
    "int scales_block_size, SymInt[] shape, ScalarType dtype, str? backend) -> Tensor",
)
def _operator(
    packed: Tensor,
    scales: Tensor,
    scales_absmax: Tensor | None,
    scales_offset: Tensor | None,
    format: str,
    block_size: int,
    scales_block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    backend: str | None,
) -> Tensor:
    nested = None
    if scales_absmax is not None and scales_offset is not None:
        nested = DoubleQuantization(scales_absmax, scales_offset, scales_block_size)
    value_dtype = dtype if dtype in VALUE_DTYPES else torch.float32
    q = QuantizedTensor(packed, scales, format, torch.Size(shape), value_dtype, block_size, nested)
    q.validate()
    result: Tensor = registry.run("dequantize", q, dtype, backend=backend)
    return result


@_operator.register_fake
def _fake(packed: Tensor, *options: Any) -> Tensor:
    *_, shape, dtype, _backend = options
    return packed.new_empty(shape, dtype=dtype)
