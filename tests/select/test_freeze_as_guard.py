"""FreezeAsGuard: the gradient of masks, what is exact, and the guard that comes of it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from select_models import batches, changed, error, llama, twin, values
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import peftkern
from peftkern.integrations.fingerprint import Fingerprint, WrongBaseError
from peftkern.nn import QuantizedLinear
from peftkern.optim import AdamW
from peftkern.select.freeze_as_guard import (
    FreezeAsGuard,
    FreezeGuard,
    apply_guard,
    sigmoid_slope,
    sparsity_gradient,
    sparsity_step,
)

ILLEGAL, INNOCENT = batches(2, seed=11), batches(2, seed=12)


class ThreeTensors(nn.Module):
    """A network of two layers: two matrices and a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.second(self.first(x).tanh()) - y).square().mean())


def points(seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(7, 3, generator=generator), "y": torch.randn(7, 2, generator=generator)}]


def tuned(model: nn.Module, size: float = 0.1) -> dict[str, Tensor]:
    """The weights of the model after some fine-tuning."""
    generator = torch.Generator().manual_seed(5)
    return {n: p.detach() + size * torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}


def small(**options: Any) -> FreezeAsGuard:
    return FreezeAsGuard(points(1), points(2), **options)


def guard_of(**options: Any) -> FreezeAsGuard:
    return FreezeAsGuard(ILLEGAL, INNOCENT, **options)


def run(
    model: nn.Module, method: FreezeAsGuard, optimizer: Callable[[Any], torch.optim.Optimizer], data: list[Any]
) -> torch.optim.Optimizer:
    method.prepare(model)
    made = optimizer(method.parameters())
    method.start(made)
    for batch in data:
        method.step(model, batch)
    return made


