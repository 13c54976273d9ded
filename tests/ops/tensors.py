"""Tensors that are hard on quantizers, and comparison by bits."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from peftkern.formats import BLOCK_SIZES, QuantizedTensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [(format, double) for format in ("nf4", "fp4", "int8_blockwise") for double in (False, True)]
SHAPES = [(4, 128), (128, 64), (7, 80), (3, 33), (5, 4096), (3, 1040), (1, 1), (70,), (2, 3, 96), ()]
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
"""For tests that take the ``backend`` fixture: it means the same for each example."""

_BIT_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The bytes as integers: -0 differs from +0, and NaN equals itself."""
    return tensor.contiguous().view(_BIT_DTYPES[tensor.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    different = (bits(actual) != bits(expected)).flatten().nonzero().flatten()
    assert len(different) == 0, (
        f"{len(different)} of {actual.numel()} elements differ, first at {int(different[0])}: "
        f"{actual.flatten()[different[0]]} instead of {expected.flatten()[different[0]]}"
    )


def assert_same_quantized(actual: QuantizedTensor, expected: QuantizedTensor) -> None:
    actual.validate()
    assert (actual.format, actual.shape, actual.dtype) == (expected.format, expected.shape, expected.dtype)
    assert actual.block_size == expected.block_size
    assert_same_bits(actual.scales, expected.scales)
    assert_same_bits(actual.packed, expected.packed)
    assert (actual.double_quantization is None) == (expected.double_quantization is None)
    if actual.double_quantization is not None and expected.double_quantization is not None:
        assert_same_bits(actual.double_quantization.offset, expected.double_quantization.offset)
        assert_same_bits(actual.double_quantization.absmax, expected.double_quantization.absmax)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def tensors(draw: st.DrawFn, dimensions: int | None = None) -> Tensor:
    """Up to a few blocks of values between denormal and huge, some zero, in any layout."""
    count = draw(st.integers(1, 3)) if dimensions is None else dimensions
    shape = [draw(st.integers(1, 9)) for _ in range(count - 1)] + [draw(st.integers(1, 700))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(shape, generator=generator)
    if draw(st.booleans()):  # on a coarse grid: values on and near thresholds, equal maxima
        values = (values * 8).round() / 8
    magnitude = draw(st.sampled_from([0, 0, -3, 4, -30, -40, -44, 35]))
    values *= 10.0**magnitude if magnitude > -40 else torch.tensor(10.0**magnitude, dtype=torch.float64)
    values[torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 0
    limit = 3e38 if (dtype := draw(st.sampled_from(DTYPES))) != torch.float16 else 65504.0
    values = values.clamp(-limit, limit).to(dtype)
    return values.transpose(0, -1) if draw(st.booleans()) else values


block_sizes = st.sampled_from(BLOCK_SIZES)
