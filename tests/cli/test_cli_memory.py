"""``peftkern finetune --memory``: what is chosen for a budget, what stays as it was asked for, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import Command
from typer.testing import Result

from peftkern.finetune import fitting, run
from peftkern.finetune.config import FinetuneConfig
from peftkern.finetune.encoding import Splits
from peftkern.finetune.errors import InputError
from peftkern.plan.devices import Device, Rates

PROCESS = 100e6
"""Bytes that the process is taken to have before the model, so that budgets do not depend on what ran before."""


@pytest.fixture(autouse=True)
def a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that is not measured, on which a packed weight costs time."""
    rates = Rates({"float32": 1e10}, {"float32": 8e9}, 1e10, 1e9, 1e10, 1e-6)
    device = Device("cpu", None, PROCESS, 0.0, rates, measured=True)
    monkeypatch.setattr(fitting, "_device", lambda: device)
    monkeypatch.setattr(fitting, "_resident", lambda: PROCESS)


def config_of(folder: Path, **settings: Any) -> FinetuneConfig:
    return FinetuneConfig(model=str(folder), data="d", **settings)


def fitted(folder: Path, given: tuple[str, ...] = (), **settings: Any) -> fitting.Fit:
    from transformers import AutoConfig

    example = {"input_ids": [1] * 200, "labels": [1] * 200}
    config = config_of(folder, **settings)
    fitting.check(config)
    return fitting.fit(config, given, AutoConfig.from_pretrained(folder), Splits([example] * 4, [], 0, 0))


def smallest_named(folder: Path, given: tuple[str, ...] = (), **settings: Any) -> str:
    with pytest.raises(InputError, match=r"--memory: nothing fits into 0\.001 GB; the smallest") as refusal:
        fitted(folder, given, memory="1MB", **settings)
    return str(refusal.value).partition("tokens is ")[2].partition(" GB")[0]


def test_nothing_is_saved_where_there_is_room(model_folder: Path) -> None:
    found = fitted(model_folder, memory="10GB")
    assert found.settings == {
        "quantization": "none",
        "embeddings": None,
        "head": None,
        "optimizer": "AdamW",
        "logits": True,
        "recompute": None,
        "gradient_checkpointing": False,
        "batch_size": 4,
        "gradient_accumulation": 1,
    }
    assert found.beside == PROCESS and found.peak < 10e9 and found.reasons["head"] == "nothing else was needed"


def test_what_the_search_leaves_in_the_process_counts(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "_resident", lambda: 5 * PROCESS)
    found = fitted(model_folder, memory="10GB")
    assert found.beside == 5 * PROCESS and 5 * PROCESS < found.peak < 6 * PROCESS
    with pytest.raises(InputError, match=r"the search itself took more than was expected; 0\.\d+ GB would do"):
        fitted(model_folder, memory="450MB")


def test_the_smallest_budget_that_is_named_will_do(model_folder: Path) -> None:
    smallest = smallest_named(model_folder)
    found = fitted(model_folder, memory=f"{smallest}GB")
    assert found.peak <= float(smallest) * 1e9
    assert found.settings["batch_size"] == 1 and found.settings["gradient_accumulation"] == 4


def test_what_was_asked_for_stays(model_folder: Path) -> None:
    given = ("quantization", "embeddings", "optimizer", "logits", "gradient_accumulation", "gradient_checkpointing")
    smallest = smallest_named(model_folder, given, quantization="fp4")
    found = fitted(model_folder, given, quantization="fp4", memory=f"{smallest}GB")
    assert all(found.settings[name] == getattr(config_of(model_folder, quantization="fp4"), name) for name in given)
    assert found.reasons["quantization"] == "as it was asked for" and found.settings["batch_size"] == 4


def test_a_quantized_checkpoint_stays_what_it_is() -> None:
    from transformers import LlamaConfig

    import peftkern

    model_config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    model_config.quantization_config = peftkern.QuantConfig("fp4", embeddings="int8").to_dict()
    splits = Splits([{"input_ids": [1] * 20, "labels": [1] * 20}], [], 0, 0)
    found = fitting.fit(config_of(Path("m"), memory="1GB"), (), model_config, splits)
    assert not {"quantization", "embeddings", "head"} & found.settings.keys()
    model_config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(InputError, match="quantized by gptq, which cannot be planned"):
        fitting.fit(config_of(Path("m"), memory="1GB"), (), model_config, splits)


