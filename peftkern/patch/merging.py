"""Merging adapters into a `QuantizedLinear` base layer, behind PEFT's `merge` and `unmerge`.

PEFT adds the adapter to the base weight, which packed codes do not allow. Here the sum is quantized again, in the same
format; the packed weight from before is kept until the adapters are unmerged, so that unmerging is exact.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("peftkern")


@torch.no_grad()
def merge(layer: Any, names: Sequence[str], state: Any) -> None:
    """Merge the adapters ``names`` of a LoRA layer into its `QuantizedLinear`.

    Raises:
        RuntimeError: an adapter has a bias and the base layer none.
        ValueError: the sum is not finite; that adapter is not merged.
    """
    base = layer.get_base_layer()
    warnings.warn("merging into a quantized weight rounds the sum to its format again", stacklevel=3)
    for name in names:
        if name not in layer.lora_A:
            continue
        lora_bias = _scaled_bias(layer, name)
        if lora_bias is not None and base.bias is None:
            raise RuntimeError(f"merge: adapter {name!r} has a bias, and the base layer has none to add it to")
        before = (base.quantized, None if base.bias is None else base.bias.detach().clone())
        error = base.merge_(_delta(layer, name, "merge_safe"))
        logger.info("%s: merged adapter %r, requantization error %.2e", state.name, name, error)
        if lora_bias is not None:
            base.bias.data += lora_bias
        if not layer.merged_adapters:
            state.unmerged = before
        layer.merged_adapters.append(name)


@torch.no_grad()
def unmerge(layer: Any, state: Any) -> None:
    """Take all merged adapters out again: exactly where they were merged by `merge`, else by quantizing W - Δ."""
    base = layer.get_base_layer()
    if state.unmerged is not None:
        weight, bias = state.unmerged
        base.replace_(weight.to(base.weight.device))
        if bias is not None:
            base.bias.data = bias.to(base.bias.device)
        state.unmerged = None
        layer.merged_adapters.clear()
    while layer.merged_adapters:
        name = layer.merged_adapters[-1]
        base.merge_(_delta(layer, name, "unmerge"))
        lora_bias = _scaled_bias(layer, name)
        if lora_bias is not None:
            base.bias.data -= lora_bias
        layer.merged_adapters.pop()


def _scaled_bias(layer: Any, name: str) -> Tensor | None:
    bias: Tensor | None = layer.lora_B[name].bias
    return None if bias is None else layer.scaling[name] * bias


def _delta(layer: Any, name: str, step: str) -> Tensor:
    """What adding (``merge_safe``) or removing (``unmerge``) the adapter changes in the weight, [out, in]."""
    if name not in layer.lora_variant:
        delta: Tensor = layer.get_delta_weight(name)
        return delta if step == "merge_safe" else -delta
    weight = layer.get_base_layer().dequantize()
    changed: Tensor = getattr(layer.lora_variant[name], step)(layer, name, weight)
    return changed.sub(weight)
