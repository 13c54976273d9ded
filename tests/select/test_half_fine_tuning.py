"""Half fine-tuning: what is drawn, what is trained, and that the rest stays bit for bit."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from select_models import batches, build, changed, error, llama, twin, values
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Trainer,
    TrainingArguments,
)

import peftkern
from peftkern.nn import QuantizedLinear
from peftkern.select.half_fine_tuning import HalfFineTuning, choose, half_reset

ATTENTION, FFN = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def prepared(model: nn.Module, **options: Any) -> HalfFineTuning:
    method = HalfFineTuning(**options)
    method.prepare(model)
    return method


def names_of(method: HalfFineTuning) -> tuple[str, ...]:
    assert method.report is not None
    return method.report.names


def by_layer(names: tuple[str, ...], roles: tuple[str, ...]) -> Counter[int]:
    """How many matrices of these roles are trained in each layer."""
    return Counter(int(name.split(".")[2]) for name in names if name.split(".")[-2] in roles)


# ---- the draw


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("layers", [1, 2, 5, 6])
def test_category_level_trains_two_of_four_and_three_of_six(layers: int, seed: int) -> None:
    names = names_of(prepared(llama(num_hidden_layers=layers), seed=seed))
    attention, ffn = by_layer(names, ATTENTION), by_layer(names, FFN)
    assert [attention[layer] for layer in range(layers)] == [2] * layers
    assert {ffn[layer] for layer in range(layers)} <= {1, 2}
    layers_with_two = sum(ffn[layer] == 2 for layer in range(layers))
    assert layers_with_two in {layers // 2, (layers + 1) // 2}
    norms = Counter(name.split(".")[2] for name in names if "layernorm" in name)
    assert set(norms.values()) == {1} and len(norms) == layers
    assert "model.norm.weight" in names
    assert "model.embed_tokens.weight" in names


def test_every_matrix_has_its_turn() -> None:
    seen: defaultdict[str, int] = defaultdict(int)
    draws = 40
    for seed in range(draws):
        for name in names_of(prepared(llama(), seed=seed)):
            seen[name] += 1
    matrices = {name: seen[name] for name, p in llama().named_parameters() if "layers" in name and p.dim() == 2}
    assert len(matrices) == 14
    assert all(0.2 * draws < count < 0.8 * draws for count in matrices.values())


def test_shares_of_llama_2_7b() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False))  # the default sizes are Llama-2-7B's
    report = prepared(model).report
    assert report is not None
    assert round(report.block_share, 4) == 0.5
    assert round(report.share, 4) == 0.5195
    assert "51.9% of all parameters" in str(report) or "52.0% of all parameters" in str(report)
    assert "64 of 128" in str(report) and "48 of 96" in str(report)


def test_the_same_seed_draws_the_same_half() -> None:
    first, second, other = (names_of(prepared(llama(), seed=seed)) for seed in (5, 5, 6))
    assert first == second != other


def test_two_of_four_is_not_half_of_the_numbers_where_keys_and_values_are_shared() -> None:
    def shares(balance: str) -> set[float]:
        reports = [prepared(llama(), balance=balance, seed=seed).report for seed in range(8)]
        return {row.share for report in reports if report for row in report.rows if row.category == "attention"}

    assert shares("params") == {0.5}
    assert len(shares("count")) > 1


@pytest.mark.parametrize("ratio", [0.4, 0.6])
def test_other_ratios(ratio: float) -> None:
    report = prepared(llama(num_hidden_layers=5), ratio=ratio).report
    assert report is not None
    counts = {row.category: (row.trained, row.total) for row in report.rows}
    assert counts["attention"] == (20 * ratio, 20)
    assert counts["ffn"] == (15 * ratio, 15)


def test_layer_level_trains_whole_blocks() -> None:
    names = names_of(prepared(llama(num_hidden_layers=4), level="layer"))
    assert sorted(Counter(name.split(".")[2] for name in names if "layers" in name).values()) == [9, 9]


def test_model_level_ignores_categories() -> None:
    counts = set()
    for seed in range(6):
        names = names_of(prepared(llama(num_hidden_layers=4), level="model", seed=seed))
        attention, ffn = by_layer(names, ATTENTION), by_layer(names, FFN)
        assert attention.total() + ffn.total() == 14
        counts.add(attention.total())
    assert len(counts) > 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"embeddings": "freeze", "norms": "freeze"}, set()),
        ({"embeddings": "freeze", "norms": "train"}, {"layernorm", "norm"}),
        ({"embeddings": "train", "norms": "freeze"}, {"embed_tokens"}),
    ],
)
def test_embeddings_and_norms_as_told(options: dict[str, Any], expected: set[str]) -> None:
    names = names_of(prepared(llama(), **options))
    rest = {name.split(".")[-2] for name in names if name.split(".")[-2] not in (*ATTENTION, *FFN)}
    assert {name.split("_")[-1] if "layernorm" in name else name for name in rest} == expected
    if "layernorm" in expected:
        assert sum("layernorm" in name for name in names) == 4


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=5), min_size=1, max_size=12),
    ratio=st.floats(0.1, 0.9),
    seed=st.integers(0, 99),
)
def test_what_is_chosen_is_as_near_to_the_ratio_as_half_of_the_largest_member(
    groups: list[list[int]], ratio: float, seed: int
) -> None:
    keyed = [{(g, m): size for m, size in enumerate(group)} for g, group in enumerate(groups)]
    chosen = choose(keyed, ratio, torch.Generator().manual_seed(seed))
    size = sum(group[key] for group in keyed for key in group if key in chosen)
    total = sum(map(sum, groups))
    assert abs(size - ratio * total) <= max(map(max, groups)) / 2 + 1e-3 * total
    assert chosen == choose(keyed, ratio, torch.Generator().manual_seed(seed))


def test_a_group_too_large_to_look_at_all_subsets_is_an_error() -> None:
    with pytest.raises(ValueError, match="at most, got 13"):
        choose([dict.fromkeys(range(13), 1)], 0.5, torch.Generator())


# ---- training

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd-momentum-decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "torch-adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: peftkern.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "phi3": lambda: build(Phi3ForCausalLM, Phi3Config, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0),
    "gpt2": lambda: build(
        GPT2LMHeadModel, GPT2Config, num_key_value_heads=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "mixtral": lambda: build(MixtralForCausalLM, MixtralConfig, num_local_experts=3, num_experts_per_tok=2),
}


def mask_of(model: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    """1 where trained, 0 elsewhere, for every parameter of the plain model, read off the names in the report."""
    masks = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for name in names:
        parameter, _, rows = name.partition("[")
        columns = parameter.endswith("c_attn.weight")
        for own in (parameter, parameter.replace("weight", "bias")):
            if own not in masks or (own != parameter and "norm" in own) or (own != parameter and "ln_" in own):
                continue
            mask = masks[own]
            if not rows:
                mask.fill_(1.0)
                continue
            begin, end = map(int, rows.rstrip("]").split(":"))
            flat = mask if mask.dim() == 1 else mask.t() if columns else mask.view(-1, mask.shape[-1])
            flat[begin:end] = 1.0
    return masks


def dense_run(model: nn.Module, masks: dict[str, Tensor], optimizer: torch.optim.Optimizer, data: Any) -> None:
    """Full fine-tuning with every gradient multiplied by its mask, and what is outside of the mask put back."""
    before = values(model)
    for batch in data:
        model(**batch).loss.backward()
        for name, parameter in model.named_parameters():
            parameter.grad.mul_(masks[name])  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.where(masks[name] > 0, parameter, before[name]))


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "torch-adamw"), *((family, kind) for family in FAMILIES for kind in ("sgd-momentum-decay", "adamw"))],
)
def test_frozen_stays_and_trained_moves_as_in_a_dense_run_with_masked_gradients(family: str, kind: str) -> None:
    model = FAMILIES[family]()
    dense, before, data = twin(model), values(model), batches(3)
    method = prepared(model, seed=2)
    masks = mask_of(dense, names_of(method))
    optimizer = OPTIMIZERS[kind](method.parameters())
    method.start(optimizer)
    for batch in data:
        method.step(model, batch)
    method.finish()
    dense_run(dense, masks, OPTIMIZERS[kind](dense.parameters()), data)
    for name, parameter in model.named_parameters():
        frozen = masks[name] == 0
        assert torch.equal(parameter[frozen], before[name][frozen]), name
        if not bool(frozen.all()):
            assert not torch.equal(parameter, before[name]), name
        tolerance = 1e-6 if kind.startswith("sgd") else 1e-5
        assert error(parameter, dense.get_parameter(name)) <= tolerance, name


def test_sgd_is_the_dense_run_bit_for_bit() -> None:
    model = llama()
    dense, data = twin(model), batches(3)
    method = prepared(model)
    method.start(torch.optim.SGD(method.parameters(), lr=0.1))
    for batch in data:
        method.step(model, batch)
    dense_run(dense, mask_of(dense, names_of(method)), torch.optim.SGD(dense.parameters(), lr=0.1), data)
    assert not changed(model, values(dense))


def test_gradients_and_state_exist_for_the_trained_half_alone() -> None:
    model = llama(num_hidden_layers=4, num_key_value_heads=4)
    method = prepared(model, embeddings="freeze")
    optimizer = torch.optim.AdamW(method.parameters())
    method.start(optimizer)
    model(**batches(1)[0]).loss.backward()
    blocks = model.model.layers
    all_bytes = sum(p.nbytes for p in blocks.parameters() if p.dim() == 2)
    gradient_bytes = sum(p.grad.nbytes for p in blocks.parameters() if p.grad is not None and p.dim() == 2)
    assert gradient_bytes * 2 == all_bytes
    optimizer.step()
    held = sum(t.nbytes for p in optimizer.state if p.dim() == 2 for t in optimizer.state[p].values() if t.dim())
    assert held == 2 * gradient_bytes


def test_patched_blocks_train_the_same_half() -> None:
    model = llama()
    plain, data = twin(model), batches(3)
    peftkern.patch(model, kernels="reference", strict=True)
    assert type(model.model.layers[0].mlp) is not type(plain.model.layers[0].mlp)
    for each in (model, plain):
        method = prepared(each)
        method.start(torch.optim.SGD(method.parameters(), lr=0.1))
        for batch in data:
            method.step(each, batch)
    for name, parameter in model.named_parameters():
        assert error(parameter, plain.get_parameter(name)) <= 1e-6


def test_finish_leaves_the_plain_model() -> None:
    model = FAMILIES["phi3"]()
    model.lm_head.weight.requires_grad_(False)
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    classes = {name: type(module) for name, module in model.named_modules()}
    method = prepared(model)
    assert {name: type(module) for name, module in model.named_modules()} != classes
    method.finish()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked
    assert {name: type(module) for name, module in model.named_modules()} == classes


def test_the_next_stage_draws_another_half_and_logs_its_seed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="peftkern")
    model = llama()
    method = prepared(model, seed=11)
    first = names_of(method)
    method.prepare(model)  # not finished: the same stage
    assert names_of(method) == first
    method.finish()
    method.prepare(model)
    assert names_of(method) != first
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"half fine-tuning, level category, ratio 0.5, seed 11, round {round}" for round in (0, 1)
    ]


def test_a_matrix_that_leaves_loses_its_momentum() -> None:
    model = llama()
    method = prepared(model, reselect="epoch", seed=1)
    optimizer = torch.optim.AdamW(method.parameters(), lr=0.01, weight_decay=0.1)
    assert len(list(method.parameters())) == len(list(model.parameters()))
    method.start(optimizer)
    data = batches(2)
    method.step(model, data[0])
    first = set(names_of(method))
    held = {name for name, p in model.named_parameters() if p in optimizer.state}
    assert held == first
    second = set(method.next_epoch().names)
    assert first - second and second - first
    assert {name for name, p in model.named_parameters() if p in optimizer.state} == first & second
    before = values(model)
    method.step(model, data[1])
    assert changed(model, before) - {"lm_head.weight"} == second
    newcomer = model.get_parameter(min(second - first))
    assert int(optimizer.state[newcomer]["step"]) == 1


def test_stage_keeps_its_half() -> None:
    method = prepared(llama())
    with pytest.raises(RuntimeError, match="reselect='epoch'"):
        method.next_epoch()


# ---- in the Trainer


def trainer(model: nn.Module, folder: Path, method: HalfFineTuning, epochs: int = 3, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        num_train_epochs=epochs,
        learning_rate=0.01,
        weight_decay=0.1,
        save_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    data = [{name: tensor[0] for name, tensor in batch.items()} for batch in batches(6, rows=1)]
    return Trainer(model, arguments, train_dataset=data, callbacks=[method])  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_trainer_moves_the_half_and_saves_a_plain_model(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    before, keys = values(model), model.state_dict().keys()
    method = HalfFineTuning(seed=4, embeddings="freeze")
    run = trainer(model, tmp_path, method, epochs=1)
    masks = mask_of(FAMILIES[family](), names_of(method))
    run.train()
    moved = {name for name, mask in masks.items() if bool(mask.any())}
    assert changed(model, before) == moved
    for name in moved:
        assert torch.equal(model.state_dict()[name] != before[name], masks[name] > 0)
    assert model.state_dict().keys() == keys
    saved = type(model).from_pretrained(tmp_path / "checkpoint-3")
    assert not changed(saved, values(model))


@pytest.mark.parametrize("reselect", ["stage", "epoch"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_resumed_training_is_training_that_was_never_interrupted(family: str, reselect: str, tmp_path: Path) -> None:
    whole = FAMILIES[family]()
    trainer(whole, tmp_path / "whole", HalfFineTuning(reselect=reselect)).train()
    method = HalfFineTuning(reselect=reselect)
    resumed = FAMILIES[family]()
    trainer(resumed, tmp_path / "whole", method).train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-6"))
    assert not changed(resumed, values(whole))
    assert method.report is not None
    assert method.report.round == (2 if reselect == "epoch" else 0)


def test_trainer_draws_another_half_every_epoch(tmp_path: Path) -> None:
    model = llama()
    method = HalfFineTuning(reselect="epoch", seed=3, embeddings="freeze")
    before = values(model)
    trainer(model, tmp_path, method, epochs=4).train()
    expected = set[str]().union(*(prepared_round(method, llama(), round) for round in range(4)))
    assert changed(model, before) - {"lm_head.weight"} == expected
    assert len(expected) > len(names_of(method))


def prepared_round(method: HalfFineTuning, model: nn.Module, round: int) -> set[str]:
    """What a method with the settings of ``method`` trains in this round."""
    other = prepared(model, reselect="epoch", seed=3, embeddings="freeze")
    other.start(torch.optim.SGD(other.parameters()))
    for _ in range(round):
        other.next_epoch()
    return set(names_of(other))


# ---- half reset


@pytest.mark.parametrize("family", FAMILIES)
def test_half_reset_sets_half_of_the_matrices_back(family: str) -> None:
    base, tuned = FAMILIES[family](), FAMILIES[family]()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 1
    before = values(tuned)
    report = half_reset(tuned, base.state_dict(), seed=3)
    masks = mask_of(base, report.names)
    assert 0.4 < report.block_share < 0.6
    for name, mask in masks.items():
        expected = torch.where(mask > 0, base.get_parameter(name), before[name])
        assert torch.equal(tuned.get_parameter(name), expected), name


def test_half_reset_with_another_model_changes_nothing() -> None:
    tuned = llama()
    before = values(tuned)
    with pytest.raises(ValueError, match=r"model\.layers\..* has shape"):
        half_reset(tuned, llama(hidden_size=16).state_dict())
    with pytest.raises(ValueError, match="is missing"):
        half_reset(tuned, {})
    assert not changed(tuned, before)


# ---- what it refuses


def quantized() -> nn.Module:
    model = llama(hidden_size=64)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            model.set_submodule(name, QuantizedLinear.from_linear(module))
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "quantized": (quantized, r"q_proj\.weight is quantized .* train LoRA adapters or sparse deltas"),
    "adapters": (lambda: peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])), "merge_and_unload"),
    "unknown": (
        lambda: build(GPTNeoXForCausalLM, GPTNeoXConfig),
        r"no part is known for gpt_neox\.layers\.0\.attention\.query_key_value\.weight.*level='layer'",
    ),
    "no blocks": (lambda: nn.Sequential(nn.Linear(2, 2, bias=False).float()), "no part is known"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_train_is_an_error_and_the_model_stays_as_it_was(case: str) -> None:
    make, message = REFUSED[case]
    model = make()
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        prepared(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("level", ["layer", "model"])
def test_levels_that_need_no_parts_take_any_model(level: str) -> None:
    report = prepared(build(GPTNeoXForCausalLM, GPTNeoXConfig), level=level).report
    assert report is not None
    assert 0.3 < report.block_share < 0.7


@pytest.mark.parametrize(
    "options",
    [{"ratio": 0.0}, {"level": "row"}, {"balance": "x"}, {"embeddings": "x"}, {"norms": "x"}, {"reselect": 1}],
)
def test_bad_arguments_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"HalfFineTuning: {next(iter(options))} must be"):
        HalfFineTuning(**options)


def test_before_prepare_it_says_what_to_call() -> None:
    method = HalfFineTuning()
    with pytest.raises(RuntimeError, match="call prepare"):
        method.finish()
    with pytest.raises(RuntimeError, match="call prepare"):
        method.start(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
