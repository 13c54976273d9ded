"""Sums over batches on the device, against the reference."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DEVICE, launched
from same_bits import DTYPES, assert_same_bits
from torch import Tensor

from peftkern.backends.triton import importance as kernels
from peftkern.ops.importance import KINDS, accumulate_importance_, importance_dot, probe_dot

SHAPES = [(1,), (1025,), (3, 700), (2, 3, 171), (700, 3)]


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> tuple[Tensor, Tensor | None]:
    return random(shape, dtype, 1), random(shape, torch.float32, 2) if KINDS[kind] else None


def sums(total: Tensor, gradient: Tensor, kind: str, other: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two gradients onto a total, by the kernels and by the reference."""
    found, expected = total.clone().to(DEVICE), total.clone()
    there = None if other is None else other.to(DEVICE)
    for _ in range(2):
        accumulate_importance_(found, gradient.to(DEVICE), kind, there, backend="triton")
        accumulate_importance_(expected, gradient, kind, other, backend="reference")
    return found.cpu(), expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_entries(kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_same_bits(*sums(random(shape, torch.float32, 3), *_with_kind(shape, dtype, kind)))


@pytest.mark.parametrize("shape", [(3, 700), (2, 3, 171), (700, 3), (1, 20_000), (3, 40_000), (5, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sums_over_rows(kind: str, shape: tuple[int, ...]) -> None:
    """Sums in float64 differ by their order in bits that float32 does not have, but for a tie."""
    found, expected = sums(random(shape[:1], torch.float32, 3), *_with_kind(shape, torch.bfloat16, kind))
    torch.testing.assert_close(found, expected, rtol=1.2e-7, atol=0)


def _with_kind(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> tuple[Tensor, str, Tensor | None]:
    gradient, other = operands(shape, dtype, kind)
    return gradient, kind, other


def test_small_terms_are_not_lost_beside_large_ones() -> None:
    gradient = torch.full((2, 40_001), 2.0**-20)
    gradient[:, 0] = 2.0**10
    total = torch.zeros(2, device=DEVICE)
    accumulate_importance_(total, gradient.to(DEVICE), "sum", backend="triton")
    assert total.tolist() == [torch.tensor(2.0**10 + 40_000 * 2.0**-20).item()] * 2


@pytest.mark.parametrize("size", [0, 1, 1000, 20_000, 50_001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dot(dtype: torch.dtype, size: int) -> None:
    gradient, delta = random((size,), dtype, 1), random((size,), torch.float32, 2)
    found = importance_dot(gradient.to(DEVICE), delta.to(DEVICE), backend="triton")
    expected = importance_dot(gradient, delta, backend="reference")
    assert (found.dtype, found.shape) == (torch.float32, expected.shape)
    torch.testing.assert_close(found.cpu(), expected, rtol=1.2e-7, atol=0)


def test_products_are_rounded_before_they_are_added() -> None:
    factor = torch.tensor([1 + 2.0**-13, -1.0])
    found = importance_dot(factor.to(DEVICE), torch.tensor([1 + 2.0**-13, 1.0]).to(DEVICE), backend="triton")
    assert found.item() == 2.0**-12  # 2^-26 is rounded away


def test_strides() -> None:
    gradient, delta = random((60, 50), torch.float32, 1), random((50, 60), torch.float32, 2).t()
    total = torch.zeros(60, device=DEVICE)
    accumulate_importance_(total, gradient.to(DEVICE), "product", delta.to(DEVICE), backend="triton")
    dense = torch.zeros(60, device=DEVICE)
    accumulate_importance_(dense, gradient.to(DEVICE), "product", delta.contiguous().to(DEVICE), backend="triton")
    assert torch.equal(total, dense)
    assert importance_dot(gradient.t().to(DEVICE), delta.t().to(DEVICE), backend="triton").isfinite()


def test_sums_do_not_depend_on_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    gradient, delta = (random((7, 5000), torch.float32, seed).to(DEVICE) for seed in (1, 2))
    first, second = (importance_dot(gradient, delta, backend="triton") for _ in range(2))
    assert torch.equal(first, second)


def test_launches() -> None:
    gradient, total = torch.ones(3, 20_000, device=DEVICE), torch.zeros(3, device=DEVICE)
    entries, rows = "accumulate_importance_kernel", "sum_terms_kernel"

    def names(total: Tensor, gradient: Tensor) -> list[str]:
        return [name for name, _ in launched(lambda: accumulate_importance_(total, gradient, "sum", backend="triton"))]

    assert names(torch.zeros(3, 20_000, device=DEVICE), gradient) == [entries]
    assert names(total, gradient[:, : kernels._PART_COLUMNS]) == [rows]
    assert names(total, gradient) == [rows, rows]
    assert names(torch.zeros(0, device=DEVICE), torch.ones(0, 4, device=DEVICE)) == []


@pytest.mark.parametrize("shape", [*SHAPES, (3, 40_000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_dot_product_with_a_difference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gradient, saved = random(shape, torch.bfloat16, 1), random(shape, dtype, 2)
    weight = (saved.float() * 1.01 + 1e-3).to(dtype)
    found = probe_dot(*(tensor.to(DEVICE) for tensor in (gradient, weight, saved)), backend="triton")
    expected = probe_dot(gradient, weight, saved, backend="reference")
    torch.testing.assert_close(found.cpu(), expected, rtol=1.2e-7, atol=1e-10)


def test_the_dot_product_with_a_difference_of_any_strides() -> None:
    gradient, weight = random((30, 40), torch.float32, 1).t(), random((80, 30), torch.bfloat16, 2)[::2]
    saved = random((40, 30), torch.bfloat16, 3)
    found = probe_dot(gradient.to(DEVICE), weight.to(DEVICE), saved.to(DEVICE), backend="triton")
    expected = probe_dot(gradient, weight, saved, backend="reference")
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6)
