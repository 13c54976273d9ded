"""masked_linear against float64, on every backend and every instruction set that this machine runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from isa_backends import ISA_BACKENDS, select
from lora_problem import TOLERANCE, Problem, make_problem, relative_error
from torch import Tensor

from peftkern import ops
from peftkern.backends import cpu
from peftkern.formats import FORMATS, BitMask, QuantizedTensor, group_mask, random_mask
from peftkern.ops.lora_linear import flatten_weight

DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]
WEIGHTS = ["dense", *sorted(FORMATS)]


@pytest.fixture(params=ISA_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return select(request.param, monkeypatch)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def run(problem: Problem, mask: BitMask, backend: str | None, trained: bool, call: Any = None) -> dict[str, Tensor]:
    """The result and every gradient; that of the weight where it is ``trained``."""
    x, lora_A, lora_B = leaf(problem.x), [leaf(a) for a in problem.lora_A], [leaf(b) for b in problem.lora_B]
    bias = None if problem.bias is None else leaf(problem.bias)
    weight = leaf(problem.weight) if trained and isinstance(problem.weight, Tensor) else problem.weight
    adapters: tuple[Any, ...] = (lora_A, lora_B) if lora_A else (None, None)
    torch.manual_seed(11)
    call = call or ops.masked_linear
    y = call(x, weight, mask, *adapters, problem.scaling, bias, problem.dropout_p, backend=backend)
    y.backward(problem.grad)
    assert y.dtype == x.dtype
    results = {"y": y.detach(), "x": x.grad}
    results |= {f"A{i}": a.grad for i, a in enumerate(lora_A)} | {f"B{i}": b.grad for i, b in enumerate(lora_B)}
    if bias is not None:
        results["bias"] = bias.grad
    if isinstance(weight, Tensor) and trained:
        assert weight.grad is not None and weight.grad.dtype == weight.dtype
        results["weight"] = weight.grad
    return results


def truth(problem: Problem, mask: BitMask, trained: bool) -> dict[str, Tensor]:
    """float64, by autograd over PyTorch's own operators."""
    problem = problem.double()
    weight = problem.weight
    dense = ops.dequantize(weight, torch.float64) if isinstance(weight, QuantizedTensor) else weight
    keep = mask.mask()

    def call(x: Tensor, weight: Any, mask: BitMask, lora_A: Any, lora_B: Any, *rest: Any, backend: None) -> Tensor:
        kept = torch.where(keep, weight if trained and isinstance(weight, Tensor) else dense, 0.0)
        frozen = torch.zeros_like(dense)
        return torch.nn.functional.linear(x, kept) + ops.lora_linear(x, frozen, lora_A, lora_B, *rest)

    return run(problem, mask, None, trained, call)


def assert_agrees(problem: Problem, mask: BitMask, backend: str, trained: bool) -> None:
    expected, results = truth(problem, mask, trained), run(problem, mask, backend, trained)
    assert results.keys() == expected.keys()
    errors = {name: relative_error(results[name], expected[name]) for name in expected}
    assert all(error <= TOLERANCE[problem.x.dtype] for error in errors.values()), errors
    if "weight" in results:
        assert not results["weight"][~mask.mask()].any()


