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
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import peftkern
from peftkern.formats import BitMask
from peftkern.integrations.fingerprint import unwrapped
from peftkern.nn.sparse_linear import deltas_of
from peftkern.optim import AdamW
from peftkern.sparse import (
    DSEE,
    Pruned,
    SparseUpdate,
    WrongBaseError,
    deltas,
    disabled,
    linear_layers,
    masks,
    merge,
    release_masks,
    remove_heads,
)
from peftkern.sparse.decomposition import sparse_entries
from peftkern.sparse.dsee import NAME, Adapted, adapted_layers, largest_entries, read_dense
from peftkern.sparse.head_pruning import find_attentions
from peftkern.sparse.layers import base_layer

QUERIES_AND_VALUES = ["q_proj", "v_proj"]
FAST: dict[str, Any] = {"entries": 8, "rank": 3, "sparsity": 0.0}


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
    return unwrapped(model).get_submodule(name), found


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
    assert weights.keys() == deltas(unwrapped(model), NAME).keys() and len(weights) == 4
    for name, delta in deltas(unwrapped(model), NAME).items():
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
    merge(model, NAME)
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


def train(model: nn.Module, folder: Path, method: DSEE, resume: str | None = None) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        num_train_epochs=2,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        max_grad_norm=0.0,
        optim="adamw_torch",
        save_strategy="steps",
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{name: tensor[0] for name, tensor in text(1, seed=seed).items()} for seed in range(3)]
    InOrder(model, arguments, train_dataset=data, callbacks=[method]).train(resume)  # type: ignore[arg-type]


def test_trainer_does_what_the_loop_does(tmp_path: Path) -> None:
    ours, theirs = adapted(), adapted()
    options = {**FAST, "sparsity": 0.2}
    method = prepared(ours, **options)
    optimizer = torch.optim.AdamW(method.parameters(), lr=0.01, weight_decay=0.1)
    method.start(optimizer, steps=6)
    for _ in range(2):
        for seed in range(3):
            method.step(ours, text(1, seed=seed))
    method.finish()
    train(theirs, tmp_path, DSEE(**options))
    assert method.pruned is not None and theirs.state_dict().keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert error(theirs.state_dict()[name].float(), tensor.float()) <= 1e-5, name


@pytest.mark.parametrize("checkpoint", [2, 4])  # the model is pruned after 3 updates
def test_resumed_in_the_trainer_it_is_training_that_was_never_interrupted(checkpoint: int, tmp_path: Path) -> None:
    options = {**FAST, "sparsity": 0.2, "tuning": 0.5}
    whole, resumed, again = adapted(), adapted(), DSEE(**options)
    train(whole, tmp_path, DSEE(**options))
    train(resumed, tmp_path, again, str(tmp_path / f"checkpoint-{checkpoint}"))
    assert again.pruned is not None
    assert resumed.state_dict().keys() == whole.state_dict().keys() and not changed(resumed, state(whole))


def test_resumed_in_a_loop_without_heads() -> None:
    whole = adapted()
    method = prepared(whole, heads=1, sparsity=0.2, tuning=0.5)
    optimizer = AdamW(method.parameters(), lr=0.01)
    method.start(optimizer, steps=4)
    for seed in range(4):
        if seed == 3:
            saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
        method.step(whole, text(seed=seed))
    resumed = adapted()
    again = prepared(resumed, heads=1, sparsity=0.2, tuning=0.5)
    optimizer = AdamW(again.parameters(), lr=0.01)
    optimizer.load_state_dict(saved[1])
    again.start(optimizer, steps=4)
    resumed.load_state_dict(saved[0])
    again.step(resumed, text(seed=3))
    assert not changed(resumed, state(whole))


# ---- pruning entries


def test_smallest_of_all_together_are_dropped_exactly_as_many_as_asked_for() -> None:
    scores = {"a": torch.tensor([[1.0, -5.0, 2.0]]), "b": torch.tensor([[2.0, 3.0], [-2.0, 0.0]])}
    masks = largest_entries(scores, 0.6)  # 4 of 7: 0, 1 and two of the three 2s, the last ones
    assert masks["a"].mask().tolist() == [[False, True, True]]
    assert masks["b"].mask().tolist() == [[False, True], [False, False]]
    assert largest_entries(scores, 0.0)["b"].kept() == 4


