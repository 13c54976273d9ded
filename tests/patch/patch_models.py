"""Tiny random models and what the tests of `patch` compare."""

from __future__ import annotations

import copy
import functools
import tempfile
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from peftkern.backends import cpu
from peftkern.nn import QuantizedLinear

BASES = ("dense", "bnb-nf4", "bnb-nf4-double", "bnb-fp4", "bnb-int8", "nf4", "int8")
"""Kinds of base layers: the last two are `QuantizedLinear`."""

NORMS, ATTENTIONS, LAYERS = 5, 2, 2
OTHERS = NORMS + ATTENTIONS + LAYERS if cpu.available() else 0
"""Modules of a `llama` that are patched whatever its linear layers and blocks, where there is a kernel."""
OTHER_CLASSES = {"LlamaRMSNorm", "LlamaAttention", "LlamaDecoderLayer"}
OTHERS_LEFT = NORMS + ATTENTIONS + LAYERS - OTHERS

VOCABULARY = 96
ALORA: dict[str, Any] = {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}
"""Options of an adapter that the fused product does not cover."""

TOLERANCE = 5e-6
DEEP = 10 * TOLERANCE  # errors of a few layers add up


def llama_config(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    return LlamaConfig(**{**sizes, **changes})


@functools.cache
def _llama_folder(tied: bool) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()
    torch.manual_seed(1)
    LlamaForCausalLM(llama_config(tie_word_embeddings=tied)).save_pretrained(folder.name)
    return folder


def llama(base: str = "dense", *, tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The same weights every time, over the given kind of base layers."""
    options: dict[str, Any] = {"dtype": dtype}
    if base.startswith("bnb-int8"):
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif base.startswith("bnb-"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=base.split("-")[1],
            bnb_4bit_use_double_quant=base.endswith("double"),
            bnb_4bit_compute_dtype=dtype,
        )
    model = LlamaForCausalLM.from_pretrained(_llama_folder(tied).name, **options)
    if base in ("nf4", "int8"):
        replace_linears(model, base)
    return model.train()


def replace_linears(model: nn.Module, format: str) -> None:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            model.set_submodule(name, QuantizedLinear.from_linear(module, format, double_quant=format == "nf4"))


def lora(model: nn.Module, seed: int = 2, adapter: str = "default", **options: Any) -> peft.PeftModel:
    """A PEFT model whose adapters are random, B included, so that they matter."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**settings), adapter_name=adapter)


def bert() -> BertForSequenceClassification:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=80,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return GPT2LMHeadModel(config)


def text(rows: int = 2, tokens: int = 7, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, tokens), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖; NaN when a NaN is in it."""
    size = torch.linalg.vector_norm(expected.double()).item()
    return torch.linalg.vector_norm(actual.double() - expected.double()).item() / max(size, 1e-30)


def run(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of one forward and backward; the gradients are cleared."""
    output = model(**batch)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return output.logits.detach(), gradients


def assert_same_run(model: nn.Module, batch: dict[str, Tensor], expected: Any, tolerance: float = DEEP) -> None:
    """The model gives the logits and gradients of ``expected``, an earlier `run`."""
    logits, gradients = run(model, batch)
    expected_logits, expected_gradients = expected
    assert logits.dtype == expected_logits.dtype
    assert error(logits, expected_logits) <= tolerance
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert error(gradient, expected_gradients[name]) <= tolerance, name


def fused_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The patched modules: linear layers, and in a `llama` the two gated blocks that hold some of them."""
    return {name: module for name, module in model.named_modules() if "_peftkern" in module.__dict__}


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def twin(model: nn.Module) -> Any:
    return copy.deepcopy(model)
