"""Importance of units: the gradients of masks that do not exist, and what they are made into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from select_models import batches, build, changed, error, llama, values
from torch import Tensor, nn
from torch.func import functional_call
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, Phi3Config, Phi3ForCausalLM

import peftkern
from peftkern.select import unit_importance
from peftkern.select.unit_importance import UnitImportance, measure_importance, standardised

ATTENTION, MLP = "model.layers.{}.self_attn", "model.layers.{}.mlp"


def raw(monkeypatch: pytest.MonkeyPatch, model: nn.Module, data: Any, *args: Any, **options: Any) -> dict[str, Tensor]:
    """What is standardised, by key: the sums over batches by tokens."""
    monkeypatch.setattr(unit_importance, "standardised", lambda x: x)
    return dict(measure_importance(model, data, *args, **options).values)


def masked_loss(model: nn.Module, batch: dict[str, Tensor], masks: dict[str, Tensor]) -> Tensor:
    """The loss with masks multiplied into the weights: rows of up and down, columns of the output projection."""
    weights = dict(model.named_parameters())
    head_size = 32 // 4
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        columns = masks[f"{attention}:heads"].repeat_interleave(head_size)
        weights[f"{attention}.o_proj.weight"] = weights[f"{attention}.o_proj.weight"] * columns
        for units in ("up", "down"):
            name = f"{mlp}.{units}_proj.weight"
            weights[name] = weights[name] * masks[f"model.layers.{layer}:{units}"][:, None]
    logits = functional_call(model, weights, kwargs=dict(batch), tie_weights=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def ones() -> dict[str, Tensor]:
    sizes = {"self_attn:heads": 4}
    keys = {f"model.layers.{layer}.{key}": size for layer in range(2) for key, size in sizes.items()}
    keys |= {f"model.layers.{layer}:{u}": size for layer in range(2) for u, size in (("up", 48), ("down", 32))}
    return {key: torch.ones(size, requires_grad=True) for key, size in keys.items()}


def test_gradients_are_those_of_masks_in_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = llama(), batches(1)[0]
    found = raw(monkeypatch, model, [batch], "language_modeling")
    masks = ones()
    assert found.keys() == masks.keys()
    gradients = torch.autograd.grad(masked_loss(model, batch, masks), list(masks.values()))
    for key, gradient in zip(masks, gradients, strict=True):
        assert error(found[key], gradient.abs()) <= 1e-5, key


def test_gradients_are_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, step = llama(), batches(1)[0], 1e-3
    found = raw(monkeypatch, model, [batch], "language_modeling")
    exact = llama().double()
    for key in found:
        for unit in (0, 3):
            losses = []
            for sign in (1, -1):
                masks = {name: mask.detach().double() for name, mask in ones().items()}
                masks[key][unit] += sign * step
                with torch.no_grad():
                    losses.append(float(masked_loss(exact, batch, masks)))
            slope = abs(losses[0] - losses[1]) / (2 * step)
            assert abs(float(found[key][unit]) - slope) <= 1e-5 + 1e-3 * slope, (key, unit)


def test_batches_count_by_their_labelled_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = batches(1, tokens=9)[0], batches(1, tokens=5, seed=8)[0]
    both = raw(monkeypatch, llama(), [long, short], "language_modeling")
    alone = [raw(monkeypatch, llama(), [batch], "language_modeling") for batch in (long, short)]
    for key, value in both.items():
        assert error(value, (alone[0][key] * 18 + alone[1][key] * 10) / 28) <= 1e-6


def test_the_divergence_is_summed_with_its_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    found = raw(monkeypatch, llama(), batches(4), "kl", 0.1)
    for key, value in found.items():
        if not key.endswith("heads"):  # of these there are too few for both signs
            assert bool((value > 0).any()) and bool((value < 0).any()), key


def test_the_divergence_is_between_two_passes_with_dropout_behind_every_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of it again, with masks and dropout in the modules' own code."""
    model, batch = llama(), batches(1)[0]
    found = raw(monkeypatch, model, [batch], "kl", 0.2, seed=5)
    masks = ones()

    def put(module: nn.Module, key: str, before: bool) -> Any:
        mask = masks[key].repeat_interleave(8) if before else masks[key]
        if before:
            return module.register_forward_pre_hook(lambda _m, inputs: (F.dropout(inputs[0] * mask, 0.2),))
        return module.register_forward_hook(lambda _m, _i, output: F.dropout(output * mask, 0.2))

    for layer, block in enumerate(model.model.layers):
        put(block.self_attn.o_proj, f"model.layers.{layer}.self_attn:heads", True)
        put(block.mlp.up_proj, f"model.layers.{layer}:up", False)
        put(block.mlp.down_proj, f"model.layers.{layer}:down", False)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first, second = (model(input_ids=batch["input_ids"]).logits for _ in range(2))
    loss = 0.1 * F.kl_div(first.log_softmax(-1), second.softmax(-1), reduction="batchmean")
    gradients = torch.autograd.grad(loss, list(masks.values()))
    for key, gradient in zip(masks, gradients, strict=True):
        assert error(found[key], gradient / 14) <= 1e-5, key