def by_hand(score: str) -> dict[str, BitMask]:
    """Of a model whose one adapted layer has W = [1, -2, 0.5, 4], s = 2, B A = [1, 3, 0, 0] and S = [0, 0, 2, 0]."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False))
    model[0].weight.data = torch.tensor([[1.0, -2.0, 0.5, 4.0]])
    model[1].weight.data = torch.tensor([[-1.0], [2.0], [0.5], [3.0]])
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=1, lora_alpha=2, target_modules=["0"]))
    method = prepared(tuned, entries=4, rank=1, sparsity=0.5, score=score)
    (found,) = adapted_layers(tuned).values()
    assert found.delta is not None
    found.A.data, found.B.data = torch.tensor([[1.0, 3.0, 0.0, 0.0]]), torch.tensor([[1.0]])
    found.delta.values.data = torch.tensor([0.0, 0.0, 2.0, 0.0])
    assert found.update().tolist() == [[2.0, 6.0, 4.0, 0.0]]
    return dict(method.prune().masks)


def test_scores_by_hand() -> None:
    (first, second), (third, _) = by_hand("abs").values(), by_hand("wabs").values()
    assert first.mask().tolist() == [[False, True, True, False]]  # |U| = 2, 6, 4, 0
    # |W + U| = 3, 4, 4.5, 4; had only S the scaling, it would be 2, 1, 4.5, 4, and had none 2, 1, 2.5, 4
    assert third.mask().tolist() == [[False, True, True, False]]
    assert second.mask().flatten().tolist() == [False, True, False, True]


@pytest.mark.parametrize("score", ["abs", "wabs"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_adapted_layers_and_others_are_pruned_as_two_groups(base: str, score: str) -> None:
    model = adapted(base)
    method = prepared(model, sparsity=0.2, score=score)
    filled(model)
    scores, others = {}, {}
    for name, layer in linear_layers(unwrapped(model)).items():
        weight = read_dense(name, base_layer(layer))
        if name in adapted_layers(model):
            update = adapted_layers(model)[name].update()
            scores[name] = (update if score == "abs" else weight + update).abs()
        else:
            others[name] = weight.abs()
    assert (len(scores), len(others)) == (4, 10)
    pruned = method.prune().masks
    for group in (scores, others):
        flat = torch.cat([one.flatten() for one in group.values()])
        kept = torch.cat([pruned[name].mask().flatten() for name in group])
        assert int((~kept).sum()) == len(flat) // 5
        assert float(flat[~kept].max()) <= float(flat[kept].min())
    assert pruned.keys() == masks(unwrapped(model)).keys() == scores.keys() | others.keys()
    both = sum(mask.kept() for name, mask in pruned.items() if "down_proj" in name)
    assert f"{both:,} of 24,576" in str(method.pruned)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("patched", [False, True])
def test_pruned_forward_is_the_dense_products(base: str, patched: bool) -> None:
    model = adapted(base)
    method = prepared(model, sparsity=0.4)
    filled(model)
    if patched:
        peftkern.patch(model, kernels="reference")
    pruned = method.prune().masks
    name, layer = next(
        (name, layer) for name, layer in linear_layers(unwrapped(model)).items() if name.endswith("q_proj")
    )
    found = adapted_layers(model)[name]
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(5))
    weight = read_dense(name, found.base).double() * pruned[name].mask()
    assert error(layer(x), x.double() @ (weight + found.update().double()).t()) <= 5e-6
    assert error(weight, read_dense(name, found.base)) > 0.01


def test_pruned_entries_stay_zero_through_training_and_merging() -> None:
    model = adapted()
    method = prepared(model, sparsity=0.3)
    method.start(AdamW(method.parameters(), lr=0.01, weight_decay=0.1), steps=6)
    before = state(model)
    for seed in range(6):
        method.step(model, text(seed=seed))
        assert (method.pruned is None) == (seed == 0)
    assert method.pruned is not None
    assert all("lora_" in name or name.endswith(f"{NAME}.values") for name in changed(model, before))
    expected = outputs(model)
    updates = {name: one.update() for name, one in adapted_layers(model).items()}
    weights = {name: base_layer(layer).weight for name, layer in linear_layers(unwrapped(model)).items()}
    pruned = method.pruned.masks
    release_masks(model, keep_zeros=True)
    merge(model, NAME)
    merged = model.merge_and_unload()
    assert error(outputs(merged), expected) <= 1e-5
    for name, mask in pruned.items():
        dropped = ~mask.mask()
        assert bool(dropped.any())
        left = updates[name][dropped] if name in updates else torch.zeros(int(dropped.sum()))
        assert torch.allclose(weights[name][dropped], left, rtol=0, atol=1e-7), name


def test_the_optimizer_begins_anew_after_pruning() -> None:
    model = adapted()
    method = prepared(model, sparsity=0.3, tuning=0.5)
    optimizer = torch.optim.AdamW(method.parameters(), lr=0.01)
    method.start(optimizer, steps=4)
    method.step(model, text())
    assert len(optimizer.state) == 12
    method.step(model, text())
    assert method.pruned is not None and not optimizer.state
    method.step(model, text())
    assert {int(one["step"]) for one in optimizer.state.values()} == {1}


def test_once_pruned_it_is_not_pruned_again() -> None:
    method = prepared(adapted(), sparsity=0.1)
    method.prune()
    with pytest.raises(RuntimeError, match="has been pruned"):
        method.prune()


# ---- pruning heads


def masked_heads(model: nn.Module, kept: dict[str, tuple[int, ...]]) -> None:
    """The heads that are not kept give nothing: their columns of the output layer are zero."""
    for name, attention in find_attentions(model).items():
        rows = attention.query_rows
        layer = unwrapped(model).get_submodule(attention.o)
        gone = [c for c in range(attention.heads * attention.head_size) if c // rows not in kept[name]]
        for matrix in (base_layer(layer).weight, *(a.weight for a in getattr(layer, "lora_A", {}).values())):
            matrix.data[:, gone] = 0
        for delta in deltas_of(base_layer(layer)).values():
            delta.values.data[torch.isin(delta.columns, torch.tensor(gone))] = 0


def bert() -> Any:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=96, hidden_size=60, num_hidden_layers=2, num_attention_heads=5, intermediate_size=32, pad_token_id=0
    )
    return BertForMaskedLM(config)


def llama_of_heads(heads: int, groups: int) -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        pad_token_id=0,
        attention_bias=True,
    )
    return LlamaForCausalLM(config)


MODELS: dict[str, tuple[Any, list[str]]] = {
    "each its own": (lambda: llama_of_heads(6, 6), ["q_proj", "v_proj"]),
    "three share one": (lambda: llama_of_heads(12, 4), ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "bert": (bert, ["query", "value"]),
}


@pytest.mark.parametrize("score", ["abs", "wabs"])
@pytest.mark.parametrize("kind", MODELS)
def test_without_heads_it_computes_what_it_does_with_heads_masked(kind: str, score: str) -> None:
    make, targets = MODELS[kind]
    model = lora(make(), target_modules=targets, lora_bias=kind == "each its own").eval()
    method = prepared(model, heads=2, score=score)
    filled(model)
    twin = copy.deepcopy(model)
    sizes = {name: one.heads for name, one in find_attentions(model).items()}
    kept = dict(method.prune().heads)
    masked_heads(twin, kept)
    assert error(outputs(model), outputs(twin)) <= 5e-6
    for name, attention in find_attentions(model).items():
        assert attention.groups == len(kept[name]) and attention.heads < sizes[name]
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in twin.parameters())


@pytest.mark.parametrize("score", ["abs", "wabs"])
def test_the_heads_of_the_smallest_scores_go(score: str) -> None:
    model = lora(llama_of_heads(12, 4), target_modules=QUERIES_AND_VALUES)
    method = prepared(model, heads=1, score=score)
    filled(model)
    layers, updates = (
        linear_layers(unwrapped(model)),
        {name: one.update() for name, one in adapted_layers(model).items()},
    )
    expected = {}
    for name, attention in find_attentions(model).items():
        scores = [0.0] * 4
        for part, rows in ((attention.q, 12), (attention.v, 4)):
            weight = base_layer(layers[part]).weight.detach()
            for group in range(4):
                block = slice(group * rows, (group + 1) * rows)
                scores[group] += float(updates[part][block].abs().sum())
                scores[group] += float(weight[block].abs().sum()) if score == "wabs" else 0.0
        expected[name] = tuple(group for group in range(4) if group != scores.index(min(scores)))
    assert dict(method.prune().heads) == expected


def test_training_goes_on_without_the_heads(tmp_path: Path) -> None:
    model = adapted()
    method = prepared(model, heads=1, sparsity=0.2, tuning=0.5)
    trained = list(method.parameters())
    optimizer = AdamW(method.parameters(), lr=0.01)
    method.start(optimizer, steps=4)
    for seed in range(4):
        method.step(model, text(seed=seed))
    assert method.pruned is not None and len(method.pruned.heads) == 2 and len(method.pruned.masks) == 14
    assert all(one is other for one, other in zip(trained, method.parameters(), strict=True))
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in trained)
    # what was trained fits another model that was pruned alike
    method.update().save(tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    method.pruned.save(tmp_path)
    fresh, loaded_pruned = llama(), Pruned.load(tmp_path)
    assert str(loaded_pruned) == str(method.pruned)
    loaded_pruned.apply_to(fresh)
    SparseUpdate.load(tmp_path).attach_to(fresh)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert error(outputs(loaded), outputs(model)) <= 1e-6


def test_what_was_pruned_is_refused_by_another_model_and_by_a_torn_file(tmp_path: Path) -> None:
    method = prepared(adapted(), heads=1)
    method.prune().save(tmp_path)
    other = llama(seed=2)
    with pytest.raises(WrongBaseError, match="what was pruned is of"):
        Pruned.load(tmp_path).apply_to(other)
    assert {one.groups for one in find_attentions(other).values()} == {2}
    whole = (tmp_path / "pruned.safetensors").read_bytes()
    (tmp_path / "pruned.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        Pruned.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no"):
        Pruned.load(tmp_path / "elsewhere")


def test_a_pruned_model_is_saved_and_loaded_whole(tmp_path: Path) -> None:
    model = llama_of_heads(12, 4)
    remove_heads(model, dict.fromkeys(find_attentions(model), (0, 3)))
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (6, 2)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(LlamaForCausalLM.from_pretrained(tmp_path)), outputs(model))


def refused_heads(case: str) -> tuple[nn.Module, dict[str, Any], str]:
    if case == "all heads":
        return adapted(), {"heads": 2}, r"has 2 heads to prune, got heads=2"
    if case == "quantized":
        return adapted("nf4"), {"heads": 1}, "q_proj is a QuantizedLinear; heads are cut out of dense layers"
    if case == "patched":
        model = adapted()
        peftkern.patch(model, kernels="reference")
        return model, {"heads": 1}, r"call peftkern\.unpatch"
    if case == "no score":
        return adapted(target_modules=["o_proj"]), {"heads": 1}, "scored by updates of q and v"
    torch.manual_seed(1)
    shared = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=24, n_layer=1, n_head=4))
    return lora(shared, target_modules=["c_attn"], fan_in_fan_out=True), {"heads": 1}, "no layer|no adapter|has none"


@pytest.mark.parametrize("case", ["all heads", "quantized", "patched", "no score", "one matrix"])
def test_heads_that_cannot_be_pruned_are_an_error_before_training(case: str) -> None:
    model, options, message = refused_heads(case)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        prepared(model, **options)
    assert not changed(model, before)


def test_a_base_that_cannot_be_masked_is_an_error_before_training() -> None:
    with pytest.raises(TypeError, match=r"DSEE: .*peftkern\.QuantConfig"):
        prepared(adapted("bnb-nf4"), sparsity=0.2)


@pytest.mark.parametrize(
    ("kept", "message"),
    [({"x": (0,)}, "kept names 'x'"), ({"model.layers.0.self_attn": (2,)}, "from 0 to 1"), ({}, "")],
)
def test_unknown_heads_are_an_error(kept: dict[str, tuple[int, ...]], message: str) -> None:
    model = llama()
    before = state(model)
    if message:
        with pytest.raises(ValueError, match=message):
            remove_heads(model, kept)
    else:
        remove_heads(model, kept)
    assert not changed(model, before)


# ---- what it refuses


def test_arguments_are_plain() -> None:
    parameters = list(inspect.signature(DSEE.__init__).parameters.values())[1:]
    assert parameters and all(str(p.annotation) in ("int", "float", "str", "bool") for p in parameters)


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


@pytest.mark.parametrize(
    "options", [{"entries": 0}, {"rank": 0}, {"heads": -1}, {"sparsity": 1.0}, {"tuning": -0.1}, {"score": "x"}]
)
def test_bad_arguments_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"DSEE: {next(iter(options))} must be"):
        DSEE(**options)
