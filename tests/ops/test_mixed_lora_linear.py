"""A batch of rows with adapters of their own is each row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from peftkern.ops import lora_linear, mixed_lora_linear, quantize

TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
RANKS, SCALING = (3, 1, 5), (0.5, 2.0, 1.25)


def error(actual: Tensor, expected: Tensor) -> float:
    difference = torch.linalg.vector_norm(actual.double() - expected.double())
    return (difference / torch.linalg.vector_norm(expected.double()).clamp_min(1e-30)).item()


def problem(rows: int, dtype: torch.dtype, out: int = 24, columns: int = 64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    factors = [(normal(rank, columns), normal(out, rank)) for rank in RANKS]
    return {"x": normal(rows, 3, columns), "A": [A for A, _ in factors], "B": [B for _, B in factors], "b": normal(out)}


def weight_of(format: str, dtype: torch.dtype) -> Any:
    values = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    return values.to(dtype) if format == "dense" else quantize(values, format)


def tensors(parts: dict[str, Any]) -> list[Tensor]:
    return [parts["x"], *parts["A"], *parts["B"], parts["b"]]


def row_by_row(weight: Any, parts: dict[str, Any], adapters: list[int]) -> Tensor:
    rows = []
    for row, adapter in zip(parts["x"], adapters, strict=True):
        factors = () if adapter < 0 else (parts["A"][adapter], parts["B"][adapter], SCALING[adapter])
        rows.append(lora_linear(row, weight, *factors, bias=parts["b"], backend="reference"))
    return torch.stack(rows)


@settings(max_examples=20, deadline=None)
@given(
    adapters=st.lists(st.integers(-1, len(RANKS) - 1), min_size=1, max_size=6),
    format=st.sampled_from(["dense", "nf4", "int8"]),
    dtype=st.sampled_from(list(TOLERANCES)),
)
def test_every_row_is_as_it_is_alone(adapters: list[int], format: str, dtype: torch.dtype) -> None:
    weight, parts = weight_of(format, dtype), problem(len(adapters), dtype)
    y = mixed_lora_linear(parts["x"], weight, parts["A"], parts["B"], adapters, SCALING, parts["b"])
    exact = {name: _double(value) for name, value in parts.items()}
    expected = row_by_row(weight.double() if format == "dense" else weight, exact, adapters)
    assert y.dtype == dtype
    assert error(y, expected) <= TOLERANCES[dtype]
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    ours = torch.autograd.grad(y, tensors(parts), upstream, allow_unused=True)
    theirs = torch.autograd.grad(expected, tensors(exact), upstream.double(), allow_unused=True)
    for gradient, other in zip(ours, theirs, strict=True):
        if other is None:  # of an adapter that no row has
            assert gradient is None or not gradient.any()
        else:
            assert gradient is not None and error(gradient, other) <= 2 * TOLERANCES[dtype]


def _double(value: Any) -> Any:
    if isinstance(value, list):
        return [_double(each) for each in value]
    return value.detach().double().requires_grad_()


def test_dropout_is_one_mask_over_the_rows_of_an_adapter() -> None:
    weight, parts = weight_of("nf4", torch.float32), problem(4, torch.float32)
    torch.manual_seed(5)
    y = mixed_lora_linear(parts["x"], weight, parts["A"], parts["B"], [2, 0, -1, 2], SCALING, None, [0.5, 0.0, 0.25])
    torch.manual_seed(5)
    expected = lora_linear(parts["x"], weight, backend="reference")
    for adapter, rows, p in ((0, [1], 0.5), (2, [0, 3], 0.25)):
        h = functional.dropout(parts["x"][rows], p) @ parts["A"][adapter].t()
        expected[rows] += SCALING[adapter] * h @ parts["B"][adapter].t()
    assert error(y, expected) <= 5e-6


def test_under_autocast_the_result_is_in_its_dtype() -> None:
    weight, parts = weight_of("nf4", torch.float32), problem(3, torch.float32)
    arguments = (weight, parts["A"], parts["B"], [0, 1, -1], SCALING)
    expected = mixed_lora_linear(parts["x"], *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixed_lora_linear(parts["x"], *arguments)
    assert y.dtype == torch.bfloat16
    assert error(y, expected) <= 8e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapters": [0, 1]}, r"one entry for each of the 3 rows of x, got 2"),
        ({"adapters": [0, 1, 3]}, r"indices from 0 to below 3, or -1 for none; got 3"),
        ({"adapters": [0, 1, -2]}, "got -2"),
        ({"x": torch.ones(64), "adapters": [0]}, r"x must be \[rows, \.\.\., in\]"),
        ({"scaling": [1.0]}, "scaling must have one entry per adapter, 3; got 1"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    parts = problem(3, torch.float32)
    call = {"x": parts["x"], "lora_A": parts["A"], "lora_B": parts["B"], "adapters": [0, 1, 2], "scaling": SCALING}
    with pytest.raises(ValueError, match=message):
        mixed_lora_linear(weight=weight_of("nf4", torch.float32), **{**call, **change})
