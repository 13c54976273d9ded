"""merge and unmerge: the numbers of the forward with the delta, and the bits from before."""

from __future__ import annotations

import copy

import pytest
import torch
from sparse_models import error, llama, lora, outputs, random_deltas
from torch import Tensor, nn

from peftkern.formats import SparseIndices
from peftkern.ops import dequantize, quantize
from peftkern.patch import patch
from peftkern.sparse import attach, deltas, detach, disabled, merge, unmerge


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "sparse_deltas" not in name}


def same_weights(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = weights(model)
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


def with_values(model: nn.Module, name: str = "default", seed: int = 3, scaling: float = 0.5) -> nn.Module:
    for delta in attach(model, random_deltas(model, 0.1, seed), name, scaling=scaling).values():
        nn.init.normal_(delta.values, std=0.05)
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_merged_forward_is_the_forward_with_the_delta(dtype: torch.dtype, tolerance: float) -> None:
    model = with_values(llama(dtype=dtype))
    before, expected = weights(model), outputs(model)
    with disabled(model):
        without = outputs(model)
    errors = merge(model)
    assert list(errors) == list(deltas(model)) and set(errors.values()) == {0.0}
    assert error(outputs(model), expected) <= tolerance < error(without, expected)
    with disabled(model):
        assert error(outputs(model), expected) <= tolerance  # it is in the weight now
    unmerge(model)
    assert same_weights(model, before) and torch.equal(outputs(model), expected)


def test_merged_entries_are_rounded_once() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False)).bfloat16()
    model[0].weight.data = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.bfloat16)
    indices = SparseIndices.from_flat(torch.tensor([1, 5]), (2, 3))
    attach(model, {"0": indices}, values={"0": torch.tensor([0.25, 2.0**-8])}, scaling=2.0)
    merge(model)
    # 6 + 2 / 256 is nearer to 6 than to the next number of bfloat16, 6.03125
    assert model[0].weight.tolist() == [[1.0, 2.5, 3.0], [4.0, 5.0, 6.0]]


def test_overlapping_deltas_are_unmerged_in_reverse() -> None:
    model = with_values(with_values(llama(), "a", 1), "b", 2)
    before, expected = weights(model), outputs(model)
    merge(model, "a")
    merge(model, "b")
    assert error(outputs(model), expected) <= 5e-6
    with pytest.raises(ValueError, match=r"'b' was merged into .* after 'a'; unmerge it first"):
        unmerge(model, "a")
    unmerge(model, "b")
    unmerge(model, "a")
    assert same_weights(model, before)


def test_unmerging_notices_that_the_weight_has_changed() -> None:
    model = with_values(llama())
    merge(model)
    name = "model.layers.1.mlp.down_proj"
    delta, weight = deltas(model)[name], model.get_submodule(name).weight
    row, column = delta.indices.row_of_entries()[3], delta.indices.columns[3]
    weight.data[row, column] += 1
    after = weights(model)
    with pytest.raises(ValueError, match=rf"the weight of {name} has been changed since 'default' was merged"):
        unmerge(model)
    assert same_weights(model, after) and all(delta.merged for delta in deltas(model).values())


def test_casts_between_merge_and_unmerge() -> None:
    model = with_values(llama())
    plain = copy.deepcopy(model).bfloat16()
    merge(model)
    model.bfloat16()
    unmerge(model)
    assert same_weights(model, weights(plain))


def test_copies_of_a_merged_model_are_unmerged_on_their_own() -> None:
    model = with_values(llama("nf4"))
    before = weights(model)
    merge(model, requantize=True)
    twin = copy.deepcopy(model)
    unmerge(twin)
    assert same_weights(twin, before) and not same_weights(model, before)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_under_lora_and_patched(base: str, patched: bool) -> None:
    model = with_values(lora(llama(base)))
    if patched:
        patch(model)
    before, expected = weights(model), outputs(model)
    merge(model, requantize=True)
    assert error(outputs(model), expected) <= (0.3 if base == "nf4" else 5e-6)
    unmerge(model)
    assert same_weights(model, before)
    assert torch.equal(outputs(model), expected)


