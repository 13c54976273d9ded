"""attach, detach and what switches deltas, on models with and without PEFT."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from sparse_models import classes, error, llama, lora, outputs, random_deltas, text
from torch import nn

from peftkern.formats.sparse_indices import SparseIndices
from peftkern.nn.sparse_linear import deltas_of
from peftkern.sparse import attach, deltas, detach, disabled, linear_layers, set_active

LINEAR = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def all_linear_names(prefix: str = "model.") -> list[str]:
    return [f"{prefix}layers.{layer}.{name}" for layer in range(2) for name in LINEAR]


@pytest.mark.parametrize("base", ["dense", "nf4", "bnb-nf4"])
def test_deltas_on_all_linear_layers(base: str) -> None:
    model = llama(base)
    expected, was = outputs(model), classes(model)
    attached = attach(model, random_deltas(model))
    assert list(attached) == all_linear_names() and deltas(model) == attached
    assert torch.equal(outputs(model), expected)  # values start from zero
    model(**text()).loss.backward()
    assert all(delta.values.grad is not None and delta.values.grad.any() for delta in attached.values())
    detach(model)
    assert classes(model) == was and torch.equal(outputs(model), expected)


def test_attach_freezes_the_weights_it_covers_and_detach_gives_them_back() -> None:
    model = llama()
    name = "model.layers.0.mlp.up_proj"
    other = {key: p.requires_grad for key, p in model.named_parameters() if name not in key}
    attach(model, {name: SparseIndices.empty((192, 64))}, "one")
    attach(model, {name: SparseIndices.empty((192, 64))}, "two")
    assert not model.get_submodule(name).weight.requires_grad
    assert {key: p.requires_grad for key, p in model.named_parameters() if name not in key} == other
    detach(model, "one")
    assert not model.get_submodule(name).weight.requires_grad
    detach(model, "two")
    assert model.get_submodule(name).weight.requires_grad


def test_frozen_weights_stay_bit_identical_under_decay_and_momentum() -> None:
    model = llama()
    attach(model, random_deltas(model))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert len(before) == 14
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        model(**text()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())


def test_several_deltas_are_switched_by_name() -> None:
    model = llama()
    expected = {(): outputs(model)}
    for seed, name in enumerate(("a", "b")):
        for delta in attach(model, random_deltas(model, seed=seed), name).values():
            nn.init.normal_(delta.values, std=0.05)
    for names in (("a",), ("b",), ("a", "b")):
        set_active(model, names)
        expected[names] = outputs(model)
        with disabled(model):
            assert torch.equal(outputs(model), expected[()])
        assert torch.equal(outputs(model), expected[names])
    assert error(expected["a",], expected["b",]) > 1e-4 < error(expected["a", "b"], expected["b",])
    set_active(model, "a")
    assert torch.equal(outputs(model), expected["a",])


# ---- over PEFT


@pytest.mark.parametrize("base", ["dense", "nf4", "bnb-nf4"])
def test_a_lora_layers_name_means_the_layer_beneath(base: str) -> None:
    model = lora(llama(base))
    expected = outputs(model)
    names = all_linear_names("base_model.model.model.")
    layers = linear_layers(model)
    assert list(layers) == names and all(isinstance(layer, peft.tuners.lora.LoraLayer) for layer in layers.values())
    attached = attach(model, random_deltas(model))
    assert list(deltas(model)) == names
    assert torch.equal(outputs(model), expected)
    for delta in attached.values():
        nn.init.normal_(delta.values, std=0.05)
    both = outputs(model)
    assert error(both, expected) > 1e-4
    with disabled(model):
        assert torch.equal(outputs(model), expected)
    with model.disable_adapter():
        assert error(outputs(model), both) > 1e-4
    layer = model.get_submodule(names[0])
    x = torch.randn(3, 64)
    delta = attached[names[0]]
    with disabled(model):
        alone = layer(x)
    assert error(layer(x), alone.double() + x.double() @ delta.indices.to_dense(delta.values.double()).t()) <= 5e-6


def test_pefts_merge_unmerge_and_save_work_over_deltas(tmp_path: Path) -> None:
    model = lora(llama())
    for delta in attach(model, random_deltas(model)).values():
        nn.init.normal_(delta.values, std=0.05)
    expected = outputs(model)
    model.merge_adapter()
    assert error(outputs(model), expected) <= 5e-5
    model.unmerge_adapter()
    assert error(outputs(model), expected) <= 5e-5
    model.save_pretrained(tmp_path)
    fresh = peft.PeftModel.from_pretrained(llama(), tmp_path)
    with disabled(model):
        assert error(outputs(fresh), outputs(model)) <= 5e-5
    merged = model.merge_and_unload()
    assert len(deltas(merged)) == 14
    assert error(outputs(merged), expected) <= 5e-5


def test_adapters_are_put_over_layers_that_have_deltas() -> None:
    model = llama()
    attach(model, random_deltas(model))
    adapted = lora(model)
    assert list(deltas(adapted)) == all_linear_names("base_model.model.model.")


# ---- transformers and Trainer


def test_state_dict_round_trip_of_a_model() -> None:
    model, twin = llama(), llama()
    keys = list(model.state_dict())
    for delta in attach(model, random_deltas(model, 0.1)).values():
        nn.init.normal_(delta.values, std=0.05)
    assert [key for key in model.state_dict() if "sparse_deltas" not in key] == keys
    attach(twin, random_deltas(twin, 0.02))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(outputs(twin), outputs(model))


def test_saves_with_save_pretrained_even_where_deltas_share_an_index_set(tmp_path: Path) -> None:
    model = llama()
    indices = random_deltas(model)
    attach(model, indices, "one")
    attach(model, indices, "two")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_copies_of_a_model_are_their_own() -> None:
    model = lora(llama("nf4"))
    attach(model, random_deltas(model))
    twin, expected = copy.deepcopy(model), outputs(model)
    for delta in deltas(twin).values():
        nn.init.normal_(delta.values)
    assert torch.equal(outputs(model), expected) and not torch.equal(outputs(twin), expected)


# ---- what is refused, and leaves the model as it was


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.second = nn.Linear(4, 3)
        self.same = self.first
        self.attention = nn.MultiheadAttention(4, 2)


FITTING = SparseIndices.from_flat(torch.tensor([0, 5]), (3, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"indices": {"first": FITTING, "secnd": FITTING}}, "'secnd' is no module .* it has second"),
        ({"indices": {"first": FITTING, "attention": FITTING}}, "'attention' is a MultiheadAttention, not a linear"),
        ({"indices": {"first": FITTING, "same": FITTING}}, "first and same are one layer"),
        ({"indices": {"second": FITTING, "first": SparseIndices.empty((4, 3))}}, r"first is \[3, 4\], its indices"),
        (
            {"indices": {"second": FITTING, "attention.out_proj": SparseIndices.empty((4, 4))}},
            "part of a MultiheadAttention, which computes with its weight without calling it",
        ),
        ({"indices": {"first": FITTING}, "values": {}}, "values must have the keys of indices; missing: first"),
        ({"indices": {"first": FITTING}, "values": {"first": torch.zeros(3)}}, r"values of first must be \[2\]"),
        ({"indices": {"first": FITTING}, "name": "a.b"}, "name must be a word without dots, got 'a.b'"),
        ({"indices": {"first": FITTING}, "dtype": torch.int8}, "dtype must be float64"),
    ],
)
def test_attach_refuses_and_changes_nothing(arguments: dict[str, Any], message: str) -> None:
    model = Bilinear()
    was, keys = classes(model), list(model.state_dict())
    with pytest.raises((ValueError, TypeError), match=message):
        attach(model, **arguments)
    assert classes(model) == was and list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_second_delta_of_the_same_name_is_refused() -> None:
    model = Bilinear()
    attach(model, {"first": FITTING})
    with pytest.raises(ValueError, match="first has a delta called 'default'; give this one another name"):
        attach(model, {"second": FITTING, "first": FITTING})
    assert list(deltas(model)) == ["first"]


def test_a_forward_on_the_instance_is_refused() -> None:
    model = Bilinear()
    accelerate.hooks.add_hook_to_module(model.first, accelerate.hooks.AlignDevicesHook("cpu"))
    with pytest.raises(ValueError, match=r"first was replaced on the instance .* without a device_map"):
        attach(model, {"first": FITTING})


def test_an_unknown_delta_is_an_error_that_lists_those_there() -> None:
    model = Bilinear()
    for function in (detach, deltas, set_active):
        with pytest.raises(ValueError, match="no sparse delta called 'b'; it has none at all"):
            function(model, "b")
    attach(model, {"first": FITTING}, "a")
    for function in (detach, deltas, set_active):
        with pytest.raises(ValueError, match=r"no sparse delta called 'b'; it has \['a'\]"):
            function(model, "b")
    with pytest.raises(ValueError, match="called 'b'"):
        set_active(model, ["a", "b"])
    assert deltas(model, "a")["first"].active


# ---- linear_layers


def test_linear_layers_leaves_output_embeddings_out() -> None:
    model = llama()
    assert list(linear_layers(model)) == all_linear_names()
    assert list(linear_layers(model, ["lm_head"])) == ["lm_head"]
    assert list(linear_layers(model, ["q_proj", "mlp.up_proj"])) == [
        name for name in all_linear_names() if "q_proj" in name or "up_proj" in name
    ]
    assert list(linear_layers(model, r".*\.1\..*q_proj")) == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("targets", [["q_proj", "nothing"], "nothing", []])
def test_targets_that_match_nothing_are_an_error(targets: Any) -> None:
    with pytest.raises(ValueError, match=r"linear_layers: (targets names layers.*: nothing|no linear layer matches)"):
        linear_layers(llama(), targets)


def test_linear_layers_of_a_plain_module() -> None:
    assert list(linear_layers(Bilinear())) == ["first", "second", "attention.out_proj"]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, peftkern.sparse; print(sorted({'transformers', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_deltas_of_a_layer_without_any() -> None:
    assert deltas_of(nn.Linear(2, 2)) == {}
