"""silu_mul against float64, on every backend and every instruction set that this machine runs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from isa_backends import ISA_BACKENDS, select
from same_bits import assert_same_bits, random_tensor
from torch import Tensor

from peftkern import ops
from peftkern.backends import cpu, registry

TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""Relative error ‖out - ref‖ / ‖ref‖ against float64."""
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]
NATIVE_DTYPES = DTYPES[1:]
SHAPES = [(), (1,), (15,), (64,), (65,), (255,), (256,), (257,), (2, 3, 127), (1000,), (5, 4099), (0,), (3, 0, 2)]
LARGER_THAN_A_TASK = (3, 70001)


@pytest.fixture(params=ISA_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return select(request.param, monkeypatch)


def skip_what_the_backend_lacks(backend: str, dtype: torch.dtype) -> None:
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("float64 is the reference's")


Inputs = tuple[Tensor, Tensor, Tensor]
"""gate, up, and the gradient that comes back."""


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Inputs:
    gate, up, grad = (random_tensor(shape, torch.float32, seed) for seed in (1, 2, 3))
    return (gate * scale).to(dtype), up.to(dtype), grad.to(dtype)


def run(inputs: Inputs, backend: str | None) -> Inputs:
    """y and the gradients of gate and up."""
    gate, up = (tensor.detach().requires_grad_() for tensor in inputs[:2])
    y = ops.silu_mul(gate, up, backend=backend)
    y.backward(inputs[2])
    assert gate.grad is not None and up.grad is not None
    return y.detach(), gate.grad, up.grad


def truth(inputs: Inputs) -> Inputs:
    """By PyTorch's own operators and gradients, in float64."""
    gate, up = (tensor.detach().double().requires_grad_() for tensor in inputs[:2])
    y = torch.nn.functional.silu(gate) * up
    return y.detach(), *torch.autograd.grad(y, (gate, up), inputs[2].double())


def relative_error(out: Tensor, reference: Tensor) -> float:
    assert out.shape == reference.shape
    difference, size = (out.double() - reference).norm(), reference.norm()
    return float(difference / size) if size > 0 else float(difference)


def assert_agrees(inputs: Inputs, backend: str) -> None:
    results = run(inputs, backend)
    assert all(result.dtype == inputs[0].dtype and result.is_contiguous() for result in results)
    errors = [relative_error(*pair) for pair in zip(results, truth(inputs), strict=True)]
    assert max(errors) <= TOLERANCE[inputs[0].dtype], errors


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64(backend: str, dtype: torch.dtype) -> None:
    skip_what_the_backend_lacks(backend, dtype)
    for shape in (*SHAPES, LARGER_THAN_A_TASK):
        assert_agrees(make_inputs(shape, dtype), backend)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(elements=st.integers(0, 300), scale=st.sampled_from([1e-30, 1e-3, 1.0, 30.0, 1e4, 1e30]))
def test_any_size_and_magnitude(backend: str, elements: int, scale: float) -> None:
    assert_agrees(make_inputs((elements,), scale=scale), backend)


def test_each_element_is_accurate(backend: str) -> None:
    gate = torch.cat([torch.linspace(-87, 87, 20011), torch.logspace(-37, 2, 4001), -torch.logspace(-37, 1.9, 4001)])
    one = torch.ones_like(gate)
    y, grad_gate, grad_up = run((gate, one, one), backend)
    expected, expected_gate, expected_up = truth((gate, one, one))
    assert torch.allclose(y.double(), expected, rtol=1e-6, atol=0)
    assert torch.allclose(grad_up.double(), expected_up, rtol=1e-6, atol=0)
    assert torch.allclose(grad_gate.double(), expected_gate, rtol=1e-6, atol=2e-7)  # it has a zero at -1.28


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_extreme_values(backend: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, largest, -largest, 88.0, -88.0, -104.0, -1e4]
    gate = torch.tensor(special * 7, dtype=dtype)  # vectors and a tail
    one = torch.ones_like(gate)
    for actual, expected in zip(run((gate, one, one), backend), truth((gate, one, one)), strict=True):
        # below -87 float32's exp leaves the normal numbers: what is left there counts as 0
        assert torch.allclose(actual.double(), expected.to(dtype).double(), rtol=1e-2, atol=1e-35, equal_nan=True)
    up = torch.tensor([math.nan, math.inf, -1.0] * 7, dtype=dtype)
    y = ops.silu_mul(torch.ones_like(up), up, backend=backend)
    assert torch.equal(y.isnan(), up.isnan()) and torch.equal(y.isinf(), up.isinf())


# ---- the other activations

GELUS = {"gelu": "none", "gelu_tanh": "tanh"}
"""By what PyTorch calls them."""


def run_gelu(inputs: Inputs, activation: str, backend: str) -> Inputs:
    gate, up = (tensor.detach().clone().requires_grad_() for tensor in inputs[:2])
    y = ops.silu_mul(gate, up, activation=activation, backend=backend)
    return y.detach(), *torch.autograd.grad(y, (gate, up), inputs[2])


def true_gelu(inputs: Inputs, activation: str) -> Inputs:
    gate, up = (tensor.detach().double().requires_grad_() for tensor in inputs[:2])
    y = torch.nn.functional.gelu(gate, approximate=GELUS[activation]) * up
    return y.detach(), *torch.autograd.grad(y, (gate, up), inputs[2].double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", GELUS)
def test_gelu_agrees_with_float64(backend: str, dtype: torch.dtype, activation: str) -> None:
    skip_what_the_backend_lacks(backend, dtype)
    for shape in ((), (257,), (5, 4099), (0,), LARGER_THAN_A_TASK):
        inputs = make_inputs(shape, dtype)
        results, expected = run_gelu(inputs, activation, backend), true_gelu(inputs, activation)
        assert all(result.dtype == dtype for result in results)
        assert max(map(relative_error, results, expected)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("activation", GELUS)
def test_each_element_of_gelu_is_accurate(backend: str, activation: str) -> None:
    # further down PyTorch's own tanh form cancels in float64 as well
    gate = torch.cat([torch.linspace(-5, 90, 20011), torch.logspace(-37, 2, 4001), -torch.logspace(-37, 0.7, 4001)])
    inputs = (gate, torch.ones_like(gate), torch.ones_like(gate))
    y, grad_gate, grad_up = run_gelu(inputs, activation, backend)
    expected, expected_gate, _ = true_gelu(inputs, activation)
    assert torch.equal(grad_up, y)
    assert torch.allclose(y.double(), expected, rtol=4e-6, atol=1e-37)
    assert torch.allclose(grad_gate.double(), expected_gate, rtol=4e-6, atol=3e-7)  # it has a zero at -0.75


@pytest.mark.parametrize("activation", GELUS)
def test_extreme_values_of_gelu(backend: str, activation: str) -> None:
    gate = torch.tensor([0.0, -0.0, math.inf, math.nan, 3e38, -3e38, 60.0, -60.0, 1e25, -1e25])
    y, grad_gate, _ = run_gelu((gate, torch.ones(10), torch.ones(10)), activation, backend)
    expected = torch.tensor([0.0, 0.0, math.inf, math.nan, 3e38, 0.0, 60.0, 0.0, 1e25, 0.0])
    assert torch.allclose(y, expected, rtol=0.0, atol=0.0, equal_nan=True)
    slopes = torch.tensor([0.5, 0.5, 1.0, 0.0, 1.0, 0.0])
    assert torch.allclose(grad_gate[[0, 1, 4, 5, 6, 7]], slopes, rtol=1e-6, atol=0.0)


# ---- layouts


def layouts(tensor: Tensor) -> list[Tensor]:
    wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] * 2, dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return [wide[..., ::2], tensor.t().contiguous().t(), tensor]


def test_tensors_that_are_not_contiguous(backend: str) -> None:
    inputs = make_inputs((21, 33))
    expected = run(inputs, backend)
    for strided in itertools.product(*(layouts(tensor) for tensor in inputs)):
        results = run(strided, backend)
        assert results[0].is_contiguous()
        for actual, contiguous in zip(results, expected, strict=True):
            assert relative_error(actual, contiguous.double()) <= (0.0 if backend == "cpu" else 5e-7)


def test_gradient_that_is_broadcast(backend: str) -> None:
    gate, up, _ = make_inputs((21, 33))
    assert_agrees((gate, up, torch.ones(1, 1).expand(21, 33)), backend)


# ---- gradients, memory


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("compiled", [False, True])
def test_only_what_asks_gets_a_gradient(backend: str, wanted: tuple[bool, bool], compiled: bool) -> None:
    inputs = make_inputs((9, 70))
    leaves = [t.clone().requires_grad_(need) for t, need in zip(inputs[:2], wanted, strict=True)]

    def call(gate: Tensor, up: Tensor) -> Tensor:
        return ops.silu_mul(gate, up, backend=backend)

    y = (torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call)(*leaves)
    assert y.requires_grad == any(wanted)
    if any(wanted):
        y.backward(inputs[2])
    for leaf, need, expected in zip(leaves, wanted, run(inputs, backend)[1:], strict=True):
        if need:
            assert_same_bits(leaf.grad, expected)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False)])
