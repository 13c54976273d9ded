"""GreenTrainer: within its budget, best of all selections, and the rest of the model untouched."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from select_models import batches, changed, error, llama, twin, values
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments

import peftkern
from peftkern.optim import AdamW
from peftkern.select.cost_graph import CostGraph
from peftkern.select.green_trainer import GreenTrainer
from peftkern.select.solver import BudgetError


def started(
    model: nn.Module, policy: GreenTrainer, optimizer: type[torch.optim.Optimizer] = AdamW, **options: Any
) -> Any:
    policy.prepare(model)
    policy.start(optimizer(policy.parameters(), **{"lr": 0.01, **options}))
    return policy


def selected(policy: GreenTrainer) -> set[str]:
    assert policy.selection is not None
    return set(policy.selection.names)


def counted(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """FLOPs of products and attention in a forward and a backward pass, by PyTorch's own count."""
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    model.zero_grad()
    return counter.get_total_flops()


# ---- the choice


@pytest.mark.parametrize("rho", [0.45, 0.6, 0.8, 1.0])
def test_the_step_stays_within_the_budget_and_trains_only_the_selected(rho: float) -> None:
    model = llama(num_hidden_layers=4, tie_word_embeddings=False)
    full = counted(model, batches(1)[0])
    policy = started(model, GreenTrainer(rho), weight_decay=0.1)
    for batch in batches(3):
        before = values(model)
        policy.step(model, batch)
        assert changed(model, before) == selected(policy)
    assert policy.selection is not None
    assert policy.selection.share("flops") <= rho
    assert counted(model, batches(1)[0]) <= rho * full


def test_the_choice_is_the_best_of_all() -> None:
    model = llama(num_hidden_layers=1, tie_word_embeddings=False)
    policy = started(model, GreenTrainer(0.6))
    policy.step(model, batches(1)[0])
    graph, importances = policy.costs["flops"], policy.importances
    budget = graph.backward_budget(0.6)
    best = max(
        sum(importances[name] for name in names)
        for size in range(len(policy.candidates) + 1)
        for names in itertools.combinations(policy.candidates, size)
        if graph.backward(names) <= budget
    )
    assert sum(importances[name] for name in selected(policy)) == pytest.approx(best, rel=1e-9)


def test_everything_is_trained_where_the_budget_is_the_full_step() -> None:
    model = llama()
    importances = {name: 1.0 for name, _ in model.named_parameters()}
    policy = started(model, GreenTrainer(1.0, importance=importances))
    policy.step(model, batches(1)[0])
    assert selected(policy) == set(policy.candidates)


def test_importances_of_ones_own_decide() -> None:
    model = llama(tie_word_embeddings=False)
    wanted = {"model.layers.1.mlp.down_proj.weight": 5.0, "model.norm.weight": 1.0}
    importances = {name: wanted.get(name, 0.0) for name, _ in model.named_parameters()}
    policy = started(model, GreenTrainer(0.7, importance=lambda _model, _batch: importances))
    policy.step(model, batches(1)[0])
    assert selected(policy) == set(wanted)


def test_it_chooses_anew_after_every_interval() -> None:
    model = llama()
    policy = started(model, GreenTrainer(0.6, interval=2))
    for batch in batches(5):
        policy.step(model, batch)
    assert [selection.step for selection in policy.history] == [0, 2, 4]
    assert policy.history[0].importances != policy.history[2].importances


def test_a_budget_in_seconds_is_kept_by_what_was_measured() -> None:
    model = llama(num_hidden_layers=4)
    policy = started(model, GreenTrainer(0.8, budget="seconds"))
    policy.step(model, batches(1)[0])
    assert policy.selection is not None
    assert policy.costs.keys() == {"flops", "seconds"}
    assert policy.selection.share("seconds") <= 0.8


# ---- what is trained


