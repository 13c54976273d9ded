"""sparse_delta_linear against the dense form in float64, on every backend and instruction set of this machine."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from isa_backends import ISA_BACKENDS, select
from lora_problem import TOLERANCE, relative_error
from torch import Tensor

from peftkern import ops
from peftkern.backends import registry
from peftkern.formats import QuantizedTensor, SparseIndices

DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]


@pytest.fixture(params=ISA_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return select(request.param, monkeypatch)


@dataclasses.dataclass
class Problem:
    """Inputs of one call, and the gradient that comes back."""

    x: Tensor
    weight: Tensor | QuantizedTensor
    values: list[Tensor]
    indices: list[SparseIndices]
    scaling: list[float]
    lora_A: list[Tensor]
    lora_B: list[Tensor]
    bias: Tensor
    grad: Tensor

    def run(self, backend: str | None) -> dict[str, Tensor]:
        x, bias, values, lora_A, lora_B = (_leaves(t) for t in (self.x, self.bias, *self._lists()))
        lora = (lora_A, lora_B) if lora_A else (None, None)
        y = ops.sparse_delta_linear(
            x, self.weight, values, self.indices, self.scaling, *lora, 0.5, bias, backend=backend
        )
        assert y.dtype == x.dtype
        y.backward(self.grad)
        named = {"x": x, "bias": bias}
        for name, tensors in (("values", values), ("A", lora_A), ("B", lora_B)):
            named |= {f"{name}{i}": tensor for i, tensor in enumerate(tensors)}
        assert all(tensor.grad.dtype == tensor.dtype for tensor in named.values())
        return {"y": y.detach()} | {name: tensor.grad for name, tensor in named.items()}

    def _lists(self) -> tuple[list[Tensor], ...]:
        return self.values, self.lora_A, self.lora_B

    def truth(self) -> dict[str, Tensor]:
        """By dense products, and the dense gradient of the weight gathered at the entries; in float64."""
        weight = self.weight if isinstance(self.weight, Tensor) else ops.dequantize(self.weight)
        x, bias, values, lora_A, lora_B = (_leaves(_double(t)) for t in (self.x, self.bias, *self._lists()))
        dense = [index.to_dense(value) for value, index in zip(values, self.indices, strict=True)]
        total = weight.double() + sum(s * matrix for s, matrix in zip(self.scaling, dense, strict=True))
        total = total + sum(0.5 * b @ a for a, b in zip(lora_A, lora_B, strict=True))
        y = x @ total.t() + bias
        leaves = {"x": x, "bias": bias}
        for name, tensors in (("values", values), ("A", lora_A), ("B", lora_B)):
            leaves |= {f"{name}{i}": tensor for i, tensor in enumerate(tensors)}
        gradients = torch.autograd.grad(y, list(leaves.values()), self.grad.double())
        return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))


def _leaves(value: Any) -> Any:
    if isinstance(value, list):
        return [_leaves(tensor) for tensor in value]
    return value.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def _double(value: Any) -> Any:
    return [tensor.double() for tensor in value] if isinstance(value, list) else value.double()


def random_indices(out_features: int, in_features: int, density: float, seed: int = 0) -> SparseIndices:
    generator = torch.Generator().manual_seed(seed)
    return SparseIndices.from_mask(torch.rand(out_features, in_features, generator=generator) < density)


def make_problem(
    shape: tuple[int, int, int],
    density: float = 0.1,
    deltas: int = 1,
    dtype: torch.dtype = torch.float32,
    values_dtype: torch.dtype = torch.float32,
    weight: str = "dense",
    rank: int = 0,
    seed: int = 0,
) -> Problem:
    """Random inputs; ``shape`` is tokens, in, out."""
    tokens, in_features, out_features = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    dense = randn(out_features, in_features) * 0.05
    indices = [random_indices(out_features, in_features, density, seed + i) for i in range(deltas)]
    return Problem(
        x=randn(tokens, in_features, dtype=dtype),
        weight=dense.to(dtype) if weight == "dense" else ops.quantize(dense, weight, backend="reference"),
        values=[randn(len(index), dtype=values_dtype) for index in indices],
        indices=indices,
        scaling=[0.5 + i for i in range(deltas)],
        lora_A=[randn(rank, in_features)] if rank else [],
        lora_B=[randn(out_features, rank) * 0.1] if rank else [],
        bias=randn(out_features),
        grad=randn(tokens, out_features, dtype=dtype),
    )


def assert_agrees(problem: Problem, backend: str | None, factor: float = 1.0) -> None:
    truth, results = problem.truth(), problem.run(backend)
    assert results.keys() == truth.keys()
    errors = {name: relative_error(results[name], truth[name]) for name in truth}
    tolerance = factor * TOLERANCE[problem.x.dtype]
    assert all(error <= tolerance for error in errors.values()), errors


SHAPES = [  # tokens, in, out
    (1, 64, 48),
    (3, 1, 1),
    (5, 63, 17),
    (16, 32, 16),
    (37, 192, 130),
    (65, 70, 257),
    (130, 300, 40),
    (200, 33, 100),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64(backend: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        for density in (0.02, 0.3):
            assert_agrees(make_problem(shape, density, dtype=dtype), backend)


@pytest.mark.parametrize("weight", ["dense", "nf4", "int8"])
@pytest.mark.parametrize("values_dtype", DTYPES)
def test_several_deltas_beside_an_adapter(backend: str, weight: str, values_dtype: torch.dtype) -> None:
    problem = make_problem((37, 128, 96), 0.05, deltas=3, weight=weight, rank=4, values_dtype=values_dtype)
    truth, results = problem.truth(), problem.run(backend)
    for name in truth:
        tolerance = TOLERANCE[values_dtype] if name.startswith("values") else TOLERANCE[torch.float32]
        assert relative_error(results[name], truth[name]) <= tolerance, name


@pytest.mark.parametrize("values_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_dtypes(backend: str, dtype: torch.dtype, values_dtype: torch.dtype) -> None:
    problem = make_problem((33, 70, 50), dtype=dtype, values_dtype=values_dtype)
    truth, results = problem.truth(), problem.run(backend)
    tolerance = max(TOLERANCE[dtype], TOLERANCE[values_dtype])
    assert all(relative_error(results[name], truth[name]) <= tolerance for name in truth)


def test_float64_to_its_own_accuracy() -> None:
    problem = make_problem((9, 40, 30), dtype=torch.float64, values_dtype=torch.float64, rank=2)
    problem.lora_A, problem.lora_B, problem.bias = (
        _double(problem.lora_A),
        _double(problem.lora_B),
        problem.bias.double(),
    )
    truth, results = problem.truth(), problem.run(None)
    assert all(relative_error(results[name], truth[name]) < 1e-14 for name in truth)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(0, 150), st.integers(0, 90), st.integers(0, 90)),
    density=st.sampled_from([0.0, 0.01, 0.1, 0.6, 1.0]),
    deltas=st.integers(0, 3),
    rank=st.sampled_from([0, 3]),
    seed=st.integers(0, 1000),
)
def test_any_size_and_density(shape: tuple[int, int, int], density: float, deltas: int, rank: int, seed: int) -> None:
    problem = make_problem(shape, density, deltas, rank=rank, seed=seed)
    assert_agrees(problem, None, factor=4.0)  # short sums may cancel


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(1, 40),
    flat=st.sets(st.integers(0, 20 * 30 - 1)),
    rows=st.sets(st.integers(0, 19)),
    columns=st.sets(st.integers(0, 29)),
)
def test_any_index_set(backend: str, tokens: int, flat: set[int], rows: set[int], columns: set[int]) -> None:
    """Empty rows and columns, full ones, and everything between."""
    mask = torch.zeros(600, dtype=torch.bool)
    mask[torch.tensor(sorted(flat), dtype=torch.int64)] = True
    mask = mask.view(20, 30)
    mask[torch.tensor(sorted(rows), dtype=torch.int64)] = False
    mask[:, torch.tensor(sorted(columns), dtype=torch.int64)] = True
    problem = make_problem((tokens, 30, 20), 0.0)
    problem.indices = [SparseIndices.from_mask(mask)]
    problem.values = [torch.linspace(1, 2, len(problem.indices[0]))]
    assert_agrees(problem, backend, factor=4.0)


def test_by_hand(backend: str) -> None:
    """S = [[0, 2, 0], [0, 0, 0], [-1, 0, 3]], scaling 10, over a weight of ones."""
    indices = SparseIndices.from_flat(torch.tensor([1, 6, 8]), (3, 3))
    values = torch.tensor([2.0, -1.0, 3.0], requires_grad=True)
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], requires_grad=True)
    y = ops.sparse_delta_linear(x, torch.ones(3, 3), values, indices, 10.0, backend=backend)
    assert y.tolist() == [[6 + 40, 6, 6 + 80], [15 + 100, 15, 15 + 140]]
    y.backward(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]]))
    assert x.grad is not None and values.grad is not None
    assert x.grad.tolist() == [[3 - 20, 3 + 20, 3 + 60], [0 + 10, 0, 0 - 30]]
    assert values.grad.tolist() == [10 * 2, 10 * (2 - 4), 10 * (6 - 6)]


# ---- nothing of the size of the weight


def test_disabled_or_empty_gives_the_bits_of_lora_linear(backend: str) -> None:
    problem = make_problem((37, 96, 80), 0.0, rank=3)
    base = ops.lora_linear(
        problem.x, problem.weight, problem.lora_A, problem.lora_B, 0.5, problem.bias, backend=backend
    )
    lora = (problem.lora_A, problem.lora_B, 0.5, problem.bias)
    empty = SparseIndices.empty((80, 96))
    for values, indices in (([], []), (torch.empty(0), empty), ([torch.empty(0)] * 2, [empty] * 2)):
        y = ops.sparse_delta_linear(problem.x, problem.weight, values, indices, 1.0, *lora, backend=backend)
        assert torch.equal(y, base)
        added = ops.add_sparse_delta(base, problem.x, values, indices, backend=backend)
        assert torch.equal(added, base) and added.data_ptr() != base.data_ptr()


def test_rows_without_an_entry_keep_their_bits(backend: str) -> None:
    problem = make_problem((37, 96, 80), 0.0, dtype=torch.bfloat16)
    indices = SparseIndices.from_flat(torch.tensor([5 * 96 + 7, 5 * 96 + 9, 60 * 96]), (80, 96))
    base = ops.lora_linear(problem.x, problem.weight, backend=backend)
    y = ops.sparse_delta_linear(problem.x, problem.weight, torch.ones(3), indices, backend=backend)
    changed = (y != base).any(0).nonzero().flatten().tolist()
    assert changed == [5, 60]


def test_what_is_not_finite_reaches_only_its_own_rows(backend: str) -> None:
    """A dense S would spread 0 * inf = NaN over every output of the token."""
    x = torch.zeros(20, 8)
    x[3, 2] = math.inf
    indices = SparseIndices.from_flat(torch.tensor([1, 8 + 2]), (4, 8))
    y = ops.add_sparse_delta(torch.zeros(20, 4), x, torch.ones(2), indices, backend=backend)
    assert y[3, 1] == math.inf and y.isfinite().sum() == y.numel() - 1


def allocations(function: Any) -> list[int]:
    """The size in bytes of every block of memory that PyTorch allocates in a call."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    events, sizes = list(profile.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.name == "[memory]":
            sizes.append(event.extra_fields.alloc_size)
    return [size for size in sizes if size > 0]


