"""lora_mlp equals its parts one after the other, whatever is recomputed, and keeps what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import grouped_backend
import pytest
import torch
from isa_backends import ISA_BACKENDS, select
from lora_problem import TOLERANCE, make_problem, relative_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from peftkern import ops
from peftkern.formats.sparse_indices import SparseIndices
from peftkern.ops.lora_linear import Adapters
from peftkern.ops.lora_linear_group import Member
from peftkern.ops.silu_mul import ACTIVATIONS
from peftkern.ops.sparse_delta_linear import Deltas, sparse_delta_linear

DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]
TOKENS, IN, INNER, OUT = 19, 64, 128, 33
MODES = ("mlp", "up", None)


@pytest.fixture(params=ISA_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return select(request.param, monkeypatch)


class Block:
    """Three layers and the leaves among their tensors, by name."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        weight: str = "nf4",
        dropout_p: float = 0.3,
        ranks: Sequence[int] = (4, 2),
        bias: bool = True,
        sparse: Sequence[bool] = (False, False, False),
        frozen: Sequence[str] = (),
        tokens: int = TOKENS,
    ) -> None:
        self.leaves: dict[str, Tensor] = {}
        self.frozen = frozen
        shapes = {"gate": (INNER, IN), "up": (INNER, IN), "down": (OUT, INNER)}
        members, deltas = [], []
        for index, (name, (rows, columns)) in enumerate(shapes.items()):
            problem = make_problem(tokens, columns, rows, list(ranks), weight, dtype, dropout_p, bias, seed=index)
            lora_A = [self.leaf(f"{name}.A{i}", factor) for i, factor in enumerate(problem.lora_A)]
            lora_B = [self.leaf(f"{name}.B{i}", factor) for i, factor in enumerate(problem.lora_B)]
            adapters = Adapters(lora_A, lora_B, problem.scaling, problem.dropout_p, None)
            total = None if problem.bias is None else self.leaf(f"{name}.bias", problem.bias)
            members.append(Member(problem.weight, adapters, total))
            deltas.append(self.deltas(name, rows, columns) if sparse[index] else Deltas([], [], []))
            if index == 0:
                self.x = self.leaf("x", problem.x)
        self.grad = problem.grad
        self.members, self.all_deltas = members, deltas if any(sparse) else []

    def leaf(self, name: str, tensor: Tensor) -> Tensor:
        self.leaves[name] = tensor.detach().clone().requires_grad_(not any(name.startswith(f) for f in self.frozen))
        return self.leaves[name]

    def deltas(self, name: str, rows: int, columns: int) -> Deltas:
        indices = SparseIndices.from_mask(torch.rand(rows, columns) < 0.1)
        return Deltas([self.leaf(f"{name}.values", torch.randn(len(indices)) * 0.1)], [indices], [0.5])

    def run(self, call: Callable[..., Tensor]) -> dict[str, Tensor]:
        """The result and every gradient that was asked for, by name."""
        torch.manual_seed(5)
        y = call(self)
        y.backward(self.grad.reshape(y.shape).to(y.dtype))
        asked = {name: leaf for name, leaf in self.leaves.items() if leaf.requires_grad}
        results = {name: leaf.grad for name, leaf in asked.items() if leaf.grad is not None}
        assert results.keys() == asked.keys()
        for leaf in self.leaves.values():
            leaf.grad = None
        return {"y": y.detach(), **results}


def in_one(
    recompute: str | None = "mlp", backend: str | None = None, activation: str = "silu"
) -> Callable[..., Tensor]:
    return lambda block: ops.lora_mlp(
        block.x,
        *block.members,
        deltas=block.all_deltas,
        activation=activation,
        recompute=recompute,
        backend=backend,
    )


def in_parts(backend: str | None = None, activation: str = "silu") -> Callable[..., Tensor]:
    """What a block does without lora_mlp, layer by layer."""

    def call(block: Block) -> Tensor:
        deltas = block.all_deltas or [Deltas([], [], [])] * 3
        gate, up = (layer(block.x, m, d, backend) for m, d in zip(block.members[:2], deltas[:2], strict=True))
        return layer(
            ops.silu_mul(gate, up, activation=activation, backend=backend), block.members[2], deltas[2], backend
        )

    return call