def test_trained_tensors_are_those_of_a_dense_run_with_the_other_gradients_zero() -> None:
    model = llama()
    dense = twin(model)
    policy = started(model, GreenTrainer(0.6), torch.optim.SGD, momentum=0.9)
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.01, momentum=0.9)
    for batch in batches(3):
        policy.step(model, batch)
        dense(**batch).loss.backward()
        for name, parameter in dense.named_parameters():
            if name not in selected(policy):
                parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in dense.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_adapters_over_a_quantized_model() -> None:
    model = llama(num_hidden_layers=3, hidden_size=64, intermediate_size=64)
    peftkern.quantize_(model, peftkern.QuantConfig("nf4"))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    peftkern.patch(adapted)
    policy = started(adapted, GreenTrainer(0.8))
    before = values(adapted)
    for batch in batches(3):
        policy.step(adapted, batch)
    assert all("lora_" in name for name in policy.candidates)
    assert 0 < len(selected(policy)) < len(policy.candidates)
    assert changed(adapted, before) == selected(policy)


def test_a_trainer_takes_it_as_a_callback(tmp_path: Path) -> None:
    losses = []
    for use_trainer in (False, True):
        model = llama()
        policy = GreenTrainer(0.6, interval=2, sample=1.0)
        data = batches(5, rows=1)
        if use_trainer:
            arguments = TrainingArguments(
                str(tmp_path),
                per_device_train_batch_size=1,
                max_steps=5,
                learning_rate=0.01,
                weight_decay=0.0,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                save_strategy="no",
                train_sampling_strategy="sequential",
            )
            rows = [{name: tensor[0] for name, tensor in batch.items()} for batch in data]
            optimizer = (AdamW, {"lr": 0.01, "weight_decay": 0.0})
            Trainer(
                model, arguments, train_dataset=rows, callbacks=[policy], optimizer_cls_and_kwargs=optimizer
            ).train()
        else:
            started(model, policy, weight_decay=0.0)
            for batch in data:
                policy.step(model, batch)
            policy.finish()
        assert [selection.step for selection in policy.history] == [0, 2, 4]
        losses.append(values(model))
    for name, value in losses[0].items():
        assert error(losses[1][name], value) < 1e-6, name


def test_a_compiled_model_chooses_as_it_does_uncompiled() -> None:
    runs = []
    for compiled in (False, True):
        model = llama(num_hidden_layers=1)
        policy = started(model, GreenTrainer(0.6, interval=2))
        called = torch.compile(model, backend="eager") if compiled else model
        losses = [policy.step(called, batch).item() for batch in batches(3)]
        runs.append(([selection.names for selection in policy.history], losses))
        policy.finish()
    (names, losses), (compiled_names, compiled_losses) = runs
    assert compiled_names == names
    assert compiled_losses == pytest.approx(losses, rel=1e-6)


# ---- refusals


def test_a_budget_that_is_enough_for_nothing_names_one_that_is() -> None:
    model = llama()
    policy = started(model, GreenTrainer(0.05))
    before = values(model)
    with pytest.raises(BudgetError, match="rho") as caught:
        policy.step(model, batches(1)[0])
    assert not changed(model, before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    again = started(llama(), GreenTrainer(caught.value.rho * 1.001))
    again.step(again.model, batches(1)[0])
    assert len(selected(again)) >= 1


def test_nothing_that_lowers_the_loss_is_an_error() -> None:
    model = llama()
    importances = {name: -1.0 for name, _ in model.named_parameters()}
    with pytest.raises(ValueError, match="no importance is above 0"):
        started(model, GreenTrainer(0.6, importance=importances)).step(model, batches(1)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.0}, "rho must be above 0 and at most 1, got 0.0"),
        ({"rho": 1.5}, "rho must be"),
        ({"sample": 0.0}, "sample must be above 0"),
        ({"budget": "joules"}, "budget must be one of"),
        ({"importance": "weight_change"}, "importance must be one of"),
        ({"interval": 0}, "interval must be"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GreenTrainer(**options)


def test_costs_are_of_the_candidates_alone() -> None:
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    policy = started(model, GreenTrainer(0.6))
    policy.step(model, batches(1)[0])
    graph = policy.costs["flops"]
    assert isinstance(graph, CostGraph)
    assert (
        set(graph.by_name)
        == set(policy.candidates)
        == {n for n, _ in model.named_parameters()} - {"model.embed_tokens.weight"}
    )
