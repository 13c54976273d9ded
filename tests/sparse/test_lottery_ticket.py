"""LT-SFT: what is selected, that all the rest goes back to its bits and stays there, and what training then does."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sparse_models import batches, changed, error, llama, lora, outputs, snapshot, text, trainer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification

import peftkern
from peftkern.sparse import LotteryTicket, SparseUpdate, deltas, disabled, linear_layers
from peftkern.sparse.lottery_ticket import phases_of

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum-decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "torch-adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "torch-adamw-decay": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: peftkern.optim.AdamW(p, lr=0.01, weight_decay=0.0),
    "adamw-decay": lambda p: peftkern.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def run(
    model: nn.Module, method: LotteryTicket, steps: int, kind: str = "adamw", until: int | None = None
) -> torch.optim.Optimizer:
    method.prepare(model)
    optimizer = OPTIMIZERS[kind](method.parameters())
    method.start(optimizer, steps)
    for batch in batches(steps)[:until]:
        method.step(model, batch)
    return optimizer


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight for name, layer in linear_layers(model).items()}  # type: ignore[misc]


# ---- phases


def test_phases_by_hand() -> None:
    def numbers(*arguments: Any) -> list[tuple[int, int, bool]]:
        return [(phase.begin, phase.end, phase.full) for phase in phases_of(*arguments)]

    assert numbers(13, 1, 0.25) == [(0, 3, True), (3, 13, False)]
    assert numbers(2, 1, 0.01) == [(0, 1, True), (1, 2, False)]
    assert numbers(2, 1, 0.99) == [(0, 1, True), (1, 2, False)]
    assert numbers(9, 2, 0.5) == [(0, 2, True), (2, 4, False), (4, 6, True), (6, 9, False)]
    with pytest.raises(ValueError, match="needs 4 updates at least, got 3"):
        phases_of(3, 2, 0.5)


@pytest.mark.parametrize("kind", ["sgd-momentum-decay", "torch-adamw-decay", "adamw-decay"])
def test_the_full_phase_is_full_fine_tuning_and_the_rewind_is_bit_exact(kind: str) -> None:
    model, dense = llama(), llama()
    before = snapshot(model)
    method = LotteryTicket(density=0.02, full_share=0.5)
    optimizer = run(model, method, 8, kind, until=3)
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(name.removesuffix(".weight") in weights_of(dense))
    twin = OPTIMIZERS[kind]([p for p in dense.parameters() if p.requires_grad])
    for batch in batches(8)[:3]:
        dense(**batch).loss.backward()
        twin.step()
        twin.zero_grad()
    for name, weight in weights_of(model).items():
        assert error(weight, weights_of(dense)[name]) <= 1e-6
    assert changed(model, before) == {f"{name}.weight" for name in weights_of(model)}
    method.step(model, batches(8)[3])  # the last of the full phase
    assert not changed(model, before)
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())


def test_exactly_k_are_selected_over_all_layers_the_largest_first() -> None:
    model = llama()
    start = {name: weight.detach().clone() for name, weight in weights_of(model).items()}
    method = LotteryTicket(count=777, full_share=0.5)
    run(model, method, 4, until=1)
    at_the_end = copy.deepcopy(model)
    optimizer = OPTIMIZERS["adamw"](at_the_end.parameters())
    state = method.started().state_dict()["state"]
    assert len(state) == len(start)
    # one more full update by hand, on the copy
    for mine, theirs in zip(at_the_end.parameters(), model.parameters(), strict=True):
        if theirs in method.started().state:
            optimizer.state[mine] = copy.deepcopy(method.started().state[theirs])
    at_the_end(**batches(4)[1]).loss.backward()
    optimizer.step()
    difference = {name: (weight - start[name]).abs() for name, weight in weights_of(at_the_end).items()}
    method.step(model, batches(4)[1])
    taken = deltas(model)
    assert sum(map(len, taken.values())) == 777
    lowest = min(
        float(difference[name].detach()[delta.indices.mask()].min()) for name, delta in taken.items() if len(delta)
    )
    highest = max(float(difference[name].detach()[~delta.indices.mask()].max()) for name, delta in taken.items())
    assert lowest >= highest
    assert len({len(delta) / delta.shape.numel() for delta in taken.values()}) > 3  # global, not per layer


def test_ties_select_exactly_k() -> None:
    """The published threshold selects 3 of the differences 1, 1, 1, 0 where 2 are asked for."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    method = LotteryTicket(count=2, full_share=0.5)
    method.prepare(model)
    method.start(torch.optim.SGD(method.parameters(), lr=1.0), 4)
    method.steps_done = 2
    with torch.no_grad():
        model[0].weight += torch.tensor([[1.0, 1.0], [1.0, 0.0]])
        method._layers["0"].weight.start.copy_(model[0].weight - torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    method.after_update()
    assert deltas(model)["0"].indices.flat().tolist() == [0, 1]


# ---- the sparse phase


@pytest.mark.parametrize("kind", ["sgd", "torch-adam", "adamw"])
def test_sparse_training_is_dense_training_with_a_masked_update(kind: str) -> None:
    model = llama()
    method = LotteryTicket(density=0.03, full_share=0.1)
    run(model, method, 23, kind, until=2)
    masks = {name: delta.indices.mask() for name, delta in deltas(model).items()}
    dense = llama()
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(name.removesuffix(".weight") in masks)
    optimizer = OPTIMIZERS[kind]([p for p in dense.parameters() if p.requires_grad])
    for batch in batches(23)[2:22]:
        method.step(model, batch)
        dense(**batch).loss.backward()
        for name, weight in weights_of(dense).items():
            weight.grad *= masks[name]
        optimizer.step()
        optimizer.zero_grad()
    start = weights_of(llama())
    for name, delta in deltas(model).items():
        phi = delta.indices.to_dense(delta.values.detach())
        dense_phi = weights_of(dense)[name].detach() - start[name].detach()
        assert error(phi, dense_phi) <= 2e-5 or not len(delta), name
        assert torch.equal(dense_phi[~masks[name]], torch.zeros_like(dense_phi[~masks[name]]))
    assert error(outputs(model), outputs(dense)) <= 1e-6


@pytest.mark.parametrize("kind", ["sgd-momentum-decay", "torch-adamw-decay", "adamw-decay"])
def test_nothing_but_the_k_entries_moves_weight_decay_and_momentum_or_not(kind: str) -> None:
    """With weight decay the published code moves entries outside of its mask, by up to 0.018 in 30 steps."""
    model = llama()
    before = snapshot(model)
    method = LotteryTicket(density=0.01)
    run(model, method, 30, kind)
    method.finish()
    assert not changed(model, before)
    assert all(bool((delta.values != 0).any()) for delta in deltas(model).values() if len(delta) > 8)
    with disabled(model):
        assert torch.equal(outputs(model), outputs(llama()))


def test_weight_decay_pulls_toward_the_base() -> None:
    model = llama()
    method = LotteryTicket(count=50, full_share=0.5)
    run(model, method, 4, "adamw-decay", until=2)
    delta = next(delta for delta in deltas(model).values() if len(delta))
    with torch.no_grad():
        delta.values.fill_(5.0)
    method.step(model, batches(1)[0])
    # the update itself is 0.01 at most, the decay 5 · 0.01 · 0.1
    assert bool(((delta.values - (5 - 0.005)).abs() <= 0.0101).all())


def test_gradients_and_state_are_of_k_entries() -> None:
    model = llama()
    method = LotteryTicket(count=500)
    optimizer = run(model, method, 8, "torch-adamw-decay", until=6)
    model(**text()).loss.backward()
    held = [t for p in optimizer.state for t in optimizer.state[p].values() if t.dim()]
    assert sum(t.numel() for t in held) == 2 * 500
    assert sum(p.grad.numel() for p in model.parameters() if p.grad is not None) == 500


def test_embeddings_norms_and_head_are_frozen_in_both_phases() -> None:
    model = llama()
    before = snapshot(model)
    method = LotteryTicket(full_share=0.5)
    run(model, method, 6, until=2)
    assert changed(model, before) == {f"{name}.weight" for name in weights_of(model)}
    assert "lm_head" not in weights_of(model)


def test_a_command_line_can_pass_every_option() -> None:
    plain = {"int", "float", "str", "bool", "None", "list[str]"}  # lists: of targets, its own option
    options = inspect.signature(LotteryTicket).parameters.values()
    assert all(set(str(option.annotation).split(" | ")) <= plain for option in options)


# ---- L1


def test_l1_is_a_term_of_the_gradient_once_an_update() -> None:
    model, plain = llama(), llama()
    parameters = sum(p.numel() for p in plain.parameters())
    strength = 50.0
    method = LotteryTicket(full_share=0.5, full_l1=strength, sparse_l1=strength, count=2000)
    run(model, method, 10, "sgd", until=2)
    start = {name: weight.detach().clone() for name, weight in weights_of(plain).items()}
    optimizer = torch.optim.SGD(weights_of(plain).values(), lr=0.1)
    for batch in batches(10)[:2]:
        loss = plain(**batch).loss
        for name, weight in weights_of(plain).items():
            loss = loss + strength / parameters * (weight - start[name]).abs().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, weight in weights_of(model).items():
        assert error(weight - start[name], weights_of(plain)[name] - start[name]) <= 1e-4
    for batch in batches(10)[2:8]:
        method.step(model, batch)
    model(**text()).loss.backward()
    trained = [delta.values for delta in deltas(model).values() if len(delta)]
    expected = [values.grad + strength / parameters * values.detach().sign() for values in trained]
    method.before_update()
    for values, gradient in zip(trained, expected, strict=True):
        assert torch.equal(values.grad, gradient)  # type: ignore[arg-type]


def test_strong_l1_holds_the_full_phase_at_its_start() -> None:
    moved = []
    for strength in (0.0, 1e4):
        model = llama()
        method = LotteryTicket(full_share=0.5, full_l1=strength)
        run(model, method, 16, until=7)
        start = weights_of(llama())
        moved.append(sum(float((w - start[n]).detach().abs().sum()) for n, w in weights_of(model).items()))
    assert moved[1] < 0.9 * moved[0]


# ---- iterations


def test_every_iteration_adds_its_share_and_goes_back_to_where_it_began() -> None:
    model = llama()
    before = snapshot(model)
    method = LotteryTicket(count=101, iterations=2, full_share=0.5)
    run(model, method, 12, "adamw-decay", until=3)
    sizes, first = [], None
    for step, batch in enumerate(batches(12)[3:], start=3):
        if step == 6:
            first = {name: (d.indices.flat(), d.values.detach().clone()) for name, d in deltas(model).items()}
        method.step(model, batch)
        sizes.append(sum(map(len, deltas(model).values())))
        if step == 8:  # the end of the second full phase
            assert not changed(model, before)
            for name, (flat, values) in first.items():  # type: ignore[union-attr]
                delta = deltas(model)[name]
                places = torch.searchsorted(delta.indices.flat(), flat)
                assert torch.equal(delta.indices.flat()[places], flat)
                assert torch.equal(delta.values.detach()[places], values)
                others = torch.ones(len(delta), dtype=torch.bool).index_fill(0, places, False)
                assert bool((delta.values[others] == 0).all())
    assert sizes == [50] * 5 + [101] * 4
    method.finish()
    assert not changed(model, before)


# ---- a head

CLASSES = 3


def classifier() -> Any:
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    config.num_labels = CLASSES
    return LlamaForSequenceClassification(config).train()


def labelled(count: int) -> list[dict[str, Tensor]]:
    return [
        {"input_ids": batch["input_ids"], "labels": torch.tensor([i % CLASSES, (i + 1) % CLASSES])}
        for i, batch in enumerate(batches(count))
    ]


def test_a_head_is_trained_whole_rewound_bit_for_bit_and_kept_dense() -> None:
    model = classifier()
    before = snapshot(model)
    method = LotteryTicket(density=0.05, full_share=0.5, dense="score")
    method.prepare(model)
    method.start(OPTIMIZERS["adamw-decay"](method.parameters()), 8)
    for batch in labelled(8)[:3]:
        method.step(model, batch)
    assert "score.weight" in changed(model, before)
    method.step(model, labelled(8)[3])
    assert not changed(model, before)
    for batch in labelled(8)[4:]:
        method.step(model, batch)
    method.finish()
    assert changed(model, before) == {"score.weight"}
    update = method.update()
    assert list(update.dense) == ["score.weight"]
    fresh = classifier()
    update.attach_to(fresh)
    batch = labelled(1)[0]
    assert torch.equal(fresh.eval()(**batch).logits, model.eval()(**batch).logits)


# ---- the result


def test_merged_is_the_attached_forward_and_revert_gives_the_bits_back(tmp_path: Path) -> None:
    model = llama()
    method = LotteryTicket(density=0.02)
    run(model, method, 12)
    method.finish()
    method.update().save(tmp_path / "update")
    update = SparseUpdate.load(tmp_path / "update")
    assert len(update) == sum(map(len, deltas(model).values()))
    assert update.method == "lt-sft"
    base = llama()
    before = snapshot(base)
    applied = update.merge_into(base)
    assert error(outputs(base), outputs(model)) <= 1e-6
    applied.revert()
    assert not changed(base, before)
    assert base.state_dict().keys() == before.keys()


def test_composition_commutes_and_overlapping_entries_add() -> None:
    updates = []
    for seed in (0, 50):
        model = llama()
        method = LotteryTicket(density=0.05)
        method.prepare(model)
        method.start(OPTIMIZERS["adamw"](method.parameters()), 6)
        for step in range(6):
            method.step(model, text(seed=seed + step))
        method.finish()
        updates.append(method.update())
    first, second = updates
    one, other = llama(), llama()
    (first + second).merge_into(one)
    (second + first).merge_into(other)
    assert torch.equal(outputs(one), outputs(other))
    names = first.entries.keys() & second.entries.keys()
    overlap = [set(first.entries[n].flat.tolist()) & set(second.entries[n].flat.tolist()) for n in names]
    assert sum(map(len, overlap)) > 10
    both = llama()
    first.attach_to(both, "a")
    second.attach_to(both, "b")
    assert error(outputs(both), outputs(one)) <= 1e-6


def test_a_task_is_trained_on_top_of_one_language_and_moved_to_another() -> None:
    languages = []
    for seed in (0, 50):
        model = llama()
        method = LotteryTicket(density=0.03)
        method.prepare(model)
        method.start(OPTIMIZERS["adamw"](method.parameters()), 6)
        for step in range(6):
            method.step(model, text(seed=seed + step))
        method.finish()
        languages.append(method.update())
    source, target = languages
    model = llama()
    source.attach_to(model, "language")
    before, spoken = snapshot(model), outputs(model)
    method = LotteryTicket(density=0.02, name="task")
    run(model, method, 8, "adamw-decay")
    method.finish()
    assert not changed(model, before)
    task = method.update()
    assert error(outputs(model), spoken) > 1e-3
    with_task = llama()
    task.attach_to(with_task, "task")
    source.attach_to(with_task, "language")
    assert error(outputs(with_task), outputs(model)) <= 1e-6
    moved, merged = llama(), llama()
    target.attach_to(moved, "language")
    task.attach_to(moved, "task")
    (target + task).merge_into(merged)
    assert error(outputs(moved), outputs(merged)) <= 1e-6
    assert error(outputs(moved), outputs(model)) > 1e-3


def test_the_same_run_twice_gives_the_same_bits() -> None:
    runs = []
    for _ in range(2):
        model = llama()
        run(model, LotteryTicket(density=0.02), 6)
        runs.append(snapshot(model))
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_run_that_stops_in_the_full_phase_keeps_its_largest_differences(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    before = snapshot(model)
    method = LotteryTicket(count=300, full_share=0.5)
    run(model, method, 8, until=3)
    difference = {name: weight - before[f"{name}.weight"] for name, weight in weights_of(model).items()}
    method.finish()
    assert "stopped in the full phase" in caplog.text
    assert not changed(model, before)
    assert sum(map(len, deltas(model).values())) == 300
    for name, delta in deltas(model).items():
        assert torch.equal(delta.values, delta.indices.gather(difference[name]))


def test_bfloat16_weights_keep_float32_values() -> None:
    model = llama(dtype=torch.bfloat16)
    before = snapshot(model)
    method = LotteryTicket(density=0.02)
    run(model, method, 6, "adamw-decay")
    method.finish()
    assert not changed(model, before)
    assert all(delta.values.dtype == torch.float32 for delta in deltas(model).values())


def test_a_patched_model_trains_alike() -> None:
    plain, patched = llama(), llama()
    peftkern.patch(patched)
    for model in (plain, patched):
        method = LotteryTicket(density=0.05, full_share=0.5)
        run(model, method, 6, "sgd", until=5)
        if model is patched:
            peftkern.patch(model)
        method.step(model, batches(6)[5])
    for name, delta in deltas(plain).items():
        assert torch.equal(deltas(patched)[name].indices.flat(), delta.indices.flat())
        if len(delta):
            assert error(deltas(patched)[name].values, delta.values) <= 1e-4


# ---- errors


def test_a_quantized_base_is_an_error_that_names_what_to_use() -> None:
    model = llama("nf4")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"is quantized .*use SpIEL or RoSA"):
        LotteryTicket().prepare(model)
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense": "nothing"}, "dense names 'nothing'"),
        ({"targets": "nothing"}, "no linear layer matches"),
        ({"count": 10**9}, "count must be from 1 to"),
    ],
)
def test_what_cannot_be_prepared_leaves_the_model_as_it_was(options: dict[str, Any], message: str) -> None:
    model = llama()
    asked = [p.requires_grad for p in model.parameters()]
    keys = model.state_dict().keys()
    method = LotteryTicket(**options)
    with pytest.raises(ValueError, match=message):
        method.prepare(model)
    assert method.model is None
    assert [p.requires_grad for p in model.parameters()] == asked
    assert model.state_dict().keys() == keys


