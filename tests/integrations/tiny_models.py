"""Models small enough for a test, and what they compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from peftkern.nn import QuantizedLinear

logging.disable_progress_bar()

TOKENS = torch.arange(1, 15).view(2, 7)
LAYER = "model.layers.0.self_attn.q_proj"
LINEAR_LAYERS = 14


def llama_config(**changes: Any) -> LlamaConfig:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**sizes, **changes})


def make_llama(**changes: Any) -> LlamaForCausalLM:
    """A dense Llama of two layers; the same weights every time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(**changes)).eval()


def load(folder: Any, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=TOKENS).logits
    return result


def quantized_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
