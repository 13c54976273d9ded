"""CoFiTune: which layers and modules, soft masks on rows, and that gradients are the wrong place for them."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from select_models import batches, build, changed, error, llama, twin, values
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import peftkern
from peftkern.nn import QuantizedLinear
from peftkern.optim import AdamW
from peftkern.select.cofitune import RANGES, CoFiTune, layer_range
from peftkern.select.cofitune_search import cofitune_search
from peftkern.select.unit_importance import UnitImportance, measure_importance


def model_of_four(**changes: Any) -> LlamaForCausalLM:
    return llama(num_hidden_layers=4, **changes)


def prepared(model: nn.Module, **options: Any) -> CoFiTune:
    method = CoFiTune(**options)
    method.prepare(model)
    return method


def names_of(method: CoFiTune) -> tuple[str, ...]:
    assert method.report is not None
    return method.report.names


def importance(fill: Callable[[int], Tensor], heads: int = 4, layers: int = 4) -> UnitImportance:
    """Importances of Llama's units by their number."""
    found: dict[str, Tensor] = {}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        found |= {f"{block}.self_attn:heads": fill(heads), f"{block}:up": fill(48), f"{block}:down": fill(32)}
    return UnitImportance(found)


def ramp(units: int) -> Tensor:
    return torch.linspace(0.0, 1.0, units)


# ---- coarse: layers

TABLE = {
    # name: layers of 32 (7B), of 40 (13B)
    "bottom1": (range(8), range(10)),
    "bottom2": (range(8, 16), range(10, 20)),
    "bottom-plus": (range(16), range(20)),
    "middle": (range(16, 24), range(20, 30)),
    "middle-plus": (range(8, 24), range(10, 30)),
    "top": (range(24, 32), range(30, 40)),
    "top-plus": (range(16, 32), range(20, 40)),
}


@pytest.mark.parametrize("name", RANGES)
def test_layers_of_32_and_40(name: str) -> None:
    assert (layer_range(name, 32), layer_range(name, 40)) == TABLE[name]


def test_layers_of_60() -> None:
    assert layer_range("bottom2", 60) == range(15, 30)


def test_layers_that_four_does_not_divide() -> None:
    quarters = ("bottom1", "bottom2", "middle", "top")
    assert [layer_range(name, 30) for name in quarters] == [range(7), range(7, 15), range(15, 22), range(22, 30)]
    for layers in range(4, 70):
        chosen = [layer_range(name, layers) for name in quarters]
        assert [layer for one in chosen for layer in one] == list(range(layers))
        assert max(map(len, chosen)) - min(map(len, chosen)) <= 1
        assert layer_range("bottom-plus", layers) == range(layers // 2)
        assert layer_range("top-plus", layers) == range(layers // 2, layers)
        assert [*layer_range("middle-plus", layers)] == [*chosen[1], *chosen[2]]


def test_an_empty_range_is_an_error() -> None:
    with pytest.raises(ValueError, match="no layer of a stack of 2 is in 'bottom1'"):
        prepared(llama(), layers="bottom1")
    with pytest.raises(ValueError, match=r"layers must be one of .*'bottom2'.* got 'bottom'"):
        CoFiTune(layers="bottom")


# ---- coarse: what is trained


def test_the_default_is_up_and_down_just_below_the_middle() -> None:
    model = llama(num_hidden_layers=8)
    method = prepared(model)
    expected = {f"model.layers.{layer}.mlp.{role}_proj.weight" for layer in (2, 3) for role in ("up", "down")}
    assert set(names_of(method)) == expected
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected


@pytest.mark.parametrize("modules", ["q", "q,k,v", "down", "v, up", "k+down"])
def test_modules(modules: str) -> None:
    model = model_of_four()
    method = prepared(model, modules=modules, layers="middle-plus")
    roles = [role.strip() for role in modules.replace("+", ",").split(",")]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(names_of(method))
    assert {name.split(".")[-2] for name in trained} == {f"{role}_proj" for role in roles}
    assert {name.split(".")[2] for name in trained} == {"1", "2"}


def test_shares_of_llama_2_7b() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False))  # the default sizes are Llama-2-7B's
    report = prepared(model).report
    assert report is not None
    assert report.blocks == tuple(f"model.layers.{layer}" for layer in range(8, 16))
    # 8 layers, 2 matrices of 4096 by 11008, of 6,738,415,616 parameters
    assert report.share == 8 * 2 * 4096 * 11008 / 6_738_415_616
    assert "bottom2: model.layers.8 to model.layers.15, 8 blocks: 10.7% of all parameters" in str(report)


