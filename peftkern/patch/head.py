"""The head of a language model, as the loss without logits takes it.

    scores = x Wᵀ + b + u Bᵀ
    u = [s₁ D₁(x) A₁ᵀ | s₂ D₂(x) A₂ᵀ | ...],  B = [B₁ | B₂ | ...]      of the running adapters

It is read on every call, because PEFT switches adapters, disables and merges them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.nn.quantized_linear import QuantizedLinear, TiedQuantizedLinear
from peftkern.ops.lora_linear import Adapters, Weight, lora_linear
from peftkern.patch.arguments import (
    LayerArguments,
    has_global_hooks,
    is_hooked,
    is_lora_class,
    running_adapters,
    with_adapters,
)
from peftkern.patch.weights import KNOWN_TENSORS, NotFused, original_class


@dataclass(frozen=True)
class Head:
    """What gives the scores.

    Attributes:
        weight: [vocabulary, hidden], dense or quantized, trained or not.
        bias: [vocabulary], that of the adapters included.
        adapters: that run now, without a seed.
    """

    weight: Weight
    bias: Tensor | None
    adapters: Adapters

    def low_rank(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """u [..., Σr] of ``hidden``, and B [vocabulary, Σr]; ``None`` without adapters."""
        lora_A, lora_B, scaling, dropout_p, _ = vars(self.adapters).values()
        if not lora_A:
            return None
        ranks = [factor.shape[0] for factor in lora_A]
        # a layer with nothing in front of its adapters, whose Bᵢ put each hᵢ into columns of its own: so they drop out
        # what they drop out in a linear layer, and a backend has one pass for all of them
        places = torch.split(torch.eye(sum(ranks), dtype=hidden.dtype, device=hidden.device), ranks, dim=1)
        nothing = hidden.new_zeros(sum(ranks), hidden.shape[-1])
        inner = lora_linear(hidden, nothing, lora_A, places, scaling, dropout_p=dropout_p)
        return inner, lora_B[0] if len(lora_B) == 1 else torch.cat(list(lora_B), dim=1)


_NO_ADAPTERS = Adapters([], [], [], [], None)


def read_head(model: Any) -> Head:
    """What ``model.lm_head`` computes now.

    Raises:
        NotFused: it is neither a dense nor a quantized linear layer, with LoRA over it or without.
    """
    layer = _running(model.lm_head)
    if not is_lora_class(original_class(type(layer))):
        return Head(_weight(layer), layer.bias, _NO_ADAPTERS)
    base, names = layer.base_layer, running_adapters(layer)
    _check_not_watched(base)
    if layer.disable_adapters and layer.merged_adapters:
        raise NotFused("the merged adapters of its head are disabled, which unmerges them")
    state = layer.__dict__.get("_peftkern")
    if state is not None and state.rows is not None:
        raise NotFused("rows of the batch have adapters of their own in its head")
    arguments = LayerArguments(base, _weight(base), base.bias)
    try:
        with_adapters(arguments, layer, names)
    except NotFused as refusal:
        raise NotFused(f"its head: {refusal}") from None
    if arguments.magnitude is not None:
        raise NotFused(f"its head: adapter {names[0]!r} is DoRA's")
    return Head(arguments.weight, arguments.total_bias(), arguments.adapters())


def _running(head: nn.Module) -> Any:
    """The module that runs: of a head that is trained in full beside the original, one of the two."""
    _check_not_watched(head)
    package = sys.modules.get("peft.utils.other")
    if package is None or type(head) is not package.ModulesToSaveWrapper:
        return head
    wrapper: Any = head
    names = wrapper.active_adapters
    original = wrapper.disable_adapters or not names or any(name not in wrapper._adapters for name in names)
    running: nn.Module = wrapper.original_module if original else wrapper.modules_to_save[names[0]]
    _check_not_watched(running)
    return running


def _check_not_watched(layer: nn.Module) -> None:
    if is_hooked(layer) or has_global_hooks():
        raise NotFused("its head has hooks, which the loss would skip")


def _weight(layer: Any) -> Weight:
    layer_class = original_class(type(layer))
    if layer_class in (QuantizedLinear, TiedQuantizedLinear):
        return layer.quantized  # type: ignore[no-any-return]
    if layer_class is not nn.Linear:
        raise NotFused(f"its head is a {layer_class.__qualname__}, not a plain linear layer")
    if type(layer.weight) not in KNOWN_TENSORS:
        raise NotFused(f"the weight of its head is a {type(layer.weight).__name__}")
    return layer.weight  # type: ignore[no-any-return]
