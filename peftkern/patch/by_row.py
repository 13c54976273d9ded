"""Batches whose rows train adapters of their own.

PEFT runs such batches in evaluation only (`adapter_names`), one base product for all; here they are trained as well.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from peftkern.patch.arguments import read_by_row
from peftkern.patch.fused import STATE, is_fused
from peftkern.patch.weights import NotFused

BASE = "__base__"
"""Name for rows without an adapter, as PEFT has it."""


@contextlib.contextmanager
def adapters_by_row(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside of the with block, row i of every batch goes through the adapter ``names[i]`` and trains it.

        model.base_model.set_adapter(["law", "code"])  # both require a gradient
        with peftkern.adapters_by_row(model, ["law", "code", "law", "__base__"]):
            model(**batch).loss.backward()

    Which adapters are active does not matter inside, disabled ones stay off, and no adapter gets a gradient from
    another one's rows. Every patched LoRA layer makes one product with its weight for all rows
    (`peftkern.ops.mixed_lora_linear`). With gradient checkpointing the backward pass has to run inside as well.

    Args:
        model: a patched model with LoRA adapters.
        names: for each row of the batch the adapter, or ``"__base__"`` for none. A layer that has no adapter of a name
            runs without one for those rows.

    Raises:
        ValueError: ``names`` is empty or has a name that no layer knows; or a LoRA layer could not follow: it is not
            patched, merged or disabled, or it or an adapter is of another kind than plain LoRA over a plain weight.
    """
    layers = _lora_layers(model)
    _check_names(layers, names)
    for name, layer in layers.items():
        _check_layer(name, layer, names)
    before = {name: layer.__dict__[STATE].rows for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.__dict__[STATE].rows = tuple(names)
        yield
    finally:
        for name, layer in layers.items():
            layer.__dict__[STATE].rows = before[name]


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    peft_layer = sys.modules.get("peft.tuners.tuners_utils")
    if peft_layer is None:
        return {}
    return {name: module for name, module in model.named_modules() if isinstance(module, peft_layer.BaseTunerLayer)}


def _check_names(layers: Mapping[str, Any], names: Sequence[str]) -> None:
    known = {name for layer in layers.values() for name in getattr(layer, "lora_A", {})}
    unknown = sorted(set(names) - known - {BASE})
    if unknown or not names:
        raise ValueError(
            f"adapters_by_row: names must be adapters of the model, {sorted(known)}, or {BASE!r}; got "
            f"{unknown[0] if unknown else 'none'!r}"
        )


def _check_layer(name: str, layer: Any, names: Sequence[str]) -> None:
    try:
        if not is_fused(layer):
            raise NotFused("is not patched; call peftkern.patch(model) first")
        if layer.disable_adapters:
            raise NotFused("has its adapters disabled")
        read_by_row(layer, names, None)
    except NotFused as refusal:
        raise ValueError(f"adapters_by_row: {name}: {refusal}") from refusal
