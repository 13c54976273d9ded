"""The fingerprint of a base model: the same however it is loaded, another for every other model."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import torch
from sparse_models import llama, lora, random_deltas
from torch import nn
from transformers import AutoModelForTokenClassification, GPT2Config, GPT2LMHeadModel

from peftkern import QuantConfig, quantize_
from peftkern.integrations.fingerprint import Fingerprint, base_of, difference_to_base
from peftkern.sparse import attach


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", ["dense", "nf4", "int8", "bnb-nf4"])
def test_equal_in_every_format_and_dtype(base: str, dtype: torch.dtype) -> None:
    first, second = Fingerprint.of(llama()), Fingerprint.of(llama(base, dtype=dtype))
    assert first.difference(second) is None and second.difference(first) is None


def test_equal_under_adapters_deltas_and_another_head(tmp_path: Any) -> None:
    first = Fingerprint.of(llama())
    adapted = lora(llama(), target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"])
    attach(adapted, random_deltas(adapted))
    assert first.difference(Fingerprint.of(adapted)) is None
    llama().save_pretrained(tmp_path)
    assert first.difference(Fingerprint.of(AutoModelForTokenClassification.from_pretrained(tmp_path))) is None


def test_conv1d_counts_like_the_layer_that_it_is_quantized_to() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4))
    first = Fingerprint.of(model)
    quantize_(model, QuantConfig("nf4"))
    assert first.difference(Fingerprint.of(model)) is None


def change(tensor: torch.Tensor, factor: float) -> None:
    with torch.no_grad():
        tensor.mul_(factor)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda model: change(model.model.embed_tokens.weight, 1.1), "embed_tokens.weight holds other numbers"),
        (lambda model: change(model.model.embed_tokens.weight, 1.004), r"\d+ of \d+ sampled numbers differ a little"),
        (lambda model: change(model.model.norm.weight[7:9], 1.1), "norm.weight holds other numbers"),
        (lambda model: model.resize_token_embeddings(100), r"embed_tokens.weight is \[96, 64\] in one and \[100, 64\]"),
        (lambda model: model.model.layers.append(copy.deepcopy(model.model.layers[0])), "linear layers differ"),
        (lambda model: setattr(model.model, "more", nn.LayerNorm(4)), "embeddings, norms and biases differ in number"),
        (
            lambda model: setattr(model, "model", nn.Sequential(model.model)),
            "one is a LlamaModel, the other a Sequential",
        ),
    ],
)
def test_another_model_is_told_apart(changed: Any, message: str) -> None:
    model = llama()
    changed(model)
    difference = Fingerprint.of(llama()).difference(Fingerprint.of(model))
    assert difference is not None
    assert re.search(message, difference), difference


def test_another_seed_is_another_model() -> None:
    assert (
        Fingerprint.of(llama()).difference(Fingerprint.of(llama(seed=2))) == "embed_tokens.weight holds other numbers"
    )


def test_heads_do_not_count() -> None:
    model = llama()
    change(model.lm_head.weight, 2.0)
    assert Fingerprint.of(llama()).difference(Fingerprint.of(model)) is None


def test_the_base_is_remembered_from_before_training() -> None:
    model, base = llama(), Fingerprint.of(llama())
    attach(model, random_deltas(model))
    change(model.model.norm.weight, 1.5)
    assert base.difference(Fingerprint.of(model)) is not None
    assert base.difference(base_of(model)) is None and difference_to_base(base, model) is None
    assert difference_to_base(Fingerprint.of(llama(seed=2)), model) is not None


def test_survives_json() -> None:
    first = Fingerprint.of(llama())
    read = Fingerprint.from_dict(json.loads(json.dumps(first.to_dict())))
    assert read.difference(first) is None
    assert (read.model, read.architecture, read.layers) == (first.model, "LlamaModel", first.layers)
    assert first.layers.startswith("14 ")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("layers"),
        lambda data: data.update(architecture=3),
        lambda data: data.update(samples=[1, 2]),
        lambda data: data["samples"]["norm.weight"].update(shape=[-1]),
        lambda data: data["samples"]["norm.weight"].update(shape=[2, 3, 4]),
        lambda data: data["samples"]["norm.weight"].update(shape="ab"),
        lambda data: data["samples"]["norm.weight"].update(bfloat16="AAAA"),
        lambda data: data["samples"]["norm.weight"].update(bfloat16="not base64!"),
        lambda data: data["samples"].update({"norm.weight": None}),
    ],
)
def test_damaged_data_is_an_error(damage: Any) -> None:
    data = Fingerprint.of(llama()).to_dict()
    damage(data)
    with pytest.raises(ValueError, match="the fingerprint of the base model cannot be read"):
        Fingerprint.from_dict(data)


def test_the_meta_device_has_no_numbers() -> None:
    with pytest.raises(ValueError, match="on the meta device; load its weights first"):
        Fingerprint.of(nn.Linear(2, 2, device="meta"))


def test_a_model_of_linear_layers_alone() -> None:
    first, second = nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2))
    assert Fingerprint.of(first).difference(Fingerprint.of(second)) == "0.bias holds other numbers"
    change(second[0].weight, 3.0)
    second[0].bias = first[0].bias
    assert Fingerprint.of(first).difference(Fingerprint.of(second)) is None