SHAPES = [  # tokens, in, out, rank
    (1, 64, 64, 1),
    (5, 63, 17, 3),
    (15, 192, 130, 16),
    (37, 576, 192, 16),
    (70, 144, 257, 33),
    (33, 100, 7, 2),
    (3, 1, 1, 1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_agrees_with_float64(backend: str, weight: str, dtype: torch.dtype) -> None:
    for tokens, in_features, out_features, rank in SHAPES:
        problem = make_problem(tokens, in_features, out_features, [rank], weight, dtype)
        mask = random_mask((out_features, in_features), 0.4, seed=1)
        assert_agrees(problem, mask, backend, trained=True)


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_trained_weight_of_another_dtype(backend: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    problem = make_problem(19, 96, 70, [4], "dense", dtype, weight_dtype=weight_dtype, bias=False)
    mask = random_mask((70, 96), 0.5, seed=1)
    expected, results = truth(problem, mask, True), run(problem, mask, backend, True)
    for name in expected:
        bound = max(TOLERANCE[dtype], TOLERANCE[weight_dtype])
        assert relative_error(results[name], expected[name]) <= bound, name


@pytest.mark.parametrize("weight", ["nf4", "int8_blockwise"])
def test_blocks_across_rows_and_double_quantization(backend: str, weight: str) -> None:
    for in_features in (256, 90):  # whole blocks a row, blocks across rows
        problem = make_problem(9, in_features, 70, [4], weight, block_size=128, double_quant=True)
        assert_agrees(problem, random_mask((70, in_features), 0.5, seed=2), backend, trained=False)


@pytest.mark.parametrize("weight", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_adapters_with_dropout(backend: str, weight: str, dtype: torch.dtype) -> None:
    problem = make_problem(37, 192, 130, [16, 3], weight, dtype, dropout_p=0.3)
    assert_agrees(problem, random_mask((130, 192), 0.5, seed=2), backend, trained=True)


def test_many_tokens_need_several_token_blocks(backend: str) -> None:
    problem = make_problem(2100, 64, 40, [], "dense", torch.bfloat16)
    assert_agrees(problem, random_mask((40, 64), 0.5, seed=2), backend, trained=True)


@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(1, 40),
    in_features=st.integers(1, 150),
    out_features=st.integers(1, 150),
    weight=st.sampled_from(WEIGHTS),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)
def test_any_size(tokens: int, in_features: int, out_features: int, weight: str, density: float) -> None:
    problem = make_problem(tokens, in_features, out_features, [], weight, positive=True)
    mask = random_mask((out_features, in_features), density, seed=5)
    assert_agrees(problem, mask, "cpu" if cpu.available() else "reference", trained=True)


# ---- what the mask means


def test_hand_computed(backend: str) -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], requires_grad=True)
    mask = BitMask.from_mask(torch.tensor([[True, False, True], [False, True, False]]))
    x = torch.tensor([[1.0, 10.0, 100.0]], requires_grad=True)
    y = ops.masked_linear(x, weight, mask, backend=backend)
    assert y.tolist() == [[301.0, 50.0]]
    y.backward(torch.tensor([[1.0, 2.0]]))
    assert x.grad is not None and x.grad.tolist() == [[1.0, 10.0, 3.0]]
    assert weight.grad is not None and weight.grad.tolist() == [[1.0, 0.0, 100.0], [0.0, 20.0, 0.0]]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_that_keeps_everything_changes_no_bit(backend: str, weight: str, dtype: torch.dtype) -> None:
    problem = make_problem(37, 90, 70, [4], weight, dtype, dropout_p=0.2)
    mask = BitMask.from_mask(torch.ones(70, 90, dtype=torch.bool))
    results, expected = run(problem, mask, backend, trained=False), problem.run(backend)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_entries_are_as_zeros_bit_for_bit(backend: str, dtype: torch.dtype) -> None:
    for tokens in (3, 37):  # one tile, several
        problem = make_problem(tokens, 96, 70, [4], "dense", dtype)
        mask = random_mask((70, 96), 0.5, seed=2)
        assert isinstance(problem.weight, Tensor)
        zeroed = dataclasses.replace(problem, weight=problem.weight.masked_fill(~mask.mask(), 0.0))
        results, expected = run(problem, mask, backend, trained=False), zeroed.run(backend)
        assert all(torch.equal(results[name], expected[name]) for name in expected)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_what_a_masked_entry_holds_never_matters(backend: str, value: float, precision: str) -> None:
    problem = make_problem(21, 96, 70, [4], "dense")
    mask = random_mask((70, 96), 0.5, seed=2)
    assert isinstance(problem.weight, Tensor)
    spoilt = dataclasses.replace(problem, weight=problem.weight.masked_fill(~mask.mask(), value))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        results, expected = (run(one, mask, backend, trained=True) for one in (spoilt, problem))
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_the_gradient_of_a_trained_weight_is_the_dense_one_where_it_is_kept(backend: str) -> None:
    problem = make_problem(37, 96, 70, [], "dense")
    everything = BitMask.from_mask(torch.ones(70, 96, dtype=torch.bool))
    mask = random_mask((70, 96), 0.3, seed=2)
    dense = run(problem, everything, backend, trained=True)["weight"]
    masked = run(problem, mask, backend, trained=True)["weight"]
    assert torch.equal(masked, dense * mask.mask())


@pytest.mark.parametrize("weight", ["dense", "nf4"])
def test_groups_of_columns(backend: str, weight: str) -> None:
    problem = make_problem(9, 128, 70, [4], weight)
    mask = group_mask(torch.rand(70, 128, generator=torch.Generator().manual_seed(0)), (2, 4))
    assert_agrees(problem, mask, backend, trained=True)


# ---- what asks for a gradient, what is kept


@pytest.mark.parametrize("wanted", ["x", "weight", "A", "B", "bias", "none"])
def test_only_what_asks_gets_a_gradient(backend: str, wanted: str) -> None:
    problem = make_problem(9, 128, 96, [8], "dense")
    mask = random_mask((96, 128), 0.5, seed=2)
    expected = run(problem, mask, backend, trained=True)
    leaves: dict[str, Any] = {"x": problem.x, "weight": problem.weight, "A": problem.lora_A[0], "B": problem.lora_B[0]}
    leaves["bias"] = problem.bias
    if wanted != "none":
        leaves[wanted].requires_grad_()
    x, weight, lora_A, lora_B, bias = leaves.values()
    y = ops.masked_linear(x, weight, mask, lora_A, lora_B, 0.5, bias, backend=backend)
    assert y.requires_grad == (wanted != "none")
    if wanted == "none":
        return
    y.backward(problem.grad)
    key = {"A": "A0", "B": "B0"}.get(wanted, wanted)
    assert torch.equal(leaves[wanted].grad, expected[key])
    assert all(tensor.grad is None for name, tensor in leaves.items() if name != wanted)


@pytest.mark.parametrize("with_B", [False, True])
@pytest.mark.parametrize("trained", [True, False])
def test_backward_keeps_nothing_of_the_size_of_the_weight(trained: bool, with_B: bool) -> None:
    problem = make_problem(8, 256, 512, [4], "dense")
    assert isinstance(problem.weight, Tensor)
    weight = problem.weight.requires_grad_(trained)
    problem.lora_B[0].requires_grad_(with_B)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mask = random_mask((512, 256), 0.5, seed=1)
        ops.masked_linear(problem.x.requires_grad_(), weight, mask, problem.lora_A, problem.lora_B)
    known = {tensor.data_ptr() for tensor in (problem.x, *problem.lora_A, *problem.lora_B)}
    inner = 8 * 4 * 4 if with_B else 0  # h in float32, which the gradient of a B alone needs
    assert sum(tensor.nbytes for tensor in saved if tensor.data_ptr() not in known) == inner


@pytest.mark.parametrize("compiled", [False, True])
def test_a_weight_changed_between_forward_and_backward(backend: str, compiled: bool) -> None:
    problem = make_problem(9, 128, 96, [8], "dense")
    weight = problem.weight
    assert isinstance(weight, Tensor)
    weight.requires_grad_()
    torch.compiler.reset()
    call = torch.compile(ops.masked_linear, fullgraph=True, backend="aot_eager") if compiled else ops.masked_linear
    y = call(problem.x, weight, random_mask((96, 128), 0.5, seed=2), backend=backend)
    with torch.no_grad():
        weight.zero_()
    with pytest.raises(RuntimeError, match=r"modified (in place|by an inplace operation)"):
        y.sum().backward()


@pytest.mark.parametrize("weight", ["dense", "nf4"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(weight: str, dropout_p: float) -> None:
    problem = make_problem(4, 6, 5, [2], weight).double()
    mask = random_mask((5, 6), 0.5, seed=2)
    leaves = [problem.x, problem.lora_A[0], problem.lora_B[0], problem.bias]
    leaves += [problem.weight] if weight == "dense" else []
    leaves = [tensor.requires_grad_() for tensor in leaves]

    def call(x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor, *trained: Tensor) -> Tensor:
        torch.manual_seed(5)
        base = trained[0] if trained else problem.weight
        return ops.masked_linear(x, base, mask, lora_A, lora_B, 0.5, bias, dropout_p)

    assert torch.autograd.gradcheck(call, leaves)


# ---- layouts, no tokens, autocast


@pytest.mark.parametrize("leading", [(), (2, 3), (0,), (3, 0, 2)], ids=str)
def test_any_leading_dimensions(backend: str, leading: tuple[int, ...]) -> None:
    weight = torch.randn(96, 128, requires_grad=True)
    mask = random_mask((96, 128), 0.5, seed=2)
    x = torch.randn(*leading, 128, requires_grad=True)
    y = ops.masked_linear(x, weight, mask, backend=backend)
    assert y.shape == (*leading, 96)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert weight.grad is not None and bool(weight.grad.isfinite().all())
    expected = torch.ones(y.numel() // 96, 96).t() @ x.detach().reshape(-1, 128) * mask.mask()
    assert relative_error(weight.grad, expected.double()) < 5e-6


@pytest.mark.parametrize(("in_features", "out_features"), [(0, 5), (64, 0), (0, 0)])
def test_no_features(in_features: int, out_features: int) -> None:
    weight = torch.randn(out_features, in_features, requires_grad=True)
    mask = random_mask((out_features, in_features), 0.5, seed=2)
    x, bias = torch.randn(2, 3, in_features, requires_grad=True), torch.randn(out_features)
    y = ops.masked_linear(x, weight, mask, bias=bias)
    assert torch.equal(y, bias.expand(2, 3, out_features))
    y.sum().backward()
    assert weight.grad is not None and weight.grad.shape == weight.shape
    assert x.grad is not None and not x.grad.any()


def test_inputs_that_are_not_contiguous(backend: str) -> None:
    problem = make_problem(21, 128, 96, [8], "dense")
    mask = random_mask((96, 128), 0.5, seed=2)
    expected = truth(problem, mask, True)

    def strided(tensor: Tensor) -> Tensor:
        wide = torch.zeros(tensor.shape[0], tensor.shape[1] * 2)
        wide[:, ::2] = tensor
        return wide[:, ::2]

    assert isinstance(problem.weight, Tensor)
    for change in ({"x": strided(problem.x)}, {"grad": strided(problem.grad)}, {"weight": strided(problem.weight)}):
        results = run(dataclasses.replace(problem, **change), mask, backend, trained=True)
        assert all(relative_error(results[name], expected[name]) <= 5e-6 for name in expected)
    bits = torch.zeros(96, 40, dtype=torch.uint8)
    bits[:, ::2][:, :16] = mask.bits
    spread = dataclasses.replace(mask, bits=bits[:, ::2][:, :16])
    results, plain = (run(problem, one, backend, trained=True) for one in (spread, mask))
    assert all(torch.equal(results[name], plain[name]) for name in plain)


def test_autocast(backend: str) -> None:
    problem = make_problem(9, 128, 96, [8], "dense")
    mask = random_mask((96, 128), 0.5, seed=2)
    weight = leaf(problem.weight)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.masked_linear(problem.x, weight, mask, problem.lora_A, problem.lora_B, 0.5, problem.bias)
    assert y.dtype == torch.bfloat16
    y.backward(problem.grad.bfloat16())
    expected = truth(problem, mask, True)
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert relative_error(weight.grad, expected["weight"]) < 8e-3


# ---- compile, operators


@pytest.mark.parametrize("weight", ["dense", "nf4"])
def test_compiles_as_one_graph_with_the_same_numbers(backend: str, weight: str) -> None:
    problem = make_problem(9, 128, 96, [8], weight, dropout_p=0.3)
    mask = random_mask((96, 128), 0.5, seed=2)
    torch.compiler.reset()
    compiled = torch.compile(ops.masked_linear, fullgraph=True, backend="aot_eager")
    expected, results = run(problem, mask, backend, True), run(problem, mask, backend, True, compiled)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


@pytest.mark.parametrize("weight", ["dense", "nf4", "int8"])
def test_operator_contract(backend: str, weight: str) -> None:
    problem = make_problem(9, 128, 96, [8, 4], weight, dropout_p=0.5)
    mask = random_mask((96, 128), 0.5, seed=2)
    lora_A, lora_B = [leaf(a) for a in problem.lora_A], [leaf(b) for b in problem.lora_B]
    adapters = (lora_A, lora_B, problem.scaling, problem.dropout_p, torch.tensor(1234))
    base = leaf(problem.weight) if isinstance(problem.weight, Tensor) else problem.weight
    arguments = (leaf(problem.x), *flatten_weight(base), mask.bits, mask.pattern, *adapters, problem.bias, backend)
    torch.library.opcheck(torch.ops.peftkern.masked_linear.default, arguments)


# ---- bad arguments


def test_bad_masks_are_refused() -> None:
    problem = make_problem(9, 128, 96, [8], "nf4")
    mask = random_mask((96, 128), 0.5, seed=2)
    with pytest.raises(TypeError, match="BitMask, got Tensor"):
        ops.masked_linear(problem.x, problem.weight, mask.mask())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[96, 128\], got \[128, 96\]"):
        ops.masked_linear(problem.x, problem.weight, random_mask((128, 96), 0.5, seed=2))
    with pytest.raises(ValueError, match="bits must be"):
        ops.masked_linear(problem.x, problem.weight, dataclasses.replace(mask, bits=mask.bits[1:]))
    with pytest.raises(ValueError, match="mask is on meta"):
        ops.masked_linear(problem.x, problem.weight, mask.to("meta"))


def test_the_raw_operators_refuse_a_mask_that_does_not_fit() -> None:
    problem = make_problem(9, 128, 96, [], "dense")
    bits = random_mask((96, 128), 0.5, seed=2).bits[:, 1:]
    operands = (*flatten_weight(problem.weight), bits, None, [], [], [], [], None)
    with pytest.raises(ValueError, match="bits must be"):
        torch.ops.peftkern.masked_linear(problem.x, *operands, None, None)
    with pytest.raises(ValueError, match="bits must be"):
        torch.ops.peftkern.masked_linear_backward(
            problem.grad, problem.x, *operands, torch.zeros(9, 0), True, True, [], None
        )