def test_padding_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batches(1)[0]
    attention = torch.ones_like(batch["input_ids"])
    attention[0, 4:] = 0
    filled = {**batch, "attention_mask": attention}
    other = {**filled, "input_ids": batch["input_ids"].where(attention > 0, torch.tensor(7))}
    first, second = (raw(monkeypatch, llama(), [each], "kl", 0.1) for each in (filled, other))
    for key, value in first.items():
        assert error(value, second[key]) <= 1e-5


def test_the_same_seed_measures_the_same_and_disturbs_no_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, second, other = (measure_importance(llama(), batches(2), seed=seed) for seed in (4, 4, 5))
    torch.manual_seed(3)
    measure_importance(llama_without_seeding(), batches(2))
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(value, second.values[key]) for key, value in first.values.items())
    assert any(not torch.equal(value, other.values[key]) for key, value in first.values.items())


def llama_without_seeding() -> nn.Module:
    with torch.random.fork_rng():
        return llama()


def test_the_model_is_as_before() -> None:
    model = llama()
    model.eval()
    model.model.layers[0].mlp.train()
    model.lm_head.weight.requires_grad_(False)
    before, names = values(model), [name for name, _ in model.named_parameters()]
    modes = [module.training for module in model.modules()]
    asked = [parameter.requires_grad for parameter in model.parameters()]
    measure_importance(model, batches(1))
    assert not changed(model, before)
    assert [name for name, _ in model.named_parameters()] == names
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_failure_leaves_the_model_as_before() -> None:
    model = llama()
    with pytest.raises(ValueError, match="must have labels"):
        measure_importance(model, [{"input_ids": batches(1)[0]["input_ids"]}], "language_modeling")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ---- families


def phi3() -> Any:
    return build(Phi3ForCausalLM, Phi3Config, rms_norm_eps=1e-6, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0)


def gpt2() -> Any:
    return build(
        GPT2LMHeadModel, GPT2Config, num_key_value_heads=4, n_inner=48, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )


def test_fused_matrices_have_the_importance_of_separate_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = llama(tie_word_embeddings=False), phi3()
    state = fused.state_dict()
    for name, tensor in plain.state_dict().items():
        if name in state:
            state[name] = tensor
    for layer in range(2):
        attention, mlp = plain.model.layers[layer].self_attn, plain.model.layers[layer].mlp
        qkv = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        state[f"model.layers.{layer}.self_attn.qkv_proj.weight"] = torch.cat(qkv)
        both = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        state[f"model.layers.{layer}.mlp.gate_up_proj.weight"] = both
    fused.load_state_dict(state)
    expected = raw(monkeypatch, plain, batches(2), "language_modeling")
    found = raw(monkeypatch, fused, batches(2), "language_modeling")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert error(found[key], value) <= 1e-4, key


@pytest.mark.parametrize("objective", ["kl", "language_modeling"])
@pytest.mark.parametrize("make", [phi3, gpt2])
def test_other_families(make: Callable[[], Any], objective: str) -> None:
    found = measure_importance(make(), batches(1), objective, dropout=0.1)
    sizes = sorted((key.rpartition(":")[2], len(value)) for key, value in found.values.items())
    assert sizes == [("down", 32)] * 2 + [("heads", 4)] * 2 + [("up", 48)] * 2


