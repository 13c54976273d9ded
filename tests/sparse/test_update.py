"""SparseUpdate: what training has changed, saved, loaded, added up, attached, merged and taken out to the last bit."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_models import error, llama, lora, outputs, random_deltas, text
from torch import Tensor, nn

from peftkern.formats import SparseIndices
from peftkern.integrations.fingerprint import Fingerprint, WrongBaseError
from peftkern.patch import patch
from peftkern.sparse import SparseUpdate, attach, deltas, detach, update_file
from peftkern.sparse.update_file import CONFIG, Entries


def trained(base: str = "dense", seed: int = 3, scaling: float = 0.5, density: float = 0.05) -> Any:
    model = llama(base)
    for delta in attach(model, random_deltas(model, density, seed), scaling=scaling).values():
        nn.init.normal_(delta.values, std=0.05, generator=torch.Generator().manual_seed(seed))
    return model


def update_of(seed: int = 3, scaling: float = 0.5, density: float = 0.05) -> SparseUpdate:
    return SparseUpdate.from_model(trained(seed=seed, scaling=scaling, density=density), method="test")


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


def same_update(one: SparseUpdate, other: SparseUpdate) -> bool:
    return (
        list(one.entries) == list(other.entries)
        and one.dense.keys() == other.dense.keys()
        and (one.scaling, one.method, one.metadata) == (other.scaling, other.method, other.metadata)
        and all(torch.equal(one.dense[name], other.dense[name]) for name in one.dense)
        and all(
            a.shape == b.shape and torch.equal(a.flat, b.flat) and torch.equal(a.values, b.values)
            for a, b in zip(one.entries.values(), other.entries.values(), strict=True)
        )
        and one.base.difference(other.base) is None
    )


def toy(entries: dict[str, Entries], dense: dict[str, Tensor] | None = None, **options: Any) -> SparseUpdate:
    return SparseUpdate(entries, Fingerprint("toy", "Toy", "0", {}), dense or {}, **options)


def entries(shape: tuple[int, ...], flat: list[int], values: list[float]) -> Entries:
    return Entries(torch.Size(shape), torch.tensor(flat, dtype=torch.int64), torch.tensor(values))


# ---- from a model and into one


@pytest.mark.parametrize("base", ["dense", "nf4", "bnb-nf4"])
def test_attached_to_a_fresh_base_it_acts_as_in_the_model_that_was_trained(base: str, tmp_path: Path) -> None:
    model = trained(base)
    SparseUpdate.from_model(model).save(tmp_path)
    fresh = llama(base)
    before, without = state(fresh), outputs(fresh)
    applied = SparseUpdate.load(tmp_path).attach_to(fresh)
    assert torch.equal(outputs(fresh), outputs(model)) and error(without, outputs(model)) > 1e-4
    assert not any(delta.values.requires_grad for delta in deltas(fresh).values())
    applied.revert()
    assert same_state(fresh, before) and torch.equal(outputs(fresh), without)


def test_trained_on_a_quantized_base_it_goes_into_the_dense_one_and_back(tmp_path: Path) -> None:
    SparseUpdate.from_model(trained("nf4")).save(tmp_path)
    fresh = llama()
    SparseUpdate.load(tmp_path).attach_to(fresh)
    assert torch.equal(outputs(fresh), outputs(trained()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_forward_is_the_attached_forward_and_revert_gives_every_bit_back(dtype: torch.dtype) -> None:
    update, model = update_of(), llama(dtype=dtype)
    before = state(model)
    applied = update.attach_to(model)
    expected = outputs(model)
    applied.revert()
    applied = update.merge_into(model)
    assert error(outputs(model), expected) <= (5e-6 if dtype == torch.float32 else 2e-2)
    applied.revert()
    assert same_state(model, before)
    with pytest.raises(ValueError, match="has been taken out before"):
        applied.revert()


def test_merged_weights_stay_when_the_delta_is_taken_off() -> None:
    update, model = update_of(), llama()
    update.merge_into(model)
    expected = outputs(model)
    detach(model, keep_merged=True)
    assert torch.equal(outputs(model), expected) and list(model.state_dict()) == list(llama().state_dict())


def test_quantized_bases_refuse_a_merge_or_report_its_error() -> None:
    update, model = update_of(), llama("nf4")
    before = state(model)
    with pytest.raises(ValueError, match="requantize=True"):
        update.merge_into(model)
    assert same_state(model, before)
    applied = update.merge_into(model, requantize=True)
    assert len(applied.errors) == 14 and all(0 < added < 0.2 for added in applied.errors.values())
    applied.revert()
    assert same_state(model, before)


@pytest.mark.parametrize("patched", [False, True])
def test_under_lora(patched: bool) -> None:
    update, model = update_of(), lora(llama("nf4"))
    if patched:
        patch(model)
    without = outputs(model)
    applied = update.attach_to(model)
    assert error(without, outputs(model)) > 1e-4
    assert same_update(SparseUpdate.from_model(model, method="test"), update)
    applied.revert()
    assert torch.equal(outputs(model), without)


def test_several_attached_updates_add_up_to_their_sum() -> None:
    one, two = update_of(1, density=0.3), update_of(2, 1.5, density=0.3)
    model, summed = llama(), llama()
    one.attach_to(model, "one")
    two.attach_to(model, "two")
    (one + two).attach_to(summed)
    assert error(outputs(summed), outputs(model)) <= 5e-6


def test_training_goes_on_from_an_update() -> None:
    model = llama()
    update_of().attach_to(model, trainable=True)
    model(**text()).loss.backward()
    assert all(delta.values.grad is not None for delta in deltas(model).values())


# ---- other parameters and dense ones


def with_rest(seed: int = 5) -> SparseUpdate:
    """An update of everything: linear layers, embeddings, a norm, and a head kept dense."""
    base, tuned = llama(), llama()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in tuned.named_parameters():
        chosen = torch.rand(parameter.shape, generator=generator) < (0.02 if parameter.dim() == 2 else 0.3)
        parameter.data += chosen * 0.1
        assert name
    return SparseUpdate.from_difference(
        base.state_dict(), tuned.state_dict(), Fingerprint.of(base), dense=["lm_head.weight"]
    )


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_what_is_no_linear_layer_is_written_and_reverted(base: str, merged: bool) -> None:
    update, model = with_rest(), llama(base)
    before = state(model)
    for _ in range(2):
        applied = update.merge_into(model, requantize=base == "nf4") if merged else update.attach_to(model)
        now = dict(model.named_parameters())
        embedding = update.entries["model.embed_tokens.weight"]
        assert torch.equal(now["lm_head.weight"], update.dense["lm_head.weight"])
        changed = (now["model.embed_tokens.weight"] != before["model.embed_tokens.weight"]).reshape(-1)
        assert torch.equal(changed.nonzero().reshape(-1), embedding.flat)
        applied.revert()
        assert same_state(model, before)


def test_a_difference_gives_the_tuned_model_back() -> None:
    base, tuned = llama(), llama()
    indices = random_deltas(tuned, 0.02)
    for name, one in indices.items():
        tuned.get_submodule(name).weight.data[one.mask()] += 0.25
    tuned.model.norm.weight.data[3] = 7.0
    update = SparseUpdate.from_difference(base.state_dict(), tuned.state_dict(), Fingerprint.of(base))
    assert update.entries.keys() == {f"{name}.weight" for name in indices} | {"model.norm.weight"}
    assert update.entries["model.norm.weight"].flat.tolist() == [3]
    assert len(update) == 1 + sum(map(len, indices.values()))
    update.merge_into(base)
    detach(base, keep_merged=True)
    assert same_state(base, state(tuned))


def test_tolerance_of_a_difference() -> None:
    base, tuned = {"w": torch.zeros(3)}, {"w": torch.tensor([0.0, 0.9e-7, 1.1e-7])}
    update = SparseUpdate.from_difference(base, tuned, Fingerprint("toy", "Toy", "0", {}))
    assert update.entries["w"].flat.tolist() == [2]


def test_tied_tensors_count_once() -> None:
    base, tuned = llama(tied=True), llama(tied=True)
    tuned.model.embed_tokens.weight.data[5, 7] += 1
    update = SparseUpdate.from_difference(base.state_dict(), tuned.state_dict(), Fingerprint.of(base))
    assert list(update.entries) == ["model.embed_tokens.weight"] or list(update.entries) == ["lm_head.weight"]
    applied = update.attach_to(base)
    assert same_state(base, state(tuned)) and not applied.name
    twice = {name: entries((96, 64), [327], [1.0]) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    with pytest.raises(ValueError, match="twice in this model, also as"):
        SparseUpdate(twice, Fingerprint.of(llama(tied=True))).attach_to(llama(tied=True))


def test_updates_with_written_parameters_are_taken_out_in_reverse() -> None:
    model, one, two = llama(), with_rest(5), with_rest(6).without_dense()
    before = state(model)
    first = one.attach_to(model, "one")
    second = two.attach_to(model, "two")
    with pytest.raises(ValueError, match="has been changed since; take out first what was applied later"):
        first.revert()
    second.revert()
    first.revert()
    assert same_state(model, before)


@pytest.mark.parametrize(
    ("base", "tuned", "message"),
    [
        ({"w": torch.zeros(3)}, {"w": torch.zeros(4)}, r"w is \[3\] in one and \[4\] in the other"),
        ({"w": torch.zeros(3)}, {}, "base_state names 'w'"),
        ({}, {"w": torch.zeros(3)}, "tuned_state names 'w'"),
        (
            {"w": torch.zeros(3)},
            {"w": torch.tensor([0.0, float("nan"), 1.0])},
            "w differs by something that is not finite",
        ),
        ({"w": torch.zeros(3).int()}, {"w": torch.ones(3).int()}, r"w is torch.int32 \[3\] and differs; take it dense"),
    ],
)
def test_differences_that_cannot_be(base: dict[str, Tensor], tuned: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseUpdate.from_difference(base, tuned, Fingerprint("toy", "Toy", "0", {}))


# ---- arithmetic


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 19), unique=True), st.lists(st.integers(0, 19), unique=True), st.floats(-3, 3))
def test_arithmetic_is_that_of_the_dense_form(first: list[int], second: list[int], factor: float) -> None:
    generator = torch.Generator().manual_seed(len(first))

    def make(flat: list[int], scaling: float) -> SparseUpdate:
        one = entries((4, 5), sorted(flat), torch.randn(len(flat), generator=generator).tolist())
        return toy({"w": one}, scaling=scaling)

    def dense(update: SparseUpdate) -> Tensor:
        one = update.entries["w"]
        return update.scaling * torch.zeros(20, dtype=torch.float64).index_copy(0, one.flat, one.values.double())

    a, b = make(first, 0.5), make(second, 1.5)
    for update, expected in (
        (a + b, dense(a) + dense(b)),
        (a - b, dense(a) - dense(b)),
        (factor * a, factor * dense(a)),
        (a * factor + b, factor * dense(a) + dense(b)),
        (-a, -dense(a)),
    ):
        update.entries["w"].check()
        assert torch.allclose(dense(update), expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 19), unique=True), st.lists(st.integers(0, 19), unique=True), st.sampled_from([0.5, 1.5])
)
def test_composition_commutes_bit_for_bit(first: list[int], second: list[int], scaling: float) -> None:
    a = toy({"w": entries((4, 5), sorted(first), [0.1 * i - 1 for i in range(len(first))])}, scaling=0.5)
    b = toy({"w": entries((4, 5), sorted(second), [-0.3 * i + 1 for i in range(len(second))])}, scaling=scaling)
    one, other = a + b, b + a
    assert one.scaling == other.scaling
    assert torch.equal(one.entries["w"].flat, other.entries["w"].flat)
    assert torch.equal(one.entries["w"].values.view(torch.int32), other.entries["w"].values.view(torch.int32))


def test_composition_commutes_in_a_model() -> None:
    one, two = update_of(1, density=0.3), update_of(2, 1.5, density=0.3)
    results = []
    for update in (one + two, two + one):
        model = llama()
        update.merge_into(model)
        results.append(outputs(model))
    assert torch.equal(*results)


def test_what_was_added_can_be_subtracted() -> None:
    a = toy({"w": entries((2, 2), [0, 3], [1.0, 2.0])})
    b = toy({"w": entries((2, 2), [3], [0.5]), "v": entries((3,), [1], [4.0])})
    rest = (a + b - b).entries
    assert rest["w"].values.tolist() == [1.0, 2.0] and rest["v"].values.tolist() == [0.0]
    assert (a + b).entries["w"].values.tolist() == [1.0, 2.5]


def test_dense_tensors_are_taken_from_one_update() -> None:
    head, other = {"head": torch.ones(2)}, {"head": torch.zeros(2)}
    a, b = toy({}, head), toy({}, other)
    with pytest.raises(ValueError, match=r"both updates hold head dense.*a \+ b.without_dense\(\)"):
        a + b
    assert torch.equal((a + b.without_dense()).dense["head"], head["head"])
    assert torch.equal((a + toy({}, head)).dense["head"], head["head"])
    assert torch.equal((2 * a).dense["head"], head["head"])
    with pytest.raises(ValueError, match=r"cannot be subtracted: head; subtract other.without_dense\(\)"):
        a - b


def test_shapes_must_agree_in_a_sum() -> None:
    with pytest.raises(ValueError, match=r"w is \[2, 2\] in one update and \[4\] in the other"):
        toy({"w": entries((2, 2), [0], [1.0])}) + toy({"w": entries((4,), [0], [1.0])})


def test_deltas_of_several_scalings_become_one() -> None:
    model = trained()
    name = "model.layers.0.mlp.up_proj"
    deltas(model)[name].scaling = 2.0
    update = SparseUpdate.from_model(model)
    assert update.scaling == 1.0
    fresh = llama()
    update.attach_to(fresh)
    assert error(outputs(fresh), outputs(model)) <= 5e-6


# ---- the base


def test_another_base_is_an_error_that_names_both(tmp_path: Path) -> None:
    update, other = update_of(), llama(seed=2)
    other.config._name_or_path = "the other one"
    before = state(other)
    message = r"the update is of '.*', and the model is 'the other one': embed_tokens.weight holds other numbers"
    for function in (update.attach_to, update.merge_into):
        with pytest.raises(WrongBaseError, match=message):
            function(other)
    assert same_state(other, before)
    attach(other, random_deltas(other))
    with pytest.raises(WrongBaseError, match=r"of different models, '.*' and 'the other one'"):
        update + SparseUpdate.from_model(other)


def test_training_something_beside_the_deltas_is_still_of_the_same_base() -> None:
    model = trained()
    model.model.norm.weight.data += 0.5
    update = SparseUpdate.from_model(model, dense=["model.norm.weight"])
    fresh = llama()
    update.attach_to(fresh)
    assert torch.equal(outputs(fresh), outputs(model))
    update_of(9).attach_to(fresh, "another")  # though the norm is another one by now


def test_unknown_names_and_shapes_are_refused() -> None:
    model = trained()
    with pytest.raises(ValueError, match="from_model: dense names 'nothing'"):
        SparseUpdate.from_model(model, dense=["nothing"])
    base, before = Fingerprint.of(llama()), state(llama())
    for update, message in (
        (SparseUpdate({"nothing": entries((2,), [0], [1.0])}, base), "the update names 'nothing'"),
        (SparseUpdate({"model.norm.weight": entries((63,), [0], [1.0])}, base), r"as \[63\], and the model has \[64\]"),
        (
            SparseUpdate({"model.layers.0.mlp.up_proj.weight": entries((64, 192), [0], [1.0])}, base),
            r"up_proj.weight as \[64, 192\], and the model has \[192, 64\]",
        ),
        (SparseUpdate({}, base, {"lm_head.weight": torch.zeros(3)}), r"has lm_head.weight as \[3\]"),
        (SparseUpdate({"model.norm.weight": entries((64,), [0], [3e38])}, base, scaling=2.0), "is not finite"),
    ):
        fresh = llama()
        with pytest.raises(ValueError, match=message):
            update.attach_to(fresh)
        assert same_state(fresh, before)


def test_a_name_that_is_taken_leaves_other_parameters_alone() -> None:
    update, model = with_rest(), llama()
    attach(model, {"model.layers.0.mlp.up_proj": SparseIndices.empty((192, 64))})
    before = state(model)
    with pytest.raises(ValueError, match="has a delta called 'default'"):
        update.attach_to(model)
    assert same_state(model, before)


# ---- files


@pytest.mark.parametrize("density", [0.0, 0.01, 0.5])
def test_round_trip(density: float, tmp_path: Path) -> None:
    update = update_of(density=density)
    update.save(tmp_path / "new" / "folder")
    assert same_update(SparseUpdate.load(tmp_path / "new" / "folder"), update)


def test_round_trip_of_everything(tmp_path: Path) -> None:
    update = with_rest() * 0.25
    update = SparseUpdate(**{**update.__dict__, "method": "lt-sft", "metadata": {"steps": 3, "nested": [1, None]}})
    update.save(tmp_path)
    assert same_update(SparseUpdate.load(tmp_path), update)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_positions_survive_their_code(data: st.DataObject) -> None:
    gaps = data.draw(st.lists(st.sampled_from([1, 2, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**40]), max_size=8))
    flat = torch.tensor([data.draw(st.integers(0, 2**40)), *gaps]).cumsum(0)
    coded = update_file._gaps(flat)
    largest = max(gaps, default=0)
    assert coded.element_size() == next(size for size in (1, 2, 4, 8) if largest < 2 ** (8 * size))
    described = {"shape": [2**50], "entries": len(flat), "first": int(flat[0])}
    tensors = {"w:gaps": coded, "w:values": torch.ones(len(flat))}
    assert torch.equal(update_file._read_entries("w", described, tensors).flat, flat)


def test_one_entry_in_a_hundred_takes_one_byte_and_its_value(tmp_path: Path) -> None:
    update = update_of(density=0.1)
    update.save(tmp_path)
    size = next(tmp_path.glob("*.safetensors")).stat().st_size
    assert size < 5 * len(update) + 8000


def test_saving_over_an_update_leaves_one(tmp_path: Path) -> None:
    update_of(1).save(tmp_path)
    second = update_of(2)
    second.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert same_update(SparseUpdate.load(tmp_path), second)


@pytest.mark.parametrize("failing", [1, 2], ids=["tensors", "config"])
def test_an_interrupted_save_leaves_the_one_before(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = update_of(1)
    first.save(tmp_path)
    calls, real = [], os.replace

    def replace(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == failing:
            raise OSError("no space left")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="no space left"):
        update_of(2).save(tmp_path)
    assert same_update(SparseUpdate.load(tmp_path), first)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_json_does_not_take_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    update = SparseUpdate(**{**update_of().__dict__, "metadata": {"what": object()}})
    with pytest.raises(TypeError):
        update.save(tmp_path)
    assert not list(tmp_path.iterdir())


def rewrite(folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Change config and tensors of a saved update, and let hash and names fit again, as a hostile writer would."""
    config = json.loads((folder / CONFIG).read_text())
    (old,) = folder.glob("*.safetensors")
    tensors = safetensors.torch.load_file(old)
    old.unlink()
    change(config, tensors)
    data = safetensors.torch.save(tensors)
    config["sha256"] = hashlib.sha256(data).hexdigest() if config["sha256"] else config["sha256"]
    (folder / old.name).write_bytes(data)
    (folder / CONFIG).write_text(json.dumps(config))


W = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.update(format="another"), "is not of a peftkern sparse update"),
        (lambda c, t: c.update(version=2), "version 2; this peftkern reads 1"),
        (lambda c, t: c.update(scaling=float("nan")), "scaling must be a finite number, got nan"),
        (lambda c, t: c.update(scaling="1"), "scaling must be a finite number, got '1'"),
        (lambda c, t: c.update(file="../../etc/passwd"), "file must be sparse_update-<hash>.safetensors"),
        (lambda c, t: c.update(sha256=""), "is torn or was changed"),
        (lambda c, t: c.update(entries=[1]), "entries must be a dict, got"),
        (lambda c, t: c.update(dense=[3]), "dense must be names"),
        (lambda c, t: c.update(dense=["head"]), "the file has no 'head:dense'"),
        (lambda c, t: c.update(base={}), "the fingerprint of the base model cannot be read"),
        (lambda c, t: c["entries"].pop(W), f"the file holds '{W}:.*', which sparse_update.json does not name"),
        (lambda c, t: c["entries"].update(more=c["entries"][W]), "the file has no 'more:gaps'"),
        (lambda c, t: c["entries"].update({W: None}), "must have a shape, and numbers of entries and first; got None"),
        (lambda c, t: c["entries"][W].update(shape=[2**40, 2**40]), "must have a shape"),
        (lambda c, t: c["entries"][W].update(shape=[64, True]), "must have a shape"),
        (lambda c, t: c["entries"][W].update(shape=[10, 10]), "positions reach beyond the 100 elements"),
        (lambda c, t: c["entries"][W].update(entries=3), "has 3 entries, but the file"),
        (lambda c, t: c["entries"][W].update(first=-1), "must have a shape, and numbers"),
        (lambda c, t: c["entries"][W].update(first=2**50), "positions reach beyond"),
        (lambda c, t: t[f"{W}:gaps"].zero_(), "positions do not ascend"),
        (lambda c, t: t.update({f"{W}:gaps": -t[f"{W}:gaps"].long()}), "positions do not ascend"),
        (lambda c, t: t.update({f"{W}:gaps": t[f"{W}:gaps"].long() * 2**56}), "positions"),
        (lambda c, t: t.update({f"{W}:gaps": t[f"{W}:gaps"].float()}), r"torch.float32 gaps"),
        (lambda c, t: t.update({f"{W}:values": t[f"{W}:values"][1:]}), "but the file"),
        (lambda c, t: t.update({f"{W}:values": t[f"{W}:values"].int()}), "values must be floating-point"),
        (lambda c, t: t[f"{W}:values"].fill_(float("inf")), "values are not finite"),
    ],
)
def test_changed_files_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    update_of().save(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=rf"SparseUpdate.load: .*{message}"):
        SparseUpdate.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 500, -1])
def test_truncated_files_are_refused(keep: int, tmp_path: Path) -> None:
    update_of().save(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="is torn or was changed: its SHA-256 hash"):
        SparseUpdate.load(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="safetensors is missing"):
        SparseUpdate.load(tmp_path)
    config = (tmp_path / CONFIG).read_bytes()
    for content in (config[:keep], b"\xff\xfe", b"[" * 100_000):
        (tmp_path / CONFIG).write_bytes(content)
        with pytest.raises(ValueError, match="is no JSON"):
            SparseUpdate.load(tmp_path)
    (tmp_path / CONFIG).write_bytes(b"[1]")
    with pytest.raises(ValueError, match="is not of a peftkern sparse update"):
        SparseUpdate.load(tmp_path)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    update_of().save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    data = b"\x08\x00\x00\x00\x00\x00\x00\x00nonsense"
    (tmp_path / config["file"]).write_bytes(data)
    config["sha256"] = hashlib.sha256(data).hexdigest()
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is no safetensors file of numbers"):
        SparseUpdate.load(tmp_path)


def test_an_empty_folder_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no sparse_update.json"):
        SparseUpdate.load(tmp_path)
