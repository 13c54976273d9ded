"""Twenty training steps beside PEFT + bitsandbytes: the same losses, and the same adapter on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import peftkern

STEPS, BATCH, LENGTH, VOCABULARY = 20, 2, 24, 320
LOSS_TOLERANCE = 1e-4
ADAPTER_TOLERANCE = 1e-4  # measured 2e-6; AdamW divides by the gradient, so rounding shows where that is tiny

BITSANDBYTES = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)


@dataclass(frozen=True)
class Run:
    """What one side's training leaves: its losses, step by step, and the folder of its adapter."""

    losses: list[float]
    folder: Path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights on disk; every row is whole blocks of 64, where bitsandbytes decodes rightly."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(base: Path, quantization_config: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization_config, dtype=torch.float32)


def with_adapter(model: Any) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def batches() -> list[Tensor]:
    """Text with something to learn: each row counts upwards from its own start."""
    starts = torch.randint(VOCABULARY, (STEPS, BATCH, 1), generator=torch.Generator().manual_seed(2))
    return list((starts + torch.arange(LENGTH)) % VOCABULARY)


def train(model: Any, folder: Path) -> Run:
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    losses = []
    for ids in batches():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.save_pretrained(folder)
    return Run(losses, folder)


@pytest.fixture(scope="module")
def peer(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(with_adapter(load(base, BITSANDBYTES)), tmp_path_factory.mktemp("peer"))


@pytest.fixture(scope="module")
def ours(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    model = with_adapter(load(base, peftkern.QuantConfig("nf4", double_quant=True)))
    peftkern.patch(model, strict=True)
    return train(model, tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def ours_over_bitsandbytes(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The other way in: a model that bitsandbytes loaded, patched."""
    model = with_adapter(load(base, BITSANDBYTES))
    peftkern.patch(model, strict=True)
    return train(model, tmp_path_factory.mktemp("ours_over_bitsandbytes"))


@pytest.fixture(scope="module", params=["ours", "ours_over_bitsandbytes"])
def trained(request: pytest.FixtureRequest) -> Run:
    run: Run = request.getfixturevalue(request.param)
    return run


def relative_difference(ours: Tensor, peer: Tensor) -> float:
    return float((ours - peer).double().norm() / peer.double().norm())


def test_losses_agree_at_every_step(trained: Run, peer: Run) -> None:
    assert len(trained.losses) == STEPS
    assert trained.losses == pytest.approx(peer.losses, rel=LOSS_TOLERANCE)


def test_training_learns_something(trained: Run) -> None:
    assert trained.losses[-1] < trained.losses[0] - 0.05


def test_adapter_files_agree_key_by_key(trained: Run, peer: Run) -> None:
    mine = load_file(trained.folder / "adapter_model.safetensors")
    theirs = load_file(peer.folder / "adapter_model.safetensors")
    assert mine.keys() == theirs.keys()
    assert len(mine) == 3 * 7 * 2
    for key, expected in theirs.items():
        assert (mine[key].shape, mine[key].dtype) == (expected.shape, expected.dtype), key
        assert mine[key].isfinite().all(), key
        assert relative_difference(mine[key], expected) <= ADAPTER_TOLERANCE, key


def test_adapter_configurations_are_equal(trained: Run, peer: Run) -> None:
    mine, theirs = (json.loads((run.folder / "adapter_config.json").read_text()) for run in (trained, peer))
    for config in (mine, theirs):
        config["target_modules"] = sorted(config["target_modules"])  # PEFT writes a set in no particular order
    assert mine == theirs


def test_our_adapter_loads_into_the_peers_model(base: Path, trained: Run, peer: Run) -> None:
    ids = batches()[0]
    losses = []
    for run in (trained, peer):
        model = peft.PeftModel.from_pretrained(load(base, BITSANDBYTES), run.folder, is_trainable=True).train()
        losses.append(float(model(input_ids=ids, labels=ids).loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=LOSS_TOLERANCE)
    assert losses[0] < peer.losses[0] - 0.05
