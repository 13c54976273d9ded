"""linear_cross_entropy against PyTorch's own cross-entropy in float64, and what it must never make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from peftkern.backends import chunked_loss
from peftkern.formats import QuantizedTensor
from peftkern.ops import dequantize, label_logprobs, linear_cross_entropy, quantize
from peftkern.ops.linear_cross_entropy import LowRank, Needs, Terms
from peftkern.ops.lora_linear import flatten_weight
from peftkern.select.flops import FlopCounter  # enters the operator's formula in PyTorch's table as well

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""Relative error ‖out - ref‖ / ‖ref‖ against float64."""
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]
SIZES = [(1, 1, 2), (5, 3, 7), (37, 24, 101), (64, 65, 129)]
"""Tokens, hidden, vocabulary."""
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"softcap": 2.0},
    {"label_smoothing": 0.2, "z_loss": 0.03, "softcap": 3.0, "weighted": True},
]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """What nobody has written is not a number."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "_FEWEST_ROWS", 4)
    monkeypatch.setattr(chunked_loss, "_BUFFER_BYTES", {"cpu": 0})
    monkeypatch.setattr(chunked_loss, "_BLOCK", 16)


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    token_weights: Tensor
    low_rank: tuple[Tensor, Tensor] | None = None

    @property
    def trained(self) -> tuple[Tensor, ...]:
        operands = (self.hidden, self.weight, self.bias, *(self.low_rank or ()))
        return tuple(tensor for tensor in operands if tensor.requires_grad)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.trained))

    def double(self) -> Problem:
        operands = (self.hidden, self.weight, self.bias, *(self.low_rank or ()))
        h, w, b, *rest = (tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in operands)
        return Problem(h, w, b, self.labels, self.token_weights.double(), (rest[0], rest[1]) if rest else None)


def problem(
    tokens: int = 37,
    hidden: int = 24,
    vocabulary: int = 101,
    dtype: torch.dtype = torch.float32,
    ignored: float = 0.5,
    frozen_head: bool = False,
    rank: int = 0,
) -> Problem:
    """Random, at least one token with a label; what ignored tokens hold is not a number."""
    generator = torch.Generator().manual_seed(tokens + vocabulary)
    values = [torch.randn(shape, generator=generator) for shape in ((tokens, hidden), (vocabulary, hidden), vocabulary)]
    values[1] *= 2.0 * hidden**-0.5  # scores of a few units, as of a language model
    h, w, b = (value.to(dtype) for value in values)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    skipped = torch.rand(tokens, generator=generator) < ignored
    skipped[0] = False
    labels[skipped] = -100
    weights = torch.rand(tokens, generator=generator)
    for head in (w, b):
        head.requires_grad_(not frozen_head)
    low_rank = None
    if rank:
        shapes = ((tokens, rank), (vocabulary, rank))
        u, lora_B = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
        low_rank = u, lora_B
    return Problem(h.requires_grad_(), w, b, labels, weights, low_rank)


def ours(p: Problem, reduction: Any = "mean", weighted: bool = False, **options: Any) -> Tensor:
    options |= {"token_weights": p.token_weights if weighted else None, "low_rank": p.low_rank}
    return linear_cross_entropy(p.hidden, p.weight, p.labels, p.bias, reduction=reduction, **options)


def theirs(
    p: Problem,
    reduction: str = "mean",
    weighted: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """By PyTorch's own operators, in the dtype of the problem."""
    scores = p.hidden @ p.weight.t() + p.bias
    if p.low_rank is not None:
        scores = scores + p.low_rank[0] @ p.low_rank[1].t()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    losses = cross_entropy(scores, p.labels, reduction="none", label_smoothing=label_smoothing)
    labelled = p.labels != -100
    losses = losses + z_loss * scores.logsumexp(1).square() * labelled
    factor = p.token_weights * labelled if weighted else labelled.to(losses.dtype)
    losses = losses * factor
    return losses if reduction == "none" else losses.sum() / (factor.sum() if reduction == "mean" else 1.0)


