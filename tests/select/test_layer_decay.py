"""Learning rates layer by layer, and top layers that begin anew."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from select_models import batches, build, changed, llama, values
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from peftkern.optim import AdamW
from peftkern.select.layer_decay import layer_decay_groups, reinit_top
from peftkern.select.presets import FreezeLower


def rates(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, float]:
    by_id = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    return {name: by_id[id(parameter)] for name, parameter in model.named_parameters()}


def expected(model: nn.Module, lr: float, decay: float, layers: int) -> dict[str, float]:
    def distance(name: str) -> int:
        if "embed" in name:
            return layers
        return layers - 1 - int(name.split("layers.")[1].split(".")[0]) if "layers." in name else 0

    return {name: lr * decay ** distance(name) for name, _ in model.named_parameters()}


def test_rates_are_exact() -> None:
    model = llama(num_hidden_layers=4, tie_word_embeddings=False)
    groups = layer_decay_groups(model, 0.1, 0.5)
    assert rates(model, groups) == expected(model, 0.1, 0.5, 4)
    # by hand
    assert rates(model, groups)["model.layers.3.mlp.up_proj.weight"] == 0.1
    assert rates(model, groups)["model.layers.1.mlp.up_proj.weight"] == 0.025
    assert rates(model, groups)["model.embed_tokens.weight"] == 0.00625
    assert rates(model, groups)["lm_head.weight"] == 0.1


def test_biases_and_norms_do_not_decay() -> None:
    model = build(BertForSequenceClassification, BertConfig, num_labels=2)
    for group in layer_decay_groups(model, 0.1, 0.9, weight_decay=0.3):
        assert {parameter.dim() > 1 for parameter in group["params"]} == {group["weight_decay"] == 0.3}
    assert rates(model, layer_decay_groups(model, 0.1, 0.9))["bert.embeddings.LayerNorm.weight"] == 0.1 * 0.9**2


def test_an_encoder_and_a_decoder_count_their_own_blocks() -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
    model = build(T5ForConditionalGeneration, T5Config, **sizes)
    found = rates(model, layer_decay_groups(model, 1.0, 0.5))
    assert found["encoder.block.1.layer.0.SelfAttention.q.weight"] == 1.0
    assert found["encoder.block.0.layer.0.SelfAttention.q.weight"] == 0.5
    assert found["decoder.block.0.layer.0.SelfAttention.q.weight"] == 0.25
    assert found["shared.weight"] == 0.125


@pytest.mark.parametrize("interrupted", [False, True], ids=["at once", "resumed"])
def test_rates_stay_exact_under_a_scheduler_and_after_resume(interrupted: bool) -> None:
    model = llama(num_hidden_layers=4, tie_word_embeddings=False)

    def begin() -> tuple[FreezeLower, AdamW, Any]:
        policy = FreezeLower(2)
        policy.prepare(model)
        optimizer = AdamW(layer_decay_groups(model, 0.1, 0.5))
        return policy, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    policy, optimizer, scheduler = begin()
    policy.start(optimizer)
    for index, batch in enumerate(batches(6)):
        if interrupted and index == 3:
            states = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
            policy.finish()
            policy, optimizer, scheduler = begin()
            optimizer.load_state_dict(states[0])
            scheduler.load_state_dict(states[1])
            policy.start(optimizer)
        policy.step(model, batch)
        scheduler.step()
        scale = 1 / (2 + index)
        wanted = {name: rate * scale for name, rate in expected(model, 0.1, 0.5, 4).items()}
        assert rates(model, optimizer.param_groups) == pytest.approx(wanted, rel=1e-15)


def test_a_step_of_sgd_is_scaled_by_each_rate() -> None:
    model = llama(num_hidden_layers=3, tie_word_embeddings=False)
    optimizer = torch.optim.SGD(layer_decay_groups(model, 0.1, 0.5))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(**batches(1)[0]).loss.backward()
    optimizer.step()
    for name, rate in expected(model, 0.1, 0.5, 3).items():
        parameter = model.get_parameter(name)
        assert parameter.grad is not None
        assert torch.equal(parameter, before[name].sub(parameter.grad, alpha=rate)), name


@pytest.mark.parametrize("decay", [0.0, 1.1])
def test_a_wrong_decay_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must be above 0"):
        layer_decay_groups(llama(), 0.1, decay)


# ---- new top layers


def test_the_top_layers_begin_anew_and_nothing_else_does() -> None:
    model = llama(num_hidden_layers=4)
    for module in model.modules():  # as after from_pretrained
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    with torch.no_grad():
        model.model.layers[3].input_layernorm.weight.fill_(3.0)
    before, random_numbers = values(model), torch.get_rng_state()
    names = reinit_top(model, 2, seed=7)
    assert set(names) == {name for name, _ in model.named_parameters() if "layers.2." in name or "layers.3." in name}
    matrices_and_changed_norm = {n for n in names if "norm" not in n} | {"model.layers.3.input_layernorm.weight"}
    assert changed(model, before) == matrices_and_changed_norm
    assert model.model.layers[3].input_layernorm.weight.unique().tolist() == [1.0]
    spread = model.model.layers[3].mlp.up_proj.weight.std().item()
    assert spread == pytest.approx(model.config.initializer_range, rel=0.1)
    assert torch.equal(torch.get_rng_state(), random_numbers)


def test_the_seed_decides_the_new_weights() -> None:
    models = [llama(), llama(), llama()]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        reinit_top(model, 1, seed=seed)
    assert changed(models[0], values(models[1])) == set()
    assert changed(models[0], values(models[2])) != set()


def test_what_cannot_begin_anew_is_refused() -> None:
    with pytest.raises(ValueError, match="from 1 to 2, the model's blocks; got 3"):
        reinit_top(llama(), 3)
    plain = nn.Module()
    plain.layers = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(TypeError, match="has no _init_weights"):
        reinit_top(plain, 1)
