"""rms_norm and layer_norm against float64, on every backend and every instruction set that this machine runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from isa_backends import ISA_BACKENDS, select
from same_bits import assert_same_bits, random_tensor
from torch import Tensor

from peftkern import ops
from peftkern.backends import cpu, registry

TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""Relative error ‖out - ref‖ / ‖ref‖ against float64."""
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]
NATIVE_DTYPES = DTYPES[1:]
SHAPES = [(1,), (1, 1), (3, 15), (2, 3, 64), (2, 255), (2, 256), (3, 257), (2, 1091), (0, 5)]
LARGER_THAN_A_TASK = (101, 701)
EPS = 1e-5
KINDS = {
    "rms": {},
    "rms, round first": {"round_before_weight": True},
    "rms, offset": {"weight_offset": 1.0},
    "layer": None,
}
"""Options of `rms_norm`; ``None``: `layer_norm`."""


@pytest.fixture(params=ISA_BACKENDS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As `backend`, and the CPU's once for each instruction set."""
    return select(request.param, monkeypatch)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def inputs_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, shift: float = 0.5) -> dict[str, Tensor]:
    names = ("x", "residual", "grad", "grad_total")
    inputs = {name: random_tensor(shape, torch.float32, seed).to(dtype) for seed, name in enumerate(names)}
    inputs["x"] = (inputs["x"].float() * 3 + shift).to(dtype)
    for seed, name in enumerate(("weight", "bias")):
        inputs[name] = (0.3 * random_tensor(shape[-1:], torch.float32, 10 + seed) + 0.8).to(dtype)
    return inputs


def call(kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Any, backend: str | None) -> Any:
    options = KINDS[kind]
    if options is None:
        return ops.layer_norm(x, weight, bias, EPS, residual, backend=backend)
    return ops.rms_norm(x, weight, EPS, residual, backend=backend, **options)


def truth(kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Any:
    """By PyTorch's own operators, in float64."""
    total = x if residual is None else x + residual
    options = KINDS[kind]
    if options is None:
        y = torch.nn.functional.layer_norm(total, total.shape[-1:], weight, bias, EPS)
    else:
        scale = None if weight is None else weight + options.get("weight_offset", 0.0)
        y = torch.nn.functional.rms_norm(total, total.shape[-1:], scale, EPS)
    return y if residual is None else (y, total)


LEAVES = ("x", "weight", "bias", "residual")


def run(function: Callable[..., Any], kind: str, inputs: dict[str, Tensor], residual: bool, *rest: Any) -> list[Tensor]:
    """Outputs and gradients of one call."""
    used = [name for name in LEAVES if (residual or name != "residual") and (kind == "layer" or name != "bias")]
    leaves = {name: inputs[name].detach().requires_grad_() for name in used}
    output = function(kind, *(leaves.get(name) for name in LEAVES), *rest)
    outputs = output if residual else (output,)
    arriving = [inputs["grad"], inputs["grad_total"]][: len(outputs)]
    torch.autograd.backward(outputs, arriving)
    gradients = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
    assert len(gradients) == len(used)
    return [*(tensor.detach() for tensor in outputs), *gradients]


def relative_error(out: Tensor, reference: Tensor, least: float = 0.0) -> float:
    assert out.shape == reference.shape
    difference, size = (out.double() - reference).norm(), reference.norm().clamp(min=least)
    return float(difference / size) if size > 0 else float(difference)


def in_double(inputs: dict[str, Tensor], residual: bool) -> dict[str, Tensor]:
    """float64 copies; the sum with the residual is rounded once before it is normalised, as in the operation."""
    copies = {name: tensor.double() for name, tensor in inputs.items()}
    if residual and inputs["x"].dtype != torch.float64:
        rounded = (inputs["x"] + inputs["residual"]).double()
        copies["x"] = rounded - copies["residual"]
    return copies


def assert_agrees(kind: str, inputs: dict[str, Tensor], residual: bool, backend: str) -> None:
    results = run(call, kind, inputs, residual, backend)
    assert all(result.dtype == inputs["x"].dtype and result.is_contiguous() for result in results)
    expected = run(truth, kind, in_double(inputs, residual), residual)
    # the gradient of one feature is the difference of two equal numbers
    least = float(inputs["grad"].double().norm()) if inputs["x"].shape[-1] == 1 else 0.0
    errors = [relative_error(*pair, least) for pair in zip(results, expected, strict=True)]
    assert max(errors) <= TOLERANCE[inputs["x"].dtype], (inputs["x"].shape, errors)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64(isa: str, dtype: torch.dtype, kind: str, residual: bool) -> None:
    if isa == "cpu" and dtype == torch.float64:
        pytest.skip("float64 is the reference's")
    for shape in (*SHAPES, LARGER_THAN_A_TASK):
        assert_agrees(kind, inputs_of(shape, dtype), residual, isa)


def test_a_mean_far_from_zero_does_not_cancel(isa: str) -> None:
    inputs = inputs_of((3, 700), shift=300.0)
    assert (
        relative_error(
            run(call, "layer", inputs, False, isa)[0], run(truth, "layer", in_double(inputs, False), False)[0]
        )
        <= 2e-5
    )


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_a_row_does_not_depend_on_the_rows_beside_it(backend: str, dtype: torch.dtype, kind: str) -> None:
    if backend != "cpu":
        pytest.skip("what PyTorch and Triton do")
    for features in (70, 1091):
        inputs = inputs_of((7, features), dtype)
        together = run(call, kind, inputs, True, backend)[:3]  # y, the sum, the gradient of x
        for rows in (slice(0, 1), slice(2, 7), slice(5, 7)):
            some = {name: tensor[rows] if tensor.dim() == 2 else tensor for name, tensor in inputs.items()}
            for actual, expected in zip(run(call, kind, some, True, backend), together, strict=False):
                assert_same_bits(actual, expected[rows])


def test_extreme_values(isa: str, kind: str) -> None:
    x = torch.ones(5, 33)
    x[0, 3], x[1, 4], x[2] = float("nan"), float("inf"), 0.0
    x[3] = 1e-30
    y = call(kind, x, None, None, None, isa)
    assert y[0].isnan().all() and y[1].isnan().any()
    assert torch.equal(y[2], torch.zeros(33)) and y[4].isfinite().all()
    assert y[3].abs().max() < 1e-20


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_rounding_before_the_weight_is_what_llama_does(isa: str, dtype: torch.dtype) -> None:
    inputs = inputs_of((64, 96), dtype)
    x = inputs["x"]
    values = x.float()
    normal = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + EPS)
    for options, expected in (
        ({"round_before_weight": True}, inputs["weight"] * normal.to(dtype)),
        ({"weight_offset": 1.0}, (normal * (1.0 + inputs["weight"].float())).to(dtype)),
    ):
        y = ops.rms_norm(x, inputs["weight"], EPS, backend=isa, **options)
        different = (y != expected).float().mean()
        assert different <= (0.01 if dtype != torch.float32 else 1.0)  # float32 differs in the order of its sums
        assert relative_error(y, expected.double()) <= (1e-4 if dtype != torch.float32 else 1e-6)