def test_every_stack_has_quarters_of_its_own() -> None:
    config = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=4, num_decoder_layers=8, num_heads=4)
    model = T5ForConditionalGeneration(config)
    names = names_of(prepared(model, modules="down"))
    assert [name.split(".layer.")[0] for name in names] == ["encoder.block.1", "decoder.block.2", "decoder.block.3"]


def test_modules_that_the_model_does_not_have_are_named() -> None:
    model = build(GPT2LMHeadModel, GPT2Config, num_hidden_layers=4, num_key_value_heads=4)
    del model.transformer.h[1].mlp.c_proj
    with pytest.raises(ValueError, match="no down in bottom2; modules it has there: k, q, up, v"):
        prepared(model)


# ---- search

SCORES = {
    **dict.fromkeys(RANGES, 1.0),
    "middle": 3.0,
    "top": 2.5,
    "q,k,v": 2.0,
    "up,down": 4.0,
    "up": 5.0,
    "down": 4.5,
}


def scored(trials: list[tuple[str, str]]) -> Callable[[str, str], float]:
    def score(layers: str, modules: str) -> float:
        trials.append((layers, modules))
        return SCORES[layers if modules == "q,k,v,up,down" else modules]

    return score


def test_search_takes_the_range_first_and_then_the_modules() -> None:
    trials: list[tuple[str, str]] = []
    result = cofitune_search(scored(trials))
    assert trials == [
        *((layers, "q,k,v,up,down") for layers in RANGES),
        ("middle", "q,k,v"),
        ("middle", "up,down"),
    ]
    assert (result.best.layers, result.best.modules, result.best.score) == ("middle", "up,down", 4.0)
    assert "(best)" in str(result)


def test_search_goes_on_to_single_modules() -> None:
    trials: list[tuple[str, str]] = []
    result = cofitune_search(scored(trials), refine=True)
    assert trials[9:] == [("middle", "up"), ("middle", "down")]
    assert result.best.modules == "up"
    assert len(result.trials) == len(set(trials)) == 11


def test_search_keeps_the_first_of_equals_and_refuses_what_is_no_number() -> None:
    result = cofitune_search(lambda layers, modules: 0.0, refine=True)
    assert (result.best.layers, result.best.modules) == ("bottom1", "q,k,v,up,down")
    with pytest.raises(ValueError, match="is not a number"):
        cofitune_search(lambda layers, modules: float("nan"))


def test_what_search_tries_can_be_trained() -> None:
    def score(layers: str, modules: str) -> float:
        return len(names_of(prepared(model_of_four(), layers=layers, modules=modules)))

    assert cofitune_search(score, refine=True).best.score == 10


# ---- fine: training

EVERY = {"layers": "middle-plus", "modules": "q,k,v,up,down"}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": model_of_four,
    "phi3": lambda: build(
        Phi3ForCausalLM, Phi3Config, num_hidden_layers=4, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0
    ),
    "biases": lambda: model_of_four(attention_bias=True, mlp_bias=True),
}


def run(model: nn.Module, method: CoFiTune, optimizer: Callable[[Any], torch.optim.Optimizer], steps: int = 3) -> None:
    method.prepare(model)
    method.start(optimizer(method.parameters()))
    for batch in batches(steps):
        method.step(model, batch)
    method.finish()


