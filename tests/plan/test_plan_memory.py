"""What is predicted without a model in memory is what training takes."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from plan_models import SHAPE, deep_llama, gpt2, llama, qwen3, qwen3_moe
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import peftkern
from peftkern.bench import fresh_process
from peftkern.bench.memory import FREED_MEMORY_RETURNED
from peftkern.bench.plan_accuracy import Training, build_real
from peftkern.plan import predict

FULL = {"method": "full", "patched": False}

CASES: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "lora-nf4": (llama, {}),
    "lora-nf4-not-patched": (llama, {"patched": False}),
    "lora-nf4-no-logits": (llama, {"logits": False}),
    "lora-nf4-checkpointing": (llama, {"gradient_checkpointing": True}),
    "lora-nf4-recompute": (llama, {"recompute": "mlp"}),
    "lora-nf4-layer-and-store": (llama, {"recompute": ("layer", "store")}),
    "lora-nf4-mlp-and-layer-no-logits": (llama, {"recompute": ("mlp", "layer"), "logits": False}),
    "lora-nf4-deep-mixed": (deep_llama, {"recompute": ("layer", "layer", "mlp", "up", "store", "layer", "store")}),
    "lora-dense-bfloat16-no-logits": (llama, {"quantization": "none", "dtype": "bfloat16", "logits": False}),
    "lora-tied": (qwen3, {}),
    "lora-tied-embeddings-int8": (qwen3, {"embeddings": "int8", "logits": False}),
    "lora-head-and-embeddings-int8": (llama, {"embeddings": "int8", "head": "int8"}),
    "lora-experts-layer-and-store": (qwen3_moe, {"recompute": ("layer", "store")}),
    "full-experts": (qwen3_moe, FULL),
    "sparse": (llama, {"method": "sparse", "density": 0.02}),
    "full": (llama, FULL),
    "full-8bit": (llama, {**FULL, "optimizer": "AdamW8bit"}),
    "full-tied-no-logits": (qwen3, {"method": "full", "logits": False}),
    "full-gpt2-checkpointing": (gpt2, {**FULL, "gradient_checkpointing": True}),
}


def measured(config: Any, call: Mapping[str, Any]) -> int:
    """Bytes of all tensors at the peak of the second step, as PyTorch's allocator reports them."""
    model = build_real(config, call)
    training = Training(model, config, call)
    training.step()
    training.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        training.step()
    results = profiler.profiler
    assert results is not None and results.kineto_results is not None
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    states = [value for state in training.optimizer.state.values() for value in state.values()]
    held = [*model.parameters(), *model.buffers(), *(value for value in states if isinstance(value, Tensor))]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    return peak + sum(storages.values())


@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_that_of_training(name: str) -> None:
    make, arguments = CASES[name]
    call = {"batch": 2, "length": 128, **arguments}
    predicted = peftkern.plan(make(), **call).peak
    # of a bfloat16 product PyTorch takes a buffer of its own, which counts in models as small as these
    own_buffer = 340_000 if arguments.get("dtype") == "bfloat16" else 0
    assert predicted == pytest.approx(measured(make(), call), rel=0.01, abs=own_buffer)


RESIDENT: Mapping[str, Mapping[str, Any]] = {"lora-nf4": {}, "full": FULL}


def test_resident_memory_grows_as_predicted() -> None:
    """In a fresh process whose freed memory goes back to the system; libraries are loaded before."""
    shape = {**SHAPE, "vocab_size": 16384, "hidden_size": 384, "intermediate_size": 1152}
    calls = [{"batch": 2, "length": 256, **arguments} for arguments in RESIDENT.values()]
    arguments = {"shape": shape, "calls": calls}
    grown = fresh_process.call("peftkern.bench.plan_accuracy:train_and_watch", arguments, FREED_MEMORY_RETURNED)
    predicted = [peftkern.plan(llama(**shape), **call).peak / 1e6 for call in calls]
    assert dict(zip(RESIDENT, predicted, strict=True)) == pytest.approx(
        dict(zip(RESIDENT, grown, strict=True)), rel=0.1
    )


@pytest.mark.parametrize("arguments", [{"gradient_checkpointing": True, "logits": False}, FULL])
def test_a_deep_model_follows_from_shallow_ones(arguments: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = llama(num_hidden_layers=8)
    call = {"batch": 2, "length": 64, **arguments}
    extrapolated = peftkern.plan(config, **call)
    monkeypatch.setattr(predict, "SHALLOW", 8)
    whole = peftkern.plan(config, **call)
    assert extrapolated.parts == pytest.approx(whole.parts)
    assert extrapolated.flops == pytest.approx(whole.flops)
    assert extrapolated.seconds == pytest.approx(whole.seconds)


def test_a_model_is_planned_as_it_stands() -> None:
    call = {"batch": 2, "length": 64}
    model = build_real(llama(), call)
    before = dict(model.named_parameters())
    standing, expected = peftkern.plan(model, **call), peftkern.plan(llama(), **call)
    assert standing.parts == pytest.approx(expected.parts)
    assert standing.trained == expected.trained
    assert all(
        parameter is before[name] and type(parameter.data) is Tensor for name, parameter in model.named_parameters()
    )
    model(input_ids=torch.zeros(1, 4, dtype=torch.int64), labels=torch.zeros(1, 4, dtype=torch.int64)).loss.backward()
