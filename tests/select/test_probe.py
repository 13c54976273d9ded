"""Importance: what is measured, against plain forms of it, and that a probe leaves no trace."""

from __future__ import annotations

import copy
import gc
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import peft
import pytest
import torch
from select_models import batches, llama
from torch import Tensor, nn

import peftkern
from peftkern.nn import QuantizedLinear
from peftkern.optim import AdamW, AdamW8bit
from peftkern.select import probe_step
from peftkern.select.probe import probe
from peftkern.select.sample import sample_batch

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW8bit": lambda p: AdamW8bit(p, lr=1e-2, weight_decay=0.1),
    "torch AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "torch AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "torch Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "torch SGD": lambda p: torch.optim.SGD(p, lr=1e-1),
    "torch SGD, momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "torch RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
}
STREAMED = [name for name in OPTIMIZERS if name != "torch RMSprop"]


@pytest.fixture(params=OPTIMIZERS)
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., torch.optim.Optimizer]:
    monkeypatch.setattr(AdamW8bit, "SMALLEST", 300)
    monkeypatch.setattr(probe_step, "_PIECE", 1000)  # the tensors of tiny models have several pieces as well
    return OPTIMIZERS[request.param]


def names_of(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 11) -> None:
    for batch in batches(steps, seed=seed):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def naive(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], names: list[str]) -> dict[str, float]:
    """Importance as it is published, with copies of the model and of the optimizer's state."""
    twin = copy.deepcopy(model)
    ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    groups = [
        {
            **{k: v for k, v in group.items() if k != "params"},
            "params": [theirs[n] for n in names if ours[n] in members],
        }
        for group, members in ((g, set(g["params"])) for g in optimizer.param_groups)
    ]
    groups[0]["params"] += [
        theirs[n] for n in names if not any(ours[n] in set(g["params"]) for g in optimizer.param_groups)
    ]
    for group in groups:
        if not group["lr"] and "initial_lr" in group:
            group["lr"] = group["initial_lr"]
    twin.requires_grad_(False)
    for name in names:
        theirs[name].requires_grad_()
    peer = type(optimizer)([p for n, p in theirs.items() if n in names])
    peer.param_groups = groups
    for name in names:
        if ours[name] in optimizer.state:
            peer.state[theirs[name]] = copy.deepcopy(optimizer.state[ours[name]])
    before = {name: theirs[name].detach().clone() for name in names}
    state = torch.get_rng_state()
    twin(**batch).loss.backward()
    peer.step()
    twin.zero_grad()
    torch.set_rng_state(state)
    twin(**batch).loss.backward()
    torch.set_rng_state(state)
    return {
        name: -float((theirs[name].grad.double() * (theirs[name].detach().double() - before[name].double())).sum())  # type: ignore[union-attr]
        for name in names
    }


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of all that a probe must not change."""
    return copy.deepcopy(
        {
            "weights": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "gradients": {name: p.grad for name, p in model.named_parameters()},
            "asked": {name: p.requires_grad for name, p in model.named_parameters()},
            "modes": [module.training for module in model.modules()],
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": np.random.get_state(),
        }
    )


def assert_same(actual: Any, expected: Any, where: str = "") -> None:
    """The same bits everywhere."""
    assert type(actual) is type(expected), where
    if isinstance(actual, dict):
        assert list(actual) == list(expected), where
        for key in actual:
            assert_same(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(actual, list | tuple):
        assert len(actual) == len(expected), where
        for index, pair in enumerate(zip(actual, expected, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(actual, Tensor):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape, where
        assert torch.equal(actual.flatten().view(torch.uint8), expected.flatten().view(torch.uint8)), where
    elif isinstance(actual, np.ndarray):
        assert bool((actual == expected).all()), where
    else:
        assert actual == expected, where


def close(actual: dict[str, float], expected: dict[str, float], tolerance: float) -> None:
    assert list(actual) == list(expected)
    a, b = (torch.tensor(list(d.values()), dtype=torch.float64) for d in (actual, expected))
    scale = b.abs().max()
    assert scale > 0 and float((a - b).abs().max() / scale) <= tolerance, (actual, expected)


# ---- what is measured


class Quadratic(nn.Module):
    """½‖w - c‖² of several tensors."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        shapes = {"a": (3, 40), "b": (17,), "c": ()}
        self.weights = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}
        )
        self.targets = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}

    def distances(self) -> dict[str, float]:
        """‖w - c‖²."""
        return {
            f"weights.{name}": float((w.detach().double() - self.targets[name].double()).pow(2).sum())
            for name, w in self.weights.items()
        }

    def forward(self) -> Tensor:
        return sum(((w - self.targets[name]) ** 2).sum() / 2 for name, w in self.weights.items())  # type: ignore[return-value]


