"""Layers with sparse deltas in patched models: base, adapters and deltas as one operation."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grouped_backend
import pytest
import torch
from patch_models import DEEP, OTHERS, TOLERANCE, assert_same_run, classes, error, llama, lora, run, text
from torch import Tensor, nn

from peftkern import ops
from peftkern.formats import SparseIndices
from peftkern.nn.sparse_linear import deltas_of
from peftkern.ops.sparse_delta_linear import sparse_delta_linear
from peftkern.patch import fused, patch, unpatch, verify
from peftkern.sparse import attach, deltas, detach, disabled, linear_layers, set_active
from peftkern.sparse.layers import base_layer, weight_shape

KERNEL = "sparse_delta_linear on cpu"
BASES = ["dense", "nf4", "bnb-nf4", "bnb-int8"]


def with_deltas(model: nn.Module, targets: Any = "all-linear", name: str = "default", seed: int = 5) -> Any:
    """Random deltas of 5% on the layers, frozen elsewhere, so that they and adapters alone are trained."""
    generator = torch.Generator().manual_seed(seed)
    indices, values = {}, {}
    for layer_name, layer in linear_layers(model, targets).items():
        shape = weight_shape(base_layer(layer))
        assert shape is not None
        indices[layer_name] = SparseIndices.from_mask(torch.rand(shape, generator=generator) < 0.05)
        values[layer_name] = 0.05 * torch.randn(len(indices[layer_name]), generator=generator)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in parameter_name)
    attach(model, indices, name, values=values, scaling=0.5)
    return model


def model_of(base: str, with_lora: bool, **options: Any) -> Any:
    model = llama(base)
    return with_deltas(lora(model, **options) if with_lora else model)


@pytest.mark.parametrize("with_lora", [False, True], ids=["alone", "under LoRA"])
@pytest.mark.parametrize("base", BASES)
def test_patched_layers_compute_what_they_computed(base: str, with_lora: bool) -> None:
    model = model_of(base, with_lora)
    expected = run(model, text())
    report = patch(model, strict=True)
    assert report.counts["fused"] == 16 + OTHERS
    rows = [row for row in report.fused if row.weight]
    assert len(rows) == 14
    assert all(row.kernel.startswith(KERNEL) for row in rows)
    for row in rows:
        delta = deltas(model)[row.module]
        assert row.entries == len(delta) and row.density == delta.indices.density
    assert "sparse entries, 0.05" in str(report)
    tolerance = 3e-2 if base == "bnb-int8" else DEEP  # bitsandbytes rounds activations to int8
    assert_same_run(model, text(), expected, tolerance)
    assert {row.calls_left == {} for row in patch(model).fused} == {True}


@pytest.mark.parametrize("with_lora", [False, True], ids=["alone", "under LoRA"])
@pytest.mark.parametrize("base", ["dense", "nf4", "bnb-nf4"])
def test_unpatch_leaves_the_deltas_working(base: str, with_lora: bool) -> None:
    model = model_of(base, with_lora)
    was, expected = classes(model), run(model, text())
    patch(model)
    run(model, text())
    unpatch(model)
    assert classes(model) == was
    after = run(model, text())
    assert torch.equal(after[0], expected[0])
    assert all(torch.equal(after[1][name], gradient) for name, gradient in expected[1].items())


@pytest.mark.parametrize("base", ["dense", "bnb-nf4"])
def test_a_patched_layer_is_one_operation(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(base, True)
    patch(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64, requires_grad=True)
    y = layer(x)
    assert type(y.grad_fn).__name__ == "_SparseDeltaLinearBackward"
    inputs = {type(function).__name__ for function, _ in y.grad_fn.next_functions if function is not None}
    assert inputs == {"AccumulateGrad"}


@pytest.mark.parametrize("order", ["attach first", "patch first"])
@pytest.mark.parametrize("base", ["dense", "nf4", "bnb-nf4"])
def test_attach_and_detach_on_a_patched_model(base: str, order: str) -> None:
    model = lora(llama(base))
    was, without = classes(model), run(model, text())
    if order == "patch first":
        patch(model)
        patched = classes(model)
    with_deltas(model)
    twin = copy.deepcopy(model)
    unpatch(twin)
    expected = run(twin, text())
    if order == "attach first":
        patch(model)
    assert_same_run(model, text(), expected)
    detach(model)
    assert_same_run(model, text(), without)
    if order == "patch first":
        assert classes(model) == patched
    unpatch(model)
    assert classes(model) == was


def test_deltas_on_layers_without_adapters_are_taken_by_the_next_patch() -> None:
    model = llama()
    patch(model)
    with_deltas(model, ["up_proj"])
    expected = run(model, text())
    rows = {row.module: row for row in patch(model).rows}
    assert rows["model.layers.0.mlp.up_proj"].kernel.startswith(KERNEL)
    assert rows["model.layers.0.mlp.gate_proj"].reason == "dense, no adapter"
    assert_same_run(model, text(), expected)
    detach(model)
    assert {row.action for row in patch(model).rows if "up_proj" in row.module} == {"left"}


def test_disabled_and_switched_deltas() -> None:
    model = lora(llama("nf4"))
    patch(model)
    expected = {(): run(model, text())[0]}
    for seed, name in enumerate(("a", "b")):
        with_deltas(model, name=name, seed=seed)
    for names in (("a",), ("b",), ("a", "b")):
        set_active(model, names)
        twin = copy.deepcopy(model)
        unpatch(twin)
        expected[names] = run(twin, text())[0]
        assert error(run(model, text())[0], expected[names]) <= DEEP
        with disabled(model):
            assert torch.equal(run(model, text())[0], expected[()])
    both = patch(model).rows
    set_active(model, [])
    assert all(row.entries == 0 for row in patch(model).rows) and any(row.entries for row in both)


def test_disabled_adapters_leave_the_deltas() -> None:
    model = model_of("nf4", True)
    with model.disable_adapter():
        expected = run(model, text())
    patch(model)
    with model.disable_adapter():
        assert_same_run(model, text(), expected)
        report = patch(model)
    assert "adapters are disabled now" in next(row.reason for row in report.fused if row.weight)


def test_adapters_merged_by_peft_leave_the_deltas() -> None:
    model = model_of("dense", True)
    expected = run(model, text())[0]
    patch(model)
    model.merge_adapter()
    assert error(run(model, text())[0], expected) <= DEEP
    model.unmerge_adapter()
    assert error(run(model, text())[0], expected) <= DEEP
    merged = model.merge_and_unload()
    unpatch(merged)
    assert error(run(merged, text())[0], expected) <= DEEP


@pytest.mark.parametrize("base", ["nf4", "bnb-nf4"])
def test_another_index_set_is_read_at_the_next_call(base: str) -> None:
    model = model_of(base, True)
    patch(model)
    run(model, text())
    delta = next(iter(deltas(model).values()))
    indices = SparseIndices.from_flat(torch.tensor([3, 900, 4000]), delta.shape)
    delta.replace_(indices, torch.tensor([1.0, -2.0, 3.0]))
    twin = copy.deepcopy(model)
    unpatch(twin)
    assert_same_run(model, text(), run(twin, text()))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_patched_model(how: str) -> None:
    model = model_of("nf4", True)
    patch(model)
    expected = run(model, text())
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert classes(twin) == classes(model)
    assert_same_run(twin, text(), expected, 0.0)


def test_pickles_of_patched_layers_without_deltas_from_before_still_load() -> None:
    layer = lora(llama()).base_model.model.model.layers[0].mlp.up_proj
    patch(layer)
    rebuild, arguments, *_ = layer.__reduce_ex__(2)
    assert type(rebuild(*arguments[:1])) is type(layer)


def test_state_dict_keys_do_not_change() -> None:
    model = model_of("nf4", True)
    state = model.state_dict()
    patch(model)
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)


def test_verify_compares_deltas(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("bnb-nf4", True, lora_dropout=0.1)
    patch(model)
    report = verify(model, text())
    assert report.ok, str(report)
    compared = {row.name for row in report.rows if row.what == "gradient"}
    assert sum("sparse_deltas" in name for name in compared) == 14

    def doubled(
        x: Tensor, weight: Any, values: Any, indices: Any, scaling: list[float], *rest: Any, **options: Any
    ) -> Any:
        return sparse_delta_linear(x, weight, values, indices, [2 * s for s in scaling], *rest, **options)

    monkeypatch.setattr(fused, "sparse_delta_linear", doubled)
    assert not verify(model, text()).ok


# ---- what keeps a layer from it


def test_hooks_on_a_delta_are_called(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("nf4", False)
    expected = run(model, text())
    patch(model)
    delta, calls = deltas(model)["model.layers.0.mlp.up_proj"], []
    delta.register_forward_hook(lambda *_: calls.append("delta"))
    with caplog.at_level(logging.WARNING, logger="peftkern"):
        assert_same_run(model, text(), expected)
    assert calls == ["delta"]
    assert "sparse delta 'default' has hooks" in caplog.text
    assert patch(model).reasons["sparse delta 'default' has hooks"] == 1


def test_deltas_on_a_layer_with_a_forward_of_its_own_are_left_and_named() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model, x = nn.Sequential(Doubled(4, 3)), torch.randn(2, 4)
    indices = SparseIndices.from_flat(torch.tensor([0, 5]), (3, 4))
    attach(model, {"0": indices}, values={"0": torch.ones(2)})
    expected = model(x)
    (row,) = patch(model).rows
    assert (row.action, row.reason) == ("left", "the base layer Doubled computes something of its own")
    assert torch.equal(model(x), expected)
    with pytest.raises(RuntimeError, match="strict=True, and 1 modules cannot be taken"):
        patch(model, strict=True)


def test_a_weight_that_is_trained_after_all_runs_its_own_code() -> None:
    model = with_deltas(llama(), ["up_proj"])
    patch(model)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.requires_grad_(True)
    model(**text()).loss.backward()
    assert layer.weight.grad is not None and layer.weight.grad.any()
    assert deltas_of(layer)["default"].values.grad is not None
    assert list(layer.__dict__["_peftkern"].calls_left) == [
        "the base weight is trained itself; the fused path keeps it frozen"
    ]


def test_torch_compile_takes_one_graph() -> None:
    layer = model_of("nf4", True).base_model.model.model.layers[0].mlp.up_proj
    patch(layer)
    x = torch.randn(3, 64, requires_grad=True)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert error(compiled(x), expected) <= TOLERANCE


# ---- layers that share their input


def test_layers_with_deltas_stay_out_of_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    grouped_backend.enter(monkeypatch)
    model = with_deltas(lora(llama()), ["k_proj", "gate_proj", "up_proj"])
    expected = run(model, text())
    rows = {row.module.rpartition(".")[2]: row for row in patch(model).fused if row.weight}
    alone = "runs alone, not with the layers that share its input: it has sparse deltas"
    assert {name for name, row in rows.items() if alone in row.reason} == {"k_proj", "gate_proj", "up_proj"}
    assert {name for name, row in rows.items() if "(group of 2)" in row.kernel} == {"q_proj", "v_proj"}
    assert_same_run(model, text(), expected)


def test_deltas_attached_to_a_member_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    grouped_backend.enter(monkeypatch)
    model = lora(llama())
    patch(model)
    run(model, text())
    with_deltas(model, ["k_proj"])
    twin = copy.deepcopy(model)
    unpatch(twin)
    expected = run(twin, text())
    for _ in range(2):
        assert_same_run(model, text(), expected)
    rows = [row for row in patch(model).fused if row.weight]
    assert all(row.unused == 0 and not row.calls_left for row in rows)


# ---- the gated block


def kept(call: Callable[[], Any]) -> int:
    """Bytes kept for the backward pass, every storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(storages.values())