def test_nothing_of_the_size_of_the_weight_is_allocated(backend: str) -> None:
    tokens, features = 8, 1024
    problem = make_problem((tokens, features, features), 0.001)
    largest = 2 * tokens * features * 4

    def forward_and_backward() -> None:
        problem.run(backend)

    forward_and_backward()
    assert max(allocations(lambda: torch.empty(features, features))) == features * features * 4
    assert 0 < max(allocations(forward_and_backward)) <= largest < features * features * 4


@pytest.mark.parametrize("wanted", ["x", "values", "A", "B"])
def test_backward_keeps_x_once_and_no_copy(wanted: str) -> None:
    problem = make_problem((64, 128, 96), deltas=2, rank=4)
    x, values, lora_A = problem.x, problem.values, problem.lora_A
    {"x": x, "values": values[0], "A": lora_A[0], "B": problem.lora_B[0]}[wanted].requires_grad_()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora = (lora_A, problem.lora_B)
        ops.sparse_delta_linear(x, problem.weight, values, problem.indices, 1.0, *lora)
    assert [tensor.data_ptr() for tensor in saved].count(x.data_ptr()) == (1 if wanted in ("values", "A") else 0)
    known = {tensor.data_ptr() for tensor in (x, *values, *lora_A, *problem.lora_B)}
    inner = 64 * 4 * 4 if wanted == "B" else 0  # h
    assert sum(tensor.nbytes for tensor in saved if tensor.data_ptr() not in known) == inner