def loss_of(model: nn.Module, _batch: Any) -> Tensor:
    loss: Tensor = model()
    return loss


@pytest.mark.parametrize("rate", [0.01, 0.5, 1.0, 1.5])
def test_a_quadratic_has_the_closed_form(rate: float) -> None:
    model = Quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    if rate == 1.0:  # the minimum is reached: nothing is left to gain
        model.targets = {name: torch.zeros_like(target) for name, target in model.targets.items()}
        with pytest.raises(ValueError, match="all importances are 0"):
            probe(model, None, names_of(model), optimizer, loss=loss_of)
        return
    found = probe(model, None, names_of(model), optimizer, loss=loss_of)
    close(found, {name: rate * (1 - rate) * d for name, d in model.distances().items()}, 1e-5)
    first = probe(model, None, names_of(model), optimizer, "first_order", loss=loss_of)
    close(first, {name: rate * d for name, d in model.distances().items()}, 1e-5)


def test_fisher_and_gradient_norm_of_a_quadratic() -> None:
    model = Quadratic()
    close(probe(model, None, names_of(model), kind="fisher", loss=loss_of), model.distances(), 1e-6)
    roots = {name: value**0.5 for name, value in model.distances().items()}
    close(probe(model, None, names_of(model), kind="gradient_norm", loss=loss_of), roots, 1e-6)


def test_weight_change_by_hand() -> None:
    model = nn.ParameterDict({"w": nn.Parameter(torch.tensor([3.0, 4.0])), "zero": nn.Parameter(torch.zeros(2))})
    start = {"w": torch.tensor([3.0, 0.0]), "zero": torch.zeros(2)}
    assert probe(model, None, ["w", "zero"], kind="weight_change", start=start) == {"w": 4 / 5, "zero": 0.0}
    start = {"w": torch.tensor([-3.0, -4.0]), "zero": torch.tensor([0.0, 0.5])}
    assert probe(model, None, ["zero", "w"], kind="weight_change", start=start) == {"zero": 1.0, "w": 2.0}


@pytest.mark.parametrize("steps", [0, 3])
def test_importance_is_that_of_the_published_form_with_copies(make: Callable[..., Any], steps: int) -> None:
    model = llama()
    optimizer = make(model.parameters())
    trained(model, optimizer, steps)
    batch, names = batches(1, rows=4)[0], names_of(model)
    expected = naive(model, optimizer, batch, names)
    close(probe(model, batch, names, optimizer, sample=1.0), expected, 2e-6)
    assert min(expected.values()) != max(expected.values())


@pytest.mark.parametrize("name", STREAMED)
def test_first_order_takes_the_same_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdamW8bit, "SMALLEST", 300)
    model = llama()
    optimizer = OPTIMIZERS[name](model.parameters())
    trained(model, optimizer, 2)
    batch, names = batches(1)[0], names_of(model)
    found = probe(model, batch, names, optimizer, "first_order", sample=1.0)
    twin = copy.deepcopy(model)
    twin(**batch).loss.backward()
    gradients = {n: p.grad.double() for n, p in twin.named_parameters() if p.grad is not None}
    before = {n: p.detach().double() for n, p in model.named_parameters()}
    model(**batch).loss.backward()
    optimizer.step()
    moved = {n: p.detach().double() - before[n] for n, p in model.named_parameters()}
    close(found, {n: -float((gradients[n] * moved[n]).sum()) for n in names}, 2e-6)