def test_weights_of_another_dtype(backend: str) -> None:
    inputs = inputs_of((9, 70), torch.bfloat16)
    weight = inputs["weight"].float().requires_grad_()
    y = ops.rms_norm(inputs["x"], weight, EPS, backend=backend)
    assert y.dtype == torch.bfloat16
    y.backward(inputs["grad"])
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    expected = run(truth, "rms", {**in_double(inputs, False)}, False)[2]
    assert relative_error(weight.grad, expected) <= 8e-3


def test_without_weight_and_bias(backend: str, kind: str) -> None:
    x = inputs_of((9, 70))["x"]
    if kind != "rms, offset":
        assert (
            relative_error(call(kind, x, None, None, None, backend), truth(kind, x.double(), None, None, None)) < 5e-6
        )


# ---- layouts


def test_tensors_that_are_not_contiguous(backend: str, kind: str) -> None:
    inputs = inputs_of((21, 2, 33))
    expected = run(call, kind, inputs, True, backend)
    wide = {name: torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 5) for name, tensor in inputs.items()}
    for name, tensor in inputs.items():
        wide[name][..., :-5] = tensor
    strided = {name: wide[name][..., :-5] if inputs[name].dim() == 3 else inputs[name] for name in inputs}
    turned = {name: tensor.transpose(0, -1).contiguous().transpose(0, -1) for name, tensor in inputs.items()}
    for layout in (strided, turned):
        for actual, contiguous in zip(run(call, kind, layout, True, backend), expected, strict=True):
            error = relative_error(actual, contiguous.double())
            assert error <= (0.0 if backend == "cpu" else 5e-7)  # PyTorch sums in another order


def test_a_gradient_that_is_broadcast(isa: str, kind: str) -> None:
    inputs = inputs_of((21, 33))
    assert_agrees(kind, {**inputs, "grad": torch.ones(1, 1).expand(21, 33)}, True, isa)


# ---- gradients, memory