def test_adapters_and_shared_weights_are_errors() -> None:
    with pytest.raises(ValueError, match="carries PEFT adapters"):
        LotteryTicket().prepare(lora(llama()))
    with pytest.raises(ValueError, match="shares its weight"):
        LotteryTicket(targets=".*").prepare(llama(tied=True))


@pytest.mark.parametrize(
    "options",
    [{"density": 0.0}, {"iterations": 0}, {"full_share": 1.0}, {"full_l1": -1.0}, {"sparse_l1": float("nan")}],
)
def test_numbers_out_of_range_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"LotteryTicket: {next(iter(options))} must be"):
        LotteryTicket(**options)


def test_the_number_of_updates_must_be_known() -> None:
    method = LotteryTicket()
    method.prepare(llama())
    with pytest.raises(ValueError, match="needs the number of updates"):
        method.start(torch.optim.SGD(method.parameters(), lr=0.1))


# ---- in the Trainer

ADAMW = (peftkern.optim.AdamW, {"lr": 0.01})


def test_the_trainer_does_what_the_loop_does(tmp_path: Path) -> None:
    loop, trained = llama(), llama()
    method = LotteryTicket(density=0.02, full_share=0.5, full_l1=1.0)
    method.prepare(loop)
    method.start(torch.optim.AdamW(method.parameters(), lr=0.01, weight_decay=0.1), 6)
    for batch in batches(6):
        method.step(loop, batch)
    method.finish()
    own = LotteryTicket(density=0.02, full_share=0.5, full_l1=1.0)
    trainer(trained, tmp_path, own, 6, (torch.optim.AdamW, {"lr": 0.01}), weight_decay=0.1).train()
    assert not changed(trained, snapshot(loop))
    assert trained.state_dict().keys() == loop.state_dict().keys()


