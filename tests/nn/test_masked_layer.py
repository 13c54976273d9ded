"""Masked layers: what they compute and train, how they are saved, and what is left when the mask goes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftkern.formats import FORMATS, BitMask, group_mask, random_mask
from peftkern.nn import QuantizedLinear
from peftkern.nn.masked_linear import MaskedLinear, MaskedQuantizedLinear, mask_, mask_of, release_, under_mask
from peftkern.ops.dequantize import dequantize

KINDS = ["dense", *sorted(FORMATS)]


def make(kind: str, in_features: int = 96, out_features: int = 35, double_quant: bool = False) -> Any:
    torch.manual_seed(0)
    layer = nn.Linear(in_features, out_features)
    if kind == "dense":
        return layer
    return QuantizedLinear.from_linear(layer, kind, double_quant=double_quant)


def masked(kind: str, **sizes: Any) -> tuple[Any, BitMask]:
    layer = make(kind, **sizes)
    mask = random_mask((layer.out_features, layer.in_features), 0.5, seed=1)
    return mask_(layer, mask), mask


def values(layer: Any) -> Tensor:
    return layer.quantized.packed.clone() if isinstance(layer, QuantizedLinear) else layer.weight.detach().clone()


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_with_what_the_mask_keeps(kind: str) -> None:
    layer = make(kind)
    mask = random_mask((35, 96), 0.5, seed=1)
    dense = dequantize(layer.quantized) if kind != "dense" else layer.weight.detach()
    expected = torch.randn(4, 7, 96)
    x = expected.clone().requires_grad_()
    reference = nn.functional.linear(expected.double(), dense.double() * mask.mask(), layer.bias.detach().double())
    assert mask_(layer, mask) is layer
    y = layer(x)
    assert float((y.detach() - reference).norm() / reference.norm()) < 5e-6
    y.sum().backward()
    gradient = (dense.double() * mask.mask()).sum(0).expand(4, 7, 96)
    assert x.grad is not None and float((x.grad - gradient).norm() / gradient.norm()) < 5e-6
    assert isinstance(layer, MaskedLinear if kind == "dense" else MaskedQuantizedLinear)
    assert mask_of(layer) == mask and mask_of(make(kind)) is None


def test_a_trained_weight_gets_its_gradient_where_it_is_kept() -> None:
    layer, mask = masked("dense")
    x = torch.randn(9, 96)
    layer(x).sum().backward()
    expected = torch.ones(9, 35).t() @ x * mask.mask()
    assert layer.weight.grad is not None
    assert float((layer.weight.grad - expected).norm() / expected.norm()) < 5e-6
    assert not layer.weight.grad[~mask.mask()].any()


def test_what_the_weight_holds_elsewhere_does_not_matter() -> None:
    layer, mask = masked("dense")
    x = torch.randn(9, 96)
    expected = layer(x)
    with torch.no_grad():
        layer.weight[~mask.mask()] = float("nan")
    assert torch.equal(layer(x), expected)


# ---- the way back


@pytest.mark.parametrize("kind", KINDS)
def test_release_gives_the_layer_back(kind: str) -> None:
    layer = make(kind)
    was, before, x = type(layer), values(layer), torch.randn(5, 96)
    expected = layer(x)
    mask_(layer, random_mask((35, 96), 0.5, seed=1))
    assert not torch.equal(layer(x), expected)
    assert release_(layer) is layer and type(layer) is was
    assert torch.equal(values(layer), before) and torch.equal(layer(x), expected)
    assert "weight_mask.bits" not in layer.state_dict()


@pytest.mark.parametrize("in_features", [128, 45], ids=["whole blocks", "an odd number of columns"])
@pytest.mark.parametrize(
    ("kind", "double_quant"), [*((kind, False) for kind in KINDS), *((kind, True) for kind in ("nf4", "fp4"))]
)
def test_kept_zeros_compute_what_the_mask_did(kind: str, in_features: int, double_quant: bool) -> None:
    layer = make(kind, in_features=in_features, double_quant=double_quant)
    dense = layer.dequantize() if kind != "dense" else layer.weight.detach().clone()
    mask = random_mask((35, in_features), 0.5, seed=1)
    mask_(layer, mask)
    x = torch.randn(5, in_features)
    expected = layer(x)
    release_(layer, keep_zeros=True)
    assert type(layer) is (nn.Linear if kind == "dense" else QuantizedLinear)
    after = layer.dequantize() if kind != "dense" else layer.weight.detach()
    assert torch.equal(after, dense * mask.mask())  # to the last bit: no scale, and no other code has changed
    if kind == "dense":
        assert float((layer(x) - expected).norm() / expected.norm()) < 5e-6
    else:
        assert torch.equal(layer(x), expected)  # the same kernel reads the same numbers


def test_the_dense_form_of_a_quantized_layer_is_masked() -> None:
    layer, mask = masked("nf4", in_features=128)
    x = torch.randn(5, 128)
    expected = layer(x)
    assert not layer.dequantize()[~mask.mask()].any()
    assert type(layer.dequantize_()) is MaskedLinear
    assert float((layer(x) - expected).norm() / expected.norm()) < 5e-6
    assert type(release_(layer)) is nn.Linear


# ---- state dicts, copies, moves


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_dict_holds_weight_and_mask(kind: str) -> None:
    layer, mask = masked(kind)
    other = mask_(make(kind), random_mask((35, 96), 0.9, seed=7))
    assert {"weight", "bias", "weight_mask.bits"} <= layer.state_dict().keys()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 96)
    assert torch.equal(other(x), layer(x))
    loaded = mask_of(other)
    assert loaded is not None and torch.equal(loaded.bits, mask.bits)


def test_a_loaded_mask_of_other_places_has_no_pattern() -> None:
    scores = torch.randn(35, 96)
    layer = mask_(make("dense"), group_mask(scores, (2, 4)))
    same = copy.deepcopy(layer)
    same.load_state_dict(layer.state_dict())
    layer.load_state_dict(masked("dense")[0].state_dict())
    masks = mask_of(same), mask_of(layer)
    assert [mask.pattern for mask in masks if mask is not None] == [(2, 4), None]


def test_a_mask_of_another_shape_is_not_loaded() -> None:
    layer, _ = masked("dense")
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(masked("dense", in_features=64)[0].state_dict())


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_copies_are_masked_layers_of_their_own(kind: str, how: Any) -> None:
    layer, _ = masked(kind)
    twin = how(layer)
    x = torch.randn(5, 96)
    assert type(twin) is type(layer) and torch.equal(twin(x), layer(x))
    twin.weight_mask.bits.zero_()
    assert not torch.equal(twin(x), layer(x))


def test_casts_leave_the_bits() -> None:
    layer, mask = masked("nf4")
    layer.to(torch.bfloat16)
    assert torch.equal(layer.weight_mask.bits, mask.bits) and layer(torch.randn(2, 96).bfloat16()).isfinite().all()


# ---- refusals


def test_refusals_leave_the_layer_as_it_was() -> None:
    layer = make("dense")
    with pytest.raises(ValueError, match=r"\[35, 96\], got \[96, 35\]"):
        mask_(layer, random_mask((96, 35), 0.5, seed=1))
    with pytest.raises(ValueError, match="mask on meta"):
        mask_(layer, random_mask((35, 96), 0.5, seed=1).to("meta"))
    with pytest.raises(TypeError, match="must be a masked one, got Linear"):
        release_(layer)
    assert type(layer) is nn.Linear and not layer._modules
    masked_layer, mask = masked("dense")
    with pytest.raises(TypeError, match="got MaskedLinear"):
        mask_(masked_layer, mask)
    with pytest.raises(TypeError, match=r"mask_\(layer, mask\)"):
        MaskedLinear(3, 4)
    with pytest.raises(ValueError, match="keep_zeros=True"):
        masked("nf4")[0].merge_(torch.zeros(35, 96))
    assert under_mask(nn.Conv1d) is nn.Conv1d
