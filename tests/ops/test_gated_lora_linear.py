"""gated_lora_linear equals silu_mul and lora_linear one after the other, on every backend, and keeps less."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from isa_backends import ISA_BACKENDS, select
from lora_problem import TOLERANCE, Problem, make_problem, relative_error
from torch import Tensor

from peftkern import ops

DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]


@pytest.fixture(params=ISA_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return select(request.param, monkeypatch)


def _in_one(gate: Tensor, up: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return ops.gated_lora_linear(gate, up, *arguments, **options)


def _in_two(gate: Tensor, up: Tensor, *arguments: Any, **options: Any) -> Tensor:
    x = ops.silu_mul(gate, up, backend=options.get("backend"))
    return ops.lora_linear(x, *arguments, **options)


def run(
    problem: Problem, call: Callable[..., Tensor], backend: str | None, frozen: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The result and every gradient, by name; what is ``frozen`` asks for none. x is the gate, 1 - x the other half."""
    torch.manual_seed(5)
    leaves = {"gate": problem.x, "up": 1 - problem.x, "A": problem.lora_A[0], "B": problem.lora_B[0]}
    if problem.bias is not None:
        leaves["bias"] = problem.bias
    leaves = {name: leaf.detach().clone().requires_grad_(name not in frozen) for name, leaf in leaves.items()}
    gate, up, lora_A, lora_B, *bias = leaves.values()
    arguments = (problem.weight, [lora_A], [lora_B], problem.scaling, *(bias or [None]), problem.dropout_p)
    y = call(gate, up, *arguments, backend=backend)
    y.backward(problem.grad)
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert gradients.keys() == leaves.keys() - set(frozen)
    return {"y": y.detach(), **gradients}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", ["nf4", "int8", "dense"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_bits_of_the_two_operations(weight: str, dtype: torch.dtype, dropout_p: float, backend: str) -> None:
    problem = make_problem(19, 128, 65, [8], weight, dtype, dropout_p)
    two, one = run(problem, _in_two, backend), run(problem, _in_one, backend)
    assert one.keys() == two.keys()
    for name, value in two.items():
        assert torch.equal(one[name], value), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64(dtype: torch.dtype, backend: str) -> None:
    problem = make_problem(19, 128, 65, [8], "nf4", dtype)
    results, truth = run(problem, _in_one, backend), run(problem.double(), _in_two, "reference")
    for name, value in truth.items():
        assert relative_error(results[name], value) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("frozen", [("gate",), ("up",), ("gate", "up"), ("A",), ("B",), ("A", "B"), ("bias",)], ids=str)
def test_only_what_asks_for_a_gradient_gets_one(frozen: tuple[str, ...], backend: str) -> None:
    problem = make_problem(7, 64, 33, [4])
    two, one = run(problem, _in_two, backend, frozen), run(problem, _in_one, backend, frozen)
    for name, value in two.items():
        assert torch.equal(one[name], value), name


@pytest.mark.parametrize("shape", [(0, 64), (2, 3, 64), (64,)], ids=str)
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    problem = make_problem(6, 64, 33, [4])
    problem.x, problem.grad = torch.randn(shape), torch.randn(*shape[:-1], 33)
    two, one = run(problem, _in_two, None), run(problem, _in_one, None)
    for name, value in two.items():
        assert torch.equal(one[name], value), name


def test_gradcheck() -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 32, dtype=torch.float64, requires_grad=True) for _ in range(2))
    lora_A = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)
    lora_B = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 32, dtype=torch.float64)

    def call(gate: Tensor, up: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return ops.gated_lora_linear(gate, up, weight, lora_A, lora_B, 0.5)

    assert torch.autograd.gradcheck(call, (gate, up, lora_A, lora_B))


def _kept(call: Callable[..., Tensor]) -> int:
    """Bytes kept for the backward pass, every storage once."""
    problem = make_problem(64, 256, 64, [4], bias=False)
    gate, up = problem.x.clone().requires_grad_(), (1 - problem.x).requires_grad_()
    lora = [[factor[0].clone().requires_grad_()] for factor in (problem.lora_A, problem.lora_B)]
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(gate, up, problem.weight, *lora)
    return sum(storages.values())


def test_keeps_no_input_of_the_product() -> None:
    assert _kept(_in_two) - _kept(_in_one) == 4 * 64 * 256


def test_compiles_to_the_two_operations() -> None:
    problem = make_problem(5, 64, 33, [4], bias=False)
    arguments = (problem.x, 1 - problem.x, problem.weight, problem.lora_A, problem.lora_B)
    compiled = torch.compile(ops.gated_lora_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), ops.gated_lora_linear(*arguments))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"up": torch.zeros(2, 32)}, ValueError, r"up must have the shape of gate"),
        ({"up": torch.zeros(2, 64).half()}, TypeError, r"up must have the dtype of gate"),
        ({"gate": torch.zeros(2, 32), "up": torch.zeros(2, 32)}, ValueError, r"in = 64 as in weight"),
        ({"backend": "nothing"}, RuntimeError, r"backend must be one of"),
    ],
)
def test_bad_input(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"gate": torch.zeros(2, 64), "up": torch.zeros(2, 64), "weight": torch.zeros(3, 64)} | changed
    with pytest.raises(error, match=message):
        ops.gated_lora_linear(**arguments)


def test_a_weight_that_was_modified_is_noticed() -> None:
    weight = torch.randn(3, 64)
    gate = torch.randn(2, 64, requires_grad=True)
    y = ops.gated_lora_linear(gate, torch.randn(2, 64), weight)
    weight += 1
    with pytest.raises(RuntimeError, match="modified in place"):
        y.sum().backward()
