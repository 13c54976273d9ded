"""rotary against the formula of transformers in float64, on every backend and every instruction set that runs here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from isa_backends import ISA_BACKENDS, select
from same_bits import assert_same_bits, random_tensor
from torch import Tensor
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere_rotary
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm_rotary
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary

from peftkern import ops
from peftkern.backends import cpu, registry

TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""Relative error ‖out - ref‖ / ‖ref‖ against float64."""
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]
SIZES = [
    (2, 3, 1, 5, 8, 8),
    (1, 4, 2, 7, 64, 64),
    (2, 9, 3, 4, 66, 34),
    (2, 2, 2, 3, 5, 2),
    (1, 1, 1, 1, 300, 290),
    (0, 2, 1, 3, 4, 4),
]
"""batch, heads of q, of k, tokens, head_dim, rotary_dim"""
SIZE = (2, 9, 3, 40, 48, 32)


@pytest.fixture(params=ISA_BACKENDS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As `backend`, and the CPU's once for each instruction set."""
    return select(request.param, monkeypatch)


def states_of(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """q and k as the layers of transformers hand them over: views of [batch, tokens, heads, head_dim]."""
    batch, q_heads, k_heads, tokens, head_dim, _ = size
    q, k = (
        random_tensor((batch, tokens, heads, head_dim), dtype, heads).transpose(1, 2) for heads in (q_heads, k_heads)
    )
    return q, k


def angles_of(size: tuple[int, ...], interleaved: bool = False, shared: bool = False) -> tuple[Tensor, Tensor]:
    batch, *_, tokens, _, rotary_dim = size
    positions = torch.arange(tokens) + torch.arange(1 if shared else batch)[:, None] * 3
    angles = positions[..., None] * 100.0 ** (-torch.arange(rotary_dim // 2) / max(rotary_dim // 2, 1))
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def run(call: Callable[..., tuple[Tensor, Tensor]], states: tuple[Tensor, Tensor], *rest: object) -> list[Tensor]:
    """Results and gradients; the sum of both is not the same for any two numbers."""
    q, k = (x.detach().requires_grad_() for x in states)
    results = call(q, k, *rest)
    torch.autograd.backward(results, [random_tensor(tuple(x.shape), x.dtype, 7) for x in results])
    assert q.grad is not None and k.grad is not None
    return [*(x.detach() for x in results), q.grad, k.grad]


def truth(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """x cos + swapped(x) sin on the part of the head that turns."""
    return _exact(q, cos, sin, interleaved), _exact(k, cos, sin, interleaved)


def _exact(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if interleaved:
        swapped = torch.stack((-turning[..., 1::2], turning[..., ::2]), -1).flatten(-2)
    else:
        first, second = turning.chunk(2, -1)
        swapped = torch.cat((-second, first), -1)
    return torch.cat((turning * cos[:, None] + swapped * sin[:, None], rest), -1)


def relative_error(out: Tensor, reference: Tensor) -> float:
    assert out.shape == reference.shape
    difference, size = (out.double() - reference.double()).norm(), reference.double().norm()
    return float(difference / size) if size > 0 else float(difference)


def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backend: str) -> tuple[Tensor, Tensor]:
    return ops.rotary(q, k, cos, sin, interleaved, backend=backend)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64(isa: str, dtype: torch.dtype, interleaved: bool) -> None:
    if isa == "cpu" and dtype == torch.float64:
        pytest.skip("float64 is the reference's")
    for size in (*SIZES, SIZE):
        for shared in (False, True):
            states, angles = states_of(size, dtype), [a.to(dtype) for a in angles_of(size, interleaved, shared)]
            exact = (states[0].double(), states[1].double()), *(angle.double() for angle in angles), interleaved
            actual, expected = run(ours, states, *angles, interleaved, isa), run(truth, *exact)
            assert all(tensor.dtype == dtype for tensor in actual)
            assert max(map(relative_error, actual, expected)) <= TOLERANCE[dtype], size


def test_places_of_a_pair_may_have_angles_of_their_own(isa: str) -> None:
    states, (cos, sin) = states_of(SIZE), (random_tensor((2, 40, 32), torch.float32, seed) for seed in (1, 2))
    for interleaved in (False, True):
        expected = run(truth, states, cos, sin, interleaved)
        assert max(map(relative_error, run(ours, states, cos, sin, interleaved, isa), expected)) <= 5e-6


def test_is_what_transformers_computes(backend: str) -> None:
    whole = (2, 4, 2, 7, 16, 16)
    states, angles = states_of(whole), angles_of(whole)
    results = run(ours, states, *angles, False, backend)
    for actual, expected in zip(results, run(llama_rotary, states, *angles), strict=True):
        assert relative_error(actual, expected) <= 5e-7 and actual.stride() == expected.stride()
    angles = angles_of(whole, interleaved=True)
    expected = run(cohere_rotary, states, *angles)
    assert max(map(relative_error, run(ours, states, *angles, True, backend), expected)) <= 5e-7
    partial = (2, 4, 2, 7, 16, 8)
    halves = angles_of(partial)
    expected = run(glm_rotary, states, *halves)
    spread = [angle[..., :4].repeat_interleave(2, -1) for angle in halves]
    assert max(map(relative_error, run(ours, states, *spread, True, backend), expected)) <= 5e-7


def test_turning_back_is_the_inverse_and_keeps_lengths(backend: str) -> None:
    states, angles = states_of(SIZE), angles_of(SIZE)
    turned = ops.rotary(*states, *angles, backend=backend)
    back = registry.run("rotary", turned, *angles, False, True, backend=backend)
    for x, there, again in zip(states, turned, back, strict=True):
        assert relative_error(again, x) <= 1e-6
        assert torch.allclose(there.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
        assert relative_error(there, x) > 0.1


# ---- layouts, gradients, memory


def test_any_strides(backend: str) -> None:
    states, angles = states_of(SIZE), angles_of(SIZE)
    expected = run(ours, states, *angles, False, backend)
    wide = [torch.cat((x, x), -1)[..., : x.shape[-1]] for x in states]
    turned = [x.transpose(-1, 1).contiguous().transpose(-1, 1) for x in states]
    for layout in (wide, turned, [x.contiguous() for x in states]):
        for actual, other in zip(run(ours, tuple(layout), *angles, False, backend), expected, strict=True):
            assert_same_bits(actual, other)
    cos, sin = (angle.transpose(1, 2).contiguous().transpose(1, 2) for angle in angles)
    for actual, other in zip(run(ours, states, cos, sin, False, backend), expected, strict=True):
        assert_same_bits(actual, other)


def test_a_transposed_view_is_not_copied(backend: str) -> None:
    q, k = states_of(SIZE)
    results = ops.rotary(q, k, *angles_of(SIZE), backend=backend)
    assert not q.is_contiguous()
    assert [x.stride() for x in results] == [q.stride(), k.stride()]


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("compiled", [False, True])
def test_only_what_asks_and_is_used_gets_a_gradient(backend: str, used: int, compiled: bool) -> None:
    states, angles = states_of(SIZE), angles_of(SIZE)
    expected = run(ours, states, *angles, False, backend)[2 + used]
    for both in (True, False):
        leaves = [x.clone().requires_grad_(both or i == used) for i, x in enumerate(states)]

        def layer(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            return ours(q, k, *angles, False, backend)

        results = (torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer)(*leaves)
        results[used].backward(random_tensor(tuple(states[used].shape), torch.float32, 7))
        gradient, other = leaves[used].grad, leaves[1 - used].grad
        assert gradient is not None and (other is None or not other.any())
        assert_same_bits(gradient, expected)


def test_cosines_and_sines_alone_are_kept(backend: str) -> None:
    q, k = (x.requires_grad_() for x in states_of(SIZE))
    cos, sin = angles_of(SIZE)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        ops.rotary(q, k, cos, sin, backend=backend)
    assert kept == [cos.data_ptr(), sin.data_ptr()]


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved: bool) -> None:
    size = (2, 2, 1, 3, 6, 4)
    states, angles = states_of(size, torch.float64), angles_of(size, interleaved)
    q, k = (x.requires_grad_() for x in states)
    assert torch.autograd.gradcheck(lambda q, k: ops.rotary(q, k, *(a.double() for a in angles), interleaved), (q, k))


# ---- compile, operators, threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_as_one_graph(backend: str, dtype: torch.dtype) -> None:
    states, angles = states_of(SIZE, dtype), angles_of(SIZE)

    def layer(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        turned_q, turned_k = ours(q * 1.0, k * 2.0, *angles, True, backend)
        return turned_q.relu(), turned_k

    eager = run(layer, states)
    for actual, expected in zip(
        run(torch.compile(layer, fullgraph=True, backend="aot_eager"), states), eager, strict=True
    ):
        assert_same_bits(actual, expected)


def test_operator_contract(backend: str) -> None:
    for interleaved, states in ((False, states_of(SIZE)), (True, [x.contiguous() for x in states_of(SIZE)])):
        arguments = ([x.requires_grad_() for x in states], *angles_of(SIZE), interleaved, False, backend)
        torch.library.opcheck(torch.ops.peftkern.rotary.default, arguments)


def test_bit_equal_for_any_number_of_threads(backend: str) -> None:
    size, threads = (2, 9, 3, 200, 64, 64), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(ours, states_of(size), *angles_of(size), False, backend)
        torch.set_num_threads(3)
        for actual, single in zip(run(ours, states_of(size), *angles_of(size), False, backend), expected, strict=True):
            assert_same_bits(actual, single)
    finally:
        torch.set_num_threads(threads)


# ---- checks


def test_bad_arguments_are_named() -> None:
    (q, k), (cos, sin) = states_of(SIZE), angles_of(SIZE)
    with pytest.raises(TypeError, match="rotary: k must be a tensor, got NoneType"):
        ops.rotary(q, None, cos, sin)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"q must be float64.*got torch\.int64"):
        ops.rotary(q.long(), k, cos, sin)
    with pytest.raises(TypeError, match=r"k must have the dtype of q.*torch\.bfloat16 and torch\.float32"):
        ops.rotary(q, k.bfloat16(), cos, sin)
    with pytest.raises(ValueError, match=r"q must be \[batch, heads, tokens, head_dim\], got \[9, 40, 48\]"):
        ops.rotary(q[0], k, cos, sin)
    with pytest.raises(ValueError, match=r"k must be \[2, heads, 40, 48\] as q is, got \[2, 3, 39, 48\]"):
        ops.rotary(q, k[:, :, 1:], cos, sin)
    with pytest.raises(ValueError, match=r"cos must be \[1 or 2, 40, rotary_dim\], got \[2, 39, 32\]"):
        ops.rotary(q, k, cos[:, 1:], sin)
    with pytest.raises(ValueError, match="whose last size is even and at most 48"):
        ops.rotary(q, k, cos[..., 1:], sin)
    with pytest.raises(ValueError, match=r"cos gets no gradient; pass cos\.detach\(\)"):
        ops.rotary(q, k, cos.requires_grad_(), sin)
    with pytest.raises(ValueError, match="sin is on meta and q on cpu"):
        ops.rotary(q, k, cos.detach(), sin.to("meta"))


def test_lazily_negated_tensors(backend: str) -> None:
    (q, k), angles = states_of(SIZE), angles_of(SIZE)
    expected = ops.rotary(-q, -k, *angles, backend=backend)
    for lazy, eager in zip(
        ops.rotary(torch._neg_view(q), torch._neg_view(k), *angles, backend=backend), expected, strict=True
    ):
        assert_same_bits(lazy, eager)


@pytest.mark.skipif(not cpu.available(), reason="needs the native module")
def test_a_forced_backend_that_cannot_run_raises() -> None:
    q, k = states_of(SIZE, torch.float64)
    with pytest.raises(registry.BackendError, match=r"rotary: backend 'cpu' was forced.*torch\.float64"):
        ops.rotary(q, k, *angles_of(SIZE), backend="cpu")
