"""Presets and ranges of layers: what is trained, how far the error goes down, and that the rest keeps its bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
import pytest
from select_models import batches, build, changed, llama, values
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

from peftkern.optim import AdamW
from peftkern.select.policy import Policy
from peftkern.select.presets import PARTS, FreezeLower, LayerRange, Preset, find_blocks


def trained_and_counted(model: Any, policy: Policy) -> tuple[set[str], list[int]]:
    """Names in the state dict whose bits change in three steps, and which blocks the error came to in the last one."""
    policy.prepare(model)
    policy.start(AdamW(policy.parameters(), lr=0.01, weight_decay=0.1))
    before = values(model)
    first, second, last = batches(3)
    policy.step(model, first)
    policy.step(model, second)
    seen: list[int] = []
    for index, name in enumerate(find_blocks(model)):
        model.get_submodule(name).register_full_backward_hook(lambda *_, index=index: seen.append(index))
    policy.step(model, last)
    return changed(model, before), sorted(seen)


def bert(**changes: Any) -> Any:
    return build(BertForSequenceClassification, BertConfig, num_hidden_layers=3, num_labels=2, **changes)


def names_of(model: Any) -> set[str]:
    return {name for name, _ in model.named_parameters()}


# ---- what the backward pass goes through, with weight decay and momentum on


def test_the_last_block_ends_the_backward_pass() -> None:
    model = llama(num_hidden_layers=3)
    names, blocks = trained_and_counted(model, Preset("last_block"))
    assert names == {name for name in names_of(model) if "layers.2." in name}
    assert blocks == [2]


def test_head_only_has_no_backward_pass_through_blocks() -> None:
    model = llama(num_hidden_layers=3, tie_word_embeddings=False)
    names, blocks = trained_and_counted(model, Preset("head"))
    assert names == {"lm_head.weight"}
    assert blocks == []


def test_embeddings_and_head_need_the_error_all_the_way_down() -> None:
    model = llama(num_hidden_layers=3, tie_word_embeddings=False)
    names, blocks = trained_and_counted(model, Preset("embeddings", "head"))
    assert names == {"lm_head.weight", "model.embed_tokens.weight"}
    assert blocks == [0, 1, 2]


def test_tied_embeddings_and_head_have_both_contributions() -> None:
    model, dense = llama(num_hidden_layers=3), llama(num_hidden_layers=3)
    (batch,) = batches(1)
    dense(**batch).loss.backward()
    policy = Preset("embeddings", "head")
    policy.prepare(model)
    policy.start(AdamW(policy.parameters()))
    model(**batch).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == {"model.embed_tokens.weight"}
    assert gradients["model.embed_tokens.weight"].equal(dense.model.embed_tokens.weight.grad)


def test_a_tied_head_by_itself_is_refused() -> None:
    model = llama()
    policy = Preset("head")
    with pytest.raises(ValueError, match=r"head and embeddings in one.*untie"):
        policy.prepare(model)
    policy.prepare(llama(tie_word_embeddings=False))  # nothing is left of the first


def test_frozen_lower_layers_end_the_backward_pass() -> None:
    model = llama(num_hidden_layers=4, tie_word_embeddings=False)
    names, blocks = trained_and_counted(model, FreezeLower(3))
    assert names == {n for n in names_of(model) if "layers.3." in n or n in ("model.norm.weight", "lm_head.weight")}
    assert blocks == [3]


def test_a_head_that_is_tied_to_frozen_embeddings_is_frozen() -> None:
    model = llama(num_hidden_layers=2)
    names, blocks = trained_and_counted(model, FreezeLower(1))
    assert names == {name for name in names_of(model) if "layers.1." in name or name == "model.norm.weight"}
    assert blocks == [1]


# ---- what the parts are


@pytest.mark.parametrize(
    ("part", "endings"),
    [
        ("biases", ["bias"]),
        ("norms", ["LayerNorm.weight", "LayerNorm.bias"]),
        ("head", ["classifier.weight", "classifier.bias"]),
        ("embeddings", ["embeddings.weight"]),
        ("all", [""]),
    ],
)
def test_parts_of_bert(part: str, endings: Sequence[str]) -> None:
    model = bert()
    policy = Preset(part)
    policy.prepare(model)
    assert set(policy.select().names) == {name for name in names_of(model) if name.endswith(tuple(endings))}


def test_parts_of_gpt2() -> None:
    model = build(GPT2LMHeadModel, GPT2Config, n_embd=32, n_layer=2, n_head=4)
    assert PARTS["norms"](model) == {name for name in names_of(model) if "ln_" in name}
    assert PARTS["embeddings"](model) == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert PARTS["head"](model) == {"transformer.wte.weight"}
    assert PARTS["last_block"](model) == {name for name in names_of(model) if ".h.1." in name}


def test_parts_together() -> None:
    policy = Preset("biases", "head")
    model = bert()
    policy.prepare(model)
    assert set(policy.select().names) == PARTS["biases"](model) | {"classifier.weight"}


def test_of_adapters_those_of_the_last_block_are_trained() -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "up_proj"]))
    policy = Preset("last_block")
    policy.prepare(model)
    assert len(policy.select().names) == 4
    assert all("layers.1." in name and "lora_" in name for name in policy.select().names)


def test_a_range_of_layers() -> None:
    def layers(*arguments: int) -> set[str]:
        model = llama(num_hidden_layers=4)
        policy = LayerRange(*arguments)
        policy.prepare(model)
        return {name.split(".")[2] for name in policy.select().names}

    assert layers(1, 3) == {"1", "2"}
    assert layers(-1) == {"3"}
    assert layers(0, -1) == {"0", "1", "2"}


def test_frozen_lower_layers_of_bert_hold_the_norm_of_its_embeddings() -> None:
    model = bert()
    policy = FreezeLower(2)
    policy.prepare(model)
    expected = {n for n in names_of(model) if "layer.2." in n or n.startswith(("bert.pooler", "classifier"))}
    assert set(policy.select().names) == expected


def test_the_trainer_runs_a_preset(tmp_path: Any) -> None:
    model = llama(num_hidden_layers=3)
    before = values(model)
    rows = [{name: tensor[0] for name, tensor in batch.items()} for batch in batches(4)]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, num_train_epochs=1, report_to=[], use_cpu=True, weight_decay=0.1
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[Preset("last_block")]).train()
    assert changed(model, before) == {name for name in names_of(model) if "layers.2." in name}
    assert all(parameter.requires_grad for parameter in model.parameters())


# ---- what is refused


@pytest.mark.parametrize("parts", [(), ("tail",), ("head", "tail")])
def test_unknown_parts_are_refused(parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="parts must be some of"):
        Preset(*parts)


def test_parts_that_are_not_there_are_refused() -> None:
    policy = Preset("biases")
    with pytest.raises(ValueError, match="'biases' has no parameter"):
        policy.prepare(llama())
    policy = LayerRange(5, 7)
    with pytest.raises(ValueError, match="has 2 blocks, and none of those from 5 to 7"):
        policy.prepare(llama())
    with pytest.raises(ValueError, match="at least 0, got -1"):
        FreezeLower(-1)
