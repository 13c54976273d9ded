"""SparseDelta and the layers that carry some: the numbers of a dense layer with W + s·S, whatever is done to them."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftkern.formats.sparse_indices import SparseIndices
from peftkern.nn import QuantizedLinear
from peftkern.nn.sparse_linear import SparseDelta, class_with_deltas, deltas_of, under_deltas
from peftkern.sparse import attach, deltas, detach, disabled, set_active

BASES = ["dense", "bf16", "nf4", "int8", "bnb-nf4"]


def make(base: str = "dense", out_features: int = 24, in_features: int = 64, bias: bool = True) -> nn.Sequential:
    """One linear layer in a model, so that it has a name: "0"."""
    torch.manual_seed(0)
    linear: nn.Module = nn.Linear(in_features, out_features, bias=bias)
    if base == "bf16":
        linear = linear.bfloat16()
    elif base in ("nf4", "int8"):
        linear = QuantizedLinear.from_linear(linear, base)
    elif base == "bnb-nf4":
        quantized = bitsandbytes.nn.Linear4bit(in_features, out_features, bias, torch.float32, quant_type="nf4")
        quantized.load_state_dict(linear.state_dict())
        linear = quantized.to("cpu")
    return nn.Sequential(linear)


def some_indices(shape: tuple[int, int] = (24, 64), density: float = 0.1, seed: int = 1) -> SparseIndices:
    generator = torch.Generator().manual_seed(seed)
    return SparseIndices.from_mask(torch.rand(shape, generator=generator) < density)


def some_values(indices: SparseIndices, seed: int = 2) -> Tensor:
    return torch.randn(len(indices), generator=torch.Generator().manual_seed(seed))


def with_delta(base: str = "dense", scaling: float = 0.5, density: float = 0.1) -> Any:
    model, indices = make(base), some_indices(density=density)
    attach(model, {"0": indices}, values={"0": some_values(indices)}, scaling=scaling)
    return model


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("base", BASES)
def test_forward_and_gradients_are_those_of_the_dense_form(base: str) -> None:
    model = make(base)
    dtype = torch.bfloat16 if base == "bf16" else torch.float32
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    indices = some_indices()
    y0 = model(x).detach()
    delta = attach(model, {"0": indices}, values={"0": some_values(indices)}, scaling=0.5)["0"]
    y = model(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    dense = 0.5 * indices.to_dense(delta.values.detach().double())
    x_, grad_ = x.detach().double().reshape(-1, 64), grad.double().reshape(-1, 24)
    tolerance = 8e-3 if base == "bf16" else 5e-6
    assert error(y, y0.double() + (x_ @ dense.t()).view(2, 5, 24)) <= tolerance
    assert delta.values.grad is not None and delta.values.grad.dtype == torch.float32
    assert error(delta.values.grad, 0.5 * indices.gather(grad_.t() @ x_)) <= tolerance
    with disabled(model):
        x.grad, before = None, x.grad
        model(x).backward(grad)
    assert x.grad is not None and before is not None
    assert error(before, x.grad.double() + (grad_ @ dense).view(2, 5, 64)) <= tolerance


@pytest.mark.parametrize("base", BASES)
def test_disabled_is_bit_identical_to_the_base(base: str) -> None:
    model = make(base)
    x = torch.randn(3, 64, dtype=torch.bfloat16 if base == "bf16" else torch.float32)
    expected = model(x)
    indices = some_indices()
    attach(model, {"0": indices}, values={"0": some_values(indices)})
    assert not torch.equal(model(x), expected)
    with disabled(model):
        assert torch.equal(model(x), expected)
    assert not torch.equal(model(x), expected)
    set_active(model, [])
    assert torch.equal(model(x), expected)
    detach(model)
    assert torch.equal(model(x), expected)


def test_values_of_zero_change_nothing() -> None:
    model, x = make(), torch.randn(3, 64)
    expected = model(x)
    attach(model, {"0": some_indices()})
    assert torch.equal(model(x), expected)


def test_no_entries_at_all() -> None:
    model, x = make(), torch.randn(3, 64, requires_grad=True)
    expected = model(x)
    delta = attach(model, {"0": SparseIndices.empty((24, 64))})["0"]
    y = model(x)
    assert torch.equal(y, expected) and len(delta) == 0
    y.sum().backward()
    assert delta.values.grad is None or delta.values.grad.shape == (0,)
    twin = make()
    attach(twin, {"0": some_indices()})
    twin.load_state_dict(model.state_dict())
    assert len(deltas(twin)["0"]) == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(-2, 2))
def test_several_deltas_add_up_where_they_overlap(seed: int, scaling: float) -> None:
    model, x = make(), torch.randn(3, 64)
    expected = model(x).double()
    for name, delta_seed in (("one", seed), ("two", seed + 1)):
        indices = some_indices(density=0.3, seed=delta_seed)
        values = some_values(indices, delta_seed)
        attach(model, {"0": indices}, name, values={"0": values}, scaling=scaling)
        expected = expected + scaling * x.double() @ indices.to_dense(values.double()).t()
    assert error(model(x), expected) <= 5e-6


# ---- what the layer is


@pytest.mark.parametrize("base", BASES)
def test_layer_keeps_its_class_name_keys_parameters_and_hooks(base: str) -> None:
    model = make(base)
    layer = model[0]
    original, keys, weight = type(layer), list(layer.state_dict()), layer.weight
    calls: list[str] = []
    layer.register_forward_hook(lambda *_: calls.append("hook"))
    attach(model, {"0": some_indices()})
    assert isinstance(layer, original) and type(layer).__name__ == original.__name__
    assert under_deltas(type(layer)) is original and under_deltas(original) is original
    assert [key for key in layer.state_dict() if "sparse_deltas" not in key] == keys
    assert layer.weight is weight
    model(torch.randn(2, 64, dtype=torch.bfloat16 if base == "bf16" else torch.float32))
    assert calls == ["hook"]
    detach(model)
    assert type(layer) is original and list(layer.state_dict()) == keys and not deltas_of(layer)


def test_layers_of_one_class_share_one_class_and_the_original_is_untouched() -> None:
    before = dict(vars(nn.Linear))
    one, two = with_delta(), with_delta()
    assert type(one[0]) is type(two[0]) is class_with_deltas(nn.Linear)
    assert dict(vars(nn.Linear)) == before


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same_and_share_nothing(how: str, base: str) -> None:
    model = with_delta(base)
    x = torch.randn(3, 64, dtype=torch.bfloat16 if base == "bf16" else torch.float32)
    expected = model(x)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(x), expected)
    assert type(twin[0]) is type(model[0])
    twin[0].sparse_deltas["default"].values.data.zero_()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_casts_leave_values_and_indices_as_they_are(cast: Any) -> None:
    model = with_delta()
    delta = deltas(model)["0"]
    delta.values.grad = torch.ones_like(delta.values)
    before = {name: tensor.clone() for name, tensor in (*delta.named_parameters(), *delta.named_buffers())}
    cast(model)
    assert model[0].weight.dtype != torch.float32
    after = dict((*delta.named_parameters(), *delta.named_buffers()))
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    assert delta.values.grad.dtype == torch.float32
    x = torch.randn(3, 64, dtype=model[0].weight.dtype)
    expected = x.double() @ (model[0].weight.double() + 0.5 * delta.indices.to_dense(delta.values.double())).t()
    y = model(x)
    assert y.dtype == x.dtype
    assert error(y, expected + model[0].bias.double()) <= 8e-3


def test_values_of_another_dtype_when_asked_for() -> None:
    model = make()
    delta = attach(model, {"0": some_indices()}, dtype=torch.bfloat16)["0"]
    assert delta.values.dtype == torch.bfloat16
    model(torch.randn(3, 64)).sum().backward()
    assert delta.values.grad is not None and delta.values.grad.dtype == torch.bfloat16


def test_moves_to_another_device() -> None:
    model = with_delta().to("meta")
    delta = deltas(model)["0"]
    assert {tensor.device.type for tensor in (delta.values, *delta.indices.tensors())} == {"meta"}


def test_gradient_checkpointing() -> None:
    model, x = with_delta("nf4"), torch.randn(3, 64, requires_grad=True)
    values = deltas(model)["0"].values
    model(x).square().sum().backward()
    assert values.grad is not None and x.grad is not None
    expected, values.grad = (values.grad, x.grad), None
    x.grad = None
    for use_reentrant in (False, True):
        values.grad = x.grad = None
        checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
        assert torch.equal(values.grad, expected[0]) and torch.equal(x.grad, expected[1])


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_compiles_into_one_graph(base: str) -> None:
    model, x = with_delta(base), torch.randn(3, 64, requires_grad=True)
    values = deltas(model)["0"].values
    expected = model(x)
    expected.square().sum().backward()
    expected_grad, values.grad = values.grad, None
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    y.square().sum().backward()
    assert error(y, expected) <= 5e-6 and values.grad is not None
    assert error(values.grad, expected_grad) <= 5e-6
    with disabled(model):
        assert error(compiled(x), make(base)(x)) <= 5e-6


def test_autocast() -> None:
    model, x = with_delta(), torch.randn(3, 64)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16 and error(y, expected) <= 8e-3


def test_dequantize_keeps_the_delta() -> None:
    model, x = with_delta("nf4"), torch.randn(3, 64)
    expected = model(x)
    model[0].dequantize_()
    assert type(model[0]) is class_with_deltas(nn.Linear)
    assert error(model(x), expected) <= 5e-6


# ---- another index set


def test_replace_keeps_the_parameter_and_drops_its_gradient() -> None:
    model, x = with_delta(), torch.randn(3, 64)
    delta = deltas(model)["0"]
    values, version = delta.values, delta.values._version
    loss = model(x).sum()  # stays alive, and the old size of values with it
    loss.backward()
    indices = some_indices(density=0.2, seed=7)
    delta.replace_(indices, some_values(indices))
    assert delta.values is values and values.grad is None and values._version > version
    assert len(delta) == len(indices) and list(model.parameters())[-1] is values
    y = model(x)
    y.square().sum().backward()
    base = make()(x).double()
    assert error(y, base + 0.5 * x.double() @ indices.to_dense(some_values(indices).double()).t()) <= 5e-6
    assert values.grad is not None
    assert error(values.grad, 0.5 * indices.gather((2 * y).detach().t() @ x)) <= 5e-6


def test_replace_between_forward_and_backward_is_an_error() -> None:
    model = with_delta()
    delta = deltas(model)["0"]
    loss = model(torch.randn(3, 64, requires_grad=True)).sum()
    delta.replace_(delta.indices, torch.zeros(len(delta)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("indices", "values", "message"),
    [
        (SparseIndices.empty((24, 63)), torch.zeros(0), r"must be of shape \[24, 64\], got \[24, 63\]"),
        (SparseIndices.empty((24, 64)), torch.zeros(2), r"values must be \[entries\] = \[0\], got \[2\]"),
        (SparseIndices.empty((24, 64)), torch.zeros(0, dtype=torch.int8), "must be float64, float32"),
        (SparseIndices.empty((24, 64)).to("meta"), torch.zeros(0), "values are on cpu and indices on meta"),
    ],
)
def test_replace_refuses_what_does_not_fit(indices: SparseIndices, values: Tensor, message: str) -> None:
    model, x = with_delta(), torch.randn(3, 64)
    expected = model(x)
    with pytest.raises((ValueError, TypeError), match=message):
        deltas(model)["0"].replace_(indices, values)
    assert torch.equal(model(x), expected)


# ---- state dict


def test_state_dict_has_values_and_the_index_set() -> None:
    model = with_delta()
    delta, state = deltas(model)["0"], model.state_dict()
    prefix = "0.sparse_deltas.default."
    assert [key for key in state if key.startswith(prefix)] == [
        prefix + name for name in ("values", "row_offsets", "columns")
    ]
    assert torch.equal(state[f"{prefix}columns"], delta.indices.columns)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_takes_another_number_of_entries(assign: bool) -> None:
    model, twin, x = with_delta(density=0.3), with_delta(density=0.1), torch.randn(3, 64)
    values = deltas(twin)["0"].values
    optimizer = torch.optim.SGD(twin[0].sparse_deltas.parameters(), lr=1.0)
    assert twin.load_state_dict(model.state_dict(), assign=assign).missing_keys == []
    assert deltas(twin)["0"].values is values is optimizer.param_groups[0]["params"][0]
    assert torch.equal(twin(x), model(x))
    deltas(twin)["0"].indices.validate()
    expected = model(x)
    values.data.zero_()
    assert torch.equal(model(x), expected)


def test_missing_and_unexpected_keys_are_named() -> None:
    model, x = with_delta(), torch.randn(3, 64)
    expected, state = model(x), model.state_dict()
    state["0.sparse_deltas.default.rows"] = state.pop("0.sparse_deltas.default.columns")
    with pytest.raises(RuntimeError, match=r"Missing.*default\.columns(.|\n)*Unexpected.*default\.rows"):
        model.load_state_dict(state)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("columns", lambda t: t + 60, "columns must be within 0 and 63"),
        ("columns", lambda t: -t, "columns must be within"),
        ("columns", lambda t: t.flip(0), "must ascend strictly"),
        ("columns", lambda t: t[1:], "row_offsets must ascend from 0 to the number of entries"),
        ("row_offsets", lambda t: t.flip(0), "row_offsets must ascend"),
        ("row_offsets", lambda t: t[1:], r"row_offsets must be \[25\]"),
        ("values", lambda t: t[1:], "values must be"),
        ("values", lambda t: t.to(torch.int32), "values must be float"),
    ],
)
def test_a_broken_index_set_is_refused_and_nothing_changes(key: str, change: Any, message: str) -> None:
    model, x = with_delta(), torch.randn(3, 64)
    expected, state = model(x), model.state_dict()
    state[f"0.sparse_deltas.default.{key}"] = change(state[f"0.sparse_deltas.default.{key}"])
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)
    assert torch.equal(model(x), expected)


def test_delta_describes_itself() -> None:
    indices = SparseIndices.from_flat(torch.tensor([1, 5]), (2, 4))
    assert repr(SparseDelta(indices, torch.zeros(2), 2.0)) == (
        "SparseDelta(2 entries, density=0.25, scaling=2.0, active=True)"
    )
