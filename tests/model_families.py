"""Tiny random models of the families that people fine-tune, as data: shared by the tests of several layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

import peftkern

VOCABULARY = 96
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT = {**_SIZES, "pad_token_id": 0, "intermediate_size": 96, "hidden_dropout_prob": 0.0}
_DECODER = {**_SIZES, **_SPECIAL, "intermediate_size": 96}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        model: class of the model, in `transformers`.
        config: class of its config, in `transformers`.
        sizes: arguments of the config.
        adapters: LoRA layers that `all-linear` puts into the model.
        kept_dense: how many of their base layers `quantize_` leaves dense.
        fused: classes of whole blocks that `patch` takes beside them; more may be taken.
        inputs: "text", "classes" (text, one label a row) or "image".
        parameters: as `target_parameters` of PEFT.
    """

    model: str
    config: str
    sizes: Mapping[str, Any]
    adapters: int
    kept_dense: int = 0
    fused: frozenset[str] = frozenset()
    inputs: str = "text"
    parameters: tuple[str, ...] = ()

    @property
    def quantized(self) -> int:
        """LoRA layers over packed weights where the model is quantized."""
        return self.adapters - self.kept_dense

    def build(self, base: str, seed: int = 1, **config: Any) -> Any:
        """The model, the same weights every time, over a "dense" base or one that was quantized in place."""
        torch.manual_seed(seed)
        options = getattr(transformers, self.config)(**{**self.sizes, **config})
        model = getattr(transformers, self.model)(options).train()
        if base != "dense":
            peftkern.quantize_(model, peftkern.QuantConfig(base))
        return model

    def with_lora(self, base: str, config: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """The model with random adapters, B included; ``config`` goes to `build`, the others to PEFT."""
        settings: dict[str, Any] = {"target_modules": "all-linear", "init_lora_weights": False}
        if self.parameters:
            settings["target_parameters"] = list(self.parameters)
        model = self.build(base, **(config or {}))
        return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **{**settings, **options}))

    def batch(self, seed: int = 3) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, VOCABULARY, (2, 9), generator=generator)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if self.inputs == "text":
            return batch
        batch["labels"] = torch.tensor([0, 1])
        if self.inputs == "image":
            del batch["input_ids"]
            batch["pixel_values"] = torch.randn(2, 3, 8, 8, generator=generator)
        return batch


def _row(model: str, config: str, sizes: Mapping[str, Any], adapters: int, *fused: str, **others: Any) -> Family:
    return Family(model, config, sizes, adapters, fused=frozenset(fused), **others)


FAMILIES = {
    "llama": _row("LlamaForCausalLM", "LlamaConfig", _GROUPED, 14, "LlamaMLP", "LlamaForCausalLM"),
    "mistral": _row(
        "MistralForCausalLM",
        "MistralConfig",
        {**_GROUPED, "sliding_window": 4},
        14,
        "MistralMLP",
        "MistralForCausalLM",
    ),
    "qwen2": _row("Qwen2ForCausalLM", "Qwen2Config", _GROUPED, 14, "Qwen2MLP", "Qwen2ForCausalLM"),
    "qwen3": _row("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 16}, 14, "Qwen3MLP", "Qwen3ForCausalLM"),
    "gemma2": _row(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_GROUPED, "head_dim": 16, "final_logit_softcapping": 0.5},
        14,
        "Gemma2ForCausalLM",
    ),
    "gemma3": _row("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GROUPED, "head_dim": 16}, 14, "Gemma3ForCausalLM"),
    "phi3": _row("Phi3ForCausalLM", "Phi3Config", _GROUPED, 8, "Phi3ForCausalLM"),
    "gpt2": _row(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        8,
        "GPT2LMHeadModel",
    ),
    "opt": _row(
        "OPTForCausalLM",
        "OPTConfig",
        {**_SIZES, **_SPECIAL, "ffn_dim": 96, "dropout": 0.0, "word_embed_proj_dim": 64},
        12,
        "OPTForCausalLM",
    ),
    "bloom": _row(
        "BloomForCausalLM",
        "BloomConfig",
        {**_SPECIAL, "vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        8,
    ),
    "gpt_neox": _row("GPTNeoXForCausalLM", "GPTNeoXConfig", _DECODER, 8, "GPTNeoXForCausalLM"),
    "mixtral": _row(
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_GROUPED, "num_local_experts": 4},
        10,
        kept_dense=2,
        parameters=_EXPERTS,
    ),
    "bert": _row(
        "BertForSequenceClassification",
        "BertConfig",
        {**_BERT, "attention_probs_dropout_prob": 0.0},
        14,
        kept_dense=1,
        inputs="classes",
    ),
    "roberta": _row(
        "RobertaForMaskedLM", "RobertaConfig", {**_BERT, "attention_probs_dropout_prob": 0.0}, 13, kept_dense=1
    ),
    "t5": _row(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
        },
        36,
        kept_dense=4,
    ),
    "vit": _row(
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "image_size": 8,
            "patch_size": 4,
            "hidden_dropout_prob": 0.0,
        },
        13,
        kept_dense=1,
        inputs="image",
    ),
}
