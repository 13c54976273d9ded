"""SpIEL: what is dropped and grown, that everything moves with its entry, and that the rest stays as it is."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from sparse_models import batches, changed, error, llama, lora, outputs, snapshot, text, trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern.formats.sparse_indices import SparseIndices
from peftkern.optim import AdamW, AdamW8bit
from peftkern.sparse import SparseUpdate, SpIEL, deltas, disabled, linear_layers
from peftkern.sparse.layers import base_layer
from peftkern.sparse.spiel import Accumulators, drop_and_grow, drop_and_grow_outer

BASES = ["dense", "nf4"]
SHORT: dict[str, Any] = {"density": 0.02, "period": 4, "window": 2}


def begin(model: nn.Module, method: SpIEL, steps: int = 12, kind: type[AdamW] = AdamW, **options: Any) -> AdamW:
    method.prepare(model)
    optimizer = kind(method.parameters(), **{"lr": 0.01, "weight_decay": 0.1, **options})
    method.start(optimizer, steps)
    return optimizer


def run(model: nn.Module, method: SpIEL, steps: int = 12, until: int | None = None, **options: Any) -> AdamW:
    optimizer = begin(model, method, steps, **options)
    for batch in batches(steps)[:until]:
        method.step(model, batch)
    return optimizer


def entries_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: delta.indices.flat() for name, delta in deltas(model).items()}


# ---- drop and grow, by hand

FLAT = torch.tensor([2, 5, 7, 11])
VALUES = torch.tensor([0.5, -0.1, 0.2, -3.0])


def grown(share: float, candidates: list[int], scores: list[float]) -> tuple[list[int], list[int]]:
    change = drop_and_grow(FLAT, VALUES, share, torch.tensor(candidates), torch.tensor(scores))
    return change.flat.tolist(), change.source.tolist()


def test_the_smallest_values_make_room_for_the_largest_gradients() -> None:
    # half of 4: -0.1 at 5 and 0.2 at 7 go; of the candidates -9 at 3 and 4 at 8 come
    assert grown(0.5, [1, 3, 8, 9], [1.0, -9.0, 4.0, 2.0]) == ([2, 3, 8, 11], [0, -1, -1, 3])


def test_the_share_is_rounded_down() -> None:
    assert grown(0.49, [1, 3], [1.0, 2.0]) == ([2, 3, 7, 11], [0, -1, 2, 3])
    assert grown(0.24, [1, 3], [1.0, 2.0]) == ([2, 5, 7, 11], [0, 1, 2, 3])


def test_an_entry_that_is_dropped_and_grown_is_left_alone() -> None:
    # 5 and 7 go, 5 and 9 come: 5 stays where it was
    assert grown(0.5, [5, 9], [3.0, 2.0]) == ([2, 5, 9, 11], [0, 1, -1, 3])


def test_what_is_kept_is_no_candidate() -> None:
    assert grown(0.5, [2, 4, 6, 11], [9.0, 1.0, 2.0, 8.0]) == ([2, 4, 6, 11], [0, -1, -1, 3])


def test_a_share_of_one_keeps_only_what_is_grown_again() -> None:
    assert grown(1.0, [0, 1, 5, 12], [1.0, 1.0, 1.0, 1.0]) == ([0, 1, 5, 12], [-1, -1, 1, -1])


def test_ties_keep_and_grow_the_lower_index() -> None:
    values = torch.tensor([1.0, -1.0, 1.0])
    change = drop_and_grow(torch.tensor([3, 4, 5]), values, 0.7, torch.tensor([0, 1, 8]), torch.ones(3))
    assert change.flat.tolist() == [0, 1, 3]


def test_fewer_candidates_than_are_dropped_drop_fewer() -> None:
    assert grown(1.0, [1], [1.0]) == ([1, 2, 7, 11], [-1, 0, 2, 3])
    assert grown(1.0, [], []) == ([2, 5, 7, 11], [0, 1, 2, 3])


def test_growth_by_the_product_of_row_and_column() -> None:
    # r c = [[2, 6], [1, 3], [0, 0]]; 0 is there and passed over, so 1 (6) and 3 (3) come
    rows, columns = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 3.0])
    change = drop_and_grow_outer(torch.tensor([0, 5]), torch.tensor([9.0, 8.0]), 0.5, rows, columns)
    assert (change.flat.tolist(), change.source.tolist()) == ([0, 1], [0, -1])
    change = drop_and_grow_outer(torch.tensor([0, 5]), torch.tensor([9.0, 8.0]), 1.0, rows, columns)
    assert (change.flat.tolist(), change.source.tolist()) == ([1, 3], [-1, -1])


@pytest.mark.parametrize(("decay", "expected"), [(0.0, ([9.0, 4.0], [9.0, 5.0])), (0.5, ([4.5, 2.0], [4.5, 2.25]))])
def test_accumulators_by_hand(decay: float, expected: tuple[list[float], list[float]]) -> None:
    """Entries (0, 0), (0, 1), (1, 0) of a matrix [3, 2]; the last row has none."""
    sums = Accumulators(torch.zeros(3), torch.zeros(2))
    indices = SparseIndices.from_flat(torch.tensor([0, 1, 2]), (3, 2))
    sums.add(torch.tensor([3.0, 1.0, 2.0]), indices, decay)
    first = 1 - decay
    assert sums.rows.tolist() == [9 * first, 4 * first, 0]
    assert sums.columns.tolist() == [9 * first, 1 * first]
    sums.add(torch.tensor([0.0, 2.0, 0.0]), indices, decay)
    # min(r, c) is 9, 1 and 4 (times 1 - β); then β of it and 1 - β of the square, or their sum
    assert [sums.rows.tolist()[:2], sums.columns.tolist()] == [
        pytest.approx([max(9, 5), 4] if decay == 0 else [2.25, 1.0]),
        pytest.approx([9, 5] if decay == 0 else [2.25, 2.25]),
    ]


# ---- in a model


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", ["gradient", "momentum"])
def test_the_number_of_entries_is_constant_none_is_there_twice_and_they_move(variant: str, base: str) -> None:
    model = llama(base)
    method = SpIEL(variant=variant, **SHORT)
    begin(model, method)
    sizes = {name: len(flat) for name, flat in entries_of(model).items()}
    all_ = sum(math.prod(delta.shape) for delta in deltas(model).values())
    assert sum(sizes.values()) == round(0.02 * all_)
    replaced = []
    for step, batch in enumerate(batches(12), start=1):
        before = entries_of(model)
        method.step(model, batch)
        after = entries_of(model)
        assert {name: len(flat) for name, flat in after.items()} == sizes
        assert all(bool((flat.diff() > 0).all()) for flat in after.values())
        moved = any(not torch.equal(before[name], after[name]) for name in before)
        assert moved == (step in (2, 6, 10))
        replaced += [method.replaced] if moved else []
    assert replaced[0] > 0.9 * sum(sizes.values())
    shares = [0.2 * (1 - step / 12) for step in (6, 10)]
    limits = [sum(math.floor(share * size) for size in sizes.values()) for share in shares]
    assert all(0 < got <= limit for got, limit in zip(replaced[1:], limits, strict=True))
    if variant == "momentum":
        assert replaced[1:] == limits


def test_shares_over_the_run() -> None:
    linear, cosine = SpIEL(window=5, rate=0.2), SpIEL(window=5, rate=0.2, schedule="cosine")
    linear.steps = cosine.steps = 100
    assert linear.share_at(5) == cosine.share_at(5) == 1.0
    assert [linear.share_at(step) for step in (25, 75)] == pytest.approx([0.15, 0.05])
    assert [cosine.share_at(step) for step in (25, 50)] == pytest.approx([0.1 * (1 + math.sqrt(0.5)), 0.1])


@pytest.mark.parametrize("base", BASES)
def test_the_dense_gradient_decides_what_is_grown(base: str) -> None:
    """With a window of one update: the K largest |dW| of that batch, over all of the matrix."""
    model = llama(base)
    method = SpIEL(density=0.02, period=4, window=1)
    begin(model, method)
    twin = dense_twin(model)
    twin(**batches(1)[0]).loss.backward()
    method.step(model, batches(1)[0])
    for name, flat in entries_of(model).items():
        gradient = base_layer(linear_layers(twin)[name]).weight.grad.abs().reshape(-1)  # type: ignore[union-attr, operator]
        lowest, rest = gradient[flat].min(), gradient.index_fill(0, flat, 0.0).max()
        assert float(lowest) >= float(rest) * (1 - 1e-5), name


def dense_twin(model: nn.Module) -> nn.Module:
    """A model with dense weights, all of which are trained, that computes what ``model`` does."""
    twin = llama()
    for name, layer in linear_layers(model).items():
        weight = peftkern.ops.dequantize(layer.quantized) if hasattr(layer, "quantized") else layer.weight  # type: ignore[operator]
        delta = deltas(model)[name]
        with torch.no_grad():
            own = twin.get_parameter(f"{name}.weight")
            own.copy_(weight + delta.indices.to_dense(delta.values))  # type: ignore[operator]
    return twin


@pytest.mark.parametrize("kind", [AdamW, AdamW8bit])
def test_the_state_of_the_optimizer_moves_with_its_entry(kind: type[AdamW]) -> None:
    """Newcomers: their moments, after the next bias correction, are the plain means of their gradients."""
    model = llama()
    method = SpIEL(density=0.02, period=4, window=2, rate=1.0)
    optimizer = begin(model, method, 100, kind)
    for batch in batches(5):
        method.step(model, batch)
    name = "model.layers.0.mlp.up_proj"
    delta = deltas(model)[name]
    twin_gradients = []
    for batch in batches(6)[4:]:
        if len(twin_gradients) == 1:
            before = {k: (v.clone() if isinstance(v, Tensor) else v) for k, v in optimizer.state[delta.values].items()}
            flat, values = delta.indices.flat(), delta.values.detach().clone()
            method_gradient = dense_gradient(model, name, batch)
            model(**batch).loss.backward()
            break
        twin_gradients.append(dense_gradient(model, name, batch))
    # the update that ends the window
    own_gradient = delta.values.grad.detach().clone()  # type: ignore[union-attr]
    assert error(own_gradient, method_gradient.reshape(-1)[flat]) <= 1e-5
    method.before_update()
    candidates = method._candidates[name]
    mean = (candidates.total / candidates.updates)[:, None]
    optimizer.step()
    after_step = {k: (v.clone() if isinstance(v, Tensor) else v) for k, v in optimizer.state[delta.values].items()}
    trained = delta.values.detach().clone()
    method._updated()
    new = deltas(model)[name].indices.flat()
    state = optimizer.state[delta.values]
    stayed = torch.isin(new, flat)
    old_places = torch.searchsorted(flat, new[stayed])
    assert 0 < int(stayed.sum()) < len(new)
    assert torch.equal(delta.values[stayed], trained[old_places])
    assert bool((delta.values[~stayed] == 0).all())
    assert bool((state["age"][~stayed] == 2).all())
    if "exp_avg" not in state:
        assert kind is AdamW8bit
        return
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[key][stayed], after_step[key][old_places])
    assert int(after_step["age"].max()) <= 6
    corrected = state["exp_avg"][~stayed] / (1 - 0.9**2)
    places = torch.searchsorted(candidates.indices.flat(), new[~stayed])
    assert error(corrected, mean[places, 0]) <= 1e-6
    squares = candidates.total_square[places] / 2
    assert error(state["exp_avg_sq"][~stayed] / (1 - 0.999**2), squares) <= 1e-6
    assert before["step"] == 5
    assert values.shape == trained.shape


def dense_gradient(model: nn.Module, name: str, batch: dict[str, Tensor]) -> Tensor:
    twin = dense_twin(copy.deepcopy(model))
    twin(**batch).loss.backward()
    gradient = twin.get_parameter(f"{name}.weight").grad
    assert gradient is not None
    return gradient


def test_candidates_hold_the_sums_of_dense_gradients() -> None:
    model = llama()
    method = SpIEL(density=0.02, period=8, window=3)
    optimizer = begin(model, method, 20)
    name, seen = "model.layers.1.self_attn.q_proj", []
    for batch in batches(2):
        seen.append(dense_gradient(model, name, batch).reshape(-1))
        method.step(model, batch)
    one = method._candidates[name]
    flat = one.indices.flat()
    assert set(flat.tolist()) == set(seen[0].abs().topk(len(flat)).indices.tolist())
    assert error(one.total, seen[0][flat] + seen[1][flat]) <= 1e-5
    assert error(one.total_square, seen[0][flat] ** 2 + seen[1][flat] ** 2) <= 1e-5
    assert one.updates == 2
    assert len(optimizer.state) == len(deltas(model))


def test_the_age_of_bfloat16_values_advances() -> None:
    """In the published code it stays 1 where moments are not float32."""
    model = llama(dtype=torch.bfloat16)
    method = SpIEL(**SHORT)
    optimizer = begin(model, method)
    for delta in method.deltas.values():
        delta.values.data = delta.values.data.to(torch.bfloat16)
    for step, batch in enumerate(batches(6), start=1):
        method.step(model, batch)
        if step == 3:
            ages = {int(age) for delta in method.deltas.values() for age in optimizer.state[delta.values]["age"]}
            assert ages == {3}  # newcomers: 2 of the window, and one update
    assert all(delta.values.dtype == torch.bfloat16 for delta in method.deltas.values())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", ["gradient", "momentum"])
def test_the_base_keeps_its_bits_weight_decay_and_momentum_or_not(variant: str, base: str) -> None:
    model = llama(base)
    before, plain = snapshot(model), outputs(model)
    method = SpIEL(variant=variant, **SHORT)
    run(model, method)
    method.finish()
    assert not changed(model, before)
    assert not torch.equal(outputs(model), plain)
    with disabled(model):
        assert torch.equal(outputs(model), plain)
    assert not any(layer._forward_hooks for layer in linear_layers(model).values())


@pytest.mark.parametrize("base", BASES)
def test_forward_and_gradients_are_those_of_a_dense_model(base: str) -> None:
    model = llama(base)
    method = SpIEL(**SHORT)
    run(model, method, until=3)
    twin = dense_twin(model)
    assert error(outputs(model), outputs(twin)) <= 1e-6
    model(**text()).loss.backward()
    twin(**text()).loss.backward()
    for name, delta in deltas(model).items():
        gradient = twin.get_parameter(f"{name}.weight").grad
        assert gradient is not None and delta.values.grad is not None
        assert error(delta.values.grad, delta.indices.gather(gradient)) <= 2e-6, name


@pytest.mark.parametrize("base", BASES)
def test_bfloat16_gradients_are_those_of_a_float32_model(base: str) -> None:
    model = llama(base, dtype=torch.bfloat16)
    method = SpIEL(**SHORT)
    run(model, method, until=3)
    twin = dense_twin(model)
    model(**text()).loss.backward()
    twin(**text()).loss.backward()
    gradients = torch.cat([delta.values.grad for delta in deltas(model).values() if delta.values.grad is not None])
    exact = [delta.indices.gather(twin.get_parameter(f"{n}.weight").grad) for n, delta in deltas(model).items()]  # type: ignore[arg-type]
    assert error(gradients, torch.cat(exact)) <= 2e-2


def test_gradients_and_state_are_of_k_entries() -> None:
    model = llama()
    method = SpIEL(count=1000, period=4, window=2)
    optimizer = run(model, method, until=3)
    model(**text()).loss.backward()
    assert sum(p.grad.numel() for p in model.parameters() if p.grad is not None) == 1000
    held = [t for p in optimizer.state for t in optimizer.state[p].values() if isinstance(t, Tensor)]
    assert sum(t.numel() for t in held) == 3 * 1000  # two moments and an age


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


class OneLayer(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.up = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor) -> Any:
        return types.SimpleNamespace(loss=self.up(x).square().mean())


@pytest.mark.parametrize("variant", ["gradient", "momentum"])
def test_no_step_makes_a_tensor_of_an_eighth_of_the_dense_gradient(variant: str) -> None:
    """The published code forms it in every step; here the steps of a window do without as well."""
    size = 4096
    model = OneLayer(size)
    peftkern.quantize_(model, peftkern.QuantConfig("nf4", skip_modules=[]))
    method = SpIEL(density=0.001, period=4, window=2, variant=variant, targets="up")
    method.prepare(model)
    method.start(AdamW(method.parameters()), 100)
    x = torch.randn(8, size)
    with Largest() as largest:
        for _ in range(3):
            method.step(model, {"x": x})
    assert method.replaced > 0.5 * len(deltas(model)["up"])
    assert 8 * size <= largest.elements < size * size / 8


def test_the_same_seed_gives_the_same_bits_and_another_one_other_places() -> None:
    states = []
    for seed in (0, 0, 1):
        model = llama()
        run(model, SpIEL(seed=seed, **SHORT), until=7)
        states.append((snapshot(model), entries_of(model)))
    first, second, other = (state for state, _ in states)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    places = []
    for seed in (0, 1):
        model = llama()
        SpIEL(seed=seed).prepare(model)
        places.append(entries_of(model))
    assert not any(torch.equal(places[0][name], places[1][name]) for name in places[0])


def test_merged_is_the_attached_forward(tmp_path: Path) -> None:
    model = llama()
    method = SpIEL(**SHORT)
    run(model, method)
    method.finish()
    method.update().save(tmp_path)
    update = SparseUpdate.load(tmp_path)
    assert update.method == "spiel"
    base = llama()
    before = snapshot(base)
    applied = update.merge_into(base)
    assert error(outputs(base), outputs(model)) <= 1e-6
    applied.revert()
    assert not changed(base, before)


@pytest.mark.parametrize("base", BASES)
def test_a_patched_model_trains_alike(base: str) -> None:
    plain, patched = llama(base), llama(base)
    for model in (plain, patched):
        method = SpIEL(**SHORT)
        method.prepare(model)
        if model is patched:
            assert "sparse" in str(peftkern.patch(model))
        optimizer = AdamW(method.parameters(), lr=0.01)
        method.start(optimizer, 12)
        for batch in batches(5):
            method.step(model, batch)
    same = [
        bool(torch.isin(entries_of(patched)[n], flat).float().mean() > 0.98) for n, flat in entries_of(plain).items()
    ]
    assert all(same)
    assert error(outputs(patched), outputs(plain)) <= 1e-3


def test_beneath_adapters_they_stay_as_they_are() -> None:
    model = lora(llama("nf4"))
    before = snapshot(model)
    method = SpIEL(**SHORT)
    run(model, method, until=7)
    assert not changed(model, before)
    assert method.replaced > 0
    method.finish()
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


def test_an_update_of_several_batches_is_one_gradient() -> None:
    """Accumulated halves of a batch give the sums of the whole one; the first half has chosen the candidates."""
    model = llama()
    method = SpIEL(density=0.02, period=8, window=2)
    optimizer = begin(model, method, 20)
    whole = text(rows=4)
    name = "model.layers.0.mlp.down_proj"
    gradient = dense_gradient(model, name, whole).reshape(-1)
    for half in (slice(0, 2), slice(2, 4)):
        (model(**{key: tensor[half] for key, tensor in whole.items()}).loss / 2).backward()
    method.before_update()
    optimizer.step()
    one = method._candidates[name]
    assert one.updates == 1
    assert error(one.total, gradient[one.indices.flat()]) <= 1e-5


@pytest.mark.parametrize("base", BASES)
def test_activation_checkpointing_changes_nothing(base: str) -> None:
    states = []
    for checkpointing in (False, True):
        model = llama(base)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        run(model, SpIEL(**SHORT), until=5)
        states.append(snapshot(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_weights_that_bitsandbytes_has_quantized_stay_as_they_are() -> None:
    model = llama("bnb-nf4")
    before, plain = snapshot(model), outputs(model)
    method = SpIEL(**SHORT)
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
        {"variant": "other"},
        {"schedule": "other"},
        {"window": 0},
        {"window": 21},
        {"rate": 1.5},
        {"decay": 1.0},
    ],
)
def test_options_out_of_range_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"SpIEL: {next(iter(options))} must be"):
        SpIEL(**options)


def test_a_command_line_can_pass_every_option() -> None:
    plain = {"int", "float", "str", "bool", "None", "list[str]"}  # lists: of targets, its own option
    options = inspect.signature(SpIEL).parameters.values()
    assert all(set(str(option.annotation).split(" | ")) <= plain for option in options)


def test_an_optimizer_whose_state_cannot_move_is_an_error() -> None:
    method = SpIEL()
    method.prepare(llama())
    with pytest.raises(TypeError, match=r"needs peftkern.optim.AdamW .*optimizer_cls_and_kwargs"):
        method.start(torch.optim.AdamW(method.parameters()), 10)
    with pytest.raises(ValueError, match="needs the number of updates"):
        method.start(AdamW(method.parameters()))


def test_scaled_gradients_are_an_error() -> None:
    method = SpIEL()
    method.prepare(llama())
    arguments = types.SimpleNamespace(fp16=True)
    with pytest.raises(ValueError, match="fp16=True scales the loss"):
        method.on_train_begin(arguments, None, None, AdamW(method.parameters()))


def test_what_cannot_be_prepared_leaves_the_model_as_it_was() -> None:
    model = llama()
    keys, asked = model.state_dict().keys(), [p.requires_grad for p in model.parameters()]
    for options in ({"targets": "nothing"}, {"count": 10**9}):
        method = SpIEL(**options)  # type: ignore[arg-type]
        with pytest.raises(ValueError):
            method.prepare(model)
        assert method.model is None
    assert model.state_dict().keys() == keys
    assert [p.requires_grad for p in model.parameters()] == asked


# ---- in the Trainer

ADAMW = (AdamW, {"lr": 0.01})


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", ["gradient", "momentum"])
def test_the_trainer_does_what_the_loop_does(variant: str, base: str, tmp_path: Path) -> None:
    loop, trained = llama(base), llama(base)
    method = SpIEL(variant=variant, **SHORT)
    run(loop, method, 7)
    method.finish()
    own = SpIEL(variant=variant, **SHORT)
    own.prepare(trained)  # before the Trainer is made, which refuses quantized models without anything to train
    trainer(trained, tmp_path, own, 7, ADAMW, weight_decay=0.1).train()
    assert not changed(trained, snapshot(loop))
    assert trained.state_dict().keys() == loop.state_dict().keys()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", ["gradient", "momentum"])
def test_resumed_training_is_training_that_was_never_interrupted(variant: str, base: str, tmp_path: Path) -> None:
    """Checkpoints in the middle of the first and of a later window, and between windows."""
    options: dict[str, Any] = {"weight_decay": 0.1, "save_strategy": "steps", "save_steps": 1}
    make = functools.partial(SpIEL, density=0.02, variant=variant, period=4, window=2, decay=0.5)
    whole = llama(base)
    method = make()
    method.prepare(whole)
    trainer(whole, tmp_path, method, 8, ADAMW, **options).train()
    for checkpoint in (1, 3, 5):
        resumed = llama(base)
        method = make()
        method.prepare(resumed)
        again = trainer(resumed, tmp_path, method, 8, ADAMW, weight_decay=0.1)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
        assert not changed(resumed, snapshot(whole)), checkpoint
