"""What others need for the same product: the vendor's library on dense weights, and PEFT's layers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.gpu_check.references import dense
from peftkern.tune.operands import Operands

Calls = list[Callable[[], object]]

CUBLAS, PEFT, PEFT_BITSANDBYTES = "cuBLAS", "PEFT dense", "PEFT + bitsandbytes"
TORCH, TORCH_SPARSE, BITSANDBYTES = "PyTorch", "torch.sparse", "bitsandbytes"

OF_PRODUCTS = (CUBLAS, PEFT, PEFT_BITSANDBYTES)
"""Those that a product of a group is timed beside."""
ALL = (*OF_PRODUCTS, TORCH, TORCH_SPARSE, BITSANDBYTES)


def missing() -> dict[str, str]:
    """Peers that cannot be timed here, and why."""
    needed = {PEFT: ("peft",), PEFT_BITSANDBYTES: ("peft", "bitsandbytes"), BITSANDBYTES: ("bitsandbytes",)}
    absent = {
        name: [package for package in packages if importlib.util.find_spec(package) is None]
        for name, packages in needed.items()
    }
    return {name: f"{' and '.join(packages)} cannot be imported" for name, packages in absent.items() if packages}


def names() -> list[str]:
    """Peers that are timed."""
    return [name for name in ALL if name not in missing()]


def calls(name: str, operands: Sequence[Operands], direction: str) -> Calls:
    """What one of `OF_PRODUCTS` does: one call for each set of operands, each on memory of its own."""
    weights = [dense(member.weight).to(operands[0].x.dtype) for member in operands[0].members]
    if name == CUBLAS:
        return [_Products(one, [weight.clone() for weight in weights]).call(direction) for one in operands]
    return [_Layers.build(one, weights, quantized=name == PEFT_BITSANDBYTES).call(direction) for one in operands]


@dataclass(frozen=True)
class _Products:
    """The products with the frozen weights alone, dense."""

    operands: Operands
    weights: Sequence[Tensor]

    def call(self, direction: str) -> Callable[[], object]:
        return self.forward if direction == "forward" else self.backward

    def forward(self) -> list[Tensor]:
        return [torch.mm(self.operands.x, weight.t()) for weight in self.weights]

    def backward(self) -> Tensor:
        grads = self.operands.grads
        total = torch.mm(grads[0], self.weights[0])
        for grad, weight in zip(grads[1:], self.weights[1:], strict=True):
            torch.addmm(total, grad, weight, out=total)
        return total


@dataclass(frozen=True)
class _Layers:
    """PEFT's adapter layers, one for each member."""

    operands: Operands
    models: Sequence[Any]

    @staticmethod
    def build(operands: Operands, weights: Sequence[Tensor], quantized: bool) -> _Layers:
        return _Layers(operands, [_with_adapter(weight, quantized) for weight in weights])

    def call(self, direction: str) -> Callable[[], object]:
        if direction == "forward":
            return self.forward
        x = self.operands.x.detach().requires_grad_()
        outputs = [model(x) for model in self.models]
        trained = [p for model in self.models for p in model.parameters() if p.requires_grad]

        def backward() -> object:
            return torch.autograd.grad(outputs, [x, *trained], self.operands.grads, retain_graph=True)

        return backward

    def forward(self) -> list[Tensor]:
        return [model(self.operands.x) for model in self.models]


def _with_adapter(weight: Tensor, quantized: bool) -> Any:
    from peftkern.bench.peers import OneLinear, peer_linear, with_adapter

    if quantized:
        return with_adapter(peer_linear(weight, weight.dtype), ["linear"], weight.dtype).to(weight.device)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return with_adapter(OneLinear(linear), ["linear"], weight.dtype).to(weight.device)
