"""Whole runs of ``peftkern finetune`` on a tiny model."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import Command, file_size_limit, write_json_lines
from safetensors.torch import load_file

from peftkern.backends import cpu
from peftkern.finetune.callbacks import Watch

FUSED = 16 + (9 if cpu.available() else 0)
"""Modules of the model that are patched: with kernels its norms, attention and decoder layers as well."""
STEPS = ("--max-steps", 8, "--learning-rate", 1e-2, "--batch-size", 8)


def adapter_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def one_line_of(result: Any) -> str:
    """The error that a command printed, which must be one line and no traceback."""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.output
    return str(lines[0])


def test_a_run_learns_and_writes_everything(
    command: Command, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    result = command("finetune", model_folder, "--data", pairs_file, "--output", output, *STEPS)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in output.iterdir()) == ["adapter", "checkpoints", "loss.png", "summary.json"]
    summary = json.loads((output / "summary.json").read_text())
    before, after = summary["held_out_loss"]["before"], summary["held_out_loss"]["after"]
    assert after["loss"] < 0.9 * before["loss"]
    assert before["tokens"] == after["tokens"] > 0
    assert [entry["step"] for entry in summary["training_loss"]] == list(range(1, 9))
    assert summary["patch"]["counts"] == {"fused": FUSED, "left": 26 - FUSED}
    assert summary["examples"] == {"train": 36, "held_out": 4, "cut": 0, "dropped": 0}
    assert summary["steps"] == 8
    assert summary["tokens"] > 8 * 8 * 10
    assert summary["peak_memory_mb"]["resident"] > 50
    assert summary["settings"]["rank"] == 16
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    for line in (f"{FUSED} modules fused", "training: 8/8 loss", "tokens/s", "held-out loss", "peak memory"):
        assert line in result.output


def test_packing_learns_the_same_without_padding(
    command: Command, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    summaries = []
    for option in ((), ("--packing",)):
        output = tmp_path / f"out{len(option)}"
        result = command("finetune", model_folder, "--data", pairs_file, "--output", output, *option, *STEPS)
        assert result.exit_code == 0, result.output
        summaries.append(json.loads((output / "summary.json").read_text()))
    padded, packed = summaries
    assert packed["tokens"] == padded["tokens"]
    losses = [[entry["loss"] for entry in summary["training_loss"]] for summary in (padded, packed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][0] != losses[0][-1]


def test_the_adapter_is_an_ordinary_one(command: Command, model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    """PEFT alone, without our layers or kernels, reaches the loss that the summary says."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peftkern.finetune.config import FinetuneConfig
    from peftkern.finetune.encoding import PadRight, load_splits
    from peftkern.finetune.evaluation import held_out_loss

    output = tmp_path / "out"
    options = ("--quantization", "none", "--rank", 4, "--target-modules", "q_proj,down_proj")
    result = command("finetune", model_folder, "--data", pairs_file, "--output", output, *STEPS, *options)
    assert result.exit_code == 0, result.output
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), output / "adapter")
    config = FinetuneConfig(model=str(model_folder), data=str(pairs_file))
    splits = load_splits(config, AutoTokenizer.from_pretrained(model_folder), config.max_length)
    loss = held_out_loss(model, splits.held_out, PadRight(0), 4).loss
    expected = json.loads((output / "summary.json").read_text())["held_out_loss"]["after"]["loss"]
    assert loss == pytest.approx(expected, rel=1e-5)
    assert len(adapter_of(output)) == 8
    assert all(4 in tensor.shape for tensor in adapter_of(output).values())


def test_a_yaml_file_and_every_format(command: Command, model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.csv"
    data.write_text("question,answer\n" + "".join(f"what is {n},the {n}\n" for n in range(6)))
    settings = {
        "model": str(model_folder),
        "data": str(data),
        "prompt-column": "question",
        "response-column": "answer",
        "eval-fraction": 0,
        "max-steps": 1,
        "dropout": 0.1,
        "gradient-checkpointing": True,
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings))
    ends = ("--embeddings", "int8", "--head", "int8")
    for extra in (("fp4", "--no-double-quant", "--block-size", 32), ("int8", *ends), ("nf4", "--dtype", "bfloat16")):
        output = tmp_path / f"out-{extra[0]}"
        result = command("finetune", "--config", path, "--output", output, "--quantization", *extra)
        assert result.exit_code == 0, result.output
        summary = json.loads((output / "summary.json").read_text())
        assert summary["quantization"].startswith(str(extra[0]))
        assert summary["quantization"].endswith("embeddings int8; head int8") == (ends[0] in extra)
        assert summary["held_out_loss"] == {"before": None, "after": None}
        assert summary["patch"]["counts"]["fused"] == FUSED + (ends[0] in extra)  # a quantized head is one more