def sgd(p: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(p, lr=0.1)


# ---- the level of masks


def test_the_gradient_of_masks_is_a_finite_difference() -> None:
    model = ThreeTensors()
    pretrained, fine = values(model), tuned(model)
    method = small(fine_tuned=fine, temperature=0.7)
    method.prepare(model)
    formula = method._dots() * sigmoid_slope(method._x, 0.7)
    exact, step = ThreeTensors().double(), 1e-4

    def mixed_loss(x: Tensor) -> float:
        with torch.no_grad():
            for (name, parameter), one in zip(exact.named_parameters(), x, strict=True):
                wide = fine[name].double()
                parameter.copy_(wide + torch.sigmoid(one / 0.7) * (pretrained[name].double() - wide))
            losses = [exact(*(t.double() for t in data[0].values())).loss.item() for data in (points(1), points(2))]
        return (losses[1] - losses[0]) / 2

    for index in range(3):
        shift = torch.zeros(3, dtype=torch.float64)
        shift[index] = step
        slope = (mixed_loss(method._x + shift) - mixed_loss(method._x - shift)) / (2 * step)
        assert abs(float(formula[index]) - slope) <= 1e-5 * abs(slope) + 1e-8


def test_the_gradient_of_sparsity_is_a_finite_difference_and_by_hand() -> None:
    x = torch.tensor([0.1, -0.4, 0.9], dtype=torch.float64)
    gradient = sparsity_gradient(x, 0.2, 0.5)
    for index in range(3):
        shift = torch.zeros(3, dtype=torch.float64)
        shift[index] = 1e-5
        far, near = (((0.2 - torch.sigmoid(z / 0.5).mean()) ** 2).item() for z in (x + shift, x - shift))
        assert abs(float(gradient[index]) - (far - near) / 2e-5) <= 1e-9
    # both m are 1/2, slopes 1/4 / 0.5 = 1/2, and 2 (0.5 - 0.2) / 2 is 0.3
    assert torch.allclose(sparsity_gradient(torch.zeros(2), 0.2, 0.5), torch.tensor([0.15, 0.15]))


def test_a_step_of_masks_by_hand() -> None:
    model = ThreeTensors()
    method = small(fine_tuned=tuned(model), mask_step=3.0, sparsity_step=0.5, freeze_ratio=0.2, user_interval=1)
    method.prepare(model)
    x, dots = method._x.clone(), method._dots()
    method._step_masks()
    m = torch.sigmoid(x / 0.2)
    slope = m * (1 - m) / 0.2
    expected = x - 3.0 * dots * slope - 0.5 * 2 * (m.mean() - 0.2) / 3 * slope
    assert error(method._x, expected) <= 1e-9
    assert float((method._x - x).abs().min()) > 0


def test_illegal_data_pushes_masks_where_its_loss_grows() -> None:
    """Without the sparsity term: steps of the masks alone raise the illegal and lower the innocent loss."""
    model = ThreeTensors()
    method = small(fine_tuned=tuned(model, 0.5), mask_step=0.05, sparsity_step=0.0)
    method.prepare(model)

    def mixed() -> float:
        return (model(**points(2)[0]).loss - model(**points(1)[0]).loss).item() / 2

    before = mixed()
    for _ in range(20):
        method._step_masks()
        method._relax()
    assert mixed() < before


@pytest.mark.parametrize("tensors", [3, 14, 272, 686])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_sparsity_alone_brings_the_mean_to_the_ratio(tensors: int, ratio: float) -> None:
    """With the published step size, which overshoots in small models and would leave all masks at 0."""
    x = torch.rand(tensors, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert bool((torch.sigmoid(x / 0.2) >= 0.5).all()) and float(torch.sigmoid(x / 0.2).max()) < 0.9934
    for _ in range(300):
        x = sparsity_step(x, ratio, 0.2, 5e3)
    assert abs(float(torch.sigmoid(x / 0.2).mean()) - ratio) <= 5e-3
    assert bool(x.isfinite().all())


def test_sparsity_steps_are_whole_where_they_do_not_overshoot() -> None:
    x = torch.tensor([0.3, 0.6, 0.1], dtype=torch.float64)
    assert torch.equal(sparsity_step(x, 0.2, 0.5, 0.1), x - 0.1 * sparsity_gradient(x, 0.2, 0.5))
    landed = sparsity_step(x, 0.2, 0.5, 1e4)
    assert abs(float(torch.sigmoid(landed / 0.5).mean()) - 0.2) <= 1e-9


def test_masks_step_once_every_few_updates() -> None:
    model = llama()
    method = guard_of(user_interval=3, fine_tuned=tuned(model))
    method.prepare(model)
    method.start(sgd(method.parameters()))
    seen = []
    for batch in batches(7):
        before = method.masks
        method.step(model, batch)
        seen.append(method.masks != before)
    assert seen == [False, False, True, False, False, True, False]


# ---- the level of users


def test_an_update_by_hand() -> None:
    """SGD moves wft by lr (1 - m) ∂L/∂w, and w by (1 - m) of that."""
    model = ThreeTensors()
    fine, before = tuned(model), values(model)
    method = small(fine_tuned=fine, user_interval=100)
    method.prepare(model)
    masks, other = method.masks, twin(model)
    data = points(3)[0]
    other(**data).loss.backward()
    method.start(sgd(method.parameters()))
    method.step(model, data)
    for tensor in method._tensors:
        m, gradient = masks[tensor.name], other.get_parameter(tensor.name).grad
        assert gradient is not None
        moved = -0.1 * (1 - m) * gradient
        assert error(tensor.pretrained - tensor.difference, fine[tensor.name] + moved) <= 1e-6
        expected = fine[tensor.name] + moved + m * (before[tensor.name] - fine[tensor.name] - moved)
        assert error(tensor.parameter.detach(), expected) <= 1e-6


@pytest.mark.parametrize("kind", ["sgd", "adamw", "torch"])
def test_weights_stay_between_fine_tuned_and_pretrained(kind: str) -> None:
    optimizers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
        "torch": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    }
    model = llama()
    before = values(model)
    method = guard_of(user_interval=2)
    run(model, method, optimizers[kind], batches(5))
    for tensor in method._tensors:
        fine_tuned, m = tensor.pretrained - tensor.difference, method.masks[tensor.name]
        assert torch.equal(tensor.pretrained, before[tensor.name])
        identity = fine_tuned + m * tensor.difference
        assert error(tensor.parameter.detach(), identity) <= 1e-6, tensor.name
        assert float(tensor.difference.abs().max()) > 0, tensor.name


def test_where_nothing_is_frozen_it_is_plain_fine_tuning() -> None:
    model, plain, data = llama(), llama(), batches(4)
    method = guard_of(user_interval=100)
    method.prepare(model)
    method._x.fill_(-100.0)
    method.start(sgd(method.parameters()))
    optimizer = sgd(plain.parameters())
    for batch in data:
        method.step(model, batch)
        plain(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    method.finish()
    assert method.guard is not None and method.guard.frozen == ()
    for name, parameter in model.named_parameters():
        assert error(parameter.detach(), plain.get_parameter(name).detach()) <= 1e-6


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_where_all_is_frozen_the_model_keeps_its_bits(kind: str) -> None:
    """Under decay and momentum, at every step and in the end, whatever the user has trained."""
    model = llama()
    before = values(model)
    method = guard_of(fine_tuned=tuned(model), mask_step=0.0, sparsity_step=0.0, user_interval=2)
    method.prepare(model)
    method._x.fill_(100.0)
    sgd_options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    parameters = method.parameters()
    method.start(torch.optim.SGD(parameters, **sgd_options) if kind == "sgd" else AdamW(parameters, weight_decay=0.1))
    for batch in batches(4):
        method.step(model, batch)
        assert not changed(model, before)
    assert all(float(tensor.difference.abs().max()) > 0 for tensor in method._tensors)
    method.finish()
    assert not changed(model, before)
    assert not list(method.parameters())


# ---- the end


def test_finish_rounds_and_frozen_tensors_have_their_pretrained_bits(tmp_path: Path) -> None:
    model = llama()
    before, fine = values(model), tuned(model)
    file = tmp_path / "guard.json"
    method = guard_of(fine_tuned=fine, freeze_ratio=0.4, user_interval=1, file=str(file))
    optimizer = run(model, method, lambda p: AdamW(p, lr=1e-3, weight_decay=0.1), batches(6))
    masks = method.masks
    method.finish()
    guard = method.guard
    assert guard is not None
    assert set(guard.frozen) == {name for name, m in masks.items() if m > 0.5}
    assert 0 < len(guard.frozen) < guard.tensors == len(masks)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in guard.frozen), name
        assert parameter.requires_grad == (name not in guard.frozen), name
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert "freeze_as_guard" not in str(optimizer.state_dict())
    loaded = FreezeGuard.load(file)
    assert (loaded.frozen, loaded.tensors) == (guard.frozen, guard.tensors)
    assert str(loaded) == f"freeze guard of LlamaForCausalLM: {len(guard.frozen)} of {len(masks)} tensors frozen"
    assert file.stat().st_size < 100_000


def test_the_share_of_tensors_that_is_frozen_comes_near_the_ratio() -> None:
    model = llama(num_hidden_layers=4)
    method = guard_of(fine_tuned=tuned(model), user_interval=1, freeze_ratio=0.3, mask_step=0.01)
    run(model, method, lambda p: torch.optim.SGD(p, lr=1e-3), batches(20))
    assert abs(sum(method.masks.values()) / len(method.masks) - 0.3) <= 0.02
    method.finish()
    assert method.guard is not None
    assert abs(len(method.guard.frozen) / method.guard.tensors - 0.3) <= 0.1


def test_the_same_seed_freezes_the_same() -> None:
    def frozen(seed: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        model = llama()
        method = guard_of(fine_tuned=tuned(model), user_interval=1, seed=seed)
        run(model, method, sgd, batches(3))
        return method.masks, values(model)

    (first, weights), (second, again), (other, _) = frozen(1), frozen(1), frozen(2)
    assert first == second != other
    assert all(torch.equal(weights[name], again[name]) for name in weights)


# ---- users


def guard_file(folder: Path, frozen: tuple[str, ...]) -> Path:
    FreezeGuard(Fingerprint.of(llama()), 21, frozen).save(folder / "guard.json")
    return folder / "guard.json"


FROZEN = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight")


def test_a_guard_freezes_under_decay_and_momentum(tmp_path: Path) -> None:
    model = llama()
    before = values(model)
    assert apply_guard(model, guard_file(tmp_path, FROZEN)).frozen == FROZEN
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for batch in batches(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert changed(model, before) == set(before) - set(FROZEN)


def test_the_model_that_learned_a_guard_takes_it() -> None:
    model = llama()
    method = guard_of(fine_tuned=tuned(model), freeze_ratio=0.4, user_interval=1)
    run(model, method, sgd, batches(2))
    method.finish()
    assert method.guard is not None
    assert apply_guard(model, method.guard) is method.guard
    fresh = llama()
    apply_guard(fresh, method.guard)
    assert {n for n, p in fresh.named_parameters() if not p.requires_grad} == set(method.guard.frozen)


def test_a_guard_of_another_model_is_an_error_that_says_so(tmp_path: Path) -> None:
    file = guard_file(tmp_path, FROZEN)
    other = llama(hidden_size=16)
    with pytest.raises(WrongBaseError, match="the guard is of LlamaForCausalLM, not of this model: their"):
        apply_guard(other, file)
    with pytest.raises(ValueError, match=r"no tensor 'model\.layers\.9"):
        apply_guard(llama(), guard_file(tmp_path, (FROZEN[0], "model.layers.9.mlp.up_proj.weight")))
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    asked = [parameter.requires_grad for parameter in adapted.parameters()]
    with pytest.raises(ValueError, match="apply_guard: the model carries PEFT adapters"):
        apply_guard(adapted, file)
    assert [parameter.requires_grad for parameter in adapted.parameters()] == asked
    assert all(parameter.requires_grad for parameter in other.parameters())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "FreezeGuard.load"),
        ("[]", "it is no peftkern freeze guard"),
        ('{"format": "peftkern freeze guard", "version": 2}', "version 2"),
        ('{"format": "peftkern freeze guard", "version": 1, "tensors": 3, "frozen": [1]}', "a list of names"),
        ('{"format": "peftkern freeze guard", "version": 1, "tensors": 3, "frozen": []}', "cannot be read"),
    ],
)
def test_other_files_are_errors(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "guard.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        apply_guard(llama(), tmp_path / "guard.json")


# ---- checkpoints and the Trainer


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw", "torch"])
def test_a_run_that_goes_on_from_a_checkpoint_is_one_that_was_never_interrupted(kind: str, tmp_path: Path) -> None:
    optimizers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "sgd": sgd,
        "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adamw": lambda p: AdamW(p, lr=0.01),
        "torch": lambda p: torch.optim.AdamW(p, lr=0.01),
    }
    whole, data = llama(), batches(7)
    method = guard_of(user_interval=2, fine_tuned=tuned(whole))
    run(whole, method, optimizers[kind], data)

    first = llama()
    begun = guard_of(user_interval=2, fine_tuned=tuned(first))
    torch.save(run(first, begun, optimizers[kind], data[:3]).state_dict(), tmp_path / "optimizer.pt")
    second = llama()
    resumed = guard_of(user_interval=2, fine_tuned=tuned(second))
    resumed.prepare(second)
    optimizer = optimizers[kind](resumed.parameters())
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    resumed.start(optimizer)
    assert not changed(second, values(first))
    for batch in data[3:]:
        resumed.step(second, batch)
    assert resumed.masks == method.masks
    assert not changed(second, values(whole))


