"""Budgets, devices, refusals, and what a plan shows and writes."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_models import llama
from typer.testing import CliRunner

import peftkern
from peftkern.backends import registry
from peftkern.cli.main import app
from peftkern.plan import PlanError
from peftkern.plan.devices import NAMES, find, key_of
from peftkern.plan.search import parse_bytes
from peftkern.plan.stand_ins import STAND_INS
from peftkern.select.flops import FlopCounter

GPU = {"device": "l4"}


def test_flops_are_those_that_run() -> None:
    from peftkern.bench.plan_accuracy import build_real

    call = {"batch": 2, "length": 32}
    model, ids = build_real(llama(), call), torch.zeros(2, 32, dtype=torch.int64)
    with FlopCounter() as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    assert peftkern.plan(llama(), **call).flops == pytest.approx(counter.total)


def small(**changes: Any) -> Any:
    return llama(num_hidden_layers=1, max_position_embeddings=128, **changes)


def test_length_before_batch() -> None:
    found = peftkern.plan(small(), budget="600MB", **GPU)
    assert found.options.length == 128 and found.options.batch > 1 and found.fits
    assert peftkern.plan(small(), batch=found.options.batch + 1, length=128, **GPU).peak > 600e6


def test_the_longest_within_a_budget() -> None:
    found = peftkern.plan(small(), batch=4, budget="526MB", **GPU)
    assert found.options.length == 64 and found.options.batch == 4 and found.fits
    assert peftkern.plan(small(), batch=4, length=128, **GPU).peak > 526e6


@pytest.mark.parametrize(
    "saving",
    [
        {"logits": False},
        {"logits": False, "optimizer": "AdamW8bit"},
    ],
)
def test_options_are_taken_in_the_order_of_what_they_cost(saving: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"batch": 2, "length": 128, "quantization": "none", **GPU}
    peak = peftkern.plan(small(), **{**arguments, **saving}).peak
    found = peftkern.plan(small(), budget=peak, **arguments)
    assert found.peak <= peak
    taken = {name: getattr(found.options, name) for name in ("optimizer", "quantization", "gradient_checkpointing")}
    assert taken == {"optimizer": "AdamW", "quantization": "none", "gradient_checkpointing": False} | {
        name: value for name, value in saving.items() if name != "logits"
    }
    assert not found.options.logits


def test_an_impossible_budget_names_the_smallest() -> None:
    arguments: dict[str, Any] = {"batch": 2, "length": 64, **GPU}
    with pytest.raises(PlanError, match=r"smallest for 2 x 64 tokens is 0\.\d+ GB with logits=False") as refusal:
        peftkern.plan(small(), budget=1000, **arguments)
    named = float(str(refusal.value).partition("tokens is ")[2].partition(" GB")[0]) * 1e9
    assert peftkern.plan(small(), budget=named * 1.001, **arguments).fits


def test_ends_are_quantized_where_that_saves_memory() -> None:
    call: dict[str, Any] = {"batch": 2, "length": 128, "device": "l4", "optimizer": "AdamW8bit"}
    config, kept = small(vocab_size=32768), ["logits", "recompute", "gradient_checkpointing"]
    peak = peftkern.plan(config, **call, embeddings="int8").peak
    found = peftkern.plan(config, **call, budget=peak, keep=kept)
    # of the head, what the product decodes would be more than is saved
    assert found.fits and found.options.embeddings == "int8" and found.options.head is None
    with pytest.raises(PlanError, match="nothing fits"):
        peftkern.plan(config, **call, budget=peak, keep=[*kept, "embeddings", "head"])


def test_of_the_formats_that_fit_the_fastest_is_found() -> None:
    call: dict[str, Any] = {"batch": 1, "length": 32, "device": "l4", "quantization": "auto"}
    assert peftkern.plan(small(), **call, budget="10GB").options.quantization == "none"
    narrower = peftkern.plan(small(), **{**call, "quantization": "int8"}).peak
    found = peftkern.plan(small(), **call, budget=narrower, keep=["logits", "optimizer", "recompute"])
    assert found.options.quantization == "int8"


def test_a_batch_is_divided_where_it_is_allowed() -> None:
    call: dict[str, Any] = {"batch": 4, "length": 128, "device": "l4", "keep": ["logits"]}
    halved = peftkern.plan(small(), **{**call, "batch": 2, "gradient_accumulation": 2, "optimizer": "AdamW8bit"})
    whole = peftkern.plan(small(), **call)
    assert (
        halved.flops == pytest.approx(whole.flops, rel=1e-3) and halved.parts["gradients"] >= whole.parts["gradients"]
    )
    kept = [*call.pop("keep"), "embeddings", "head", "recompute", "gradient_checkpointing"]
    found = peftkern.plan(small(), **call, keep=kept, budget=halved.peak, split_batch=True).options
    assert (found.batch, found.gradient_accumulation, found.logits) == (2, 2, True)
    with pytest.raises(PlanError, match="the smallest for 4 x 128 tokens"):
        peftkern.plan(small(), **call, keep=kept, budget=halved.peak)


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("Tesla T4", "t4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 3060", None),
    ],
)
def test_gpus_are_known_by_what_their_driver_calls_them(driver: str, name: str | None) -> None:
    assert key_of(driver) == name


def test_more_labels_take_no_more_than_one_chunk() -> None:
    call = {"batch": 2, "length": 128, "logits": False}
    few, all_ = (peftkern.plan(llama(), labelled=share, **call).parts["loss"] for share in (0.25, 1.0))
    assert few < 0.5 * all_


@pytest.mark.parametrize("text", ["12GB", "12 gb", "12e9", "12000MB"])
def test_sizes(text: str) -> None:
    value: str | float = float(text) if "e" in text else text
    assert parse_bytes(value) == 12e9
    assert parse_bytes("1.5GiB") == 1.5 * 2**30


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "dora"}, "method must be one of 'lora'"),
        ({"method": "full", "quantization": "nf4"}, "which must be dense"),
        ({"device": "rtx-4080"}, "did you mean 'rtx-4090'"),
        ({"budget": "a lot"}, "budget must be bytes"),
        ({"batch": 0}, "batch must be"),
        ({"gradient_accumulation": 0}, "gradient_accumulation must be"),
        ({"quantization": "auto"}, "a budget, a batch and a length"),
        ({"batch": 1, "length": 8, "budget": 1e9, "keep": ["rank"]}, "keep: a search changes logits, .*got 'rank'"),
        ({"labelled": 0.0}, "labelled must be"),
        ({"logits": False, "patched": False}, "leave patched=True"),
        ({"target_modules": ["nothing"]}, "target_modules"),
        ({"embeddings": "8bit"}, "embeddings must be one of 'nf4', 'fp4', 'int8'; got '8bit'"),
        ({"head": "int8", "quantization": "none"}, "give a quantization"),
        ({"embeddings": "nf4", "block_size": 4096}, "share blocks of 4096"),
    ],
)
def test_refusals_name_the_argument(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        peftkern.plan(small(), **{**GPU, **arguments})


def test_every_gpu_has_rates() -> None:
    for name in NAMES[1:]:
        device = find(name)
        assert device.memory is not None and device.memory > 10e9 and not device.measured
        assert device.rates.products["bfloat16"] >= device.rates.products["float32"] * 0.9
        assert 1e11 < device.rates.bandwidth < 1e13


def test_the_cpu_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path))
    first = find("cpu").rates
    assert find("cpu").rates == first
    assert len(json.loads((tmp_path / "plan-cpu.json").read_text())) == 1


def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path / "model")
    png, numbers = tmp_path / "plan.png", tmp_path / "plan.json"
    files = ["--output", str(png), "--json", str(numbers)]
    options = ["--batch", "1", "--length", "64", "--budget", "2GB", "--device", "rtx-4090", "--quantization", "nf4"]
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "model"), *options, *files])
    assert result.exit_code == 0, result.output
    assert "activations" in result.output and "fits into the budget" in result.output and "estimate" in result.output
    assert "peftkern.patch(model)" in result.output
    data = json.loads(numbers.read_text())
    assert data["peak"] == pytest.approx(sum(data["parts"].values()) + data["beside"])
    assert data["options"]["quantization"] == "nf4"
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path / "model")
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "model"), "--device", "rtx-4080"])
    assert result.exit_code == 2
    assert "did you mean 'rtx-4090'" in result.output + (result.stderr or "")


@pytest.mark.parametrize("operation", STAND_INS)
def test_a_stand_in_takes_what_its_operation_takes(operation: str) -> None:
    """So that an operation that gets an argument more fails here by its name."""
    arguments = inspect.signature(registry.reference(operation)).parameters
    inspect.signature(STAND_INS[operation]).bind(*arguments)
