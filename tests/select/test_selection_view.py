"""What is shown of a policy: places by name, tables, the heat map, files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from matplotlib.image import imread
from select_models import build, llama
from transformers import MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration

import peftkern
from peftkern.select.cost_graph import CostGraph, Segment, TensorCost
from peftkern.select.places import Place, find_places
from peftkern.select.selection import Selection
from peftkern.select.view import SelectionView, view_history

NAMES = (
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn.q_proj.weight", "mlp.up_proj.weight")),
    "model.norm.weight",
)
GRAPH = CostGraph("flops", 10.0, (Segment(1.0),), tuple(TensorCost(n, 2.0 + i, (0,)) for i, n in enumerate(NAMES)))
Q1, UP2 = NAMES[3], NAMES[6]


def selection(step: int, *names: str, **facts: Any) -> Selection:
    return Selection("Mine", names, NAMES, step, **{"costs": {"flops": GRAPH}, **facts})


def example() -> SelectionView:
    """Two updates of one tensor, then three of two."""
    return view_history([selection(0, Q1), selection(2, Q1, UP2, importances={Q1: 3.0, UP2: -1.0})], 5)


# ---- places


def test_matrices_are_called_by_their_role_and_others_by_their_module() -> None:
    places = find_places(name for name, _ in llama().named_parameters())
    norms = ("input_layernorm", "post_attention_layernorm")
    assert places.kinds == ("q", "k", "v", "o", "gate", "up", "down", *norms)
    assert places.layers == ("0", "1")
    assert places.outside == ("embed_tokens", "norm")
    assert places.of["model.layers.1.mlp.gate_proj.weight"] == Place("1", "gate")


def test_layers_and_kinds_do_not_depend_on_the_order_of_the_names() -> None:
    names = [f"h.{i}.attn.{part}_proj.weight" for i in range(12) for part in "qko"]
    assert find_places(names[::-1]).layers == tuple(map(str, range(12)))
    assert find_places(names[::-1]).kinds == ("q", "k", "o")


def test_adapters_are_named_with_the_matrix_that_they_adapt() -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    places = find_places(trained)
    assert places.kinds == ("q lora_A", "q lora_B", "down lora_A", "down lora_B")
    assert places.layers == ("0", "1") and places.outside == ()


def test_sparse_values_are_named_with_their_matrix() -> None:
    name = "model.layers.4.mlp.up_proj.sparse_deltas.default.values"
    assert find_places([name]).kinds == ("up sparse_deltas values",)


def test_experts_share_a_place_and_a_router_has_its_own() -> None:
    names = [f"model.layers.0.moe.experts.{e}.{w}.weight" for e in range(4) for w in ("w1", "w2")]
    places = find_places([*names, "model.layers.0.moe.gate.weight"])
    assert places.kinds == ("gate", "down", "router")
    assert {places.of[name] for name in names} == {Place("0", "gate"), Place("0", "down")}
    model = build(MixtralForCausalLM, MixtralConfig, num_local_experts=2)
    assert "gate+up" in find_places(name for name, _ in model.named_parameters()).kinds


def test_two_stacks_and_two_attentions_are_kept_apart() -> None:
    config = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    model = build(T5ForConditionalGeneration, T5Config, **config)
    names = [name for name, _ in model.named_parameters()]
    places = find_places(names)
    assert places.layers == ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1")
    cross = places.of["decoder.block.1.layer.1.EncDecAttention.q.weight"].kind
    own = places.of["decoder.block.1.layer.0.SelfAttention.q.weight"].kind
    assert cross != own and "EncDecAttention" in cross and "SelfAttention" in own


def test_a_model_without_blocks_has_names_only() -> None:
    places = find_places(["encoder.weight", "encoder.bias", "head.weight", "weight"])
    assert places.layers == () and places.kinds == ()
    assert places.outside == ("encoder", "encoder bias", "head", "weight")


def test_names_that_would_be_equal_are_written_out() -> None:
    assert find_places(["a.head.weight", "b.head.weight"]).outside == ("a.head.weight", "b.head.weight")
    places = find_places(["h.0.one.norm.weight", "h.0.two.norm.weight"])
    assert places.kinds == ("one.norm", "two.norm")


# ---- numbers


def test_the_share_of_updates_counts_those_under_each_selection() -> None:
    shares = {tensor.name: (tensor.selected, tensor.share) for tensor in example().tensors}
    assert shares[Q1] == (True, 1.0)
    assert shares[UP2] == (True, 0.6)
    assert shares[NAMES[0]] == (False, 0.0)


def test_importance_and_cost_are_of_the_last_selection_that_has_them() -> None:
    history = [selection(0, Q1, importances={Q1: 1.0, UP2: 4.0}), selection(2, Q1, importances={Q1: 2.0}, costs={})]
    tensors = {tensor.name: tensor for tensor in view_history(history, 5).tensors}
    assert (tensors[Q1].importance, tensors[UP2].importance, tensors[NAMES[0]].importance) == (2.0, 4.0, None)
    assert tensors[Q1].costs == {"flops": 5.0}


def test_before_the_first_update_the_share_is_what_is_trained_now() -> None:
    tensors = {tensor.name: tensor.share for tensor in view_history([selection(0, Q1)]).tensors}
    assert (tensors[Q1], tensors[UP2]) == (1.0, 0.0)


def test_the_text_has_every_fact() -> None:
    text = str(example())
    lines = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in text.splitlines() if line.startswith("│")}
    assert [cell.strip() for cell in lines["1"]] == ["● 100%", "·"]
    assert [cell.strip() for cell in lines["2"]] == ["·", "● 60%"]
    assert [cell.strip() for cell in lines["q"]] == ["1 of 3", "33%", "100.0%", f"{15 / 44:.1%}"]
    assert [cell.strip() for cell in lines["norm (no layer)"]] == ["0 of 1", "0%", "0.0%", f"{9 / 44:.1%}"]
    assert text.startswith("Mine, update 2: trains 2 of 8 tensors")
    assert "predicted over 5 updates" in text


def test_a_table_of_each_value() -> None:
    shown = example()
    assert [list(column.cells)[1] for column in shown.table("importance").columns] == ["1", "3", ""]
    assert [list(column.cells)[1] for column in shown.table("flops").columns] == ["1", "5", "6"]
    with pytest.raises(ValueError, match=r"must be one of \['selected', 'importance', 'flops'\], got 'seconds'"):
        shown.table("seconds")


def test_an_empty_history_is_refused() -> None:
    with pytest.raises(ValueError, match="history is empty"):
        view_history([])


# ---- files


def test_the_heat_map_has_three_panels_with_what_is_in_them(tmp_path: Path) -> None:
    example().save(tmp_path / "selection.png")
    picture = imread(tmp_path / "selection.png")[..., :3]
    height, width, _ = picture.shape
    assert height > 300 and width > 700
    greens = (picture[..., 1] > picture[..., 0] + 0.2) & (picture[..., 1] > picture[..., 2] + 0.1)
    assert greens[:, 2 * width // 3 :].mean() > 0.02  # trained all of the time, in the third panel
    grey = np.abs(picture - 0.9).max(axis=-1) < 0.01
    assert grey[:, : width // 3].mean() > 0.2  # importance is known of two tensors of eight
    assert not grey[:, width // 3 :].mean() > 0.05  # and cost and time of all


def test_the_heat_map_takes_every_kind_of_number(tmp_path: Path) -> None:
    importances = dict.fromkeys(NAMES, 0.0) | {Q1: float("inf"), UP2: -2.0, NAMES[0]: 1e-9, NAMES[1]: 5.0}
    for index, history in enumerate(
        (
            [selection(0, Q1, importances=importances)],
            [selection(0, Q1, importances=dict.fromkeys(NAMES, -1.0))],
            [selection(0, costs={})],
            [Selection("Mine", ("w",), ("w", "b"))],
        )
    ):
        path = tmp_path / f"{index}.png"
        view_history(history, 4).save(path)
        assert imread(path).std() > 0.05


def test_the_heat_map_grows_with_the_model(tmp_path: Path) -> None:
    sizes = []
    for layers in (2, 30):
        names = tuple(f"h.{i}.{part}_proj.weight" for i in range(layers) for part in "qkvo")
        view_history([Selection("Mine", names[:1], names)]).save(tmp_path / "map.png")
        sizes.append(imread(tmp_path / "map.png").shape[0])
    assert sizes[1] - sizes[0] > 28 * 20  # room for a line of text in each row


def test_csv_has_a_line_for_each_tensor(tmp_path: Path) -> None:
    example().save(tmp_path / "selection.csv")
    with (tmp_path / "selection.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(NAMES)
    expected = {"name": UP2, "layer": "2", "kind": "up", "selected": "1", "share": "0.6", "importance": "-1.0"}
    assert rows[UP2] == {**expected, "flops": "8.0"}
    assert rows[NAMES[0]]["importance"] == ""


def test_json_has_tensors_selections_and_savings(tmp_path: Path) -> None:
    history = [selection(0, Q1, importances={Q1: float("inf")}), selection(2, Q1, UP2)]
    view_history(history, 5).save(tmp_path / "selection.json")
    data = json.loads((tmp_path / "selection.json").read_text())
    assert [(entry["step"], entry["names"]) for entry in data["selections"]] == [(0, [Q1]), (2, [Q1, UP2])]
    assert data["selections"][0]["shares"] == {"flops": GRAPH.step([Q1]) / GRAPH.full}
    by_name = {tensor["name"]: tensor for tensor in data["tensors"]}
    assert by_name[Q1]["importance"] == "inf"
    assert by_name[UP2]["costs"] == {"flops": 8.0}
    assert data["savings"]["flops"]["steps"] == 5
    assert (data["policy"], data["steps"]) == ("Mine", 5)


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.png, \.csv, \.json, got 'map\.gif'"):
        example().save("map.gif")


def test_matplotlib_and_rich_are_imported_when_they_are_used() -> None:
    code = "import sys, peftkern.select.view; assert not {'matplotlib', 'rich.table'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_public_names() -> None:
    assert peftkern.select.view_history is view_history
