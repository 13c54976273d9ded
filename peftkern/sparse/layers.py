"""Put sparse deltas on the linear layers of a model, switch them, and take them off.

Layers are named as in ``model.named_modules()``. The name of a PEFT layer means the layer beneath it, so that low-rank
adapters and sparse deltas act together: y = x Wᵀ + Σ lora + Σ delta.
"""

from __future__ import annotations

import difflib
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.formats.sparse_indices import SparseIndices
from peftkern.integrations.fingerprint import remember_base, unwrapped
from peftkern.integrations.quantizer import PeftkernQuantizer
from peftkern.integrations.selection import adapter_ids, head_ids
from peftkern.nn.sparse_linear import SparseDelta, SparseDeltas, class_with_deltas, deltas_of, under_deltas
from peftkern.ops.lora_linear import FLOAT_DTYPES
from peftkern.patch import fused
from peftkern.patch.weights import original_class

_READ_BY_PARENT = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that compute with the weights of the layers in them, without calling these."""


def attach(
    model: nn.Module,
    indices: Mapping[str, SparseIndices],
    name: str = "default",
    *,
    values: Mapping[str, Tensor] | None = None,
    scaling: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, SparseDelta]:
    """Give every layer in ``indices`` a sparse delta called ``name``.

    The weights of these layers are frozen from then on; `detach` gives them their ``requires_grad`` back. Whether other
    parameters are trained is not changed. All layers get their delta, or none.

    A patched model stays patched; layers that `peftkern.patch` had no reason to take before (dense ones without an
    adapter) are taken by the next call of it.

    Args:
        model: with dense or quantized linear layers, with or without PEFT adapters over them.
        indices: by name of a layer: which entries of its weight [out, in].
        name: of the delta; a layer may have several.
        values: by name of a layer, [entries]; ``None`` starts from zero, so that nothing changes at first.
        scaling: factor of the values.
        dtype: of the trained values. Casts of the model leave it as it is.

    Returns:
        The deltas by name of their layer.

    Raises:
        ValueError: a name is no linear layer, two names are one layer, a layer has a delta of this name, shapes do not
            fit, or the layer's forward is not run on this instance.
        TypeError: ``dtype`` is not floating-point.
    """
    _check_name(name)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"attach: dtype must be float64, float32, bfloat16 or float16, got {dtype}")
    if values is not None and values.keys() != indices.keys():
        raise ValueError(f"attach: values must have the keys of indices; {_difference(values, indices)}")
    layers = {layer_name: find_layer(model, layer_name) for layer_name in indices}
    check_called(model, layers, "delta")
    _check_free(layers, name)
    made = {}
    for layer_name, layer in layers.items():
        own = None if values is None else values[layer_name]
        made[layer_name] = _make(layer_name, layer, indices[layer_name], own, scaling, dtype)
    remember_base(model)
    for layer_name, layer in layers.items():
        _add(layer, name, made[layer_name])
    _tell_quantizer(model)
    return made


def detach(model: nn.Module, name: str = "default", *, keep_merged: bool = False) -> None:
    """Take the delta ``name`` off every layer that has it.

    A layer without deltas is of the class that it was before, and its weight is trained again where it was.

    Args:
        model: that has the delta.
        name: of the delta.
        keep_merged: for a delta that is merged into the weights: leave the weights as they are now.

    Raises:
        ValueError: no layer has such a delta; or it is merged and ``keep_merged`` does not say what to do about that.
    """
    layers = layers_with(model, name)
    merged = [layer_name for layer_name, layer in layers.items() if deltas_of(layer)[name].merged]
    if merged and not keep_merged:
        raise ValueError(
            f"detach: {name!r} is merged into {len(merged)} layers; unmerge(model, {name!r}) first, or keep the merged "
            "weights: keep_merged=True"
        )
    for layer in layers.values():
        _remove(layer, name)
    _tell_quantizer(model)


def deltas(model: nn.Module, name: str = "default") -> dict[str, SparseDelta]:
    """The deltas called ``name`` by name of their layer, as `attach` returned them.

    Raises:
        ValueError: no layer has one.
    """
    return {layer_name: deltas_of(layer)[name] for layer_name, layer in layers_with(model, name).items()}


def set_active(model: nn.Module, names: str | Iterable[str]) -> None:
    """Let the deltas called ``names`` take part in the forward, and no others. They add up.

    Raises:
        ValueError: no layer has a delta of one of these names.
    """
    wanted = {names} if isinstance(names, str) else set(names)
    for name in wanted:
        layers_with(model, name)
    for delta_name, delta in _all_deltas(model):
        delta.active = delta_name in wanted


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """In this context no delta that is not merged acts: the base layers compute what they did before `attach`."""
    were = [(delta, delta.active) for _, delta in _all_deltas(model)]
    try:
        for delta, _ in were:
            delta.active = False
        yield
    finally:
        for delta, active in were:
            delta.active = active


def linear_layers(model: nn.Module, targets: str | Sequence[str] = "all-linear") -> dict[str, nn.Module]:
    """The linear layers of ``model`` that a method may adapt, by name.

    A layer beneath a PEFT adapter stands under the adapter's name, and the value is the adapter's layer; `base_layer`
    gives the one beneath.

    Args:
        model: any module; PEFT's own layers are left out.
        targets: ``"all-linear"``: all but output embeddings and other heads. Another string: a regular expression that
            has to match the whole name. A sequence: names, or their last parts. As for PEFT's ``target_modules``.

    Raises:
        ValueError: nothing matches, or one of the names in a sequence matches nothing.
    """
    found = _all_linear_layers(model)
    if isinstance(targets, str) and targets != "all-linear":
        chosen = {name for name in found if re.fullmatch(targets, name)}
    elif isinstance(targets, str):
        heads = head_ids(model)
        chosen = {name for name, layer in found.items() if id(layer) not in heads}
    else:
        chosen = {name for name in found if any(_ends_with(name, target) for target in targets)}
        unused = [target for target in targets if not any(_ends_with(name, target) for name in found)]
        if unused:
            raise ValueError(f"linear_layers: targets names layers that the model does not have: {', '.join(unused)}")
    if not chosen:
        raise ValueError(f"linear_layers: no linear layer matches targets={targets!r}")
    return {name: layer for name, layer in found.items() if name in chosen}


def base_layer(layer: nn.Module) -> nn.Module:
    """The linear layer beneath a PEFT layer; any other layer is its own."""
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is not None and isinstance(layer, tuners.BaseTunerLayer):
        base: nn.Module = layer.get_base_layer()
        return base
    return layer


def layers_with(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The layers that have a delta called ``name``, beneath any PEFT layer, by the name that `attach` takes.

    Raises:
        ValueError: there is none.
    """
    found = {
        layer_name.removesuffix(".base_layer"): layer
        for layer_name, layer in model.named_modules()
        if name in deltas_of(layer)
    }
    if not found:
        present = sorted({delta_name for delta_name, _ in _all_deltas(model)})
        raise ValueError(f"the model has no sparse delta called {name!r}; it has {present or 'none at all'}")
    return found


