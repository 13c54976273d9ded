"""lora_linear against float64, on every backend and every instruction set that this machine runs."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from isa_backends import ISA_BACKENDS, select
from lora_problem import TOLERANCE, Problem, assert_agrees, make_problem, relative_error
from torch import Tensor

import peftkern
from peftkern import ops
from peftkern.backends import cpu, registry
from peftkern.formats import FORMATS, QuantizedTensor
from peftkern.ops.lora_linear import Adapters, flatten_weight, is_plain_eager

DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]
WEIGHTS = ["dense", *sorted(FORMATS)]


@pytest.fixture(params=ISA_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return select(request.param, monkeypatch)


def compiled_anew() -> Any:
    """The compiled operation; graphs of other tests, which have a limit, are forgotten."""
    torch.compiler.reset()
    return torch.compile(ops.lora_linear, fullgraph=True, backend="aot_eager")


SHAPES = [  # tokens, in, out, rank
    (1, 64, 64, 1),
    (2, 128, 192, 4),
    (5, 63, 17, 3),
    (14, 320, 96, 8),
    (15, 192, 130, 16),
    (37, 576, 192, 16),
    (70, 144, 257, 33),
    (33, 100, 7, 2),
    (3, 1, 1, 1),
    (130, 80, 48, 256),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_agrees_with_float64(backend: str, weight: str, dtype: torch.dtype) -> None:
    for tokens, in_features, out_features, rank in SHAPES:
        problem = make_problem(tokens, in_features, out_features, [rank], weight, dtype)
        assert_agrees(problem, backend)


@pytest.mark.parametrize("block_size", [32, 128, 4096])
@pytest.mark.parametrize("weight", ["nf4", "fp4", "int8_blockwise"])
def test_every_block_size_and_double_quantization(backend: str, weight: str, block_size: int) -> None:
    for in_features in (256, 576, 90):  # whole blocks a row, blocks across rows, odd nibbles
        problem = make_problem(9, in_features, 70, [4], weight, block_size=block_size, double_quant=True)
        assert_agrees(problem, backend)


@pytest.mark.parametrize("weight", ["nf4", "dense"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_adapters_with_dropout(backend: str, weight: str, dtype: torch.dtype) -> None:
    assert_agrees(make_problem(37, 192, 130, [16, 3, 8], weight, dtype, dropout_p=0.3), backend)
    assert_agrees(make_problem(3, 192, 130, [1, 5], weight, dtype, dropout_p=0.1, bias=False), backend)


def test_no_adapter(backend: str) -> None:
    assert_agrees(make_problem(37, 192, 130, [], "nf4"), backend)


def test_many_tokens_need_several_token_blocks(backend: str) -> None:
    assert_agrees(make_problem(2100, 64, 40, [2], "nf4", torch.bfloat16), backend)


@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(1, 40),
    in_features=st.integers(1, 150),
    out_features=st.integers(1, 150),
    rank=st.integers(1, 20),
    weight=st.sampled_from(WEIGHTS),
    dropout_p=st.sampled_from([0.0, 0.5]),
)
def test_any_size(tokens: int, in_features: int, out_features: int, rank: int, weight: str, dropout_p: float) -> None:
    problem = make_problem(tokens, in_features, out_features, [rank], weight, dropout_p=dropout_p, positive=True)
    assert_agrees(problem, "cpu" if cpu.available() else "reference")


# ---- layouts


def _not_contiguous(tensor: Tensor) -> list[Tensor]:
    wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] * 2, dtype=tensor.dtype)
    wide[..., ::2] = tensor
    rows = torch.zeros(tensor.shape[0], tensor.shape[1] + 3, dtype=tensor.dtype)
    rows[:, : tensor.shape[1]] = tensor
    return [wide[..., ::2], rows[:, : tensor.shape[1]], tensor.t().contiguous().t()]


LAYOUT_TOLERANCE = {"cpu": 0.0, "reference": 5e-6}
"""PyTorch's product may sum in another order for another layout; ours does not."""


def test_inputs_that_are_not_contiguous(backend: str) -> None:
    problem = make_problem(21, 128, 96, [8], "nf4")
    expected = problem.run(backend)
    for x in _not_contiguous(problem.x):
        y = ops.lora_linear(x, problem.weight, problem.lora_A, problem.lora_B, 0.5, problem.bias, backend=backend)
        assert relative_error(y, expected["y"].double()) <= LAYOUT_TOLERANCE[backend]
    for grad in _not_contiguous(problem.grad):
        results = dataclasses.replace(problem, grad=grad).run(backend)
        for name in ("x", "A0", "B0"):
            assert relative_error(results[name], expected[name].double()) <= LAYOUT_TOLERANCE[backend]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_weights_in_any_layout(backend: str, dtype: torch.dtype) -> None:
    """The third is what GPT-2's ``Conv1D`` keeps: the transpose."""
    problem = make_problem(21, 130, 96, [8, 3], "dense", dtype, dropout_p=0.3)
    assert isinstance(problem.weight, Tensor)
    for weight in _not_contiguous(problem.weight):
        assert_agrees(dataclasses.replace(problem, weight=weight), backend)


