"""What the other tests of this folder rely on: an executor runs them, on memory that is poisoned."""

from __future__ import annotations

from typing import Any

import executor
import torch
from torch import Tensor


class _Empty(torch.autograd.Function):
    """Uninitialised memory, from the forward and from the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.new_empty(grad.shape)


def test_something_executes() -> None:
    assert executor.current() in (executor.GPU, executor.TTSEM, executor.INTERPRETER)
    assert torch.zeros(1, device="cuda").is_cuda


def test_memory_that_nobody_wrote_is_poisoned() -> None:
    x = torch.ones(8, device="cuda", requires_grad=True)
    y = _Empty.apply(x)
    assert y.isnan().all()
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isnan().all()
    assert (torch.empty(8, device="cuda", dtype=torch.int32) > 10**6).all()