# ---- quantized


def test_quantized_weights_refuse_and_say_what_to_do() -> None:
    model = with_values(llama("nf4"))
    before = weights(model)
    with pytest.raises(ValueError, match=r"is quantized.*keep the delta attached.*requantize=True"):
        merge(model)
    assert same_weights(model, before) and not any(delta.merged for delta in deltas(model).values())


@pytest.mark.parametrize("requantize", [False, True])
def test_bitsandbytes_refuses(requantize: bool) -> None:
    model = with_values(llama("bnb-nf4"))
    with pytest.raises(ValueError, match=r"is a Linear4bit, whose weight has no single entries.*peftkern.QuantConfig"):
        merge(model, requantize=requantize)


def test_requantizing_reports_its_error() -> None:
    model = with_values(llama("nf4"))
    before = weights(model)
    wanted = {}
    for name, delta in deltas(model).items():
        dense = 0.5 * delta.indices.to_dense(delta.values.detach())
        wanted[name] = model.get_submodule(name).dequantize(torch.float32) + dense
    errors = merge(model, requantize=True)
    for name, total in wanted.items():
        layer = model.get_submodule(name)
        now = dequantize(quantize(total, "nf4", 64, True), torch.float32)
        assert torch.equal(layer.dequantize(torch.float32), now)
        assert errors[name] == pytest.approx(error(now, total), rel=1e-4) and errors[name] > 1e-3
    unmerge(model)
    assert same_weights(model, before)


def test_replacing_a_requantized_weight_is_noticed() -> None:
    model = with_values(llama("nf4"))
    merge(model, requantize=True)
    layer = model.model.layers[0].mlp.up_proj
    layer.merge_(torch.zeros(192, 64))
    with pytest.raises(ValueError, match="has been changed since"):
        unmerge(model)


# ---- what is refused


def test_a_merge_that_fails_in_the_middle_changes_nothing() -> None:
    model = with_values(llama())
    list(deltas(model).values())[-1].values.data[0] = float("inf")
    before = weights(model)
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj is not finite; nothing was changed"):
        merge(model)
    assert same_weights(model, before) and not any(delta.merged for delta in deltas(model).values())
    quantized = with_values(llama("nf4"))
    last = list(deltas(quantized).values())[-1]
    last.values.data[0], last.scaling = 3e38, 4.0  # the product is not finite, which the last layer finds out
    before = weights(quantized)
    with pytest.raises(ValueError, match="finite"):
        merge(quantized, requantize=True)
    assert same_weights(quantized, before) and not any(delta.merged for delta in deltas(quantized).values())


def test_a_tied_weight_is_refused() -> None:
    model = llama(tied=True)
    attach(model, {"lm_head": SparseIndices.empty((96, 64))})
    with pytest.raises(ValueError, match=r"lm_head shares its weight with model.embed_tokens"):
        merge(model)


def test_merging_twice_and_unmerging_what_is_not_merged() -> None:
    model = with_values(llama())
    with pytest.raises(ValueError, match="is not merged into"):
        unmerge(model)
    merge(model)
    with pytest.raises(ValueError, match=r"is merged into .* already"):
        merge(model)


def test_a_merged_delta_has_no_state_dict_and_takes_no_other_entries() -> None:
    model = with_values(llama())
    state = model.state_dict()
    merge(model)
    with pytest.raises(RuntimeError, match="is merged into the weight, and would act twice when loaded"):
        model.state_dict()
    with pytest.raises(RuntimeError, match="the delta is merged into the weight; unmerge it first"):
        model.load_state_dict(state)
    unmerge(model)
    model.load_state_dict(state)


def test_detach_keeps_merged_weights_only_when_asked_to() -> None:
    model = with_values(llama())
    merge(model)
    expected, keys = outputs(model), list(llama().state_dict())
    with pytest.raises(ValueError, match="is merged into 14 layers; unmerge"):
        detach(model)
    detach(model, keep_merged=True)
    assert torch.equal(outputs(model), expected) and list(model.state_dict()) == keys