def trainer(model: nn.Module, folder: Path, method: FreezeAsGuard, epochs: int) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        num_train_epochs=epochs,
        learning_rate=0.01,
        weight_decay=0.1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        save_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    data: Any = [{name: tensor[0] for name, tensor in batch.items()} for batch in batches(6, rows=1)]
    run = Trainer(model, arguments, train_dataset=data, callbacks=[method])
    run.optimizer = AdamW(method.parameters(), lr=0.01, weight_decay=0.1)
    return run


def test_trainer_and_plain_loop_learn_the_same(tmp_path: Path) -> None:
    model, looped = llama(), llama()
    options: dict[str, Any] = {"user_interval": 2, "fine_tuned": tuned(model), "freeze_ratio": 0.4}
    method = guard_of(**options, file=str(tmp_path / "guard.json"))
    trainer(model, tmp_path, method, epochs=2).train()
    plain = guard_of(**options)
    rows = batches(6, rows=1)
    pairs = [{n: torch.cat([a[n], b[n]]) for n in a} for a, b in zip(rows[::2], rows[1::2], strict=True)]
    run(looped, plain, lambda p: AdamW(p, lr=0.01, weight_decay=0.1), pairs * 2)
    plain.finish()
    assert plain.guard is not None and method.guard is not None
    assert plain.guard.frozen == method.guard.frozen == FreezeGuard.load(tmp_path / "guard.json").frozen
    assert not changed(model, values(looped))


