"""Masks on the layers of a model: with adapters and deltas over them, patched or not, and off again."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from sparse_models import classes, error, llama, lora, outputs, random_deltas, text
from torch import Tensor, nn

from peftkern import QuantConfig, patch, quantize_, unpatch, verify
from peftkern.formats import BitMask, random_mask
from peftkern.nn.masked_linear import mask_of
from peftkern.sparse import attach, detach, linear_layers, mask_layers, masks, merge, release_masks, unmerge
from peftkern.sparse.layers import base_layer, weight_shape

TOLERANCE = 5e-5  # errors of a few layers add up


def random_masks(model: nn.Module, density: float = 0.5) -> dict[str, BitMask]:
    found = {}
    for seed, (name, layer) in enumerate(linear_layers(model).items()):
        shape = weight_shape(base_layer(layer))
        assert shape is not None
        found[name] = random_mask(shape, density, seed)
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(**text()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def pruned(model: Any, own: dict[str, BitMask]) -> Any:
    """A copy of a dense model with zeros in its weights."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in own.items():
            base_layer(twin.get_submodule(name)).weight.mul_(mask.mask())
    return twin


@pytest.mark.parametrize("with_lora", [False, True], ids=["alone", "under LoRA"])
def test_masked_models_compute_as_with_zeros(with_lora: bool) -> None:
    model = lora(llama()) if with_lora else llama()
    own = random_masks(model)
    expected, before = pruned(model, own), outputs(model)
    mask_layers(model, own)
    assert error(outputs(model), outputs(expected)) <= TOLERANCE
    trained, reference = gradients(model), gradients(expected)
    assert trained.keys() == reference.keys()
    for name, gradient in trained.items():
        layer = name.removesuffix(".weight").removesuffix(".base_layer")
        keep = own[layer].mask() if layer in own and "lora_" not in name else torch.ones(())
        assert error(gradient, reference[name] * keep) <= TOLERANCE, name
    release_masks(model)
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
def test_masks_come_off_as_they_were_or_as_zeros(base: str) -> None:
    model = llama(base)
    was, before, state = classes(model), outputs(model), {k: v.clone() for k, v in model.state_dict().items()}
    own = random_masks(model)
    mask_layers(model, own)
    assert {name: mask.bits.tolist() for name, mask in masks(model).items()} == {
        name: mask.bits.tolist() for name, mask in own.items()
    }
    under_mask = outputs(model)
    assert not torch.equal(under_mask, before)
    release_masks(model)
    assert classes(model) == was and torch.equal(outputs(model), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    mask_layers(model, own)
    release_masks(model, keep_zeros=True)
    assert classes(model) == was and error(outputs(model), under_mask) <= TOLERANCE
    with pytest.raises(ValueError, match="no layer of the model has a mask"):
        release_masks(model)


def test_the_masks_are_copies() -> None:
    model = llama()
    own = random_masks(model)
    mask_layers(model, own)
    expected = outputs(model)
    for mask in own.values():
        mask.bits.zero_()
    assert torch.equal(outputs(model), expected)


# ---- patched


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_patched_model_runs_adapters_and_mask_as_one(base: str) -> None:
    model = lora(llama(base))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    own = random_masks(model)
    mask_layers(model, own)
    expected, reference = outputs(model), gradients(model)
    report = patch(model, strict=True)
    rows = [row for row in report.fused if row.weight]
    assert len(rows) == len(own) == 14 and all(row.kernel.startswith("masked_linear on cpu") for row in rows)
    assert all("keeps 0.5 of its weight" in row.reason for row in rows)
    assert error(outputs(model), expected) <= TOLERANCE
    after = gradients(model)
    assert all(error(after[name], reference[name]) <= TOLERANCE for name in reference)
    assert {row.calls_left == {} for row in patch(model).fused} == {True}
    assert verify(model, text()).ok
    unpatch(model)
    assert torch.equal(outputs(model), expected)


def test_masks_come_and_go_on_a_patched_model() -> None:
    model = lora(llama("nf4"))
    patch(model)
    before = outputs(model)
    own = random_masks(model)
    mask_layers(model, own)
    other = lora(llama("nf4"))
    mask_layers(other, own)
    assert error(outputs(model), outputs(other)) <= TOLERANCE
    release_masks(model)
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_the_report_has_one_row_for_a_masked_layer(base: str) -> None:
    model = llama(base)
    mask_layers(model, random_masks(model))
    rows = {row.module: row for row in patch(model).rows}
    row = rows["model.layers.0.self_attn.q_proj"]
    assert row.action == "fused" and row.kernel.startswith("masked_linear on cpu")
    assert row.kind == ("MaskedLinear" if base == "dense" else "MaskedQuantizedLinear")
    assert row.reason == "a module of peftkern, runs it unpatched; keeps 0.5 of its weight"
    # 14 layers, the head, two gated blocks, five norms, two attention and two decoder layers
    assert len(rows) == 26


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_merging_an_adapter_into_a_masked_weight_is_refused(base: str) -> None:
    model = lora(llama(base))
    mask_layers(model, random_masks(model))
    patch(model)
    expected = outputs(model)
    with pytest.raises(ValueError, match="release_masks"):
        model.merge_adapter()
    assert torch.equal(outputs(model), expected)
    release_masks(model, keep_zeros=True)
    with pytest.warns(UserWarning) if base == "nf4" else torch.no_grad():
        model.merge_adapter()
    assert error(outputs(model), expected) <= (0.2 if base == "nf4" else TOLERANCE)


# ---- with deltas


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("first", ["mask", "delta"])
def test_deltas_over_a_masked_weight_are_not_masked(base: str, first: str) -> None:
    plain = llama(base)
    own, indices = random_masks(plain), random_deltas(plain)
    values = {name: torch.full((len(one),), 0.1) for name, one in indices.items()}
    model = copy.deepcopy(plain)
    if first == "mask":
        mask_layers(model, own)
    attach(model, indices, values=values)
    if first == "delta":
        mask_layers(model, own)
    mask_layers(plain, own)
    release_masks(plain, keep_zeros=True)
    under_mask = outputs(plain)
    attach(plain, indices, values=values)
    expected = outputs(plain)
    assert error(outputs(model), expected) <= TOLERANCE
    patch(model)
    assert error(outputs(model), expected) <= TOLERANCE
    assert error(outputs(pickle.loads(pickle.dumps(model))), expected) <= TOLERANCE
    detach(model)
    assert error(outputs(model), under_mask) <= TOLERANCE
    release_masks(model)
    assert error(outputs(model), outputs(llama(base))) <= TOLERANCE
    assert mask_of(model.get_submodule("model.layers.0.self_attn.q_proj")) is None


def test_masks_and_merged_deltas_exclude_each_other() -> None:
    model = llama()
    attach(model, random_deltas(model))
    merge(model)
    with pytest.raises(ValueError, match="unmerge"):
        mask_layers(model, random_masks(model))
    unmerge(model)
    mask_layers(model, random_masks(model))
    with pytest.raises(ValueError, match="MaskedLinear, whose weight has no single entries"):
        merge(model)


# ---- refusals


def test_all_layers_get_their_mask_or_none() -> None:
    model = llama()
    was, before = classes(model), outputs(model)
    own = random_masks(model)
    first, *_, last = own
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({**own, last: random_mask((3, 5), 0.5, 0)}, ValueError, r"got \[3, 5\]"),
        ({**own, "model.layers.7.mlp": own[first]}, ValueError, "mask_layers: 'model.layers.7.mlp' is no module"),
        ({**own, last: own[last].mask()}, TypeError, "must be a BitMask, got Tensor"),
        ({**own, "model.embed_tokens": own[first]}, ValueError, "not a linear layer"),
    ]
    for wrong, kind, message in cases:
        with pytest.raises(kind, match=message):
            mask_layers(model, wrong)
        assert classes(model) == was
    mask_layers(model, own)
    with pytest.raises(ValueError, match="has a mask"):
        mask_layers(model, {last: own[last]})
    release_masks(model)
    assert torch.equal(outputs(model), before)


def test_layers_of_bitsandbytes_are_refused() -> None:
    model = llama("bnb-nf4")
    with pytest.raises(TypeError, match=r"Linear4bit; masks go over nn\.Linear and QuantizedLinear"):
        mask_layers(model, random_masks(model))


def test_a_model_quantized_in_place_is_masked_like_any_other() -> None:
    model = llama()
    quantize_(model, QuantConfig("nf4"))
    own = random_masks(model)
    mask_layers(model, own)
    assert error(outputs(model), outputs(llama())) > 0.1
