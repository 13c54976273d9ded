"""Gated blocks that keep their input for the backward pass and make what is inside again.

Such a block runs as one operation, `peftkern.ops.lora_mlp`, in place of the calls of its three layers. Whatever those
calls would do beside their product keeps it from that, and the block says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from peftkern.ops.lora_linear import FLOAT_DTYPES
from peftkern.ops.lora_mlp import lora_mlp
from peftkern.patch.arguments import (
    LayerArguments,
    check_base,
    has_global_hooks,
    is_hooked,
    is_lora_class,
    read_base,
    read_lora,
    running_adapters,
)
from peftkern.patch.weights import KNOWN_TENSORS, NotFused, original_class

LAYERS = ("gate_proj", "up_proj", "down_proj")

MADE_AGAIN = {
    "mlp": "makes gate and up again in the backward pass",
    "up": "makes up again in the backward pass",
}
"""What the report says of a block, by the argument ``recompute``."""

KEEPS = "keeps gate and up"


def read_block(block: Any, x: Tensor, check: Callable[[nn.Module], None]) -> list[LayerArguments]:
    """What the three layers of ``block`` would multiply with.

    Args:
        block: a gated block.
        x: its input, [..., in].
        check: raises `NotFused` for a LoRA layer that would not run on the fused kernels, with its active adapters.

    Raises:
        NotFused: one of them does more than a product, or they compute in different dtypes.
    """
    if type(x) not in KNOWN_TENSORS or x.dtype not in FLOAT_DTYPES:
        raise NotFused(f"its input is a {type(x).__name__} of {x.dtype}")
    if has_global_hooks():
        raise NotFused("there are hooks on all modules, which would skip its layers")
    layers = [_read(name, getattr(block, name), x, check) for name in LAYERS]
    if len({layer.compute_dtype(x.dtype) for layer in layers}) > 1:
        raise NotFused("its layers compute in different dtypes")
    return layers


def run_block(
    x: Tensor, layers: Sequence[LayerArguments], activation: str, recompute: str, backend: str | None
) -> Tensor:
    """The output of the block whose layers are ``layers``, as `read_block` gives them."""
    y = lora_mlp(
        layers[0].to_compute(x),
        *(layer.member() for layer in layers),
        deltas=[layer.deltas() for layer in layers],
        activation=activation,
        recompute=recompute,
        backend=backend,
    )
    return layers[-1].from_compute(y, x)


def _read(name: str, layer: nn.Module, x: Tensor, check: Callable[[nn.Module], None]) -> LayerArguments:
    try:
        if is_hooked(layer):
            raise NotFused("it has hooks")
        arguments = _read_layer(layer, x, check)
        if arguments.mask is not None:
            raise NotFused("it has a mask")
        if arguments.magnitude is not None:
            raise NotFused("its adapter is DoRA's")
    except NotFused as refusal:
        raise NotFused(f"{name}: {refusal}") from None
    return arguments


def _read_layer(layer: Any, x: Tensor, check: Callable[[nn.Module], None]) -> LayerArguments:
    if not is_lora_class(original_class(type(layer))):
        return read_base(layer, x)
    check(layer)
    names = running_adapters(layer)
    if names:
        return read_lora(layer, names, x)
    check_base(layer.base_layer)
    return read_base(layer.base_layer, x)