def factors(family: str, name: str, known: UnitImportance) -> Tensor | None:
    """1 - Î of every row of the parameter ``name`` of Llama or Phi-3, or 0 where nothing is trained."""
    found = re.fullmatch(r"model\.layers\.([12])\.(self_attn|mlp)\.(\w+)_proj\.(weight|bias)", name)
    if found is None or found[3] in ("o", "gate"):
        return None
    block = f"model.layers.{found[1]}"
    heads = known.values[f"{block}.self_attn:heads"]
    up, down = known.values[f"{block}:up"], known.values[f"{block}:down"]
    shared = torch.stack([heads[:2].max(), heads[2:].max()])  # two heads have one key
    q, kv = heads.repeat_interleave(8), shared.repeat_interleave(8)
    rows = {
        "q": q,
        "k": kv,
        "v": kv,
        "up": up,
        "down": down,
        "qkv": torch.cat([q, kv, kv]),
        "gate_up": torch.cat([torch.ones(48), up]),
    }
    return 1 - rows[found[3]]


@pytest.mark.parametrize("apply_to", ["update", "gradient"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_is_the_dense_step_times_one_minus_importance(family: str, apply_to: str) -> None:
    """With SGD, for which both are the same. AdamW's first step is lr times a sign, scaled."""
    model = FAMILIES[family]()
    dense, before = twin(model), values(model)
    known = importance(ramp)

    def optimizer(p: Any) -> torch.optim.Optimizer:
        if apply_to == "gradient":
            return torch.optim.SGD(p, lr=0.5)
        return AdamW(p, lr=0.01, weight_decay=0.1)

    run(model, CoFiTune(**EVERY, known=[known], apply_to=apply_to), optimizer, steps=1)
    dense_optimizer = optimizer(dense.parameters())
    dense(**batches(1)[0]).loss.backward()
    dense_optimizer.step()
    for name, parameter in model.named_parameters():
        factor = factors(family, name, known)
        if factor is None:
            assert torch.equal(parameter, before[name]), name
            continue
        update = dense.get_parameter(name) - before[name]
        expected = before[name] + (update.t() * factor).t()
        assert error(parameter, expected) <= 1e-6, name
        assert torch.equal(parameter[factor == 0], before[name][factor == 0]), name
        if family != "phi3":
            assert error(parameter - before[name], (update.t() * factor).t()) <= 1e-4, name


def test_sgd_is_the_dense_update_times_one_minus_importance_bit_for_bit() -> None:
    model, known = model_of_four(), importance(lambda units: torch.arange(units) % 3 / 2)  # 0, 0.5, 1: exact factors
    dense, before = twin(model), values(model)
    run(model, CoFiTune(**EVERY, known=[known], apply_to="gradient"), lambda p: torch.optim.SGD(p, lr=0.5), steps=1)
    dense(**batches(1)[0]).loss.backward()
    for name, parameter in model.named_parameters():
        factor = factors("llama", name, known)
        if factor is not None:
            gradient = dense.get_parameter(name).grad
            assert gradient is not None
            assert torch.equal(parameter, before[name] - 0.5 * factor[:, None] * gradient), name


@pytest.mark.parametrize("apply_to", ["update", "gradient"])
def test_important_rows_never_move(apply_to: str) -> None:
    """With weight decay and momentum where updates are multiplied; a gradient of zero is no protection from decay."""
    model = model_of_four()
    before = values(model)
    decay = 0.1 if apply_to == "update" else 0.0
    method = CoFiTune(**EVERY, known=[importance(lambda units: torch.arange(units) % 2 * 1.0)], apply_to=apply_to)
    run(model, method, lambda p: AdamW(p, lr=0.01, weight_decay=decay), steps=4)
    for name in names_of(method):
        width = 8 if "self_attn" in name else 1
        moved = (model.get_parameter(name) != before[name]).view(-1, width, 32 if "down" not in name else 48)
        important = torch.arange(len(moved)) % 2 == 1
        if "k_proj" in name or "v_proj" in name:  # both share their key with an important head
            important[:] = True
        assert not bool(moved[important].any()), name
        assert bool(moved[~important].any(-1).all()), name


def test_decay_moves_important_rows_where_only_gradients_are_multiplied() -> None:
    model = model_of_four()
    before = values(model)
    method = CoFiTune(known=[importance(torch.ones)], apply_to="gradient")
    run(model, method, lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), steps=2)
    assert changed(model, before) == set(names_of(method))


@pytest.mark.parametrize("apply_to", ["update", "gradient"])
def test_without_importance_it_is_plain_training(apply_to: str) -> None:
    masked, plain, dense = (model_of_four() for _ in range(3))
    known = [importance(torch.zeros)]

    def optimizer(p: Any) -> AdamW:
        return AdamW(p, lr=0.01, weight_decay=0.1)

    run(masked, CoFiTune(**EVERY, known=known, apply_to=apply_to), optimizer)
    run(plain, CoFiTune(**EVERY, apply_to=apply_to), optimizer)
    assert not changed(masked, values(plain))
    trained = names_of(prepared(twin(dense), **EVERY))
    by_hand = optimizer([dense.get_parameter(name) for name in trained])
    for batch in batches(3):
        dense(**batch).loss.backward()
        by_hand.step()
        by_hand.zero_grad()
    assert not changed(masked, values(dense))


# ---- the trap: a constant factor on gradients cancels in Adam


@pytest.mark.parametrize("kind", ["torch", "peftkern"])
def test_constant_factors_on_gradients_do_nothing_under_adam(kind: str) -> None:
    """Half of every gradient for 30 steps, with eps = 0, is the same run to the last bit."""

    def optimizer(p: Any) -> torch.optim.Optimizer:
        return (torch.optim.AdamW if kind == "torch" else AdamW)(p, lr=1e-3, eps=0.0, weight_decay=0.0)

    known = [importance(lambda units: torch.full((units,), 0.5))]
    halved, plain = model_of_four(), model_of_four()
    run(halved, CoFiTune(known=known, apply_to="gradient"), optimizer, steps=30)
    run(plain, CoFiTune(), optimizer, steps=30)
    assert not changed(halved, values(plain))


def test_factors_on_updates_do_what_they_say_under_adam() -> None:
    known = [importance(lambda units: torch.full((units,), 0.5))]
    halved, plain, before = model_of_four(), model_of_four(), values(model_of_four())
    method = CoFiTune(known=known)
    run(halved, method, lambda p: AdamW(p, lr=1e-3, eps=0.0, weight_decay=0.0), steps=30)
    run(plain, CoFiTune(), lambda p: AdamW(p, lr=1e-3, eps=0.0, weight_decay=0.0), steps=30)
    for name in names_of(method):
        way = [(model.get_parameter(name) - before[name]).norm() for model in (halved, plain)]
        assert 0.4 < (way[0] / way[1]).item() < 0.6, name


def test_updates_need_an_optimizer_that_multiplies_them() -> None:
    method = prepared(model_of_four(), known=[importance(ramp)])
    with pytest.raises(TypeError, match=r"needs peftkern\.optim\.AdamW, got AdamW; .*apply_to='gradient'"):
        method.start(torch.optim.AdamW(method.parameters()))


# ---- measuring when it is prepared


@pytest.mark.parametrize("objective", ["kl", "language_modeling"])
def test_importances_are_measured_when_it_is_prepared_and_combined(objective: str) -> None:
    model, data = model_of_four(), batches(2)
    measured = measure_importance(model_of_four(), data, objective, dropout=0.1, seed=3)
    options = {"importance": objective, "dropout": 0.1, "data": data, "seed": 3}
    method = prepared(model, **options)
    assert method.importance is not None
    assert all(torch.equal(value, measured.values[key]) for key, value in method.importance.values.items())
    both = prepared(model_of_four(), **options, known=[importance(ramp)])
    assert both.importance is not None
    for key, value in both.importance.values.items():
        assert torch.equal(value, measured.values[key].maximum(ramp(len(value))))


def test_measured_masks_hold_rows_back() -> None:
    model, before = model_of_four(), values(model_of_four())
    method = CoFiTune(importance="language_modeling", data=batches(2))
    run(model, method, lambda p: AdamW(p, lr=1e-3, eps=0.0, weight_decay=0.0), steps=1)
    assert method.importance is not None
    moved = model.get_parameter("model.layers.1.mlp.up_proj.weight") - before["model.layers.1.mlp.up_proj.weight"]
    # the first step of Adam is lr in every entry
    rows = moved.abs().mean(1) / 1e-3
    assert error(rows, 1 - method.importance.values["model.layers.1:up"]) <= 1e-3
    assert method.report is not None
    assert all(0.2 < row.mean_factor < 0.8 for row in method.report.rows)


# ---- the model afterwards


@pytest.mark.parametrize("family", FAMILIES)
def test_finish_leaves_the_plain_model(family: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="peftkern")
    model = FAMILIES[family]()
    model.lm_head.weight.requires_grad_(False)
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    classes = {name: type(module) for name, module in model.named_modules()}
    method = prepared(model, known=[importance(ramp)])
    optimizer = AdamW(method.parameters())
    method.start(optimizer)
    assert all("scale" in optimizer.state[parameter] for parameter in method.parameters())
    method.prepare(model)  # not finished: nothing happens
    method.finish()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert not any("scale" in state for state in optimizer.state.values())
    assert len(caplog.records) == 1 and "CoFiTune, bottom2" in caplog.records[0].getMessage()


def test_gradients_and_state_exist_for_what_is_trained_alone() -> None:
    model = FAMILIES["phi3"]()
    method = prepared(model)
    optimizer = AdamW(method.parameters())
    method.start(optimizer)
    method.step(model, batches(1)[0])
    held = sum(t.numel() for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
    assert held == 2 * 2 * 48 * 32  # two moments of up and down: the gate, in the same parameter as up, has none


# ---- in the Trainer


def trainer(model: nn.Module, folder: Path, method: CoFiTune, epochs: int = 2, mine: bool = True) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        num_train_epochs=epochs,
        learning_rate=0.01,
        weight_decay=0.1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        save_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    data: Any = [{name: tensor[0] for name, tensor in batch.items()} for batch in batches(6, rows=1)]
    run = Trainer(model, arguments, train_dataset=data, callbacks=[method])
    if mine:
        run.optimizer = AdamW(method.parameters(), lr=0.01, weight_decay=0.1)
    return run


OPTIONS: dict[str, dict[str, Any]] = {
    "coarse": {},
    "update": {"known": [importance(ramp)]},
    "gradient": {"known": [importance(ramp)], "apply_to": "gradient"},
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_trainer_and_plain_loop_train_the_same(family: str, case: str, tmp_path: Path) -> None:
    model, looped = FAMILIES[family](), FAMILIES[family]()
    keys = model.state_dict().keys()
    trainer(model, tmp_path, CoFiTune(**OPTIONS[case]), epochs=1).train()
    method = prepared(looped, **OPTIONS[case])
    method.start(AdamW(method.parameters(), lr=0.01, weight_decay=0.1))
    rows = batches(6, rows=1)
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        method.step(looped, {name: torch.cat([first[name], second[name]]) for name in first})
    method.finish()
    assert not changed(model, values(looped))
    assert model.state_dict().keys() == keys
    assert not changed(type(model).from_pretrained(tmp_path / "checkpoint-3"), values(model))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_resumed_training_is_training_that_was_never_interrupted(family: str, tmp_path: Path) -> None:
    whole, resumed = FAMILIES[family](), FAMILIES[family]()
    trainer(whole, tmp_path, CoFiTune(**OPTIONS["update"])).train()
    run = trainer(resumed, tmp_path, CoFiTune(**OPTIONS["update"]))
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not changed(resumed, values(whole))


# ---- what it refuses


def quantized() -> nn.Module:
    model = model_of_four(hidden_size=64)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            model.set_submodule(name, QuantizedLinear.from_linear(module))
    return model


def gpt2() -> Any:
    return build(GPT2LMHeadModel, GPT2Config, num_hidden_layers=4, num_key_value_heads=4, n_inner=48)


def mixtral() -> Any:
    return build(MixtralForCausalLM, MixtralConfig, num_hidden_layers=4, num_local_experts=3, num_experts_per_tok=2)


def one_head_less(units: int) -> Tensor:
    return ramp(units - 1)


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "quantized": (quantized, {}, r"CoFiTune: .*q_proj\.weight is quantized .* train LoRA adapters or sparse deltas"),
    "adapters": (
        lambda: peft.get_peft_model(model_of_four(), peft.LoraConfig(target_modules=["q_proj"])),
        {},
        "merge_and_unload",
    ),
    "no blocks": (lambda: nn.Sequential(nn.Linear(2, 2)), {}, "found no blocks"),
    "unknown units": (
        model_of_four,
        {"known": [UnitImportance({})]},
        r"importance of model\.layers\.1:up is not known",
    ),
    "other units": (model_of_four, {"known": [importance(one_head_less)]}, "belongs to 48 up, and the .* is of 47"),
    "columns": (
        gpt2,
        {"importance": "kl", "data": batches(1)},
        r"h\.1\.mlp\.c_fc has its outputs in columns.*apply_to='gradient'",
    ),
    "experts": (mixtral, {"importance": "kl", "data": batches(1)}, "several experts .*importance='none' trains them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_train_is_an_error_and_the_model_stays_as_it_was(case: str) -> None:
    make, options, message = REFUSED[case]
    model = make()
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    method = CoFiTune(**options)
    with pytest.raises(ValueError, match=message):
        method.prepare(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked
    assert [type(module) for module in model.modules()] == classes
    assert method.model is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_experts_train_without_soft_masks() -> None:
    model = mixtral()
    before = values(model)
    method = CoFiTune()
    run(model, method, lambda p: AdamW(p, lr=0.01), steps=1)
    experts = "model.layers.1.mlp.experts"
    assert changed(model, before) == {f"{experts}.gate_up_proj", f"{experts}.down_proj"}
    gate, up = (model.get_parameter(f"{experts}.gate_up_proj") != before[f"{experts}.gate_up_proj"]).chunk(2, dim=1)
    assert not bool(gate.any()) and bool(up.any())


def test_columns_of_conv1d_have_their_gradients_multiplied() -> None:
    model = gpt2()
    before = values(model)
    measured = measure_importance(gpt2(), batches(1))
    ones = UnitImportance({key: (torch.arange(len(v)) % 2).float() for key, v in measured.values.items()})
    options: dict[str, Any] = {"known": [ones], "apply_to": "gradient", "modules": "q,k,v,up,down"}
    run(model, CoFiTune(**options), lambda p: torch.optim.SGD(p, lr=0.5), steps=1)
    for name, width in (("attn.c_attn", 8), ("mlp.c_fc", 1), ("mlp.c_proj", 1)):
        for own in ("weight", "bias"):
            full = f"transformer.h.1.{name}.{own}"
            moved = (model.get_parameter(full) != before[full]).reshape(-1, model.get_parameter(full).shape[-1])
            heads = moved.any(0).view(-1, width)
            assert not bool(heads[1::2].any()), full
            assert bool(heads[::2].any()), full


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules": "up,gate"}, "modules must be some of q, k, v, up, down.*got 'up,gate'"),
        ({"modules": "up,up"}, "each once"),
        ({"modules": ""}, "modules must be some of"),
        ({"importance": "x"}, "importance must be one of"),
        ({"importance": "kl"}, "measured on data"),
        ({"importance": "kl", "data": [], "dropout": 0.0}, "dropout must be between 0 and 1.*both passes are equal"),
        ({"apply_to": "weights"}, "apply_to must be 'update' or 'gradient'"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"CoFiTune: .*{message}"):
        CoFiTune(**options)


def test_options_are_plain_and_documented() -> None:
    parameters = inspect.signature(CoFiTune).parameters
    assert CoFiTune.__doc__ is not None
    assert all(f"\n        {name}: " in CoFiTune.__doc__ for name in parameters)
    assert peftkern.select.CoFiTune is CoFiTune
