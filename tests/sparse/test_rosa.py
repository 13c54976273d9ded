"""RoSA: which entries get a delta, when they are chosen, and that adapters and deltas are trained together."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from sparse_models import batches, changed, error, llama, lora, outputs, snapshot, text, trainer
from torch import Tensor, nn

import peftkern
from peftkern.formats.sparse_indices import SparseIndices
from peftkern.sparse import RoSA, SparseUpdate, attach, deltas, linear_layers
from peftkern.sparse.layers import base_layer
from peftkern.sparse.rosa import GradientStatistic, Schedule

BASES = ["dense", "nf4"]
DENSITY = 0.02


def begin(model: nn.Module, method: RoSA, steps: int = 8, **options: Any) -> torch.optim.Optimizer:
    method.prepare(model)
    optimizer = torch.optim.AdamW(method.parameters(), **{"lr": 0.01, "weight_decay": 0.1, **options})
    method.start(optimizer, steps)
    return optimizer


def run(model: nn.Module, method: RoSA, steps: int = 8, until: int | None = None, **options: Any) -> Any:
    optimizer = begin(model, method, steps, **options)
    for batch in batches(steps)[:until]:
        method.step(model, batch)
    return optimizer


def dense_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the weights beneath the adapters of ``model``, made dense."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module._forward_hooks.clear()  # copies of the method's, which hand on to the method
    weights = {}
    for name, layer in linear_layers(twin).items():
        below: Any = base_layer(layer)
        if hasattr(below, "dequantize_"):
            below.dequantize_(torch.float32)
        below.weight = weights[name] = nn.Parameter(below.weight.detach().clone())
    twin(**batch).loss.backward()
    return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


def lora_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


# ---- schedules and statistics


def test_schedules() -> None:
    assert Schedule.read("wl64") == Schedule(adapters=True, deltas=True, warm_up=64)
    assert Schedule.read("wl0") == Schedule(adapters=True, deltas=True)
    assert Schedule.read("lora_only") == Schedule(adapters=True, deltas=False)
    assert Schedule.read("spa_only") == Schedule(adapters=False, deltas=True)
    for text_ in ("wl", "wl-1", "wl1.5", "default", "both wl3"):
        with pytest.raises(ValueError, match="RoSA: schedule must be"):
            Schedule.read(text_)


def test_mean_square_and_mean_by_hand() -> None:
    """Gradients (3, 2) and then (-3, 2): the mean square is (9, 4), the mean (0, 2)."""
    gradients = [torch.tensor([[3.0], [2.0]]), torch.tensor([[-3.0], [2.0]])]
    for statistic, expected in (("mean_squared", [0]), ("mean", [1])):
        one = GradientStatistic((2, 1), 1, 2, statistic)
        for gradient in gradients:
            one.add(torch.ones(1, 1), gradient.t())
        one.add(torch.ones(1, 1), torch.tensor([[0.0, 100.0]]))  # one too many
        assert one.batches_seen == 2
        assert one.top().tolist() == expected


def test_columns_beyond_16_bits_are_kept() -> None:
    """The published code keeps 16 bits of them: 40000 would become -25536."""
    x = torch.zeros(2, 70000)
    x[0, 40000], x[1, 65536] = 3.0, 2.0
    one = GradientStatistic((2, 70000), 3, 1, "mean_squared")
    one.add(x, torch.tensor([[1.0, 0.0], [0.5, 2.0]]))
    assert one.top().tolist() == [40000, 65536, 70000 + 65536]
    model = nn.Sequential(nn.Linear(70000, 2, bias=False)).requires_grad_(False)
    delta = attach(model, {"0": SparseIndices.from_flat(one.top(), (2, 70000))})["0"]
    assert delta.columns.tolist() == [40000, 65536, 65536]
    with torch.no_grad():
        delta.values.copy_(torch.tensor([1.0, 2.0, 4.0]))
        y = model(x) - nn.functional.linear(x, model[0].weight)
    assert torch.allclose(y, torch.tensor([[3.0, 0.0], [4.0, 8.0]]), atol=1e-4)


# ---- which entries


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("num_gradients", [1, 3])
@pytest.mark.parametrize("statistic", ["mean_squared", "mean"])
def test_every_matrix_gets_the_largest_entries_of_its_own_gradient(
    statistic: str, num_gradients: int, base: str
) -> None:
    model = lora(llama(base))
    method = RoSA(DENSITY, "wl2", num_gradients, statistic)
    begin(model, method, 12, lr=0.0)
    totals: dict[str, Tensor] = {}
    for step, batch in enumerate(batches(12)[: 2 + num_gradients]):
        assert not method.chosen
        if step >= 2:
            for name, gradient in dense_gradients(model, batch).items():
                term = gradient.square() if statistic == "mean_squared" else gradient
                totals[name] = totals.get(name, torch.zeros_like(term)) + term
        method.step(model, batch)
    assert method.chosen
    for name, delta in deltas(model).items():
        score = totals[name].abs().reshape(-1)
        flat = delta.indices.flat()
        assert len(delta) == round(DENSITY * math.prod(delta.shape))
        assert float(score[flat].min()) >= float(score.index_fill(0, flat, 0.0).max()) * (1 - 1e-4), name
        assert bool((delta.values == 0).all())


def test_one_batch_makes_no_tensor_of_the_size_of_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if not func.is_view and isinstance(out, Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    size = 4096
    one = GradientStatistic((size, size), size, 1, "mean_squared")
    x, grad = torch.randn(4, size), torch.randn(4, size)
    with Largest() as largest:
        one.add(x, grad)
    assert len(one.top()) == size
    assert 4 * size <= largest.elements < size * size / 8


# ---- schedules in a model


def test_the_warm_up_trains_adapters_alone_as_without_the_method() -> None:
    model, plain = lora(llama()), lora(llama())
    method = RoSA(DENSITY, "wl3")
    run(model, method, until=3)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for batch in batches(8)[:3]:
        plain(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in lora_parameters(plain).items():
        assert torch.equal(model.get_parameter(name), parameter)
    assert not method.chosen
    assert method._watching is not None
    before = snapshot(model)
    method.step(model, batches(8)[3])
    assert method.chosen and method._watching is None
    assert set(lora_parameters(model)) <= changed(model, before)  # adapters go on
    before = snapshot(model)
    method.step(model, batches(8)[4])
    moved = changed(model, before)
    assert set(lora_parameters(model)) <= moved
    assert {f"{name}.base_layer.sparse_deltas.default.values" for name in linear_layers(model)} <= moved


@pytest.mark.parametrize("base", BASES)
def test_both_are_trained_as_a_dense_model_with_a_masked_gradient(base: str) -> None:
    model = lora(llama(base))
    method = RoSA(DENSITY)
    run(model, method, until=1, lr=0.0)
    twin = copy.deepcopy(model)
    masks = {}
    dense: dict[str, nn.Parameter] = {}
    for name, layer in linear_layers(twin).items():
        below: Any = base_layer(layer)
        masks[name] = deltas(model)[name].indices.mask()
        if hasattr(below, "dequantize_"):
            below.dequantize_(torch.float32)
    peftkern.sparse.detach(twin)
    for name, layer in linear_layers(twin).items():
        below = base_layer(layer)
        below.weight = dense[name] = nn.Parameter(below.weight.detach().clone())  # type: ignore[operator]
    start = {name: weight.detach().clone() for name, weight in dense.items()}
    optimizer = torch.optim.SGD([*dense.values(), *lora_parameters(twin).values()], lr=0.1)
    own = torch.optim.SGD(method.parameters(), lr=0.1)
    method.optimizer = own
    for batch in batches(5):
        method.step(model, batch)
        twin(**batch).loss.backward()
        for name, weight in dense.items():
            weight.grad *= masks[name]  # type: ignore[operator]
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in lora_parameters(twin).items():
        assert error(model.get_parameter(name), parameter) <= 1e-5
    for name, delta in deltas(model).items():
        expected = delta.indices.gather(dense[name].detach() - start[name])
        assert error(delta.values, expected) <= 1e-4, name
    assert error(outputs(model), outputs(twin)) <= 1e-5


def test_lora_only_is_plain_lora() -> None:
    model, plain = lora(llama()), lora(llama())
    run(model, RoSA(schedule="lora_only"))
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for batch in batches(8):
        plain(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not changed(model, snapshot(plain))
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("base", BASES)
def test_spa_only_trains_deltas_alone(base: str) -> None:
    model = llama(base)
    before = snapshot(model)
    method = RoSA(DENSITY, "spa_only", num_gradients=2)
    run(model, method, until=6)
    assert not lora_parameters(model)
    assert not changed(model, before)
    assert all(bool((delta.values != 0).any()) for delta in deltas(model).values())
    beneath = lora(llama(base))
    adapters = {name: p.detach().clone() for name, p in lora_parameters(beneath).items()}
    method = RoSA(DENSITY, "spa_only")
    run(beneath, method, until=4)
    assert all(torch.equal(beneath.get_parameter(name), p) for name, p in adapters.items())
    assert all(bool((delta.values != 0).any()) for delta in deltas(beneath).values())


@pytest.mark.parametrize("base", BASES)
def test_a_model_without_adapters_gets_some(base: str) -> None:
    model = llama(base)
    plain = outputs(model)
    method = RoSA(DENSITY, rank=4, alpha=8.0)
    begin(model, method)
    assert torch.equal(outputs(model), plain)  # B is zero, and deltas are empty
    assert {p.shape[0] for name, p in lora_parameters(model).items() if "lora_A" in name} == {4}
    layer: Any = linear_layers(model)["model.layers.0.mlp.up_proj"]
    assert layer.scaling == {"default": 2.0}
    weights = {name: base_layer(layer).weight.detach().clone() for name, layer in linear_layers(model).items()}  # type: ignore[union-attr, operator]
    for batch in batches(4):
        method.step(model, batch)
    method.finish()
    assert error(outputs(model), plain) > 1e-3
    for name, layer in linear_layers(model).items():
        assert torch.equal(base_layer(layer).weight, weights[name])  # type: ignore[arg-type]
    assert all(p.requires_grad for p in lora_parameters(model).values())
    assert len(deltas(model)) == 14


@pytest.mark.parametrize("base", BASES)
def test_the_base_keeps_its_bits_and_what_is_off_is_the_base(base: str) -> None:
    model = lora(llama(base))
    plain = outputs(llama(base))
    before = snapshot(model)
    method = RoSA(DENSITY)
    run(model, method)
    method.finish()
    assert changed(model, before) == set(lora_parameters(model))
    with peftkern.sparse.disabled(model), model.disable_adapter():
        assert torch.equal(outputs(model), plain)
    assert not any(layer._forward_hooks for layer in linear_layers(model).values())


def test_merged_is_the_attached_forward(tmp_path: Path) -> None:
    model = lora(llama())
    method = RoSA(DENSITY)
    run(model, method)
    method.finish()
    model.eval()
    expected = outputs(model)
    method.update().save(tmp_path / "sparse")
    model.save_pretrained(tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
    update = SparseUpdate.load(tmp_path / "sparse")
    assert update.method == "rosa"
    applied = update.merge_into(loaded)
    assert error(outputs(loaded), expected) <= 1e-6
    applied.revert()
    update.attach_to(loaded)
    assert error(outputs(loaded), expected) <= 1e-6


@pytest.mark.parametrize("base", BASES)
def test_a_patched_model_trains_alike(base: str) -> None:
    plain, patched = lora(llama(base)), lora(llama(base))
    peftkern.patch(patched)
    for model in (plain, patched):
        method = RoSA(DENSITY, "wl1")
        run(model, method, until=5, lr=0.001)
    for name, delta in deltas(plain).items():
        flat = delta.indices.flat()
        assert float(torch.isin(deltas(patched)[name].indices.flat(), flat).float().mean()) > 0.97, name
    assert error(outputs(patched), outputs(plain)) <= 1e-3


def test_the_same_run_twice_gives_the_same_bits() -> None:
    states = []
    for _ in range(2):
        model = lora(llama())
        run(model, RoSA(DENSITY, num_gradients=2), until=5)
        states.append(snapshot(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_state_is_of_adapters_and_entries() -> None:
    model = lora(llama())
    method = RoSA(DENSITY)
    optimizer = run(model, method, until=3)
    entries = sum(map(len, deltas(model).values()))
    adapters = sum(p.numel() for p in lora_parameters(model).values())
    held = [t for p in optimizer.state for t in optimizer.state[p].values() if t.dim()]
    assert sum(t.numel() for t in held) == 2 * (entries + adapters)
    model(**text()).loss.backward()
    assert sum(p.grad.numel() for p in model.parameters() if p.grad is not None) == entries + adapters


@pytest.mark.parametrize("base", BASES)
def test_activation_checkpointing_changes_nothing(base: str) -> None:
    states = []
    for checkpointing in (False, True):
        model = lora(llama(base))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        run(model, RoSA(DENSITY, "wl1"), until=5)
        states.append(snapshot(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_weights_that_bitsandbytes_has_quantized_stay_as_they_are() -> None:
    model = lora(llama("bnb-nf4"))
    before, plain = snapshot(model), outputs(model)
    method = RoSA(DENSITY, "wl1")
    run(model, method, until=7)
    method.finish()
    trained = {name for name in before if "lora_" in name}
    assert changed(model, before) == trained
    assert all(bool((delta.values != 0).any()) for delta in deltas(model).values())
    assert error(outputs(model), plain) > 1e-3


# ---- errors


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.0},
        {"schedule": "never"},
        {"num_gradients": 0},
        {"statistic": "median"},
        {"rank": 0},
        {"dropout": 1.0},
    ],
)
def test_options_out_of_range_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"RoSA: {next(iter(options))} must be"):
        RoSA(**options)


def test_a_command_line_can_pass_every_option() -> None:
    plain = {"int", "float", "str", "bool", "None", "list[str]"}  # lists: of targets, its own option
    options = inspect.signature(RoSA).parameters.values()
    assert all(set(str(option.annotation).split(" | ")) <= plain for option in options)


def test_a_warm_up_as_long_as_the_run_is_an_error() -> None:
    method = RoSA(schedule="wl8")
    method.prepare(llama())
    with pytest.raises(ValueError, match=r"8 updates long, and the run 8.*schedule='wl2'"):
        method.start(torch.optim.SGD(method.parameters(), lr=0.1), 8)


def frozen_lora() -> nn.Module:
    return lora(llama()).requires_grad_(False)


def other_adapters() -> nn.Module:
    return peft.get_peft_model(llama(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (llama, {"targets": "nothing"}, "no linear layer matches"),
        (frozen_lora, {}, "adapters are frozen; load them with is_trainable=True"),
        (other_adapters, {}, "adapters are IA3, and must be LORA"),
    ],
)
def test_what_cannot_be_prepared_leaves_the_model_as_it_was(
    make: Callable[[], nn.Module], options: dict[str, Any], message: str
) -> None:
    model = make()
    before, asked = snapshot(model), [p.requires_grad for p in model.parameters()]
    method = RoSA(**options)
    with pytest.raises(ValueError, match=message):
        method.prepare(model)
    assert method.model is None
    assert model.state_dict().keys() == before.keys()
    assert [p.requires_grad for p in model.parameters()] == asked


# ---- in the Trainer

ADAMW = (torch.optim.AdamW, {"lr": 0.01})


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("wrapped", [True, False])
def test_the_trainer_does_what_the_loop_does(wrapped: bool, base: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    loop = lora(llama(base)) if wrapped else llama(base)
    make = functools.partial(RoSA, DENSITY, "wl1", num_gradients=2)
    method = make()
    torch.manual_seed(6)
    run(loop, method, 6)
    method.finish()
    trained = lora(llama(base)) if wrapped else llama(base)
    own = make()
    torch.manual_seed(6)
    own.prepare(trained)
    trainer(trained, tmp_path, own, 6, ADAMW, weight_decay=0.1).train()
    assert not changed(trained, snapshot(loop))
    assert trained.state_dict().keys() == loop.state_dict().keys()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("wrapped", [True, False])
def test_resumed_training_is_training_that_was_never_interrupted(wrapped: bool, base: str, tmp_path: Path) -> None:
    """Checkpoints in the warm-up, while gradients are looked at, and after the choice."""
    options: dict[str, Any] = {"weight_decay": 0.1, "save_strategy": "steps", "save_steps": 1}
    make = functools.partial(RoSA, DENSITY, "wl1", num_gradients=2)

    def prepared() -> tuple[Any, RoSA]:
        model, method = lora(llama(base)) if wrapped else llama(base), make()
        torch.manual_seed(6)
        method.prepare(model)
        return model, method

    whole, method = prepared()
    trainer(whole, tmp_path, method, 6, ADAMW, **options).train()
    for checkpoint in (1, 2, 4):
        resumed, method = prepared()
        again = trainer(resumed, tmp_path, method, 6, ADAMW, weight_decay=0.1)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
        assert not changed(resumed, snapshot(whole)), checkpoint
        assert method.chosen
