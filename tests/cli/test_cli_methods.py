"""``peftkern finetune --method``: every method trains, writes what it says, and refuses what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_helpers import Command

from peftkern.finetune.config import FinetuneConfig
from peftkern.finetune.errors import InputError
from peftkern.finetune.methods import ADAPTER, DELTA, METHODS, MODEL, PRUNED, MethodEntry, build

STEPS = ("--max-steps", 8, "--learning-rate", 1e-2, "--batch-size", 8)
OPTIONS: dict[str, str] = {
    "lt-sft": "density=0.1",
    "spiel": "density=0.1,period=4,window=1",
    "rosa": "density=0.05,schedule=wl1",
    "dsee": "entries=50,sparsity=0.1",
}
"""What a method needs to do something visible on a tiny model in a few steps."""


@pytest.mark.parametrize("entry", METHODS.values(), ids=lambda entry: entry.name)
def test_a_run_learns_and_what_it_writes_reaches_the_same_loss(
    command: Command, model_folder: Path, pairs_file: Path, tmp_path: Path, entry: MethodEntry
) -> None:
    output = tmp_path / "out"
    options = ["--method", entry.name, *(("--quantization", "none") if entry.trains_weights else ())]
    if entry.name in OPTIONS:
        options += ["--method-options", OPTIONS[entry.name]]
    result = command("finetune", model_folder, "--data", pairs_file, "--output", output, *STEPS, *options)
    assert result.exit_code == 0, result.output
    summary = json.loads((output / "summary.json").read_text())
    before, after = (summary["held_out_loss"][when]["loss"] for when in ("before", "after"))
    assert after < before
    assert summary["trained"] > 0
    assert {name for name in (ADAPTER, DELTA, MODEL, PRUNED) if (output / name).is_dir()} == set(entry.results)
    given = f" ({OPTIONS[entry.name]})" if entry.name in OPTIONS else ""
    assert f"{entry.name}{given}: {entry.summary}" in " ".join(result.output.split())
    assert _loss_of(output, model_folder, pairs_file, summary) == pytest.approx(after, rel=1e-4)


def _loss_of(output: Path, base: Path, data: Path, summary: dict[str, object]) -> float:
    """The held-out loss of a fresh model with the results in ``output``."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import peftkern
    from peftkern.finetune.encoding import PadRight, load_splits
    from peftkern.finetune.evaluation import held_out_loss

    quantization = None if str(summary["quantization"]) == "none" else peftkern.QuantConfig("nf4", double_quant=True)
    folder = output / MODEL if (output / MODEL).is_dir() else base
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization)
    if (output / PRUNED).is_dir():
        pruned = peftkern.sparse.Pruned.load(output / PRUNED)
        assert {mask.density for mask in pruned.masks.values()} != {1.0}
        pruned.apply_to(model)
    if (output / DELTA).is_dir():
        peftkern.sparse.SparseUpdate.load(output / DELTA).attach_to(model)
    if (output / ADAPTER).is_dir():
        model = peft.PeftModel.from_pretrained(model, output / ADAPTER)
    config = FinetuneConfig(model=str(base), data=str(data))
    splits = load_splits(config, AutoTokenizer.from_pretrained(base), config.max_length)
    return held_out_loss(model, splits.held_out, PadRight(0), 4).loss


@pytest.mark.parametrize("name", [entry.name for entry in METHODS.values() if entry.trains_weights])
def test_a_method_that_trains_weights_refuses_quantized_ones(name: str) -> None:
    with pytest.raises(InputError, match="add --quantization none"):
        FinetuneConfig(model="m", data="d", method=name)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", "density=0.1", "lora has none"),
        ("hft", "ratio", "is not NAME=VALUE"),
        ("hft", "ratio=0.4,ratio=0.5", "is given twice"),
        ("hft", "ration=0.4", "did you mean 'ratio'"),
        ("hft", "ratio=half", "ratio must be float, got 'half'"),
        ("hft", "ratio=2", "ratio must be between 0 and 1"),
    ],
)
def test_wrong_options_are_refused_with_what_would_work(method: str, options: str, message: str) -> None:
    config = FinetuneConfig(model="m", data="d", method=method, method_options=options, quantization="none")
    with pytest.raises(InputError, match=f"--method-options: .*{message}"):
        build(config)


def test_options_reach_the_method_and_seed_is_the_runs() -> None:
    config = FinetuneConfig(
        model="m", data="d", method="hft", method_options="ratio=0.4, embeddings=freeze", quantization="none", seed=7
    )
    method = build(config)
    assert method is not None
    settings = method._settings  # type: ignore[attr-defined]
    assert (settings.ratio, settings.embeddings, settings.seed) == (0.4, "freeze", 7)


def test_target_modules_and_seed_are_those_of_the_run() -> None:
    method = build(FinetuneConfig(model="m", data="d", method="spiel", target_modules="q_proj,v_proj", seed=7))
    assert method is not None
    assert method._targets == ["q_proj", "v_proj"]  # type: ignore[attr-defined]
    assert method._seed == 7  # type: ignore[attr-defined]