def test_backward_keeps_gate_and_up_and_nothing_else(backend: str, needs: tuple[bool, bool]) -> None:
    gate, up, _ = make_inputs((16, 64))
    gate.requires_grad_(needs[0])
    up.requires_grad_(needs[1])
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.silu_mul(gate, up, backend=backend)
    assert kept == ([gate.data_ptr(), up.data_ptr()] if needs[0] else [gate.data_ptr()])


def test_gradcheck() -> None:
    gate, up, _ = (tensor.double().requires_grad_() for tensor in make_inputs((3, 5)))
    assert torch.autograd.gradcheck(ops.silu_mul, (gate, up))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(backend: str, use_reentrant: bool) -> None:
    inputs = make_inputs((9, 70))
    gate = inputs[0].clone().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(
        lambda gate: ops.silu_mul(gate, inputs[1], backend=backend), gate, use_reentrant=use_reentrant
    )
    y.backward(inputs[2])
    assert gate.grad is not None
    assert_same_bits(gate.grad, run(inputs, backend)[1])


# ---- compile, operators, threads


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_compiles_as_one_graph(backend: str, dtype: torch.dtype) -> None:
    inputs = make_inputs((9, 70), dtype)

    def layer(gate: Tensor, up: Tensor) -> Tensor:
        return ops.silu_mul(gate * 1.0, up.t().contiguous().t(), backend=backend).relu()

    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs[:2]]
        call(*leaves).backward(inputs[2])
        results.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*results, strict=True):
        assert_same_bits(compiled, eager)


