"""lora_linear_group against separate calls of lora_linear, and against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import grouped_backend
import pytest
import torch
from lora_problem import TOLERANCE, Problem, make_problem, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from peftkern import ops
from peftkern.backends import cpu, registry
from peftkern.formats import FORMATS
from peftkern.ops.lora_linear import Adapters
from peftkern.ops.lora_linear_group import Member, _flatten

DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]
OUTPUTS = (96, 32, 33)
RANKS = ([8], [3, 5], [])


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The calls of a backend that has a form for groups."""
    return grouped_backend.enter(monkeypatch)


def make_problems(
    weights: Sequence[str] = ("nf4", "nf4", "nf4"), shape: Sequence[int] = (9, 128), **options: Any
) -> list[Problem]:
    """One problem per member; only the first one's x is used."""
    *leading, in_features = shape
    tokens = torch.Size(leading).numel()
    problems = [
        make_problem(tokens, in_features, features, ranks, weight, **{"dropout_p": 0.3, "bias": index != 1, **options})
        for index, (weight, features, ranks) in enumerate(zip(weights, OUTPUTS, RANKS, strict=True))
    ]
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(problems[0].x.dtype)
    return [
        dataclasses.replace(problem, x=x, grad=problem.grad.reshape(*leading, problem.grad.shape[1]))
        for problem in problems
    ]


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def leaves_of(problems: Sequence[Problem]) -> tuple[Tensor, list[Member], dict[str, Tensor]]:
    """x and the members, every tensor of them asking for a gradient, and those by name."""
    x = leaf(problems[0].x)
    named, members = {"x": x}, []
    for index, problem in enumerate(problems):
        lora_A, lora_B = [leaf(a) for a in problem.lora_A], [leaf(b) for b in problem.lora_B]
        bias = None if problem.bias is None else leaf(problem.bias)
        adapters = Adapters(lora_A, lora_B, problem.scaling, problem.dropout_p, None)
        members.append(Member(problem.weight, adapters, bias))
        named |= {f"{index}.A{i}": a for i, a in enumerate(lora_A)} | {f"{index}.B{i}": b for i, b in enumerate(lora_B)}
        named |= {} if bias is None else {f"{index}.bias": bias}
    return x, members, named


def separate(x: Tensor, members: Sequence[Member], backend: str | None = None) -> list[Tensor]:
    """What a group replaces."""
    return [
        ops.lora_linear(
            x,
            member.weight,
            member.adapters.lora_A,
            member.adapters.lora_B,
            member.adapters.scaling,
            member.bias,
            member.adapters.dropout_p,
            backend=backend,
        )
        for member in members
    ]


def run(
    problems: Sequence[Problem], together: bool, backend: str | None = None, used: Sequence[int] = (0, 1, 2)
) -> dict[str, Tensor | None]:
    """Outputs and gradients; ``used`` are the outputs that have a part in the loss."""
    x, members, named = leaves_of(problems)
    torch.manual_seed(11)
    y = (ops.lora_linear_group if together else separate)(x, members, backend=backend)
    torch.autograd.backward([y[i] for i in used], [problems[i].grad for i in used])
    return {f"y{i}": out.detach() for i, out in enumerate(y)} | {name: tensor.grad for name, tensor in named.items()}


def assert_same(results: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float) -> None:
    """Bit-equal, but for the gradient of x, which is rounded at another place."""
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        actual = results[name]
        if value is None or actual is None:
            assert actual is value, name
        elif name == "x":
            assert relative_error(actual, value.double()) <= tolerance
        else:
            assert torch.equal(actual, value), name


# ---- what it computes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", ["dense", *sorted(FORMATS)])
def test_equals_separate_calls(grouped: list[tuple[str, int]], weight: str, dtype: torch.dtype) -> None:
    problems = make_problems([weight] * 3, dtype=dtype)
    results = run(problems, together=True)
    assert grouped == [("lora_linear_group", 3), ("lora_linear_group_backward", 3)]
    assert_same(results, run(problems, together=False, backend="reference"), TOLERANCE[dtype])
    assert results["y0"].dtype == results["x"].dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64(grouped: list[tuple[str, int]], dtype: torch.dtype) -> None:
    problems = make_problems(["nf4", "dense", "int8"], dtype=dtype)
    truth = run([problem.double() for problem in problems], together=False, backend="reference")
    for name, value in run(problems, together=True).items():
        assert value is not None and relative_error(value, truth[name]) <= TOLERANCE[dtype], name
    assert len(grouped) == 2


