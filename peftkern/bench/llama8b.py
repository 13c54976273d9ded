"""A training step of Llama-3-8B's shape on the CPU: a model whose dense weights alone would take 16 GB.

Weights are random and made as NF4 with double quantization, layer by layer, so that no dense copy of the model ever
exists; embeddings and head are bfloat16, as the activations. LoRA r=16 on all linears, 8-bit AdamW, gated blocks that
recompute, no logits, no checkpointing. There is no peer: bitsandbytes decodes every weight into memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import peftkern
from peftkern.bench import fresh_process, memory, peers, smollm2
from peftkern.bench.case import Measurement
from peftkern.bench.result import Quantity
from peftkern.formats import DoubleQuantization, QuantizedTensor, packed_shape, scales_shape
from peftkern.formats.quantized_tensor import block_count

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
}
BATCH, LENGTH = 1, 256
LIMIT_MEGABYTES = 8000.0
SECONDS = "seconds of the step"
_BLOCK_SIZE, _SCALE = 64, 0.04


def random_model(**changes: Any) -> Any:
    """A language model of :data:`SHAPE`, or with ``changes`` to it, quantized, with adapters, patched."""
    from transformers import LlamaConfig, LlamaForCausalLM

    generator = torch.Generator().manual_seed(0)
    config = LlamaConfig(**{**SHAPE, **changes}, use_cache=False, tie_word_embeddings=False)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, _random_linear(module.out_features, module.in_features, generator))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for module in model.modules():
        _fill(module, generator)
    model.is_loaded_in_4bit = True  # where PEFT looks for what from_pretrained notes down
    adapted = peers.with_adapter(model, "all-linear", torch.float32)
    peftkern.patch(adapted, strict=True, **smollm2.LEAN)
    return adapted


def _random_linear(out_features: int, in_features: int, generator: torch.Generator) -> nn.Module:
    """Of random codes, and of scales that make a weight of the usual size."""
    from peftkern.nn import QuantizedLinear

    shape = torch.Size((out_features, in_features))
    packed = torch.empty(packed_shape(shape, "nf4", _BLOCK_SIZE), dtype=torch.uint8).random_(generator=generator)
    scales = torch.empty(scales_shape(shape, "nf4", _BLOCK_SIZE), dtype=torch.uint8).random_(generator=generator)
    absmax = torch.full((block_count(scales.numel(), 256),), 0.2 * _SCALE)
    nested = DoubleQuantization(absmax, torch.tensor(_SCALE))
    return QuantizedLinear(QuantizedTensor(packed, scales, "nf4", shape, torch.bfloat16, _BLOCK_SIZE, nested))


def _fill(module: nn.Module, generator: torch.Generator) -> None:
    """Give the module's own parameters memory: random matrices, and ones."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if not parameter.is_meta:
            continue
        values = torch.ones(parameter.shape, dtype=torch.bfloat16)
        if values.dim() == 2:
            values.normal_(std=0.02, generator=generator)
        setattr(module, name, nn.Parameter(values, requires_grad=False))


def train_one_step(batch: int, length: int, shape: dict[str, Any]) -> dict[str, float]:
    """Make the model, train it for a step, and report resident memory in MB, seconds and losses.

    Runs in a fresh process.
    """
    model = random_model(**shape)
    loop = smollm2.Loop(model, peftkern.optim.AdamW8bit(peers.trainable(model).values(), lr=smollm2.LEARNING_RATE))
    after_loading = memory.resident_megabytes("VmRSS")
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))
    begin = time.perf_counter()
    loss = loop.step(ids)
    seconds = time.perf_counter() - begin
    peak = memory.resident_megabytes("VmHWM")
    return {memory.AFTER_LOADING: after_loading, memory.PEAK: peak, SECONDS: seconds, "loss": loss}


def measure_step(setting: str, batch: int = BATCH, length: int = LENGTH, **shape: Any) -> Iterator[Measurement]:
    """One run in a fresh process; beside the peak stands the limit."""
    arguments = {"batch": batch, "length": length, "shape": shape}
    environment = memory.SETTINGS[setting]
    figures: dict[str, float] = fresh_process.call("peftkern.bench.llama8b:train_one_step", arguments, environment)
    case = f"{memory.PEAK}, {batch} x {length} ({setting}), {figures[SECONDS]:.0f} s a step, loss {figures['loss']:.1f}"
    yield Measurement(case, "MB", Quantity.COUNT, [figures[memory.PEAK]], [LIMIT_MEGABYTES])


def cases() -> Iterator[Measurement]:
    """Measurements of ``step-8b``."""
    for setting in memory.SETTINGS:
        yield from measure_step(setting)