@pytest.mark.skipif(not cpu.available(), reason="about the native kernels")
@pytest.mark.parametrize("tokens", [1, 21])
def test_a_transposed_dense_weight_is_not_copied(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    problem = make_problem(tokens, 128, 96, [8], "dense")
    assert isinstance(problem.weight, Tensor)
    stored = problem.weight.t().contiguous()
    expected = problem.run("cpu")
    read: list[int] = []
    real = cpu._weight_tuple
    monkeypatch.setattr(cpu, "_weight_tuple", lambda weight: read.append(real(weight)[0][0]) or real(weight))
    results = dataclasses.replace(problem, weight=stored.t()).run("cpu")
    assert read == [stored.data_ptr()] * 2  # forward and backward
    # the sums may run in another order
    assert all(relative_error(results[name], expected[name].double()) <= 5e-6 for name in expected)


def test_gradient_that_is_broadcast(backend: str) -> None:
    problem = make_problem(21, 128, 96, [8], "nf4")
    problem.grad = torch.ones(1, 1).expand(21, 96)
    assert_agrees(problem, backend)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 5), (0,), (3, 0, 2)], ids=str)
def test_any_leading_dimensions(backend: str, leading: tuple[int, ...]) -> None:
    problem = make_problem(1, 128, 96, [8], "nf4")
    x = torch.randn(*leading, 128, requires_grad=True)
    lora_A = problem.lora_A[0].requires_grad_()
    y = ops.lora_linear(x, problem.weight, lora_A, problem.lora_B[0], backend=backend)
    assert y.shape == (*leading, 96)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    flat = ops.lora_linear(x.detach().reshape(-1, 128), problem.weight, lora_A, problem.lora_B[0], backend="reference")
    assert lora_A.grad is not None and relative_error(y.detach().reshape(-1, 96), flat.detach().double()) < 5e-6


@pytest.mark.parametrize("operand", ["x", "weight", "lora_A", "lora_B", "bias"])
def test_a_lazily_negated_operand(backend: str, operand: str) -> None:
    problem = make_problem(9, 128, 96, [8], "dense")
    arguments = _arguments(problem)
    expected = ops.lora_linear(**(arguments | {operand: -arguments[operand]}), backend=backend)
    negated = torch._neg_view(arguments[operand])
    assert negated.is_neg()
    assert torch.equal(ops.lora_linear(**(arguments | {operand: negated}), backend=backend), expected)


def test_a_lazily_negated_gradient(backend: str) -> None:
    problem = make_problem(9, 128, 96, [8], "nf4")
    expected = dataclasses.replace(problem, grad=-problem.grad).run(backend)
    results = dataclasses.replace(problem, grad=torch._neg_view(problem.grad)).run(backend)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


