"""A patched block on the device: layers that share their input take the launches of one."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from gpu_cases import DEVICE, DTYPES, launched
from lora_problem import TOLERANCE, relative_error
from torch import Tensor, nn

from peftkern.nn import QuantizedLinear
from peftkern.patch import patch

NAMES = ("gate_proj", "up_proj")


class Block(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (
            QuantizedLinear.from_linear(nn.Linear(64, features, bias=False), "nf4").to(dtype) for features in (48, 32)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.gate_proj(x), self.up_proj(x)]


def make_block(dtype: torch.dtype) -> Any:
    torch.manual_seed(1)
    block = Block(dtype)
    config = peft.LoraConfig(r=4, target_modules=list(NAMES), init_lora_weights=False, lora_dropout=0.3)
    peft.get_peft_model(block, config)
    return block.to(DEVICE)


def run(block: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(5)
    x = torch.linspace(-1, 1, 20 * 64).sin().reshape(20, 64).to(DEVICE, dtype).requires_grad_()
    outputs = block(x)
    sum(output.float().square().sum() for output in outputs).backward()
    factors = {name: p.grad.cpu() for name, p in block.named_parameters() if p.grad is not None}
    named = dict(zip(NAMES, (output.detach().cpu() for output in outputs), strict=True))
    return {**named, **factors, "x": x.grad.cpu()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_layers_take_the_launches_of_one(dtype: torch.dtype) -> None:
    block = make_block(dtype)
    report = patch(block, strict=True)
    assert all(row.kernel.endswith("(group of 2)") and "triton" in row.kernel for row in report.rows)
    layers = [getattr(block, name) for name in NAMES]
    results: dict[str, Tensor] = {}
    together = launched(lambda: results.update(run(block, dtype)))
    for layer in layers:
        layer.__dict__["_peftkern"].shared = None
    block.zero_grad()
    expected: dict[str, Tensor] = {}
    separate = launched(lambda: expected.update(run(block, dtype)))
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(results[name], value.double()) <= TOLERANCE[dtype], name
    assert len(together) < len(separate)
