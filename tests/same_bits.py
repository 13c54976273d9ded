"""Numbers for quantizers and the comparison of results by their bits."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.formats import QuantizedTensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [(format, double) for format in ("nf4", "fp4", "int8_blockwise") for double in (False, True)]

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
