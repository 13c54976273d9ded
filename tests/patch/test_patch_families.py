"""Every model family trains the same patched and unpatched, over dense and over 4-bit weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_families import FAMILIES
from patch_models import DEEP, assert_same_run, error, fused_modules, run
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftkern.patch import PatchReport, patch, unpatch
from peftkern.patch.weights import read_weight

STEPS = 3


def train(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[list[float], dict[str, Tensor]]:
    """The losses, and the gradients of the first step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses, first = [], {}
    for step, batch in enumerate(batches):
        loss = model(**batch).loss
        loss.backward()
        if step == 0:
            first = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, first


def classes_fused(report: PatchReport) -> set[str]:
    return {row.kind for row in report.fused if not row.kernel.startswith("lora_linear")}


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_training_is_the_same(name: str, base: str) -> None:
    family = FAMILIES[name]
    model = family.with_lora(base)
    expected = copy.deepcopy(model)
    batches = [family.batch(seed) for seed in range(STEPS)]

    report = patch(model, strict=True, logits=False)
    # a class that transformers has changed is no longer known, and missing here
    assert classes_fused(report) >= family.fused
    layers = [row for row in report.fused if row.kernel.startswith("lora_linear")]
    assert len(layers) == family.adapters
    assert sum(row.weight.startswith("nf4") for row in layers) == (0 if base == "dense" else family.quantized)
    assert all(row.reason for row in report.left)

    (losses, gradients), (losses_, gradients_) = train(model, batches), train(expected, batches)
    assert losses == pytest.approx(losses_, rel=1e-5)
    assert len(set(losses)) == STEPS
    assert gradients.keys() == gradients_.keys() and len(gradients) >= 2 * family.adapters
    assert all(error(gradient, gradients_[name]) <= 1e-4 for name, gradient in gradients.items())
    assert not any(row.calls_left or row.unused for row in patch(model).rows)


# ---- GPT-2's Conv1D, whose weight is [in, out]


def gpt2(base: str = "dense", **options: Any) -> Any:
    return FAMILIES["gpt2"].with_lora(base, **options)


def test_conv1d_is_read_as_it_lies() -> None:
    model = gpt2()
    report = patch(model)
    row = next(row for row in report.fused if row.module.endswith("c_fc"))
    assert (row.kind, row.weight) == ("lora.Linear", "float32 256×64")
    layer = model.base_model.model.transformer.h[0].mlp.c_fc
    assert type(layer.base_layer) is Conv1D
    weight = read_weight(layer.base_layer)
    assert isinstance(weight, Tensor) and weight.data_ptr() == layer.base_layer.weight.data_ptr()


def test_conv1d_without_adapters_is_named() -> None:
    report = patch(gpt2(target_modules=["c_attn"]))
    assert report.reasons == {"dense, no adapter": 7}
    assert {row.kind for row in report.left} == {"Conv1D", "Linear"}


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_conv1d_merges_and_unpatches(base: str) -> None:
    model = gpt2(base)
    batch = FAMILIES["gpt2"].batch()
    original = run(model, batch)
    patch(model)
    assert_same_run(model, batch, original)
    if base == "dense":
        model.merge_adapter()
        assert error(model(**batch).logits.detach(), original[0]) <= DEEP
        model.unmerge_adapter()
        assert_same_run(model, batch, original, 2 * DEEP)
    unpatch(model)
    assert not fused_modules(model)
    assert_same_run(model, batch, original, 0.0 if base == "nf4" else 2 * DEEP)
