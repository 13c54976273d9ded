"""attention against PyTorch's in float64, on every backend and every instruction set that runs here."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from isa_backends import ISA_BACKENDS, select
from same_bits import assert_same_bits, random_tensor
from tensors import FUZZ
from torch import Tensor

from peftkern import ops
from peftkern.backends import cpu, registry

TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""Relative error ‖out - ref‖ / ‖ref‖ against float64."""
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 1, 5, 5, 8),
    (2, 4, 4, 33, 33, 7),
    (1, 9, 3, 75, 75, 64),
    (1, 6, 2, 3, 140, 40),
    (1, 2, 1, 131, 17, 33),
    (1, 2, 1, 40, 40, 256),
    (0, 2, 1, 3, 3, 4),
]
"""batch, heads, heads of keys, queries, keys, head_dim"""
SIZE = (2, 6, 2, 90, 90, 48)
MASKS = ["none", "causal", "boolean", "added", "both"]


@pytest.fixture(params=ISA_BACKENDS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As `backend`, and the CPU's once for each instruction set."""
    return select(request.param, monkeypatch)


def states_of(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key and value as the blocks of transformers hand them over: views of [batch, tokens, heads, head_dim]."""
    batch, heads, kv_heads, queries, keys, head_dim = size
    shapes = ((queries, heads, 1), (keys, kv_heads, 2), (keys, kv_heads, 3))
    return [
        random_tensor((batch, tokens, count, head_dim), dtype, seed).transpose(1, 2) for tokens, count, seed in shapes
    ]


def mask_of(kind: str, size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor | None, bool]:
    """A mask in which every query sees a key, and whether the call is causal."""
    batch, heads, _, queries, keys, _ = size
    causal = kind in ("causal", "both") and queries == keys
    if kind == "added":
        return random_tensor((batch, heads, queries, keys), dtype, 4), causal
    if kind in ("none", "causal"):
        return None, causal
    seen = random_tensor((batch, 1, queries, keys), torch.float32, 5) > 0
    seen[..., 0] = True
    return seen, causal


def run(call: Callable[..., Tensor], states: list[Tensor], *rest: object) -> list[Tensor]:
    """The output and the gradients."""
    leaves = [x.detach().requires_grad_() for x in states]
    out = call(*leaves, *rest)
    out.backward(random_tensor(tuple(out.shape), out.dtype, 7))
    gradients = [x.grad for x in leaves if x.grad is not None]
    assert len(gradients) == 3
    return [out.detach(), *gradients]


def truth(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """PyTorch's; it takes a mask or a causal call."""
    if causal:
        earlier = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        mask = earlier if mask is None else mask & earlier
    attend = torch.nn.functional.scaled_dot_product_attention
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    return attend(query, key, value, attn_mask=mask, scale=scale)


def exact(states: list[Tensor], mask: Tensor | None, causal: bool, scale: float | None = None) -> list[Tensor]:
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    return run(truth, [x.double() for x in states], wide, causal, scale)


def ours(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    return ops.attention(query, key, value, mask, causal, scale, backend=backend)


def relative_error(out: Tensor, reference: Tensor) -> float:
    """Where a softmax of one key makes the reference zero, its rounding errors are compared with one."""
    assert out.shape == reference.shape and not out.isnan().any()
    return float((out.double() - reference.double()).norm() / max(float(reference.double().norm()), 1e-3))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64(isa: str, dtype: torch.dtype, kind: str) -> None:
    if isa == "cpu" and dtype == torch.float64:
        pytest.skip("float64 is the reference's")
    for size in SIZES:
        states, (mask, causal) = states_of(size, dtype), mask_of(kind, size, dtype)
        actual, expected = run(ours, states, mask, causal, 0.3, isa), exact(states, mask, causal, 0.3)
        assert all(tensor.dtype == dtype for tensor in actual)
        assert max(map(relative_error, actual, expected)) <= TOLERANCE[dtype], size


@given(
    size=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(1, 90), st.integers(1, 90)),
    head_dim=st.integers(1, 70),
    kind=st.sampled_from(MASKS),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
)
@FUZZ
def test_agrees_with_float64_for_any_size(
    backend: str, size: tuple[int, ...], head_dim: int, kind: str, spread: float
) -> None:
    batch, shared, kv_heads, queries, keys = size
    keys = queries if kind in ("causal", "both") else keys
    whole = (batch, shared * kv_heads, kv_heads, queries, keys, head_dim)
    query, key, value = states_of(whole)
    mask, causal = mask_of(kind, whole)
    states = [query * spread, key, value]
    actual, expected = run(ours, states, mask, causal, None, backend), exact(states, mask, causal)
    # differences that vanish have the errors of what they are made of, which is about 1; scores of hundreds have those
    # of float32, and so the weights
    tolerance = 5e-6 if spread <= 1 else 3e-4
    assert all(
        float((out.double() - ref).norm()) <= tolerance * max(float(ref.norm()), ref.numel() ** 0.5)
        for out, ref in zip(actual, expected, strict=True)
    )


def test_masks_of_any_shape_and_stride(backend: str) -> None:
    batch, heads, _, queries, keys, _ = SIZE
    states = states_of(SIZE)
    whole, seen = random_tensor((batch, heads, keys, queries), torch.float32, 4).mT, mask_of("boolean", SIZE)[0]
    assert seen is not None
    for mask in (
        whole,
        whole[:1],
        whole[:, :1].bfloat16(),
        whole[:, :, :1],
        whole[..., :1].expand_as(whole),
        seen,
        seen.mT.contiguous().mT,
        seen[:1].expand(batch, heads, queries, keys),
        whole.masked_fill(~seen, -torch.inf),
        whole.masked_fill(~seen, torch.finfo(torch.float32).min),
    ):
        wide = mask.expand(batch, heads, queries, keys)
        actual, expected = run(ours, states, mask, False, None, backend), exact(states, wide, False)
        assert max(map(relative_error, actual, expected)) <= 5e-6


def test_a_query_that_sees_no_key_gives_zeros(isa: str) -> None:
    """As PyTorch's own attention."""
    states, (mask, _) = states_of(SIZE), mask_of("boolean", SIZE)
    assert mask is not None
    mask[0, 0, 3:60] = False
    mask[1] = False
    for causal in (False, True):
        actual = run(ours, states, mask, causal, None, isa)
        assert not actual[0][0, :, 3:60].any() and not actual[0][1].any()
        assert not actual[1][0, :, 3:60].any() and not actual[2][1].any() and not actual[3][1].any()
        expected = exact(states, mask, causal)
        assert max(map(relative_error, actual, expected)) <= 5e-6


def test_scores_far_from_zero(isa: str) -> None:
    """A score far above the others, first or last, and a mask of huge negative numbers."""
    query, key, value = states_of(SIZE)
    key[:, :, 0], key[:, :, -1] = 80.0, -60.0
    mask = torch.full((1, 1, SIZE[3], SIZE[4]), -3e38).triu(1)
    out = ops.attention(query, key, value, mask, backend=isa)
    expected = truth(query.double(), key.double(), value.double(), mask.double(), False, None)
    assert relative_error(out, expected) <= 2e-5


def test_what_is_no_number_stays_none(isa: str) -> None:
    query, key, value = states_of(SIZE)
    query[0, 1, 50, 3] = torch.nan
    out = ops.attention(query, key, value, causal=True, backend=isa)
    assert out[0, 1, 50].isnan().all() and int(out.isnan().sum()) == SIZE[5]
    value[1, 0, 70] = torch.nan
    assert ops.attention(query, key, value, causal=True, backend=isa)[1, 0, 70:].isnan().all()


# ---- layouts, gradients, memory


def test_any_strides(backend: str) -> None:
    states = states_of(SIZE)
    expected = run(ours, states, None, True, None, backend)
    wide = [torch.cat((x, x), -1)[..., : x.shape[-1]] for x in states]
    turned = [x.transpose(-1, 1).contiguous().transpose(-1, 1) for x in states]
    for layout in (wide, turned, [x.contiguous() for x in states]):
        for actual, other in zip(run(ours, layout, None, True, None, backend), expected, strict=True):
            assert_same_bits(actual, other)


def test_results_lie_by_token(backend: str) -> None:
    states = [x.contiguous() for x in states_of(SIZE)]
    assert ops.attention(*states, causal=True, backend=backend).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("compiled", [False, True])
def test_only_what_asks_gets_a_gradient(backend: str, compiled: bool) -> None:
    states = states_of(SIZE)
    expected = run(ours, states, None, True, None, backend)[1:]

    def layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ours(query, key, value, None, True, None, backend)

    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    for asked in range(3):
        leaves = [x.clone().requires_grad_(index == asked) for index, x in enumerate(states)]
        out = call(*leaves)
        out.backward(random_tensor(tuple(out.shape), torch.float32, 7))
        for index, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (index == asked)
            if leaf.grad is not None:
                assert_same_bits(leaf.grad, expected[index])


def test_no_matrix_of_scores_is_kept(backend: str) -> None:
    leaves = [x.requires_grad_() for x in states_of(SIZE)]
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        ops.attention(*leaves, causal=True, backend=backend)
    batch, heads, _, queries, *_ = SIZE
    assert kept == [*(tuple(x.shape) for x in leaves), tuple(leaves[0].shape), (batch, heads, queries)]


def test_backward_twice_and_the_same_tensor_three_times(backend: str) -> None:
    x = states_of((1, 2, 2, 20, 20, 16))[0].clone().requires_grad_()
    out = ops.attention(x, x, x, causal=True, backend=backend).square().sum()
    (first,) = torch.autograd.grad(out, x, retain_graph=True)
    (second,) = torch.autograd.grad(out, x)
    assert_same_bits(first, second)
    wide = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(truth(wide, wide, wide, None, True, None).square().sum(), wide)
    assert relative_error(first, expected) <= 5e-6


def test_gradients_of_gradients_are_refused(backend: str) -> None:
    leaves = [x.requires_grad_() for x in states_of((1, 2, 1, 3, 3, 4))]
    (gradient,) = torch.autograd.grad(
        ops.attention(*leaves, backend=backend).square().sum(), leaves[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("kind", MASKS)
def test_gradcheck(kind: str) -> None:
    size = (2, 4, 2, 3, 3, 5)
    states, (mask, causal) = states_of(size, torch.float64), mask_of(kind, size, torch.float64)
    leaves = [x.requires_grad_() for x in states]
    assert torch.autograd.gradcheck(lambda *qkv: ours(*qkv, mask, causal), leaves)


# ---- compile, operators, threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_as_one_graph(backend: str, dtype: torch.dtype) -> None:
    states, (mask, _) = states_of(SIZE, dtype), mask_of("boolean", SIZE)

    def layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ours(query * 1.0, key * 2.0, value, mask, True, None, backend).relu()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(run(compiled, states), run(layer, states), strict=True):
        assert_same_bits(actual, expected)


def test_operator_contract(backend: str) -> None:
    for mask, causal in (mask_of("causal", SIZE), mask_of("added", SIZE)):
        arguments = (*(x.requires_grad_() for x in states_of(SIZE)), mask, causal, 0.2, backend)
        torch.library.opcheck(torch.ops.peftkern.attention.default, arguments)


@pytest.mark.parametrize("size", [(3, 6, 3, 150, 150, 40), (1, 2, 1, 300, 300, 40)], ids=["many heads", "one head"])
def test_bit_equal_for_any_number_of_threads(backend: str, size: tuple[int, ...]) -> None:
    states, threads = states_of(size), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(ours, states, None, True, None, backend)
        for count in (2, 5):
            torch.set_num_threads(count)
            for actual, single in zip(run(ours, states, None, True, None, backend), expected, strict=True):
                assert_same_bits(actual, single)
    finally:
        torch.set_num_threads(threads)


def test_lazily_negated_tensors(backend: str) -> None:
    states = states_of(SIZE)
    attend = functools.partial(ops.attention, causal=True, backend=backend)
    assert_same_bits(attend(*map(torch._neg_view, states)), attend(*(-x for x in states)))


# ---- checks


def test_bad_arguments_are_named() -> None:
    query, key, value = states_of(SIZE)
    with pytest.raises(TypeError, match="attention: key must be a tensor, got NoneType"):
        ops.attention(query, None, value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"query must be float64.*got torch\.int64"):
        ops.attention(query.long(), key, value)
    with pytest.raises(TypeError, match=r"the dtype of query, torch\.float32; got torch\.bfloat16 and torch\.float32"):
        ops.attention(query, key.bfloat16(), value)
    with pytest.raises(ValueError, match=r"query must have 4 dimensions, got \[6, 90, 48\]"):
        ops.attention(query[0], key, value)
    with pytest.raises(ValueError, match=r"must be \[2, kv_heads, keys, 48\] to fit query; got \[2, 2, 90, 47\]"):
        ops.attention(query, key[..., 1:], value)
    with pytest.raises(ValueError, match=r"kv_heads must divide the 5 heads of query; got key \[2, 2, 90, 48\]"):
        ops.attention(query[:, 1:], key, value)
    with pytest.raises(ValueError, match="there must be a key"):
        ops.attention(query, key[:, :, :0], value[:, :, :0])
    with pytest.raises(ValueError, match="causal needs as many queries as keys, got 89 and 90"):
        ops.attention(query[:, :, 1:], key, value, causal=True)
    with pytest.raises(ValueError, match="head_dim must be from 1 to 256, got 288"):
        ops.attention(*(torch.cat([x] * 6, -1) for x in (query, key, value)))
    mask = torch.zeros(2, 1, 90, 90)
    with pytest.raises(ValueError, match=r"mask must be \[2, 6, 90, 90\], or 1 in any place, got \[2, 1, 90, 89\]"):
        ops.attention(query, key, value, mask[..., 1:])
    with pytest.raises(TypeError, match=r"mask must be bool, float64.*got torch\.int64"):
        ops.attention(query, key, value, mask.long())
    with pytest.raises(ValueError, match=r"mask gets no gradient; pass mask\.detach\(\)"):
        ops.attention(query, key, value, mask.requires_grad_())
    with pytest.raises(ValueError, match="value is on meta and query on cpu"):
        ops.attention(query, key, value.to("meta"))


@pytest.mark.skipif(not cpu.available(), reason="needs the native module")
def test_a_forced_backend_that_cannot_run_raises() -> None:
    with pytest.raises(registry.BackendError, match=r"attention: backend 'cpu' was forced.*torch\.float64"):
        ops.attention(*states_of(SIZE, torch.float64), backend="cpu")