def test_running_text(command: Command, model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "book.txt"
    data.write_text("the answer to the question is the number of the things. " * 60)
    output = tmp_path / "out"
    result = command("finetune", model_folder, "--data", data, "--output", output, "--max-steps", 1)
    assert result.exit_code == 0, result.output
    assert "the model takes 256 tokens, so --max-length 1024 counts as that" in result.output
    assert "256 at most" in result.output
    assert json.loads((output / "summary.json").read_text())["examples"]["cut"] == 0


def test_a_model_that_is_quantized_already_stays_as_it_is(
    command: Command, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import peftkern

    quantized = tmp_path / "quantized"
    config = peftkern.QuantConfig("fp4", block_size=32)
    AutoModelForCausalLM.from_pretrained(model_folder, quantization_config=config).save_pretrained(quantized)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(quantized)
    output = tmp_path / "out"
    result = command("finetune", quantized, "--data", pairs_file, "--output", output, "--max-steps", 1)
    assert result.exit_code == 0, result.output
    summary = json.loads((output / "summary.json").read_text())
    assert summary["quantization"] == "as the checkpoint has it (peftkern)"
    assert summary["patch"]["counts"]["fused"] == FUSED


# ---- interruption


def test_an_interrupted_run_resumes_to_the_same_adapter(
    command: Command, model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("finetune", model_folder, "--data", pairs_file, *STEPS, "--dropout", 0.2)
    assert command(*arguments, "--output", tmp_path / "whole").exit_code == 0
    log = Watch.on_log

    def interrupt_at_step_3(self: Watch, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        log(self, args, state, *rest, **more)
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    output = tmp_path / "parts"
    monkeypatch.setattr(Watch, "on_log", interrupt_at_step_3)
    stopped = command(*arguments, "--output", output)
    monkeypatch.undo()
    assert stopped.exit_code == 130
    assert "stopping after this step" in stopped.output
    assert "--resume continues from it" in one_line_of(stopped)
    assert [path.name for path in output.iterdir()] == ["checkpoints"]

    resumed = command(*arguments, "--output", output, "--resume")
    assert resumed.exit_code == 0, resumed.output
    whole = json.loads((tmp_path / "whole" / "summary.json").read_text())
    parts = json.loads((output / "summary.json").read_text())
    assert parts["training_loss"] == whole["training_loss"]
    assert parts["held_out_loss"] == whole["held_out_loss"]
    assert (whole["steps"], parts["steps"]) == (8, 4)  # the request came when step 3 was over
    for name, tensor in adapter_of(tmp_path / "whole").items():
        assert torch.equal(adapter_of(output)[name], tensor)


def test_a_finished_run_resumes_to_more_steps_or_to_nothing(
    command: Command, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = ("finetune", model_folder, "--data", pairs_file, "--output", output, "--batch-size", 8)
    assert command(*arguments, "--max-steps", 2).exit_code == 0
    first = adapter_of(output)
    again = command(*arguments, "--max-steps", 2, "--resume")
    assert again.exit_code == 0, again.output
    assert json.loads((output / "summary.json").read_text())["steps"] == 0
    assert all(torch.equal(adapter_of(output)[name], tensor) for name, tensor in first.items())
    more = command(*arguments, "--max-steps", 4, "--resume")
    assert more.exit_code == 0, more.output
    summary = json.loads((output / "summary.json").read_text())
    assert [entry["step"] for entry in summary["training_loss"]] == [1, 2, 3, 4]
    assert not all(torch.equal(adapter_of(output)[name], tensor) for name, tensor in first.items())


def test_a_second_interrupt_stops_at_once(
    command: Command, model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt_twice(*_arguments: Any, **_more: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Watch, "on_log", interrupt_twice)
    output, before = tmp_path / "out", signal.getsignal(signal.SIGINT)  # ignored in a shell's background jobs
    result = command("finetune", model_folder, "--data", pairs_file, "--output", output, *STEPS)
    assert result.exit_code == 130
    assert one_line_of(result) == "error: interrupted"
    assert not output.exists()
    assert signal.getsignal(signal.SIGINT) is before


# ---- what goes wrong


def test_a_lost_loss_stops_the_run(command: Command, model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ("--max-steps", 8, "--learning-rate", 1e30, "--warmup", 0)
    result = command("finetune", model_folder, "--data", pairs_file, "--output", output, *options)
    assert result.exit_code == 1
    assert "so training stopped" in one_line_of(result)
    assert "Try a --learning-rate below 1e+30" in one_line_of(result)
    assert not output.exists()


def test_a_full_disk_keeps_what_was_there(
    command: Command, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = ("finetune", model_folder, "--data", pairs_file, "--output", output, "--max-steps", 1)
    assert command(*arguments).exit_code == 0
    earlier = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    with file_size_limit(50_000):
        result = command(*arguments, "--overwrite", "--seed", 1)
    assert result.exit_code == 1
    assert "cannot write a checkpoint to" in one_line_of(result)
    assert (output / "adapter" / "adapter_model.safetensors").read_bytes() == earlier
    assert sorted(path.name for path in output.iterdir()) == ["adapter", "loss.png", "summary.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "./missing"}, "MODEL: there is no file or folder ./missing"),
        ({"model": "missing.gguf"}, "MODEL: there is no file or folder missing.gguf"),
        ({"model": "."}, "MODEL: the folder . has no config.json"),
        ({"--data": "missing.jsonl"}, "--data: there is no file missing.jsonl"),
        ({"--data": "broken.jsonl"}, "line 2: not valid JSON"),
        ({"--data": "empty.jsonl"}, "empty.jsonl is empty"),
        ({"--prompt-column": "q", "--response-column": "a"}, "no column 'q'; there are: prompt, response"),
        ({"--max-length": "3"}, "all labels are masked"),
        ({"--output": "rows.jsonl"}, "--output: rows.jsonl is a file"),
        ({"--output": "full"}, "--output: full is not empty"),
        ({"--output": "full", "--resume": None}, "--resume: there is no checkpoint"),
        ({"--target-modules": "nothing_like_it"}, "--target-modules: "),
        ({"--rank": "0"}, "--rank must be at least 1"),
        ({"--config": "missing.yaml"}, "--config: cannot read missing.yaml"),
        ({"--eval-data": "empty.jsonl"}, "--eval-data: empty.jsonl is empty"),
    ],
)
def test_bad_input_is_one_line(
    command: Command,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str | None],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"one {n}", "response": "two"} for n in range(4)]
    write_json_lines(tmp_path / "rows.jsonl", rows)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "one", "response": "two"}\n{"prompt"\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    before = sorted(tmp_path.rglob("*"))
    options = {"model": str(model_folder), "--data": "rows.jsonl", "--output": "out", **changes}
    model = options.pop("model")
    words = [word for option in options.items() for word in option if word is not None]
    result = command("finetune", model, *words)
    assert result.exit_code == 2
    assert message in one_line_of(result)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_hub_id_is_named(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    def from_pretrained(name: str, **_options: Any) -> None:
        raise OSError(f"{name} is not a local folder\nand more lines of advice")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    result = command("finetune", "someone/nothing", "--data", pairs_file, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert one_line_of(result) == (
        "error: MODEL: cannot load someone/nothing; it is no local file or folder, so it was taken for a hub id: "
        "someone/nothing is not a local folder"
    )


def test_a_truncated_model_is_named(command: Command, model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = command("finetune", broken, "--data", pairs_file, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert f"MODEL: cannot load {broken}" in one_line_of(result)


def test_debug_shows_the_traceback(command: Command, tmp_path: Path) -> None:
    from peftkern.finetune.errors import InputError

    result = command("finetune", "./missing", "--data", "x.jsonl", "--output", tmp_path / "out", "--debug")
    assert result.exit_code == 1
    assert isinstance(result.exception, InputError)
