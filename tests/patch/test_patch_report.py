"""The report of `patch`: grouped in print, complete as data."""

from __future__ import annotations

import json

import peft
from patch_models import ALORA, OTHER_CLASSES, OTHERS, OTHERS_LEFT, llama, lora, text
from torch import nn

from peftkern.patch import PatchReport, PatchRow, patch


def test_thirty_layers_print_as_one_line_per_kind() -> None:
    model = lora(llama("nf4"))
    report = patch(model)
    lines = str(report).splitlines()
    assert len(report.rows) == 17 + OTHERS + OTHERS_LEFT
    assert len([line for line in lines if not line.startswith("[")]) == 2 + 9 + 1 + 5  # three norms, block, layer
    assert len([line for line in lines if " LlamaRMSNorm " in line]) == 3
    [line] = [line for line in lines if "up_proj" in line]
    assert line.split()[:5] == ["base_model.model.model.layers.*.mlp.up_proj", "2", "lora.Linear", "nf4", "192×64"]
    assert "lora_linear on " in line
    [line] = [line for line in lines if "lm_head" in line]
    assert "(left)" in line
    assert line.endswith("dense, no adapter")
    assert lines[-1] == f"{16 + OTHERS} modules fused, {1 + OTHERS_LEFT} left alone"


def test_rows_that_differ_are_not_grouped() -> None:
    model = lora(llama(), target_modules=["up_proj"], layers_to_transform=[0])
    lines = str(patch(model)).splitlines()
    up = [line for line in lines if "up_proj" in line]
    assert len(up) == 2
    assert any("layers.0.mlp.up_proj" in line and "lora_linear" in line for line in up)
    assert any("layers.1.mlp.up_proj" in line and "dense, no adapter" in line for line in up)


def test_long_remarks_become_footnotes() -> None:
    lines = str(patch(lora(llama("bnb-int8")))).splitlines()
    int8 = next(line for line in lines if line.startswith("[") and "round" in line)
    assert sum(line.endswith(int8[:3]) for line in lines) == 7
    notes = [line for line in lines if line.startswith("[")]
    assert [note[:4] for note in notes] == [f"[{index}] " for index in range(1, len(notes) + 1)]
    assert notes == lines[-1 - len(notes) : -1] and len(notes) == 2  # int8, and short inputs or norms without kernel
    assert max(map(len, lines[: -1 - len(notes)])) < 150


def test_calls_left_show_in_the_next_report() -> None:
    model = lora(llama()).eval()
    patch(model)
    model(input_ids=text()["input_ids"], adapter_names=["default", "__base__"])
    report = patch(model)
    assert "2 calls left: called with adapter_names" in str(report)
    assert next(row for row in report.to_dict()["rows"] if row["calls_left"])["calls_left"] == {
        "called with adapter_names": 1
    }


def test_data_is_json() -> None:
    model = lora(llama("bnb-nf4"), target_modules=["q_proj"], **ALORA)
    report = patch(model)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["counts"] == {"fused": 16 + OTHERS, "left": 3 + OTHERS_LEFT}
    reasons = {reason: count for reason, count in data["reasons"].items() if "kernel" not in reason}
    assert reasons == {"adapter 'default' is a ALoraLinearVariant": 2, "dense, no adapter": 1}
    assert [PatchRow(**row) for row in data["rows"]] == list(report.rows)
    fused = [row for row in report.fused if row.kind not in OTHER_CLASSES]
    assert {row.kind for row in fused} == {"bnb.Linear4bit", "LlamaMLP"}
    assert {row.reason for row in fused} == {"no adapter", "the base layer alone", ""}


def test_the_base_of_a_fused_layer_has_no_row_of_its_own() -> None:
    report = patch(lora(llama("bnb-nf4")))
    assert not any(row.module.endswith("base_layer") for row in report.rows)
    report = patch(lora(llama("bnb-nf4"), **ALORA))
    assert sum(row.module.endswith("base_layer") for row in report.rows) == 14


def test_quantized_linear_without_adapter_is_named_as_ours() -> None:
    report = patch(llama("nf4"), strict=True)
    assert report.counts == {"fused": 16 + OTHERS, "left": 1 + OTHERS_LEFT}
    assert {row.kind for row in report.fused} - OTHER_CLASSES == {"QuantizedLinear", "LlamaMLP"}


def test_a_model_without_linear_layers() -> None:
    report = patch(nn.Sequential(nn.LayerNorm(3), nn.ReLU()), strict=True)
    assert report == PatchReport(())
    assert str(report) == "0 modules fused, 0 left alone: the model has no linear or adapter layers"


def test_a_single_layer_is_a_model_too() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
    layer = model.base_model.model[0]
    report = patch(layer)
    assert [(row.module, row.action) for row in report.rows] == [("", "fused")]
