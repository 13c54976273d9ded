"""Quantization: a tensor becomes codes and one scale per block, the greatest magnitude (absmax) in it.

nf4, fp4          code = nearest codebook value to w / absmax; blocks of ``block_size`` elements
int8_blockwise    the same with the 256 values of the dynamic codebook, through a grid of 65536 steps
int8              code = round(w * 127 / absmax), half to even; one block per row

Double quantization stores the scales themselves as int8_blockwise codes, 256 to a block, after subtracting their mean.

The float32 operations and their order are those of bitsandbytes 0.50 on a CPU, bit for bit, in every backend.
Source: QLoRA, Dettmers et al. 2023 (arXiv:2305.14314), section 3; LLM.int8(), Dettmers et al. 2022 (arXiv:2208.07339),
section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.formats import BLOCK_SIZES, FORMATS, VALUE_DTYPES, DoubleQuantization, QuantizedTensor, codebook
from peftkern.formats.quantized_tensor import FOUR_BIT_FORMATS, block_count, packed_shape, scales_shape

CHUNK_ELEMENTS = 1 << 18
"""Elements that the reference works on at a time, a multiple of every block size; bounds its memory to a few MiB."""

SMALLEST_DIVISOR = 1e-38
"""4-bit blocks whose absmax is smaller are divided by this instead, so that an all-zero block stays finite."""

SCALES_BLOCK_SIZE = 256
DYNAMIC_GRID_STEPS = 65536


def quantize(
    w: Tensor,
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = False,
    *,
    backend: str | None = None,
) -> QuantizedTensor:
    """Quantize a tensor; bit-identical to bitsandbytes 0.50. Not differentiable.

    Args:
        w: float32, bfloat16 or float16, finite, of any shape and strides, 0 elements included; int8 takes [out, in].
        format: ``"nf4"``, ``"fp4"``, ``"int8_blockwise"``, or ``"int8"`` for one scale per row.
        block_size: elements per scale; a power of two from 32 to 4096. int8 has rows for blocks and does not use it.
        double_quant: store the scales as 8-bit codes too. Not for int8.
        backend: name of the backend that must run it; ``None`` lets the table decide.

    Returns:
        The codes and scales, with ``w``'s shape, dtype and device (``meta`` included: shapes without values).

    Raises:
        TypeError: ``w`` is no tensor or has another dtype.
        ValueError: ``w`` holds NaN or infinity; unknown ``format``; ``block_size`` is none of those above; a shape or
            ``double_quant`` that int8 does not have.
        BackendError: a forced backend cannot run the call.
    """
    _check(w, format, block_size, double_quant)
    # Detached: the result is not differentiable, and float scales must not ask for a gradient.
    packed, scales, *nested = torch.ops.peftkern.quantize(w.detach(), format, block_size, double_quant, backend)
    return QuantizedTensor(
        packed,
        scales,
        format,
        w.shape,
        w.dtype,
        w.shape[1] if format == "int8" else block_size,
        DoubleQuantization(nested[0], nested[1], SCALES_BLOCK_SIZE) if nested else None,
    )


# ---- checks


def _check(w: Tensor, format: str, block_size: int, double_quant: bool) -> None:
    if not isinstance(w, Tensor):
        raise TypeError(f"quantize: w must be a tensor, got {type(w).__name__}")
    if w.dtype not in VALUE_DTYPES:
        raise TypeError(f"quantize: w must be float32, bfloat16 or float16, got {w.dtype}; convert it with w.float()")
    if format not in FORMATS:
        raise ValueError(f"quantize: format must be one of {sorted(FORMATS)}, got {format!r}")
    if format == "int8":
        _check_int8(w, double_quant)
    elif not isinstance(block_size, int) or block_size not in BLOCK_SIZES:
        raise ValueError(f"quantize: block_size must be one of {BLOCK_SIZES}, got {block_size}")


def _check_int8(w: Tensor, double_quant: bool) -> None:
    if w.dim() != 2 or w.shape[1] == 0:
        raise ValueError(f"quantize: w must be [out, in] with at least one column for int8, got {list(w.shape)}")
    if double_quant:
        raise ValueError("quantize: double_quant must be False for int8, which has only one scale per row")


def _check_finite(q: QuantizedTensor) -> None:
    """Backends let a NaN or an infinity through to its block's scale; with double quantization it is in the offset."""
    nested = q.double_quantization
    scales = q.scales if nested is None else nested.offset
    if not bool(torch.isfinite(scales).all()):
        also = "" if nested is None else ", and so must the sum of its blocks' scales"
        raise ValueError(f"quantize: w must be finite{also}; it holds NaN or infinity, or values too large to add up")