def relative_error(out: Tensor, reference: Tensor) -> float:
    assert out.shape == reference.shape
    return float((out.detach().double() - reference).norm() / reference.norm())


def assert_agrees(p: Problem, backend: str | None = None, **options: Any) -> None:
    exact = p.double()
    loss, expected = ours(p, backend=backend, **options), theirs(exact, **options)
    above = torch.linspace(-1.0, 2.0, expected.numel()).view(expected.shape) if expected.dim() else torch.tensor(3.0)
    results = [loss, *p.gradients((loss * above).sum())]
    references = [expected.detach(), *exact.gradients((expected * above.double()).sum())]
    assert loss.dtype == (torch.float64 if p.hidden.dtype == torch.float64 else torch.float32)
    assert all(gradient.dtype == p.hidden.dtype for gradient in results[1:])
    errors = [relative_error(*pair) for pair in zip(results, references, strict=True)]
    assert max(errors) <= TOLERANCE[p.hidden.dtype], errors


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.usefixtures("tiny_chunks")
def test_agrees_with_float64(backend: str, dtype: torch.dtype, reduction: str) -> None:
    for frozen_head, rank in ((False, 0), (True, 0), (True, 3), (False, 2)):
        for options in OPTIONS:
            p = problem(dtype=dtype, frozen_head=frozen_head, rank=rank)
            assert_agrees(p, backend, reduction=reduction, **options)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_and_tiny_shapes(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    for rank in (0, 1):
        assert_agrees(problem(*size, dtype=dtype, rank=rank), weighted=True)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("tiny_chunks")
def test_gradients_are_derivatives(reduction: str, options: dict[str, Any]) -> None:
    p = problem(9, 3, 7, torch.float64, rank=2)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, *low_rank: Tensor) -> Tensor:
        return ours(Problem(hidden, weight, bias, p.labels, p.token_weights, low_rank), reduction, **options)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(loss, p.trained)


def test_by_hand() -> None:
    """Scores (0, log 3): probabilities 1/4 and 3/4."""
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [3.0]]).log1p()
    weight[1] = torch.tensor(3.0).log()
    assert linear_cross_entropy(hidden, weight, torch.tensor([0])).item() == pytest.approx(1.3862944)  # log 4
    assert label_logprobs(hidden, weight, torch.tensor([1])).item() == pytest.approx(-0.2876821)  # log 3/4
    smoothed = linear_cross_entropy(hidden, weight, torch.tensor([0]), label_smoothing=0.5)
    assert smoothed.item() == pytest.approx(0.75 * 1.3862944 + 0.25 * 0.2876821)
    squared = linear_cross_entropy(hidden, weight, torch.tensor([0]), z_loss=0.1)
    assert squared.item() == pytest.approx(1.3862944 + 0.1 * 1.3862944**2)


def test_what_ignored_tokens_hold_does_not_matter() -> None:
    p = problem(rank=3)
    assert p.low_rank is not None
    for backend in ("cpu", "reference"):
        poisoned, inner = p.hidden.detach().clone(), p.low_rank[0].detach().clone()
        for tensor in (poisoned, inner):
            tensor[p.labels == -100] = float("nan")
            tensor.requires_grad_()
        other = Problem(poisoned, p.weight, p.bias, p.labels, p.token_weights, (inner, p.low_rank[1]))
        for reduction in ("mean", "none"):
            clean, dirty = (ours(each, reduction, backend=backend) for each in (p, other))
            torch.testing.assert_close(dirty, clean)
            if reduction == "mean":
                pairs = zip(other.gradients(dirty), p.gradients(clean), strict=True)
                assert all(relative_error(a, b) <= 1e-6 for a, b in pairs)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_label_at_all(backend: str) -> None:
    p = problem()
    p.labels.fill_(-100)
    mean, total, each = (ours(p, reduction, backend=backend) for reduction in ("mean", "sum", "none"))
    assert mean.isnan() and total == 0.0 and not each.any() and each.shape == (37,)
    assert theirs(p).isnan()
    for loss in (mean, total, each.sum()):
        assert all(not gradient.any() for gradient in p.gradients(loss))


