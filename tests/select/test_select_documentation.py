"""docs/methods.md: its loops run, and it has every option of every method with its default."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from select_models import batches, changed, llama, values

import peftkern
from peftkern.select import CoFiTune, FreezeAsGuard, HalfFineTuning

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
METHODS = (HalfFineTuning, CoFiTune, FreezeAsGuard)


def section(method: type) -> str:
    return re.split(r"^## ", PAGE.split(f"\n## {method.__name__}\n")[1], flags=re.MULTILINE)[0]


@pytest.mark.parametrize("method", METHODS)
def test_loops_run_and_train(method: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", section(method), flags=re.DOTALL)
    names: dict[str, Any] = {"peftkern": peftkern, "torch": torch, "batches": batches(6)}
    names |= {name: batches(2) for name in ("general_batches", "illegal_batches", "innocent_batches")}
    for index, block in enumerate(blocks):
        model = llama(num_hidden_layers=4)  # each block has a fresh one, as another program would
        before = values(model)
        exec(block, names | {"model": model})
        assert bool(changed(model, before)) == (index == 0)


@pytest.mark.parametrize("method", METHODS)
def test_options_are_there_with_their_defaults(method: type) -> None:
    rows = re.findall(r"^\| (`.*?) \|(.*?)\|", section(method), flags=re.MULTILINE)
    documented = {name: default for names, default in rows for name in re.findall(r"`(\w+)`", names)}
    parameters = inspect.signature(method).parameters
    assert documented.keys() == parameters.keys()
    for name, parameter in parameters.items():
        text, default = documented[name].strip(" `"), parameter.default
        if default is None or default == () or default is inspect.Parameter.empty:
            assert text == "", name
        elif isinstance(default, str):
            assert text == f'"{default}"', name
        else:
            assert float(text) == default, name
