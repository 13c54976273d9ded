"""docs/select.md: the loops of its sections on fixed choices and on the selector run, and its table names policies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from select_models import batches, changed, llama, values

import peftkern
from peftkern.select import LISA, FreezeLower, LayerRange, Policy, Preset, RandomSelection

PAGE = (Path(__file__).parents[2] / "docs" / "select.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return re.split(r"^## ", PAGE.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def run(title: str, model: Any) -> dict[str, Any]:
    names: dict[str, Any] = {"peftkern": peftkern, "torch": torch, "batches": batches(3), "model": model}
    for block in re.findall(r"```python\n(.*?)```", section(title), flags=re.DOTALL):
        exec(block, names)
    return names


def test_the_loop_trains_with_falling_rates() -> None:
    model = llama(num_hidden_layers=3)
    before = values(model)
    groups = run("Fixed and random choices", model)["optimizer"].param_groups
    assert sorted({group["lr"] for group in groups}) == [1e-3 * 0.9**distance for distance in (3, 2, 1, 0)]
    assert "model.layers.0.mlp.up_proj.weight" not in changed(model, before)
    assert "model.layers.1.mlp.up_proj.weight" in changed(model, before)


def test_the_selector_stays_within_the_paper_s_budget() -> None:
    names = run("The exact selector", llama(num_hidden_layers=3))
    assert names["solution"].names
    assert names["graph"].step(names["solution"].names) <= 0.5 * names["graph"].full


def test_every_policy_of_the_table_can_be_made() -> None:
    made = {policy.__name__: policy for policy in (Preset, LayerRange, FreezeLower, LISA, RandomSelection)}
    cells = [row.split("|")[1] for row in section("Fixed and random choices").splitlines() if row.startswith("| `")]
    calls = [call for cell in cells for call in re.findall(r"`(.*?)`", cell)]
    assert len(calls) == 10
    assert {type(eval(call, dict(made))) for call in calls} == set(made.values())
    assert all(issubclass(policy, Policy) for policy in made.values())