# ---- layouts


def _layouts(tensor: Tensor) -> list[Tensor]:
    wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] * 2, dtype=tensor.dtype)
    wide[..., ::2] = tensor
    rows = torch.zeros(tensor.shape[0], tensor.shape[1] + 3, dtype=tensor.dtype)
    rows[:, : tensor.shape[1]] = tensor
    return [wide[..., ::2], rows[:, : tensor.shape[1]], tensor.t().contiguous().t()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_that_are_not_contiguous(backend: str, dtype: torch.dtype) -> None:
    problem = make_problem((21, 70, 50), dtype=dtype)
    for x, grad in zip(_layouts(problem.x), reversed(_layouts(problem.grad)), strict=True):
        assert_agrees(dataclasses.replace(problem, x=x, grad=grad), backend)
    for values in (torch.stack([problem.values[0]] * 2, 1)[:, 0], problem.values[0][:1].expand(len(problem.values[0]))):
        assert_agrees(dataclasses.replace(problem, values=[values]), backend)


def test_gradient_that_is_broadcast(backend: str) -> None:
    assert_agrees(dataclasses.replace(make_problem((21, 70, 50)), grad=torch.ones(1, 1).expand(21, 50)), backend)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 5), (0,), (3, 0, 2)], ids=str)
def test_any_leading_dimensions(backend: str, leading: tuple[int, ...]) -> None:
    problem = make_problem((1, 70, 50))
    x, values = torch.randn(*leading, 70, requires_grad=True), problem.values[0].requires_grad_()
    y = ops.sparse_delta_linear(x, problem.weight, values, problem.indices[0], backend=backend)
    assert y.shape == (*leading, 50)
    y.sum().backward()
    assert x.grad is not None and values.grad is not None and x.grad.shape == x.shape
    problem.x, problem.grad = x.detach().reshape(-1, 70), torch.ones(x.shape[:-1].numel(), 50)
    problem.bias, problem.scaling = torch.zeros(50), [1.0]
    truth = problem.truth()
    assert relative_error(y.detach().reshape(-1, 50), truth["y"]) < 5e-6
    assert relative_error(values.grad, truth["values0"]) < 5e-6