def test_the_gradient_of_x_is_rounded_once(grouped: list[tuple[str, int]]) -> None:
    # 256 + 0.75 + 0.75 is 257.5, which bfloat16 rounds to 258; one after another, 256.75 rounds to 256
    def member(value: float) -> Member:
        return Member(torch.tensor([[value]]), Adapters([], [], [], [], None), None)

    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    y = ops.lora_linear_group(x, [member(256.0), member(0.75), member(0.75)])
    torch.autograd.backward(y, [torch.ones(1, 1, dtype=torch.bfloat16)] * 3)
    assert x.grad is not None and x.grad.item() == 258.0
    assert len(grouped) == 2


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (2, 1, 5, 64), (0, 64), (3, 0, 2, 64)], ids=str)
def test_any_leading_dimensions(grouped: list[tuple[str, int]], shape: tuple[int, ...]) -> None:
    problems = make_problems(shape=shape)
    results = run(problems, together=True)
    assert len(grouped) == 2
    assert results["y1"].shape == (*shape[:-1], OUTPUTS[1])
    assert results["x"].shape == shape
    assert_same(results, run(problems, together=False, backend="reference"), TOLERANCE[torch.float32])


def test_x_that_is_not_contiguous_and_gradients_that_are_expanded(grouped: list[tuple[str, int]]) -> None:
    problems = make_problems(shape=(3, 4, 64))
    x, members, named = leaves_of(problems)
    turned = x.transpose(0, 1)
    y = ops.lora_linear_group(turned, [dataclasses.replace(m, bias=None) for m in members[2:]] * 2)
    (y[0].sum() - y[1].sum()).backward()
    assert torch.equal(named["x"].grad, torch.zeros(3, 4, 64))
    assert torch.equal(y[0], y[1])


def test_without_a_backend_for_groups_each_runs_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for operation in grouped_backend.GROUP_OPERATIONS:
        entries = registry._TABLE[operation]
        never = dataclasses.replace(entries["reference"], function=lambda *_: pytest.fail("the reference was asked"))
        monkeypatch.setitem(entries, "reference", never)
    problems = make_problems()
    results, expected = run(problems, together=True), run(problems, together=False)
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_forced_backend_without_a_form_for_groups_runs_each(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "cpu" and not cpu.available():
        pytest.skip(f"cpu backend: {cpu.unavailable_reason()}")
    real, asked = registry.run, []

    def noting(operation: str, *args: Any, **options: Any) -> Any:
        asked.append((operation, options["backend"]))
        return real(operation, *args, **options)

    monkeypatch.setattr(registry, "run", noting)
    problems = make_problems()
    expected = run(problems, together=False, backend=backend)
    asked.clear()
    results = run(problems, together=True, backend=backend)
    assert all(torch.equal(results[name], value) for name, value in expected.items())
    assert asked == [("lora_linear", backend)] * 3 + [("lora_linear_backward", backend)] * 3


# ---- gradients


@pytest.mark.parametrize("used", [(1,), (0, 2), (2,)], ids=str)
def test_an_output_without_a_part_in_the_loss_adds_nothing(grouped: list[tuple[str, int]], used: Sequence[int]) -> None:
    problems = make_problems()
    results = run(problems, together=True, used=used)
    assert_same(results, run(problems, together=False, backend="reference", used=used), TOLERANCE[torch.float32])
    unused = [name for name in results if name[0].isdigit() and int(name[0]) not in used]
    assert unused and all(results[name] is None for name in unused)


@pytest.mark.parametrize("wanted", ["x", "0.A0", "1.A1", "1.B0", "0.bias"])
def test_only_what_asks_gets_a_gradient(grouped: list[tuple[str, int]], wanted: str) -> None:
    problems = make_problems()
    expected = run(problems, together=True)
    x, members, named = leaves_of(problems)
    for tensor in named.values():
        tensor.requires_grad_(False)
    named[wanted].requires_grad_()
    torch.manual_seed(11)
    y = ops.lora_linear_group(x, members)
    differentiable = [out.requires_grad for out in y]
    assert differentiable == ([True] * 3 if wanted == "x" else [str(i) == wanted[0] for i in range(3)])
    pairs = [(out, problem.grad) for out, problem in zip(y, problems, strict=True) if out.requires_grad]
    torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
    assert torch.equal(named[wanted].grad, expected[wanted])
    assert all(tensor.grad is None for name, tensor in named.items() if name != wanted)


def test_nothing_that_asks_makes_no_graph(grouped: list[tuple[str, int]]) -> None:
    x, members, named = leaves_of(make_problems())
    with torch.no_grad():
        assert not any(y.requires_grad for y in ops.lora_linear_group(x, members))
    for tensor in named.values():
        tensor.requires_grad_(False)
    assert not any(y.requires_grad for y in ops.lora_linear_group(x, members))
    assert len(grouped) == 2


def test_x_is_kept_once_and_no_weight(grouped: list[tuple[str, int]]) -> None:
    x, members, named = leaves_of(make_problems(shape=(64, 256)))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        ops.lora_linear_group(x, members)
    assert sum(tensor.data_ptr() == x.data_ptr() for tensor in saved) == 1
    known = {tensor.data_ptr() for tensor in named.values()}
    extra = sum(tensor.nbytes for tensor in saved if tensor.data_ptr() not in known)
    assert extra == 64 * 16 * 4 + 2 * 8  # h in float32, and the seeds of the two members with adapters
    saved.clear()
    for name, tensor in named.items():
        tensor.requires_grad_("B" in name)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        ops.lora_linear_group(x, members)
    assert not any(tensor.data_ptr() == x.data_ptr() for tensor in saved)
    assert len(grouped) == 2


def test_outputs_may_be_modified_in_place(grouped: list[tuple[str, int]]) -> None:
    problems = make_problems()
    expected = run(problems, together=True)
    x, members, named = leaves_of(problems)
    torch.manual_seed(11)
    y = ops.lora_linear_group(x, members)
    for out in y:
        out.add_(1.0)
    assert all(torch.equal(out, expected[f"y{i}"] + 1.0) for i, out in enumerate(y))
    torch.autograd.backward(y, [problem.grad for problem in problems])
    assert all(torch.equal(tensor.grad, expected[name]) for name, tensor in named.items())
    assert len(grouped) == 4


def test_backward_twice_over_the_same_graph(grouped: list[tuple[str, int]]) -> None:
    x, members, _named = leaves_of(make_problems())
    loss = sum(y.square().sum() for y in ops.lora_linear_group(x, members))
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])
    assert len(grouped) == 3