@pytest.mark.parametrize("with_lora", [False, True], ids=["alone", "under LoRA"])
def test_a_gated_block_with_deltas_keeps_two_tensors(with_lora: bool) -> None:
    model = model_of("nf4", with_lora)
    patch(model)
    body = model.base_model.model.model if with_lora else model.model
    block, x = body.layers[0].mlp, torch.randn(16, 64, requires_grad=True)
    y = block(x)
    assert type(y.grad_fn).__name__ == "_GatedLoraLinearBackward"
    in_one = kept(lambda: block(x))
    block.down_proj.register_forward_pre_hook(lambda *_: None)
    in_two = kept(lambda: block(x))
    assert in_two - in_one == 4 * 16 * 192


def test_a_step_keeps_hardly_more_than_with_adapters_alone() -> None:
    adapted, sparse = lora(llama("nf4")), model_of("nf4", False)
    patch(adapted)
    patch(sparse)
    batch = text(4, 32)
    assert kept(lambda: sparse(**batch)) <= kept(lambda: adapted(**batch))


def test_gated_lora_linear_with_deltas_has_the_bits_of_the_two_operations() -> None:
    torch.manual_seed(0)
    gate, up = torch.randn(5, 64), torch.randn(5, 64)
    weight = ops.quantize(torch.randn(33, 64))
    sets = [SparseIndices.from_mask(torch.rand(33, 64) < density) for density in (0.1, 0.0, 0.3)]
    leaves = [gate, up, torch.randn(4, 64), torch.randn(33, 4), *(torch.randn(len(indices)) for indices in sets)]
    results = []
    for in_one in (True, False):
        g, u, lora_A, lora_B, *values = own = [leaf.clone().requires_grad_() for leaf in leaves]
        torch.manual_seed(7)
        if in_one:
            lists = {"values": values, "indices": sets, "delta_scaling": [0.5, 1.0, 2.0]}
            y = ops.gated_lora_linear(g, u, weight, lora_A, lora_B, 0.7, None, 0.2, **lists)
        else:
            x = ops.silu_mul(g, u)
            y = sparse_delta_linear(x, weight, values, sets, [0.5, 1.0, 2.0], lora_A, lora_B, 0.7, None, 0.2)
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in own)])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1), (2,), (0, 1, 2)], ids=str)
def test_gated_lora_linear_gives_deltas_only_what_they_ask_for(frozen: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight, indices = torch.randn(33, 64), SparseIndices.from_mask(torch.rand(33, 64) < 0.1)
    leaves = [torch.randn(5, 64), torch.randn(5, 64), torch.randn(len(indices)), torch.randn(33)]
    results = []
    for in_one in (True, False):
        own = [leaf.clone().requires_grad_(position not in frozen) for position, leaf in enumerate(leaves)]
        g, u, values, bias = own
        if in_one:
            lists = {"values": [values], "indices": [indices], "delta_scaling": [0.5]}
            y = ops.gated_lora_linear(g, u, weight, bias=bias, **lists)
        else:
            y = sparse_delta_linear(ops.silu_mul(g, u), weight, values, indices, 0.5, bias=bias)
        y.square().sum().backward()
        results.append([leaf.grad for leaf in own])
    for position, (one, two) in enumerate(zip(*results, strict=True)):
        if position in frozen:
            assert one is None and two is None
        else:
            assert torch.equal(one, two)


def test_gated_lora_linear_with_deltas_compiles_to_the_two_operations() -> None:
    torch.manual_seed(0)
    indices = SparseIndices.from_mask(torch.rand(33, 64) < 0.1)
    gate, up, weight, values = torch.randn(5, 64), torch.randn(5, 64), torch.randn(33, 64), torch.randn(len(indices))

    def call(gate: Tensor, up: Tensor) -> Tensor:
        return ops.gated_lora_linear(gate, up, weight, values=[values], indices=[indices], delta_scaling=[0.5])

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(gate, up), call(gate, up))


def test_report_is_data(tmp_path: Path) -> None:
    report = patch(model_of("nf4", False)).to_dict()
    row = next(row for row in report["rows"] if row["weight"])
    assert row["entries"] > 0 and 0.03 < row["density"] < 0.07
