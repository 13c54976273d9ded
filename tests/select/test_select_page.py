"""docs/select.md: its code runs, and its tables have what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from select_models import batches, changed, llama, values

import peftkern
from peftkern.select.cost_graph import UNITS, CostGraph
from peftkern.select.savings import selection_logs
from peftkern.select.selection import Selection

PAGE = (Path(__file__).parents[2] / "docs" / "select.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_loop_trains_and_can_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = llama(num_hidden_layers=4)
    before = values(model)
    names: dict[str, Any] = {"peftkern": peftkern, "torch": torch, "batches": batches(3), "model": model}
    loop, *others = (block for block in BLOCKS if "Trainer(model" not in block and "PowerMeter" not in block)
    exec(loop, names)
    assert set() < changed(model, before) < set(before)
    for block in others:
        exec(block, names)
    assert (tmp_path / "selection.png").is_file()
    assert "saved" in capsys.readouterr().out


def test_every_number_in_the_logs_is_described() -> None:
    graphs = {unit: CostGraph(unit, 1.0, (), ()) for unit in UNITS}
    logs = selection_logs([Selection("Mine", (), ("a",), 0, {"a": 1.0}, graphs)], 1)
    assert set(re.findall(r"`(select/\w+)`", PAGE)) == logs.keys()