@pytest.mark.parametrize("checkpoint", [2, 3, 5, 6, 8])
def test_resumed_training_is_training_that_was_never_interrupted(checkpoint: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "weight_decay": 0.1,
        "save_strategy": "steps",
        "save_steps": 1,
        "lr_scheduler_type": "linear",
    }
    whole, resumed = llama(), llama()
    make = functools.partial(LotteryTicket, density=0.02, iterations=2, full_share=0.5)
    trainer(whole, tmp_path, make(), 10, ADAMW, **options).train()
    again = trainer(resumed, tmp_path, make(), 10, ADAMW, **options)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
    assert not changed(resumed, snapshot(whole))


def test_a_loop_goes_on_from_saved_state(tmp_path: Path) -> None:
    whole, first, second = llama(), llama(), llama()
    run(whole, LotteryTicket(density=0.02), 8)
    optimizer = run(first, LotteryTicket(density=0.02), 8, until=5)
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    method = LotteryTicket(density=0.02)
    method.prepare(second)
    second.load_state_dict(state["model"])
    optimizer = OPTIMIZERS["adamw"](method.parameters())
    optimizer.load_state_dict(state["optimizer"])
    method.start(optimizer, 8)
    assert method.steps_done == 5
    for batch in batches(8)[5:]:
        method.step(second, batch)
    assert not changed(second, snapshot(whole))


