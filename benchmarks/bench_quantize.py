"""NF4 quantize and dequantize: ``pytest benchmarks/bench_quantize.py``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from peftkern.bench import quantize


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
def test_quantize(compare: Callable[..., None], double_quant: bool) -> None:
    compare(quantize.setup_quantize(double_quant))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_dequantize(compare: Callable[..., None], dtype: torch.dtype) -> None:
    compare(quantize.setup_dequantize(dtype))
