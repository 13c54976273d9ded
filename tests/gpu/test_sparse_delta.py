"""The product with a sparse delta on the device, forward and backward, against the dense form in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from gpu_cases import DEVICE, DTYPES, assert_close, launched
from torch import Tensor

from peftkern.backends import registry
from peftkern.backends.triton import launch
from peftkern.backends.triton import sparse_delta as kernels
from peftkern.formats import SparseIndices

PRODUCT, COPY, SUM = "sparse_product_kernel", "transpose_kernel", "sum_parts_kernel"


@pytest.fixture(params=[True, False], ids=["copied", "direct"])
def copied(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Everything is gathered from a copy, or from where it stands."""
    monkeypatch.setattr(kernels, "is_copied", lambda *_shape: request.param)
    yield request.param


@dataclasses.dataclass
class Delta:
    """Everything that the operations take. y and dX are there before: the delta's part is added."""

    indices: SparseIndices
    values: Tensor
    x: Tensor
    grad: Tensor
    y: Tensor
    grad_x: Tensor
    scaling: float = 2.5

    def run(self, need_x: bool = True, need_values: bool = True) -> dict[str, Tensor]:
        """What was asked for, by name, from the Triton backend; y and dX of this object stay as they are."""
        y, grad_x = self.y.clone(), self.grad_x.clone() if need_x else None
        fixed = (self.values, self.indices, self.scaling)
        registry.run("sparse_delta", y, self.x, *fixed, backend="triton")
        x = self.x if need_values else None
        backward = (self.grad, x, grad_x, *fixed, need_values)
        gradient = registry.run("sparse_delta_backward", *backward, backend="triton")
        results = {"y": y, "x": grad_x, "values": gradient}
        return {name: result for name, result in results.items() if result is not None}

    def truth(self) -> dict[str, Tensor]:
        """The dense form in float64."""
        x, grad = self.x.double(), self.grad.double()
        dense = self.scaling * self.indices.to_dense(self.values.double())
        gradient = self.scaling * self.indices.gather(grad.t() @ x)
        return {"y": self.y.double() + x @ dense.t(), "x": self.grad_x.double() + grad @ dense, "values": gradient}


def make(mask: Tensor, tokens: int, dtype: torch.dtype, results: torch.dtype | None = None, seed: int = 0) -> Delta:
    """A delta whose entries are where ``mask`` is true."""
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = mask.shape

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

    indices = SparseIndices.from_mask(mask).to(DEVICE)
    return Delta(
        indices,
        random(len(indices), dtype=torch.float32),
        random(tokens, in_features),
        random(tokens, out_features),
        random(tokens, out_features, dtype=results or dtype),
        random(tokens, in_features, dtype=results or dtype),
    )


def random_mask(out_features: int, in_features: int, density: float, seed: int = 0) -> Tensor:
    return torch.rand(out_features, in_features, generator=torch.Generator().manual_seed(seed)) < density


def uneven_mask() -> Tensor:
    """A full row and a full column among empty ones, the corners, and a few more."""
    mask = torch.zeros(50, 75, dtype=torch.bool)
    mask[3] = True
    mask[:, 70] = True
    mask[0, 0] = mask[49, 74] = mask[20, 5] = mask[21, 5] = True
    return mask


