"""Tiny random models for the tests of sparse deltas."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from peftkern import QuantConfig
from peftkern.formats.sparse_indices import SparseIndices
from peftkern.sparse import linear_layers
from peftkern.sparse.layers import base_layer, weight_shape

VOCABULARY = 96


@functools.cache
def _llama_folder(seed: int, tied: bool) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder.name)
    return folder


def llama(base: str = "dense", *, seed: int = 1, tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """The same weights for the same seed, over the given kind of base layers."""
    options: dict[str, Any] = {"dtype": dtype}
    if base.startswith("bnb-"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    elif base != "dense":
        options["quantization_config"] = QuantConfig(base)
    return LlamaForCausalLM.from_pretrained(_llama_folder(seed, tied).name, **options).train()


def lora(model: nn.Module, **options: Any) -> peft.PeftModel:
    """A PEFT model whose adapters are random, B included, so that they matter."""
    torch.manual_seed(2)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def random_deltas(model: nn.Module, density: float = 0.05, seed: int = 3) -> dict[str, SparseIndices]:
    """An index set for each layer of `linear_layers`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: weight_shape(base_layer(layer)) for name, layer in linear_layers(model).items()}
    return {
        name: SparseIndices.from_mask(torch.rand(shape, generator=generator) < density)
        for name, shape in shapes.items()
        if shape is not None
    }


def text(rows: int = 2, tokens: int = 7, seed: int = 3) -> dict[str, Tensor]:
    ids = torch.randint(1, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def batches(count: int, rows: int = 2, tokens: int = 7) -> list[dict[str, Tensor]]:
    return [text(rows, tokens, seed) for seed in range(10, 10 + count)]


def trainer(
    model: nn.Module,
    folder: Path,
    method: TrainerCallback,
    steps: int,
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]],
    **options: Any,
) -> Trainer:
    """A Trainer that goes through `batches` in order, one a step, with a constant learning rate and no clipping."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        **{
            "per_device_train_batch_size": 2,
            "lr_scheduler_type": "constant",
            "train_sampling_strategy": "sequential",
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        },
    )
    rows = [{name: tensor[row] for name, tensor in batch.items()} for batch in batches(steps) for row in range(2)]
    return Trainer(
        model,  # type: ignore[arg-type]
        arguments,
        train_dataset=rows,  # type: ignore[arg-type]
        callbacks=[method],
        optimizer_cls_and_kwargs=optimizer,
    )


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter by name, and of index sets."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names in the state dict whose bits are not as ``before``, among those that are in both."""
    now = model.state_dict()
    return {name for name in now.keys() & before.keys() if not torch.equal(now[name], before[name])}


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    """The logits for `text`."""
    logits: Tensor = model(**text()).logits
    return logits


def error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖; NaN when a NaN is in it."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}
