"""Policies: when they choose, what they see, and that training goes on as if it had never been interrupted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from round_robin import RoundRobin
from select_models import batches, changed, llama, values
from torch import Tensor
from transformers import Trainer, TrainingArguments

from peftkern.optim import AdamW
from peftkern.select.history import history_from_data
from peftkern.select.resume import KEY
from peftkern.sparse import attach

WORDS = ("layers.0.mlp", "layers.1.self_attn", "layers.1.mlp", "layers.0.self_attn")


def begun(
    model: Any, policy: RoundRobin | None = None, state: dict[str, Any] | None = None
) -> tuple[RoundRobin, AdamW]:
    policy = RoundRobin(WORDS) if policy is None else policy
    policy.prepare(model)
    optimizer = AdamW(policy.parameters(), lr=0.01, weight_decay=0.1)
    if state is not None:
        optimizer.load_state_dict(state)
    policy.start(optimizer)
    return policy, optimizer


def words_trained(policy: RoundRobin) -> list[tuple[int, str]]:
    """Update and word of every selection."""
    return [(s.step, next(word for word in WORDS if word in s.names[0])) for s in policy.history]


# ---- when


def test_it_chooses_at_the_start_and_after_every_interval() -> None:
    model = llama()
    policy, _ = begun(model)
    for index, batch in enumerate(batches(7)):
        before = values(model)
        policy.step(model, batch)
        assert policy.selection is not None
        assert changed(model, before) == set(policy.selection.names), index
    assert words_trained(policy) == [(0, WORDS[0]), (2, WORDS[1]), (4, WORDS[2]), (6, WORDS[3])]
    assert [int(b["input_ids"][0, 0]) for b in policy.observed] == [
        int(batch["input_ids"][0, 0]) for batch in batches(7)[::2]
    ]


def test_without_an_interval_it_chooses_once() -> None:
    model = llama()
    policy, _ = begun(model, RoundRobin(WORDS, None))
    for batch in batches(3):
        policy.step(model, batch)
    assert words_trained(policy) == [(0, WORDS[0])]


def test_epochs_of_a_loop_of_one_s_own() -> None:
    model = llama()
    policy, _ = begun(model, RoundRobin(WORDS, 2, "epochs"))
    for epoch in range(5):
        if epoch > 0:
            policy.next_epoch()
        for batch in batches(2):
            policy.step(model, batch)
    assert words_trained(policy) == [(0, WORDS[0]), (4, WORDS[1]), (8, WORDS[2])]


def test_only_a_forward_of_training_that_begins_an_update_is_looked_at() -> None:
    model = llama()
    policy = RoundRobin(WORDS, 1)
    policy.prepare(model)
    model(**batches(1)[0])  # not started
    policy.start(AdamW(policy.parameters()))
    model.eval()
    model(**batches(1)[0])
    model.train()
    with torch.no_grad():
        model(**batches(1)[0])
    assert policy.observed == []
    policy.inside = lambda batch: model(**batch).loss  # the calls of a probe
    optimizer = policy.started()
    for batch in batches(3):  # of one update
        model(**batch).loss.backward()
    assert len(policy.observed) == 1
    optimizer.step()
    assert words_trained(policy) == [(0, WORDS[0])]


def test_what_is_measured_before_the_first_selection_is_measured_without_the_hook_on_embeddings() -> None:
    model = llama()
    model.requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    model.enable_input_require_grads()
    policy, _ = begun(model, RoundRobin(("layers.1.mlp",), 1))
    asked = []
    policy.inside = lambda batch: asked.append(model.model.embed_tokens(batch["input_ids"]).requires_grad)
    policy.step(model, batches(1)[0])
    assert asked == [False]


def test_accumulated_gradients_are_an_error_before_the_probe() -> None:
    model = llama()
    policy, optimizer = begun(model)
    model(**batches(1)[0]).loss.backward()
    policy.steps_done = 2
    with pytest.raises(RuntimeError, match="between updates"):
        model(**batches(1)[0])
    assert len(policy.observed) == 1
    optimizer.zero_grad()
    model(**batches(1)[0])
    assert len(policy.observed) == 2


def test_a_probe_that_fails_leaves_the_selection_in_force() -> None:
    model = llama()
    policy, _ = begun(model)
    policy.step(model, batches(1)[0])
    policy.steps_done = 2

    def fail(_batch: Any) -> None:
        raise KeyError("probe")

    policy.inside = fail
    before = policy.selection
    with pytest.raises(KeyError):
        policy.step(model, batches(1)[0])
    assert policy.selection is before
    policy.inside = None
    policy.step(model, batches(1)[0])
    assert policy.selection is not before


def test_batches_of_positional_arguments_have_their_names() -> None:
    model = llama()
    policy, _ = begun(model)
    model(batches(1)[0]["input_ids"], labels=batches(1)[0]["labels"])
    assert list(policy.observed[0]) == ["input_ids", "labels"]


# ---- resume


def resumed(interrupt_after: int | None, make: Callable[[], Any], unit: str) -> tuple[dict[str, Tensor], RoundRobin]:
    def again() -> RoundRobin:
        return RoundRobin(WORDS, 3 if unit == "steps" else 1, unit)

    model = make()
    policy, optimizer = begun(model, again())
    for index, batch in enumerate(batches(8)):
        if unit == "epochs" and index in (3, 6):
            policy.next_epoch()
        policy.step(model, batch)
        if index + 1 == interrupt_after:
            state, weights = optimizer.state_dict(), model.state_dict()
            model = make()
            model.load_state_dict(weights)
            policy, optimizer = begun(model, again(), state)
    return values(model), policy


def lora() -> Any:
    torch.manual_seed(2)
    settings: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    return peft.get_peft_model(llama(), peft.LoraConfig(**settings))


@pytest.mark.parametrize("unit", ["steps", "epochs"])
@pytest.mark.parametrize("make", [llama, lora])
@pytest.mark.parametrize("after", [3, 4, 5])
def test_going_on_in_a_loop_is_training_that_was_never_interrupted(make: Any, after: int, unit: str) -> None:
    expected, whole = resumed(None, make, unit)
    actual, policy = resumed(after, make, unit)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert policy.selection is not None and whole.selection is not None
    assert policy.selection.names == whole.selection.names


def trainer(folder: Path, policy: RoundRobin, model: Any, **options: Any) -> Trainer:
    rows = [{name: tensor[row] for name, tensor in batch.items()} for batch in batches(6) for row in range(2)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        seed=5,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"num_train_epochs": 2, "weight_decay": 0.1, "save_strategy": "no", **options},
    )
    return Trainer(
        model, arguments, train_dataset=rows, callbacks=[policy], optimizer_cls_and_kwargs=(AdamW, {"lr": 0.01})
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("unit", ["steps", "epochs"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_resumed_trainer_is_one_that_was_never_interrupted(unit: str, dropout: float, tmp_path: Path) -> None:
    def policy() -> RoundRobin:
        return RoundRobin(WORDS, 5 if unit == "steps" else 1, unit)

    whole, first = llama(attention_dropout=dropout), policy()
    saving = {"save_strategy": "steps", "save_steps": 4}
    trainer(tmp_path, first, whole, **saving).train()
    model, second = llama(attention_dropout=dropout), policy()
    trainer(tmp_path, second, model).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert changed(model, values(whole)) == set()
    steps = [0, 5, 10] if unit == "steps" else [0, 6]
    assert [s.step for s in first.history] == steps
    assert second.history == first.history
    assert all(p.requires_grad for p in model.parameters())


def test_the_trainer_and_the_loop_train_the_same(tmp_path: Path) -> None:
    model, looped = llama(), llama()
    options: dict[str, Any] = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "weight_decay": 0.0}
    options["train_sampling_strategy"] = "sequential"
    trainer(tmp_path, RoundRobin(WORDS), model, num_train_epochs=1, **options).train()
    policy, optimizer = begun(looped)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for batch in batches(6):
        policy.step(looped, batch)
    before = llama()
    for name, parameter in model.named_parameters():  # the Trainer divides the loss in another order
        start = before.get_parameter(name)
        assert torch.equal(parameter, start) == torch.equal(looped.get_parameter(name), start)
        assert torch.allclose(parameter, looped.get_parameter(name), atol=1e-4)


def test_the_trainer_accumulates_and_counts_updates(tmp_path: Path) -> None:
    policy = RoundRobin(WORDS, 1)
    trainer(tmp_path, policy, llama(), num_train_epochs=1, gradient_accumulation_steps=3).train()
    assert words_trained(policy) == [(0, WORDS[0]), (1, WORDS[1])]


def test_gradient_checkpointing_in_the_trainer(tmp_path: Path) -> None:
    model, plain = llama(), llama()
    trainer(tmp_path, RoundRobin(WORDS), model, gradient_checkpointing=True, num_train_epochs=1).train()
    trainer(tmp_path, RoundRobin(WORDS), plain, num_train_epochs=1).train()
    assert changed(model, values(plain)) == set()


def test_what_is_saved_is_plain(tmp_path: Path) -> None:
    model = llama()
    policy, optimizer = begun(model)
    policy.step(model, batches(1)[0])
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    state = torch.load(tmp_path / "optimizer.pt", weights_only=True)["param_groups"][0][KEY]
    assert policy.selection is not None
    assert (state["method"], state["next"]) == ("RoundRobin", 2)
    assert history_from_data(state["history"]) == [policy.selection]


# ---- sparse deltas


def test_sparse_deltas_are_selected() -> None:
    from peftkern.formats.sparse_indices import SparseIndices

    model = llama()
    weight = "model.layers.{}.mlp.up_proj"
    indices = SparseIndices.from_mask(torch.rand(48, 32, generator=torch.Generator().manual_seed(1)) < 0.1)
    model.requires_grad_(False)
    attach(model, {weight.format(layer): indices for layer in range(2)})
    policy, _ = begun(model, RoundRobin(("layers.0", "layers.1"), 1))
    for index, batch in enumerate(batches(2)):
        before = values(model)
        policy.step(model, batch)
        assert changed(model, before) == {f"{weight.format(index)}.sparse_deltas.default.values"}


# ---- from beginning to end


def test_finish_leaves_the_model_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    model.model.norm.weight.requires_grad_(False)
    asked = [p.requires_grad for p in model.parameters()]
    with caplog.at_level(logging.INFO, logger="peftkern"):
        policy, optimizer = begun(model)
        policy.step(model, batches(1)[0])
    assert "RoundRobin, update 0: trains" in caplog.text
    assert "model.norm.weight" not in policy.candidates
    policy.finish()
    assert [p.requires_grad for p in model.parameters()] == asked
    assert not model._forward_pre_hooks
    assert KEY not in optimizer.state_dict()["param_groups"][0]
    with pytest.raises(RuntimeError, match="has finished; call prepare"):
        policy.execution()
    policy, _ = begun(model, policy)
    policy.step(model, batches(1)[0])
    assert [s.step for s in policy.history] == [1]


def test_mistakes_are_named() -> None:
    for arguments in ({"interval": 0}, {"interval": 1.5}, {"unit": "days"}):
        with pytest.raises(ValueError, match=r"RoundRobin: interval"):
            RoundRobin(WORDS, **arguments)
    frozen = llama().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        RoundRobin(WORDS).prepare(frozen)
    policy, _ = begun(llama())
    with pytest.raises(ValueError, match="nonsense is none of the candidates"):
        policy.selected(["nonsense"])