# ---- results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "out_features", "in_features"),
    [(1, 16, 32), (16, 15, 17), (70, 48, 64), (131, 33, 50)],
    ids=str,
)
def test_agrees_with_the_dense_form(
    copied: bool, tokens: int, out_features: int, in_features: int, dtype: torch.dtype
) -> None:
    delta = make(random_mask(out_features, in_features, 0.2), tokens, dtype)
    assert_close(delta.run(), delta.truth(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_very_uneven_rows_and_columns(copied: bool, dtype: torch.dtype) -> None:
    delta = make(uneven_mask(), 40, dtype)
    assert_close(delta.run(), delta.truth(), dtype)


@pytest.mark.parametrize("seed", range(6))
def test_any_index_set(copied: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features, tokens = (int(torch.randint(1, 41, (), generator=generator)) for _ in range(3))
    mask = random_mask(out_features, in_features, (0.02, 0.5, 1.0)[seed % 3], seed)
    mask[-1, seed % in_features] = True
    delta = make(mask, tokens, torch.float32, seed=seed)
    assert_close(delta.run(), delta.truth(), torch.float32)


@pytest.mark.parametrize("values", [torch.bfloat16, torch.float16], ids=str)
def test_values_of_16_bits(copied: bool, values: torch.dtype) -> None:
    delta = make(random_mask(40, 30, 0.3), 20, torch.bfloat16)
    delta.values = delta.values.to(values)
    results = delta.run()
    assert results["values"].dtype == values
    assert_close(results, delta.truth(), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_results_of_16_bit_activations_are_sums_in_float32(copied: bool, dtype: torch.dtype) -> None:
    delta = make(random_mask(40, 30, 0.3), 140, dtype, results=torch.float32)
    assert_close(delta.run(), delta.truth(), torch.float32)


def test_x_and_its_gradient_may_differ_in_dtype_from_the_incoming_one(copied: bool) -> None:
    delta = make(random_mask(40, 30, 0.3), 20, torch.bfloat16, results=torch.float32)
    delta.grad = delta.grad.float() + 1e-3
    assert_close(delta.run(), delta.truth(), torch.float32)


def test_values_below_the_range_of_float16_count(copied: bool) -> None:
    delta = make(random_mask(32, 32, 0.3), 20, torch.float16, results=torch.float32)
    delta.values *= 1e-9
    delta.y.zero_()
    delta.grad_x.zero_()
    assert_close(delta.run(), delta.truth(), torch.float32)


def test_tf32_where_pytorch_admits_it(copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    delta = make(random_mask(40, 30, 0.3), 20, torch.float32)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    with launch.recording(keep_calls=True) as launches:
        results = delta.run()
    calls = [entry.call for entry in launches if entry.kernel == PRODUCT and entry.call is not None]
    assert [call.constants["PRECISION"] for call in calls] == ["tf32", "tf32"]
    assert_close(results, delta.truth(), torch.float16)  # as many bits


def test_strides(copied: bool) -> None:
    delta = make(random_mask(33, 50, 0.2), 70, torch.bfloat16)
    plain = delta.run()
    delta.x = delta.x.t().contiguous().t()
    delta.grad = torch.stack([delta.grad, delta.grad], 2)[:, :, 1]
    delta.values = torch.stack([delta.values, delta.values], 1)[:, 0]
    strided = delta.run()
    assert all(torch.equal(strided[name], plain[name]) for name in plain)


def test_what_lies_beside_the_results_is_left_alone(copied: bool) -> None:
    delta = make(random_mask(33, 50, 0.2), 20, torch.float32)
    expected = delta.run()["y"]
    memory = torch.full((22, 40), 7.0, device=DEVICE)
    memory[1:21, 3:36] = delta.y
    registry.run(
        "sparse_delta", memory[1:21, 3:36], delta.x, delta.values, delta.indices, delta.scaling, backend="triton"
    )
    assert torch.equal(memory[1:21, 3:36], expected)
    memory[1:21, 3:36] = 7.0
    assert bool((memory == 7.0).all())


def test_equal_from_run_to_run(copied: bool) -> None:
    delta = make(uneven_mask(), 140, torch.bfloat16)
    first, second = delta.run(), delta.run()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- what is asked for


@pytest.mark.parametrize(("need_x", "need_values"), [(True, False), (False, True), (False, False)])
def test_only_what_is_needed_is_computed(copied: bool, need_x: bool, need_values: bool) -> None:
    delta = make(random_mask(33, 50, 0.2), 70, torch.float32)
    needed = {"y", *(["x"] if need_x else []), *(["values"] if need_values else [])}
    truth = {name: result for name, result in delta.truth().items() if name in needed}
    assert_close(delta.run(need_x, need_values), truth, torch.float32)


@pytest.mark.parametrize("tokens", [0, 5])
def test_no_entry_and_no_token(copied: bool, tokens: int) -> None:
    delta = make(torch.zeros(20, 30, dtype=torch.bool) if tokens else random_mask(20, 30, 0.2), tokens, torch.float32)
    results = delta.run()
    assert torch.equal(results["y"], delta.y)
    assert torch.equal(results["x"], delta.grad_x)
    assert torch.equal(results["values"], torch.zeros_like(delta.values))
    assert launched(delta.run) == []


# ---- launches


def names(delta: Delta, **needs: bool) -> list[str]:
    return [name for name, _ in launched(lambda: delta.run(**needs))]


def test_both_gradients_take_one_copy_and_one_pass_over_the_incoming_one(copied: bool) -> None:
    copy = [COPY] if copied else []
    delta = make(random_mask(33, 50, 0.2), 20, torch.bfloat16)
    assert names(delta) == [*copy, PRODUCT, *copy, PRODUCT]
    longer = make(random_mask(33, 50, 0.2), 140, torch.bfloat16)
    assert names(longer) == [*copy, PRODUCT, *copy, PRODUCT, SUM]
    assert names(longer, need_values=False) == [*copy, PRODUCT, *copy, PRODUCT]


def test_many_tokens_are_copied_slice_by_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "is_copied", lambda *_shape: True)
    delta = make(random_mask(33, 50, 0.2), 300, torch.bfloat16)
    whole = delta.run()
    monkeypatch.setattr(kernels, "_MOST_COPIED_TOKENS", 128)
    assert names(delta) == [*[COPY, PRODUCT] * 6, SUM]
    sliced = delta.run()
    assert all(torch.equal(sliced[name], whole[name]) for name in whole)
