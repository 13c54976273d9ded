"""`verify` finds differences, and leaves no trace."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from patch_models import BASES, NORMS, OTHERS, bert, classes, fused_modules, llama, lora, text
from torch import Tensor, nn

from peftkern.patch import VerifyReport, VerifyRow, patch, verify
from peftkern.patch import fused as fused_file


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("training", [True, False])
def test_a_patched_model_agrees(base: str, training: bool) -> None:
    model = lora(llama(base), lora_dropout=0.3).train(training)
    patch(model)
    report = verify(model, text())
    assert report.ok, str(report)
    kinds = [row.what for row in report.rows]
    outputs = 16 + (NORMS if OTHERS else 0)
    assert (kinds.count("output"), kinds.count("loss"), kinds.count("gradient")) == (outputs, 1, 28)
    assert report.loss_patched == pytest.approx(report.loss_unpatched, rel=1e-5)
    assert not report.notes


def everything(model: nn.Module) -> list[Any]:
    """All state that a run could change."""
    state: list[Any] = [classes(model)]
    for module in model.modules():
        state += [module.training, list(module.__dict__), len(module._forward_hooks)]
        state += [getattr(module, "compute_dtype", None), getattr(module, "compute_type_is_set", None)]
        if hasattr(module, "state"):
            state += [id(module.state.CB), id(module.state.SCB), id(module.weight.CB), id(module.weight.SCB)]
    for tensor in [*model.parameters(), *model.buffers()]:
        state += [id(tensor), tensor.data_ptr(), tensor.requires_grad, id(tensor.grad), tensor.detach().clone()]
    return [*state, torch.get_rng_state(), random.getstate(), np.random.get_state()[1]]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else a == b


@pytest.mark.parametrize("base", BASES)
def test_nothing_is_left_behind(base: str) -> None:
    model = lora(llama(base), lora_dropout=0.3)
    for module in model.modules():
        if hasattr(module, "compute_type_is_set"):  # as before the first call of a layer without compute dtype
            module.compute_dtype, module.compute_type_is_set = None, False
    patch(model)
    model(**text()).loss.backward()
    model.base_model.model.model.layers[1].eval()
    model.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight.requires_grad_(False)
    before = everything(model)
    verify(model, text())
    after = everything(model)
    assert len(before) == len(after)
    assert [i for i, pair in enumerate(zip(before, after, strict=True)) if not same(*pair)] == []


def test_buffers_that_training_updates_are_restored() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = lora(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"])
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            normalised: Tensor = self.norm(self.inner(x))
            return normalised

    model = Normalised()
    patch(model)
    assert verify(model, {"x": torch.randn(9, 6)}).ok
    assert torch.equal(model.norm.running_mean, torch.zeros(5))
    assert model.norm.num_batches_tracked == 0


def test_other_dropout_drops_the_same_elements_twice() -> None:
    model = lora(llama(), lora_dropout=0.3)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    patch(model)
    assert verify(model, text()).ok


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_lower_precision_has_its_own_tolerance(base: str) -> None:
    model = lora(llama(base))
    patch(model)
    torch.set_float32_matmul_precision("high")
    try:
        report = verify(model, text())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert report.ok, str(report)
    assert {row.tolerance for row in report.rows if row.what == "output"} == {2e-3}


def test_gradient_checkpointing_is_fine() -> None:
    model = lora(llama("nf4"))
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    patch(model)
    assert verify(model, text()).ok


@pytest.mark.parametrize("fault", ["output", "gradient", "nan"])
def test_a_wrong_kernel_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(llama("nf4"))
    patch(model)
    real = fused_file.lora_linear

    def wrong(x: Tensor, weight: Any, *args: Any, **options: Any) -> Tensor:
        y = real(x, weight, *args, **options)
        if tuple(weight.shape) != (192, 64):
            return y
        if fault == "gradient":
            return y * 1.001 - (y * 0.001).detach()
        return y * 1.0001 if fault == "output" else y * math.nan

    monkeypatch.setattr(fused_file, "lora_linear", wrong)
    report = verify(model, text())
    assert not report.ok
    bad = {(row.what, row.name.split(".")[-1]) for row in report.rows if not row.ok and row.what == "output"}
    assert bad == ({("output", "up_proj"), ("output", "gate_proj")} if fault == "output" else bad)
    if fault == "gradient":
        assert not bad
        assert any(row.what == "gradient" for row in report.rows if not row.ok)
    if fault == "nan":
        assert math.isnan(report.worst.error)
    assert "FAILED" in str(report)
    assert "DIFFERS" in str(report)


def test_a_missing_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(llama())
    patch(model)
    real = fused_file.lora_linear
    monkeypatch.setattr(
        fused_file,
        "lora_linear",
        lambda x, w, A, B, *rest, **options: real(x, w, [a.detach() for a in A], B, *rest, **options),
    )
    report = verify(model, text())
    missing = [row for row in report.rows if row.error == math.inf]
    assert {row.what for row in missing} == {"gradient"}
    assert all("lora_A" in row.name for row in missing)


def test_fresh_adapters_are_said_to_show_nothing() -> None:
    model = lora(llama(), init_lora_weights=True)
    patch(model)
    report = verify(model, text())
    assert report.ok
    assert report.notes[0].startswith("the adapters of 14 modules have B = 0")
    assert "note: the adapters of 14 modules" in str(report)


def test_modules_that_the_batch_does_not_reach_are_counted() -> None:
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(x)
            return y

    model = lora(Partial(), target_modules=["used", "unused"])
    patch(model)
    report = verify(model, {"x": torch.randn(2, 4)})
    assert report.ok
    assert report.notes == ("1 patched modules were not called with this batch",)


def test_gradients_that_vanish_by_symmetry_are_no_alarm() -> None:
    model = lora(bert(), target_modules=["query", "key", "value"], bias="all", task_type="SEQ_CLS")
    patch(model)
    report = verify(model, {"input_ids": text()["input_ids"], "labels": torch.tensor([0, 1])})
    assert any(row.name.endswith("key.base_layer.bias") for row in report.rows)
    assert report.ok, str(report)


def test_the_table_groups_layers() -> None:
    model = lora(llama("nf4"))
    patch(model)
    lines = str(verify(model, text())).splitlines()
    assert len(lines) == 2 + 8 + (3 if OTHERS else 0) + 1 + 14 + 1
    assert lines[-1].startswith("the patched model agrees with the unpatched one; loss ")


def test_the_report_as_data() -> None:
    rows = (VerifyRow("output", "a.0.b", 1e-7, 5e-6), VerifyRow("gradient", "a.0.b.weight", 1e-3, 5e-5))
    report = VerifyReport(rows, 1.0, 1.5, ("a note",))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is False
    assert [row["ok"] for row in data["rows"]] == [True, False]
    assert report.worst is rows[1]
    assert VerifyRow("loss", "", math.nan, 1.0).ok is False


def test_a_model_that_trains_nothing() -> None:
    model = lora(llama("nf4")).requires_grad_(False)
    patch(model)
    report = verify(model, text())
    assert report.ok
    assert {row.what for row in report.rows} == {"output", "loss"}


def test_outputs_without_a_loss() -> None:
    model = lora(llama("nf4"))
    patch(model)
    report = verify(model, {"input_ids": text()["input_ids"]})
    assert report.ok
    assert sum(row.what == "gradient" for row in report.rows) == 28


def test_bad_arguments_are_named() -> None:
    model = lora(llama())
    with pytest.raises(ValueError, match=r"call peftkern\.patch\(model\) first"):
        verify(model, text())
    patch(model)
    with pytest.raises(TypeError, match="batch must be a mapping of the model's arguments, got Tensor"):
        verify(model, text()["input_ids"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="verify: model must be"):
        verify(None, text())  # type: ignore[arg-type]


def test_an_exception_in_the_model_leaves_no_trace() -> None:
    model = lora(llama("bnb-nf4"))
    patch(model)
    before = copy.copy(everything(model))
    with pytest.raises(IndexError):
        verify(model, {"input_ids": torch.tensor([[10**6]])})
    assert all(same(*pair) for pair in zip(before, everything(model), strict=True))
    assert len(fused_modules(model)) == 30 + OTHERS
