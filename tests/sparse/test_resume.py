"""What methods remember in the state of their optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sparse_models import batches, llama, trainer

from peftkern.optim import AdamW
from peftkern.select.resume import KEY
from peftkern.sparse import LotteryTicket, RoSA, SpIEL, deltas
from peftkern.sparse.method import SparseMethod

METHODS: dict[str, Any] = {"LotteryTicket": LotteryTicket, "SpIEL": SpIEL, "RoSA": RoSA}


def begun(name: str, model: Any, state: dict[str, Any] | None = None) -> tuple[SparseMethod, AdamW]:
    method: SparseMethod = METHODS[name](density=0.02)
    method.prepare(model)
    optimizer = AdamW(method.parameters(), lr=0.01)
    if state is not None:
        optimizer.load_state_dict(state)
    method.start(optimizer, 8)
    return method, optimizer


@pytest.mark.parametrize("name", METHODS)
def test_the_state_is_plain_and_is_in_the_optimizer_s_only_when_it_is_saved(name: str, tmp_path: Path) -> None:
    model = llama()
    method, optimizer = begun(name, model)
    for batch in batches(3):
        method.step(model, batch)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    state = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    held = state["param_groups"][0][KEY]
    assert (held["method"], held["steps_done"]) == (name, 3)
    for layer, delta in deltas(model).items():
        assert torch.equal(held["deltas"][layer]["flat"], delta.indices.flat())
        assert torch.equal(held["deltas"][layer]["values"], delta.values)
    assert KEY not in optimizer.param_groups[0]
    method.finish()
    assert KEY not in optimizer.state_dict()["param_groups"][0]


@pytest.mark.parametrize("name", METHODS)
def test_what_is_saved_does_not_change_with_training(name: str) -> None:
    model = llama()
    method, optimizer = begun(name, model)
    for batch in batches(4)[:3]:
        method.step(model, batch)
    saved = optimizer.state_dict()["param_groups"][0][KEY]["deltas"]
    copies = {layer: one["values"].clone() for layer, one in saved.items()}
    method.step(model, batches(4)[3])
    assert any(not torch.equal(delta.values, copies[layer]) for layer, delta in deltas(model).items())
    assert all(torch.equal(one["values"], copies[layer]) for layer, one in saved.items())


@pytest.mark.parametrize("name", METHODS)
def test_the_checkpoint_of_another_method_or_of_other_layers_is_an_error(name: str) -> None:
    _, optimizer = begun(name, llama())
    state = optimizer.state_dict()
    state["param_groups"][0][KEY]["method"] = "Other"
    with pytest.raises(ValueError, match=f"{name}: the checkpoint is of Other"):
        begun(name, llama(), state)
    state = optimizer.state_dict()
    state["param_groups"][0][KEY]["deltas"].popitem()
    with pytest.raises(ValueError, match=f"{name}: the checkpoint is of other layers"):
        begun(name, llama(), state)


@pytest.mark.parametrize("name", METHODS)
def test_several_processes_are_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match=f"{name}: 2 processes train together"):
        begun(name, llama())


def test_loading_after_the_start_is_an_error() -> None:
    _, optimizer = begun("SpIEL", llama())
    with pytest.raises(RuntimeError, match=r"before method.start"):
        optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_without_the_optimizer_is_an_error(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    trainer(llama(), tmp_path, METHODS[name](), 4, (AdamW, {"lr": 0.01}), **options).train()
    again = trainer(llama(), tmp_path, METHODS[name](), 4, (AdamW, {"lr": 0.01}))
    with pytest.raises(ValueError, match=f"{name}: training goes on after update 2, .*save_only_model"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