@pytest.mark.parametrize("compiled", [False, True])
def test_only_what_asks_gets_a_gradient(backend: str, compiled: bool) -> None:
    inputs = inputs_of((9, 70))
    everything = run(call, "layer", inputs, True, backend)[2:]
    for wanted in (
        itertools.product([True, False], repeat=4)
        if not compiled
        else [(True, False, False, True), (False, True, True, False)]
    ):
        leaves = [inputs[name].clone().requires_grad_(need) for name, need in zip(LEAVES, wanted, strict=True)]

        def layer(*tensors: Tensor) -> Any:
            return call("layer", *tensors, backend)

        y, total = (torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer)(*leaves)
        assert y.requires_grad == any(wanted) and total.requires_grad == any(wanted)
        if any(wanted):
            torch.autograd.backward([y, total], [inputs["grad"], inputs["grad_total"]])
        for leaf, need, expected in zip(leaves, wanted, everything, strict=True):
            assert (leaf.grad is not None) == need
            if leaf.grad is not None and (leaf is not leaves[2] or any(wanted[:2])):
                assert_same_bits(leaf.grad, expected)
            elif leaf.grad is not None:  # the bias without x and weight is PyTorch's own sum
                assert relative_error(leaf.grad, expected.double()) <= 5e-6


@pytest.mark.parametrize("used", [(True, False), (False, True)])
@pytest.mark.parametrize("compiled", [False, True])
def test_outputs_that_nobody_uses(backend: str, used: tuple[bool, bool], compiled: bool) -> None:
    inputs = inputs_of((9, 70))
    results = []
    for function, copies in ((call, inputs), (truth, in_double(inputs, True))):
        x, residual = (copies[name].clone().requires_grad_() for name in ("x", "residual"))
        rest = (backend,) if function is call else ()

        def layer(x: Tensor, residual: Tensor, function: Any = function, copies: Any = copies, rest: Any = rest) -> Any:
            return function("rms", x, copies["weight"], None, residual, *rest)

        if compiled and function is call:
            layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
        outputs = [output for output, use in zip(layer(x, residual), used, strict=True) if use]
        outputs[0].backward(copies["grad"])
        assert x.grad is not None and residual.grad is not None
        results.append((x.grad, residual.grad))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) <= 5e-6


def kept_for_backward(kind: str, inputs: dict[str, Tensor], residual: Tensor | None, backend: str) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda t: t):
        call(kind, inputs["x"].requires_grad_(), inputs["weight"], inputs["bias"], residual, backend)
    return kept


@pytest.mark.parametrize("residual", [False, True])
def test_one_tensor_is_kept_and_a_number_or_two_of_each_row(backend: str, kind: str, residual: bool) -> None:
    inputs = inputs_of((16, 64))
    kept = kept_for_backward(kind, inputs, inputs["residual"] if residual else None, backend)
    large = [tensor for tensor in kept if tensor.numel() == 16 * 64]
    assert len(large) == 1
    assert (large[0].data_ptr() == inputs["x"].data_ptr()) == (not residual)
    rows = [tensor for tensor in kept if tensor.shape == (16,)]
    assert len(rows) == (2 if kind == "layer" else 1) and all(tensor.dtype == torch.float32 for tensor in rows)
    assert len(kept) == 2 + len(rows)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_of_the_bias_alone_needs_nothing(backend: str, compiled: bool) -> None:
    inputs = inputs_of((9, 70))
    bias, kept = inputs["bias"].requires_grad_(), []

    def layer(bias: Tensor) -> Tensor:
        return ops.layer_norm(inputs["x"], inputs["weight"], bias, EPS, backend=backend)

    function = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda t: t):
        y = function(bias)
    assert all(tensor.numel() < inputs["x"].numel() for tensor in kept) if compiled else not kept
    y.backward(inputs["grad"])
    assert bias.grad is not None
    assert relative_error(bias.grad, inputs["grad"].double().sum(0)) <= 5e-6


def test_gradcheck(kind: str) -> None:
    inputs = {name: tensor.double().requires_grad_() for name, tensor in inputs_of((3, 5)).items()}
    leaves = [inputs[name] for name in LEAVES]
    assert torch.autograd.gradcheck(lambda *tensors: call(kind, *tensors, None), leaves)


def test_backward_twice_and_shared_inputs(backend: str) -> None:
    inputs = inputs_of((9, 70))
    x = inputs["x"].clone().requires_grad_()
    y, total = ops.rms_norm(x, inputs["weight"], EPS, x, backend=backend)  # x is its own residual
    loss = (y * inputs["grad"]).sum() + (total * inputs["grad_total"]).sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert_same_bits(first, second)
    double = in_double(inputs, False)
    leaf = double["x"].requires_grad_()
    expected_y, expected_total = truth("rms", leaf, double["weight"], None, leaf)
    expected = torch.autograd.grad(
        (expected_y * double["grad"]).sum() + (expected_total * double["grad_total"]).sum(), leaf
    )[0]
    assert relative_error(first, expected) <= 5e-6


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(backend: str, use_reentrant: bool) -> None:
    inputs = inputs_of((9, 70))
    x = inputs["x"].clone().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(
        lambda x: ops.rms_norm(x, inputs["weight"], EPS, backend=backend), x, use_reentrant=use_reentrant
    )
    y.backward(inputs["grad"])
    assert x.grad is not None
    assert_same_bits(x.grad, run(call, "rms", inputs, False, backend)[1])