def test_resumed_training_is_training_that_was_never_interrupted(tmp_path: Path) -> None:
    whole, resumed = llama(), llama()
    options: dict[str, Any] = {"user_interval": 2, "fine_tuned": tuned(whole), "freeze_ratio": 0.4}
    first, second = guard_of(**options), guard_of(**options)
    trainer(whole, tmp_path, first, epochs=3).train()
    trainer(resumed, tmp_path, second, epochs=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert first.guard is not None and second.guard is not None
    assert first.guard.frozen == second.guard.frozen
    assert not changed(resumed, values(whole))


# ---- what it refuses


def test_a_bfloat16_model_keeps_small_changes_in_its_differences() -> None:
    model = llama().to(torch.bfloat16)
    before = values(model)
    method = guard_of(fine_tuned=tuned(model), freeze_ratio=0.4, user_interval=1)
    run(model, method, lambda p: AdamW(p, lr=1e-3), batches(2))
    for tensor in method._tensors:
        m = method.masks[tensor.name]
        expected = tensor.pretrained.float() - (1 - m) * tensor.difference
        assert torch.equal(tensor.parameter, expected.to(torch.bfloat16)), tensor.name
    method.finish()
    assert method.guard is not None
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in method.guard.frozen)


def quantized() -> nn.Module:
    model = llama(hidden_size=64)
    module = model.model.layers[0].mlp
    module.up_proj = QuantizedLinear.from_linear(module.up_proj)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "quantized": (quantized, {}, "FreezeAsGuard: .*up_proj.weight is quantized .* train LoRA adapters"),
    "frozen": (lambda: llama().requires_grad_(False), {}, "no parameter of the model asks for a gradient"),
    "other": (llama, {"fine_tuned": {}}, "fine_tuned must have model.embed_tokens.weight .* got nothing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_train_is_an_error_and_the_model_stays_as_it_was(case: str) -> None:
    make, options, message = REFUSED[case]
    model = make()
    before, asked = values(model), [parameter.requires_grad for parameter in model.parameters()]
    method = guard_of(**options)
    with pytest.raises(ValueError, match=message):
        method.prepare(model)
    assert not changed(model, before) and method.model is None
    assert [parameter.requires_grad for parameter in model.parameters()] == asked


def test_data_that_runs_out_is_an_error() -> None:
    model = llama()
    method = FreezeAsGuard(iter(ILLEGAL[:1]), INNOCENT, user_interval=1)
    method.prepare(model)
    method.start(sgd(method.parameters()))
    method.step(model, batches(1)[0])
    with pytest.raises(ValueError, match=r"illegal must hold batches that can be gone through again.*gave 1"):
        method.step(model, batches(1)[0])


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model = ThreeTensors()
    broken = points(1)
    broken[0]["y"][:] = math.inf
    method = FreezeAsGuard(broken, points(2), user_interval=1)
    method.prepare(model)
    method.start(sgd(method.parameters()))
    with pytest.raises(RuntimeError, match="not finite"):
        method.step(model, points(3)[0])


@pytest.mark.parametrize(
    "options",
    [{"freeze_ratio": 1.2}, {"temperature": 0.0}, {"mask_step": -1.0}, {"sparsity_step": -1.0}, {"user_interval": 0}],
)
def test_bad_arguments_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"FreezeAsGuard: {next(iter(options))} must be"):
        guard_of(**options)


def test_defaults_are_those_of_the_published_scripts_and_options_are_documented() -> None:
    parameters = inspect.signature(FreezeAsGuard).parameters
    expected = {"freeze_ratio": 0.2, "temperature": 0.2, "mask_step": 10.0, "sparsity_step": 5e3, "user_interval": 5}
    assert {name: parameters[name].default for name in expected} == expected
    assert FreezeAsGuard.__doc__ is not None
    assert all(f"\n        {name}: " in FreezeAsGuard.__doc__ for name in parameters)
    assert peftkern.select.FreezeAsGuard is peftkern.FreezeAsGuard is FreezeAsGuard
