"""DSEE: what is computed and trained, on dense and quantized bases, in a loop and in the Trainer."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from sparse_models import error, llama, lora, outputs, text
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

import peftkern
from peftkern.optim import AdamW
from peftkern.sparse import DSEE, SparseUpdate, deltas, disabled
from peftkern.sparse.decomposition import sparse_entries
from peftkern.sparse.dsee import NAME, Adapted, adapted_layers, read_dense

QUERIES_AND_VALUES = ["q_proj", "v_proj"]
FAST: dict[str, Any] = {"entries": 8, "rank": 3}


def adapted(base: str = "dense", **options: Any) -> Any:
    return lora(llama(base), **{"target_modules": QUERIES_AND_VALUES, **options})


def prepared(model: nn.Module, **options: Any) -> DSEE:
    method = DSEE(**{**FAST, **options})
    method.prepare(model)
    return method


def filled(model: nn.Module) -> None:
    """Deltas that matter."""
    for number, delta in enumerate(deltas(model, NAME).values()):
        nn.init.normal_(delta.values, std=0.1, generator=torch.Generator().manual_seed(number))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    now = model.state_dict()
    return {name for name in before if not torch.equal(now[name], before[name])}


def layer_of(model: nn.Module) -> tuple[Any, Adapted]:
    name, found = next(iter(adapted_layers(model).items()))
    return model.get_submodule(name), found


# ---- what is computed


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_forward_is_the_dense_products(base: str) -> None:
    model = adapted(base)
    prepared(model)
    filled(model)
    layer, found = layer_of(model)
    assert found.delta is not None and found.delta.scaling == found.scaling == 1.5
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(5))
    weight = read_dense("q", found.base).double()
    low_rank = found.B.detach().double() @ found.A.detach().double()
    sparse = found.delta.indices.to_dense(found.delta.values.detach().double())
    assert error(layer(x), x.double() @ (weight + 1.5 * (low_rank + sparse)).t()) <= 5e-6
    assert error(found.update(), 1.5 * (low_rank + sparse)) <= 1e-6


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_gradient_of_the_sparse_values_is_the_dense_one_at_their_entries(base: str) -> None:
    model = adapted(base)
    prepared(model)
    filled(model)
    layer, found = layer_of(model)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(5))
    layer(x).square().sum().backward()
    dense = (read_dense("q", found.base) + found.update()).double().requires_grad_()
    (x.double() @ dense.t()).square().sum().backward()
    assert found.delta is not None and found.delta.values.grad is not None and dense.grad is not None
    assert error(found.delta.values.grad, 1.5 * found.delta.indices.gather(dense.grad)) <= 5e-6


def test_a_patched_model_computes_the_same() -> None:
    model = adapted()
    prepared(model)
    filled(model)
    expected = outputs(model)
    peftkern.patch(model, kernels="reference", strict=True)
    assert error(outputs(model), expected) <= 5e-6


@pytest.mark.parametrize("base", ["dense", "nf4", "bnb-nf4"])
def test_entries_are_those_of_the_pretrained_weights(base: str) -> None:
    model = adapted(base)
    weights = {name: read_dense(name, one.base) for name, one in adapted_layers(model).items()}
    prepared(model, entries=8, rank=3)
    assert weights.keys() == deltas(model, NAME).keys() and len(weights) == 4
    for name, delta in deltas(model, NAME).items():
        assert delta.indices.flat().tolist() == sparse_entries(weights[name], 8, rank=3).tolist()
        assert not bool(delta.values.any())


def test_ranks_of_their_own_have_scalings_of_their_own() -> None:
    model = adapted(rank_pattern={"v_proj": 2})
    prepared(model)
    assert {name.rpartition(".")[2]: d.scaling for name, d in deltas(model, NAME).items()} == {
        "q_proj": 1.5,
        "v_proj": 3.0,
    }
    update = SparseUpdate.from_model(model, NAME)
    assert update.scaling == 1.0 and len(update) == 4 * 8


# ---- what is trained


def test_nothing_changes_before_the_first_step() -> None:
    model = adapted()
    expected = outputs(model)
    prepared(model)
    assert torch.equal(outputs(model), expected)
    with disabled(model):
        assert torch.equal(outputs(model), expected)


def test_adapters_and_deltas_are_trained_and_the_rest_stays_bit_for_bit() -> None:
    model = adapted()
    method = prepared(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.endswith(f"{NAME}.values") for name in trained) and len(trained) == 12
    assert sum(p.numel() for p in method.parameters()) == 2 * (2 * 64 * 4 + (64 + 32) * 4 + 2 * 8)
    before = state(model)
    method.start(torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1))
    for seed in range(3):
        method.step(model, text(seed=seed))
    method.finish()
    assert changed(model, before) == trained


def test_merged_it_is_what_the_adapters_and_deltas_compute() -> None:
    model = adapted()
    method = prepared(model)
    method.start(AdamW(method.parameters(), lr=0.01))
    for seed in range(2):
        method.step(model, text(seed=seed))
    expected = outputs(model)
    peftkern.sparse.merge(model, NAME)
    merged = model.merge_and_unload()
    assert error(outputs(merged), expected) <= 1e-5


def test_same_seed_same_entries() -> None:
    entries = []
    for seed in (1, 1, 2):
        model = adapted()
        prepared(model, entries=40, rank=1, seed=seed)
        entries.append({name: delta.indices.flat().tolist() for name, delta in deltas(model, NAME).items()})
    assert entries[0] == entries[1] != entries[2]


def test_resumed_from_its_state_it_is_training_that_was_never_interrupted() -> None:
    whole = adapted()
    method = prepared(whole)
    optimizer = AdamW(method.parameters(), lr=0.01)
    method.start(optimizer)
    for seed in range(4):
        if seed == 2:
            saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
        method.step(whole, text(seed=seed))
    resumed = adapted()
    again = prepared(resumed)
    optimizer = AdamW(again.parameters(), lr=0.01)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    again.start(optimizer)
    for seed in range(2, 4):
        again.step(resumed, text(seed=seed))
    assert not changed(resumed, state(whole))


class InOrder(Trainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def train(model: nn.Module, folder: Path, method: DSEE) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        num_train_epochs=2,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        max_grad_norm=0.0,
        optim="adamw_torch",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{name: tensor[0] for name, tensor in text(1, seed=seed).items()} for seed in range(3)]
    InOrder(model, arguments, train_dataset=data, callbacks=[method]).train()  # type: ignore[arg-type]


def test_trainer_does_what_the_loop_does(tmp_path: Path) -> None:
    ours, theirs = adapted(), adapted()
    method = prepared(ours)
    optimizer = torch.optim.AdamW(method.parameters(), lr=0.01, weight_decay=0.1)
    method.start(optimizer, steps=6)
    for _ in range(2):
        for seed in range(3):
            method.step(ours, text(1, seed=seed))
    method.finish()
    train(theirs, tmp_path, DSEE(**FAST))
    before = state(ours)
    assert all(error(theirs.state_dict()[name].float(), tensor.float()) <= 1e-6 for name, tensor in before.items())


# ---- what it refuses


def test_arguments_are_plain() -> None:
    parameters = list(inspect.signature(DSEE.__init__).parameters.values())[1:]
    assert all(str(p.annotation) in ("int", "float", "str", "bool") for p in parameters)


def refused(case: str) -> tuple[nn.Module, dict[str, Any], str]:
    if case == "no adapters":
        return llama(), {}, r"call peft\.get_peft_model first"
    if case == "two adapters":
        model = adapted()
        model.add_adapter("other", peft.LoraConfig(target_modules=QUERIES_AND_VALUES))
        return model, {}, r"one adapter of plain LoRA.*\['default', 'other'\]"
    if case == "dora":
        return adapted(use_dora=True, init_lora_weights=True), {}, "one adapter of plain LoRA"
    if case == "trained base":
        model = adapted()
        model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj.base_layer").requires_grad_(True)
        return model, {}, r"layers\.1\.self_attn\.q_proj: the base weight is trained itself"
    return adapted(), {"entries": 64 * 64 + 1}, "fewer than entries=4097"


@pytest.mark.parametrize("case", ["no adapters", "two adapters", "dora", "trained base", "too many entries"])
def test_what_it_cannot_train_is_an_error_and_the_model_stays_as_it_was(case: str) -> None:
    model, options, message = refused(case)
    before, classes = state(model), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        prepared(model, **options)
    assert not changed(model, before)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("options", [{"entries": 0}, {"rank": 0}])
def test_bad_arguments_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"DSEE: {next(iter(options))} must be at least 1"):
        DSEE(**options)
