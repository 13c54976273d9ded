"""docs/sparse.md and docs/masks.md: their code runs, and they have every option of every method with its default."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from sparse_models import batches, changed, error, llama, outputs, snapshot

import peftkern
from peftkern.sparse import DSEE, DPruner, LotteryTicket, RoSA, SkillGrafting, SparseUpdate, SpIEL, StaticMask

PAGE = (Path(__file__).parents[2] / "docs" / "sparse.md").read_text(encoding="utf-8")
MASKS = (Path(__file__).parents[2] / "docs" / "masks.md").read_text(encoding="utf-8")
METHODS = (LotteryTicket, SpIEL, RoSA, DSEE)


def section(title: str, page: str = PAGE) -> str:
    return re.split(r"^## ", page.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def code(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("method", METHODS)
def test_loops_run_and_what_they_save_is_applied_and_reverted(
    method: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, base = llama(), llama()
    names: dict[str, Any] = {"peftkern": peftkern, "batches": batches(8), "model": model}
    (loop,) = code(section(method.__name__))
    exec(loop, names)
    assert error(outputs(model), outputs(base)) > 1e-3
    save, apply = code(PAGE.split("\n## ")[0])
    exec(save, names)
    SparseUpdate.load("update").save("other")
    before = snapshot(base)
    exec(apply, {"model": base})
    assert not changed(base, before)
    assert base.state_dict().keys() == before.keys()


def test_a_graft_is_found_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base, fine_tuned = llama(), llama(seed=2)
    (loop,) = code(section("SkillGrafting"))
    names = {"base": base, "fine_tuned": fine_tuned, "batches": batches(3), "rate": lambda model: 0.0}
    exec(loop, {"peftkern": peftkern, **names})
    graft = SparseUpdate.load("graft")
    assert graft.metadata["metric"] == 0.0 and len(graft) > 0
    fine_tuned.model.embed_tokens, fine_tuned.lm_head = base.model.embed_tokens, base.lm_head
    graft.merge_into(base)
    assert error(outputs(fine_tuned), outputs(base)) <= 1e-5


def test_masks_come_off_without_a_trace_and_a_pruned_model_has_zeros() -> None:
    model = llama()
    before = snapshot(model)
    (masks,) = code(MASKS.split("\n## ")[0])
    exec(masks, {"model": model})
    assert not changed(model, before)
    (pruning,) = code(section("DPruner", MASKS))
    names = {"peftkern": peftkern, "model": model}
    exec(pruning, {**names, "general_batches": batches(2), "domain_batches": batches(3)})
    assert error(outputs(model), outputs(llama())) > 1e-3
    peftkern.sparse.release_masks(model, keep_zeros=True)
    assert int((model.model.layers[0].mlp.up_proj.weight == 0).sum()) == 192 * 64 // 2


PAGES = {**dict.fromkeys((*METHODS, SkillGrafting), PAGE), StaticMask: MASKS, DPruner: MASKS}


@pytest.mark.parametrize("method", PAGES)
def test_options_are_there_with_their_defaults(method: type) -> None:
    rows = re.findall(r"^\| (`.*?) \|(.*?)\|", section(method.__name__, PAGES[method]), flags=re.MULTILINE)
    documented = {name: default for names, default in rows for name in re.findall(r"`(\w+)`", names)}
    parameters = inspect.signature(method).parameters
    assert documented.keys() == parameters.keys()
    for name, parameter in parameters.items():
        text, default = documented[name].strip(" `"), parameter.default
        if default in (None, (), inspect.Parameter.empty):
            assert text == "", name
        elif isinstance(default, bool):
            assert text == str(default), name
        elif isinstance(default, str):
            assert text == f'"{default}"', name
        else:
            assert float(text) == default, name
