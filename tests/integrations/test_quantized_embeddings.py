"""Embeddings and heads in 8 bits: loaded, saved and loaded again, tied or not, with adapters, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import LINEAR_LAYERS, TOKENS, load, logits, make_llama
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import peftkern
from peftkern.integrations.quantizer import model_bytes
from peftkern.nn import QuantizedEmbedding, QuantizedLinear, TiedQuantizedLinear

EMBEDDINGS, HEAD = "model.embed_tokens", "lm_head"
BOTH = peftkern.QuantConfig("nf4", embeddings="int8", head="int8")
ELEMENTS = 96 * 64


def save(folder: Path, tied: bool = False) -> Path:
    make_llama(tie_word_embeddings=tied).save_pretrained(folder)
    return folder


def dense_twin(model: Any) -> Any:
    """A model without quantization that computes the same."""
    twin = make_llama(tie_word_embeddings=model.config.tie_word_embeddings)
    state = {name: module.dequantize() for name, module in model.named_modules() if hasattr(module, "dequantize_")}
    twin.load_state_dict({f"{name}.weight": weight for name, weight in state.items()}, strict=False)
    return twin


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 5e-5) -> None:
    assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("tied", [False, True])
def test_quantizes_saves_and_loads_exactly(tied: bool, tmp_path: Path) -> None:
    model = load(save(tmp_path / "dense", tied), quantization_config=BOTH)
    assert type(model.get_input_embeddings()) is QuantizedEmbedding and model.model.embed_tokens.padding_idx == 0
    assert type(model.get_output_embeddings()) is (TiedQuantizedLinear if tied else QuantizedLinear)
    assert_close(logits(model), logits(dense_twin(model)))
    model.save_pretrained(tmp_path / "first")
    keys = load_file(tmp_path / "first" / "model.safetensors").keys()
    assert {f"{EMBEDDINGS}.weight", f"{EMBEDDINGS}.SCB"} <= keys
    assert tied != any(key.startswith(HEAD) for key in keys)
    again = load(tmp_path / "first")
    assert type(again.lm_head) is type(model.lm_head) and again.config.quantization_config == BOTH
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "second")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]


@pytest.mark.parametrize("tied", [False, True])
def test_same_as_quantizing_in_memory(tied: bool, tmp_path: Path) -> None:
    loaded, in_memory = load(save(tmp_path, tied), quantization_config=BOTH), make_llama(tie_word_embeddings=tied)
    before = in_memory.lm_head
    report = peftkern.quantize_(in_memory, BOTH)
    assert in_memory.lm_head is before and torch.equal(logits(loaded), logits(in_memory))
    assert loaded.hf_quantizer.report == report and not report.skipped
    assert report.formats[EMBEDDINGS] == report.formats[HEAD] == "int8"
    assert f"{LINEAR_LAYERS} layers in nf4, 2 layers in int8" in str(report)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_tensor_is_packed_once(tied: bool) -> None:
    model, config = make_llama(tie_word_embeddings=tied), peftkern.QuantConfig("nf4")
    peftkern.quantize_(model, config)
    both = make_llama(tie_word_embeddings=tied)
    report = peftkern.quantize_(both, BOTH)
    tensors = 1 if tied else 2
    assert model_bytes(model) - model_bytes(both) == tensors * (4 * ELEMENTS - (ELEMENTS + 4 * 96))
    assert report.bytes_after == model_bytes(both)


def test_one_of_both() -> None:
    model = make_llama()
    report = peftkern.quantize_(model, peftkern.QuantConfig("nf4", double_quant=True, embeddings="nf4"))
    assert report.formats[EMBEDDINGS] == "nf4" and report.skipped == {HEAD: "output embeddings or another head"}
    assert model.model.embed_tokens.scales_absmax is not None
    assert_close(logits(model), logits(dense_twin(model)))
    model = make_llama()
    report = peftkern.quantize_(model, peftkern.QuantConfig("nf4", head="int8"))
    assert report.formats[HEAD] == "int8" and EMBEDDINGS not in report.formats
    for option in ("head", "embeddings"):  # of tied ones, both mean the same
        tied = make_llama(tie_word_embeddings=True)
        assert len(peftkern.quantize_(tied, peftkern.QuantConfig("nf4", **{option: "int8"})).formats) == 16


def test_dense_again_and_still_tied(tmp_path: Path) -> None:
    model = load(save(tmp_path, tied=True), quantization_config=BOTH)
    expected = logits(model)
    model.dequantize()
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    assert_close(logits(model), expected)


def test_gpt2_and_the_dtype_of_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=48, n_layer=1, n_head=4)).save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=BOTH, dtype=torch.bfloat16)
    assert type(model.transformer.wte) is QuantizedEmbedding and type(model.transformer.wpe) is nn.Embedding
    assert type(model.lm_head) is TiedQuantizedLinear
    assert model.transformer.wte(TOKENS).dtype == logits(model).dtype == torch.bfloat16


# ---- with adapters


def batch() -> dict[str, Tensor]:
    return {"input_ids": TOKENS, "labels": TOKENS}


def adapted(base: Any, **options: Any) -> Any:
    torch.manual_seed(2)
    settings = {"target_modules": "all-linear", "init_lora_weights": False, **options}
    return peft.get_peft_model(base, peft.LoraConfig(r=4, **settings)).train()


def run(model: Any) -> dict[str, Tensor]:
    loss = model(**batch()).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", [HEAD, "q_proj"], ["embed_tokens", "v_proj"]])
def test_adapters_train_as_over_dense_weights(tied: bool, targets: Any) -> None:
    base = make_llama(tie_word_embeddings=tied)
    peftkern.quantize_(base, BOTH)
    twin = dense_twin(base)
    model, other = adapted(base, target_modules=targets), adapted(twin, target_modules=targets)
    report = peftkern.patch(model, logits=False)
    assert report.rows[-1].action == "fused"
    results, expected = run(model), run(other)
    assert not peftkern.patch(model).rows[-1].calls_left
    assert results.keys() == expected.keys()
    for name, value in results.items():
        assert_close(value, expected[name], 1e-4)


def test_checkpointing_takes_gradients_through_the_embeddings() -> None:
    base = make_llama(tie_word_embeddings=True)
    peftkern.quantize_(base, BOTH)
    model = adapted(base)
    expected = run(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    results = run(model)
    assert all(torch.equal(results[name], value) for name, value in expected.items())


def test_merging_into_a_tied_head_is_refused() -> None:
    base = make_llama(tie_word_embeddings=True)
    peftkern.quantize_(base, BOTH)
    model = adapted(base, target_modules=[HEAD])
    peftkern.patch(model, logits=False)
    expected = logits(model)
    with pytest.raises(ValueError, match="the head has its codes from the embedding"):
        model.merge_adapter()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("options", [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [3]}])
def test_training_the_embeddings_themselves_is_refused(options: dict[str, Any]) -> None:
    base = make_llama()
    peftkern.quantize_(base, BOTH)
    with pytest.raises(RuntimeError, match="floating point"):
        adapted(base, target_modules=["q_proj"], **options)


def test_base_embeddings_of_a_peft_model() -> None:
    model = adapted(make_llama(), target_modules=["embed_tokens", HEAD])
    report = peftkern.quantize_(model, BOTH)
    assert [name for name, format in report.formats.items() if format == "int8"] == [
        f"base_model.model.{name}.base_layer" for name in (EMBEDDINGS, HEAD)
    ]


# ---- what is left, and what is refused


def test_embeddings_that_are_more_than_a_look_up_stay_dense() -> None:
    config = Gemma3TextConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=16
    )
    model: Any = Gemma3ForCausalLM(config)
    report = peftkern.quantize_(model, BOTH)
    assert report.skipped[EMBEDDINGS] == "a layer of its own kind, Gemma3TextScaledWordEmbedding"
    assert report.skipped[HEAD] == "tied to another module"
    t5: Any = T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    )
    report = peftkern.quantize_(t5, BOTH)
    assert report.skipped["shared"] == "tied to several modules"
    skipped = peftkern.quantize_(make_llama(), peftkern.QuantConfig("nf4", 64, True, ["embed_tokens"], "int8"))
    assert skipped.skipped == {EMBEDDINGS: "in skip_modules"} and skipped.formats[HEAD] == "nf4"
    model = make_llama()
    peftkern.quantize_(model, BOTH)
    assert peftkern.quantize_(model, BOTH).skipped[EMBEDDINGS] == "quantized before, in int8"


def test_what_cannot_be_is_named_and_changes_nothing(tmp_path: Path) -> None:
    model = make_llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="must have one format, because they are tied; got 'int8' and 'nf4'"):
        peftkern.quantize_(model, peftkern.QuantConfig("nf4", embeddings="int8", head="nf4"))
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight: .* rows of 64 share blocks of 128"):
        peftkern.quantize_(model, peftkern.QuantConfig("nf4", 128, embeddings="nf4"))
    assert type(model.lm_head) is nn.Linear and not hasattr(model, "hf_quantizer")
    with pytest.raises(ValueError, match="Sequential is no model of transformers"):
        peftkern.quantize_(nn.Sequential(nn.Embedding(4, 64)), BOTH)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight: .* rows of 64 share blocks of 128"):
        load(save(tmp_path), quantization_config=peftkern.QuantConfig("nf4", 128, embeddings="fp4"))