# ---- reference


@registry.register("quantize", "reference")
def quantize_reference(
    w: Tensor, format: str = "nf4", block_size: int = 64, double_quant: bool = False
) -> QuantizedTensor:
    """:func:`quantize` in plain PyTorch, without its checks. Temporary memory does not grow with ``w``."""
    w = w.detach()
    if format == "int8":
        packed, scales = _quantize_rows(w)
        block_size = w.shape[1]
    elif format in FOUR_BIT_FORMATS:
        packed, scales = _quantize_4bit(w, format, block_size)
    else:
        packed, scales = _quantize_blockwise(w, block_size)
    nested = None
    if double_quant:
        scales, nested = quantize_scales(scales)
    return assemble(w, format, block_size, packed, scales, nested)


def assemble(
    w: Tensor, format: str, block_size: int, packed: Tensor, scales: Tensor, nested: DoubleQuantization | None
) -> QuantizedTensor:
    """What a backend returns for ``w``: its flat codes and scales in the shapes of the format."""
    return QuantizedTensor(
        packed.view(packed_shape(w.shape, format, block_size)),
        scales.view(scales_shape(w.shape, format, block_size)),
        format,
        w.shape,
        w.dtype,
        block_size,
        nested,
    )


def quantize_scales(
    scales: Tensor, quantize_blockwise: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None
) -> tuple[Tensor, DoubleQuantization]:
    """Double quantization: [n] float32 scales become [n] uint8 codes, and what is needed to decode them.

    The offset is PyTorch's mean. Its last bit depends on the number of threads, as it does in bitsandbytes; backends
    share this sum, so that they agree, and bring their own ``quantize_blockwise``: (values, block size) to codes and
    absmax.
    """
    offset = scales.mean() if scales.numel() > 0 else scales.new_zeros(())
    codes, absmax = (quantize_blockwise or _quantize_blockwise)(scales - offset, SCALES_BLOCK_SIZE)
    return codes, DoubleQuantization(absmax, offset, SCALES_BLOCK_SIZE)