def test_bfloat16_weights_count_as_they_are_rounded() -> None:
    model = llama().bfloat16()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    trained(model, optimizer, 2)
    batch, names = batches(1)[0], names_of(model)
    before = everything(model, optimizer)
    found = probe(model, batch, names, optimizer, sample=1.0)
    close(found, naive(model, optimizer, batch, names), 1e-6)
    assert_same(everything(model, optimizer), before)


def test_tied_weights_have_the_sum_of_their_gradients() -> None:
    model, untied = llama(), llama(tie_word_embeddings=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    untied.load_state_dict(model.state_dict() | {"lm_head.weight": model.lm_head.weight})
    batch = batches(1)[0]
    found = probe(model, batch, ["model.embed_tokens.weight"], optimizer, "fisher", sample=1.0)
    untied(**batch).loss.backward()
    both = untied.lm_head.weight.grad + untied.model.embed_tokens.weight.grad
    assert found["model.embed_tokens.weight"] == pytest.approx(float(both.double().pow(2).sum()), rel=1e-5)


def test_both_passes_draw_the_same_dropout() -> None:
    model = llama(attention_dropout=0.5)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    batch, names = batches(1)[0], names_of(model)
    close(probe(model, batch, names, optimizer, sample=1.0), naive(model, optimizer, batch, names), 2e-6)


def test_a_mask_and_a_scale_of_the_optimizer_count() -> None:
    model = llama()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"]
    up, down = (model.get_parameter(name) for name in names)
    batch = batches(1)[0]
    whole = probe(model, batch, names, optimizer, "first_order", sample=1.0)
    optimizer.set_scale(up, 0.25)
    optimizer.set_scale(down, 0.0)
    scaled = probe(model, batch, names, optimizer, "first_order", sample=1.0)
    assert scaled[names[0]] == pytest.approx(whole[names[0]] / 4, rel=1e-3) and scaled[names[1]] == 0.0


def test_the_start_of_a_warm_up_is_probed_with_the_rate_that_follows(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    batch, names = batches(1)[0], names_of(model)
    expected = probe(model, batch, names, optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert optimizer.param_groups[0]["lr"] == 0.0
    state = copy.deepcopy(scheduler.state_dict())
    with caplog.at_level(logging.INFO, logger="peftkern"):
        assert probe(model, batch, names, optimizer) == expected
    assert "initial_lr 0.01" in caplog.text
    assert optimizer.param_groups[0]["lr"] == 0.0 and scheduler.state_dict() == state
    del optimizer.param_groups[0]["initial_lr"]
    with pytest.raises(ValueError, match=r"all importances are 0.*the learning rate is 0"):
        probe(model, batch, names, optimizer)


def test_importances_of_ones_own() -> None:
    model, names = llama(), ["model.norm.weight", "model.embed_tokens.weight"]
    given = {"model.embed_tokens.weight": 2, "model.norm.weight": -1, "other": 7}
    assert probe(model, None, names, kind=given) == {"model.norm.weight": -1.0, "model.embed_tokens.weight": 2.0}
    assert probe(model, {"x": 1}, names, kind=lambda _model, batch: dict.fromkeys(names, batch["x"])) == dict.fromkeys(
        names, 1.0
    )
    with pytest.raises(ValueError, match=r"gives no importance for 'model.embed_tokens.weight'"):
        probe(model, None, names, kind={"model.norm.weight": 1.0})


# ---- no trace


@pytest.mark.parametrize("kind", ["update", "first_order", "fisher", "gradient_norm"])
def test_nothing_changes(make: Callable[..., Any], kind: str) -> None:
    model = llama(attention_dropout=0.1)
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    if kind == "first_order" and type(optimizer) is torch.optim.RMSprop:
        pytest.skip("not tensor by tensor")
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    trained(model, optimizer, 2)
    scheduler.step()
    random.seed(1)
    before, schedule = everything(model, optimizer), scheduler.state_dict()
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    calls = optimizer._step_count if hasattr(optimizer, "_step_count") else None
    probe(model, batches(1)[0], [name for name, _ in model.named_parameters()], optimizer, kind)
    assert all(p.grad is None for p in model.parameters())
    assert_same(everything(model, optimizer), before)
    assert scheduler.state_dict() == schedule
    assert addresses == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert (optimizer._step_count if hasattr(optimizer, "_step_count") else None) == calls
    assert set(optimizer.state) <= {p for group in optimizer.param_groups for p in group["params"]}


def test_an_optimizer_that_has_made_no_step_has_no_state_afterwards(make: Callable[..., Any]) -> None:
    model = llama()
    optimizer = make(model.parameters())
    probe(model, batches(1)[0], names_of(model), optimizer)
    assert len(optimizer.state) == 0


def test_training_with_probes_is_training_without(make: Callable[..., Any]) -> None:
    def run(probes: bool) -> dict[str, Any]:
        model = llama(attention_dropout=0.2)
        optimizer = make(model.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 4)
        torch.manual_seed(9)
        for number, batch in enumerate(batches(4)):
            if probes:
                probe(model, batches(1, rows=4, seed=20 + number)[0], names_of(model), optimizer, seed=number)
            model(**batch).loss.backward()
            if probes:  # in the middle of an accumulation
                probe(model, batch, names_of(model)[::2], optimizer, "fisher")
            model(**batch).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return everything(model, optimizer)

    assert_same(run(True), run(False))


def test_gradients_that_were_there_stay_the_same_objects() -> None:
    model = llama()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    model(**batches(1)[0]).loss.backward()
    before = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None}
    probe(model, batches(2)[1], names_of(model), optimizer)
    for name, parameter in model.named_parameters():
        assert parameter.grad is before[name][0] and torch.equal(parameter.grad, before[name][1])


def test_running_statistics_are_put_back(caplog: pytest.LogCaptureFixture) -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.register_buffer("table", torch.zeros(2, 2))
            self.writes = False

        def forward(self, x: Tensor) -> Tensor:
            if self.writes:
                self.table += 1  # type: ignore[operator]
            return self.norm(x).pow(3).sum()  # type: ignore[no-any-return]

    model = Counted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(6, 4)

    def fisher() -> None:
        probe(model, x, ["norm.weight"], kind="fisher", loss=lambda m, b: m(b))

    fisher()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not caplog.text
    model.writes = True
    fisher()
    assert "has changed ['table']" in caplog.text


@pytest.mark.parametrize("call", [1, 2])
def test_an_error_on_the_way_leaves_everything_as_it_was(make: Callable[..., Any], call: int) -> None:
    model = llama()
    optimizer = make(model.parameters())
    trained(model, optimizer, 1)
    before, calls = everything(model, optimizer), 0

    def failing(m: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        loss: Tensor = m(**batch).loss
        if calls == call:
            next(iter(m.parameters())).grad = None
            raise OSError("the disk is full")
        return loss

    with pytest.raises(OSError, match="the disk is full"):
        probe(model, batches(1)[0], names_of(model), optimizer, loss=failing)
    assert_same(everything(model, optimizer), before)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("piece", [0, 3])
def test_an_error_in_the_step_leaves_everything_as_it_was(
    make: Callable[..., Any], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    optimizer = make(model.parameters())
    trained(model, optimizer, 1)
    before, calls = everything(model, optimizer), 0
    step, probed = type(optimizer).step, AdamW.probe_

    def counted(function: Any) -> Any:
        def call(self: Any, *arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > piece:
                raise MemoryError("no memory")
            return function(self, *arguments)

        return call

    monkeypatch.setattr(AdamW, "probe_", counted(probed))
    monkeypatch.setattr(type(optimizer), "step", counted(step))
    if type(optimizer) is torch.optim.RMSprop and piece > 0:
        pytest.skip("one step of all tensors")
    with pytest.raises(MemoryError):
        probe(model, batches(1)[0], names_of(model), optimizer)
    monkeypatch.undo()
    assert_same(everything(model, optimizer), before)


def test_gradients_in_one_memory_do_not_overwrite_each_other() -> None:
    """Slices of one result, which autograd hands over without a copy."""

    class Split(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            return torch.stack([a, b]).detach()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            both = torch.cat([grads[0][0], grads[0][1]])
            return both[:8], both[4:12]  # they overlap

    model = nn.ParameterDict({"a": nn.Parameter(torch.randn(8)), "b": nn.Parameter(torch.randn(8))})
    before = {name: p.detach().clone() for name, p in model.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe(model, None, ["a", "b"], optimizer, loss=lambda m, _: Split.apply(m["a"], m["b"]).pow(2).sum())  # type: ignore[no-untyped-call]
    assert all(torch.equal(model[name], value) for name, value in before.items())


# ---- memory

SIDE = 61
"""Of the matrices that are counted: no other test has such."""


def matrices_alive() -> int:
    gc.collect()
    found = set()
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.layout == torch.strided:  # other tests leave sparse ones
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.untyped_storage().nbytes() == 4 * SIDE * SIDE:
                    found.add(tensor.untyped_storage().data_ptr())
    return len(found)


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """The collector passes over what other tests have left, which takes minutes to look through again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "torch AdamW", "torch SGD, momentum"])
def test_there_is_no_second_copy_of_weights_or_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_step, "_PIECE", 256)
    layers = nn.ModuleList([nn.Linear(SIDE, SIDE, bias=False) for _ in range(12)])
    optimizer = OPTIMIZERS[name](layers.parameters())
    for parameter in layers.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    seen: list[int] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            seen.append(matrices_alive() - before)
            return grads[0]

    def loss(model: Any, x: Tensor) -> Tensor:
        for layer in model:
            x = Watched.apply(layer(x))  # type: ignore[no-untyped-call]
        return x.pow(2).mean() * 1e-3

    x, before = torch.ones(1, SIDE), matrices_alive()
    names = [f"{number}.weight" for number in range(12)]
    probe(layers, x, names, optimizer, loss=loss)
    # gradients come one by one, then what the weights were is in their memory; one gradient more is looked at
    assert seen[:12] == list(range(12))
    assert set(seen[12:]) <= {12, 13}
    seen.clear()
    probe(layers, x, names, optimizer, "first_order", loss=loss)
    assert len(seen) == 12 and max(seen) <= 1
    assert matrices_alive() == before


# ---- models


def lora_model() -> peft.PeftModel:
    model = llama()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            model.set_submodule(name, QuantizedLinear.from_linear(module, "nf4"))
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.1)
    return peft.get_peft_model(model, config)


def test_adapters_over_quantized_layers_that_are_patched() -> None:
    model = lora_model()
    peftkern.patch(model)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    trained(model, optimizer, 2)
    batch, names = batches(1)[0], names_of(model)
    before = everything(model, optimizer)
    found = probe(model, batch, names, optimizer, sample=1.0)
    assert_same(everything(model, optimizer), before)
    assert len(found) == 28
    base = [name for name, p in model.named_parameters() if not p.is_floating_point()]
    with pytest.raises(ValueError, match="quantized layer"):
        probe(model, batch, base[:1] or ["none"], optimizer)


def test_adapters_have_the_published_importance() -> None:
    model = lora_model()
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    trained(model, optimizer, 2)
    batch, names = batches(1)[0], names_of(model)
    close(probe(model, batch, names, optimizer, sample=1.0), naive(model, optimizer, batch, names), 5e-6)


def test_sparse_deltas() -> None:
    from peftkern.formats.sparse_indices import SparseIndices
    from peftkern.nn.sparse_linear import SparseDelta

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(3)
            self.base = nn.Linear(20, 30).requires_grad_(False)
            indices = SparseIndices.from_mask(torch.rand(30, 20, generator=generator) < 0.2)
            self.delta = SparseDelta(indices, torch.randn(indices.columns.shape[0], generator=generator))

        def forward(self, x: Tensor) -> Tensor:
            return self.delta(self.base(x), x).pow(2).mean()  # type: ignore[no-any-return]

    model = Layer()
    optimizer = AdamW([model.delta.values], lr=1e-2)
    x = torch.randn(5, 20)
    before = everything(model, optimizer)
    found = probe(model, x, ["delta.values"], optimizer, loss=lambda m, x: m(x))
    assert found["delta.values"] > 0
    assert_same(everything(model, optimizer), before)


def test_parked_parameters_are_probed_with_the_state_that_they_come_back_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdamW, "SMALLEST", 300)
    model = llama()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    trained(model, optimizer, 3)
    batch, names = batches(1)[0], names_of(model)
    optimizer.park(list(model.parameters())[::2])
    before = everything(model, optimizer)
    found = probe(model, batch, names, optimizer, sample=1.0)
    assert_same(everything(model, optimizer), before)
    assert any("state1" in state for state in optimizer.state.values())
    close(found, naive(model, optimizer, batch, names), 2e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch, names = batches(1)[0], names_of(model)
    expected = probe(model, batch, names, optimizer, sample=1.0)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    close(probe(model, batch, names, optimizer, sample=1.0), expected, 1e-6)


def test_a_gradient_in_parts_is_refused_where_it_is_needed_whole() -> None:
    w = nn.Parameter(torch.ones(4))

    def loss(model: Any, _batch: Any) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return x * model["w"]

        x = torch.ones(4, requires_grad=True)
        for _ in range(2):
            x = torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=True)
        return x.sum()

    model = nn.ParameterDict({"w": w})
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        probe(model, None, ["w"], kind="fisher", loss=loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # w² at 1: the gradient 2, the step -0.2, the gradient there 1.6, in two parts
    assert probe(model, None, ["w"], optimizer, loss=loss)["w"] == pytest.approx(4 * 0.2 * 1.6)


def test_parameters_that_are_not_trained_are_probed_as_newcomers() -> None:
    model = llama()
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    trained(model, optimizer, 2)
    batch, names = batches(1)[0], [name for name, _ in model.named_parameters()]
    close(probe(model, batch, names, optimizer, sample=1.0), naive(model, optimizer, batch, names), 2e-6)
    assert not frozen.requires_grad and frozen.grad is None and frozen not in optimizer.state


def test_a_parameter_without_a_part_in_the_loss_has_no_importance() -> None:
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    optimizer = AdamW(model.parameters())
    found = probe(model, None, names_of(model), optimizer, loss=lambda m, _: m[0](torch.ones(1, 3)).sum())
    assert found["1.weight"] == found["1.bias"] == 0.0 and found["0.weight"] != 0.0


def test_an_optimizer_that_is_not_known_is_copied_and_that_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    optimizer = torch.optim.RMSprop(model.parameters())
    probe(model, batches(1)[0], names_of(model), optimizer)
    assert "the probe copies the weights and the state of RMSprop" in caplog.text
    with pytest.raises(ValueError, match="'first_order' does not know RMSprop"):
        probe(model, batches(1)[0], names_of(model), optimizer, "first_order")


def test_hooks_of_the_optimizer_do_not_see_the_step(make: Callable[..., Any]) -> None:
    model, calls = llama(), []
    optimizer = make(model.parameters())
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    probe(model, batches(1)[0], names_of(model), optimizer)
    assert calls == []


# ---- part of a batch


def test_rows_are_drawn_by_seed_and_their_share_is_kept() -> None:
    batch: dict[str, Any] = {"x": torch.arange(8)[:, None] * torch.ones(8, 5), "y": torch.arange(8), "flag": True}
    seen = set()
    for seed in range(20):
        part = sample_batch(batch, 0.25, seed)
        assert part["x"].shape == (2, 5) and part["flag"] is True
        assert part["x"][:, 0].tolist() == part["y"].tolist() == sorted(part["y"].tolist())
        assert sample_batch(batch, 0.25, seed)["y"].tolist() == part["y"].tolist()
        seen |= set(part["y"].tolist())
    assert seen == set(range(8))
    assert sample_batch(batch, 1.0, 0) == batch
    assert [len(sample_batch(batch, share, 0)["y"]) for share in (0.01, 0.5, 0.9)] == [1, 4, 7]


def test_rows_without_labels_are_passed_over() -> None:
    labels = torch.full((4, 6), -100)
    labels[2, 3] = 7
    labels[0, 0] = 7  # the first token is not predicted
    for seed in range(5):
        part = sample_batch({"labels": labels, "row": torch.arange(4)}, 0.5, seed)
        assert part["row"].tolist() == [2]


def test_of_one_row_a_window_of_tokens_with_labels_is_taken() -> None:
    labels = torch.full((1, 100), -100)
    labels[0, 60:70] = 5
    batch = {"input_ids": torch.arange(100)[None], "labels": labels, "attention_mask": torch.ones(1, 100)}
    begins = set()
    for seed in range(20):
        part = sample_batch(batch, 0.2, seed)
        assert {tuple(tensor.shape) for tensor in part.values()} == {(1, 20)}
        assert bool((part["input_ids"].diff() == 1).all())
        assert int((part["labels"][:, 1:] == 5).sum()) >= 5
        begins.add(int(part["input_ids"][0, 0]))
    assert len(begins) > 5


def test_half_a_row_of_two_is_tokens_of_one() -> None:
    batch = {"input_ids": torch.ones(2, 40), "labels": torch.ones(2, 40)}
    assert sample_batch(batch, 0.25, 0)["labels"].shape == (1, 20)


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": torch.ones(1, 40), "labels": torch.ones(1)},
        {"input_ids": torch.ones(1, 40), "labels": torch.ones(1, 30)},
        {"input_ids": torch.ones(1, 40), "labels": torch.ones(1, 40), "attention_mask": torch.ones(1, 1, 40, 40)},
        {"input_ids": torch.ones(1, 40), "labels": torch.ones(1, 40), "cu_seq_lens_q": torch.ones(3)},
    ],
    ids=["labels of rows", "labels of another sequence", "masks of pairs", "packed"],
)
def test_what_cannot_be_cut_is_kept_whole_and_logged(
    batch: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="peftkern"):
        part = sample_batch(batch, 0.25, 0)
    assert {name: tensor.shape for name, tensor in part.items()} == {name: t.shape for name, t in batch.items()}
    assert "the probe sees" in caplog.text


def test_a_probe_looks_at_its_part_of_the_batch() -> None:
    model = llama()
    seen = []

    def look(_model: Any, _inputs: Any, options: dict[str, Tensor]) -> None:
        seen.append(tuple(options["labels"].shape))

    model.register_forward_pre_hook(look, with_kwargs=True)
    batch, names = batches(1, rows=8)[0], names_of(model)
    for sample in (0.25, 0.05, 1.0):
        probe(model, batch, names, kind="fisher", sample=sample)
    assert seen == [(2, 7), (1, 3), (8, 7)]


# ---- bad arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["lm.weight"]}, "no parameter 'lm.weight'"),
        ({"names": []}, "at least one name"),
        ({"names": ["model.embed_tokens.weight", "lm_head.weight"]}, "two of the names are of one parameter"),
        ({"kind": "magic"}, "kind must be one of .*'magic'"),
        ({"optimizer": None}, "needs the optimizer"),
        ({"kind": "weight_change"}, "needs start"),
        ({"kind": "weight_change", "start": {}}, r"start must have model.norm.weight of \[32\], got nothing"),
        ({"sample": 0.0}, "sample must be above 0"),
        ({"batch": {"input_ids": torch.ones(1, 3, dtype=torch.int64)}}, "gave no loss"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    model = llama()
    optimizer = AdamW(model.parameters())
    given = {"batch": batches(1)[0], "names": ["model.norm.weight"], "optimizer": optimizer, **arguments}
    with pytest.raises(ValueError, match=message):
        probe(model, **given)


def test_a_loss_that_is_no_number_is_named() -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"model.norm.weight is not a number"):
        probe(
            model,
            batches(1)[0],
            ["model.norm.weight"],
            kind="fisher",
            loss=lambda m, b: m(**b).loss * float("nan"),
        )


def test_a_hook_that_would_train_is_refused() -> None:
    model = llama()
    model.model.norm.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match=r"model.norm.weight has a hook"):
        probe(model, batches(1)[0], ["model.norm.weight"], kind="fisher")
