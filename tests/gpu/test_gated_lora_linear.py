"""gated_lora_linear on the device: the product's input is made again inside the kernel that needs it."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DTYPES, gpu_problem, launched
from lora_problem import TOLERANCE, Problem, relative_error
from torch import Tensor

from peftkern import ops


def _run(problem: Problem, in_one: bool, activation: str = "silu") -> dict[str, Tensor]:
    torch.manual_seed(5)
    p = problem
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (p.x, 1 - p.x, p.lora_A[0], p.lora_B[0])]
    gate, up, lora_A, lora_B = leaves
    rest = (p.weight, [lora_A], [lora_B], p.scaling, p.bias, p.dropout_p)
    backend = "triton" if p.x.dtype != torch.float64 else "reference"
    if in_one:
        y = ops.gated_lora_linear(gate, up, *rest, activation=activation, backend=backend)
    else:
        x = ops.silu_mul(gate, up, activation=activation, backend=backend)
        y = ops.lora_linear(x, *rest, backend=backend)
    y.backward(p.grad)
    return {"y": y.detach(), **dict(zip(["gate", "up", "A", "B"], (leaf.grad for leaf in leaves), strict=True))}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_bits_of_the_two_operations_and_float64(dtype: torch.dtype, dropout_p: float) -> None:
    problem = gpu_problem(70, 192, 65, [8], "nf4", dtype, dropout_p)
    one, two, truth = _run(problem, True), _run(problem, False), _run(problem.double(), False)
    for name, value in two.items():
        assert torch.equal(one[name].cpu(), value.cpu()), name
        assert relative_error(one[name].cpu(), truth[name].cpu()) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu(activation: str) -> None:
    problem = gpu_problem(70, 192, 65, [8], "nf4")
    one, two, truth = (
        _run(p, in_one, activation) for p, in_one in ((problem, True), (problem, False), (problem.double(), False))
    )
    for name, value in two.items():
        assert torch.equal(one[name].cpu(), value.cpu()), name
        assert relative_error(one[name].cpu(), truth[name].cpu()) <= TOLERANCE[torch.float32], name


def test_no_further_launch() -> None:
    problem = gpu_problem(20, 64, 48, [8])
    assert sorted(launched(lambda: _run(problem, True))) == sorted(launched(lambda: _run(problem, False)))
    assert problem.x.is_cuda