def _chunks(w: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Pieces of w in row-major order as flat float32, each with the index of its first element.

    A tensor that is not contiguous is copied a few rows at a time, never as a whole.
    """
    elements = w.numel()
    row_elements = max(elements // max(w.shape[0], 1), 1) if w.dim() > 0 else 1
    for begin in range(0, elements, CHUNK_ELEMENTS):
        end = min(begin + CHUNK_ELEMENTS, elements)
        if w.is_contiguous():
            yield begin, w.view(-1)[begin:end].float()
            continue
        first_row = begin // row_elements
        rows = w[first_row : block_count(end, row_elements)].reshape(-1)
        yield begin, rows[begin - first_row * row_elements : end - first_row * row_elements].float()


@cache
def four_bit_bounds(format: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Midpoints between neighbouring codebook values, ascending, and the code of each interval between them.

    FP4 has two zeros. Code 0 takes what is rounded up to zero and 0 itself, code 8 what is rounded down to it.
    """
    values, codes = codebook(format).sort(stable=True)
    return ((values[:-1] + values[1:]) / 2).to(device), codes.to(torch.uint8).to(device)


def _quantize_4bit(w: Tensor, format: str, block_size: int) -> tuple[Tensor, Tensor]:
    bounds, codes = four_bit_bounds(format, w.device)
    packed = torch.empty(block_count(w.numel(), 2), dtype=torch.uint8, device=w.device)
    scales = torch.empty(block_count(w.numel(), block_size), dtype=torch.float32, device=w.device)
    for begin, values in _chunks(w):
        scaled, absmax = _scale_4bit(values, block_size)
        # Counts the bounds below each value: a value on a bound belongs to the lower interval.
        nibbles = codes[torch.bucketize(scaled, bounds, out_int32=True)]
        packed[begin // 2 : begin // 2 + nibbles.numel() // 2] = nibbles[::2] << 4 | nibbles[1::2]
        scales[begin // block_size :][: absmax.numel()] = absmax
    return packed, scales


def _scale_4bit(values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Values over their block's absmax, padded with 0 to an even number, and the absmax of each block.

    Whole blocks are multiplied by the reciprocal. A shorter last block is divided, and stores the absmax that it was
    divided by; so does bitsandbytes.
    """
    whole = values.numel() // block_size
    blocks = values[: whole * block_size].view(whole, block_size)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * absmax.clamp(min=SMALLEST_DIVISOR).reciprocal()[:, None]).view(-1)
    tail = values[whole * block_size :]
    if tail.numel() == 0:
        return scaled, absmax
    tail_absmax = tail.abs().amax(dim=0, keepdim=True).clamp(min=SMALLEST_DIVISOR)
    padding = tail.new_zeros(tail.numel() % 2)
    return torch.cat([scaled, tail / tail_absmax, padding]), torch.cat([absmax, tail_absmax])


@cache
def dynamic_grid(device: torch.device) -> Tensor:
    """[65536] uint8: the dynamic code for each of the points -1 + 2 i / 65535."""
    values = codebook("int8_blockwise")
    bounds = (values[:-1] + values[1:]) * 0.5
    points = torch.arange(DYNAMIC_GRID_STEPS, dtype=torch.float32) * 2 / (DYNAMIC_GRID_STEPS - 1) - 1
    return torch.bucketize(points, bounds).to(torch.uint8).to(device)


def _quantize_blockwise(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    grid = dynamic_grid(w.device)
    codes = torch.empty(w.numel(), dtype=torch.uint8, device=w.device)
    scales = torch.empty(block_count(w.numel(), block_size), dtype=torch.float32, device=w.device)
    for begin, values in _chunks(w):
        padding = values.new_zeros(-values.numel() % block_size)
        blocks = torch.cat([values, padding]).view(-1, block_size)
        absmax = blocks.abs().amax(dim=1)
        # 0 * (1 / 0) and 0 * (1 / denormal) are NaN, and stand for code 0, the lowest.
        scaled = (blocks * absmax.reciprocal()[:, None]).clamp_(-1, 1).nan_to_num_(nan=-1.0)
        points = ((scaled + 1) * 0.5 * (DYNAMIC_GRID_STEPS - 1) + 0.5).int()
        codes[begin : begin + values.numel()] = grid[points].view(-1)[: values.numel()]
        scales[begin // block_size :][: absmax.numel()] = absmax
    return codes, scales


def _quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    scales = torch.empty(w.shape[0], dtype=torch.float32, device=w.device)
    step = max(CHUNK_ELEMENTS // w.shape[1], 1)
    for begin in range(0, w.shape[0], step):
        values = w[begin : begin + step].float()
        absmax = values.abs().amax(dim=1)
        factor = absmax.reciprocal() * 127.0
        # Rows so small that 127 / absmax overflows become all zero.
        factor = torch.where(factor.isinf(), 0.0, factor)
        codes[begin : begin + step] = (values * factor[:, None]).round()
        scales[begin : begin + step] = absmax
    return codes, scales


# ---- operator


@torch.library.custom_op(
    "peftkern::quantize",
    mutates_args=(),
    schema="(Tensor w, str format, int block_size, bool double_quant, str? backend) -> Tensor[]",
)
def _operator(w: Tensor, format: str, block_size: int, double_quant: bool, backend: str | None) -> list[Tensor]:
    q: QuantizedTensor = registry.run("quantize", w, format, block_size, double_quant, backend=backend)
    _check_finite(q)
    nested = q.double_quantization
    return [q.packed, q.scales] if nested is None else [q.packed, q.scales, nested.absmax, nested.offset]


@_operator.register_fake
def _fake(w: Tensor, format: str, block_size: int, double_quant: bool, _backend: str | None) -> list[Tensor]:
    packed = w.new_empty(
        packed_shape(w.shape, format, block_size), dtype=torch.int8 if format == "int8" else torch.uint8
    )
    scales = w.new_empty(scales_shape(w.shape, format, block_size), dtype=torch.float32)
    if not double_quant:
        return [packed, scales]
    blocks = block_count(scales.numel(), SCALES_BLOCK_SIZE)
    absmax = w.new_empty(blocks, dtype=torch.float32)
    return [packed, scales.to(torch.uint8), absmax, w.new_empty((), dtype=torch.float32)]