@pytest.mark.parametrize("operand", ["x", "values"])
def test_a_lazily_negated_operand(backend: str, operand: str) -> None:
    problem = make_problem((21, 70, 50))
    arguments = {"x": problem.x, "values": problem.values[0]}
    rest = {"weight": problem.weight, "indices": problem.indices[0], "backend": backend}
    expected = ops.sparse_delta_linear(**(arguments | {operand: -arguments[operand]}), **rest)
    negated = ops.sparse_delta_linear(**(arguments | {operand: torch._neg_view(arguments[operand])}), **rest)
    assert torch.equal(negated, expected)


def test_a_lazily_negated_gradient(backend: str) -> None:
    problem = make_problem((21, 70, 50))
    expected = dataclasses.replace(problem, grad=-problem.grad).run(backend)
    results = dataclasses.replace(problem, grad=torch._neg_view(problem.grad)).run(backend)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


# ---- add_sparse_delta


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_added_to_a_product_of_another_dtype(backend: str, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    problem = make_problem((33, 70, 50))
    y, x = torch.randn(33, 50).to(dtype).requires_grad_(), problem.x.to(x_dtype).requires_grad_()
    values, dense = problem.values[0].requires_grad_(), problem.indices[0].to_dense(problem.values[0].double())
    out = ops.add_sparse_delta(y, x, values, problem.indices[0], 0.5, backend=backend)
    gradients = torch.autograd.grad(out, (y, x, values), problem.grad.to(dtype))
    expected = y.double() + 0.5 * x.double() @ dense.t()
    truth = torch.autograd.grad(expected, (y, x, values), problem.grad.to(dtype).double())
    assert out.dtype == dtype and [g.dtype for g in gradients] == [dtype, x_dtype, torch.float32]
    assert relative_error(out.detach(), expected.detach()) <= TOLERANCE[dtype]
    for gradient, exact, tolerance in zip(gradients, truth, (0.0, TOLERANCE[x_dtype], 5e-6), strict=True):
        assert relative_error(gradient, exact.double()) <= tolerance


def test_add_equals_the_one_operation_and_writes_no_input(backend: str) -> None:
    problem = make_problem((33, 70, 50), deltas=2)
    base = ops.lora_linear(problem.x, problem.weight, bias=problem.bias, backend=backend)
    kept = [tensor.clone() for tensor in (base, problem.x, *problem.values)]
    delta = (problem.values, problem.indices, problem.scaling)
    out = ops.add_sparse_delta(base, problem.x, *delta, backend=backend)
    expected = ops.sparse_delta_linear(problem.x, problem.weight, *delta, bias=problem.bias, backend=backend)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(kept, (base, problem.x, *problem.values), strict=True))


