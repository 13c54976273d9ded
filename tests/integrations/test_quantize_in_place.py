"""quantize_: what it takes, what it leaves, all or nothing."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_models import LAYER, LINEAR_LAYERS, load, logits, make_llama, quantized_names
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import peftkern
from peftkern.integrations import quantize as quantize_module
from peftkern.nn import QuantizedLinear

NF4 = peftkern.QuantConfig("nf4")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Which objects the model is made of, and their values."""
    modules = {name: (id(module), type(module)) for name, module in model.named_modules()}
    return {"modules": modules, "state": {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}}


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert after["modules"] == before["modules"] and after["state"].keys() == before["state"].keys()
    for key, (pointer, value) in before["state"].items():
        assert after["state"][key][0] == pointer and torch.equal(
            after["state"][key][1].nan_to_num(), value.nan_to_num()
        )
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")


def test_quantizes_in_place_and_reports() -> None:
    model = make_llama()
    layer, dense_bytes = model.get_submodule(LAYER), sum(p.nbytes for p in model.parameters())
    report = peftkern.quantize_(model, NF4)
    assert model.get_submodule(LAYER) is layer and type(layer) is QuantizedLinear
    assert report.quantized == quantized_names(model) and len(report.quantized) == LINEAR_LAYERS
    assert report.skipped == {"lm_head": "output embeddings or another head"}
    assert report.bytes_before - report.bytes_after > dense_bytes / 2
    assert report.format == "nf4" and report is model.hf_quantizer.report


def test_dense_weights_are_freed() -> None:
    model = make_llama()
    weights = [weakref.ref(layer.weight) for layer in model.model.layers.modules() if type(layer) is nn.Linear]
    peftkern.quantize_(model, NF4)
    assert len(weights) == LINEAR_LAYERS and all(weight() is None for weight in weights)


def test_numbers_are_those_of_the_dequantized_weights() -> None:
    model, dense = make_llama(), make_llama()
    peftkern.quantize_(model, NF4)
    for name in quantized_names(model):
        weight = dense.get_submodule(name).weight
        weight.data = peftkern.ops.dequantize(peftkern.ops.quantize(weight.detach(), double_quant=True))
    assert torch.allclose(logits(model), logits(dense), atol=1e-5)


def test_saves_and_loads_like_a_loaded_one(tmp_path: Path) -> None:
    model = make_llama()
    peftkern.quantize_(model, peftkern.QuantConfig("fp4", block_size=32, skip_modules=["mlp"]))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert quantized_names(again) == quantized_names(model)
    assert again.config.quantization_config == model.config.quantization_config


def test_what_is_quantized_stays_and_is_reported() -> None:
    model = make_llama()
    peftkern.quantize_(model, peftkern.QuantConfig("nf4", skip_modules=["layers.1", "lm_head"]))
    before = logits(model)
    state = model.get_submodule(LAYER).dequantize()
    report = peftkern.quantize_(model, peftkern.QuantConfig("int8", skip_modules=["lm_head"]))
    assert len(report.quantized) == LINEAR_LAYERS // 2 and all("layers.1" in name for name in report.quantized)
    assert report.skipped[LAYER] == "quantized before, in nf4"
    assert torch.equal(model.get_submodule(LAYER).dequantize(), state)
    assert torch.allclose(logits(model), before, atol=0.1)

    report = peftkern.quantize_(model, NF4)
    assert report.quantized == [] and report.bytes_before == report.bytes_after


def test_mixed_formats_round_trip(tmp_path: Path) -> None:
    model = make_llama()
    peftkern.quantize_(model, peftkern.QuantConfig("int8", skip_modules=["mlp", "lm_head"]))
    peftkern.quantize_(model, NF4)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert {m.format for m in again.modules() if isinstance(m, QuantizedLinear)} == {"int8", "nf4"}
    assert torch.equal(logits(again), logits(model))


def test_plain_modules_with_hooks_shared_layers_and_subclasses() -> None:
    class Special(nn.Linear):
        pass

    shared, tied = nn.Linear(64, 64), nn.Linear(64, 64)
    model = nn.ModuleDict(
        {
            "first": shared,
            "again": shared,
            "tied": tied,
            "other": nn.Linear(64, 64),
            "special": Special(64, 64),
            "attention": nn.MultiheadAttention(64, 2),
        }
    )
    model["other"].weight = tied.weight
    calls: list[int] = []
    shared.register_forward_pre_hook(lambda *_: calls.append(1))
    report = peftkern.quantize_(model, NF4)
    assert report.quantized == ["first"] and model["again"] is model["first"] is shared
    assert report.skipped == {
        "tied": "tied to another module",
        "other": "tied to another module",
        "special": "a layer of its own kind, Special",
        "attention.out_proj": "a layer of its own kind, NonDynamicallyQuantizableLinear",
    }
    shared(torch.randn(1, 64))
    assert calls == [1]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 65), (64, 64)], ids=str)