@pytest.mark.parametrize("weight", ["dense", "nf4", "fp4", "int8_blockwise"])
@pytest.mark.parametrize(("in_features", "out_features"), [(0, 5), (64, 0), (0, 0)])
def test_no_features(weight: str, in_features: int, out_features: int) -> None:
    problem = make_problem(1, in_features, out_features, [3], weight)
    x = torch.randn(2, 3, in_features, requires_grad=True)
    lora_A, lora_B, bias = problem.lora_A[0].requires_grad_(), problem.lora_B[0].requires_grad_(), problem.bias
    assert bias is not None
    leaves = (x, lora_A, lora_B, bias.requires_grad_())
    y = ops.lora_linear(x, problem.weight, lora_A, lora_B, bias=bias)
    dense = problem.weight if isinstance(problem.weight, Tensor) else ops.dequantize(problem.weight)
    expected = torch.nn.functional.linear(x, dense, bias) + x @ lora_A.t() @ lora_B.t()
    torch.testing.assert_close(y, expected)
    gradients = [torch.autograd.grad(out.sum(), leaves, allow_unused=True) for out in (y, expected)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(compiled_anew()(x, problem.weight, lora_A, lora_B, bias=bias), expected)


# ---- tensors that are more than memory


class Wrapper(Tensor):
    """A subclass without memory of its own: whoever reads its address reads nothing."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        wrapper: Wrapper = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(value: Any) -> Any:
            return value.inner if isinstance(value, Wrapper) else value

        return func(*torch.utils._pytree.tree_map(unwrap, args), **(kwargs or {}))


def _arguments(problem: Problem) -> dict[str, Any]:
    lora_A, lora_B = problem.lora_A[0], problem.lora_B[0]
    return {"x": problem.x, "weight": problem.weight, "lora_A": lora_A, "lora_B": lora_B, "bias": problem.bias}


@pytest.mark.parametrize("operand", ["x", "weight", "lora_A", "lora_B", "bias"])
def test_any_operand_may_be_a_tensor_subclass(backend: str, operand: str) -> None:
    arguments = _arguments(make_problem(9, 128, 96, [8], "dense"))
    expected = ops.lora_linear(**arguments, backend=backend)
    arguments[operand] = Wrapper(arguments[operand])
    assert torch.equal(ops.lora_linear(**arguments, backend=backend), expected)


@pytest.mark.parametrize("field", ["packed", "scales", "absmax", "offset"])
def test_any_part_of_a_quantized_weight_may_be_a_tensor_subclass(backend: str, field: str) -> None:
    arguments = _arguments(make_problem(9, 128, 96, [8], "nf4", double_quant=True))
    expected = ops.lora_linear(**arguments, backend=backend)
    weight = arguments["weight"]
    if field in ("packed", "scales"):
        arguments["weight"] = dataclasses.replace(weight, **{field: Wrapper(getattr(weight, field))})
    else:
        nested = weight.double_quantization
        nested = dataclasses.replace(nested, **{field: Wrapper(getattr(nested, field))})
        arguments["weight"] = dataclasses.replace(weight, double_quantization=nested)
    assert torch.equal(ops.lora_linear(**arguments, backend=backend), expected)


def test_only_plain_tensors_skip_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, parameter = torch.zeros(2), torch.nn.Parameter(torch.zeros(2))
    assert is_plain_eager((plain, parameter)) and is_plain_eager((plain,), parameter)
    assert not is_plain_eager((plain, Wrapper(plain))) and not is_plain_eager((plain,), Wrapper(plain))
    assert not is_plain_eager((plain, torch._neg_view(plain)))
    assert not is_plain_eager((torch.zeros(2, device="meta"),))


def test_without_pytorchs_private_function_every_call_takes_the_operator(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem(9, 128, 96, [8], "nf4", dropout_p=0.3)
    expected = problem.run(backend)
    monkeypatch.setitem(is_plain_eager.__globals__, "_get_current_dispatch_mode", None)
    assert not is_plain_eager((problem.x,))
    results = problem.run(backend)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


@pytest.mark.parametrize("weight", ["dense", "nf4", "int8"])
def test_a_default_device_elsewhere_changes_nothing(backend: str, weight: str) -> None:
    problem = make_problem(9, 128, 96, [8], weight, dropout_p=0.3)
    expected = problem.run(backend)
    with torch.device("meta"):
        results = problem.run(backend)
    assert all(torch.equal(results[name], expected[name]) for name in expected)
    torch.set_default_device("meta")
    try:
        results = problem.run(backend)
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


# ---- gradients


@pytest.mark.parametrize("wanted", ["x", "A", "B", "bias", "none"])
def test_only_what_asks_gets_a_gradient(backend: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(9, 128, 96, [8], "nf4")
    leaves = {"x": problem.x, "A": problem.lora_A[0], "B": problem.lora_B[0], "bias": problem.bias}
    expected = problem.run(backend)
    if wanted != "none":
        leaves[wanted].requires_grad_()
    torch.manual_seed(11)
    y = ops.lora_linear(leaves["x"], problem.weight, leaves["A"], leaves["B"], 0.5, leaves["bias"], backend=backend)
    assert y.requires_grad == (wanted != "none")
    if wanted == "none":
        return
    y.backward(problem.grad)
    key = {"A": "A0", "B": "B0"}.get(wanted, wanted)
    assert torch.equal(leaves[wanted].grad, expected[key])
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != wanted)


def test_backward_keeps_no_copy_of_the_weight_nor_of_x() -> None:
    problem = make_problem(64, 256, 512, [4], "nf4")
    x = problem.x.requires_grad_()
    lora_A, lora_B = problem.lora_A[0].requires_grad_(), problem.lora_B[0].requires_grad_()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ops.lora_linear(x, problem.weight, lora_A, lora_B, dropout_p=0.5)
    assert isinstance(problem.weight, QuantizedTensor)
    known = {t.data_ptr() for t in (x, lora_A, lora_B, problem.weight.packed, problem.weight.scales)}
    extra = sum(t.nbytes for t in saved if t.data_ptr() not in known)
    assert extra == 64 * 4 * 4 + 8  # h in float32 and the seed


def test_backward_twice_over_the_same_graph(backend: str) -> None:
    problem = make_problem(9, 128, 96, [8], "nf4", dropout_p=0.5)
    x = problem.x.requires_grad_()
    y = ops.lora_linear(x, problem.weight, problem.lora_A, problem.lora_B, 0.5, dropout_p=0.5, backend=backend)
    first = torch.autograd.grad(y, x, problem.grad, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, x, problem.grad)[0])


@pytest.mark.parametrize("changed", ["packed", "scales", "absmax", "offset", "dense"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_weight_changed_between_forward_and_backward(backend: str, changed: str, compiled: bool) -> None:
    problem = make_problem(9, 128, 96, [8], "dense" if changed == "dense" else "nf4", double_quant=True)
    weight, x = problem.weight, problem.x.requires_grad_()
    y = (compiled_anew() if compiled else ops.lora_linear)(
        x, weight, problem.lora_A[0], problem.lora_B[0], backend=backend
    )
    if isinstance(weight, Tensor):
        weight.zero_()
    else:
        getattr(weight.double_quantization if changed in ("absmax", "offset") else weight, changed).zero_()
    with pytest.raises(RuntimeError, match=r"modified (in place|by an inplace operation)"):
        y.sum().backward()


def test_a_weight_made_in_inference_mode_has_no_version_and_works(backend: str) -> None:
    problem = make_problem(9, 128, 96, [8], "nf4")
    expected = problem.run(backend)
    with torch.inference_mode():
        problem.weight = make_problem(9, 128, 96, [8], "nf4").weight
    assert isinstance(problem.weight, QuantizedTensor) and problem.weight.packed.is_inference()
    results = problem.run(backend)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_the_operators_second_result_asks_for_no_gradient() -> None:
    problem = make_problem(9, 128, 96, [8], "nf4")
    arguments = _operator_arguments(problem)
    y, h = torch.ops.peftkern.lora_linear(problem.x.requires_grad_(), *arguments[1:])
    assert y.requires_grad and not h.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        h.sum().backward()


@pytest.mark.parametrize("weight", ["nf4", "dense"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(weight: str, dropout_p: float) -> None:
    problem = make_problem(4, 6, 5, [2, 3], weight).double()
    leaves = [t.requires_grad_() for t in (problem.x, *problem.lora_A, *problem.lora_B, problem.bias)]

    def call(x: Tensor, a0: Tensor, a1: Tensor, b0: Tensor, b1: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(5)
        return ops.lora_linear(x, problem.weight, [a0, a1], [b0, b1], [0.5, 2.0], bias, dropout_p)

    assert torch.autograd.gradcheck(call, leaves)


# ---- dropout


def test_dropout_has_the_right_rate_and_scale(backend: str) -> None:
    tokens, features, p = 400, 256, 0.25
    eye = torch.eye(features)
    torch.manual_seed(1)
    y = ops.lora_linear(
        torch.ones(tokens, features), torch.zeros(features, features), eye, eye, dropout_p=p, backend=backend
    )
    kept = y != 0
    assert torch.allclose(y[kept], torch.tensor(1 / (1 - p)))
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.double().mean() - (1 - p)) < 5 * deviation
    for rate in (kept.double().mean(0), kept.double().mean(1)):
        assert (rate - (1 - p)).abs().max() < 0.15


def test_dropout_masks_are_independent_and_follow_the_seed(backend: str) -> None:
    eye, zero = torch.eye(64), torch.zeros(64, 64)

    def masks(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        x = torch.ones(50, 64)
        return tuple(
            ops.lora_linear(x, zero, [eye, eye], [b, a], dropout_p=0.5, backend=backend) != 0
            for a, b in ((zero, eye), (eye, zero))
        )

    first, second = masks(0), masks(0)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert 0.3 < (first[0] == first[1]).double().mean() < 0.7
    assert not torch.equal(first[0], masks(1)[0])


def test_dropout_of_everything(backend: str) -> None:
    problem = make_problem(5, 64, 32, [4], "nf4")
    y = ops.lora_linear(problem.x, problem.weight, problem.lora_A, problem.lora_B, dropout_p=1.0, backend=backend)
    assert torch.equal(y, ops.lora_linear(problem.x, problem.weight, backend=backend))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_dropped_infinity_becomes_nan(backend: str, value: float) -> None:
    """As in ``torch.nn.Dropout``, which multiplies by zero."""
    x, lora_A, one = torch.zeros(64, 8), torch.zeros(1, 8), torch.ones(1, 1)
    x[:, 2], lora_A[0, 2] = value, 1.0
    torch.manual_seed(0)
    y = ops.lora_linear(x, torch.zeros(1, 8), lora_A, one, dropout_p=0.5, backend=backend)
    assert not y.isfinite().any()
    y = ops.lora_linear(x, torch.zeros(1, 8), lora_A, one, dropout_p=1.0, backend=backend)
    assert y.isnan().all()


# ---- autocast, checkpointing, compile, operators


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    problem = make_problem(9, 128, 96, [8], "nf4")
    x = problem.x.requires_grad_()
    with torch.autocast("cpu", dtype):
        y = ops.lora_linear(x, problem.weight, problem.lora_A, problem.lora_B, 0.5, problem.bias, backend=backend)
    assert y.dtype == dtype
    y.backward(problem.grad.to(dtype))
    truth = problem.double().run("reference")
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert relative_error(y.detach(), truth["y"]) < TOLERANCE[dtype]
    assert relative_error(x.grad, truth["x"]) < TOLERANCE[dtype]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_sees_the_same_dropout(backend: str, use_reentrant: bool) -> None:
    problem = make_problem(9, 128, 96, [8], "nf4", dropout_p=0.5)

    def layer(x: Tensor) -> Tensor:
        return ops.lora_linear(x, problem.weight, problem.lora_A, problem.lora_B, 0.5, None, 0.5, backend=backend)

    gradients = []
    for checkpointed in (False, True):
        x = problem.x.detach().clone().requires_grad_()
        torch.manual_seed(2)
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant) if checkpointed else layer(x)
        y.backward(problem.grad)
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compiles_as_one_graph(backend: str, dropout_p: float) -> None:
    problem = make_problem(9, 128, 96, [8], "nf4", dropout_p=dropout_p)

    def layer(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        y = ops.lora_linear(x * 1.0, problem.weight, lora_A, lora_B, 0.5, problem.bias, dropout_p, backend=backend)
        return y.relu()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for call in (layer, compiled):
        leaves = [t.detach().clone().requires_grad_() for t in (problem.x, problem.lora_A[0], problem.lora_B[0])]
        torch.manual_seed(4)
        call(*leaves).sum().backward()
        results.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(eager, other) for eager, other in zip(*results, strict=True))


def _operator_arguments(problem: Problem) -> list[Any]:
    """Those of ``torch.ops.peftkern.lora_linear``."""
    adapters = (problem.lora_A, problem.lora_B, problem.scaling, problem.dropout_p, torch.tensor(1234))
    return [problem.x, *flatten_weight(problem.weight), *adapters, problem.bias, None]


def _backward_operator_arguments(problem: Problem) -> list[Any]:
    """Those of ``torch.ops.peftkern.lora_linear_backward``."""
    h = torch.zeros(problem.x.shape[0], sum(a.shape[0] for a in problem.lora_A))
    return [problem.grad, *_operator_arguments(problem)[:-2], h, True, [True, True], None]


def _shortened(weight: Tensor | QuantizedTensor, field: str) -> Tensor | QuantizedTensor:
    if isinstance(weight, Tensor):
        return weight[:-1]
    return dataclasses.replace(weight, **{field: getattr(weight, field)[:-1]})


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("field", ["packed", "scales"])
def test_the_raw_operators_refuse_a_weight_shorter_than_its_shape(weight: str, field: str) -> None:
    problem = make_problem(9, 128, 96, [8], weight)
    short = flatten_weight(_shortened(problem.weight, field))
    message = r"must be \[out_features, in_features\]" if weight == "dense" else f"QuantizedTensor: {field} must have"
    forward, backward = _operator_arguments(problem), _backward_operator_arguments(problem)
    forward[1:8], backward[2:9] = short[:7], short[:7]  # all but the shape
    with pytest.raises(ValueError, match=message):
        torch.ops.peftkern.lora_linear(*forward)
    with pytest.raises(ValueError, match=message):
        torch.ops.peftkern.lora_linear_backward(*backward)


def test_the_raw_operators_refuse_operands_that_do_not_fit() -> None:
    problem = make_problem(9, 128, 96, [8], "nf4")
    for change, message in (
        ({"x": problem.x[:, 1:]}, "x must be"),
        ({"lora_A": [torch.zeros(0, 128)], "lora_B": [torch.zeros(96, 0)]}, "r >= 1"),
        ({"lora_B": [torch.zeros(95, 8)]}, "lora_B must be"),
        ({"bias": torch.zeros(95)}, "bias must be"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.peftkern.lora_linear(*_operator_arguments(dataclasses.replace(problem, **change)))
    for change, message in (
        ({"x": problem.x[:, 1:]}, "x must be"),
        ({"lora_B": [torch.zeros(95, 8)]}, "lora_B must be"),
        ({"grad": problem.grad[:, 1:]}, "grad must be"),
        ({"grad": problem.grad[1:], "x": problem.x}, "h must be"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.peftkern.lora_linear_backward(
                *_backward_operator_arguments(dataclasses.replace(problem, **change))
            )


@pytest.mark.parametrize("weight", ["nf4", "int8", "dense"])
def test_operator_contract(backend: str, weight: str) -> None:
    problem = make_problem(9, 128, 96, [8, 4], weight, dropout_p=0.5)
    leaves = [t.requires_grad_() for t in (*problem.lora_A, *problem.lora_B)]
    arguments = (
        problem.x.requires_grad_(),
        *flatten_weight(problem.weight),
        leaves[:2],
        leaves[2:],
        problem.scaling,
        problem.dropout_p,
        torch.tensor(1234),
        problem.bias,
        backend,
    )
    torch.library.opcheck(torch.ops.peftkern.lora_linear.default, arguments)


# ---- determinism, precision


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_of_an_earlier_call_reaches_a_result(backend: str, dtype: torch.dtype) -> None:
    """Threads keep their scratch from call to call, and an odd rank leaves a gap in it."""
    for tokens in (3, 37, 183):  # the last two leave one row over for the last tile, of 6 rows and of 14
        problem = make_problem(tokens, 192, 130, [16, 3, 1], "nf4", dtype)
        expected = problem.double().run("reference")
        even_ranks = make_problem(tokens, 192, 130, [16, 4, 2], "nf4", dtype)
        dataclasses.replace(even_ranks, x=torch.full_like(problem.x, float("nan"))).run(backend)
        results = problem.run(backend)
        assert all(relative_error(results[name], expected[name]) <= TOLERANCE[dtype] for name in expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_equal_from_run_to_run_and_for_any_number_of_threads(backend: str, dtype: torch.dtype) -> None:
    for tokens, dropout_p in ((5, 0.2), (70, 0.2), (70, 0.0)):
        problem = make_problem(tokens, 192, 160, [16], "nf4", dtype, dropout_p=dropout_p)
        expected = problem.run(backend)
        threads = torch.get_num_threads()
        try:
            for count in (threads, 1, 3):
                torch.set_num_threads(count)
                results = problem.run(backend)
                if backend == "reference" and count != threads:
                    continue  # PyTorch's own sums may depend on the number of threads
                assert all(torch.equal(results[name], expected[name]) for name in expected)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_and_sizes_around_those_that_are_read_as_they_lie(backend: str, dtype: torch.dtype) -> None:
    """On the CPU, products with factors of 8, 16, 24 or 32 and many tokens go past the panels of all others."""
    for tokens, in_features, out_features, ranks in (
        (64, 64, 96, [8]),
        (67, 576, 192, [16]),
        (602, 96, 1056, [24, 32]),
        (66, 80, 48, [8, 12]),
        (65, 72, 40, [16]),
        (300, 128, 64, [40, 16]),
        (63, 128, 64, [16]),
    ):
        assert_agrees(make_problem(tokens, in_features, out_features, ranks, "nf4", dtype), backend)


@pytest.fixture
def restore_matmul_precision() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


FORM_TOLERANCE = {cpu.FLOAT32: 5e-6, cpu.BFLOAT16: 8e-3, cpu.FLOAT16: 2e-3}


@pytest.mark.parametrize("form", FORM_TOLERANCE, ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_form_of_arithmetic(backend: str, weight: str, form: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All three forms on every instruction set: where the processor lacks the instruction, they are emulated."""
    if backend == "reference":
        pytest.skip("the reference has one form")
    monkeypatch.setattr(cpu, "product_precision", lambda dtype, isa: form)
    for tokens, in_features, out_features in ((1, 128, 96), (11, 576, 192), (40, 320, 200)):
        problem = make_problem(tokens, in_features, out_features, [8], weight, dropout_p=0.2)
        truth, results = problem.double().run("reference"), problem.run(backend)
        errors = {name: relative_error(results[name], truth[name]) for name in truth}
        assert all(error <= FORM_TOLERANCE[form] for error in errors.values()), errors


@pytest.fixture(params=FORM_TOLERANCE, ids=["float32-form", "bfloat16-form", "float16-form"])
def form(request: pytest.FixtureRequest, backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend, made to compute in one form of arithmetic."""
    if backend == "reference":
        if request.param != cpu.FLOAT32:
            pytest.skip("the reference has one form")
        return backend
    monkeypatch.setattr(cpu, "product_precision", lambda dtype, isa: request.param)
    return backend


NOT_FINITE = {
    torch.float32: [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -0x800000],
    torch.bfloat16: [0x7FC0, 0x7FFF, -1, 0x7F81, 0x7F80, -0x80],
    torch.float16: [0x7E00, 0x7FFF, -1, 0x7C01, 0x7C00, -0x400],
}
"""Bits of NaN: the usual one, all ones, all ones with the sign, the smallest payload; and of both infinities."""


def not_finite(dtype: torch.dtype) -> Iterator[Tensor]:
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for pattern in NOT_FINITE[dtype]:
        value = torch.tensor(pattern, dtype=bits).view(dtype)
        assert not value.isfinite()
        yield value


def assert_spoils(spoiled: Tensor, index: Any, value: Tensor) -> None:
    """Everything at ``index`` is lost (NaN, if the input was), and nothing else."""
    lost = torch.zeros_like(spoiled, dtype=torch.bool)
    lost[index] = True
    assert torch.equal(~spoiled.isfinite(), lost)
    if value.isnan():
        assert torch.equal(spoiled.isnan(), lost)


NOT_FINITE_TOKENS = (1, 5, 66)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", ["dense", "nf4"])
def test_what_is_not_finite_in_x_reaches_its_row(form: str, weight: str, dtype: torch.dtype) -> None:
    for tokens in NOT_FINITE_TOKENS:
        problem = make_problem(tokens, 192, 70, [8], weight, dtype)
        for value in not_finite(dtype):
            spoiled = dataclasses.replace(problem, x=problem.x.clone())
            spoiled.x[tokens // 2, 100] = value
            results = spoiled.run(form)
            assert_spoils(results["y"], tokens // 2, value)
            assert_spoils(results["A0"], (slice(None), 100), value)
            assert not results["B0"].isfinite().any()
            assert results["x"].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", ["dense", "nf4"])
def test_what_is_not_finite_in_the_gradient_reaches_its_row(form: str, weight: str, dtype: torch.dtype) -> None:
    for tokens in NOT_FINITE_TOKENS:
        problem = make_problem(tokens, 70, 192, [8], weight, dtype)
        for value in not_finite(dtype):
            spoiled = dataclasses.replace(problem, grad=problem.grad.clone())
            spoiled.grad[tokens // 2, 100] = value
            results = spoiled.run(form)
            assert_spoils(results["x"], tokens // 2, value)
            assert_spoils(results["B0"], 100, value)
            assert_spoils(results["bias"], 100, value)
            assert not results["A0"].isfinite().any()


@pytest.mark.parametrize("weight", ["nf4", "fp4", "int8_blockwise"])
def test_what_is_not_finite_in_a_scale_reaches_its_block(form: str, weight: str) -> None:
    for tokens in NOT_FINITE_TOKENS:
        problem = make_problem(tokens, 192, 70, [8], weight)
        for value in not_finite(torch.float32):
            assert isinstance(problem.weight, QuantizedTensor)
            scales = problem.weight.scales.clone()
            scales[33, 1] = value
            results = dataclasses.replace(problem, weight=dataclasses.replace(problem.weight, scales=scales)).run(form)
            assert_spoils(results["y"], (slice(None), 33), value)
            assert_spoils(results["x"], (slice(None), slice(64, 128)), value)


def test_what_is_not_finite_in_the_scale_of_a_row(form: str) -> None:
    for tokens in NOT_FINITE_TOKENS:
        problem = make_problem(tokens, 192, 70, [8], "int8")
        for value in not_finite(torch.float32):
            assert isinstance(problem.weight, QuantizedTensor)
            scales = problem.weight.scales.clone()
            scales[33] = value
            results = dataclasses.replace(problem, weight=dataclasses.replace(problem.weight, scales=scales)).run(form)
            assert_spoils(results["y"], (slice(None), 33), value)
            assert not results["x"].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_in_a_dense_weight(form: str, dtype: torch.dtype) -> None:
    for tokens in NOT_FINITE_TOKENS:
        problem = make_problem(tokens, 192, 70, [8], "dense", dtype)
        for value in not_finite(dtype):
            assert isinstance(problem.weight, Tensor)
            weight = problem.weight.clone()
            weight[33, 100] = value
            results = dataclasses.replace(problem, weight=weight).run(form)
            assert_spoils(results["y"], (slice(None), 33), value)
            assert_spoils(results["x"], (slice(None), 100), value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", ["dense", "nf4", "int8"])
def test_every_form_is_bit_equal_for_any_number_of_threads(form: str, weight: str, dtype: torch.dtype) -> None:
    if form == "reference":
        pytest.skip("PyTorch's own sums may depend on the number of threads")
    threads = torch.get_num_threads()
    try:
        for tokens in (5, 70):
            problem = make_problem(tokens, 192, 130, [16], weight, dtype, dropout_p=0.2)
            torch.set_num_threads(1)
            expected = problem.run(form)
            for count in (2, 3, 7):
                torch.set_num_threads(count)
                results = problem.run(form)
                assert all(torch.equal(results[name], expected[name]) for name in expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("scale", [1e-20, 1e-4, 1e4, 1e20])
def test_float16_form_survives_any_magnitude(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if not any(isa.startswith("avx512") for isa in cpu.supported_isas()):
        pytest.skip("the float16 form needs AVX-512")
    monkeypatch.setattr(cpu, "product_precision", lambda dtype, isa: cpu.FLOAT16)
    problem = make_problem(20, 256, 128, [4], "nf4")
    problem.x, problem.grad = problem.x * scale, problem.grad * scale
    truth, results = problem.double().run("reference"), problem.run("cpu")
    assert all(relative_error(results[name], truth[name]) <= 2e-3 for name in ("y", "x"))


def test_precision_follows_pytorchs_setting(restore_matmul_precision: None, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "half": {"native_bfloat16": True, "native_float16": True},
        "brain": {"native_bfloat16": True, "native_float16": False},
        "plain": {"native_bfloat16": False, "native_float16": False},
    }
    monkeypatch.setattr(cpu, "instruction_sets", lambda: table)
    expected = {
        "highest": {"half": cpu.FLOAT32, "brain": cpu.FLOAT32, "plain": cpu.FLOAT32},
        "high": {"half": cpu.FLOAT16, "brain": cpu.FLOAT32, "plain": cpu.FLOAT32},
        "medium": {"half": cpu.FLOAT16, "brain": cpu.BFLOAT16, "plain": cpu.FLOAT32},
    }
    for setting, by_isa in expected.items():
        torch.set_float32_matmul_precision(setting)
        assert {isa: cpu.product_precision(torch.float32, isa) for isa in table} == by_isa
    assert cpu.product_precision(torch.bfloat16, "brain") == cpu.BFLOAT16
    assert cpu.product_precision(torch.float16, "brain") == cpu.FLOAT32
    assert cpu.product_precision(torch.float16, "half") == cpu.FLOAT16


# ---- bad input, choice of backend


def _call(**changes: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 64),
        "weight": ops.quantize(torch.ones(32, 64)),
        "lora_A": torch.zeros(4, 64),
        "lora_B": torch.zeros(32, 4),
    }
    return ops.lora_linear(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 63)}, ValueError, r"x must be .* in = 64 .* got \[2, 63\]"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must be"),
        ({"x": torch.zeros(2, 64, dtype=torch.int64)}, TypeError, "x must be float64, .* got torch.int64"),
        ({"x": [[0.0] * 64]}, TypeError, "x must be a tensor, got list"),
        ({"weight": torch.zeros(32)}, ValueError, r"weight must be \[out, in\], got \[32\]"),
        ({"weight": torch.zeros(32, 64, dtype=torch.uint8)}, TypeError, "weight must be float64"),
        ({"weight": torch.zeros(32, 64, requires_grad=True)}, ValueError, "weight is frozen"),
        ({"lora_A": None}, ValueError, "go together, but lora_A is None"),
        ({"lora_A": torch.zeros(4, 60)}, ValueError, r"lora_A must be \[r, in\] with in = 64, got \[4, 60\]"),
        (
            {"lora_A": torch.zeros(0, 64), "lora_B": torch.zeros(32, 0)},
            ValueError,
            "lora_A must be .* r >= 1, got r = 0",
        ),
        ({"lora_A": 3, "lora_B": 4}, TypeError, "lora_A must be a tensor, got int"),
        ({"x": torch.zeros(2, 64).to_sparse()}, ValueError, "x must be dense, got torch.sparse_coo; use x.to_dense"),
        ({"x": torch.zeros(2, 64).to_mkldnn()}, ValueError, "x must be dense, got torch._mkldnn"),
        ({"weight": torch.zeros(32, 64).to_sparse()}, ValueError, "weight must be dense, got torch.sparse_coo"),
        ({"weight": torch.zeros(32, 64).to_mkldnn()}, ValueError, "weight must be dense, got torch._mkldnn"),
        ({"lora_B": torch.zeros(31, 4)}, ValueError, r"lora_B must be \[out, r\] = \[32, 4\], got \[31, 4\]"),
        ({"lora_B": [torch.zeros(32, 4)] * 2}, ValueError, "lora_B must have one entry per adapter, 1; got 2"),
        ({"scaling": [1.0, 2.0]}, ValueError, "scaling must have one entry per adapter, 1; got 2"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1, got 1.5"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p must be between 0 and 1"),
        ({"bias": torch.zeros(31)}, ValueError, r"bias must be \[out\] = \[32\], got \[31\]"),
        ({"x": torch.zeros(2, 64, device="meta")}, ValueError, "weight is on cpu and x on meta"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _call(**changes)


@pytest.mark.parametrize("kind", [tuple, collections.deque, torch.nn.ParameterList, collections.UserList])
def test_adapters_in_any_sequence(kind: Any) -> None:
    problem = make_problem(9, 128, 96, [8, 3], "nf4")
    expected = ops.lora_linear(problem.x, problem.weight, problem.lora_A, problem.lora_B, [0.5, 2.0])
    y = ops.lora_linear(problem.x, problem.weight, kind(problem.lora_A), kind(problem.lora_B), (0.5, 2.0))
    assert torch.equal(y, expected)


def test_a_quantized_weight_that_does_not_fit_its_shape() -> None:
    weight = ops.quantize(torch.ones(32, 64))
    broken = dataclasses.replace(weight, packed=weight.packed[:-1])
    with pytest.raises(ValueError, match="packed"):
        _call(weight=broken)


def test_forced_backend_that_cannot_run_raises() -> None:
    with pytest.raises(registry.BackendError, match=r"'cpu' was forced and cannot run this call: torch.float64"):
        _call(x=torch.zeros(2, 64, dtype=torch.float64), backend="cpu")
    for name in ("nonsense", ""):
        message = f"backend must be one of cuda, triton, cpu, reference; got '{name}'"
        with pytest.raises(registry.BackendError, match=message):
            _call(backend=name)


def test_which_backend_needs_the_arguments_that_decide() -> None:
    x, weight = torch.zeros(2, 64), ops.quantize(torch.ones(32, 64))
    message = r"lora_linear takes \(x, weight, adapters, bias\), and its backend depends on x, weight; got"
    for arguments in ((), (x,)):
        for name in (None, "reference"):
            with pytest.raises(TypeError, match=f"{message} {len(arguments)} argument"):
                peftkern.which("lora_linear", *arguments, backend=name)
    adapters = Adapters([], [], [], [], None)
    choices = (peftkern.which("lora_linear", x, weight), peftkern.which("lora_linear", x, weight, adapters, None))
    assert {choice.backend for choice in choices} == {"cpu" if cpu.available() else "reference"}


def test_forced_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(2, 64), ops.quantize(torch.ones(32, 64))
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "reference")
    assert registry.choose("lora_linear", x, weight).backend == "reference"
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "gpu")
    message = "PEFTKERN_BACKEND must be one of cuda, triton, cpu, reference; got 'gpu'"
    with pytest.raises(registry.BackendError, match=message):
        registry.choose("lora_linear", x, weight)
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "cpu")
    monkeypatch.setenv(cpu.ENVIRONMENT_VARIABLE, "mmx")
    with pytest.raises(registry.BackendError, match="PEFTKERN_CPU_ISA is 'mmx'"):
        _call()


def test_a_fallback_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_reported", set())
    for _ in range(2):
        _call(x=torch.zeros(2, 64, dtype=torch.float64))
    messages = [record.message for record in caplog.records]
    assert messages == ["lora_linear runs on the reference backend (cpu: torch.float64 activations)"]