# ---- gradients


@pytest.mark.parametrize("wanted", ["x", "values0", "values1", "A0", "bias", "none"])
@pytest.mark.parametrize("compiled", [False, True])
def test_only_what_asks_gets_a_gradient(backend: str, wanted: str, compiled: bool) -> None:
    problem = make_problem((21, 70, 50), deltas=2, rank=3)
    expected = problem.run(backend)
    leaves = {"x": problem.x, "A0": problem.lora_A[0], "bias": problem.bias}
    leaves |= {f"values{i}": values for i, values in enumerate(problem.values)}
    if wanted != "none":
        leaves[wanted].requires_grad_()
    delta = (problem.values, problem.indices, problem.scaling, problem.lora_A, problem.lora_B, 0.5, problem.bias)
    call = compiled_anew() if compiled else ops.sparse_delta_linear
    y = call(problem.x, problem.weight, *delta, backend=backend)
    assert y.requires_grad == (wanted != "none")
    if wanted != "none":
        y.backward(problem.grad)
        assert relative_error(leaves[wanted].grad, expected[wanted].double()) <= (5e-7 if compiled else 0.0)
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != wanted)


def test_gradcheck() -> None:
    problem = make_problem((4, 6, 5), 0.4, deltas=2, dtype=torch.float64, rank=2)
    leaves = [_leaves(_double(t)) for t in (problem.x, *problem.values, *problem.lora_A, *problem.lora_B, problem.bias)]

    def call(x: Tensor, v0: Tensor, v1: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor) -> Tensor:
        delta = ([v0, v1], problem.indices, problem.scaling)
        return ops.sparse_delta_linear(x, problem.weight, *delta, lora_A, lora_B, 2.0, bias)

    def add(y: Tensor, x: Tensor, v0: Tensor, v1: Tensor) -> Tensor:
        return ops.add_sparse_delta(y, x, [v0, v1], problem.indices, problem.scaling)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradcheck(add, (torch.randn(4, 5, dtype=torch.float64, requires_grad=True), *leaves[:3]))


def test_backward_twice_over_the_same_graph(backend: str) -> None:
    problem = make_problem((21, 70, 50))
    x, values = problem.x.requires_grad_(), problem.values[0].requires_grad_()
    y = ops.sparse_delta_linear(x, problem.weight, values, problem.indices[0], backend=backend)
    kept = [tensor.detach().clone() for tensor in (x, values, problem.grad)]
    first = torch.autograd.grad(y, (x, values), problem.grad, retain_graph=True)
    second = torch.autograd.grad(y, (x, values), problem.grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, values, problem.grad), strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(backend: str, use_reentrant: bool) -> None:
    problem = make_problem((21, 70, 50))
    expected = problem.run(backend)
    x, values = problem.x.requires_grad_(), problem.values[0].requires_grad_()
    y = torch.utils.checkpoint.checkpoint(
        lambda x: ops.sparse_delta_linear(
            x, problem.weight, values, problem.indices[0], 0.5, bias=problem.bias, backend=backend
        ),
        x,
        use_reentrant=use_reentrant,
    )
    y.backward(problem.grad)
    assert torch.equal(x.grad, expected["x"]) and torch.equal(values.grad, expected["values0"])


