"""PEFT, unpatched, over quantized layers: it finds them, trains over them, and cannot spoil them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners import lora
from safetensors.torch import load_file
from tiny_models import LAYER, LINEAR_LAYERS, TOKENS, load, logits, make_llama
from torch import Tensor
from transformers import Trainer, TrainingArguments

import peftkern
from peftkern.nn import QuantizedLinear

FORMATS = ["nf4", "fp4", "int8", "int8_blockwise"]


def make_quantized(format: str = "nf4", **changes: Any) -> Any:
    model = make_llama(**changes)
    peftkern.quantize_(model, peftkern.QuantConfig(format))
    return model


def add_lora(model: Any, **changes: Any) -> Any:
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **changes}
    return peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()


def dense_twin(model: Any) -> Any:
    return copy.deepcopy(model).dequantize()


@pytest.mark.parametrize("format", FORMATS)
def test_all_linear_finds_every_layer_and_computes_what_it_does_over_dense_weights(format: str) -> None:
    quantized = make_quantized(format)
    dense = dense_twin(quantized)
    models = [add_lora(model) for model in (quantized, dense)]
    layers = [module for module in models[0].modules() if isinstance(module, lora.Linear)]
    assert len(layers) == LINEAR_LAYERS
    assert all(type(layer) is lora.Linear and type(layer.base_layer) is QuantizedLinear for layer in layers)
    assert {p.dtype for p in models[0].parameters() if p.requires_grad} == {torch.float32}

    losses = [model(input_ids=TOKENS, labels=TOKENS).loss for model in models]
    assert torch.allclose(*losses, rtol=1e-5)
    for loss in losses:
        loss.backward()
    gradients = [[p.grad for p in model.parameters() if p.requires_grad] for model in models]
    assert len(gradients[0]) == 2 * LINEAR_LAYERS
    for ours, reference in zip(*gradients, strict=True):
        assert torch.allclose(ours, reference, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_adapters_get_a_floating_point_dtype(autocast_adapter_dtype: bool) -> None:
    model = make_llama().to(torch.bfloat16)
    peftkern.quantize_(model, peftkern.QuantConfig("nf4"))
    settings = peft.LoraConfig(r=4, target_modules="all-linear")
    model = peft.get_peft_model(model, settings, autocast_adapter_dtype=autocast_adapter_dtype)
    expected = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
    assert logits(model).dtype == torch.bfloat16


def test_dora_uses_the_dequantized_weight() -> None:
    quantized = make_quantized()
    dense = dense_twin(quantized)
    assert torch.allclose(*(logits(add_lora(model, use_dora=True)) for model in (quantized, dense)), atol=1e-5)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_an_unpatched_merge_fails_and_changes_nothing(format: str, safe_merge: bool) -> None:
    model = add_lora(make_quantized(format))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits(model)
    with pytest.raises(RuntimeError):
        model.merge_adapter(safe_merge=safe_merge)
    assert not any(module.merged for module in model.modules() if isinstance(module, lora.Linear))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), expected)


def test_a_safe_merge_into_int8_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"call peftkern\.patch\(model\) before merging"):
        add_lora(make_quantized("int8")).merge_adapter(safe_merge=True)


@pytest.mark.parametrize("method", ["pissa", "olora", "mica"])
def test_initialisations_that_need_dense_weights_fail_and_change_nothing(method: str) -> None:
    model = make_quantized()
    expected = model.get_submodule(LAYER).dequantize()
    with pytest.raises(TypeError):
        add_lora(model, init_lora_weights=method)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert torch.equal(layers[0].dequantize(), expected)


def test_adapter_round_trip(tmp_path: Path, nf4_folder: Path) -> None:
    model = add_lora(load(nf4_folder))
    model.save_pretrained(tmp_path)
    assert all("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    again = peft.PeftModel.from_pretrained(load(nf4_folder), str(tmp_path))
    assert torch.equal(logits(again), logits(model))


def test_prepare_model_for_kbit_training_leaves_codes_alone(nf4_folder: Path) -> None:
    model = load(nf4_folder, dtype=torch.bfloat16)
    expected = model.get_submodule(LAYER).dequantize(torch.float32)
    model = peft.prepare_model_for_kbit_training(model)
    assert torch.equal(model.get_submodule(LAYER).dequantize(torch.float32), expected)
    assert model.model.norm.weight.dtype == torch.float32


def training_data() -> list[dict[str, Tensor]]:
    return [{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_adapters(checkpointing: bool, nf4_folder: Path, tmp_path: Path) -> None:
    model = add_lora(load(nf4_folder))
    before = {name: p.clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        activation_checkpointing=checkpointing,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    Trainer(model, arguments, train_dataset=training_data()).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_trainer_refuses_a_quantized_model_without_adapters(nf4_folder: Path, tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(load(nf4_folder), arguments, train_dataset=training_data())
