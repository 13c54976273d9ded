"""Cases of ``traffic-launches``, ``traffic-bytes`` and ``traffic-saved``: the linear layers of one decoder layer; and
of ``traffic-saved-layer``: those with the feed-forward block around them, and the whole layer; and of ``traffic-step``:
all that a layer launches, and the bytes of all layers.

Counted and not timed: every launch reads and writes memory once for each of its operands, however well a cache would
serve it, on both sides alike. Our paths are those that an H100 would take. bitsandbytes takes the same on every GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from peftkern.backends.triton import devices
from peftkern.bench.case import Measurement
from peftkern.bench.result import Quantity
from peftkern.bench.traffic.counter import Step
from peftkern.bench.traffic.layer import LLAMA_3_8B, TOKENS, Shape, count_step, our_layer, peer_layer
from peftkern.bench.traffic.linears import (
    of_linears,
    saved_bytes,
    saved_bytes_of_layer,
    saved_bytes_with_block,
    total,
)

ADAPTERS: Mapping[str, torch.dtype] = {
    "bf16 adapters": torch.bfloat16,
    "float32 adapters, PEFT's default": torch.float32,
}
"""A float32 adapter makes PEFT cast every activation, and so is the easier one to beat."""

GPU = devices.H100
LAYERS = 32
GIGABYTE, MEGABYTE = 1e9, 1e6
KIBIBYTE = 1024

RECOMPUTED: Mapping[str | None, str] = {
    None: "nothing recomputed",
    "up": "recompute='up'",
    "mlp": "recompute='mlp'",
}
"""By the argument of `peftkern.patch`."""

SCOPES: Mapping[str, Callable[[Step], int]] = {
    "linear layers and SwiGLU": saved_bytes_with_block,
    "whole layer": saved_bytes_of_layer,
}


@dataclass(frozen=True)
class Steps:
    """The same step by both sides."""

    ours: Step
    peer: Step


def count_both(adapter_dtype: torch.dtype, shape: Shape = LLAMA_3_8B, tokens: int = TOKENS) -> Steps:
    """Count one step of each side on :data:`GPU`."""
    with devices.assumed(GPU):
        ours = count_step(our_layer(shape, adapter_dtype), shape, tokens)
    return Steps(ours, count_step(peer_layer(shape, adapter_dtype), shape, tokens))


def describe(adapter: str) -> str:
    """The case's name."""
    major, minor = GPU.capability
    return f"1 x {TOKENS} tokens, {adapter}; as on an H100 (sm_{major}{minor})"


def launches() -> Iterator[Measurement]:
    """Measurements of ``traffic-launches``."""
    for adapter, dtype in ADAPTERS.items():
        steps = count_both(dtype)
        ours, peer = (total(of_linears(step)).launches for step in (steps.ours, steps.peer))
        yield Measurement(describe(adapter), "launches", Quantity.COUNT, [ours], [peer])


def moved_bytes() -> Iterator[Measurement]:
    """Measurements of ``traffic-bytes``."""
    for adapter, dtype in ADAPTERS.items():
        steps = count_both(dtype)
        ours, peer = (total(of_linears(step)).bytes / GIGABYTE for step in (steps.ours, steps.peer))
        yield Measurement(describe(adapter), "GB", Quantity.COUNT, [ours], [peer])


def saved() -> Iterator[Measurement]:
    """Measurements of ``traffic-saved``."""
    for adapter, dtype in ADAPTERS.items():
        steps = count_both(dtype)
        ours, peer = (saved_bytes(step) / MEGABYTE for step in (steps.ours, steps.peer))
        yield Measurement(describe(adapter), "MB", Quantity.MEMORY, [ours], [peer])


def whole_step() -> Iterator[Measurement]:
    """Measurements of ``traffic-step``. Embeddings, the last norm, the loss and the optimizer are in neither side."""
    for adapter, dtype in ADAPTERS.items():
        steps = count_both(dtype)
        ours, peer = total(steps.ours.kernels), total(steps.peer.kernels)
        case = describe(adapter)
        yield Measurement(f"a layer, {case}", "launches", Quantity.COUNT, [ours.launches], [peer.launches])
        figures = [LAYERS * side.bytes / GIGABYTE for side in (ours, peer)]
        yield Measurement(f"{LAYERS} layers, {case}", "GB", Quantity.COUNT, figures[:1], figures[1:])


def saved_by_layer(shape: Shape = LLAMA_3_8B, tokens: int = TOKENS) -> Iterator[Measurement]:
    """Measurements of ``traffic-saved-layer``, in KiB per token; adapters in bf16."""
    peer = count_step(peer_layer(shape, torch.bfloat16), shape, tokens)
    for recompute, what in RECOMPUTED.items():
        with devices.assumed(GPU):
            ours = count_step(our_layer(shape, torch.bfloat16, recompute), shape, tokens)
        for scope, count in SCOPES.items():
            figures = [count(step) / tokens / KIBIBYTE for step in (ours, peer)]
            yield Measurement(f"{scope}, {what}", "KiB per token", Quantity.COUNT, figures[:1], figures[1:])