@pytest.mark.parametrize("changed", ["weight", "values", "order", "columns"])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_changes_between_forward_and_backward_is_an_error(changed: str, compiled: bool) -> None:
    problem = make_problem((21, 70, 50))
    x, values, indices = problem.x.requires_grad_(), problem.values[0], problem.indices[0]
    call = compiled_anew() if compiled else ops.sparse_delta_linear
    y = call(x, problem.weight, values, indices)
    {"weight": problem.weight, "values": values}.get(changed, getattr(indices, changed, values)).add_(0)
    with pytest.raises(RuntimeError, match=r"modified (in place|by an inplace operation)"):
        y.sum().backward()


# ---- autocast, compile, operators, threads


def compiled_anew() -> Any:
    """The compiled operation; graphs of other tests, which have a limit, are forgotten."""
    torch.compiler.reset()
    return torch.compile(ops.sparse_delta_linear, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    problem = make_problem((21, 70, 50), rank=3)
    x, values = problem.x.requires_grad_(), problem.values[0].requires_grad_()
    with torch.autocast("cpu", dtype):
        delta = (values, problem.indices[0], 0.5)
        y = ops.sparse_delta_linear(x, problem.weight, *delta, problem.lora_A, problem.lora_B, 0.5, backend=backend)
    assert y.dtype == dtype
    y.backward(problem.grad.to(dtype))
    assert x.grad is not None and values.grad is not None
    assert x.grad.dtype == values.grad.dtype == torch.float32
    problem.bias = torch.zeros(50)
    truth = problem.truth()
    for result, name in ((y.detach(), "y"), (x.grad, "x"), (values.grad, "values0")):
        assert relative_error(result, truth[name]) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiles_as_one_graph(backend: str, dtype: torch.dtype) -> None:
    problem = make_problem((21, 70, 50), deltas=2, dtype=dtype, rank=3, weight="nf4")
    expected = problem.run(backend)
    x, values = _leaves(problem.x), _leaves(problem.values)
    delta = (values, problem.indices, problem.scaling, problem.lora_A, problem.lora_B, 0.5, problem.bias)
    y = compiled_anew()(x, problem.weight, *delta, backend=backend)
    y.backward(problem.grad)
    assert torch.equal(y, expected["y"])
    # autograd adds up the parts of dx, each rounded
    assert relative_error(x.grad, expected["x"].double()) <= TOLERANCE[dtype]
    assert all(torch.equal(value.grad, expected[f"values{i}"]) for i, value in enumerate(values))


def test_added_compiles_as_one_graph(backend: str) -> None:
    problem = make_problem((21, 70, 50))
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(y: Tensor, x: Tensor, values: Tensor, indices: SparseIndices) -> Tensor:
        return ops.add_sparse_delta(y * 2.0, x, values, indices, 0.5, backend=backend)

    results = []
    for call in (layer, layer._torchdynamo_orig_callable):
        leaves = _leaves([problem.grad, problem.x, problem.values[0]])
        call(*leaves, problem.indices[0]).backward(problem.grad)
        results.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(compiled, eager) for compiled, eager in zip(*results, strict=True))


@pytest.mark.parametrize(
    "needs", [(True, True, True), (False, True, False), (False, False, True), (True, False, False)]
)
def test_operator_contract(backend: str, needs: tuple[bool, bool, bool]) -> None:
    problem = make_problem((9, 33, 20))
    pairs = zip((problem.grad, problem.x, *problem.values), needs, strict=True)
    tensors = [tensor.clone().requires_grad_(need) for tensor, need in pairs]
    torch.library.opcheck(
        torch.ops.peftkern.sparse_delta.default, (*tensors, *problem.indices[0].tensors(), 0.5, backend)
    )


