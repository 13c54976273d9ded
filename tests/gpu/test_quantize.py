from __future__ import annotations

import pytest
import torch
from same_bits import CASES, DTYPES, assert_same_bits, assert_same_quantized, random_tensor
from torch import Tensor

from peftkern.backends.triton.quantize import ELEMENTS, ROW_ELEMENTS, quantize
from peftkern.formats import QuantizedTensor, codebook
from peftkern.formats.quantized_tensor import FOUR_BIT_FORMATS
from peftkern.ops.quantize import SCALES_BLOCK_SIZE, dynamic_grid, four_bit_bounds, quantize_reference

BLOCK_FORMATS = ("nf4", "fp4", "int8_blockwise")
WHOLE, BLOCKS_LEFT, SHORT_BLOCK = (2, ELEMENTS), (3, 27, 64), (3, 1733)
"""Shapes: programs all full; the last one ends with a block; it ends in a block, with an odd number of elements."""


def _on_gpu(w: Tensor, format: str, block_size: int = 64, double_quant: bool = False) -> QuantizedTensor:
    q = quantize(w.to("cuda"), format, block_size, double_quant)
    q.validate()
    return q.to("cpu")


def _assert_exact(w: Tensor, format: str, block_size: int = 64) -> None:
    assert_same_quantized(_on_gpu(w, format, block_size), quantize_reference(w, format, block_size))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((WHOLE, dtype) for dtype in DTYPES), (BLOCKS_LEFT, torch.bfloat16), (SHORT_BLOCK, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("format", BLOCK_FORMATS)
def test_blocks(format: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _assert_exact(random_tensor(shape, dtype), format)


@pytest.mark.parametrize(
    ("block_size", "dtype"),
    list(zip((32, 128, 256, 512, 1024, 2048, 4096), (*DTYPES, *DTYPES, torch.bfloat16), strict=True)),
    ids=str,
)
@pytest.mark.parametrize("format", ["nf4", "int8_blockwise"])
def test_block_sizes(format: str, block_size: int, dtype: torch.dtype) -> None:
    _assert_exact(random_tensor((2 * ELEMENTS + block_size + 1,), dtype), format, block_size)


@pytest.mark.parametrize("shape", [(), (1, 1), (70,), (5, 33)], ids=str)
@pytest.mark.parametrize("format", ["fp4", "int8_blockwise"])
def test_less_than_a_program(format: str, shape: tuple[int, ...]) -> None:
    _assert_exact(random_tensor(shape, torch.bfloat16), format)


@pytest.mark.parametrize("shape", [(5, 64), (7, 33), (1, 1), (600, 3), (2, ROW_ELEMENTS + 48)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    w = random_tensor(shape, dtype)
    w[-1, 1:] = 0
    _assert_exact(w, "int8")


def test_rows_round_half_to_even() -> None:
    halves = torch.arange(-254, 255) / 2
    assert _on_gpu(halves[None] * 3, "int8").packed.tolist() == [halves.round().tolist()]


@pytest.mark.parametrize("format", BLOCK_FORMATS)
def test_values_beside_every_threshold(format: str) -> None:
    values = codebook(format).sort().values
    grid = dynamic_grid(torch.device("cpu"))
    steps = (grid[1:] != grid[:-1]).nonzero().flatten() + torch.tensor([[1.0], [0.5], [0.0]])
    exact = [values, (values[:-1] + values[1:]) / 2, steps.flatten() / 32767.5 - 1]
    beside = [torch.nextafter(v, torch.tensor(side)) for v in exact for side in (-2.0, 2.0)]
    w = torch.cat([*exact, *beside]).clamp(-1, 1)
    w = torch.nn.functional.pad(w, (0, -len(w) % 31)).view(-1, 31)
    w = torch.nn.functional.pad(w, (1, 0), value=1.0)  # a one in every block of 32: the quotients are the values
    _assert_exact(w, format, 32)
    _assert_exact(w.view(-1)[:-1], format, 32)


def _told_apart(bounds: Tensor) -> Tensor:
    """[n, 2]: an absmax and a value whose quotient and whose product with the reciprocal lie in two intervals."""
    absmax = torch.linspace(1.01, 1.99, 199)[:, None].expand(-1, len(bounds))
    value = (absmax * bounds).contiguous()
    apart = torch.bucketize(value / absmax, bounds) != torch.bucketize(value * absmax.reciprocal(), bounds)
    return torch.stack([absmax[apart], value[apart]], 1)


@pytest.mark.parametrize("format", sorted(FOUR_BIT_FORMATS))
def test_a_short_block_is_divided_and_others_are_multiplied_by_the_reciprocal(format: str) -> None:
    pairs = _told_apart(four_bit_bounds(format, torch.device("cpu"))[0])[:3]
    assert len(pairs) == 3
    for pair in pairs:
        _assert_exact(pair, format)
        _assert_exact(torch.nn.functional.pad(pair, (0, 62)), format)


def _hard_blocks(length: int) -> Tensor:
    """[blocks, length]: zeros of both signs, denormals, magnitudes whose reciprocals are denormal or infinite."""
    ramp = torch.linspace(-1, 1, length, dtype=torch.float64)
    magnitudes = [0.0, -0.0, 1.5e-45, 1e-44, 1e-40, 9e-39, 1e-38, 1.2e-38, 2.9e-39, 3.7e-37, 1e-30, 1.0, 3e38]
    blocks = torch.stack([ramp * magnitude for magnitude in magnitudes]).float()
    blocks[-1, 1::3] = 0
    return blocks


@pytest.mark.parametrize("format", [*BLOCK_FORMATS, "int8"])
def test_hard_values(format: str) -> None:
    for blocks in _hard_blocks(64), _hard_blocks(64).flip(0), _hard_blocks(64).flip(1):
        _assert_exact(blocks, format)
    for short in _hard_blocks(33):
        _assert_exact(short[None], format)


@pytest.mark.parametrize("rows", [300, 5, 1])
@pytest.mark.parametrize("format", BLOCK_FORMATS)
def test_double_quantization(format: str, rows: int) -> None:
    w = random_tensor((rows, 64), torch.bfloat16)
    q = _on_gpu(w, format, double_quant=True)
    single = quantize_reference(w, format)
    assert_same_bits(q.packed, single.packed)
    assert q.double_quantization is not None
    # The last bit of a mean depends on the device that adds it up.
    offset = q.double_quantization.offset
    torch.testing.assert_close(offset, single.scales.double().mean().float(), rtol=1e-6, atol=0)
    centred = quantize_reference(single.scales.view(-1) - offset, "int8_blockwise", SCALES_BLOCK_SIZE)
    assert_same_bits(q.scales.view(-1), centred.packed)
    assert_same_bits(q.double_quantization.absmax, centred.scales)


@pytest.mark.parametrize(
    ("value", "dtype"), list(zip((float("nan"), float("inf"), float("-inf")), DTYPES, strict=True)), ids=str
)
@pytest.mark.parametrize("format", ["nf4", "int8_blockwise", "int8"])
def test_what_is_not_finite_reaches_the_scale_of_its_block_alone(format: str, dtype: torch.dtype, value: float) -> None:
    for position in 3, 70, 128:  # the third is the last block, which is short
        w = random_tensor((3, 64), dtype).view(-1)[:129].clone()
        expected = quantize_reference(w.view(3, 43) if format == "int8" else w, format).scales
        w[position] = value
        scales = _on_gpu(w.view(3, 43) if format == "int8" else w, format).scales
        block = position // (43 if format == "int8" else 64)
        assert not scales[block].isfinite()
        others = torch.arange(3) != block
        assert_same_bits(scales[others], expected[others])


@pytest.mark.parametrize("format", ["nf4", "int8", "int8_blockwise"])
def test_any_layout(format: str) -> None:
    w = random_tensor((48, 130), torch.float16).to("cuda")
    for view in w.t(), w[::3, 5:105:2], w[:1].expand(40, -1), w[1:, :], w.view(-1)[1:-2].view(-1, 3):
        expected = quantize_reference(view.to("cpu").contiguous(), format)
        assert_same_quantized(quantize(view, format).to("cpu"), expected)


@pytest.mark.parametrize(("format", "double_quant"), [*CASES, ("int8", False)])
def test_no_elements(format: str, double_quant: bool) -> None:
    for shape in [(0, 64)] if format == "int8" else [(0,), (0, 64), (64, 0), (0, 33)]:
        q = _on_gpu(torch.empty(shape), format, 64, double_quant)
        assert q.shape == shape
        assert q.packed.numel() == q.scales.numel() == 0