def test_patched_blocks_have_the_same_importance(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    expected = raw(monkeypatch, model, batches(1), "language_modeling")
    peftkern.patch(model, kernels="reference", strict=True)
    found = raw(monkeypatch, model, batches(1), "language_modeling")
    for key, value in expected.items():
        assert error(found[key], value) <= 1e-5, key


def test_gradient_checkpointing_sees_the_same_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    expected = raw(monkeypatch, model, batches(1), "kl", 0.1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = raw(monkeypatch, model, batches(1), "kl", 0.1)
    for key, value in expected.items():
        assert error(found[key], value) <= 1e-5, key


def test_experts_in_one_parameter_are_out_of_reach() -> None:
    model = build(MixtralForCausalLM, MixtralConfig, num_local_experts=3, num_experts_per_tok=2)
    with pytest.raises(ValueError, match="several experts in one parameter"):
        measure_importance(model, batches(1))


# ---- from sums to importances


def test_standardised_by_hand() -> None:
    # mean 2, standard deviation of a sample 1; tanh(1) = 0.761594
    assert torch.allclose(standardised(torch.tensor([1.0, 2.0, 3.0])), torch.tensor([0.761594, 0.0, 0.761594]))
    # mean 1, standard deviation 2; tanh(0.5) = 0.462117, tanh(1.5) = 0.905148
    raw = torch.tensor([0.0, 0.0, 0.0, 4.0])
    assert torch.allclose(standardised(raw), torch.tensor([0.462117, 0.462117, 0.462117, 0.905148]))
    assert torch.equal(standardised(torch.full((3,), 7.0)), torch.zeros(3))
    assert torch.equal(standardised(torch.ones(1)), torch.zeros(1))


def test_layers_are_standardised_each_by_itself() -> None:
    found = measure_importance(llama(), batches(2), "language_modeling")
    scaled = llama()
    with torch.no_grad():  # the same function with larger gradients of the masks of one layer is not to be had; a
        scaled.model.layers[0].mlp.up_proj.weight *= 2  # layer whose up projection doubles and down projection halves
        scaled.model.layers[0].mlp.down_proj.weight /= 2  # computes the same, and so do all masks
    again = measure_importance(scaled, batches(2), "language_modeling")
    for key, value in found.values.items():
        assert error(again.values[key], value) <= 1e-3
        assert bool((value >= 0).all()) and bool((value < 1).all())
        assert float(value.max()) > 0.5


def test_several_are_combined_by_their_maximum(tmp_path: Path) -> None:
    first = UnitImportance({"a:up": torch.tensor([0.1, 0.9])})
    second = UnitImportance({"a:up": torch.tensor([0.4, 0.2])})
    both = first.combined(second)
    assert torch.equal(both.values["a:up"], torch.tensor([0.4, 0.9]))
    both.save(tmp_path / "importance.safetensors")
    assert torch.equal(UnitImportance.load(tmp_path / "importance.safetensors").values["a:up"], both.values["a:up"])
    with pytest.raises(ValueError, match="different units"):
        first.combined(UnitImportance({"a:up": torch.zeros(3)}))


def test_other_files_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match=r"UnitImportance\.load"):
        UnitImportance.load(path)
    UnitImportance({"a:up": torch.tensor([0.1, 1.5])}).save(path)
    with pytest.raises(ValueError, match=r"a:up must be \[units\] float32 from 0 to 1"):
        UnitImportance.load(path)
    with pytest.raises(FileNotFoundError):
        UnitImportance.load(tmp_path / "none")


# ---- what it refuses


@pytest.mark.parametrize("dropout", [0.0, 1.0, -0.1, float("nan")])
def test_without_dropout_the_passes_are_equal_and_it_says_so(dropout: float) -> None:
    with pytest.raises(ValueError, match=r"dropout must be between 0 and 1.*no gradient.*language_modeling"):
        measure_importance(llama(), batches(1), "kl", dropout)


def test_without_dropout_the_gradient_would_be_zero() -> None:
    model, batch = llama(), batches(1)[0]
    gradients, _ = unit_importance._kl_gradients(model, unit_importance._find_sites(model), batch, dropout=0.0)
    assert max(float(g.abs().max()) for g in gradients.values()) <= 1e-7
    gradients, _ = unit_importance._kl_gradients(model, unit_importance._find_sites(model), batch, dropout=0.003)
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-7


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="importance must be one of"):
        measure_importance(llama(), batches(1), "entropy")
    with pytest.raises(ValueError, match="at least one batch"):
        measure_importance(llama(), [])
    with pytest.raises(ValueError, match="found no blocks"):
        measure_importance(nn.Sequential(nn.Linear(2, 2)), batches(1))


def test_a_layer_that_is_not_called_has_no_importance() -> None:
    model = llama()
    model.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(RuntimeError, match=r"model\.layers\.1:up has no gradient"):
        measure_importance(model, batches(1))