def test_meta_tensors_have_the_right_shape() -> None:
    indices = random_indices(50, 70, 0.1).to("meta")
    x = torch.empty(2, 3, 70, device="meta", dtype=torch.bfloat16, requires_grad=True)
    values = torch.empty(len(indices), device="meta", requires_grad=True)
    y = ops.sparse_delta_linear(x, torch.empty(50, 70, device="meta", dtype=torch.bfloat16), values, indices)
    assert y.is_meta and y.shape == (2, 3, 50) and y.dtype == x.dtype
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == x.dtype
    assert values.grad is not None and values.grad.shape == values.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_equal_for_any_number_of_threads(backend: str, dtype: torch.dtype) -> None:
    if backend == "reference":
        pytest.skip("PyTorch's products may sum in another order")
    shapes = [((300, 200, 130), 0.002), ((300, 200, 130), 0.2), ((7, 300, 400), 0.3), ((1, 500, 700), 0.3)]
    problems = [make_problem(shape, density, dtype=dtype, weight="nf4") for shape, density in shapes]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = [problem.run(backend) for problem in problems]
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            for problem, single in zip(problems, expected, strict=True):
                results = problem.run(backend)
                assert all(torch.equal(results[name], single[name]) for name in single)
    finally:
        torch.set_num_threads(threads)


def test_gradients_of_many_entries_by_any_number_of_threads(backend: str) -> None:
    """Blocks of tokens share sums where one for each would take more memory than the weight has."""
    generator = torch.Generator().manual_seed(0)
    indices = random_indices(1200, 1000, 0.9)
    x, grad = torch.randn(100, 1000, generator=generator), torch.randn(100, 1200, generator=generator)
    values, results = torch.randn(len(indices), generator=generator), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(
                registry.run("sparse_delta_backward", grad, x, None, values, indices, 0.5, True, backend=backend)
            )
    finally:
        torch.set_num_threads(threads)
    assert relative_error(results[0], 0.5 * indices.gather(grad.double().t() @ x.double())) <= TOLERANCE[torch.float32]
    assert torch.equal(*results)


# ---- checks


def test_bad_arguments_are_named() -> None:
    problem = make_problem((9, 70, 50))
    x, weight, values, indices = problem.x, problem.weight, problem.values[0], problem.indices[0]

    def call(**changed: Any) -> Tensor:
        return ops.sparse_delta_linear(**({"x": x, "weight": weight, "values": values, "indices": indices} | changed))

    with pytest.raises(TypeError, match="indices must be a SparseIndices, got Tensor; use SparseIndices"):
        call(indices=torch.arange(3))
    with pytest.raises(ValueError, match=r"indices must be of a matrix \[out, in\] = \[50, 70\], got \[70, 50\]"):
        call(indices=random_indices(70, 50, 0.1))
    with pytest.raises(ValueError, match=rf"values must be \[entries\] = \[{len(indices)}\], got \[3\]"):
        call(values=values[:3])
    with pytest.raises(TypeError, match=r"values must be float64.*got torch\.int64"):
        call(values=values.long())
    with pytest.raises(TypeError, match="values must be a tensor or a sequence of them, got float"):
        call(values=1.0)
    with pytest.raises(TypeError, match="indices must be a sequence, as values is one"):
        call(values=[values])
    with pytest.raises(ValueError, match="indices must have one entry per delta, 2; got 1"):
        call(values=[values, values], indices=[indices])
    with pytest.raises(ValueError, match="scaling must have one entry per delta, 1; got 2"):
        call(scaling=[1.0, 2.0])
    with pytest.raises(ValueError, match="values is on meta and x on cpu"):
        call(values=values.to("meta"))
    with pytest.raises(ValueError, match="indices is on meta and x on cpu"):
        call(indices=indices.to("meta"))
    with pytest.raises(ValueError, match=r"SparseIndices: order must be"):
        call(indices=dataclasses.replace(indices, order=indices.order[1:]))
    with pytest.raises(ValueError, match=r"same leading dimensions; got \[9, 50\] and \[8, 70\]"):
        ops.add_sparse_delta(problem.grad, x[:8], values, indices)
    with pytest.raises(TypeError, match=r"add_sparse_delta: y must be float64.*got torch\.int64"):
        ops.add_sparse_delta(problem.grad.long(), x, values, indices)
