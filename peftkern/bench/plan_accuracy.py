"""Memory that `peftkern.plan` predicts from a configuration alone, beside what training takes in a fresh process.

Freed memory is returned to the system, and resident memory counts from a point behind imports and a tiny step, at which
the libraries are loaded.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import peftkern
from peftkern.bench import fresh_process
from peftkern.bench.case import Measurement
from peftkern.bench.memory import FREED_MEMORY_RETURNED, reset_peak, resident_megabytes
from peftkern.bench.result import Quantity

STEPS = 2  # the optimizer's state exists from the end of the first one

SMOLLM2: Mapping[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}

_TINY: Mapping[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}

_FULL = {"method": "full", "patched": False}

CASES: Mapping[str, Mapping[str, Any]] = {
    "LoRA, nf4": {},
    "LoRA, nf4, no logits": {"logits": False},
    "LoRA, nf4, not patched": {"patched": False},
    "LoRA, nf4, gated blocks made again": {"recompute": "mlp"},
    "LoRA, nf4, checkpointing": {"gradient_checkpointing": True},
    "LoRA, dense": {"quantization": "none"},
    "sparse, nf4": {"method": "sparse", "density": 0.005},
    "full": _FULL,
    "full, AdamW8bit, checkpointing": {**_FULL, "optimizer": "AdamW8bit", "gradient_checkpointing": True},
}
"""Arguments of `peftkern.plan`."""


def cases() -> Iterator[Measurement]:
    """Measurements of ``plan-accuracy``: ours is predicted, the peer's measured."""
    for name, arguments in CASES.items():
        call = {"batch": 4, "length": 256, **arguments}
        predicted = peftkern.plan(_config(SMOLLM2), **call).peak / 1e6
        measured = fresh_process.call(
            "peftkern.bench.plan_accuracy:train_and_watch",
            {"shape": dict(SMOLLM2), "calls": [call]},
            FREED_MEMORY_RETURNED,
        )
        title = f"{name}, batch 4 x 256, random weights, predicted beside measured"
        yield Measurement(title, "MB", Quantity.SHARE, [predicted], measured)


def _config(shape: Mapping[str, Any]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**shape)


def train_and_watch(shape: Mapping[str, Any], calls: list[Mapping[str, Any]]) -> list[float]:
    """By how many MB the peak of a few training steps is above what was resident before, for each of ``calls``.

    Runs in a fresh process. ``shape``: of the Llama model; ``calls``: arguments of `peftkern.plan`.
    """
    growths = []
    for call in calls:
        tiny, tiny_call = _config(_TINY), {**call, "batch": 1, "length": 128}
        if isinstance(call.get("recompute"), list):  # it has one layer
            tiny_call["recompute"] = call["recompute"][:1]
        _train(build_real(tiny, tiny_call), tiny, tiny_call)
        gc.collect()
        before = resident_megabytes("VmRSS")
        model = build_real(_config(shape), call)
        gc.collect()
        reset_peak()
        _train(model, _config(shape), call)
        growths.append(resident_megabytes("VmHWM") - before)
        del model
    return growths


def build_real(config: Any, call: Mapping[str, Any]) -> Any:
    """A model with random weights as `peftkern.plan` is to predict it; ``call`` holds arguments of that."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"method": "lora", "quantization": None, "dtype": "float32", "patched": True, **call}
    method = options["method"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options["dtype"]))
        model.config.use_cache = False
        quantization = options["quantization"] or ("none" if method == "full" else "nf4")
        if quantization != "none":
            embeddings, head = options.get("embeddings"), options.get("head")
            peftkern.quantize_(model, peftkern.QuantConfig(quantization, embeddings=embeddings, head=head))
        model = _ATTACH[method](model, options)
    if options["patched"]:
        peftkern.patch(model, logits=options.get("logits", True), recompute=options.get("recompute"))
    if options.get("gradient_checkpointing", False):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _attach_lora(model: Any, options: Mapping[str, Any]) -> Any:
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=options.get("rank", 16), target_modules="all-linear"))


def _attach_sparse(model: Any, options: Mapping[str, Any]) -> Any:
    from peftkern import sparse
    from peftkern.formats.sparse_indices import SparseIndices
    from peftkern.sparse.budget import random_entries

    generator = torch.Generator().manual_seed(0)
    indices = {}
    for name, layer in sparse.linear_layers(model).items():
        shape = (int(layer.out_features), int(layer.in_features))  # type: ignore[arg-type]
        count = round(options["density"] * shape[0] * shape[1])
        indices[name] = SparseIndices.from_flat(random_entries(shape[0] * shape[1], count, generator), shape)
    model.requires_grad_(False)
    sparse.attach(model, indices)
    return model


def _attach_nothing(model: Any, _options: Mapping[str, Any]) -> Any:
    return model


_ATTACH = {"lora": _attach_lora, "sparse": _attach_sparse, "full": _attach_nothing}


class Training:
    """Steps of ``model`` on random tokens; ``call`` holds arguments of `peftkern.plan`."""

    def __init__(self, model: Any, config: Any, call: Mapping[str, Any]) -> None:
        self.model = model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer: torch.optim.Optimizer = getattr(peftkern.optim, call.get("optimizer", "AdamW"))(trained)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(config.vocab_size, (call["batch"], call["length"]), generator=generator)

    def step(self) -> None:
        """One of them."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()


def _train(model: Any, config: Any, call: Mapping[str, Any]) -> None:
    training = Training(model, config, call)
    for _ in range(STEPS):
        training.step()
