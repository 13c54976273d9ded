"""Loading through transformers: quantized on the way in, saved, loaded again, and errors that name what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LAYER, LINEAR_LAYERS, TOKENS, load, logits, make_llama, quantized_names
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

import peftkern
from peftkern.integrations import config_from_pretrained, conversion
from peftkern.integrations.bitsandbytes import to_bitsandbytes
from peftkern.nn import QuantizedLinear

FORMATS = ["nf4", "fp4", "int8", "int8_blockwise"]


def edit(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a saved model with other tensors."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("format", FORMATS)
def test_quantizes_saves_and_loads_exactly(format: str, dense_folder: Path, tmp_path: Path) -> None:
    config = peftkern.QuantConfig(format, block_size=32)
    model = load(dense_folder, quantization_config=config)
    assert len(quantized_names(model)) == LINEAR_LAYERS and type(model.lm_head) is nn.Linear
    dense = load(dense_folder)
    expected = peftkern.ops.dequantize(
        peftkern.ops.quantize(dense.get_submodule(LAYER).weight.detach(), **config.quantize_arguments)
    )
    assert torch.equal(model.get_submodule(LAYER).dequantize(), expected)

    model.save_pretrained(tmp_path / "first")
    stated = json.loads((tmp_path / "first" / "config.json").read_text())["quantization_config"]
    assert stated == config.to_dict()
    again = load(tmp_path / "first")
    assert torch.equal(logits(again), logits(model))
    assert again.config.quantization_config == config
    again.save_pretrained(tmp_path / "second")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]


def test_same_as_quantizing_in_memory(dense_folder: Path) -> None:
    config = peftkern.QuantConfig("nf4")
    loaded, in_memory = load(dense_folder, quantization_config=config), load(dense_folder)
    report = peftkern.quantize_(in_memory, config)
    assert torch.equal(logits(loaded), logits(in_memory))
    assert loaded.hf_quantizer.report == report


def test_report(dense_folder: Path) -> None:
    model = load(dense_folder, quantization_config=peftkern.QuantConfig("nf4"))
    report = model.hf_quantizer.report
    assert report.quantized == quantized_names(model)
    assert report.skipped == {"lm_head": "output embeddings or another head"}
    dense_bytes = sum(t.nbytes for t in [*make_llama().parameters(), *make_llama().buffers()])
    assert report.bytes_before == dense_bytes
    assert report.bytes_after == sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) < dense_bytes / 3
    assert "14 layers in nf4" in str(report) and "lm_head" in str(report)


def test_never_holds_the_dense_model(dense_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    models: list[nn.Module] = []
    before_loading = LlamaForCausalLM.__init__

    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        before_loading(self, *args, **kwargs)
        models.append(self)

    def count(weight: Tensor, **arguments: Any) -> Any:
        dense = [m for m in models[0].model.layers.modules() if type(m) is nn.Linear and not m.weight.is_meta]
        held.append(len(dense))
        return quantize(weight, **arguments)

    quantize = conversion.quantize
    monkeypatch.setattr(LlamaForCausalLM, "__init__", remember)
    monkeypatch.setattr(conversion, "quantize", count)
    load(dense_folder, quantization_config=peftkern.QuantConfig("nf4"))
    assert held == [0] * LINEAR_LAYERS


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists a process's mapped files")
def test_the_dense_checkpoint_is_not_mapped_afterwards(dense_folder: Path) -> None:
    model = load(dense_folder, quantization_config=peftkern.QuantConfig("nf4"))
    assert str(dense_folder) not in Path("/proc/self/maps").read_text()
    assert torch.equal(model.lm_head.weight, make_llama().lm_head.weight)


def test_tied_head_biases_and_shards(tmp_path: Path) -> None:
    make_llama(tie_word_embeddings=True, attention_bias=True).save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    model = load(tmp_path / "dense", quantization_config=peftkern.QuantConfig("nf4", skip_modules=[]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.hf_quantizer.report.skipped == {"lm_head": "tied to another module"}
    assert model.get_submodule(LAYER).bias is not None
    model.save_pretrained(tmp_path / "nf4", max_shard_size="10KB")
    assert len(list((tmp_path / "nf4").glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path / "nf4")), logits(model))


def test_skip_modules_stands_in_place_of_the_default(dense_folder: Path, tmp_path: Path) -> None:
    config = peftkern.QuantConfig("nf4", skip_modules=["layers.0", "mlp.up_proj"])
    model = load(dense_folder, quantization_config=config)
    assert set(quantized_names(model)) == {
        "lm_head",
        *(f"model.layers.1.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *(f"model.layers.1.mlp.{name}" for name in ("gate_proj", "down_proj")),
    }
    assert model.hf_quantizer.report.skipped["model.layers.1.mlp.up_proj"] == "in skip_modules"
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert quantized_names(again) == quantized_names(model)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtype(dtype: torch.dtype, dense_folder: Path, nf4_folder: Path) -> None:
    model = load(dense_folder, dtype=dtype, quantization_config=peftkern.QuantConfig("nf4"))
    layer = model.get_submodule(LAYER)
    assert layer.weight_dtype == dtype and layer.scales_absmax.dtype == torch.float32
    assert logits(model).dtype == dtype
    reloaded = load(nf4_folder, dtype=dtype)
    assert {p.dtype for p in reloaded.parameters()} == {dtype, torch.uint8}
    assert logits(reloaded).dtype == dtype
    layer, original = reloaded.get_submodule(LAYER), load(nf4_folder).get_submodule(LAYER)
    assert torch.equal(layer.dequantize(torch.float32), original.dequantize(torch.float32))


def test_device_map(dense_folder: Path, nf4_folder: Path) -> None:
    for device_map in ({"": "cpu"}, "cpu", "auto"):
        model = load(nf4_folder, device_map=device_map)
        assert torch.equal(logits(model), logits(load(nf4_folder)))
    with pytest.raises(ValueError, match="disk"):
        load(dense_folder, quantization_config=peftkern.QuantConfig(), device_map={"model": "disk", "lm_head": "cpu"})


def test_a_new_head_is_dense_and_initialized(nf4_folder: Path, dense_folder: Path) -> None:
    for source in (
        AutoModelForSequenceClassification.from_pretrained(
            dense_folder, quantization_config=peftkern.QuantConfig("nf4", skip_modules=[])
        ),
        AutoModelForSequenceClassification.from_pretrained(nf4_folder),
    ):
        assert type(source.score) is nn.Linear and source.score.weight.requires_grad
        assert 0 < source.score.weight.std() < 1
        assert len(quantized_names(source)) == LINEAR_LAYERS
        assert "score" in source.hf_quantizer.report.skipped


def test_conv1d_of_gpt2(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96, n_positions=32)).eval()
    dense.save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=peftkern.QuantConfig("nf4", double_quant=False))
    layer = model.transformer.h[0].attn.c_attn
    assert type(layer) is QuantizedLinear and (layer.in_features, layer.out_features) == (64, 192)
    assert torch.equal(
        layer.dequantize(),
        peftkern.ops.dequantize(peftkern.ops.quantize(dense.transformer.h[0].attn.c_attn.weight.detach().t())),
    )
    model.save_pretrained(tmp_path / "nf4")
    assert torch.equal(logits(load(tmp_path / "nf4")), logits(model))


def test_dequantize_gives_an_ordinary_model_back(nf4_folder: Path, tmp_path: Path) -> None:
    model = load(nf4_folder)
    expected = logits(model)
    dense = model.dequantize()
    assert not quantized_names(dense) and type(dense.get_submodule(LAYER)) is nn.Linear
    assert torch.allclose(logits(dense), expected, atol=1e-5)
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path)), logits(dense))


# ---- bitsandbytes


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_loads_what_bitsandbytes_saved(format: str, double_quant: bool, dense_folder: Path, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    theirs = load(
        dense_folder,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=format, bnb_4bit_use_double_quant=double_quant
        ),
    )
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path, config=config_from_pretrained(str(tmp_path)))
    ours = load(dense_folder, quantization_config=peftkern.QuantConfig(format, double_quant=double_quant))
    assert quantized_names(model) == quantized_names(ours)
    assert torch.equal(logits(model), logits(ours))
    for name in quantized_names(model):
        weight = theirs.get_submodule(name).weight
        expected = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(model.get_submodule(name).dequantize(), expected)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_bitsandbytes_loads_what_we_saved(format: str, dense_folder: Path, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    config = peftkern.QuantConfig(format)
    ours = load(dense_folder, quantization_config=config)
    ours.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stated, "quantization_config": to_bitsandbytes(config)}))
    theirs = load(tmp_path)
    for name in quantized_names(ours):
        layer = theirs.get_submodule(name)
        if format == "int8":
            found = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
        else:
            found = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(found, ours.get_submodule(name).dequantize())


def test_loads_int8_that_bitsandbytes_saved(dense_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    load(dense_folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True)).save_pretrained(tmp_path)
    model = load(tmp_path, config=config_from_pretrained(str(tmp_path)))
    tensors = load_file(tmp_path / "model.safetensors")
    for name in quantized_names(model):
        expected = tensors[f"{name}.weight"] * tensors[f"{name}.SCB"][:, None] * 0.007874015718698502
        assert torch.equal(model.get_submodule(name).dequantize(), expected)
    assert len(quantized_names(model)) == LINEAR_LAYERS


def test_config_of_other_checkpoints_is_unchanged(dense_folder: Path, nf4_folder: Path) -> None:
    assert not hasattr(config_from_pretrained(str(dense_folder)), "quantization_config")
    assert config_from_pretrained(str(nf4_folder)).quantization_config == peftkern.QuantConfig("nf4").to_dict()


# ---- bad input


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, dense_folder: Path, tmp_path: Path) -> None:
    folder = edit(dense_folder, tmp_path / "bad", lambda tensors: tensors[f"{LAYER}.weight"][0].fill_(value))
    with pytest.raises(ValueError, match=rf"{LAYER}\.weight: .*finite"):
        load(folder, quantization_config=peftkern.QuantConfig("nf4"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.weight.absmax"), rf"{LAYER}\.weight\.absmax: missing"),
        (lambda t: t.pop(f"{LAYER}.weight.quant_map"), rf"{LAYER}\.weight\.quant_map: missing"),
        (lambda t: t.pop(f"{LAYER}.weight"), rf"{LAYER}\.weight: missing"),
        (
            lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"][:10].clone()}),
            rf"{LAYER}\.weight: \[64, 64\] in nf4 takes 2048 bytes",
        ),
        (
            lambda t: t[f"{LAYER}.weight.quant_state.bitsandbytes__nf4"].fill_(0),
            rf"{LAYER}\.weight\.quant_state\.bitsandbytes__nf4: is not JSON",
        ),
        (
            lambda t: [t.pop(key) for key in list(t) if key.startswith(f"{LAYER}.weight.")],
            rf"{LAYER}\.weight: is packed, so exactly one of",
        ),
        (
            lambda t: t.update(
                {
                    f"{LAYER}.weight{end}": t[f"model.layers.0.mlp.up_proj.weight{end}"].clone()
                    for end in (
                        "",
                        ".absmax",
                        ".quant_map",
                        ".nested_absmax",
                        ".nested_quant_map",
                        ".quant_state.bitsandbytes__nf4",
                    )
                }
            ),
            rf"{LAYER}\.weight: size mismatch, the model has \[64, 64\] and the checkpoint \[128, 64\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.uint8)}),
            r"model\.norm\.weight: is quantized, but the model has a LlamaRMSNorm",
        ),
    ],
)
def test_corrupt_checkpoints_name_the_key(change: Any, message: str, nf4_folder: Path, tmp_path: Path) -> None:
    folder = edit(nf4_folder, tmp_path / "bad", change)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_all_errors_of_a_checkpoint_are_listed(nf4_folder: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in ("q_proj", "k_proj"):
            tensors.pop(f"model.layers.1.self_attn.{name}.weight.absmax")

    with pytest.raises(ValueError) as error:
        load(edit(nf4_folder, tmp_path / "bad", change))
    assert "1.self_attn.q_proj.weight.absmax" in str(error.value)
    assert "1.self_attn.k_proj.weight.absmax" in str(error.value)


def test_truncated_file(nf4_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(nf4_folder, tmp_path / "bad")
    file = tmp_path / "bad" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"incomplete|not fully covered"):
        load(tmp_path / "bad")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": "nf9"}, "format"), ({"block_size": 7}, "block_size"), ({"bits": 4}, "unknown fields")],
)
def test_bad_config_json(change: dict[str, Any], message: str, nf4_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(nf4_folder, tmp_path / "bad")
    file = tmp_path / "bad" / "config.json"
    stated = json.loads(file.read_text())
    stated["quantization_config"].update(change)
    file.write_text(json.dumps(stated))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "bad")


def test_generates(nf4_folder: Path) -> None:
    generated = load(nf4_folder).generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape[1] > TOKENS.shape[1]
