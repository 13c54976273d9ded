"""Tiny models of many families, the forms in which they are trained, and FLOPs counted while they are."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
import transformers
from select_models import batches, build, llama
from torch import Tensor, nn

import peftkern
from peftkern import sparse
from peftkern.formats import BitMask
from peftkern.formats.sparse_indices import SparseIndices
from peftkern.nn import QuantizedLinear
from peftkern.select.flops import FlopCounter
from peftkern.select.trace import asking
from peftkern.sparse.masking import mask_layers

Batch = dict[str, Tensor]
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
OPT = {"ffn_dim": 48, "max_position_embeddings": 32, "word_embed_proj_dim": 32}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}


def text() -> Batch:
    return batches(1)[0]


def labelled() -> Batch:
    return {"input_ids": text()["input_ids"], "labels": torch.tensor([0, 1])}


def translation() -> Batch:
    return {"input_ids": text()["input_ids"], "labels": text()["labels"][:, :5].contiguous()}


def checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()  # as `Execution` does
    model.config.use_cache = False
    return model


def on_nf4(model: nn.Module) -> Any:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            model.set_submodule(name, QuantizedLinear.from_linear(module, "nf4", double_quant=True))
    return model


def lora(base: nn.Module, *, patched: bool = True, **options: Any) -> Any:
    torch.manual_seed(2)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False, **options}
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    if patched:
        peftkern.patch(model, strict=True)
    return model


def without_logits(**changes: Any) -> Any:
    model = llama(**changes)
    peftkern.patch(model, strict=True, logits=False)
    return model


def lora_head_without_logits() -> Any:
    model = lora(llama(), patched=False, target_modules=["lm_head", "q_proj", "down_proj"])
    peftkern.patch(model, strict=True, logits=False)
    return model


def half_labelled() -> Batch:
    batch = text()
    batch["labels"][:, ::2] = -100
    return batch


def sparse_deltas() -> Any:
    model = on_nf4(llama(hidden_size=64))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    shapes = {name: (int(m.out_features), int(m.in_features)) for name, m in sparse.linear_layers(model).items()}  # type: ignore[arg-type]
    masks = {name: torch.rand(shape, generator=generator) < 0.05 for name, shape in shapes.items()}
    sparse.attach(model, {name: SparseIndices.from_mask(mask) for name, mask in masks.items()})
    peftkern.patch(model, strict=True)
    return model


def masked() -> Any:
    """A dense model some of whose linear layers are masked, weights trained."""
    model = llama()
    generator = torch.Generator().manual_seed(4)
    layers = {name: m for name, m in model.named_modules() if type(m) is nn.Linear and "self_attn" in name}
    kept = {name: torch.rand(layer.weight.shape, generator=generator) < 0.5 for name, layer in layers.items()}
    mask_layers(model, {name: BitMask.from_mask(mask) for name, mask in kept.items()})
    return model


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[], Batch]]] = {
    "llama": (lambda: llama(tie_word_embeddings=False), text),
    "llama-tied": (llama, text),
    "llama-without-logits": (lambda: without_logits(tie_word_embeddings=False), half_labelled),
    "llama-tied-without-logits": (without_logits, half_labelled),
    "gpt2": (lambda: build(transformers.GPT2LMHeadModel, transformers.GPT2Config, **GPT2), text),
    "opt": (lambda: build(transformers.OPTForCausalLM, transformers.OPTConfig, **OPT), text),
    "bloom": (lambda: build(transformers.BloomForCausalLM, transformers.BloomConfig, n_layer=2, n_head=4), text),
    "bert": (lambda: build(transformers.BertForSequenceClassification, transformers.BertConfig), labelled),
    "llama-checkpointed": (lambda: checkpointed(llama()), text),
    "bert-checkpointed": (lambda: checkpointed(build(transformers.BertForMaskedLM, transformers.BertConfig)), text),
    "lora-nf4": (lambda: lora(on_nf4(llama(hidden_size=64)), lora_dropout=0.1), text),
    "lora-dense": (lambda: lora(llama()), text),
    "lora-head-without-logits": (lora_head_without_logits, half_labelled),
    "lora-unpatched": (lambda: lora(on_nf4(llama(hidden_size=64)), patched=False), text),
    "lora-checkpointed": (lambda: checkpointed(lora(on_nf4(llama(hidden_size=64)))), text),
    "sparse-deltas": (sparse_deltas, text),
    "masked": (masked, text),
}


def t5() -> Any:
    return build(transformers.T5ForConditionalGeneration, transformers.T5Config, **T5)


def mixtral() -> Any:
    """Its experts look at which tokens they are given."""
    return build(
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig,
        num_local_experts=4,
        experts_implementation="eager",
    )


def counted(model: nn.Module, batch: Batch, names: Sequence[str]) -> float:
    """FLOPs of a forward and backward pass that trains the parameters of these names."""
    with asking(model, names), FlopCounter() as counter:
        model(**batch).loss.backward()
    model.zero_grad()
    return float(counter.total)


def selections(names: Sequence[str], count: int = 1) -> list[list[str]]:
    """All of ``names``, single ones, and random ones."""
    choose = random.Random(0)
    singles = [[name] for name in choose.sample(list(names), count)]
    return [list(names), *singles, *(choose.sample(list(names), choose.randint(2, len(names))) for _ in range(count))]