@pytest.mark.parametrize("member", [0, 2])
def test_a_weight_changed_between_forward_and_backward(grouped: list[tuple[str, int]], member: int) -> None:
    problems = make_problems()
    x, members, _named = leaves_of(problems)
    y = ops.lora_linear_group(x, members)
    problems[member].weight.scales.zero_()  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="modified in place"):
        y[0].sum().backward()


def test_a_lazily_negated_gradient_and_operand(grouped: list[tuple[str, int]]) -> None:
    problems = make_problems()
    expected = run(problems, together=True)
    negated = [dataclasses.replace(p, grad=torch._neg_view(-p.grad)) for p in problems]
    results = run(negated, together=True)
    assert all(torch.equal(results[name], value) for name, value in expected.items())
    x, members, _named = leaves_of(problems)
    torch.manual_seed(11)
    y = ops.lora_linear_group(torch._neg_view(-x.detach()), members)
    assert all(torch.equal(out, expected[f"y{i}"]) for i, out in enumerate(y))
    assert len(grouped) == 5


def test_gradcheck(grouped: list[tuple[str, int]]) -> None:
    problems = [problem.double() for problem in make_problems(["nf4", "dense", "nf4"], shape=(2, 6), block_size=32)]
    _x, members, named = leaves_of(problems)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(11)
        return tuple(ops.lora_linear_group(tensors[0], members))

    assert torch.autograd.gradcheck(function, tuple(named.values()))
    assert grouped


# ---- where it runs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(grouped: list[tuple[str, int]], dtype: torch.dtype) -> None:
    problems = make_problems()
    x, members, _named = leaves_of(problems)
    with torch.autocast("cpu", dtype=dtype):
        torch.manual_seed(11)
        y = ops.lora_linear_group(x, members)
        torch.manual_seed(11)
        expected = separate(x, members, "reference")
    assert [out.dtype for out in y] == [dtype] * 3
    assert all(torch.equal(out, value) for out, value in zip(y, expected, strict=True))
    assert len(grouped) == 1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_sees_the_same_dropout(grouped: list[tuple[str, int]], use_reentrant: bool) -> None:
    problems = make_problems()
    results = []
    for checkpointed in (False, True):
        x, members, named = leaves_of(problems)

        def function(x: Tensor, members: list[Member] = members) -> Tensor:
            return torch.cat(ops.lora_linear_group(x, members), dim=-1)

        torch.manual_seed(11)
        y = checkpoint(function, x, use_reentrant=use_reentrant) if checkpointed else function(x)
        y.square().sum().backward()
        results.append({name: tensor.grad for name, tensor in named.items()})
    assert all(torch.equal(results[1][name], value) for name, value in results[0].items())
    assert [name for name, _ in grouped].count("lora_linear_group") == 3