def _all_deltas(model: nn.Module) -> Iterator[tuple[str, SparseDelta]]:
    for layer in model.modules():
        yield from deltas_of(layer).items()


def _all_linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    adapters = adapter_ids(model)
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and id(layer) not in adapters:
            outer = name.removesuffix(".base_layer")
            found[outer] = model.get_submodule(outer)
    return found


def _ends_with(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


# ---- checks


def _check_name(name: str) -> None:
    if not name or "." in name:
        raise ValueError(f"attach: name must be a word without dots, got {name!r}")


def _difference(got: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    missing, more = sorted(wanted.keys() - got.keys()), sorted(got.keys() - wanted.keys())
    return f"missing: {', '.join(missing[:5]) or 'none'}; too many: {', '.join(more[:5]) or 'none'}"


def find_layer(model: nn.Module, layer_name: str, caller: str = "attach") -> nn.Module:
    """The linear layer of this name, the one beneath where it is a PEFT layer.

    Raises:
        ValueError: there is none; the message begins with ``caller``.
    """
    try:
        layer = base_layer(model.get_submodule(layer_name))
    except AttributeError:
        layer = None
    if layer is not None and weight_shape(layer) is not None:
        return layer
    what = "is no module" if layer is None else f"is a {type(layer).__name__}, not a linear layer,"
    known = list(_all_linear_layers(model))
    close = difflib.get_close_matches(layer_name, known, 3, 0.5) or known[:3]
    raise ValueError(f"{caller}: {layer_name!r} {what} of this {type(model).__name__}; it has {', '.join(close)}")


def weight_shape(layer: nn.Module) -> tuple[int, int] | None:
    """[out, in] of a linear layer; ``None`` where ``layer`` is none."""
    shape = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    return shape if isinstance(shape[0], int) and isinstance(shape[1], int) else None  # type: ignore[return-value]


def check_called(model: nn.Module, layers: Mapping[str, nn.Module], what: str, caller: str = "attach") -> None:
    """Raise `ValueError` unless each of ``layers`` is there once and its own forward runs, so that a ``what`` acts."""
    by_identity: dict[int, str] = {}
    parents = [parent for parent in model.modules() if isinstance(parent, _READ_BY_PARENT)]
    read_by_parent = {id(child): parent for parent in parents for child in parent.modules()}
    for layer_name, layer in layers.items():
        first = by_identity.setdefault(id(layer), layer_name)
        if first != layer_name:
            raise ValueError(f"{caller}: {first} and {layer_name} are one layer; name it once")
        if "forward" in layer.__dict__:
            raise ValueError(
                f"{caller}: the forward of {layer_name} was replaced on the instance (accelerate's hooks do that), and "
                f"would pass the {what} by; load the model without a device_map"
            )
        if id(layer) in read_by_parent:
            raise ValueError(
                f"{caller}: {layer_name} is part of a {type(read_by_parent[id(layer)]).__name__}, which computes with "
                f"its weight without calling it; a {what} would have no effect"
            )


def _check_free(layers: Mapping[str, nn.Module], name: str) -> None:
    for layer_name, layer in layers.items():
        if name in deltas_of(layer):
            raise ValueError(
                f"attach: {layer_name} has a delta called {name!r}; give this one another name, or detach that one"
            )


def _make(
    layer_name: str, layer: nn.Module, indices: SparseIndices, values: Tensor | None, scaling: float, dtype: torch.dtype
) -> SparseDelta:
    shape = weight_shape(layer)
    if tuple(indices.shape) != shape:
        raise ValueError(f"attach: {layer_name} is {list(shape or ())}, its indices are of shape {list(indices.shape)}")
    device = next(itertools.chain(layer.parameters(), layer.buffers())).device
    if values is None:
        values = torch.zeros(len(indices), dtype=dtype, device=device)
    elif tuple(values.shape) != (len(indices),):
        raise ValueError(f"attach: values of {layer_name} must be [{len(indices)}], got {list(values.shape)}")
    # what a state dict holds is copied: those who save it refuse tensors that share memory, as two deltas' could
    own = replace(
        indices.to(device),
        row_offsets=indices.row_offsets.to(device, copy=True),
        columns=indices.columns.to(device, copy=True),
    )
    return SparseDelta(own, values.detach().to(device, dtype, copy=True), scaling).train(layer.training)


# ---- changes


def _add(layer: Any, name: str, delta: SparseDelta) -> None:
    if not deltas_of(layer):
        weight = _weight(layer)
        layer.sparse_deltas = SparseDeltas(weight is not None and weight.requires_grad)
        if weight is not None:
            weight.requires_grad_(False)
        fused.exchange_class(layer, class_with_deltas(original_class(type(layer))))
    layer.sparse_deltas[name] = delta


def _remove(layer: Any, name: str) -> None:
    layer.sparse_deltas.merges.pop(name, None)
    del layer.sparse_deltas[name]
    if layer.sparse_deltas:
        return
    weight = _weight(layer)
    if weight is not None:
        weight.requires_grad_(layer.sparse_deltas.weight_was_trained)
    del layer.sparse_deltas
    fused.exchange_class(layer, under_deltas(original_class(type(layer))))


def _tell_quantizer(model: nn.Module) -> None:
    """Let the Trainer take a quantized model that has deltas to train; it knows of PEFT's adapters only."""
    quantizer = getattr(unwrapped(model), "hf_quantizer", None)
    if isinstance(quantizer, PeftkernQuantizer):
        quantizer.is_qat_trainable = any(True for _ in _all_deltas(model))


def _weight(layer: nn.Module) -> nn.Parameter | None:
    return layer._parameters.get("weight")