@pytest.mark.parametrize(("transposed", "activation"), [(False, "silu"), (True, "silu"), (False, "gelu")])
def test_operator_contract(backend: str, transposed: bool, activation: str) -> None:
    gate, up, _ = make_inputs((9, 33))
    gate = (gate.t() if transposed else gate).requires_grad_()
    up = (up.t() if transposed else up).requires_grad_()
    torch.library.opcheck(torch.ops.peftkern.silu_mul.default, (gate, up, activation, backend))


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_bit_equal_for_any_number_of_threads(backend: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(LARGER_THAN_A_TASK, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(inputs, "cpu" if backend == "cpu" else None)
        for count in (2, 3):
            torch.set_num_threads(count)
            for actual, single in zip(run(inputs, "cpu" if backend == "cpu" else None), expected, strict=True):
                assert_same_bits(actual, single)
    finally:
        torch.set_num_threads(threads)


# ---- checks


def test_bad_arguments_are_named() -> None:
    gate = torch.zeros(2, 3)
    with pytest.raises(TypeError, match="up must be a tensor, got float"):
        ops.silu_mul(gate, 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"gate must be float64.*got torch\.int64"):
        ops.silu_mul(gate.long(), gate)
    with pytest.raises(TypeError, match=r"dtype of gate, torch\.float32; got torch\.bfloat16"):
        ops.silu_mul(gate, gate.bfloat16())
    with pytest.raises(ValueError, match=r"shape of gate, \[2, 3\]; got \[3\]"):
        ops.silu_mul(gate, gate[0])
    with pytest.raises(ValueError, match="up is on meta and gate on cpu"):
        ops.silu_mul(gate, gate.to("meta"))
    with pytest.raises(ValueError, match=r"up must be dense, got torch\.sparse_coo"):
        ops.silu_mul(gate, gate.to_sparse())


def test_lazily_negated_tensors(backend: str) -> None:
    gate, up, grad = make_inputs((9, 70))
    negated = run((-gate, -up, -grad), backend)
    for lazy, eager in zip(run_lazily_negated(gate, up, grad, backend), negated, strict=True):
        assert_same_bits(lazy, eager)


def run_lazily_negated(gate: Tensor, up: Tensor, grad: Tensor, backend: str) -> Inputs:
    gate, up = torch._neg_view(gate).requires_grad_(), torch._neg_view(up).requires_grad_()
    assert gate.is_neg() and up.is_neg()
    y = ops.silu_mul(gate, up, backend=backend)
    return y.detach(), *torch.autograd.grad(y, (gate, up), torch._neg_view(grad))


def test_meta_tensors_have_the_right_shape() -> None:
    gate = torch.empty(2, 3, device="meta", dtype=torch.bfloat16)
    y = ops.silu_mul(gate, gate)
    assert y.is_meta and y.shape == gate.shape and y.dtype == gate.dtype


@pytest.mark.skipif(not cpu.available(), reason="needs the native module")
def test_a_forced_backend_that_cannot_run_raises() -> None:
    gate = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(registry.BackendError, match=r"silu_mul: backend 'cpu' was forced.*torch\.float64"):
        ops.silu_mul(gate, gate, backend="cpu")