def test_compiled_it_is_separate_calls(grouped: list[tuple[str, int]]) -> None:
    problems = make_problems(dropout_p=0.0)
    x, members, named = leaves_of(problems)
    expected = separate(x, members)
    torch.autograd.backward(expected, [problem.grad for problem in problems])
    gradients = {name: tensor.grad for name, tensor in named.items()}
    x, members, named = leaves_of(problems)
    torch.compiler.reset()
    compiled = torch.compile(ops.lora_linear_group, fullgraph=True, backend="aot_eager")
    y = compiled(x, members)
    torch.autograd.backward(y, [problem.grad for problem in problems])
    assert all(torch.equal(out, value) for out, value in zip(y, expected, strict=True))
    assert all(torch.equal(tensor.grad, gradients[name]) for name, tensor in named.items())
    assert not grouped


class Watching(TorchDispatchMode):
    """Notes the names of this package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "peftkern":
            self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("used", [(0, 1, 2), (1,)], ids=str)
def test_whoever_watches_operators_sees_one_for_the_group(grouped: list[tuple[str, int]], used: Sequence[int]) -> None:
    problems = make_problems(["nf4", "int8", "dense"], double_quant=False)
    expected = run(problems, together=True, used=used)
    with Watching() as watching:
        results = run(problems, together=True, used=used)
    assert watching.names == ["peftkern::lora_linear_group", "peftkern::lora_linear_group_backward"]
    assert_same(results, expected, 0.0)


def test_the_meta_device_has_shapes(grouped: list[tuple[str, int]]) -> None:
    problems = [problem.to("meta") for problem in make_problems(["nf4", "int8", "dense"], shape=(2, 3, 64))]
    results = run(problems, together=True)
    assert [results[f"y{i}"].shape for i in range(3)] == [(2, 3, features) for features in OUTPUTS]
    _x, _members, named = leaves_of(problems)
    assert all(results[name].shape == tensor.shape and results[name].is_meta for name, tensor in named.items())
    assert not grouped  # no kernel ran


def test_operator_contract(grouped: list[tuple[str, int]]) -> None:
    problems = make_problems(["nf4", "int8", "dense"])
    x, members, named = leaves_of(problems)
    for tensor in named.values():
        tensor.requires_grad_(False)
    members = [
        dataclasses.replace(m, adapters=dataclasses.replace(m.adapters, seed=torch.tensor(7) if i < 2 else None))
        for i, m in enumerate(members)
    ]
    arguments = _flatten(members)
    torch.library.opcheck(torch.ops.peftkern.lora_linear_group.default, (x, *arguments, None))
    _y, h = torch.ops.peftkern.lora_linear_group(x, *arguments, None)
    grads = [problems[0].grad, None, problems[2].grad]
    flags = [True, False, True, True, False, True]
    backward = (grads, x, *arguments, h, True, flags, None)
    torch.library.opcheck(torch.ops.peftkern.lora_linear_group_backward.default, backward)
    assert len(torch.ops.peftkern.lora_linear_group_backward(*backward)) == 2


def test_the_raw_operators_refuse_operands_that_do_not_fit(grouped: list[tuple[str, int]]) -> None:
    problems = make_problems(dropout_p=0.0)
    x, members, _named = leaves_of(problems)
    wrong = dataclasses.replace(members[1], bias=torch.zeros(31))
    with pytest.raises(ValueError, match="bias must be"):
        torch.ops.peftkern.lora_linear_group(x, *_flatten([members[0], wrong]), None)
    grads = [problem.grad for problem in problems]
    with pytest.raises(ValueError, match="h must be"):
        torch.ops.peftkern.lora_linear_group_backward(
            grads, x, *_flatten(members), torch.zeros(9, 15), True, [True] * 6, None
        )


# ---- what it refuses


def test_members_that_do_not_fit(grouped: list[tuple[str, int]]) -> None:
    x, members, _named = leaves_of(make_problems())
    narrow = Member(torch.zeros(4, 127), Adapters([], [], [], [], None), None)
    lopsided = Member(torch.zeros(4, 128), Adapters([torch.zeros(2, 128)], [], [1.0], [0.0], None), None)
    for bad, error, message in (
        ([], ValueError, "at least one layer"),
        ([members[0], "up_proj"], TypeError, "layers must be Member objects, got str"),
        ([members[0], narrow], ValueError, "x must be"),
        ([members[0], lopsided], ValueError, "lora_B must have one entry per adapter"),
    ):
        with pytest.raises(error, match=message):
            ops.lora_linear_group(x, bad)
    with pytest.raises(registry.BackendError, match="abacus"):
        ops.lora_linear_group(x, members, backend="abacus")
    assert not grouped
