"""Skill grafting: the mask and its gradient, what is grafted to the last bit, and that nothing else moves."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sparse_models import error, llama, lora, outputs, random_deltas, text
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from peftkern.integrations.fingerprint import Fingerprint
from peftkern.sparse import SkillGrafting, SparseUpdate, attach, deltas, disabled
from peftkern.sparse.skill_grafting import NAME, mask_slope, relaxed_mask, rounded_mask
from peftkern.sparse.update_file import Entries


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    now = model.state_dict()
    assert now.keys() == before.keys()
    return {name for name in before if not torch.equal(now[name], before[name])}


def fine_tuned(seed: int = 7, share: float = 0.3, **options: Any) -> Any:
    """`llama` with changes to some entries of every parameter."""
    model = llama(**options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            mask = torch.rand(parameter.shape, generator=generator) < share
            parameter += (0.05 * torch.randn(parameter.shape, generator=generator) * mask).to(parameter.dtype)
    return model


def prepared(model: nn.Module, reference: Any, **options: Any) -> SkillGrafting:
    method = SkillGrafting(reference, **{"density": 0.01, "candidates": 0.05, **options})
    method.prepare(model)
    method.start(torch.optim.SGD(method.parameters(), lr=1.0))
    return method


def scores(method: SkillGrafting) -> Tensor:
    found: Tensor = method.prepared().get_submodule(NAME).scores  # type: ignore[assignment]
    return found


def patch_of(method: SkillGrafting) -> Tensor:
    assert method._task is not None
    return method._task.patch


def result_of(method: SkillGrafting) -> SparseUpdate:
    assert method.result is not None
    return method.result


class Quadratic(nn.Module):
    """½ Σ (x w - t)², summed over rows, plus ½ (v - t)² of another parameter where asked for."""

    def __init__(self, weight: list[float], beside: float | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(len(weight), 1, bias=False)
        self.linear.weight = nn.Parameter(torch.tensor([weight]))
        self.beside = None if beside is None else nn.Parameter(torch.tensor([beside]))

    def forward(self, x: Tensor, target: Tensor) -> Any:
        loss = 0.5 * ((self.linear(x).squeeze(-1) - target) ** 2).sum()
        if self.beside is not None:
            loss = loss + 0.5 * (self.beside - target[0]).square().sum()
        return SimpleNamespace(loss=loss)


# ---- γ and its gradient


def test_far_scores_round_to_the_patch_and_to_its_complement() -> None:
    patch = torch.tensor([True, False, True, False])
    low, high = torch.full((4,), -math.inf), torch.full((4,), math.inf)
    for mask, expected in ((low, patch), (high, ~patch)):
        assert torch.equal(rounded_mask(mask, patch, 10.0), expected)
        assert torch.equal(relaxed_mask(mask, patch, 10.0), expected.float())
    assert torch.equal(rounded_mask(torch.full((4,), 10.0), patch, 10.0), patch)


def test_mask_by_hand() -> None:
    patch, at = torch.tensor([True, False]), torch.tensor([10.0, 10.0 + math.log(3)])
    assert relaxed_mask(at, patch, 10.0).tolist() == pytest.approx([0.5, 0.75])
    assert mask_slope(at, patch, 10.0).tolist() == pytest.approx([-0.25, 0.1875])
    assert float(relaxed_mask(torch.zeros(1), ~patch[:1], 10.0)) == pytest.approx(4.539787e-5)


def test_slope_is_autograds() -> None:
    torch.manual_seed(0)
    patch = torch.rand(200) < 0.5
    at = (20 * torch.rand(200, dtype=torch.float64)).requires_grad_()
    flipped = torch.sigmoid(at - 10)
    (patch * (1 - flipped) + ~patch * flipped).sum().backward()
    assert error(mask_slope(at.detach().float(), patch, 10.0), at.grad) <= 5e-6  # type: ignore[arg-type]


def test_a_step_by_hand() -> None:
    base, tuned = Quadratic([1.0, 2.0], beside=0.0), Quadratic([3.0, 2.5], beside=4.0)
    method = prepared(tuned, base, density=0.34, candidates=1.0, lr=0.5, shift=0.0)
    assert patch_of(method).tolist() == [True, False, False]  # τ is 4, 2 and 0.5; `beside` comes first
    scores(method).copy_(torch.tensor([math.log(3), 0.0, 0.0]))
    method.start(torch.optim.SGD(method.parameters(), lr=1.0))
    # γ = 1/4, 1/2, 1/2: beside 1, weight 2 and 2.25; σ' = 3/16, 1/4, 1/4
    assert tuned.beside is not None and tuned.beside.item() == pytest.approx(1.0)
    loss = method.step(tuned, {"x": torch.tensor([[1.0, 2.0]]), "target": torch.tensor([5.0])})
    # x w - t = 1.5: gradients of w 1.5 and 3, of beside 1 - 5 = -4
    assert float(loss) == pytest.approx(0.5 * 1.5**2 + 0.5 * 16)
    expected = [math.log(3) - 0.5 * (-4 * 4 * -3 / 16), -0.5 * (1.5 * 2 / 4), -0.5 * (3 * 0.5 / 4)]
    assert scores(method).tolist() == pytest.approx(expected)


def test_gradient_of_the_scores_is_autograds_through_the_mask() -> None:
    base, tuned = llama(), fine_tuned()
    before, after = state(base), state(tuned)
    method = prepared(tuned, before, candidates=0.2, lr=1.0, shift=1.0)
    assert method._task is not None
    start = scores(method).clone()
    method.step(tuned, text())
    at = start.clone().requires_grad_()
    mask = relaxed_mask(at, patch_of(method), 1.0)
    whole = {name: tensor.clone() for name, tensor in before.items()}
    pieces = mask.split([len(one.flat) for one in method._task.entries.values()])
    for (name, one), piece in zip(method._task.entries.items(), pieces, strict=True):
        change = torch.zeros(whole[name].numel()).index_put((one.flat,), piece * one.values)
        whole[name] = whole[name] + change.view(one.shape)
        expected = after[name].reshape(-1)[one.flat] - before[name].reshape(-1)[one.flat]
        assert torch.equal(one.values, expected)
    torch.func.functional_call(llama(), whole, kwargs=text()).loss.backward()
    assert error(start - scores(method), at.grad) <= 1e-4  # type: ignore[arg-type]


# ---- which entries


def test_patch_is_exactly_the_largest_also_among_equals() -> None:
    tuned = Quadratic([1.0, -1.0, 1.0, 0.5, 1.0, 0.0])
    method = prepared(tuned, Quadratic([0.0] * 6), density=0.5, candidates=1.0)
    assert method.candidates_found == 5  # one entry is as before
    assert patch_of(method).tolist() == [True, True, True, False, False]
    method.finish()
    assert result_of(method).entries["linear.weight"].flat.tolist() == [0, 1, 2]


@pytest.mark.parametrize("density", [1e-3, 0.01, 0.1])
def test_count_is_the_floor_of_the_share(density: float) -> None:
    tuned = fine_tuned()
    size = sum(p.numel() for name, p in tuned.named_parameters() if "embed" not in name and "lm_head" not in name)
    method = prepared(tuned, llama(), density=density, candidates=max(density, 0.05))
    assert int(patch_of(method).sum()) == math.floor(density * size)
    assert method.candidates_found == math.floor(max(density, 0.05) * size)


@pytest.mark.parametrize(("embeddings", "heads"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_head_are_grafted_only_where_asked_for(embeddings: bool, heads: bool, tied: bool) -> None:
    tuned = fine_tuned(tied=tied)
    method = prepared(tuned, llama(tied=tied), density=0.2, candidates=0.2, embeddings=embeddings, heads=heads)
    method.finish()
    found = (
        {"embed_tokens" in name for name in result_of(method).entries},
        {"lm_head" in name for name in result_of(method).entries},
    )
    if tied:
        assert (True in found[0], True in found[1]) == (embeddings and heads, False)
    else:
        assert (True in found[0], True in found[1]) == (embeddings, heads)


def test_dense_names_stay_as_tuned() -> None:
    base, tuned = llama(), fine_tuned()
    head, before = tuned.lm_head.weight.detach().clone(), state(base)
    method = prepared(tuned, base, dense=("lm_head.weight",), heads=True)
    method.finish()
    assert torch.equal(tuned.lm_head.weight, head)
    assert torch.equal(result_of(method).dense["lm_head.weight"], head)
    assert "lm_head.weight" not in result_of(method).entries
    assert method.applied is not None
    method.applied.revert()
    assert not changed(tuned, before)


# ---- the graft


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [True, False])
def test_all_entries_give_the_tuned_model_and_none_the_base_bit_for_bit(dtype: torch.dtype, whole: bool) -> None:
    base, tuned = llama(dtype=dtype), fine_tuned(dtype=dtype)
    expected = state(tuned if whole else base)
    logits = outputs(tuned if whole else base)
    options = {"density": 0.1, "candidates": 1.0, "embeddings": True, "heads": True}
    method = prepared(tuned, base, **options)
    scores(method).copy_(torch.where(patch_of(method) ^ whole, math.inf, -math.inf))
    method.finish()
    assert not changed(tuned, expected)
    assert torch.equal(outputs(tuned), logits)
    assert len(result_of(method)) == (method.candidates_found if whole else 0)


def test_graft_holds_tuned_numbers_where_it_acts_and_the_base_elsewhere() -> None:
    base, tuned = llama(), fine_tuned()
    before, after = state(base), state(tuned)
    method = prepared(tuned, base)
    for seed in range(3):
        method.step(tuned, text(seed=seed))
    method.finish()
    for name, tensor in tuned.state_dict().items():
        expected = before[name].clone()
        one = result_of(method).entries.get(name)
        if one is not None:
            expected.view(-1)[one.flat] = after[name].view(-1)[one.flat]
        assert torch.equal(tensor, expected), name
    assert changed(tuned, before) == set(result_of(method).entries)


def test_saved_graft_is_binary_and_makes_the_same_model_of_a_fresh_base(tmp_path: Path) -> None:
    base, tuned = llama(), fine_tuned()
    method = prepared(tuned, base)
    method.finish()
    result_of(method).save(tmp_path)
    loaded, fresh = SparseUpdate.load(tmp_path), llama()
    applied = loaded.merge_into(fresh)
    assert error(outputs(fresh), outputs(tuned)) <= 1e-6
    for name, parameter in tuned.named_parameters():
        assert error(fresh.get_parameter(name), parameter) <= 1e-7
    applied.revert()
    attached = llama()
    loaded.attach_to(attached)
    assert error(outputs(attached), outputs(tuned)) <= 1e-6
    assert loaded.metadata["from_patch"] == len(loaded) == math.floor(0.01 * loaded.metadata["of_entries"])


def test_finish_leaves_the_plain_model_and_revert_the_base() -> None:
    base, tuned = llama(), fine_tuned()
    tuned.model.norm.weight.requires_grad_(False)
    asked = {name: p.requires_grad for name, p in tuned.named_parameters()}
    classes = {name: type(module) for name, module in tuned.named_modules()}
    method = prepared(tuned, base)
    method.step(tuned, text())
    method.finish()
    assert {name: p.requires_grad for name, p in tuned.named_parameters()} == asked
    assert {name: type(module) for name, module in tuned.named_modules()} == classes
    assert not any(p._post_accumulate_grad_hooks for p in tuned.parameters())  # type: ignore[attr-defined]
    assert method.applied is not None
    method.applied.revert()
    assert not changed(tuned, state(base))


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_an_update_is_grafted_over_a_dense_or_quantized_base(base: str) -> None:
    trained = llama(base)
    for delta in attach(trained, random_deltas(trained), scaling=0.5).values():
        nn.init.normal_(delta.values, std=0.1, generator=torch.Generator().manual_seed(4))
    update = SparseUpdate.from_model(trained)
    model = llama(base)
    before, without = state(model), outputs(model)
    method = prepared(model, update, density=0.01, candidates=0.03, lr=3e3, shift=2.0)
    first = scores(method).clone()
    for seed in range(3):
        method.step(model, text(seed=seed))
    assert not torch.equal(scores(method), first)
    method.finish()
    graft = result_of(method)
    assert 0 < len(graft) < len(update)
    for name, one in graft.entries.items():
        whole = dict(zip(update.entries[name].flat.tolist(), (0.5 * update.entries[name].values).tolist(), strict=True))
        assert [whole[place] for place in one.flat.tolist()] == one.values.tolist()
    fresh = llama(base)
    graft.attach_to(fresh)
    assert torch.equal(outputs(fresh), outputs(model)) and error(outputs(model), without) > 1e-4
    assert method.applied is not None
    method.applied.revert()
    assert not changed(model, before)


# ---- learning


def test_nothing_but_scores_is_trained_whatever_the_optimizer() -> None:
    base, tuned = llama(), fine_tuned()
    before = state(base)
    method = prepared(tuned, base)
    method.start(torch.optim.SGD(method.parameters(), lr=1.0, momentum=0.9, weight_decay=0.5))
    with disabled(tuned):
        norms = {name: p.detach().clone() for name, p in tuned.named_parameters() if "norm" in name}
    first = scores(method).clone()
    for seed in range(3):
        method.step(tuned, text(seed=seed))
        assert all(parameter.grad is None for parameter in tuned.parameters())
    assert not torch.equal(scores(method), first)
    expected = relaxed_mask(scores(method), patch_of(method), 10.0)
    assert method._task is not None
    change = (expected * method._task.tau).split([len(one.flat) for one in method._task.entries.values()])
    for (name, one), values in zip(method._task.entries.items(), change, strict=True):
        layer = name.removesuffix(".weight")
        if layer in deltas(tuned, NAME):
            assert torch.equal(deltas(tuned, NAME)[layer].values, values)
            assert torch.equal(tuned.get_parameter(name), before[name])
        else:
            whole = before[name].clone().view(-1)
            whole[one.flat] += values
            assert torch.equal(tuned.get_parameter(name), whole.view(one.shape))
    assert norms.keys() == {name for name in before if "norm" in name}


def test_without_its_deltas_the_prepared_model_is_the_base() -> None:
    base, tuned = llama(), fine_tuned()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "norm" in name:
                parameter.copy_(base.get_parameter(name))
    expected = outputs(base)
    method = prepared(tuned, base)
    assert not torch.equal(outputs(tuned), expected)
    with disabled(tuned):
        assert torch.equal(outputs(tuned), expected)
    method.finish()


def test_memory_follows_the_candidates() -> None:
    tuned = fine_tuned()
    entries = sum(p.numel() for p in tuned.parameters())
    method = prepared(tuned, llama(), density=1e-3, candidates=1e-3)
    held = sum(buffer.nbytes for buffer in tuned.get_submodule(NAME).buffers())
    assert held <= 9 * method.candidates_found + 64 < entries
    trained = [p for p in method.parameters() if p.dim() > 1]
    assert trained == []


def test_gradients_are_averaged_over_updates() -> None:
    base, data = llama(), [text(seed=1), text(seed=2)]
    together = {name: torch.cat([batch[name] for batch in data]) for name in data[0]}
    one, two = fine_tuned(), fine_tuned()
    averaged = prepared(one, base, lr=1e3, shift=2.0, accumulation=2)
    whole = prepared(two, base, lr=1e3, shift=2.0)
    first = scores(averaged).clone()
    averaged.step(one, data[0])
    assert torch.equal(scores(averaged), first)
    averaged.step(one, data[1])
    whole.step(two, together)
    assert error(scores(averaged) - first, scores(whole) - first) <= 1e-4
    averaged.step(one, data[0])
    now = scores(averaged).clone()
    averaged.end_epoch()  # with what is there
    assert not torch.equal(scores(averaged), now)


@pytest.mark.parametrize(("coupling", "better_ones"), [(0.0, 0), (0.02, 10)])
@pytest.mark.parametrize("seed", range(4))
def test_finds_the_best_of_4096_subsets_of_a_convex_loss(seed: int, coupling: float, better_ones: int) -> None:
    size = 12
    generator = torch.Generator().manual_seed(seed)
    x = torch.diag(0.5 + torch.rand(size, generator=generator))
    x = x + coupling * torch.randn(size, size, generator=generator)
    best, tau = (torch.randn(size, generator=generator) for _ in range(2))
    tau += 0.3 * tau.sign()
    batch = {"x": x, "target": x @ best}

    def loss(mask: tuple[int, ...]) -> float:
        return float(Quadratic((torch.tensor(mask) * tau).tolist())(**batch).loss.detach())

    losses = {mask: loss(mask) for mask in itertools.product((0, 1), repeat=size)}
    model = Quadratic(tau.tolist())
    method = prepared(model, Quadratic([0.0] * size), density=0.25, candidates=1.0, lr=3.0, shift=3.0)
    for _ in range(600):
        method.step(model, batch)
    method.finish()
    one = result_of(method).entries["linear.weight"]
    found = tuple(int(place in one.flat.tolist()) for place in range(size))
    assert sum(other < losses[found] * (1 - 1e-6) for other in losses.values()) <= better_ones
    assert found != tuple(patch_of(method).int().tolist())


def test_the_best_epoch_is_kept() -> None:
    answers = iter([0.25, 0.75, 0.5])
    seen: list[Tensor] = []

    def metric(model: nn.Module) -> float:
        assert not torch.is_grad_enabled()
        model.eval()
        seen.append(torch.cat([d.values for d in deltas(model, NAME).values()]))
        return next(answers)

    tuned = fine_tuned()
    method = prepared(tuned, llama(), lr=1e4, shift=3.0, metric=metric)
    kept = []
    for seed in range(3):
        method.step(tuned, text(seed=seed))
        method.end_epoch()
        assert tuned.training
        kept.append(rounded_mask(scores(method), patch_of(method), 3.0))
    assert not torch.equal(kept[1], kept[2])
    method.finish()
    assert len(result_of(method)) == int(kept[1].sum())
    assert result_of(method).metadata["metric"] == 0.75
    # what was rated is the rounded graft
    assert method._task is not None
    tau = torch.cat([one.values for name, one in method._task.entries.items() if "norm" not in name])
    assert all(torch.equal(values, torch.where(values != 0, tau, 0.0)) for values in seen)


def test_same_seed_same_graft() -> None:
    grafts = []
    for seed in (1, 1, 2):
        tuned = fine_tuned()
        method = prepared(tuned, llama(), lr=1e3, shift=2.0, seed=seed)
        for number in range(2):
            method.step(tuned, text(seed=number))
        grafts.append(scores(method).clone())
    assert torch.equal(grafts[0], grafts[1]) and not torch.equal(grafts[0], grafts[2])


# ---- in the Trainer


class InOrder(Trainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def train(model: nn.Module, folder: Path, method: SkillGrafting, resume: str | None = None) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        num_train_epochs=3,
        learning_rate=0.1,
        weight_decay=0.5,
        save_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{name: tensor[0] for name, tensor in text(1, seed=seed).items()} for seed in range(4)]
    trainer = InOrder(model, arguments, train_dataset=data, callbacks=[method])  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=resume)


OPTIONS: dict[str, Any] = {"density": 0.01, "candidates": 0.05, "lr": 1e4, "shift": 3.0}


def test_trainer_does_what_the_loop_does(tmp_path: Path) -> None:
    ours, theirs, base = fine_tuned(), fine_tuned(), llama()
    method = prepared(ours, base, **OPTIONS)
    for _ in range(3):
        for seed in range(4):
            method.step(ours, text(1, seed=seed))
        method.end_epoch()
    method.finish()
    other = SkillGrafting(base, **OPTIONS)
    train(theirs, tmp_path, other)
    assert not changed(theirs, state(ours))
    assert len(result_of(method)) == len(result_of(other))
    assert result_of(method).metadata["from_patch"] < len(result_of(method))


def test_resumed_training_is_training_that_was_never_interrupted(tmp_path: Path) -> None:
    def rate(model: nn.Module) -> float:
        return -float(model(**text(seed=9)).loss)

    options = {**OPTIONS, "accumulation": 3, "metric": rate}
    whole, resumed, base = fine_tuned(), fine_tuned(), llama()
    first = SkillGrafting(base, **options)
    train(whole, tmp_path / "whole", first)
    method = SkillGrafting(base, **options)
    train(resumed, tmp_path / "whole", method, resume=str(tmp_path / "whole/checkpoint-8"))
    assert not changed(resumed, state(whole))
    assert result_of(method).metadata == result_of(first).metadata


def test_trainer_refuses_scaled_gradients() -> None:
    method = SkillGrafting(llama())
    with pytest.raises(ValueError, match="bf16=True"):
        method.on_train_begin(SimpleNamespace(fp16=True, world_size=1), SimpleNamespace(), None, None)


# ---- what it refuses


def refused(case: str) -> tuple[nn.Module, Any, dict[str, Any], str]:
    if case == "adapters":
        return lora(fine_tuned()), llama(), {}, "merge_and_unload"
    if case == "quantized":
        return llama("nf4"), llama(), {}, r"q_proj\.weight .* is quantized .* SparseUpdate"
    if case == "missing":
        return fine_tuned(), {}, {}, r"embed_tokens\.weight must be in the base as .* is missing there"
    if case == "dtype":
        return fine_tuned(), llama(dtype=torch.bfloat16), {}, "torch.bfloat16 there"
    if case == "unchanged":
        return llama(), llama(), {}, "asks for .* entries, and fine-tuning has changed 0"
    if case == "too few":
        return fine_tuned(), llama(), {"density": 1e-9}, "density=1e-09 of .* less than one"
    if case == "delta there":
        model = llama()
        update = SparseUpdate(
            {"model.layers.0.mlp.up_proj.weight": Entries(torch.Size((192, 64)), torch.arange(6000), torch.ones(6000))},
            Fingerprint.of(model),
        )
        attach(model, {"model.layers.0.mlp.up_proj": random_deltas(model)["model.layers.0.mlp.up_proj"]}, NAME)
        return model, update, {}, "has a delta called"
    model = fine_tuned()
    with torch.no_grad():
        model.model.norm.weight[3] = math.inf
    return model, llama(), {}, "not finite"


@pytest.mark.parametrize(
    "case", ["adapters", "quantized", "missing", "dtype", "unchanged", "too few", "delta there", "infinite"]
)
def test_what_it_cannot_graft_is_an_error_and_the_model_stays_as_it_was(case: str) -> None:
    model, reference, options, message = refused(case)
    before = state(model)
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        prepared(model, reference, **options)
    assert not changed(model, before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.5, "candidates": 0.1}, "density <= candidates"),
        ({"density": 0.0}, "0 < density"),
        ({"lr": math.inf}, "lr must"),
        ({"accumulation": 0}, "accumulation must"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkillGrafting({}, **options)


def test_diverging_is_an_error() -> None:
    tuned = Quadratic([1.0, 2.0])
    method = prepared(tuned, Quadratic([0.0, 0.0]), density=0.5, candidates=1.0)
    with pytest.raises(ValueError, match="gradient is not finite"):
        method.step(tuned, {"x": torch.tensor([[math.nan, 1.0]]), "target": torch.zeros(1)})


def test_a_metric_that_is_no_number_is_an_error() -> None:
    method = prepared(fine_tuned(), llama(), metric=lambda model: math.nan)
    with pytest.raises(ValueError, match="got nan"):
        method.end_epoch()


def test_one_object_makes_one_graft() -> None:
    tuned = fine_tuned()
    method = prepared(tuned, llama())
    method.finish()
    method.finish()
    with pytest.raises(RuntimeError, match="make a new object"):
        method.prepare(copy.deepcopy(tuned))