def test_a_checkpoint_of_another_number_of_updates_is_an_error() -> None:
    optimizer = run(llama(), LotteryTicket(), 8, until=5)
    method = LotteryTicket()
    method.prepare(llama())
    other = OPTIMIZERS["adamw"](method.parameters())
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"a run of 8 updates.*go on with 8"):
        method.start(other, 9)


def test_a_checkpoint_loaded_before_it_is_prepared_is_an_error() -> None:
    """The weights of the full phase would pass for those to go back to."""
    model = llama()
    optimizer = run(model, LotteryTicket(full_share=0.5), 8, until=2)
    late = llama()
    late.load_state_dict(model.state_dict(), strict=False)
    method = LotteryTicket(full_share=0.5)
    method.prepare(late)
    other = OPTIMIZERS["adamw"](method.parameters())
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="prepare the base model, and load the checkpoint's weights into it"):
        method.start(other, 8)


def test_the_schedule_runs_once_in_every_phase() -> None:
    model = llama()
    method = LotteryTicket(full_share=0.5)
    method.prepare(model)
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 8)
    method.start(optimizer, 8)
    method.repeat_schedule(scheduler)
    rates = []
    for batch in batches(8):
        rates.append(optimizer.param_groups[0]["lr"])
        method.step(model, batch)
        scheduler.step()
    assert rates == [1, 0.75, 0.5, 0.25] * 2
    assert optimizer.param_groups[0]["lr"] == 0
