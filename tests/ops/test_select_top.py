"""select_top and quantile_of against sorting, on every backend and instruction set; the choice is the same on all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from isa_backends import ISA_BACKENDS, select
from same_bits import DTYPES, random_tensor
from tensors import FUZZ
from torch import Tensor

from peftkern.ops.select_top import SCORES, _scored, quantile_of, score_collect_reference, select_top

INFINITY = float("inf")


@pytest.fixture(params=ISA_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return select(request.param, monkeypatch)


def scores_of(score: str, a: Tensor, b: Tensor | None) -> Tensor:
    """Flat float32 scores by their definition."""
    a, b = a.float(), None if b is None else b.float()
    if score == "value":
        return a.flatten()
    if score == "magnitude":
        return a.abs().flatten()
    assert b is not None
    if score == "outer":
        return torch.outer(a, b).flatten()
    return (a - b if score == "difference" else a * b).abs().flatten()


def expected_top(scores: list[Tensor], k: int, exclude: list[Tensor | None]) -> list[list[int]]:
    """By a stable sort of everything: of equal scores the earlier tensor's and the lower index win."""
    places = [(t, i) for t, values in enumerate(scores) for i in range(values.numel())]
    flat = torch.cat(scores).double()
    for t, out in enumerate(exclude):
        if out is not None:
            flat[sum(values.numel() for values in scores[:t]) + out] = float("-inf")
    order = torch.sort(-flat, stable=True).indices[:k].tolist()
    return [
        sorted(i for t, i in (places[position] for position in order) if t == tensor) for tensor in range(len(scores))
    ]


def assert_selects(backend: str, score: str, a: list[Tensor], b: list[Tensor] | None, k: int, exclude: Any) -> None:
    chosen = select_top(a, k, score=score, other=b, exclude=exclude, backend=backend)
    others = [None] * len(a) if b is None else b
    scores = [scores_of(score, one, other) for one, other in zip(a, others, strict=True)]
    assert [indices.tolist() for indices in chosen] == expected_top(scores, k, exclude or [None] * len(a))
    assert all(indices.dtype == torch.int64 for indices in chosen)


def make_inputs(score: str, dtypes: list[torch.dtype]) -> tuple[list[Tensor], list[Tensor] | None]:
    shapes = [(17, 31), (5,), (2, 3, 100), (0, 3), (1, 1)]
    rows = [(17,), (5,), (1,), (0,), (9,)]
    columns = [(31,), (1,), (300,), (4,), (70,)]
    a = [random_tensor(shape, dtypes[i % 3], seed=i) for i, shape in enumerate(rows if score == "outer" else shapes)]
    if not SCORES[score]:
        return a, None
    return a, [
        random_tensor(shape, dtypes[(i + 1) % 3], seed=50 + i)
        for i, shape in enumerate(columns if score == "outer" else shapes)
    ]


# ---- which ones


def test_ties_are_broken_by_the_lower_index_and_never_over_selected(backend: str) -> None:
    assert select_top([torch.tensor([1.0, 1.0, 1.0, 0.0])], 2, backend=backend)[0].tolist() == [0, 1]


def test_ties_between_tensors_go_to_the_earlier_one(backend: str) -> None:
    tensors = [torch.tensor([2.0, 1.0]), torch.tensor([1.0, -1.0, 3.0]), torch.tensor([1.0])]
    chosen = select_top(tensors, 4, backend=backend)
    assert [indices.tolist() for indices in chosen] == [[0, 1], [0, 2], []]


