"""Tiny random models for the tests of training methods, and the steps that they compare."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**changes: Any) -> LlamaForCausalLM:
    """The same weights every time."""
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": True, **changes})).train()


def build(model_class: type[PreTrainedModel], config_class: type[PreTrainedConfig], **changes: Any) -> Any:
    """A model of another family with the same weights every time."""
    torch.manual_seed(1)
    return model_class(config_class(**{**SIZES, **changes})).train()


def batches(count: int, rows: int = 2, tokens: int = 7, seed: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, rows, tokens), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def values(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def twin(model: nn.Module) -> Any:
    return copy.deepcopy(model)


def changed(model: nn.Module, before: Mapping[str, Tensor]) -> set[str]:
    """Names in the state dict whose bits are not as ``before``."""
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖; NaN when a NaN is in it."""
    size = torch.linalg.vector_norm(expected.double()).item()
    return torch.linalg.vector_norm(actual.double() - expected.double()).item() / max(size, 1e-30)
