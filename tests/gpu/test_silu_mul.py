"""The gate of a SwiGLU or GeGLU block on the device, against float64."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DEVICE
from torch import Tensor

from peftkern.backends import registry
from peftkern.ops.silu_mul import silu_mul, silu_mul_backward_reference, silu_mul_reference

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}
SHAPES = [(), (0,), (1,), (1023,), (1024,), (3, 700), (1025,)]


def _close(result: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (result.cpu().double() - expected).norm()
    assert error <= tolerance * expected.norm()  # false for NaN


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    gate, up, grad = (torch.randn(shape).to(dtype) for _ in range(3))
    ours = [value.to(DEVICE).requires_grad_() for value in (gate, up)]
    y = silu_mul(*ours, backend="triton")
    y.backward(grad.to(DEVICE))
    exact = [value.double() for value in (grad, gate, up)]
    expected = silu_mul_backward_reference(*exact, True, True)
    _close(y.detach(), silu_mul_reference(*exact[1:]), TOLERANCE[dtype])
    for value, gradient in zip(ours, expected, strict=True):
        assert value.grad is not None and gradient is not None
        _close(value.grad, gradient, TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gelu(dtype: torch.dtype, activation: str) -> None:
    torch.manual_seed(0)
    gate, up, grad = (torch.randn(3, 700).to(dtype) for _ in range(3))
    ours = [value.to(DEVICE).requires_grad_() for value in (3 * gate, up)]
    y = silu_mul(*ours, activation=activation, backend="triton")
    y.backward(grad.to(DEVICE))
    exact = [value.double() for value in (grad, 3 * gate, up)]
    _close(y.detach(), silu_mul_reference(*exact[1:], activation), TOLERANCE[dtype])
    for value, gradient in zip(ours, silu_mul_backward_reference(*exact, True, True, activation), strict=True):
        assert value.grad is not None and gradient is not None
        _close(value.grad, gradient, TOLERANCE[dtype])


def test_gradients_over_their_operands() -> None:
    torch.manual_seed(2)
    gate, up, grad = (torch.randn(5, 300).to(DEVICE) for _ in range(3))
    call = (grad, gate, up, True, True, "silu")
    expected = [value.clone() for value in registry.run("silu_mul_backward", *call, backend="triton")]
    over = registry.run("silu_mul_backward", *call, (True, True), backend="triton")
    assert [value.data_ptr() for value in over] == [gate.data_ptr(), up.data_ptr()]
    assert all(torch.equal(*pair) for pair in zip(over, expected, strict=True))
    gate, up = (torch.randn(5, 300).to(DEVICE) for _ in range(2))
    product = silu_mul(gate, up, backend="triton")
    assert torch.equal(registry.run("silu_mul", gate, up, "silu", up, backend="triton"), product)
    assert torch.equal(up, product)


@pytest.mark.parametrize("needed", [0, 1])
def test_only_what_asks_for_a_gradient_gets_one(needed: int) -> None:
    torch.manual_seed(1)
    values = [torch.randn(5, 300).to(DEVICE) for _ in range(2)]
    values[needed].requires_grad_()
    silu_mul(*values, backend="triton").sum().backward()
    exact = [value.detach().cpu().double() for value in values]
    expected = silu_mul_backward_reference(torch.ones(5, 300).double(), *exact, needed == 0, needed == 1)[needed]
    gradient = values[needed].grad
    assert gradient is not None and expected is not None and values[1 - needed].grad is None
    _close(gradient, expected, TOLERANCE[torch.float32])


def test_strided_and_extreme_values() -> None:
    gate = torch.tensor([[0.0, -200.0, 200.0], [float("inf"), float("nan"), -1.0]]).t()
    up = torch.full((3, 2), 0.5)
    y = silu_mul(gate.to(DEVICE), up.to(DEVICE), backend="triton").cpu()
    torch.testing.assert_close(y, torch.nn.functional.silu(gate) * up, equal_nan=True, rtol=1e-6, atol=1e-6)
