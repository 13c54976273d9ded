from __future__ import annotations

from dataclasses import replace
from typing import Any

import bitsandbytes_peer
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from same_bits import CASES, DTYPES, assert_same_bits, random_tensor
from tensors import FUZZ, SHAPES, block_sizes, tensors
from torch import Tensor

from peftkern import ops
from peftkern.formats import BLOCK_SIZES, FP4, NF4, QuantizedTensor, codebook
from peftkern.ops.dequantize import dequantize_reference
from peftkern.ops.quantize import CHUNK_ELEMENTS

ROUNDING = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SMALLEST_NORMAL = 2.0**-126


def _comparable(values: Tensor, format: str) -> Tensor:
    """Without what bitsandbytes does one way or the other, depending on the shape and the processor.

    Its FP4 code 8 is +0 or -0, and with AVX512-BF16 it flushes denormal 4-bit results in bfloat16 to zero.
    """
    if format == "fp4":
        values = values + 0.0
    if format in ("nf4", "fp4") and values.dtype == torch.bfloat16:
        values = torch.where(values.abs() < SMALLEST_NORMAL, torch.zeros_like(values), values)
    return values


def _assert_matches_bitsandbytes(q: QuantizedTensor) -> None:
    actual, expected = ops.dequantize(q), bitsandbytes_peer.dequantize(q)
    assert_same_bits(_comparable(actual, q.format), _comparable(expected, q.format))


# ---- against bitsandbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize(("format", "double_quant"), CASES)
def test_blocks_match_bitsandbytes(
    backend: str, format: str, double_quant: bool, block_size: int, dtype: torch.dtype
) -> None:
    for seed, shape in enumerate(SHAPES):
        _assert_matches_bitsandbytes(ops.quantize(random_tensor(shape, dtype, seed), format, block_size, double_quant))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 64), (7, 33), (1, 1), (600, 3), (3, 5000)])