# ---- compile, operators, threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_as_one_graph(backend: str, dtype: torch.dtype, kind: str) -> None:
    inputs = inputs_of((9, 70), dtype)
    torch._dynamo.reset()  # each case is a graph of its own, and there is a limit

    def layer(*tensors: Tensor) -> Tensor:
        y, total = call(kind, tensors[0] * 1.0, *tensors[1:], backend)
        return y.relu() + total

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaves = [inputs[name].clone().requires_grad_() for name in LEAVES]
        function(*leaves).backward(inputs["grad"])
        results.append([leaf.grad for leaf in leaves if leaf.grad is not None])
    for eager, compiled in zip(*results, strict=True):
        assert_same_bits(compiled, eager)


@pytest.mark.parametrize("residual", [False, True])
def test_operator_contract(backend: str, kind: str, residual: bool) -> None:
    inputs = inputs_of((9, 33))
    x, weight, bias, other = (inputs[name].requires_grad_() for name in LEAVES)
    options = KINDS[kind]
    numbers = (EPS, (options or {}).get("weight_offset", 0.0), options is None, "round first" in kind)
    arguments = (x.t().contiguous().t(), other if residual else None, weight, bias if options is None else None)
    torch.library.opcheck(torch.ops.peftkern.norm.default, (*arguments, *numbers, backend))


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_bit_equal_for_any_number_of_threads(backend: str, dtype: torch.dtype) -> None:
    if backend != "cpu":
        pytest.skip("PyTorch's own sums depend on its threads")
    inputs, threads = inputs_of(LARGER_THAN_A_TASK, dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(call, "layer", inputs, True, backend)
        for count in (2, 3):
            torch.set_num_threads(count)
            for actual, single in zip(run(call, "layer", inputs, True, backend), expected, strict=True):
                assert_same_bits(actual, single)
    finally:
        torch.set_num_threads(threads)


# ---- checks


def test_bad_arguments_are_named() -> None:
    x, w = torch.zeros(2, 3), torch.ones(3)
    with pytest.raises(TypeError, match="rms_norm: x must be a tensor, got NoneType"):
        ops.rms_norm(None, w, EPS)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="rms_norm: weight must be a tensor, got float"):
        ops.rms_norm(x, 1.0, EPS)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"layer_norm: x must be float64.*got torch\.int64"):
        ops.layer_norm(x.long(), w, w, EPS)
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., features\] with at least one feature, got \[2, 0\]"):
        ops.rms_norm(x[:, :0], w[:0], EPS)
    with pytest.raises(ValueError, match=r"bias must be \[features\], \[3\] here; got \[2\]"):
        ops.layer_norm(x, w, w[:2], EPS)
    with pytest.raises(TypeError, match=r"residual must have the dtype of x, torch\.float32; got torch\.bfloat16"):
        ops.rms_norm(x, w, EPS, x.bfloat16())
    with pytest.raises(ValueError, match=r"residual must have the shape of x, \[2, 3\]; got \[3\]"):
        ops.rms_norm(x, w, EPS, x[0])
    with pytest.raises(ValueError, match="weight is on meta and x on cpu"):
        ops.rms_norm(x, w.to("meta"), EPS)
    with pytest.raises(ValueError, match=r"residual must be dense, got torch\.sparse_coo"):
        ops.rms_norm(x, w, EPS, x.to_sparse())


def test_lazily_negated_tensors(backend: str) -> None:
    inputs = inputs_of((9, 70))
    expected = run(call, "rms", {name: -t if t.dim() == 2 else t for name, t in inputs.items()}, True, backend)
    lazy = {name: torch._neg_view(t) if t.dim() == 2 else t for name, t in inputs.items()}
    for actual, eager in zip(run(call, "rms", lazy, True, backend), expected, strict=True):
        assert_same_bits(actual, eager)


def test_meta_tensors_have_the_right_shape() -> None:
    x = torch.empty(2, 3, device="meta", dtype=torch.bfloat16)
    y, total = ops.rms_norm(x, None, EPS, x)
    assert y.is_meta and y.shape == total.shape == x.shape and y.dtype == total.dtype == x.dtype


@pytest.mark.skipif(not cpu.available(), reason="needs the native module")
def test_a_forced_backend_that_cannot_run_raises() -> None:
    x = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(registry.BackendError, match=r"norm: backend 'cpu' was forced.*torch\.float64"):
        ops.rms_norm(x, None, EPS, backend="cpu")
