"""A GGUF file: loaded dense by transformers, then quantized in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import load, logits, quantized_names

import peftkern

gguf = pytest.importorskip("gguf")

LINEARS = {
    "attn_q": (64, 64),
    "attn_k": (32, 64),
    "attn_v": (32, 64),
    "attn_output": (64, 64),
    "ffn_gate": (128, 64),
    "ffn_up": (128, 64),
    "ffn_down": (64, 128),
}
VOCABULARY = 96


def add_settings(writer: Any) -> None:
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"token{index}" for index in range(VOCABULARY)])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([1] * VOCABULARY)


@pytest.fixture
def gguf_folder(tmp_path: Path) -> Path:
    """A folder with ``model.gguf``, a Llama of one layer in float32."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    add_settings(writer)
    random = np.random.default_rng(0)
    norms = {"output_norm": (64,), "blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,)}
    embeddings = {"token_embd": (VOCABULARY, 64), "output": (VOCABULARY, 64)}
    layers = {f"blk.0.{name}": shape for name, shape in LINEARS.items()}
    for name, shape in {**embeddings, **norms, **layers}.items():
        writer.add_tensor(f"{name}.weight", (random.standard_normal(shape) * 0.1).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path


def test_quantized_in_place_saved_and_loaded(gguf_folder: Path) -> None:
    model = load(gguf_folder, gguf_file="model.gguf")
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    report = peftkern.quantize_(model, peftkern.QuantConfig("nf4"))
    assert len(report.quantized) == len(LINEARS) and list(report.skipped) == ["lm_head"]
    for name in quantized_names(model):
        expected = peftkern.ops.dequantize(peftkern.ops.quantize(dense[f"{name}.weight"], double_quant=True))
        assert torch.equal(model.get_submodule(name).dequantize(), expected)
    model.save_pretrained(gguf_folder / "nf4")
    assert torch.equal(logits(load(gguf_folder / "nf4")), logits(model))


def test_transformers_refuses_a_gguf_file_together_with_a_config(gguf_folder: Path) -> None:
    with pytest.raises(ValueError, match="GGUF"):
        load(gguf_folder, gguf_file="model.gguf", quantization_config=peftkern.QuantConfig("nf4"))