def test_no_tokens() -> None:
    hidden = torch.zeros(0, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.zeros(5, 4), torch.zeros(0, dtype=torch.int64), reduction="sum")
    assert loss == 0.0
    loss.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and hidden.grad.shape == (0, 4)


def test_leading_dimensions_and_strides() -> None:
    p = problem(24)
    hidden = p.hidden.view(4, 6, 24).transpose(0, 1)
    labels = p.labels.view(4, 6).t()
    losses = linear_cross_entropy(hidden, p.weight, labels, p.bias, reduction="none")
    torch.testing.assert_close(losses.t().reshape(-1), ours(p, "none"))


def test_a_large_vocabulary_leaves_no_bias() -> None:
    """Errors of a float32 sum over all scores go to one side for every token, and add up in the gradients below."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator)
    weight = 0.3 * torch.randn(49152, 32, generator=generator)
    labels = torch.randint(49152, (64,), generator=generator)
    exact = cross_entropy(hidden.double() @ weight.double().t(), labels, reduction="none")
    losses = linear_cross_entropy(hidden, weight, labels, reduction="none").double()
    assert abs(float((losses - exact).mean() / exact.mean())) < 2e-7


def test_extreme_scores() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    losses = linear_cross_entropy(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0]), reduction="none")
    assert losses.tolist() == [0.0, 2e4]
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and hidden.grad.tolist() == [[0.0], [-2.0]]


def error(actual: Tensor, expected: Tensor) -> float:
    size = torch.linalg.vector_norm(expected.double())
    return (torch.linalg.vector_norm(actual.double() - expected.double()) / size).item()


QUANTIZED = {"nf4": 64, "nf4 double": 64, "int8": 64, "int8_blockwise": 64, "nf4, rows share blocks": 24}
"""Formats, and the number of inputs."""


def quantized_head(case: str, p: Problem) -> QuantizedTensor:
    return quantize(p.weight.detach(), case.split()[0].rstrip(","), 64, "double" in case)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("case", QUANTIZED)
def test_a_quantized_head_is_the_head_that_it_stands_for(
    case: str, blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem(hidden=QUANTIZED[case])
    head = quantized_head(case, p)
    if blocks:
        monkeypatch.setattr(chunked_loss, "_BLOCK", 7)
    for reduction in ("mean", "none"):
        results = []
        for weight in (head, dequantize(head, torch.float32)):
            losses = linear_cross_entropy(p.hidden, weight, p.labels, p.bias, reduction=reduction)  # type: ignore[arg-type]
            results.append((losses.detach(), *torch.autograd.grad(losses.square().sum(), (p.hidden, p.bias))))
        for ours_, expected in zip(*results, strict=True):
            assert error(ours_, expected) <= 1e-6


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_quantized_head_takes_the_operators_way_as_well(reduction: Any) -> None:
    p = problem(hidden=64)
    head = quantized_head("nf4 double", p)

    def run() -> list[Tensor]:
        losses = linear_cross_entropy(p.hidden, head, p.labels, p.bias, reduction=reduction)
        return [losses.detach(), *torch.autograd.grad(losses.sum(), (p.hidden, p.bias))]

    expected = run()
    with Watch():
        watched = run()
    assert all(torch.equal(a, b) for a, b in zip(watched, expected, strict=True))


def test_of_a_quantized_head_one_block_is_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "_BLOCK", 16)
    p = problem(64, 64, 500, ignored=0.0)
    operands = (p.hidden.detach(), quantized_head("nf4 double", p), None, p.labels, None)
    with Watch() as watch:
        chunked_loss.linear_cross_entropy(*operands, Terms(), Needs(True, False, False))
    rows = [size[0] for size in watch.sizes if size[1:] == (64,) and size[0] != 64]
    assert rows and max(rows) <= 16


def test_a_low_rank_part_is_summed_in_float32() -> None:
    p, wide = problem(dtype=torch.bfloat16, rank=3, frozen_head=True), problem(rank=3)
    p.low_rank = wide.low_rank
    expected = theirs(p.double())
    loss = ours(p)
    assert relative_error(loss, expected) <= TOLERANCE[torch.bfloat16]
    of_hidden, *of_low_rank = p.gradients(loss)
    assert of_hidden.dtype == torch.bfloat16 and all(gradient.dtype == torch.float32 for gradient in of_low_rank)


def test_a_low_rank_part_over_a_quantized_head() -> None:
    p = problem(hidden=64, rank=3)
    head = quantized_head("nf4 double", p)
    results = []
    for weight in (head, dequantize(head, torch.float32)):
        loss = linear_cross_entropy(p.hidden, weight, p.labels, p.bias, low_rank=p.low_rank)
        results.append([loss.detach(), *torch.autograd.grad(loss, (p.hidden, p.bias, *(p.low_rank or ())))])
    assert all(error(ours_, expected) <= 1e-6 for ours_, expected in zip(*results, strict=True))


def test_autocast_multiplies_in_its_dtype() -> None:
    p = problem()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(p)
        hidden, weight = p.hidden.to(torch.bfloat16), p.weight.to(torch.bfloat16)
    expected = linear_cross_entropy(hidden, weight, p.labels, p.bias)
    assert torch.equal(loss, expected) and loss.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in p.gradients(loss))


# ---- what is made, kept and computed


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Elements of the largest tensor that an operator gave; seen from inside of the operator itself."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.sizes += [tuple(leaf.shape) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        return out


@pytest.mark.usefixtures("tiny_chunks")
def test_no_tensor_of_tokens_by_vocabulary_is_ever_made() -> None:
    p = problem(64, 3, 500, ignored=0.0, rank=2)
    assert p.low_rank is not None
    operands = (p.hidden.detach(), p.weight.detach(), None, p.labels, None)
    low_rank = LowRank(*(tensor.detach() for tensor in p.low_rank))
    with Watch() as watch:
        terms = Terms(softcap=2.0, label_smoothing=0.1)
        chunked_loss.linear_cross_entropy(*operands, terms, Needs(True, True, True, True, True), low_rank)
    by_vocabulary = [size[0] for size in watch.sizes if size[1:] == (500,)]
    assert by_vocabulary and max(by_vocabulary) <= 4


def saved_bytes(function: Any) -> int:
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sum(kept.values())


@pytest.mark.parametrize("frozen_head", [True, False])
def test_what_is_kept_is_the_gradient(frozen_head: bool) -> None:
    p = problem(64, 16, 500, frozen_head=frozen_head)
    expected = 64 * 16 * 4 + 64 * 8 + (0 if frozen_head else (500 * 16 + 500) * 4)
    assert saved_bytes(lambda: ours(p, "sum")) == expected


def test_a_second_backward_pass_of_a_kept_graph_gives_the_same() -> None:
    p = problem()
    loss = ours(p)
    first = [gradient.clone() for gradient in torch.autograd.grad(loss, p.trained, retain_graph=True)]
    second = torch.autograd.grad(loss, p.trained)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def products(p: Problem, **options: Any) -> float:
    """Multiply-adds of the forward and the backward pass, in passes of all tokens through the head."""
    with FlopCounterMode(display=False) as counter:
        loss = ours(p, **options)
        if loss.requires_grad:
            p.gradients(loss.sum())
    return float(counter.get_total_flops()) / (2 * p.hidden.shape[0] * p.weight.numel())


def test_products() -> None:
    assert products(problem(ignored=0.0)) == 3.0
    assert products(problem(ignored=0.0, frozen_head=True)) == 2.0
    assert products(problem(ignored=0.0), reduction="none") == 4.0
    assert products(problem(ignored=0.0, frozen_head=True), reduction="none") == 2.0
    with torch.no_grad():
        assert products(problem(ignored=0.0)) == 1.0


def test_the_low_rank_part_costs_its_rank_in_columns() -> None:
    for frozen_head, passes in ((False, 3.0), (True, 2.0)):
        p = problem(ignored=0.0, frozen_head=frozen_head, rank=3)
        assert products(p) == passes + 3 * 3 / 24
        with FlopCounter() as counter:
            p.gradients(ours(p))
        assert counter.total == pytest.approx(products(p) * 2 * p.hidden.shape[0] * p.weight.numel(), rel=0.02)


def test_three_quarters_ignored_are_a_quarter_of_the_products() -> None:
    p = problem(64, ignored=0.0)
    p.labels[16:] = -100
    assert products(p) == 0.75


def test_fake_tensors_and_the_operator() -> None:
    p = problem(rank=3)
    assert p.low_rank is not None
    expected = [ours(p), *p.gradients(ours(p))]
    torch.library.opcheck(
        torch.ops.peftkern.linear_cross_entropy.default,
        (
            p.hidden,
            *flatten_weight(p.weight),
            p.bias,
            p.labels,
            None,
            *p.low_rank,
            *Terms(),
            *Needs(*[True] * 5),
            True,
            None,
        ),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = ours(p)
        assert fake.shape == () and [g.shape for g in p.gradients(fake)] == [t.shape for t in p.trained]
    with Watch():  # the operator's way
        watched = ours(p)
        results = [watched, *p.gradients(watched)]
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_the_operators_way_of_losses_by_token() -> None:
    p = problem(rank=3)
    above = torch.linspace(-1, 1, 37)
    expected = p.gradients((ours(p, "none", weighted=True) * above).sum())
    with Watch():
        results = p.gradients((ours(p, "none", weighted=True) * above).sum())
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            p = problem(130, 64, 3001, ignored=0.2)
            loss = ours(p)
            results.append([loss, *p.gradients(loss)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- checks


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": torch.tensor([7, 0])}, ValueError, r"in \[0, 5\), got 7"),
        ({"labels": torch.tensor([-1, 0])}, ValueError, "got -1"),
        ({"labels": torch.tensor([1])}, ValueError, r"labels must be \[2\]"),
        ({"labels": torch.tensor([1, 0], dtype=torch.int32)}, TypeError, "labels must be of int64"),
        ({"weight": torch.zeros(5, 4)}, ValueError, r"\[vocabulary, hidden\]"),
        ({"weight": torch.zeros(5, 3, dtype=torch.float16)}, TypeError, "the dtype of hidden"),
        ({"weight": [1.0]}, TypeError, "QuantizedTensor"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be \[5\]"),
        ({"reduction": "batch"}, ValueError, "reduction must be one of"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing"),
        ({"z_loss": -1.0}, ValueError, "z_loss"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"token_weights": torch.ones(3)}, ValueError, "token_weights must be"),
        ({"low_rank": torch.ones(2, 2)}, TypeError, "a pair of tensors or None, got Tensor"),
        ({"low_rank": (torch.ones(2, 2), [1.0])}, TypeError, r"low_rank\[1\] must be a tensor"),
        (
            {"low_rank": (torch.ones(2, 2), torch.ones(5, 3))},
            ValueError,
            r"\[2, 'r'\] and \[5, 'r'\], got \[2, 2\] and",
        ),
        ({"low_rank": (torch.ones(2, 3), torch.ones(4, 3))}, ValueError, r"and \[5, 'r'\], got \[2, 3\] and \[4, 3\]"),
        ({"token_weights": torch.ones(2, requires_grad=True)}, ValueError, "get no gradient"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(2, 3),
        "weight": torch.zeros(5, 3),
        "labels": torch.tensor([0, 4]),
    }
    linear_cross_entropy(**arguments)
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**arguments, **changes})