@pytest.mark.parametrize("score", SCORES)
def test_agrees_with_a_stable_sort(backend: str, score: str) -> None:
    a, b = make_inputs(score, list(DTYPES))
    total = sum(scores_of(score, one, None if b is None else b[i]).numel() for i, one in enumerate(a))
    for k in (0, 1, 7, total // 3, total - 1, total):
        assert_selects(backend, score, a, b, k, None)


@pytest.mark.parametrize("score", SCORES)
def test_excluded_entries_are_passed_over(backend: str, score: str) -> None:
    a, b = make_inputs(score, [torch.float32] * 3)
    sizes = [scores_of(score, one, None if b is None else b[i]).numel() for i, one in enumerate(a)]
    generator = torch.Generator().manual_seed(0)
    exclude = [torch.randperm(size, generator=generator)[: size // 2].sort().values for size in sizes[:-1]] + [None]
    left = sum(sizes) - sum(0 if out is None else out.numel() for out in exclude)
    for k in (1, left // 2, left):
        assert_selects(backend, score, a, b, k, exclude)


def test_many_equal_scores_across_what_threads_share(backend: str) -> None:
    """On a grid of few values, and large enough for several tasks: every tie is one that the order decides."""
    values = torch.randint(0, 4, (700_001,), generator=torch.Generator().manual_seed(0)).float()
    for k in (1, 100_000, 500_000):
        chosen = select_top([values, values], k, backend=backend)
        order = torch.sort(torch.cat((values, values)), descending=True, stable=True).indices[:k].sort().values
        assert torch.equal(torch.cat((chosen[0], chosen[1] + values.numel())), order)


def test_threads_change_nothing(backend: str) -> None:
    values = random_tensor((1000, 700), torch.bfloat16)  # many equal ones
    threads, results = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            results.append(select_top([values], 5000, backend=backend)[0])
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(*results) and results[0].numel() == 5000


def test_zero_and_minus_zero_are_equal(backend: str) -> None:
    values = torch.tensor([-0.0, 0.0, -0.0, 0.0, -1.0])
    assert select_top([values], 3, score="value", backend=backend)[0].tolist() == [0, 1, 2]


def test_infinities_and_denormals_have_their_place(backend: str) -> None:
    values = torch.tensor([1e-45, -INFINITY, 3e38, INFINITY, 0.0, -3e38, -1e-45])
    order = [3, 2, 0, 4, 6, 5, 1]
    for k in range(1, 8):
        assert select_top([values], k, score="value", backend=backend)[0].tolist() == sorted(order[:k])


def test_a_score_of_minus_infinity_is_taken_before_an_excluded_one(backend: str) -> None:
    values, exclude = torch.full((3,), -INFINITY), torch.tensor([0])
    assert select_top([values], 2, score="value", exclude=[exclude], backend=backend)[0].tolist() == [1, 2]


def test_tensors_of_any_strides(backend: str) -> None:
    a, b = random_tensor((40, 60), torch.float32).t()[::2], random_tensor((30, 40), torch.float32, seed=1)
    assert_selects(backend, "product", [a], [b], 100, None)
    assert_selects(backend, "magnitude", [a], None, 100, None)


@FUZZ
@given(
    sizes=st.lists(st.integers(0, 1500), min_size=1, max_size=4),
    grid=st.sampled_from([0, 2, 8]),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
def test_any_sizes(backend: str, sizes: list[int], grid: int, share: float, seed: int) -> None:
    tensors = [random_tensor((size,), torch.float32, seed + i) for i, size in enumerate(sizes)]
    tensors = [(tensor * grid).round() if grid else tensor for tensor in tensors]
    assert_selects(backend, "magnitude", tensors, None, math.floor(share * sum(sizes)), None)


# ---- quantiles


@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.995, 1.0])
def test_quantiles_agree_with_torch(backend: str, q: float) -> None:
    tensors = [random_tensor((501,), torch.float32, 1), random_tensor((20, 25), torch.float32, 2)]
    together = torch.cat([tensor.flatten() for tensor in tensors]).abs()
    expected = float(torch.quantile(together.double(), q, interpolation="lower"))
    assert quantile_of(tensors, q, backend=backend) == expected
    assert quantile_of(tensors, q, backend=backend) == float(together.sort().values[math.floor(q * 1000)])


def test_quantile_by_hand(backend: str) -> None:
    values = [torch.tensor([-4.0, 1.0]), torch.tensor([3.0, 2.0])]
    got = [quantile_of(values, q, score="value", backend=backend) for q in (0.0, 0.3, 0.34, 0.67, 1.0)]
    assert got == [-4.0, -4.0, 1.0, 2.0, 3.0]
    got = [quantile_of(values, q, exclude=[torch.tensor([0]), None], backend=backend) for q in (0.0, 0.5, 1.0)]
    assert got == [1.0, 2.0, 3.0]


# ---- what is refused


def test_nan_is_refused_with_its_place_and_count(backend: str) -> None:
    values = [torch.ones(3), torch.tensor([1.0, float("nan"), float("nan"), -float("nan")])]
    for call in (lambda: select_top(values, 0, backend=backend), lambda: quantile_of(values, 0.5, backend=backend)):
        with pytest.raises(ValueError, match=r"3 scores of tensors\[1\] are NaN"):
            call()
    with pytest.raises(ValueError, match=r"1 scores of tensors\[0\] are NaN"):
        select_top([torch.tensor([INFINITY])], 1, score="product", other=[torch.zeros(1)], backend=backend)
    excluded = [None, torch.tensor([1, 2, 3])]
    assert [t.tolist() for t in select_top(values, 4, exclude=excluded, backend=backend)] == [[0, 1, 2], [0]]


def test_scores_that_change_between_the_passes_are_noticed() -> None:
    from peftkern.backends import cpu, registry

    if not cpu.available():
        pytest.skip(f"cpu backend: {cpu.unavailable_reason()}")
    entry = _scored("select_top", [torch.ones(1000)], "magnitude", None, None)[0]
    with pytest.raises(RuntimeError, match="have changed since they were counted"):
        registry.run("score_collect", entry, 1, 0, 10, backend="cpu")
    with pytest.raises(AssertionError):
        score_collect_reference(entry, 1, 0, 10)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 13}, ValueError, "between 0 and the number of scores, 12; got 13"),
        ({"k": -1}, ValueError, "got -1"),
        ({"k": 1.0}, TypeError, "k must be an int, got float"),
        ({"score": "size"}, ValueError, "score must be one of .*, got 'size'"),
        ({"score": "product"}, ValueError, "score 'product' needs other"),
        ({"other": [torch.zeros(3, 4)]}, ValueError, "score 'magnitude' takes no other"),
        ({"score": "difference", "other": [torch.zeros(4, 3)]}, ValueError, r"the shape of its tensor, \[3, 4\]"),
        ({"score": "outer", "other": [torch.zeros(3)]}, ValueError, "score 'outer' takes"),
        ({"exclude": []}, ValueError, "exclude must have one for each of 1 tensors, got 0"),
        ({"exclude": [torch.tensor([1, 1])]}, ValueError, "must ascend strictly"),
        ({"exclude": [torch.tensor([3, 12])]}, ValueError, "within 0 and 11, got 3 to 12"),
        ({"exclude": [torch.tensor([0.0])]}, TypeError, r"must be a tensor \[n\] of int64"),
        ({"exclude": [torch.arange(11)], "k": 2}, ValueError, "the number of scores, 1; got 2"),
        ({"tensors": [torch.zeros(3, 4).double()]}, TypeError, "must be float32, bfloat16 or float16"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        select_top(**({"tensors": [torch.zeros(3, 4)], "k": 1} | arguments))


def test_quantiles_out_of_range_or_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"q must be between 0 and 1, got 1\.5"):
        quantile_of([torch.zeros(3)], 1.5)
    with pytest.raises(ValueError, match="there is no score"):
        quantile_of([torch.zeros(0)], 0.5)
