"""Sums of importance against float64, on every backend and instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from isa_backends import ISA_BACKENDS, select
from same_bits import DTYPES, assert_same_bits, random_tensor
from torch import Tensor

from peftkern.backends import cpu
from peftkern.ops.importance import KINDS, accumulate_importance_, importance_dot, probe_dot

SHAPES = [(3, 256), (70, 33), (1, 1), (300,), (2, 3, 96), (0, 4), (4, 0), (1, 70_001), (2, 140_000)]


@pytest.fixture(params=ISA_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return select(request.param, monkeypatch)


def other_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor | None:
    return random_tensor(shape, dtype, seed=8) if KINDS[kind] else None


def terms(kind: str, gradient: Tensor, other: Tensor | None) -> Tensor:
    """As they are rounded: float32 products."""
    g = gradient.float()
    return g if kind == "sum" else g * g if kind == "square" else g * other.float()  # type: ignore[union-attr]


def rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:1]


# ---- totals of entries


@pytest.mark.parametrize("kind", KINDS)
def test_totals_of_entries_are_exactly_the_rounded_sums(backend: str, kind: str) -> None:
    for shape in [*SHAPES, ()]:
        total = random_tensor(shape, torch.float32, seed=9)
        expected = total.clone()
        for seed, dtype in enumerate(DTYPES):
            gradient, other = random_tensor(shape, dtype, seed), other_of(kind, shape, DTYPES[seed - 1])
            accumulate_importance_(total, gradient, kind, other, backend=backend)
            expected += terms(kind, gradient, other)
        assert_same_bits(total, expected)


def test_hand_computed(backend: str) -> None:
    gradient, other = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[10.0, 1.0], [0.0, -1.0]])
    expected = {"sum": [[1, -2], [3, 4]], "square": [[1, 4], [9, 16]], "product": [[10, -2], [0, -4]]}
    by_row = {"sum": [-1, 7], "square": [5, 25], "product": [8, -4]}
    for kind, values in expected.items():
        partner = other if KINDS[kind] else None
        entries, sums = torch.zeros(2, 2), torch.ones(2)
        accumulate_importance_(entries, gradient, kind, partner, backend=backend)
        accumulate_importance_(sums, gradient, kind, partner, backend=backend)
        assert entries.tolist() == values and sums.tolist() == [value + 1 for value in by_row[kind]]
    assert importance_dot(gradient, other, backend=backend).item() == 4.0


def test_a_total_of_several_batches_is_their_sum(backend: str) -> None:
    total = torch.zeros(8, 100)
    gradients = [random_tensor((8, 100), torch.float32, seed) for seed in range(4)]
    for gradient in gradients:
        accumulate_importance_(total, gradient, "square", backend=backend)
    expected = torch.stack(gradients).double().pow(2).sum(0)
    assert float((total - expected).abs().max() / expected.abs().max()) < 1e-6


# ---- totals of rows, and the dot product


@pytest.mark.parametrize("kind", KINDS)
def test_totals_of_rows_are_within_a_rounding_of_float64(backend: str, kind: str) -> None:
    for shape in [shape for shape in SHAPES if len(shape) > 1]:
        for dtype in DTYPES:
            total = random_tensor(rows(shape), torch.float32, seed=9)
            gradient, other = random_tensor(shape, dtype), other_of(kind, shape)
            expected = total.double() + terms(kind, gradient, other).double().flatten(1).sum(1)
            accumulate_importance_(total, gradient, kind, other, backend=backend)
            assert torch.allclose(total.double(), expected, rtol=1.2e-7, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_dot_product_is_within_a_rounding_of_float64(backend: str, dtype: torch.dtype) -> None:
    for shape in [*SHAPES, ()]:
        gradient, delta = random_tensor(shape, dtype), random_tensor(shape, torch.float32, seed=3)
        result = importance_dot(gradient, delta, backend=backend)
        assert result.shape == () and result.dtype == torch.float32
        expected = float(terms("product", gradient, delta).double().sum())
        assert result.item() == pytest.approx(expected, rel=1.2e-7, abs=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_dot_product_with_a_difference(backend: str, dtype: torch.dtype) -> None:
    for shape in [*SHAPES, ()]:
        for gradient_dtype in DTYPES:
            gradient, saved = random_tensor(shape, gradient_dtype), random_tensor(shape, dtype, seed=3)
            weight = (saved.float() * 1.01 + 1e-3).to(dtype)
            result = probe_dot(gradient, weight, saved, backend=backend)
            assert result.shape == () and result.dtype == torch.float32
            expected = float((gradient.float() * (weight.float() - saved.float())).double().sum())
            assert result.item() == pytest.approx(expected, rel=1.2e-7, abs=1e-10)


def test_the_dot_product_with_a_difference_by_hand(backend: str) -> None:
    gradient, weight = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[10.0, 1.0], [0.0, -1.0]])
    saved = torch.tensor([[9.0, 4.0], [0.0, -1.5]])
    assert probe_dot(gradient, weight, saved, backend=backend).item() == 1 * 1 + 2 * 3 + 0 + 4 * 0.5
    assert probe_dot(gradient.t(), weight, saved.t().contiguous().t(), backend=backend).item() == 1 - 9 - 0 + 2.0
    assert bool(probe_dot(gradient, torch.full((2, 2), float("nan")), saved, backend=backend).isnan())


def test_sums_do_not_lose_small_terms_beside_large_ones(backend: str) -> None:
    gradient = torch.full((1, 200_000), 1e-4)
    gradient[0, 0] = 2.0**24
    total = torch.zeros(1)
    accumulate_importance_(total, gradient, "sum", backend=backend)
    assert total.item() == 2.0**24 + 20
    assert importance_dot(gradient, torch.ones_like(gradient), backend=backend).item() == 2.0**24 + 20


def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu.available():
        pytest.skip(f"cpu backend: {cpu.unavailable_reason()}")
    gradient, delta = random_tensor((7, 150_001), torch.bfloat16), random_tensor((7, 150_001), torch.float32, seed=1)
    threads, results = torch.get_num_threads(), []
    for isa in cpu.supported_isas():
        monkeypatch.setenv(cpu.ENVIRONMENT_VARIABLE, isa)
        for count in (1, 3):
            torch.set_num_threads(count)
            try:
                total = torch.zeros(7)
                accumulate_importance_(total, gradient, "product", delta, backend="cpu")
                dots = (
                    importance_dot(gradient, delta, backend="cpu"),
                    probe_dot(gradient, delta * 2, delta, backend="cpu"),
                )
                results.append(torch.cat((total, torch.stack(dots))))
            finally:
                torch.set_num_threads(threads)
    assert len(results) >= 2
    for result in results[1:]:
        assert_same_bits(result, results[0])


# ---- layouts, autograd, numbers that are none


def test_tensors_of_any_strides(backend: str) -> None:
    gradient, other = random_tensor((40, 60), torch.bfloat16).t()[::2], random_tensor((40, 30), torch.float32).t()
    entries, sums = torch.zeros(30, 40), torch.zeros(30)
    accumulate_importance_(entries, gradient, "product", other, backend=backend)
    accumulate_importance_(sums, gradient, "product", other, backend=backend)
    assert_same_bits(entries, gradient.float() * other)
    assert torch.allclose(sums, entries.sum(1), rtol=1e-4)
    assert importance_dot(gradient, other, backend=backend).item() == pytest.approx(float(entries.sum()), rel=1e-4)


def test_nan_and_infinity_stay_where_they_are(backend: str) -> None:
    gradient = torch.ones(3, 50)
    gradient[0, 3], gradient[2, 7] = float("nan"), float("inf")
    entries, sums = torch.zeros(3, 50), torch.zeros(3)
    accumulate_importance_(entries, gradient, "square", backend=backend)
    accumulate_importance_(sums, gradient, "square", backend=backend)
    assert torch.equal(entries.isfinite(), gradient.isfinite())
    assert sums.isnan().tolist() == [True, False, False] and sums[1:].tolist() == [50.0, float("inf")]
    assert bool(importance_dot(gradient, gradient, backend=backend).isnan())


def test_autograd_learns_that_the_total_has_changed(backend: str) -> None:
    factor = torch.ones(3, 4, requires_grad=True)
    total = torch.ones(3, 4)
    product = (factor * total).sum()
    accumulate_importance_(total, torch.ones(3, 4), "sum", backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


# ---- bad arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "mean"}, ValueError, "kind must be one of .*, got 'mean'"),
        ({"kind": "product"}, ValueError, "kind 'product' needs other"),
        ({"other": torch.zeros(3, 4)}, ValueError, "kind 'sum' takes no other"),
        ({"kind": "product", "other": torch.zeros(4, 3)}, ValueError, r"other must be \[3, 4\] on cpu"),
        ({"total": torch.zeros(4)}, ValueError, r"total must be \[3, 4\] or \[3\] on cpu"),
        ({"total": torch.zeros(4, 3).t()}, ValueError, "contiguous"),
        ({"total": torch.zeros(3, 4).double()}, TypeError, "total must be float32, got torch.float64"),
        ({"gradient": torch.zeros(3, 4).double()}, TypeError, "gradient must be float32, bfloat16 or float16"),
        ({"gradient": torch.zeros(3, 4).to_sparse()}, ValueError, "gradient must be dense"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        accumulate_importance_(
            **({"total": torch.zeros(3, 4), "gradient": torch.zeros(3, 4), "kind": "sum"} | arguments)
        )
    with pytest.raises(ValueError, match=r"delta must be \[3, 4\] on cpu as gradient is; got \[4, 3\]"):
        importance_dot(torch.zeros(3, 4), torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"saved must be \[3, 4\] on cpu as weight is; got \[4, 3\]"):
        probe_dot(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(4, 3))
    with pytest.raises(TypeError, match=r"saved must be torch.float32 as weight is, got torch.bfloat16"):
        probe_dot(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3, 4).bfloat16())
