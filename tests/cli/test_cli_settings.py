"""Settings from YAML and options, and their checks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
import pytest
from cli_helpers import Command
from hypothesis import given
from hypothesis import strategies as st

from peftkern.finetune.config import FinetuneConfig, field_types, given_settings, option_name
from peftkern.finetune.errors import InputError


def make(**settings: Any) -> FinetuneConfig:
    return FinetuneConfig(**{"model": "m", "data": "d", **settings})


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_options_override_the_file_and_the_file_overrides_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "model: folder\ndata: rows.jsonl\nrank: 4\nlearning-rate: 2e-4\ndouble_quant: false\n")
    config = FinetuneConfig(**given_settings(path, {"rank": 8, "alpha": None}))
    assert (config.model, config.data, config.rank, config.alpha) == ("folder", "rows.jsonl", 8, 32.0)
    assert config.learning_rate == 2e-4
    assert config.double_quant is False


def test_target_modules_may_be_a_list(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\ndata: d\ntarget_modules: [q_proj, v_proj]\n")
    assert FinetuneConfig(**given_settings(path, {})).target_module_names == ["q_proj", "v_proj"]
    assert make(target_modules="q_proj, v_proj").target_module_names == ["q_proj", "v_proj"]
    assert make().target_module_names == "all-linear"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "did you mean 'learning_rate'?"),
        ("zzz: 1", "known settings are: alpha, batch_size"),
        ("rank: many", "'rank' must be of type int, got 'many'"),
        ("rank: true", "'rank' must be of type int, got True"),
        ("rank: 1.5", "'rank' must be of type int, got 1.5"),
        ("learning_rate: fast", "'learning_rate' must be of type float, got 'fast'"),
        ("resume: 1", "'resume' must be of type bool, got 1"),
        ("data: [a, b]", "'data' must be of type str"),
        ("- a\n- b", "must hold settings"),
        ("a: [", "not valid YAML"),
        ("", "MODEL is missing"),
        ("model: m", "--data is missing"),
    ],
)
def test_bad_files_say_what_would_work(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=r".*") as caught:
        FinetuneConfig(**given_settings(write(tmp_path, text), {}))
    assert message in str(caught.value)


def test_missing_file() -> None:
    with pytest.raises(InputError, match=r"--config: cannot read /nowhere/run\.yaml: No such file"):
        FinetuneConfig(**given_settings(Path("/nowhere/run.yaml"), {}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "--rank must be at least 1 and at most 256, got 0"),
        ({"rank": 257}, "--rank must be at least 1 and at most 256, got 257"),
        ({"learning_rate": 0.0}, "--learning-rate must be above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "--learning-rate must be above 0, got nan"),
        ({"dropout": 1.0}, "--dropout must be at least 0 and below 1, got 1.0"),
        ({"eval_fraction": -0.1}, "--eval-fraction must be at least 0 and below 1"),
        ({"max_steps": 0}, "--max-steps must be at least 1, got 0"),
        ({"block_size": 48}, "--block-size must be one of [32, 64, 128"),
        ({"quantization": "nf5"}, "--quantization must be one of nf4, fp4, int8, none, got 'nf5'"),
        ({"dtype": "fp8"}, "--dtype must be one of auto, float32"),
        ({"model": ""}, "MODEL must not be empty"),
        ({"target_modules": " , "}, "--target-modules must be"),
        ({"eval_data": "e", "eval_fraction": 0.2}, "give --eval-data or --eval-fraction, not both"),
        ({"resume": True, "overwrite": True}, "give --resume or --overwrite, not both"),
        ({"prompt_column": "q"}, "--prompt-column and --response-column go together"),
    ],
)
def test_bad_values_name_the_option(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        make(**settings)
    assert message in str(caught.value)


def test_held_out_share() -> None:
    assert make().held_out_share == 0.1
    assert make(eval_fraction=0.0).held_out_share == 0.0
    assert make(eval_data="e").held_out_share == 0.0


@given(
    st.dictionaries(
        st.sampled_from([*sorted(field_types()), "no_such_setting"]),
        st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5) | st.lists(st.integers()),
        max_size=4,
    )
)
def test_any_yaml_gives_settings_or_an_input_error(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    import yaml

    path = tmp_path_factory.mktemp("yaml") / "run.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    try:
        config = FinetuneConfig(**given_settings(path, {"model": "m", "data": "d"}))
    except InputError:
        return
    assert config.rank >= 1
    for name, (value_type, optional) in field_types().items():
        value = getattr(config, name)
        assert type(value) is value_type or (value is None and optional)


def test_every_setting_is_an_option(command: Command) -> None:
    result = command("finetune", "--help")
    assert result.exit_code == 0
    for field in dataclasses.fields(FinetuneConfig):
        assert option_name(field.name)[:14] in click.unstyle(result.output)


def test_yaml_errors_reach_the_command_line(command: Command, tmp_path: Path) -> None:
    result = command("finetune", "--config", write(tmp_path, "model: m\ndata: d\nrnk: 3\n"))
    assert result.exit_code == 2
    assert "did you mean 'rank'?" in result.stderr
    assert "Traceback" not in result.output
