"""Put masks over the weights of a model's linear layers, and take them off.

Layers are named as for `peftkern.sparse.attach`: the name of a PEFT layer means the layer beneath it, whose weight is
then masked and whose adapters are not: y = x (W ⊙ M)ᵀ + Σ lora + Σ delta.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from peftkern.formats import BitMask
from peftkern.nn.masked_linear import WeightMask, check_mask, mask_of, masked_class, under_mask, write_zeros_
from peftkern.nn.sparse_linear import class_with_deltas, deltas_of, under_deltas
from peftkern.patch import fused
from peftkern.patch.weights import original_class
from peftkern.sparse.layers import check_called, find_layer


def mask_layers(model: nn.Module, masks: Mapping[str, BitMask]) -> None:
    """Let the weight of every layer in ``masks`` count only where its mask keeps it. All layers get theirs, or none.

    What the weights hold elsewhere stays, for `release_masks` to give back. A weight that is trained stays trained; the
    gradient is zero where the mask does not keep it.

    PEFT cannot merge an adapter into a masked weight: the mask would act on it as well. A patched model refuses to; one
    that is not patched has no say in it. Call ``release_masks(model, keep_zeros=True)`` first.

    Args:
        model: with ``nn.Linear`` or `QuantizedLinear` layers, with PEFT adapters or sparse deltas over them or without.
        masks: by name of a layer, of the shape of its weight, on its device. They are copied.

    Raises:
        ValueError: a name is no linear layer, two names are one layer, a layer has a mask, a mask does not fit, or the
            layer's forward is not run on this instance.
        TypeError: a layer is of a class that cannot be masked, such as those of bitsandbytes.
    """
    layers = {name: find_layer(model, name, "mask_layers") for name in masks}
    check_called(model, layers, "mask", "mask_layers")
    for name, layer in layers.items():
        _check(name, layer, masks[name])
    for name, layer in layers.items():
        mask = masks[name]
        layer.weight_mask = WeightMask(BitMask(mask.bits.clone(), mask.shape, mask.pattern))
        _exchange(layer, masked_class(_plain_class(layer)))


def release_masks(model: nn.Module, *, keep_zeros: bool = False) -> None:
    """Take the masks off every layer that has one.

    Args:
        keep_zeros: write zeros into the weights where the masks did not keep them, so that the model computes what it
            did; quantized weights have a code for zero, and nothing else of them changes. Without it the weights are as
            they were before, or as training left them.

    Raises:
        ValueError: no layer has a mask; or, with ``keep_zeros``, a delta is merged into a masked weight.
    """
    layers = _masked_layers(model)
    if keep_zeros:
        for name, layer in layers.items():
            _check_nothing_merged(name, layer)
    for layer in layers.values():
        if keep_zeros:
            write_zeros_(layer)
        plain = under_mask(_plain_class(layer))
        del layer.weight_mask
        _exchange(layer, plain)


def masks(model: nn.Module) -> dict[str, BitMask]:
    """The masks by name of their layer, as `mask_layers` takes them. They share the model's memory.

    Raises:
        ValueError: no layer has one.
    """
    return {name: layer.weight_mask.mask for name, layer in _masked_layers(model).items()}


def _masked_layers(model: nn.Module) -> dict[str, Any]:
    found = {
        name.removesuffix(".base_layer"): layer for name, layer in model.named_modules() if mask_of(layer) is not None
    }
    if not found:
        raise ValueError("no layer of the model has a mask; mask_layers(model, masks) puts them there")
    return found


def _plain_class(layer: nn.Module) -> type:
    """The class of ``layer`` beneath patch and deltas."""
    return under_deltas(original_class(type(layer)))


def _check(name: str, layer: Any, mask: BitMask) -> None:
    if not isinstance(mask, BitMask):
        raise TypeError(f"mask_layers: the mask of {name} must be a BitMask, got {type(mask).__name__}")
    check_maskable(name, layer)
    check_mask(f"mask_layers: {name}", layer, mask)
    _check_nothing_merged(name, layer)


def check_maskable(name: str, layer: nn.Module, caller: str = "mask_layers") -> None:
    """Raise `TypeError` where the class of ``layer`` cannot be masked, `ValueError` where it has a mask."""
    if mask_of(layer) is not None:
        raise ValueError(f"{caller}: {name} has a mask; release_masks(model) takes it off")
    plain = _plain_class(layer)
    if masked_class(plain) is None:
        raise TypeError(
            f"{caller}: {name} is a {plain.__name__}; masks go over nn.Linear and QuantizedLinear. Load the model "
            "dense, or quantized by peftkern.QuantConfig"
        )


def _check_nothing_merged(name: str, layer: nn.Module) -> None:
    merged = [delta_name for delta_name, delta in deltas_of(layer).items() if delta.merged]
    if merged:
        raise ValueError(
            f"{name}: delta {merged[0]!r} is merged into the weight, and a mask would act on it as well; "
            f"unmerge(model, {merged[0]!r}) first"
        )


def _exchange(layer: nn.Module, layer_class: Any) -> None:
    fused.exchange_class(layer, class_with_deltas(layer_class) if deltas_of(layer) else layer_class)
