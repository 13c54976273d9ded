"""Configurations of small models."""

from __future__ import annotations

from typing import Any

from transformers import GPT2Config, LlamaConfig, Qwen3Config, Qwen3MoeConfig

VOCABULARY = 4096
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 576,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}


def llama(**changes: Any) -> Any:
    return LlamaConfig(**{**SHAPE, **changes})


def deep_llama() -> Any:
    """One that is not run as a whole."""
    return llama(num_hidden_layers=7)


def gpt2() -> Any:
    sizes = {"n_embd": 192, "n_layer": 2, "n_head": 6, "n_positions": 256, "vocab_size": VOCABULARY}
    return GPT2Config(**sizes, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)


def qwen3_moe() -> Any:
    sizes = {"moe_intermediate_size": 192, "num_experts": 8, "num_experts_per_tok": 2}
    return Qwen3MoeConfig(**SHAPE, head_dim=32, **sizes)


def qwen3() -> Any:
    return Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True)