def layer(x: Tensor, member: Member, deltas: Deltas, backend: str | None) -> Tensor:
    a = member.adapters
    lora: tuple[Any, ...] = (a.lora_A, a.lora_B, a.scaling, member.bias, a.dropout_p)
    sparse = (deltas.values, deltas.indices, deltas.scaling)
    return sparse_delta_linear(x, member.weight, *sparse, *lora, backend=backend)


def assert_same(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


# ---- what it computes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", ["nf4", "dense"])
def test_bits_of_its_parts_whatever_is_recomputed(weight: str, dtype: torch.dtype, backend: str) -> None:
    block = Block(dtype, weight)
    expected = block.run(in_parts(backend))
    for recompute in MODES:
        assert_same(block.run(in_one(recompute, backend)), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64(dtype: torch.dtype, activation: str, backend: str) -> None:
    block, truth = Block(dtype, "dense", dropout_p=0.0), Block(torch.float64, "dense", dropout_p=0.0)
    for one, other in zip(block.members, truth.members, strict=True):
        other.weight.copy_(one.weight)
    for name, value in block.leaves.items():
        truth.leaves[name].data = value.detach().double()
    truth.grad = block.grad.double()
    expected = truth.run(in_parts("reference", activation))
    for name, value in block.run(in_one("mlp", backend, activation)).items():
        assert relative_error(value, expected[name]) <= 2 * TOLERANCE[dtype], name  # g and u are rounded as well


@pytest.mark.parametrize("sparse", [(False, False, True), (True, True, True), (True, False, False)], ids=str)
def test_sparse_deltas(sparse: Sequence[bool]) -> None:
    block = Block(sparse=sparse, ranks=(3,))
    expected = block.run(in_parts())
    for recompute in MODES:
        assert_same(block.run(in_one(recompute)), expected)


@pytest.mark.parametrize(
    "frozen",
    [("x",), ("gate",), ("up",), ("down",), ("x", "gate", "up"), ("x", "gate"), ("x", "up"), ("gate", "up", "down"),
     ("x", "gate", "up", "down.A"), ("x", "gate", "up", "down.A", "down.bias"), ("gate.B", "up.B", "down.B"),
     ("x", "gate.A", "up.A", "down.A"), ("x", "gate", "up.A", "up.B", "down")],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("grouped", [False, True])
def test_only_what_asks_for_a_gradient_gets_one(
    frozen: Sequence[str], grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = Block(frozen=frozen)
    expected = block.run(in_parts("reference" if grouped else None))
    calls = grouped_backend.enter(monkeypatch) if grouped else []
    for recompute in MODES:
        results = block.run(in_one(recompute, "cpu" if grouped else None))
        for name, value in expected.items():
            assert relative_error(results[name], value.double()) <= (5e-6 if grouped else 0.0), name
    assert bool(calls) == grouped


def test_a_backend_with_a_form_for_groups_is_used_and_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = grouped_backend.enter(monkeypatch)
    block = Block()
    kept, made = block.run(in_one(None)), block.run(in_one("mlp"))
    forward, backward = ("lora_linear_group", 2), ("lora_linear_group_backward", 2)
    assert calls == [forward, backward, forward, forward, backward]
    assert_same(made, kept)


@pytest.mark.parametrize("shape", [(0, IN), (2, 3, IN), (IN,)], ids=str)
@pytest.mark.parametrize("recompute", MODES)
def test_any_leading_dimensions(shape: tuple[int, ...], recompute: str | None) -> None:
    tokens = torch.Size(shape[:-1]).numel()
    block = Block(tokens=tokens)
    block.x = block.leaf("x", torch.randn(shape))
    assert block.run(in_one(recompute))["y"].shape == (*shape[:-1], OUT)
    assert_same(block.run(in_one(recompute)), block.run(in_parts()))


def test_gradcheck() -> None:
    block = Block(torch.float64, "dense", dropout_p=0.0, ranks=(2,), tokens=2, frozen=("gate.bias", "down.bias"))
    for leaf in block.leaves.values():
        leaf.data = leaf.data.double()
    leaves = [leaf for leaf in block.leaves.values() if leaf.requires_grad]
    assert torch.autograd.gradcheck(lambda *_: in_one()(block), leaves, fast_mode=True)


def test_without_adapters_the_gradient_of_x_passes_through() -> None:
    block = Block(ranks=(), bias=False)
    assert_same(block.run(in_one()), block.run(in_parts()))


# ---- what it keeps


def kept_by(call: Callable[..., Tensor], block: Block) -> int:
    """Bytes kept for the backward pass beside the leaves, every storage once."""
    own = {leaf.data_ptr() for name, leaf in block.leaves.items() if name != "x"}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call(block)
    del y
    return sum(storages.values())


@pytest.mark.parametrize(("recompute", "halves"), [("mlp", 0), ("up", 1), (None, 2)])
def test_keeps_x_and_what_it_says(recompute: str | None, halves: int) -> None:
    block = Block(dropout_p=0.0, ranks=(4,))
    h = {"mlp": 1, "up": 2, None: 3}[recompute] * 4 * TOKENS * 4
    assert kept_by(in_one(recompute), block) == 4 * TOKENS * (IN + halves * INNER) + h


def test_keeps_nothing_that_no_gradient_needs() -> None:
    assert kept_by(in_one(), Block(dropout_p=0.0, ranks=(4,), frozen=("x", "gate", "up", "down.A"))) == 4 * TOKENS * 4


# ---- how it is used


def test_the_graph_can_be_used_twice_and_x_as_well() -> None:
    block = Block()
    for recompute in MODES:
        torch.manual_seed(5)
        y = in_one(recompute)(block) + block.x[:, :OUT]
        first = torch.autograd.grad(y, [block.x, block.leaves["up.A0"]], block.grad, retain_graph=True)
        again = torch.autograd.grad(y, [block.x, block.leaves["up.A0"]], block.grad)
        assert all(map(torch.equal, first, again))


def test_under_checkpointing() -> None:
    block = Block()
    expected = block.run(in_parts())
    for options in ({"use_reentrant": False}, {"use_reentrant": True}):
        call = partial(lambda options, b: checkpoint(lambda _x: in_one()(b), b.x, **options), options)
        assert_same(block.run(call), expected)


@pytest.mark.parametrize("recompute", MODES)
def test_under_autocast(recompute: str | None) -> None:
    block = Block()

    def autocast(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(block: Block) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return call(block)

        return run

    results, expected = block.run(autocast(in_one(recompute))), block.run(autocast(in_parts()))
    assert results["y"].dtype == torch.bfloat16
    # the parts take x in autocast's dtype one by one, and their gradients of it meet in float32
    assert relative_error(results.pop("x"), expected.pop("x").double()) <= TOLERANCE[torch.bfloat16]
    assert_same(results, expected)


@pytest.mark.parametrize("recompute", MODES)
def test_compiles_to_one_graph(recompute: str | None) -> None:
    block = Block(sparse=(False, True, True))
    expected = block.run(in_parts())
    torch._dynamo.reset()
    results = block.run(torch.compile(in_one(recompute), fullgraph=True, backend="aot_eager"))
    for name, value in expected.items():
        assert relative_error(results[name], value.double()) <= 5e-6, name


def test_operators_see_fake_tensors() -> None:
    block = Block()
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = ops.lora_mlp(torch.empty(3, IN), *block.members)
    assert y.shape == (3, OUT)


def test_a_modified_weight_is_noticed() -> None:
    block = Block(weight="dense")
    y = in_one()(block)
    block.members[1].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"recompute": "all"}, ValueError, "recompute must be one of mlp, up or None, got 'all'"),
        ({"activation": "relu"}, ValueError, "activation must be one of silu, gelu_tanh, gelu; got 'relu'"),
        ({"deltas": [Deltas([], [], [])]}, ValueError, "deltas must hold those of gate, up and down"),
        ({"up": Member(torch.zeros(8, IN), Adapters([], [], [], [], None), None)}, ValueError, "of one shape"),
        ({"down": Member(torch.zeros(8, IN), Adapters([], [], [], [], None), None)}, ValueError, "inner = 128"),
        ({"down": torch.zeros(8, INNER)}, TypeError, "must be Member objects, got Tensor"),
        ({"x": torch.zeros(2, IN + 1)}, ValueError, "in = 64 as in weight"),
    ],
)
def test_bad_input(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    gate, up, down = Block().members
    with pytest.raises(error, match=message):
        ops.lora_mlp(**{"x": torch.zeros(2, IN), "gate": gate, "up": up, "down": down, **changed})
