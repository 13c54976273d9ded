"""What tensors cost in seconds: how measured seconds become costs, and what measuring leaves behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cost_models import lora, on_nf4, text
from select_models import llama, values
from torch import Tensor, nn

import peftkern
from peftkern.select import timing
from peftkern.select.record import record
from peftkern.select.timing import measure, update_seconds

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "peftkern": lambda parameters: peftkern.optim.AdamW(parameters, lr=0.01),
    "peftkern-8bit": lambda parameters: peftkern.optim.AdamW8bit(parameters, lr=0.01),
}


def stop_clocks(monkeypatch: pytest.MonkeyPatch, steps: list[float]) -> None:
    """Every operator takes a second, and whole steps, and updates, take ``steps`` in turn and over again."""
    taken = iter(steps * 100)

    def seconds_of(function: Callable[[], object], _device: torch.device) -> float:
        function()
        return next(taken)

    monkeypatch.setattr(timing._Stopwatch, "seconds", lambda self: [1.0] * len(self._spans))
    monkeypatch.setattr(timing, "_seconds_of", seconds_of)


def test_whole_steps_are_met_and_the_rest_is_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    graph = record(model, text())
    stop_clocks(monkeypatch, [10.0, 4.0])
    seconds = measure(model, text(), graph, repeats=1)
    assert seconds.unit == "seconds"
    assert [s.name for s in seconds.segments] == [s.name for s in graph.segments]
    assert [s.needs for s in seconds.segments] == [s.needs for s in graph.segments]
    assert [(t.name, t.segments) for t in seconds.tensors] == [(t.name, t.segments) for t in graph.tensors]
    assert seconds.full == pytest.approx(10.0)
    assert min(seconds.step([name]) for name in seconds.by_name) == pytest.approx(4.0)
    # dW of a linear layer is one product, whatever its size, when every operator takes as long
    one = seconds.by_name["model.layers.1.mlp.up_proj.weight"].cost
    assert one > 0
    assert seconds.by_name["model.layers.0.mlp.down_proj.weight"].cost == pytest.approx(one)


def test_parts_of_one_operator_share_its_seconds_as_they_share_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(on_nf4(llama(hidden_size=64)))
    graph = record(model, text())
    stop_clocks(monkeypatch, [10.0, 4.0])
    seconds = measure(model, text(), graph, repeats=1)
    layer = "base_model.model.model.layers.1.mlp.down_proj"
    factors = [f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"]
    # both factors' gradients come out of one call, and cost r multiply-adds for each feature that goes in or out
    ratio = seconds.by_name[factors[0]].cost / seconds.by_name[factors[1]].cost
    assert ratio == pytest.approx(graph.by_name[factors[0]].cost / graph.by_name[factors[1]].cost)


def test_updates_are_counted_by_entry_and_by_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict({"large": nn.Linear(100, 50, bias=False), "small": nn.Linear(10, 1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = [name for name, _ in model.named_parameters()]
    monkeypatch.setattr(timing, "_SMALL", 2)
    # all three tensors of 5011 entries, then the two small ones of 11: 1 s per tensor and 0.01 s per entry
    stop_clocks(monkeypatch, [3 + 50.11, 2 + 0.11])
    seconds = update_seconds(model, optimizer, names, repeats=1)
    assert seconds == pytest.approx({"large.weight": 51.0, "small.weight": 1.1, "small.bias": 1.01})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_measuring_leaves_everything_as_it_was(name: str) -> None:
    model = llama(attention_dropout=0.5)
    optimizer = OPTIMIZERS[name](model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    model(**text()).loss.backward()
    optimizer.step()
    scheduler.step()
    model.lm_head.weight.requires_grad_(False)
    asked = [parameter.requires_grad for parameter in model.parameters()]
    before, gradients = values(model), {n: p.grad for n, p in model.named_parameters()}
    copies = {n: None if g is None else g.clone() for n, g in gradients.items()}
    state, rates = copy.deepcopy(optimizer.state_dict()), scheduler.state_dict()
    generator = torch.get_rng_state()
    names = [n for n, _ in model.named_parameters()]
    graph = record(model, text(), candidates=names)
    seconds = measure(model, text(), graph, optimizer, repeats=1)
    assert all(tensor.cost > 0 for tensor in seconds.tensors)
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    for n, parameter in model.named_parameters():
        assert parameter.grad is gradients[n]
        assert parameter.grad is None or torch.equal(parameter.grad, copies[n])  # type: ignore[arg-type]
    _assert_same(optimizer.state_dict(), state)
    assert scheduler.state_dict() == rates
    assert torch.equal(torch.get_rng_state(), generator)


def _assert_same(now: Any, was: Any) -> None:
    if isinstance(was, Tensor):
        assert torch.equal(now, was)
    elif isinstance(was, dict):
        assert now.keys() == was.keys()
        for key in was:
            _assert_same(now[key], was[key])
    elif isinstance(was, list):
        for one, other in zip(now, was, strict=True):
            _assert_same(one, other)
    else:
        assert now == was


def test_hooks_of_the_optimizer_do_not_run() -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters())
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    update_seconds(model, optimizer, ["model.norm.weight"])
    assert calls == []


def test_a_busy_machine_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    graph = record(model, text())
    stop_clocks(monkeypatch, [4.0, 10.0])
    seconds = measure(model, text(), graph, repeats=1)
    assert "is the machine busy?" in caplog.text
    assert all(segment.cost >= 0 for segment in seconds.segments)


def test_a_graph_of_another_model_is_refused() -> None:
    graph = record(llama(), text())
    with pytest.raises(ValueError, match=r"a tensor 'lm_head|a tensor 'model"):
        measure(nn.Linear(2, 2), {"x": torch.ones(1, 2)}, graph)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        measure(llama(), text(), graph, repeats=0)


def test_operators_that_do_the_same_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = iter([1.0, 3.0, 2.0, 5.0])
    monkeypatch.setattr(timing._Stopwatch, "_span_seconds", lambda _self: list(spans))
    stopwatch = timing._Stopwatch(torch.device("cpu"))
    for kind in ("product", "product", "product", "sum"):
        stopwatch.start()
        stopwatch.stop(kind)
    assert stopwatch.seconds() == [2.0, 2.0, 2.0, 5.0]
