"""Inputs of ``lora_linear`` and its results, compared with float64: shared by the tests of every device."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from peftkern import ops
from peftkern.formats import QuantizedTensor

TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""Relative error ‖out - ref‖ / ‖ref‖ against float64."""


def relative_error(out: Tensor, reference: Tensor) -> float:
    assert out.shape == reference.shape
    difference, scale = (out.double() - reference).norm(), reference.norm()
    return float(difference / scale) if scale > 0 else float(difference)


@dataclasses.dataclass
class Problem:
    """Inputs of one call, and the gradient that comes back."""

    x: Tensor
    weight: Tensor | QuantizedTensor
    lora_A: list[Tensor]
    lora_B: list[Tensor]
    scaling: list[float]
    bias: Tensor | None
    dropout_p: list[float]
    grad: Tensor

    def double(self) -> Problem:
        weight = self.weight if isinstance(self.weight, QuantizedTensor) else self.weight.double()
        bias = None if self.bias is None else self.bias.double()
        lora_A, lora_B = [a.double() for a in self.lora_A], [b.double() for b in self.lora_B]
        return dataclasses.replace(
            self, x=self.x.double(), weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias, grad=self.grad.double()
        )

    def to(self, device: str) -> Problem:
        """The same problem on ``device``, layouts kept."""
        fields = {
            name: _moved(getattr(self, name), device) for name in ("x", "weight", "lora_A", "lora_B", "bias", "grad")
        }
        return dataclasses.replace(self, **fields)

    def run(self, backend: str, seed: int = 11) -> dict[str, Tensor]:
        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_()

        x, lora_A, lora_B = leaf(self.x), [leaf(a) for a in self.lora_A], [leaf(b) for b in self.lora_B]
        bias = None if self.bias is None else leaf(self.bias)
        torch.manual_seed(seed)
        adapters: tuple[Any, ...] = (lora_A, lora_B) if lora_A else (None, None)
        y = ops.lora_linear(x, self.weight, *adapters, self.scaling, bias, self.dropout_p, backend=backend)
        y.backward(self.grad)
        assert y.dtype == x.dtype
        results = {"y": y.detach(), "x": x.grad}
        results |= {f"A{i}": a.grad for i, a in enumerate(lora_A)} | {f"B{i}": b.grad for i, b in enumerate(lora_B)}
        if bias is not None:
            results["bias"] = bias.grad
        return results


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, list):
        return [_moved(entry, device) for entry in value]
    return None if value is None else value.to(device)


def make_problem(
    tokens: int,
    in_features: int,
    out_features: int,
    ranks: list[int],
    weight: str = "nf4",
    dtype: torch.dtype = torch.float32,
    dropout_p: float = 0.0,
    bias: bool = True,
    block_size: int = 64,
    double_quant: bool = False,
    positive: bool = False,
    weight_dtype: torch.dtype | None = None,
    factor_dtype: torch.dtype = torch.float32,
    seed: int = 3,
) -> Problem:
    """Random inputs; ``positive`` ones leave no sum to cancel, so a relative bound holds for single numbers too.

    ``weight_dtype`` is that of a dense weight, by default the one of x; ``factor_dtype`` that of A and B.
    """
    torch.manual_seed(seed)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.randn(*shape, dtype=dtype)
        return values.abs() if positive else values

    dense = randn(out_features, in_features) * 0.05
    return Problem(
        x=randn(tokens, in_features, dtype=dtype),
        weight=dense.to(weight_dtype or dtype)
        if weight == "dense"
        else ops.quantize(dense, weight, block_size, double_quant, backend="reference"),
        lora_A=[randn(r, in_features).to(factor_dtype) for r in ranks],
        lora_B=[(randn(out_features, r) * 0.1).to(factor_dtype) for r in ranks],
        scaling=[0.5 + i for i in range(len(ranks))],
        bias=randn(out_features) if bias else None,
        dropout_p=[dropout_p] * len(ranks),
        grad=randn(tokens, out_features, dtype=dtype),
    )


def assert_agrees(problem: Problem, backend: str) -> None:
    truth = problem.double().run("reference")
    results = problem.run(backend)
    assert results.keys() == truth.keys()
    errors = {name: relative_error(results[name], truth[name]) for name in truth}
    tolerance = TOLERANCE[problem.x.dtype]
    assert all(error <= tolerance for error in errors.values()), errors