def test_what_is_no_language_model_is_refused() -> None:
    from transformers import ViTConfig

    splits = Splits([{"input_ids": [1] * 20, "labels": [1] * 20}], [], 0, 0)
    with pytest.raises(InputError, match="--memory: model: transformers has no language model for a ViTConfig"):
        fitting.fit(config_of(Path("m"), memory="1GB"), (), ViTConfig(), splits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": "a lot"}, "--memory: budget must be bytes"),
        ({"memory": "1GB", "method": "spiel"}, "--memory: what --method spiel takes cannot be predicted"),
        ({"memory": "1GB", "select": "random"}, "--memory: what --select takes cannot be predicted"),
        ({"memory": "1GB", "target_modules": "nothing"}, "--memory: target_modules"),
        ({"recompute": "layer*2", "gradient_checkpointing": True}, "--gradient-checkpointing or a --recompute"),
        ({"recompute": "layers"}, "--recompute must be mlp or up, or words for layers .*; got 'layers'"),
        ({"recompute": "mlp*0"}, "got 'mlp.0'"),
    ],
)
def test_refusals_name_the_option(model_folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fitted(model_folder, **settings)


def test_words_for_layers() -> None:
    assert config_of(Path("m"), recompute="layer, mlp*2,store").recompute_words == ["layer", "mlp", "mlp", "store"]
    assert config_of(Path("m"), recompute="up").recompute_words == "up"


# ---- whole runs


def finetune(command: Command, model_folder: Path, pairs_file: Path, output: Path, *options: Any) -> Result:
    steps = ("--max-steps", 2, "--max-length", 64, "--output", output)
    return command("finetune", model_folder, "--data", pairs_file, *steps, *options)


def test_a_run_follows_its_choice_and_a_resumed_one_too(
    command: Command, model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = finetune(command, model_folder, pairs_file, tmp_path / "out", "--memory", "1MB")
    assert refused.exit_code == 2 and not (tmp_path / "out").exists()
    size = refused.stderr.partition("tokens is ")[2].partition(" GB")[0]
    options = ("--memory", f"{size}GB", "--head", "int8")
    result = finetune(command, model_folder, pairs_file, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    chosen = summary["fit"]["settings"]
    assert chosen.items() <= summary["settings"].items()
    assert chosen["batch_size"] == 1 and chosen["gradient_accumulation"] == 4 and not chosen["logits"]
    assert summary["settings"]["head"] == "int8" and summary["fit"]["reasons"]["head"] == "as it was asked for"
    assert "held-out loss before" in result.output and "peak of a step" in result.output
    assert "--no-logits" in result.output and "MB predicted" in result.output

    monkeypatch.delattr(fitting, "fit")  # what was chosen is read, not found again
    again = finetune(command, model_folder, pairs_file, tmp_path / "out", *options, "--resume", "--max-steps", 3)
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["fit"] == summary["fit"]


def test_a_loss_without_logits_is_the_same(model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from peftkern.finetune.encoding import PadRight
    from peftkern.finetune.evaluation import held_out_loss

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    examples = [{"input_ids": list(range(3, 3 + n)), "labels": [-100, -100, *range(5, 3 + n)]} for n in (5, 9, 7)]
    losses = [held_out_loss(model, examples, PadRight(0), 2, logits).loss for logits in (True, False)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_settings_that_are_given_are_kept_from_the_choice(
    command: Command, model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A setting that has its default is kept as well where it was written down, in the file or on the command line."""
    seen: list[set[str]] = []

    def stop(_config: Any, given: Any, *_others: Any) -> Any:
        seen.append(set(given))
        raise InputError("enough")

    monkeypatch.setattr(run.fitting, "fit", stop)
    (tmp_path / "run.yaml").write_text("head: null\noptimizer: AdamW\nmemory: 1GB\n")
    options = ("--config", tmp_path / "run.yaml", "--quantization", "nf4")
    finetune(command, model_folder, pairs_file, tmp_path / "out", *options)
    assert {"head", "optimizer", "quantization", "memory"} <= seen[0] and "logits" not in seen[0]