@pytest.mark.parametrize("format", ["nf4", "int8", "int8_blockwise"])
def test_odd_shapes(shape: tuple[int, int], format: str) -> None:
    model = nn.Sequential(nn.Linear(*shape))
    weight = model[0].weight.detach().clone()
    config = peftkern.QuantConfig(format)
    peftkern.quantize_(model, config)
    expected = peftkern.ops.dequantize(peftkern.ops.quantize(weight, **config.quantize_arguments))
    assert torch.equal(model[0].dequantize(), expected)


def test_head_of_a_classifier_stays_dense() -> None:
    config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=32)
    model = BertForSequenceClassification(config)
    report = peftkern.quantize_(model, NF4)
    assert report.skipped == {"classifier": "output embeddings or another head"}
    assert "bert.encoder.layer.0.output.dense" in report.quantized


def test_conv1d_of_gpt2() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96, n_positions=32)
    model, dense = GPT2LMHeadModel(config).eval(), GPT2LMHeadModel(config).eval()
    dense.load_state_dict(model.state_dict())
    peftkern.quantize_(model, NF4)
    for name, module in dense.named_modules():
        if isinstance(module, Conv1D):
            module.weight.data = model.get_submodule(name).dequantize().t().contiguous()
    assert len(quantized_names(model)) == 4
    assert torch.allclose(logits(model), logits(dense), atol=1e-5)


def test_base_layers_of_a_peft_model() -> None:
    model = make_llama()
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(model, settings)
    report = peftkern.quantize_(model, peftkern.QuantConfig("nf4", skip_modules=[]))
    assert len(report.quantized) == LINEAR_LAYERS
    assert f"base_model.model.{LAYER}.base_layer" in report.quantized
    assert not any("lora_" in name or "lm_head" in name for name in report.quantized)
    assert report.skipped[f"base_model.model.{LAYER}.lora_A.default"] == "part of an adapter"
    assert report.skipped["base_model.model.lm_head.modules_to_save.default"] == "part of an adapter"
    model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_keeps_what_the_model_keeps_in_float32() -> None:
    model = make_llama()
    model._keep_in_fp32_modules = {"down_proj"}
    report = peftkern.quantize_(model, NF4)
    assert report.skipped["model.layers.0.mlp.down_proj"] == "kept in float32 by the model"


def test_unused_skip_names_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    peftkern.quantize_(make_llama(), peftkern.QuantConfig("nf4", skip_modules=["lm_head", "up_projj"]))
    assert "up_projj" in caplog.text and "lm_head" not in caplog.text


# ---- all or nothing


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "int8_blockwise"])
def test_weights_that_are_not_finite(format: str, value: float) -> None:
    model = make_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: .*finite"):
        peftkern.quantize_(model, peftkern.QuantConfig(format))
    assert_unchanged(model, before)


def test_nan_in_a_skipped_layer_is_no_concern() -> None:
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    assert len(peftkern.quantize_(model, NF4).quantized) == LINEAR_LAYERS


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_wrong_dtype(dtype: torch.dtype) -> None:
    model = make_llama()
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.zeros(64, 128, dtype=dtype))
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"down_proj\.weight must be float32, bfloat16 or float16, got {dtype}"):
        peftkern.quantize_(model, NF4)
    assert_unchanged(model, before)


def test_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device"):
        peftkern.quantize_(model, NF4)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_the_model_as_it_was(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = make_llama(), []

    def fail_late(weight: torch.Tensor, **arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == LINEAR_LAYERS:
            raise error
        return quantize(weight, **arguments)

    quantize = quantize_module.quantize
    monkeypatch.setattr(quantize_module, "quantize", fail_late)
    before = snapshot(model)
    with pytest.raises(error):
        peftkern.quantize_(model, NF4)
    assert_unchanged(model, before)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        peftkern.quantize_("model", NF4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"config must be a peftkern\.QuantConfig, got str"):
        peftkern.quantize_(make_llama(), "nf4")  # type: ignore[arg-type]


def test_a_model_of_another_quantizer_is_refused(dense_folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model = load(dense_folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(ValueError, match="already quantized by bitsandbytes"):
        peftkern.quantize_(model, NF4)


def test_layers_that_accelerate_moves_are_refused() -> None:
    from accelerate import cpu_offload

    model = cpu_offload(make_llama(), execution_device="cpu")
    with pytest.raises(ValueError, match=r"device_map|meta"):
        peftkern.quantize_(model, NF4)


def test_accelerate_can_offload_quantized_layers() -> None:
    from accelerate import cpu_offload

    model = make_llama()
    peftkern.quantize_(model, NF4)
    expected = logits(model)
    model = cpu_offload(model, execution_device="cpu")
    assert model.get_submodule(LAYER).weight.is_meta
    assert torch.equal(logits(model), expected) and torch.equal(logits(model), expected)
