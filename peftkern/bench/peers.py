"""What the cases share: the peer's layers, ours with the same weights, and the check that both agree."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.backends import registry
from peftkern.bench.errors import DisagreementError

RANK = 16

FLOAT32_TOLERANCE = 1e-5
HALF_BLOCK_TOLERANCE = 4e-3
BFLOAT16_TOLERANCE = 1.6e-2
"""Relative differences that two right results may have: twice the error that each may have against float64."""


def relative_difference(ours: Tensor, peer: Tensor) -> float:
    """``‖ours - peer‖ / ‖peer‖``, in float64; infinite where a value is not finite or the shapes differ."""
    if ours.shape != peer.shape:
        return math.inf
    ours, peer = ours.detach().double(), peer.detach().double()
    if not (ours.isfinite().all() and peer.isfinite().all()):
        return math.inf
    difference, size = float((ours - peer).norm()), float(peer.norm())
    if difference == 0:
        return 0.0
    return difference / size if size > 0 else math.inf


def check_agreement(pairs: Mapping[str, tuple[Tensor, Tensor]], tolerance: float) -> None:
    """Compare our tensor with the peer's under every name.

    Raises:
        DisagreementError: one of them differs by more than ``tolerance``, relatively; the message names it.
    """
    for name, (ours, peer) in pairs.items():
        difference = relative_difference(ours, peer)
        if difference > tolerance:
            raise DisagreementError(
                f"{name}: ours and the peer's differ by {difference:.2e} relative, allowed {tolerance:.0e}; not timed"
            )


def check_equal_bytes(name: str, ours: Tensor, peer: Tensor) -> None:
    """Raise :class:`DisagreementError` unless both hold the same bytes, whatever their shapes."""
    if not torch.equal(ours.detach().flatten().view(torch.uint8), peer.detach().flatten().view(torch.uint8)):
        raise DisagreementError(f"{name}: ours and the peer's are not the same bytes; not timed")


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """In this context ``torch.get_float32_matmul_precision()`` is ``precision``."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def on_reference() -> Iterator[None]:
    """In this context every operation runs on the reference backend."""
    before = os.environ.get(registry.ENVIRONMENT_VARIABLE)
    os.environ[registry.ENVIRONMENT_VARIABLE] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ[registry.ENVIRONMENT_VARIABLE]
        else:
            os.environ[registry.ENVIRONMENT_VARIABLE] = before


class OneLinear(nn.Module):
    """A model of one linear layer, for PEFT to put an adapter on."""

    def __init__(self, linear: nn.Module, loaded_in_4bit: bool = False) -> None:
        super().__init__()
        self.linear = linear
        self.is_loaded_in_4bit = loaded_in_4bit  # the name under which PEFT looks for what from_pretrained notes down

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out


def peer_linear(weight: Tensor, compute_dtype: torch.dtype) -> OneLinear:
    """bitsandbytes' NF4 layer (blocks of 64, no double quantization) that holds ``weight``, [out, in] float32."""
    import bitsandbytes as bnb

    features_out, features_in = weight.shape
    linear = bnb.nn.Linear4bit(
        features_in, features_out, bias=False, compute_dtype=compute_dtype, compress_statistics=False, quant_type="nf4"
    )
    linear.weight = bnb.nn.Params4bit(
        weight.to(compute_dtype), requires_grad=False, compress_statistics=False, quant_type="nf4", module=linear
    ).to(weight.device)
    return OneLinear(linear, loaded_in_4bit=True)


def our_linear(weight: Tensor, compute_dtype: torch.dtype) -> OneLinear:
    """The same layer as :func:`peer_linear`, quantized by this package."""
    from peftkern.nn import QuantizedLinear

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=compute_dtype)
    linear.weight.data.copy_(weight)
    return OneLinear(QuantizedLinear.from_linear(linear, "nf4", 64, double_quant=False))


def with_adapter(model: nn.Module, targets: str | list[str], adapter_dtype: torch.dtype) -> Any:
    """A ``PeftModel`` over ``model``, in training mode, with LoRA r=16 on ``targets`` (PEFT's ``target_modules``)."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, lora_dropout=0.0)
    adapted = peft.get_peft_model(model, config).train()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype)
    return adapted


def copy_adapter(source: nn.Module, target: nn.Module) -> None:
    """Give the trainable parameters of ``target`` the values of those of ``source`` that have the same names.

    Raises:
        DisagreementError: the two do not have the same trainable parameters.
    """
    values, places = trainable(source), trainable(target)
    if values.keys() != places.keys():
        raise DisagreementError("the adapters of both sides do not have the same parameters; not timed")
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(values[name])


def fill_lora_b(model: nn.Module, generator: torch.Generator) -> None:
    """Give every ``lora_B`` small random values: with the zeros it starts from, dA would be zero and prove nothing."""
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``model`` that ask for a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
