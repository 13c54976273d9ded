"""A word for each decoder layer: what the layers keep by it, that nothing else changes, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from model_families import FAMILIES
from patch_models import assert_same_run, classes, error, llama, lora, run, text
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from peftkern.patch import patch, unpatch, verify
from peftkern.patch.layer_plan import TEXTS, in_words

EXACT = ("store", "up", "mlp", "layer")
ROUNDED = {"int8": 5e-2, "float16": 2e-3}
"""Relative error of the gradients; measured 2.2e-2 and 6e-4."""


def adapted(base: str = "nf4", **options: Any) -> Any:
    return lora(llama(base), r=4, **options)


def layer_rows(report: Any) -> list[Any]:
    return [row for row in report.rows if row.kind.endswith(("DecoderLayer", "Block"))]


def kept_elements(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Numbers that a forward pass keeps, parameters aside; each storage counts once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in parameters and tensor.is_floating_point():
            kept[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in kept.values())


# ---- what they compute


@pytest.mark.parametrize("base", ["nf4", "bnb-nf4-double"])
@pytest.mark.parametrize("plan", [("layer", "store"), ("mlp", "up"), ("mlp", "layer"), ("layer", "layer")])
def test_the_numbers_of_an_ordinary_patch(base: str, plan: Sequence[str]) -> None:
    model = adapted(base, lora_dropout=0.2)
    patch(model)
    torch.manual_seed(6)
    expected = run(model, text())
    patch(model, recompute=plan)
    torch.manual_seed(6)
    assert_same_run(model, text(), expected, tolerance=0.0)


def test_autocast_and_accumulated_gradients() -> None:
    model, found = adapted(lora_dropout=0.2), []
    for plan in (("store", "store"), ("layer", "mlp")):
        patch(model, recompute=plan)
        torch.manual_seed(6)
        with torch.autocast("cpu", torch.bfloat16):
            for seed in (3, 4):
                model(**text(seed=seed)).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    # under autocast a block casts what it recomputes once, where its layers cast it one by one
    assert max(error(found[1][name], gradient) for name, gradient in found[0].items()) <= 2e-2


def test_whole_layers_under_autocast_have_the_same_bits() -> None:
    model, found = adapted(lora_dropout=0.2), []
    for plan in (("store", "store"), ("layer", "store")):
        patch(model, recompute=plan)
        torch.manual_seed(6)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(run(model, text())[1])
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


@pytest.mark.parametrize("form", ROUNDED)
def test_rounded_layers(form: str) -> None:
    model = adapted()
    patch(model)
    batch = text(4, 32)
    logits, exact = run(model, batch)
    patch(model, recompute=[form, "store"])
    found_logits, found = run(model, batch)
    assert torch.equal(found_logits, logits)
    errors = {name: error(found[name], gradient) for name, gradient in exact.items()}
    # what is above the rounded layer does not see it
    assert all(".layers.0." in name for name, value in errors.items() if value > 0)
    assert 0 < max(errors.values()) <= ROUNDED[form]


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bloom", "mixtral"])
def test_layers_of_other_families(family: str) -> None:
    dropout = 0.0 if FAMILIES[family].parameters else 0.2  # PEFT has none for adapters on parameters
    model, batch = FAMILIES[family].with_lora("dense", lora_dropout=dropout), FAMILIES[family].batch()
    patch(model)
    torch.manual_seed(6)
    expected = run(model, batch)
    report = patch(model, recompute=["layer", "store"])
    rows = zip(layer_rows(report), report.layers, strict=True)
    assert [TEXTS[word] in row.reason for row, word in rows] == [True] * 2
    torch.manual_seed(6)
    assert_same_run(model, batch, expected, tolerance=0.0)
    assert kept_elements(model, batch) > 0


def test_compiled_layers_follow_as_well() -> None:
    model, batch = adapted(), text(4, 32)
    layers = model.base_model.model.model.layers
    model.base_model.model.set_attn_implementation("eager")  # under a compiler attention is PyTorch's, of other bits
    patch(model, recompute=["layer", "int8"])
    expected = run(model, batch)
    torch._dynamo.reset()
    layers[0].compile(backend="eager")
    assert_same_run(model, batch, expected, tolerance=0.0)


# ---- what they keep


def test_each_layer_keeps_what_its_word_says() -> None:
    model, batch = adapted(), text()
    kept = {}
    for word in EXACT:
        patch(model, recompute=[word, "store"])
        kept[word] = kept_elements(model, batch)
    # beside gate and up a little that only some of them keep: h and seeds
    width, little = 14 * model.config.intermediate_size, 14 * 8
    assert kept["store"] - kept["up"] == pytest.approx(width, abs=little)
    assert kept["up"] - kept["mlp"] == pytest.approx(width, abs=little)
    assert kept["layer"] < kept["mlp"] - 4 * 14 * model.config.hidden_size
    patch(model, recompute=["mlp", "layer"])
    mixed = kept_elements(model, batch)
    patch(model, recompute=["store", "layer"])
    assert kept_elements(model, batch) - mixed == pytest.approx(2 * width, abs=2 * little)


def test_whole_layers_do_without_the_cache(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    patch(model)
    expected = run(model, text())
    patch(model, recompute=["layer", "layer"])
    assert model.config.use_cache
    assert_same_run(model, text(), expected, tolerance=0.0)
    assert "does without its cache" in caplog.text


def test_evaluation_runs_without_the_plan() -> None:
    model = adapted()
    patch(model, recompute=["layer", "int8"])
    with torch.no_grad():
        trained = model(**text(), use_cache=True)
    assert trained.past_key_values.get_seq_length() == 7
    assert model.eval().generate(text()["input_ids"], max_new_tokens=2, do_sample=False).shape == (2, 9)


# ---- what the report says, and how long it holds


def test_the_report_says_it_by_layer() -> None:
    report = patch(adapted(), recompute=["mlp", "layer"])
    assert report.layers == ("mlp", "layer") == tuple(report.to_dict()["layers"])
    assert [row.reason.split("; ")[-1] for row in layer_rows(report)] == [TEXTS["mlp"], TEXTS["layer"]]
    assert "layers 0: mlp, 1: layer" in str(report)
    assert in_words(["mlp"] * 12 + ["store"] * 4) == "layers 0-11: mlp, 12-15: store"


def test_it_holds_until_unpatch_or_another_one() -> None:
    model, batch = adapted(), text()
    before = classes(model)
    patch(model)
    stored = kept_elements(model, batch)
    patch(model, recompute=["mlp", "layer"])
    kept = kept_elements(model, batch)
    assert patch(model).layers == ("mlp", "layer") and kept_elements(model, batch) == kept
    assert patch(model, recompute="mlp").layers == ()
    assert kept < kept_elements(model, batch) < stored
    assert patch(model, recompute=["store", "store"]).layers == ("store", "store")
    assert kept_elements(model, batch) == stored
    unpatch(model)
    assert classes(model) == before
    assert patch(model).layers == () and kept_elements(model, batch) == stored


def test_unpatch_restores_layers_that_only_the_plan_took() -> None:
    model = FAMILIES["gpt2"].with_lora("dense")
    before, expected = classes(model), run(model, FAMILIES["gpt2"].batch())
    patch(model, recompute=["layer", "store"])
    unpatch(model)
    assert classes(model) == before
    assert_same_run(model, FAMILIES["gpt2"].batch(), expected, tolerance=0.0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_follow_it_as_well(duplicate: Any) -> None:
    model = adapted()
    patch(model, recompute=["layer", "mlp"])
    assert kept_elements(duplicate(model), text()) == kept_elements(model, text())


def test_verify_agrees() -> None:
    model = adapted("bnb-nf4")
    patch(model, recompute=["layer", "mlp"])
    assert verify(model, text()).ok


# ---- refusals, which change nothing


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (["mlp"], "recompute has 1 words, and base_model.model.model.layers has 2 layers"),
        (["mlp", "everything"], "the words for layers are store, up, mlp, layer, .*; got 'everything'"),
        (["store", "offload"], "layers.1 is in the CPU's memory, to which 'offload' would move what it keeps"),
    ],
)
def test_bad_plans(plan: list[str], words: str) -> None:
    model = adapted()
    before = classes(model)
    with pytest.raises(ValueError, match=words):
        patch(model, recompute=plan)
    assert classes(model) == before


def test_offloading_is_for_layers_that_are_elsewhere() -> None:
    model = adapted("dense").to("meta")
    assert patch(model, recompute=["offload", "store"]).layers == ("offload", "store")


def test_a_plan_is_a_sequence() -> None:
    with pytest.raises(TypeError, match="one for each layer, or None; got dict"):
        patch(adapted(), recompute={0: "mlp"})  # type: ignore[arg-type]


def test_layers_without_a_gated_block() -> None:
    with pytest.raises(ValueError, match=r"transformer\.h\.0 has no gated block that 'mlp' could be for"):
        patch(FAMILIES["gpt2"].with_lora("dense"), recompute=["mlp", "layer"])


def test_models_with_other_than_one_list_of_layers() -> None:
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4))
    with pytest.raises(ValueError, match=r"the model has 2: encoder\.block, decoder\.block"):
        patch(t5, recompute=["layer", "layer"])
    with pytest.raises(ValueError, match="the model has none"):
        patch(nn.Linear(4, 4), recompute=["layer"])


def test_gradient_checkpointing_beside_a_plan() -> None:
    model = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match=r"gradient checkpointing is enabled in .*layers\.0; disable it"):
        patch(model, recompute=["layer", "store"])
    model.gradient_checkpointing_disable()
    patch(model, recompute=["layer", "store"])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(RuntimeError, match="whose layers follow a plan"):
        model(**text())
    patch(model, recompute="mlp")
    assert torch.isfinite(model(**text()).loss)


def test_a_replaced_forward() -> None:
    model = adapted()
    layer = model.base_model.model.model.layers[1]
    layer.forward = layer.forward
    with pytest.raises(ValueError, match=r"the forward of .*layers\.1 was replaced on the instance"):
        patch(model, recompute=["store", "layer"])
