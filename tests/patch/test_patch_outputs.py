"""A patched model computes what it computed before."""

from __future__ import annotations

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patch_models import (
    BASES,
    DEEP,
    OTHERS,
    TOLERANCE,
    assert_same_run,
    bert,
    error,
    fused_modules,
    llama,
    lora,
    run,
    text,
    twin,
)
from torch import nn

from peftkern.patch import patch
from peftkern.patch.verification import TOLERANCES


@pytest.mark.parametrize("base", BASES)
def test_forward_and_backward_agree(base: str) -> None:
    model = lora(llama(base))
    expected = run(model, text())
    report = patch(model, strict=True)
    assert report.counts["fused"] == 16 + OTHERS
    assert_same_run(model, text(), expected)


@pytest.mark.parametrize("base", BASES)
def test_outputs_may_be_modified_in_place(base: str) -> None:
    model = lora(llama(base))
    patch(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    for modify in (lambda y: y.mul_(2), lambda y: y.view(-1, 192).add_(1), lambda y: y[0].zero_()):
        output = layer(torch.randn(2, 3, 64))
        modify(output)
        output.sum().backward()


def test_bert_with_biases_and_another_head() -> None:
    model = lora(bert(), target_modules=["query", "value", "dense"], task_type="SEQ_CLS")
    batch = {"input_ids": text()["input_ids"], "labels": torch.tensor([0, 1])}
    expected = run(model, batch)
    report = patch(model)
    assert report.counts["fused"] > 0
    assert_same_run(model, batch, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", ["dense", "bnb-nf4", "nf4"])
def test_half_precision_models_keep_their_dtype(base: str, dtype: torch.dtype) -> None:
    model = lora(llama(base, dtype=dtype))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 5, 64, dtype=dtype)
    expected = layer(x)
    patch(model)
    actual = layer(x)
    assert actual.dtype == expected.dtype == dtype
    assert error(actual, expected) <= TOLERANCES[dtype]


@pytest.mark.parametrize("base", ["dense", "bnb-nf4", "bnb-int8", "nf4"])
def test_autocast_gives_the_same_dtypes(base: str) -> None:
    model = lora(llama(base))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        patch(model)
        actual = layer(x)
    assert actual.dtype == expected.dtype
    assert error(actual, expected) <= TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_evaluation_mode_drops_nothing(base: str) -> None:
    model = lora(llama(base), lora_dropout=0.5).eval()
    expected = model(**text()).logits
    patch(model)
    assert error(model(**text()).logits, expected) <= DEEP


def test_int8_evaluation_is_closer_to_the_weights_than_bitsandbytes() -> None:
    model = lora(llama("bnb-int8")).eval()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)
    weight = layer.base_layer.weight
    dense = weight.data.double() * weight.SCB.double()[:, None] / 127
    adapter = layer.scaling["default"] * layer.lora_B.default.weight.double() @ layer.lora_A.default.weight.double()
    exact = x.double() @ (dense + adapter).T
    rounded = twin(layer)(x)
    patch(model)
    assert error(layer(x), exact) <= TOLERANCES[torch.float32]
    assert error(rounded, exact) > 1e-4


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_dropout_in_training_is_pefts_distribution(base: str) -> None:
    model = lora(llama(base), lora_dropout=0.25, r=64, lora_alpha=64)
    patch(model, strict=True)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.eye(64))
        layer.lora_B["default"].weight.copy_(torch.eye(64))
        x = torch.ones(4000, 64)
        alone = layer.base_layer(x)
        dropped = layer(x) - alone
    kept = dropped > 0.5
    assert torch.allclose(dropped[kept], torch.tensor(1 / 0.75), atol=1e-4)
    assert dropped[~kept].abs().max() < 1e-4
    rate = kept.double().mean().item()
    assert abs(rate - 0.75) < 5 * (0.75 * 0.25 / dropped.numel()) ** 0.5
    columns = kept.double().mean(0)
    assert (columns - 0.75).abs().max() < 6 * (0.75 * 0.25 / len(x)) ** 0.5


def test_each_layer_and_adapter_has_its_own_mask() -> None:
    model = lora(llama(), lora_dropout=0.5, r=64, lora_alpha=64)
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    patch(model, strict=True)
    decoder = model.base_model.model.model.layers
    layers = [decoder[0].self_attn.q_proj, decoder[1].mlp.up_proj]
    masks = []
    for layer in layers:
        for name in ("default", "second"):
            with torch.no_grad():
                layer.lora_A[name].weight.copy_(torch.eye(64))
                layer.lora_B[name].weight.zero_()
                layer.lora_B[name].weight[:, :].fill_diagonal_(1.0 if name == "default" else 100.0)
        x = torch.ones(50, 64)
        with torch.no_grad():
            added = (layer(x) - layer.base_layer(x))[:, :64].round()  # 2 from the first adapter, 200 from the second
        masks += [added % 100 == 2, added >= 200]
    for i, mask in enumerate(masks):
        assert 0.4 < mask.double().mean() < 0.6
        for other in masks[:i]:
            assert 0.4 < (mask == other).double().mean() < 0.6


def test_dropout_follows_the_seed() -> None:
    model = lora(llama("nf4"), lora_dropout=0.5)
    patch(model)
    outputs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outputs.append(model(**text()).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


ADAPTER = st.fixed_dictionaries(
    {
        "r": st.integers(1, 9),
        "lora_alpha": st.integers(1, 20),
        "use_rslora": st.booleans(),
        "lora_bias": st.booleans(),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    leading=st.lists(st.integers(0, 4), max_size=3),
    adapters=st.lists(ADAPTER, min_size=1, max_size=3),
    bias=st.booleans(),
    transposed=st.booleans(),
    data=st.data(),
)
def test_any_layer_with_any_adapters(
    sizes: tuple[int, int],
    leading: list[int],
    adapters: list[dict[str, object]],
    bias: bool,
    transposed: bool,
    data: st.DataObject,
) -> None:
    torch.manual_seed(0)
    in_features, out_features = sizes
    inner = nn.Sequential(nn.Linear(in_features, out_features, bias=bias))
    configs = [peft.LoraConfig(target_modules=["0"], init_lora_weights=False, **options) for options in adapters]
    model = peft.get_peft_model(inner, configs[0], adapter_name="0")
    for name, config in enumerate(configs[1:], start=1):
        model.add_adapter(str(name), config)
    active = data.draw(st.permutations(range(len(configs))))[: data.draw(st.integers(1, len(configs)))]
    model.base_model.set_adapter([str(name) for name in active])
    # Positive numbers leave no sum to cancel, so that a relative bound holds for single numbers too.
    for parameter in model.parameters():
        parameter.data.abs_()
    x = torch.rand(*leading, in_features, dtype=torch.float64)
    x = x.mT.contiguous().mT if transposed and x.dim() > 1 else x
    grad = torch.rand(*leading, out_features, dtype=torch.float64)

    def results(model: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
        model = model.to(dtype)
        input = x.to(dtype, copy=True).requires_grad_()
        output = model(input)
        output.backward(grad.to(dtype))
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return [output.detach(), input.grad, *gradients]

    expected = results(twin(model), torch.float64)
    patch(model, strict=True)
    assert len(fused_modules(model)) == 1
    actual = results(model, torch.float32)
    assert len(actual) == len(expected)
    for ours, reference in zip(actual, expected, strict=True):
        assert ours.shape == reference.shape
        assert error(ours, reference) <= TOLERANCE or ours.numel() == 0
