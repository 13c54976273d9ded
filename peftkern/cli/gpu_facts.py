"""GPUs, the kernels that this installation has for them, and what would run where on one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from peftkern.backends import by_tokens, cuda
from peftkern.backends.triton import configurations, register
from peftkern.formats import QuantizedTensor
from peftkern.formats.quantized_tensor import packed_shape, scales_shape
from peftkern.ops.lora_linear import Adapters

_WEIGHTS = ((4096, 4096), (14336, 4096), (4096, 14336))
_RANK, _BLOCK_SIZE = 16, 64


@dataclass(frozen=True)
class Product:
    """What would run one product on a GPU, by number of tokens."""

    operation: str
    weight: str
    kernels: str


def gpus() -> list[dict[str, Any]]:
    """Name, capability and memory of every GPU."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append({"name": properties.name, "capability": capability, "memory_mb": properties.total_memory // 10**6})
    return found


def kernels() -> dict[str, Any]:
    """Which kernels for GPUs there are, with or without a GPU. Triton is not imported, and nothing is compiled."""
    missing = register.unavailable_reason()
    built = cuda.architectures()
    return {
        "triton": {
            "compiles_for": [] if missing else [str(entry) for entry in configurations.ARCHITECTURES],
            "missing_because": missing,
        },
        "cuda": {"built_for": built, "missing_because": None if built else cuda.unavailable_reason()},
    }


def products(device: str) -> Iterator[Product]:
    """What would run the products of Llama-3-8B's layers on ``device``, with NF4 weights and bfloat16 activations."""
    for out_features, in_features in _WEIGHTS:
        call = _Call(out_features, in_features, device)
        for operation, arguments in (("lora_linear", call.forward), ("lora_linear_backward", call.backward)):
            weight = f"nf4 {out_features}x{in_features}"
            yield Product(operation, weight, by_tokens.describe(operation, arguments))


class _Call:
    """Arguments of one layer for any number of tokens; nobody reads what they hold."""

    def __init__(self, out_features: int, in_features: int, device: str) -> None:
        self.weight = _empty_weight(torch.Size((out_features, in_features)), device)
        lora_A, lora_B = (torch.empty(shape, device=device) for shape in ((_RANK, in_features), (out_features, _RANK)))
        self.adapters = Adapters([lora_A], [lora_B], [2.0], [0.0], None)
        self.x = torch.empty(1, in_features, dtype=torch.bfloat16, device=device)
        self.grad = torch.empty(1, out_features, dtype=torch.bfloat16, device=device)
        self.h = torch.empty(1, _RANK, device=device)

    def forward(self, tokens: int) -> tuple[Any, ...]:
        return self.x.expand(tokens, -1), self.weight, self.adapters, None

    def backward(self, tokens: int) -> tuple[Any, ...]:
        grad, x, h = (row.expand(tokens, -1) for row in (self.grad, self.x, self.h))
        return grad, x, self.weight, self.adapters, h, True, [True, True]


def _empty_weight(shape: torch.Size, device: str) -> QuantizedTensor:
    packed = torch.empty(packed_shape(shape, "nf4", _BLOCK_SIZE), dtype=torch.uint8, device=device)
    scales = torch.empty(scales_shape(shape, "nf4", _BLOCK_SIZE), device=device)
    return QuantizedTensor(packed, scales, "nf4", shape, torch.bfloat16, _BLOCK_SIZE)
