"""Merge sparse deltas into the weights they belong to, and take them out again to the last bit.

A dense weight keeps the entries that were overwritten; unmerging writes them back. A `QuantizedLinear` cannot change
single entries: asked to, its sum with the delta is quantized again, and the packed weight from before is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.nn.quantized_linear import QuantizedLinear
from peftkern.nn.sparse_linear import Merge, SparseDelta, SparseDeltas, deltas_of, under_deltas
from peftkern.patch.weights import original_class
from peftkern.sparse.layers import layers_with


@torch.no_grad()
def merge(model: nn.Module, name: str = "default", *, requantize: bool = False) -> dict[str, float]:
    """Make the delta ``name`` part of the weights of all its layers, or of none where one of them refuses.

    It acts whether it is active or not, and is not trained any more. The sum is rounded to the dtype of the weight.

    Args:
        model: that has the delta.
        name: of the delta.
        requantize: for layers with a quantized weight: add the delta to the dense form and quantize that again.

    Returns:
        By name of the layer, the relative error ‖Q(W + Δ) − (W + Δ)‖ / ‖W + Δ‖ that quantizing again adds; 0 for dense
        weights.

    Raises:
        ValueError: no layer has such a delta; it is merged already; a weight is shared with another module, quantized
            without ``requantize`` or of a kind that cannot be merged into; or the sum is not finite.
    """
    layers = layers_with(model, name)
    holders = _holders(model)
    for layer_name, layer in layers.items():
        _check_mergeable(layer_name, layer, name, requantize, holders)
    sums = {layer_name: _sum(layer_name, layer, name) for layer_name, layer in layers.items() if not _is_packed(layer)}
    errors: dict[str, float] = {}
    try:
        for layer_name, layer in layers.items():
            errors[layer_name] = _merge(layer, name, sums.get(layer_name))
    except BaseException:
        for layer_name in errors:
            _unmerge(layers[layer_name], name)
        raise
    return errors


@torch.no_grad()
def unmerge(model: nn.Module, name: str = "default") -> None:
    """Give the weights their bits from before `merge` back. The delta takes part in the forward again if it is active.

    Raises:
        ValueError: no layer has such a delta, it is not merged, another delta was merged after it, or a weight has been
            changed since. Nothing was changed.
    """
    layers = layers_with(model, name)
    for layer_name, layer in layers.items():
        _check_unmergeable(layer_name, layer, name)
    for layer in layers.values():
        _unmerge(layer, name)


# ---- one layer


def _parts(layer: nn.Module, name: str) -> tuple[SparseDeltas, SparseDelta]:
    deltas: Any = layer._modules["sparse_deltas"]
    return deltas, deltas_of(layer)[name]


def _weight(layer: nn.Module) -> nn.Parameter:
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight


def _is_packed(layer: nn.Module) -> bool:
    return isinstance(layer, QuantizedLinear)


def _positions(delta: SparseDelta) -> tuple[Tensor, Tensor]:
    indices = delta.indices
    return indices.row_of_entries(), indices.columns.long()


def _scaled(delta: SparseDelta) -> Tensor:
    return delta.scaling * delta.values.to(torch.promote_types(delta.values.dtype, torch.float32))


def _sum(layer_name: str, layer: nn.Module, name: str) -> Tensor:
    """The entries of the merged weight, [entries] in its dtype."""
    _, delta = _parts(layer, name)
    scaled, weight = _scaled(delta), _weight(layer)
    total = (weight[_positions(delta)].to(scaled.dtype) + scaled).to(weight.dtype)
    if not bool(total.isfinite().all()):
        raise ValueError(f"merge: the sum of weight and delta of {layer_name} is not finite; nothing was changed")
    return total


def _merge(layer: nn.Module, name: str, total: Tensor | None) -> float:
    deltas, delta = _parts(layer, name)
    if total is None:
        assert isinstance(layer, QuantizedLinear)
        before = layer.quantized
        error = layer.merge_(delta.indices.to_dense(_scaled(delta)))
        deltas.merges[name] = Merge(before, layer.weight)
    else:
        weight, positions, error = _weight(layer), _positions(delta), 0.0
        deltas.merges[name] = Merge(weight[positions], total)
        weight[positions] = total
    delta.merged = True
    return error


def _unmerge(layer: nn.Module, name: str) -> None:
    deltas, delta = _parts(layer, name)
    before = deltas.merges.pop(name).before
    if isinstance(before, Tensor):
        _weight(layer)[_positions(delta)] = before
    else:
        assert isinstance(layer, QuantizedLinear)
        layer.replace_(before.to(layer.weight.device))
    delta.merged = False


# ---- checks


def _holders(model: nn.Module) -> Mapping[int, list[str]]:
    """Names of the modules that hold each parameter."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                found.setdefault(id(parameter), []).append(name)
    return found


def _check_mergeable(
    layer_name: str, layer: nn.Module, name: str, requantize: bool, holders: Mapping[int, list[str]]
) -> None:
    _, delta = _parts(layer, name)
    if delta.merged:
        raise ValueError(f"merge: {name!r} is merged into {layer_name} already")
    kind = under_deltas(original_class(type(layer)))
    if _is_packed(layer):
        if not requantize:
            raise ValueError(
                f"merge: the weight of {layer_name} is quantized, so that merging rounds all of it again; keep the "
                "delta attached, which is exact, or pass requantize=True, which returns the error"
            )
        if not bool(delta.values.isfinite().all()):
            raise ValueError(f"merge: the values of {layer_name} are not finite")
    elif kind.forward is not nn.Linear.forward:  # type: ignore[attr-defined]
        raise ValueError(
            f"merge: {layer_name} is a {kind.__name__}, whose weight has no single entries to change; keep the delta "
            "attached, or load the model dense or with peftkern.QuantConfig"
        )
    others = [holder for holder in holders.get(id(_weight(layer)), []) if not _is_same_layer(holder, layer_name)]
    if others:
        raise ValueError(
            f"merge: {layer_name} shares its weight with {others[0]}, which the delta must not change; untie them first"
        )


def _is_same_layer(holder: str, layer_name: str) -> bool:
    return holder.removesuffix(".base_layer") == layer_name


def _check_unmergeable(layer_name: str, layer: nn.Module, name: str) -> None:
    deltas, delta = _parts(layer, name)
    if not delta.merged:
        raise ValueError(f"unmerge: {name!r} is not merged into {layer_name}")
    latest = list(deltas.merges)[-1]
    if latest != name:
        raise ValueError(f"unmerge: {latest!r} was merged into {layer_name} after {name!r}; unmerge it first")
    record, weight = deltas.merges[name], _weight(layer)
    if isinstance(record.before, Tensor):
        changed = not torch.equal(weight[_positions(delta)], record.after)
    else:
        changed = weight is not record.after
    if changed:
        raise ValueError(
            f"unmerge: the weight of {layer_name} has been changed since {name!r} was merged, for example by merging "
            "an adapter; undo that first"
        )