def test_rows_match_bitsandbytes(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _assert_matches_bitsandbytes(ops.quantize(random_tensor(shape, dtype), "int8"))


@settings(FUZZ, max_examples=150)
@given(w=tensors(), case=st.sampled_from(CASES), block_size=block_sizes)
def test_any_blocks_match_bitsandbytes(backend: str, w: Tensor, case: tuple[str, bool], block_size: int) -> None:
    _assert_matches_bitsandbytes(ops.quantize(w, case[0], block_size, case[1]))


@settings(FUZZ, max_examples=100)
@given(w=tensors(dimensions=2))
def test_any_rows_match_bitsandbytes(backend: str, w: Tensor) -> None:
    _assert_matches_bitsandbytes(ops.quantize(w, "int8"))


@pytest.mark.parametrize("columns", [80, 144, 96])
def test_rows_that_are_no_whole_blocks_follow_the_format_where_bitsandbytes_does_not(
    backend: str, columns: int
) -> None:
    w = random_tensor((64, columns), torch.float32)
    q = ops.quantize(w)
    flat = ops.dequantize(ops.quantize(w.view(1, -1))).view_as(w)
    assert_same_bits(ops.dequantize(q), flat)
    peer = bitsandbytes_peer.dequantize(q, shape=w.shape)
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        assert_same_bits(peer, flat)
        return
    # Its AVX-512 code takes scale row * (columns // 64) + column // 64 where the format says element // 64.
    row, column = torch.arange(64)[:, None], torch.arange(columns)[None, :]
    wrong = q.scales[row * (columns // 64) + column // 64]
    right = q.scales[(row * columns + column) // 64]
    torch.testing.assert_close(peer / wrong, flat / right)
    assert torch.linalg.vector_norm(peer - w) > 1.5 * torch.linalg.vector_norm(flat - w)


# ---- the operator


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8_blockwise", "int8"])
@pytest.mark.parametrize("field", ["packed", "scales"])
def test_the_raw_operator_refuses_tensors_shorter_than_the_shape(backend: str, format: str, field: str) -> None:
    q = ops.quantize(random_tensor((6, 128), torch.float32), format)
    short = replace(q, **{field: getattr(q, field)[:-1]})
    arguments = (short.packed, short.scales, None, None, format, q.block_size, 0, q.shape, torch.float32, None)
    with pytest.raises(ValueError, match=f"QuantizedTensor: {field} must have shape"):
        torch.ops.peftkern.dequantize(*arguments)


# ---- by hand


@pytest.mark.parametrize(("format", "values"), [("nf4", NF4), ("fp4", FP4)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_four_bit_codes(backend: str, dtype: torch.dtype, format: str, values: tuple[float, ...]) -> None:
    codes = torch.arange(32) % 16
    packed = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)
    for scale in (1.0, 3.0, -2.0):
        q = QuantizedTensor(packed, torch.tensor([scale]), format, torch.Size((32,)), dtype, 32)
        expected = torch.tensor([float(value) for value in values] * 2) * scale
        assert_same_bits(ops.dequantize(q), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_eight_bit_codes(backend: str, dtype: torch.dtype) -> None:
    packed = torch.arange(256).to(torch.uint8)
    q = QuantizedTensor(packed, torch.full((8,), 3.0), "int8_blockwise", torch.Size((256,)), dtype, 32)
    assert_same_bits(ops.dequantize(q), (codebook("int8_blockwise") * 3.0).to(dtype))
    q = QuantizedTensor(
        packed.view(torch.int8).view(2, 128), torch.tensor([127.0, 254.0]), "int8", torch.Size((2, 128)), dtype, 128
    )
    expected = torch.cat([torch.arange(128.0), torch.arange(-256.0, 0.0, 2.0)]).view(2, 128)
    torch.testing.assert_close(ops.dequantize(q), expected.to(dtype), rtol=ROUNDING[dtype], atol=0)


def test_both_zeros_of_fp4_are_positive(backend: str) -> None:
    q = QuantizedTensor(
        torch.full((16,), 0x08, dtype=torch.uint8), torch.ones(1), "fp4", torch.Size((32,)), torch.float32, 32
    )
    assert_same_bits(ops.dequantize(q), torch.zeros(32))


def test_double_quantized_scales_by_hand(backend: str) -> None:
    w = torch.zeros(4, 32)
    w[:, 0] = torch.tensor([1.0, 2.0, 3.0, 6.0])  # mean 3: the scales are stored as -2, -1, 0, 3 over 3
    q = ops.quantize(w, block_size=32, double_quant=True)
    dynamic = codebook("int8_blockwise")
    codes = q.scales.flatten().long()
    expected = dynamic[codes] * 3.0 + 3.0
    assert_same_bits(q.scale_values().flatten(), expected)
    assert_same_bits(ops.dequantize(q)[:, 0], expected)
    torch.testing.assert_close(expected, w[:, 0], rtol=0.02, atol=0)


def test_denormal_bfloat16_results_are_kept(backend: str) -> None:
    w = torch.full((1, 64), 1e-39).to(torch.bfloat16)
    w[0, 0] = 2e-38
    expected = (codebook("nf4")[8] * torch.tensor(2e-38).bfloat16().float()).bfloat16()
    assert 0 < expected < SMALLEST_NORMAL
    assert ops.dequantize(ops.quantize(w))[0, 1] == expected


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "int8_blockwise"])
def test_exactly_representable_values_survive(backend: str, format: str) -> None:
    w = torch.tensor([[1.0, 0.0] * 32, [8.0, 0.0] * 32]) if format != "int8_blockwise" else torch.ones(2, 64) * 5.0
    assert_same_bits(ops.dequantize(ops.quantize(w, format)), w)


# ---- result


@pytest.mark.parametrize(("format", "double_quant"), [*CASES, ("int8", False)])
@pytest.mark.parametrize("shape", [(8, 128), (7, 33)])
def test_every_result_dtype(backend: str, shape: tuple[int, int], format: str, double_quant: bool) -> None:
    q = ops.quantize(random_tensor(shape, torch.bfloat16), format, 64, double_quant)
    single = ops.dequantize(q, torch.float32)
    assert ops.dequantize(q).dtype == torch.bfloat16
    for dtype in DTYPES:
        result = ops.dequantize(q, dtype)
        assert result.shape == shape
        assert result.is_contiguous()
        assert_same_bits(result, single.to(dtype))  # one rounding, from float32


@pytest.mark.parametrize(("format", "double_quant"), CASES)
@pytest.mark.parametrize("shape", [(4, 64), (7, 33)])
def test_float64_is_the_exact_product(shape: tuple[int, int], format: str, double_quant: bool) -> None:
    q = ops.quantize(random_tensor(shape, torch.float32), format, 32, double_quant)
    scales = q.scale_values().flatten().tolist()
    values = codebook(format).tolist()
    codes = q.packed.flatten().tolist()
    if format != "int8_blockwise":
        codes = [code for byte in codes for code in (byte >> 4, byte & 15)]
    expected = [values[codes[i]] * scales[i // 32] for i in range(q.shape.numel())]
    assert_same_bits(ops.dequantize(q, torch.float64), torch.tensor(expected, dtype=torch.float64).view(shape))


def test_float64_of_int8_is_rounded_once() -> None:
    q = ops.quantize(random_tensor((5, 33), torch.float32), "int8")
    rows = zip(q.packed.tolist(), q.scales.tolist(), strict=True)
    expected = [[code * scale / 127 for code in row] for row, scale in rows]
    assert_same_bits(ops.dequantize(q, torch.float64), torch.tensor(expected, dtype=torch.float64))


@settings(FUZZ, max_examples=60)
@given(
    w=tensors(dimensions=2), format=st.sampled_from(["nf4", "fp4", "int8", "int8_blockwise"]), block_size=block_sizes
)
def test_error_stays_within_half_the_widest_gap(w: Tensor, format: str, block_size: int) -> None:
    """The distance of a value from its code is at most half a gap of the codebook, times the scale, and rounding."""
    q = ops.quantize(w, format, block_size)
    flat = w.reshape(-1).double()
    scales = q.scale_values().flatten().double().repeat_interleave(q.block_size)[: flat.numel()]
    half_gap = {"nf4": 0.152, "fp4": 1 / 6, "int8": 1 / 254, "int8_blockwise": 0.0072}[format]
    # Below 4e-37 the factor 127 / absmax of int8 overflows, and below 1e-38 a 4-bit block has another divisor.
    slack = torch.where(scales < 4e-37, scales, 1e-5 * scales)
    error = (ops.dequantize(q, torch.float64).flatten() - flat).abs()
    assert (error <= half_gap * scales + slack).all()


@pytest.mark.parametrize("format", ["nf4", "int8", "int8_blockwise"])
def test_more_than_one_chunk(backend: str, format: str) -> None:
    w = random_tensor((CHUNK_ELEMENTS // 1000 * 2, 1003), torch.float32)
    q = ops.quantize(w, format, 32)
    assert torch.linalg.vector_norm(ops.dequantize(q) - w) < 0.1 * torch.linalg.vector_norm(w)
    half = w.shape[0] // 2
    if format == "int8":
        assert_same_bits(ops.dequantize(q)[half:], ops.dequantize(ops.quantize(w[half:].contiguous(), format)))


@pytest.mark.parametrize("double_quant", [False, True])
def test_rows_of_whole_blocks_can_be_sliced(backend: str, double_quant: bool) -> None:
    q = ops.quantize(random_tensor((8, 128), torch.float32), "nf4", 64)
    shard = replace(q, packed=q.packed[2:5], scales=q.scales[2:5], shape=torch.Size((3, 128)))
    assert_same_bits(ops.dequantize(shard), ops.dequantize(q)[2:5])


def test_fields_may_have_any_strides(backend: str) -> None:
    q = ops.quantize(random_tensor((8, 256), torch.float32), "nf4", 64)
    strided = replace(q, packed=q.packed.t().contiguous().t(), scales=q.scales.t().contiguous().t())
    assert not strided.packed.is_contiguous()
    assert_same_bits(ops.dequantize(strided), ops.dequantize(q))


# ---- errors


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool], ids=str)
def test_other_result_dtypes_are_refused(dtype: torch.dtype) -> None:
    q = ops.quantize(torch.ones(4, 64))
    with pytest.raises(TypeError, match=rf"dtype must be float32, bfloat16, float16 or float64, got {dtype}"):
        ops.dequantize(q, dtype)


@pytest.mark.parametrize("q", [None, torch.ones(4, 64)])
def test_what_is_not_quantized_is_refused(q: Any) -> None:
    with pytest.raises(TypeError, match="q must be a QuantizedTensor"):
        ops.dequantize(q)


def test_corrupt_tensors_are_refused_before_anything_runs() -> None:
    q = ops.quantize(torch.ones(4, 64))
    with pytest.raises(ValueError, match="packed must have shape"):
        ops.dequantize(replace(q, packed=q.packed[:, :-1]))


# ---- operator


@pytest.mark.parametrize(("format", "double_quant"), [*CASES, ("int8", False)])
def test_operator_contract(format: str, double_quant: bool) -> None:
    q = ops.quantize(random_tensor((8, 128), torch.float32), format, 64, double_quant)
    nested = q.double_quantization
    scale_fields = (None, None) if nested is None else (nested.absmax, nested.offset)
    for dtype in (*DTYPES, torch.float64):
        arguments = (q.packed, q.scales, *scale_fields, q.format, q.block_size, 256, list(q.shape), dtype, None)
        torch.library.opcheck(torch.ops.peftkern.dequantize, arguments)


def test_reference_takes_the_dtype_of_the_tensor() -> None:
    q = ops.quantize(random_tensor((4, 64), torch.float16))
    assert dequantize_reference(q).dtype == torch.float16
