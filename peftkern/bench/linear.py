"""One NF4 LoRA linear 4096x4096, r=16, forward and backward, against PEFT's ``lora.bnb.Linear4bit``.

Timed are ``y = layer(x)`` and ``dX, dA, dB`` for a given dY. Both sides are what users run: PEFT's layer as
``get_peft_model`` makes it, and PEFT's layer over our quantized one after ``peftkern.patch``. Both hold the same packed
bytes and the same adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import cpu
from peftkern.bench import peers
from peftkern.bench.case import Case, Effort

SIZE = 4096


@dataclass(frozen=True)
class Precision:
    """How both sides compute.

    The peer's compute dtype is that of the activations. PEFT makes the adapter of a layer with bf16 compute in bf16,
    and `get_peft_model` then turns it into float32 unless it is told not to (`autocast_adapter_dtype=False`). A float32
    adapter makes PEFT cast every activation, and so is the easier one to beat: both are reported.
    """

    activations: torch.dtype
    adapter: torch.dtype
    matmul: str
    tolerance: float
    note: str = ""


HIGHEST = Precision(torch.float32, torch.float32, "highest", peers.FLOAT32_TOLERANCE)
HIGH = Precision(torch.float32, torch.float32, "high", peers.HALF_BLOCK_TOLERANCE)
BF16 = Precision(torch.bfloat16, torch.bfloat16, "highest", peers.BFLOAT16_TOLERANCE, "bf16 adapter")
BF16_DEFAULT = Precision(
    torch.bfloat16, torch.float32, "highest", peers.BFLOAT16_TOLERANCE, "float32 adapter, PEFT's default"
)

HIGHEST_TOKENS = (1, 8, 32, 128, 512, 2048)
HIGH_TOKENS = (128, 512, 2048)
BF16_TOKENS = (32, 512, 2048)


@dataclass(frozen=True)
class Layers:
    """The same layer twice, and how to compute with it."""

    ours: Any
    peer: Any
    precision: Precision
    features_in: int
    features_out: int


def setup_layers(precision: Precision, features_out: int = SIZE, features_in: int = SIZE) -> Layers:
    """Both layers, with equal packed weights and equal adapters.

    Raises:
        DisagreementError: the packed weights differ.
    """
    import peftkern

    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(features_out, features_in, generator=generator)
    peer = peers.with_adapter(peers.peer_linear(weight, precision.activations), ["linear"], precision.adapter)
    ours = peers.with_adapter(peers.our_linear(weight, precision.activations), ["linear"], precision.adapter)
    peers.fill_lora_b(peer, generator)
    peers.copy_adapter(peer, ours)
    packed = (_layer(ours).base_layer.weight, _layer(peer).base_layer.weight)
    peers.check_equal_bytes("packed weight", *packed)
    peftkern.patch(ours, strict=True)
    return Layers(ours, peer, precision, features_in, features_out)


def setup_case(layers: Layers, tokens: int) -> Case:
    """Forward and backward of ``tokens`` tokens through both layers."""
    dtype = layers.precision.activations
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, layers.features_in, generator=generator).to(dtype).requires_grad_()
    dy = torch.randn(tokens, layers.features_out, generator=generator).to(dtype)

    def run(model: Any) -> dict[str, Tensor]:
        with peers.matmul_precision(layers.precision.matmul):
            return _forward_and_backward(model, x, dy)

    def check() -> None:
        ours, peer = run(layers.ours), run(layers.peer)
        peers.check_agreement({name: (ours[name], peer[name]) for name in peer}, layers.precision.tolerance)

    notes = ", ".join(filter(None, [f"{tokens} token" + "s" * (tokens != 1), layers.precision.note]))
    return Case(notes, lambda: run(layers.ours), lambda: run(layers.peer), check, effort=Effort(seconds=4.0))


def _forward_and_backward(model: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    # The layer itself, as it is called inside of a model: not through PeftModel, whose overhead comes once per model.
    layer = _layer(model)
    adapter = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    y = layer(x)
    gradients = torch.autograd.grad(y, (x, *adapter), dy)
    return dict(zip(("y", "dX", "dA", "dB"), (y.detach(), *gradients), strict=True))


def _layer(model: Any) -> Any:
    return model.base_model.model.linear


def float16_note() -> str:
    """What to say of "high" on this machine: nothing where it multiplies in float16, else how it computes instead."""
    if not cpu.available():
        return "no native kernels: computed by the reference"
    with peers.matmul_precision("high"):
        precision = cpu.product_precision(torch.float32, cpu.chosen_isa())
    return "" if precision == cpu.FLOAT16 else "no AVX512-FP16 in use: computed as 'highest'"


def _cases(precision: Precision, tokens: tuple[int, ...]) -> Iterator[Case]:
    layers = setup_layers(precision)
    for count in tokens:
        yield setup_case(layers, count)


def highest() -> Iterator[Case]:
    """Cases of ``linear-nf4-highest``."""
    yield from _cases(HIGHEST, HIGHEST_TOKENS)


def high() -> Iterator[Case]:
    """Cases of ``linear-nf4-high``."""
    yield from _cases(replace(HIGH, note=float16_note()), HIGH_TOKENS)


def bf16() -> Iterator[Case]:
    """Cases of ``linear-nf4-bf16``."""
    yield from _cases(BF16, BF16_TOKENS)
    yield from _cases(BF16_DEFAULT, BF16_TOKENS)
