from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from same_bits import CASES, DTYPES, assert_same_bits, random_tensor

from peftkern.backends.triton import launch
from peftkern.backends.triton.dequantize import ELEMENTS, ROW_ELEMENTS, dequantize, dequantize_group
from peftkern.formats import BLOCK_SIZES, DoubleQuantization, QuantizedTensor, codebook
from peftkern.formats.quantized_tensor import packed_shape, scales_shape
from peftkern.ops.dequantize import dequantize_reference
from peftkern.ops.quantize import quantize_reference

WHOLE, BLOCKS_LEFT, SHORT_BLOCK = (2, ELEMENTS), (3, 27, 64), (3, 1733)
"""Shapes: programs all full; the last one ends with a block; it ends in a block, with an odd number of elements."""


def _quantized(
    shape: tuple[int, ...], format: str, double_quant: bool = False, block_size: int = 64, seed: int = 0
) -> QuantizedTensor:
    return quantize_reference(random_tensor(shape, torch.float32, seed), format, block_size, double_quant)


def _assert_exact(q: QuantizedTensor, dtype: torch.dtype) -> None:
    result = dequantize(q.to("cuda"), dtype)
    assert result.is_contiguous()
    assert_same_bits(result.cpu(), dequantize_reference(q, dtype))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((WHOLE, dtype) for dtype in DTYPES), (BLOCKS_LEFT, torch.bfloat16), (SHORT_BLOCK, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize(("format", "double_quant"), CASES)
def test_blocks(format: str, double_quant: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _assert_exact(_quantized(shape, format, double_quant), dtype)


@pytest.mark.parametrize("block_size", [size for size in BLOCK_SIZES if size != 64])
@pytest.mark.parametrize(("format", "double_quant"), [("nf4", True), ("int8_blockwise", False)])
def test_block_sizes(format: str, double_quant: bool, block_size: int) -> None:
    shape = (2 * ELEMENTS + block_size + 1,)
    _assert_exact(_quantized(shape, format, double_quant, block_size), torch.bfloat16)


@pytest.mark.parametrize("shape", [(), (1, 1), (70,), (5, 33)], ids=str)
@pytest.mark.parametrize(("format", "double_quant"), [("fp4", False), ("int8_blockwise", True)])
def test_less_than_a_program(format: str, double_quant: bool, shape: tuple[int, ...]) -> None:
    _assert_exact(_quantized(shape, format, double_quant), torch.float16)


@pytest.mark.parametrize("shape", [(5, 64), (7, 33), (1, 1), (600, 3), (2, ROW_ELEMENTS + 48)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    _assert_exact(_quantized(shape, "int8"), dtype)


def _every_code(format: str) -> QuantizedTensor:
    """[24, 256] codes in turn, with scales of every kind: of both signs, denormal, beyond float16."""
    shape = torch.Size((24, 256))
    codes = packed_shape(shape, format, 64)
    packed = torch.arange(codes.numel()).to(torch.int8 if format == "int8" else torch.uint8)
    kinds = torch.tensor([1.0, -0.3, 0.0, -0.0, 1e-44, -3e-40, 2e-38, 6e-8, 65504.0, 1e5, 3.4e38])
    scales = kinds.repeat(9)[: scales_shape(shape, format, 64).numel()].view(scales_shape(shape, format, 64))
    block_size = shape[1] if format == "int8" else 64
    return QuantizedTensor(packed.view(codes), scales, format, shape, torch.float32, block_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ["nf4", "fp4", "int8_blockwise", "int8"])
def test_every_code_with_every_kind_of_scale(format: str, dtype: torch.dtype) -> None:
    _assert_exact(_every_code(format), dtype)


def test_scales_are_rounded_before_their_offset_is_added() -> None:
    blocks = 512
    nested = DoubleQuantization(torch.tensor([0.7, 1e-3]), torch.tensor(-1.0 / 3), 256)
    scales = torch.arange(blocks).to(torch.uint8)
    packed = torch.full((blocks * 16,), 0xFF, dtype=torch.uint8)  # code 15 of NF4 is 1
    q = QuantizedTensor(packed, scales, "nf4", torch.Size((blocks * 32 - 1,)), torch.float32, 32, nested)
    contracted = codebook("int8_blockwise").double()[scales.long()] * nested.absmax.double().repeat_interleave(256)
    assert ((contracted + nested.offset.double()).float() != q.scale_values()).any()
    _assert_exact(q, torch.float32)


@pytest.mark.parametrize("block_size", [32, 4096])
def test_any_block_size_of_the_scales(block_size: int) -> None:
    single = _quantized((9, 4096), "nf4", False, 32)
    scales = quantize_reference(single.scales.view(-1) - 2.5, "int8_blockwise", block_size)
    nested = DoubleQuantization(scales.scales, torch.tensor(2.5), block_size)
    q = replace(single, scales=scales.packed.view(single.scales.shape), double_quantization=nested)
    q.validate()
    _assert_exact(q, torch.bfloat16)


@pytest.mark.parametrize("format", ["nf4", "int8_blockwise", "int8"])
def test_parts_and_layouts(format: str) -> None:
    whole = _quantized((5, 192), format).to("cuda")
    values = dequantize_reference(whole.to("cpu"), torch.bfloat16)
    part = replace(whole, packed=whole.packed[1:4], scales=whole.scales[1:4], shape=torch.Size((3, 192)))
    assert_same_bits(dequantize(part, torch.bfloat16).cpu(), values[1:4])
    spread = replace(whole, packed=torch.stack([whole.packed, whole.packed], -1)[..., 0])
    assert not spread.packed.is_contiguous()
    assert_same_bits(dequantize(spread, torch.bfloat16).cpu(), values)


@pytest.mark.parametrize("format", ["nf4", "int8_blockwise", "int8"])
def test_codes_and_scales_anywhere_in_memory(format: str) -> None:
    q = _quantized((3, 512), format).to("cuda")
    packed = torch.cat([q.packed.view(-1)[:1], q.packed.view(-1)])[1:].view(q.packed.shape)
    scales = torch.cat([q.scales.view(-1)[:1], q.scales.view(-1)])[1:].view(q.scales.shape)
    moved = dequantize(replace(q, packed=packed, scales=scales), torch.float16)
    assert_same_bits(moved.cpu(), dequantize_reference(q.to("cpu"), torch.float16))


@pytest.mark.parametrize(("format", "double_quant"), [*CASES, ("int8", False)])
def test_no_elements(format: str, double_quant: bool) -> None:
    for shape in [(0, 64)] if format == "int8" else [(0,), (0, 64), (64, 0), (0, 33), (3, 0, 128)]:
        result = dequantize(_quantized(shape, format, double_quant).to("cuda"), torch.bfloat16)
        assert (result.shape, result.dtype) == (shape, torch.bfloat16)


def test_the_dtype_is_that_of_the_tensor_by_default() -> None:
    q = replace(_quantized((4, 64), "nf4"), dtype=torch.float16)
    assert_same_bits(dequantize(q.to("cuda")).cpu(), dequantize_reference(q))


# ---- groups

GROUPS = [
    ((64, 128), (32, 128), (32, 128)),
    ((3, 4096), (1, 4096)),
    ((70, 33), (1, 33), (5, 33)),
    ((0, 64), (90, 64), (0, 64)),
    ((1, 1), (2, 1), (1, 1)),
]


def _group(format: str, double_quant: bool, shapes: tuple[tuple[int, int], ...]) -> list[QuantizedTensor]:
    return [_quantized(shape, format, double_quant, seed=seed).to("cuda") for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("shapes", GROUPS, ids=str)
@pytest.mark.parametrize(
    ("format", "double_quant", "dtype"),
    [
        ("nf4", True, torch.bfloat16),
        ("int8_blockwise", False, torch.float16),
        ("int8", False, torch.float32),
    ],
    ids=str,
)
def test_a_group_is_its_members_below_each_other(
    format: str, double_quant: bool, dtype: torch.dtype, shapes: tuple[tuple[int, int], ...]
) -> None:
    weights = _group(format, double_quant, shapes)
    rows = sum(shape[0] for shape in shapes)
    scratch = torch.full((rows + 2, shapes[0][1]), 7.0, dtype=dtype, device="cuda")
    dequantize_group(weights, scratch[1:-1].split([shape[0] for shape in shapes]))
    expected = [dequantize_reference(weight.to("cpu"), dtype) for weight in weights]
    assert_same_bits(scratch[1:-1].cpu(), torch.cat(expected))
    assert (scratch[[0, -1]] == 7).all()


@pytest.mark.parametrize(("format", "double_quant"), [("nf4", True), ("int8_blockwise", False), ("int8", False)])
def test_a_group_is_one_launch_that_reads_and_writes_each_byte_once(format: str, double_quant: bool) -> None:
    weights = _group(format, double_quant, GROUPS[0])
    out = torch.empty(128, 128, dtype=torch.bfloat16, device="cuda")
    with launch.recording() as launches:
        dequantize_group(weights, out.split([weight.shape[0] for weight in weights]))
    (only,) = launches
    assert only.bytes_read == sum(weight.nbytes for weight in weights)
    assert only.bytes_written == 2 * 128 * 128
