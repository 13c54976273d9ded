"""Rows of a batch that train adapters of their own."""

from __future__ import annotations

from typing import Any

import peft
import pytest
from patch_models import DEEP, error, fused_modules, llama, lora, text
from torch import Tensor

import peftkern
from peftkern.patch import adapters_by_row, patch

NAMES = ["default", "__base__", "other", "default"]


def two_adapters(base: str, **options: Any) -> Any:
    """The second one, of another rank, is not on every layer."""
    model = lora(llama(base), **options)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss  # type: ignore[no-any-return]


def one_by_one(model: Any, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Each row by itself, through PEFT alone, with its adapter active."""
    total = 0.0
    for row, name in enumerate(NAMES):
        model.base_model.set_adapter(["default", "other"] if name == "__base__" else [name])
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in parameter_name)
        one = {key: value[row : row + 1] for key, value in batch.items()}
        if name == "__base__":
            with model.disable_adapter():
                total += loss_of(model, one).item() / len(NAMES)
            continue
        loss = loss_of(model, one) / len(NAMES)
        loss.backward()
        total += loss.item()
    model.base_model.set_adapter(["default", "other"])
    found = gradients(model)
    return total, {name: gradient for name, gradient in found.items() if gradient.any()}


@pytest.mark.parametrize("base", ["dense", "nf4", "bnb-nf4", "bnb-int8"])
def test_every_adapter_learns_from_its_own_rows(base: str) -> None:
    model, batch = two_adapters(base), text(rows=4)
    expected_loss, expected = one_by_one(model, batch)
    assert {name.split(".")[-2] for name in expected} == {"default", "other"}
    patch(model)
    with adapters_by_row(model, NAMES):
        loss = loss_of(model, batch)
        loss.backward()
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    found = gradients(model)
    assert {name for name, gradient in found.items() if gradient.any()} == expected.keys()
    for name, gradient in expected.items():
        assert error(found[name], gradient) <= DEEP, name


def test_behind_the_block_all_is_as_before() -> None:
    model, batch = two_adapters("nf4"), text(rows=4)
    patch(model)
    before = loss_of(model, batch).item()
    with pytest.raises(KeyError), adapters_by_row(model, NAMES):
        assert loss_of(model, batch).item() != before
        raise KeyError
    assert loss_of(model, batch).item() == before


def test_adapters_that_are_disabled_inside_are_off() -> None:
    model, batch = two_adapters("nf4"), text(rows=4)
    with model.disable_adapter():
        expected = loss_of(model, batch).item()
    patch(model)
    with adapters_by_row(model, NAMES), model.disable_adapter():
        assert loss_of(model, batch).item() == pytest.approx(expected, rel=1e-6)


def test_names_of_pefts_own_inside_are_refused_and_not_ignored() -> None:
    model, batch = two_adapters("dense").eval(), text(rows=4)
    patch(model)
    with adapters_by_row(model, NAMES), pytest.raises(ValueError, match="called with adapter_names"):
        model(**batch, adapter_names=["default"] * 4)


def test_adapters_that_are_merged_inside_are_refused() -> None:
    model, batch = two_adapters("dense"), text(rows=4)
    patch(model)
    with adapters_by_row(model, NAMES):
        model.merge_adapter(["default"])
        with pytest.raises(ValueError, match=r"has merged adapters; call unmerge_adapter\(\) first"):
            loss_of(model, batch)


def test_with_checkpointing() -> None:
    model, batch = two_adapters("nf4"), text(rows=4)
    patch(model)
    with adapters_by_row(model, NAMES):
        loss_of(model, batch).backward()
    expected = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with adapters_by_row(model, NAMES):
        loss_of(model, batch).backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert error(gradient, expected[name]) <= 1e-6, name


def test_a_batch_of_another_length_is_refused() -> None:
    model = two_adapters("nf4")
    patch(model)
    with adapters_by_row(model, NAMES), pytest.raises(ValueError, match="each of the 3 rows of x, got 4"):
        loss_of(model, text(rows=3))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unknown", r"names must be adapters of the model, \['default', 'other'\], or '__base__'; got 'nobody'"),
        ("none", "got 'none'"),
        ("not patched", r"layers\.0\.self_attn\.q_proj: is not patched; call peftkern\.patch\(model\) first"),
        ("merged", r"has merged adapters; call unmerge_adapter\(\) first"),
        ("disabled", "has its adapters disabled"),
        ("dora", "DoRA"),
    ],
)
def test_what_cannot_follow_is_refused(case: str, message: str) -> None:
    model = two_adapters("dense", use_dora=case == "dora")
    if case != "not patched":
        patch(model)
    if case == "merged":
        model.merge_adapter(["default"])
    if case == "disabled":
        model.base_model.disable_adapter_layers()
    names = {"unknown": ["nobody"], "none": []}.get(case, NAMES)
    with pytest.raises(ValueError, match=message), peftkern.adapters_by_row(model, names):
        pass
    assert all(module.__dict__["_peftkern"].rows is None for module in fused_modules(model).values())
