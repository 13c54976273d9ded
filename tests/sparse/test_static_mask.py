"""Sparse pre-training under a static mask: what is drawn, that zeros stay, and how dense training goes on."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from sparse_models import llama, text
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import peftkern
from peftkern.sparse import StaticMask, linear_layers

BATCHES = [text(seed=seed) for seed in range(8)]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "torch AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True),
    "AdamW": lambda p: peftkern.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW8bit": lambda p: peftkern.optim.AdamW8bit(p, lr=1e-2, weight_decay=0.1),
}


def started(model: nn.Module, optimizer: str = "torch AdamW", **options: Any) -> tuple[StaticMask, Any]:
    method = StaticMask(**{"sparsity": 0.75, **options})
    method.prepare(model)
    made = OPTIMIZERS[optimizer](method.parameters())
    method.start(made)
    return method, made


def weights(model: nn.Module, method: StaticMask) -> dict[str, Tensor]:
    return {name: model.get_submodule(name).get_parameter("weight") for name in method.masks}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**text()).logits
    return result


# ---- the masks


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9, 0.29])
def test_every_matrix_keeps_exactly_its_share(sparsity: float) -> None:
    model = llama()
    method = StaticMask(sparsity)
    method.prepare(model)
    assert method.masks.keys() == linear_layers(model).keys() and len(method.masks) == 14
    hundredths = round(100 * (1 - sparsity))
    for name, weight in weights(model, method).items():
        kept = math.floor(hundredths * weight.numel() / 100)
        assert method.masks[name].kept() == kept
        assert int((weight != 0).sum()) == kept
    assert method.report is not None
    assert [(row.kept, row.entries) for row in method.report.rows][:1] == [(hundredths * 4096 // 100, 4096)]


def test_a_tenth_of_a_thousand_is_a_hundred() -> None:
    model = nn.Sequential(nn.Linear(50, 20))  # 1 - 0.9 is less than 0.1 in floating point
    method = StaticMask(0.9)
    method.prepare(model)
    assert method.masks["0"].kept() == 100


def test_a_pattern_keeps_n_of_every_m_columns() -> None:
    model = llama()
    method = StaticMask(pattern=(2, 4))
    method.prepare(model)
    for name, mask in method.masks.items():
        assert mask.pattern == (2, 4)
        assert set(mask.mask().view(-1, 4).sum(1).tolist()) == {2}, name


def test_embeddings_norms_and_heads_stay_dense() -> None:
    model = llama()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    method = StaticMask(0.75)
    method.prepare(model)
    masked = {f"{name}.weight" for name in method.masks}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name not in masked)
    assert all(
        torch.equal(p, before[name] * method.masks[name.removesuffix(".weight")].mask())
        for name, p in model.named_parameters()
        if name in masked
    )
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} & masked == set()


def test_the_seed_decides() -> None:
    def drawn(seed: int, targets: Any = "all-linear") -> dict[str, Tensor]:
        method = StaticMask(0.75, seed=seed, targets=targets)
        method.prepare(llama())
        return {name: mask.bits for name, mask in method.masks.items()}

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    alone = drawn(0, ["o_proj"])  # a mask does not depend on which others there are
    assert len(alone) == 2 and all(torch.equal(alone[name], first[name]) for name in alone)
    twins = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    assert not torch.equal(*(first[name] for name in twins))


def test_the_report_counts(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    method = StaticMask(0.75, seed=5)
    with caplog.at_level(logging.INFO, "peftkern"):
        method.prepare(model)
    report = method.report
    assert report is not None and report.density == 0.25
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = total - sum(int((~mask.mask()).sum()) for mask in method.masks.values())
    assert report.share == pytest.approx(trained / total, abs=1e-12)
    assert "seed 5" in caplog.text and "model.layers.*.self_attn.q_proj" in caplog.text and "25.00%" in caplog.text


# ---- the sparse phase


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_stay_zeros_under_decay_and_momentum(optimizer: str) -> None:
    model = llama()
    method, made = started(model, optimizer)
    before = {name: weight.detach().clone() for name, weight in weights(model, method).items()}
    for batch in BATCHES[:4]:
        method.step(model, batch)
    for name, weight in weights(model, method).items():
        keep = method.masks[name].mask()
        assert not weight[~keep].any(), name
        assert (weight != before[name])[keep].float().mean() > 0.99, name
        for state in made.state[weight].values():
            if isinstance(state, Tensor) and state.shape == weight.shape and state.dtype.is_floating_point:
                assert not state[~keep].any(), name  # zero, and no NaN


def test_it_is_training_with_masked_gradients() -> None:
    model, twin = llama(), llama()
    method, _ = started(model)
    with torch.no_grad():
        for name, mask in method.masks.items():
            twin.get_submodule(name).weight.mul_(mask.mask())
    reference = OPTIMIZERS["torch AdamW"](twin.parameters())
    for batch in BATCHES[:3]:
        method.step(model, batch)
        twin(**batch).loss.backward()
        for name, mask in method.masks.items():
            twin.get_submodule(name).weight.grad.mul_(mask.mask())
        reference.step()
        reference.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_gradient_that_is_no_number_does_not_reach_a_zero() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    method, _ = started(model, "AdamW")
    weight = model.get_submodule("0").get_parameter("weight")
    keep = method.masks["0"].mask()
    (weight * torch.where(keep, 1.0, torch.inf)).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, keep.float())


def test_a_second_prepare_changes_nothing() -> None:
    model = llama()
    method, _ = started(model)
    for batch in BATCHES[:2]:
        method.step(model, batch)
    before = copy.deepcopy(model.state_dict())
    method.prepare(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(method._hooks) == 14


def test_resuming_is_never_having_stopped() -> None:
    model = llama()
    method, made = started(model)
    for batch in BATCHES[:2]:
        method.step(model, batch)
    saved = copy.deepcopy((model.state_dict(), made.state_dict()))
    for batch in BATCHES[2:4]:
        method.step(model, batch)
    other = llama(seed=9)
    again, resumed = started(other)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for batch in BATCHES[2:4]:
        again.step(other, batch)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


# ---- the release


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_release_changes_no_logit(optimizer: str) -> None:
    model = llama()
    method, _ = started(model, optimizer)
    for batch in BATCHES[:3]:
        method.step(model, batch)
    before, was = logits(model), copy.deepcopy(model.state_dict())
    method.release()
    assert torch.equal(logits(model), before)
    assert all(torch.equal(value, was[name]) for name, value in model.state_dict().items())


def test_the_first_dense_step_moves_what_was_masked_by_the_learning_rate() -> None:
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    method = StaticMask(0.75)
    method.prepare(model)
    made = torch.optim.AdamW(method.parameters(), lr=1e-3, eps=1e-20, weight_decay=0.1)
    method.start(made)
    for batch in BATCHES[:3]:
        method.step(model, batch)
    method.release()
    assert not made.state and all(parameter.requires_grad for parameter in model.parameters())
    trained = [id(parameter) for group in made.param_groups for parameter in group["params"]]
    assert sorted(trained) == sorted(id(parameter) for parameter in model.parameters())
    before = {name: weight.detach().clone() for name, weight in weights(model, method).items()}
    model(**BATCHES[3]).loss.backward()
    made.step()
    for name, weight in weights(model, method).items():
        dropped = ~method.masks[name].mask()
        assert weight.grad is not None and not before[name][dropped].any()
        gradient = weight.grad[dropped]
        assert (gradient != 0).float().mean() > 0.99
        moved = weight.detach()[dropped]
        assert torch.allclose(moved, -1e-3 * gradient.sign(), rtol=1e-4, atol=0.0), name  # decay of a zero is zero


def test_the_trainer_trains_sparse_and_then_dense(tmp_path: Path) -> None:
    model = llama()
    method = StaticMask(0.75)

    def trainer(*callbacks: Any) -> Trainer:
        options: dict[str, Any] = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
        arguments = TrainingArguments(str(tmp_path), max_steps=3, learning_rate=1e-2, weight_decay=0.1, **options)
        rows = [{name: value[0] for name, value in batch.items()} for batch in BATCHES]
        return Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks))

    trainer(method).train()
    assert method.steps_done == 3
    for name, weight in weights(model, method).items():
        assert not weight[~method.masks[name].mask()].any(), name
        assert weight._backward_hooks is None or not weight._backward_hooks
    before = logits(model)
    method.release()
    assert torch.equal(logits(model), before)
    trainer().train()
    for name, weight in weights(model, method).items():
        assert (weight[~method.masks[name].mask()] != 0).float().mean() > 0.99, name


# ---- refusals


def test_refusals_leave_the_model_as_it_was() -> None:
    def frozen(model: Any) -> Any:
        model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
        return model

    def tied(model: Any) -> Any:
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
        return model

    cases: list[tuple[Any, dict[str, Any], str]] = [
        (peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])), {}, "PEFT adapters"),
        (llama("nf4"), {}, "quantized"),
        (frozen(llama()), {}, r"layers\.1\.mlp\.up_proj is not trained"),
        (tied(llama()), {}, "shares its weight with"),
        (llama(), {"pattern": (2, 7)}, "q_proj: .*multiple of 7"),
        (llama(), {"targets": ["nothing"]}, "nothing"),
    ]
    for model, options, message in cases:
        before = copy.deepcopy(model.state_dict())
        method = StaticMask(0.5, **options)
        with pytest.raises(ValueError, match=message):
            method.prepare(model)
        assert method.model is None and not method.masks
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("options", [{"sparsity": 0.0}, {"sparsity": 1.0}, {"sparsity": 75}, {"pattern": (5, 4)}])
def test_bad_arguments_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        StaticMask(**options)


def test_before_prepare_it_says_what_to_call() -> None:
    for call in (StaticMask().finish, StaticMask().release):
        with pytest.raises(RuntimeError, match=r"prepare\(model\)"):
            call()
