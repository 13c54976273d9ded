"""Plans by layer: what a deep model takes under one, and the one of least time for a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from random import Random
from typing import Any

import pytest
from plan_models import llama

import peftkern
from peftkern.bench.plan_accuracy import build_real
from peftkern.plan import Plan, PlanError, predict, search
from peftkern.plan.devices import find
from peftkern.plan.layers import DEPTH, Layers, WordCosts
from peftkern.plan.memory import PARTS, Parts
from peftkern.plan.predict import Predictor
from peftkern.plan.work import Work

CALL: Mapping[str, Any] = {"batch": 2, "length": 64, "logits": False, "optimizer": "AdamW8bit", "device": "l4"}
DENSE_ENDS = search.Freedom(frozenset({"embeddings", "head"}))
MIXED = ("layer", "layer", "store", "mlp", "layer", "up", "store", "mlp")


def test_a_deep_model_follows_from_short_ones_of_one_word(monkeypatch: pytest.MonkeyPatch) -> None:
    call = {**CALL, "recompute": MIXED, "logits": True}
    followed = peftkern.plan(llama(num_hidden_layers=8), **call)
    monkeypatch.setattr(predict, "SHALLOW", 8)
    whole = peftkern.plan(llama(num_hidden_layers=8), **call)
    assert followed.parts == pytest.approx(whole.parts, rel=1e-3)
    assert followed.peak == pytest.approx(whole.peak, rel=1e-4)
    assert followed.flops == pytest.approx(whole.flops)
    assert followed.seconds == pytest.approx(whole.seconds)


def test_blocks_make_one_product_again_or_two() -> None:
    flops = {word: peftkern.plan(llama(), **{**CALL, "recompute": word}).flops for word in (None, "up", "mlp")}
    product = 2 * 2 * 64 * (192 * 576 + 16 * (192 + 576))
    extra = [(flops[word] - flops[None]) / (2 * product) for word in ("up", "mlp")]
    assert extra == pytest.approx([1, 2], rel=0.02)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(llama(num_hidden_layers=8), find("l4"))


@pytest.fixture(scope="module")
def stored() -> Plan:
    return peftkern.plan(llama(num_hidden_layers=8), **CALL)


def test_the_plan_of_least_time_within_a_budget(predictor: Predictor, stored: Plan) -> None:
    layers = predictor.layers(stored.options)
    assert layers is not None and set(layers.costs) == {"store", "up", "mlp", "layer"}
    least = predictor.total(replace(stored.options, recompute=layers.smallest()))
    most = predictor.total(stored.options)
    extra = []
    for share in (0.0, 0.3, 0.6, 0.95):
        budget = 1.0001 * (least + share * (most - least))
        options = search.fit(predictor, stored.options, budget, False, False, DENSE_ENDS)
        found = predictor.plan(options).within(budget)
        assert found.fits and isinstance(found.options.recompute, tuple)
        extra.append(found.seconds - stored.seconds)
    assert extra == sorted(extra, reverse=True) and extra[-1] > 0
    with pytest.raises(PlanError, match=r"the smallest for 2 x 64 tokens is 0\.\d+ GB with layers 0-\d: layer"):
        search.fit(predictor, stored.options, 0.998 * least, False, False, DENSE_ENDS)


def test_its_line_of_python_patches_a_model_so(stored: Plan) -> None:
    plan = replace(stored, options=replace(stored.options, recompute=("layer", "mlp", "mlp", "store")))
    assert plan.patch_call == (
        'peftkern.patch(model, logits=False, recompute=["layer"] * 1 + ["mlp"] * 2 + ["store"] * 1)'
    )
    assert "layers 0: layer, 1-2: mlp, 3: store" in plan.title
    model = build_real(llama(num_hidden_layers=4), {"patched": False})
    report = eval(plan.patch_call, {"peftkern": peftkern, "model": model})
    assert report.layers == plan.options.recompute
    assert stored.patch_call == "peftkern.patch(model, logits=False)"
    assert str(plan).endswith(plan.patch_call)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"recompute": ["layer"]}, "recompute has 1 words, and .*layers has 2 layers"),
        ({"recompute": ["layer", "int8"]}, "the word for a layer must be one of 'layer', .*; got 'int8'"),
        ({"recompute": ["layer", "store"], "gradient_checkpointing": True}, "'layer' is what gradient_checkpointing"),
        ({"recompute": ["layer", "store"], "patched": False}, "leave patched=True"),
    ],
)
def test_refusals(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        peftkern.plan(llama(), **{**CALL, "logits": True, **arguments})


# ---- the search alone


def parts(random: Random, size: float) -> Parts:
    return {**dict.fromkeys(PARTS, 0.0), "activations": size * (0.5 + random.random())}


def invented_layers(seed: int, count: int) -> Layers:
    """Costs without any meaning."""
    random = Random(seed)
    costs = {}
    for word, keeps, room, seconds in (("store", 10.0, 1.0, 1.0), ("mlp", 5.0, 4.0, 1.2), ("layer", 1.0, 12.0, 1.5)):
        begin, ends = dict.fromkeys(PARTS, 100.0), {"loss": parts(random, 5.0)}
        kept, forward, backward = (
            tuple(parts(random, size) for _ in range(DEPTH)) for size in (keeps, room, room + random.random())
        )
        costs[word] = WordCosts(begin, kept, forward, backward, ends, Work(0, 0, 0, DEPTH * seconds, 0))
    zero = dict.fromkeys(PARTS, 0.0)
    return Layers(count, costs, zero, {**zero, "gradients": 4 * random.random()}, Work(0, 0, 0, DEPTH - 1.0, 0))


@pytest.mark.parametrize("seed", range(6))
def test_no_other_plan_takes_less_time(seed: int) -> None:
    layers = invented_layers(seed, 6)
    every = {plan: layers.peak(plan) for plan in product(layers.costs, repeat=6)}
    seconds = {plan: layers.work(plan).seconds for plan in every}
    least = min(every.values())
    for highest in (least * 0.999, least, *sorted(every.values())[:: len(every) // 9]):
        room = highest + 1e-6
        fitting = [plan for plan, peak in every.items() if peak <= room]
        found = layers.cheapest(room)
        assert (found is None) == (not fitting)
        if found is not None:
            assert found in fitting
            assert seconds[found] == pytest.approx(min(seconds[plan] for plan in fitting))
    assert layers.peak(layers.smallest()) == pytest.approx(least, rel=1e-3)
