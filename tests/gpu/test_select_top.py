"""The K largest scores on the device: histograms and indices are those of the reference, one by one."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DEVICE, launched
from same_bits import DTYPES
from torch import Tensor

from peftkern.backends import registry
from peftkern.backends.triton import select_top as kernels
from peftkern.backends.triton.launch import recording
from peftkern.ops.select_top import PASSES, SCORES, Scored, quantile_of, select_top

SIZES = [1, 255, 256, 257, 600]
"""Around the size of a tile, and more than two tiles."""


@pytest.fixture(autouse=True)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles without many elements, each of which takes an executor long."""
    if "shipped_tiles" not in request.fixturenames:
        monkeypatch.setattr(kernels, "_BLOCK", 256)


@pytest.fixture
def shipped_tiles() -> None:
    """Tiles as they are."""


def random_values(size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """With equal ones among them, both zeros and both infinities where there is room."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    values = torch.where(torch.arange(size) % 5 == 0, (values * 4).round() / 4, values)
    if size > 20:
        values[10:14] = torch.tensor([0.0, -0.0, float("inf"), float("-inf")])
    return values.to(dtype)


def operands(score: str, size: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor] | None]:
    """Three tensors, the second of another size; finite where scores are made of two."""
    sizes = (size, size // 3 + 1, size)
    tensors = [random_values(one, dtype, seed) for seed, one in enumerate(sizes)]
    if not SCORES[score]:
        return tensors, None
    tensors = [tensor.nan_to_num(posinf=3.0, neginf=-3.0) for tensor in tensors]
    if score == "outer":
        columns = (7, 1, 130)
        return [one[: size // 12 + 1] for one in tensors], [random_values(one, dtype, 9)[:10] for one in columns]
    return tensors, [random_values(one, torch.float32, 9 + one).nan_to_num(posinf=3.0, neginf=-3.0) for one in sizes]


def excluded_of(tensors: list[Tensor], other: list[Tensor] | None, outer: bool) -> list[Tensor | None]:
    """Every third score of the first tensor, none of the second, all but one of the third."""
    sizes = [len(one) * (len(other[i]) if outer and other is not None else 1) for i, one in enumerate(tensors)]
    return [torch.arange(0, sizes[0], 3), None, torch.arange(1, sizes[2])]


def on_device(tensors: list[Tensor | None] | list[Tensor] | None) -> list[Tensor] | None:
    return None if tensors is None else [one if one is None else one.to(DEVICE) for one in tensors]  # type: ignore[misc]


def assert_agrees(
    tensors: list[Tensor],
    k: int,
    score: str = "magnitude",
    other: list[Tensor] | None = None,
    exclude: list[Tensor | None] | None = None,
) -> None:
    expected = select_top(tensors, k, score=score, other=other, exclude=exclude, backend="reference")
    found = select_top(
        on_device(tensors) or [],
        k,
        score=score,
        other=on_device(other),
        exclude=on_device(exclude),
        backend="triton",
    )
    assert sum(len(one) for one in found) == k
    for one, reference in zip(found, expected, strict=True):
        assert one.dtype == torch.int64
        assert torch.equal(one.cpu(), reference)


@pytest.mark.parametrize("excluding", [False, True], ids=["all", "excluding"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_agrees_with_the_reference(score: str, dtype: torch.dtype, excluding: bool) -> None:
    tensors, other = operands(score, 600, dtype)
    exclude = excluded_of(tensors, other, score == "outer") if excluding else None
    assert_agrees(tensors, 60, score, other, exclude)


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: int) -> None:
    tensors, _ = operands("value", size, torch.float32)
    available = sum(len(one) for one in tensors)
    for k in {0, 1, available // 2, available}:
        assert_agrees(tensors, k, "value")


def test_equal_scores_are_taken_from_the_front() -> None:
    tensors = [torch.tensor([1.0, -0.0] * 300), torch.tensor([0.0, 1.0] * 10)]
    assert_agrees(tensors, 310)  # every 1
    assert_agrees(tensors, 310 + 200)  # and the first zeros, of either sign
    assert_agrees(tensors, 140)  # some of the ones, all of the first tensor
    assert_agrees(tensors, 305)
    assert_agrees(tensors, 155, exclude=[torch.arange(0, 600, 4), torch.tensor([0, 3])])


def test_an_excluded_nan_is_passed_over_and_another_one_is_an_error() -> None:
    values = random_values(600, torch.float32)
    values[[5, 590]] = float("nan")
    assert_agrees([values], 50, exclude=[torch.tensor([5, 590])])
    with pytest.raises(ValueError, match="1 scores of tensors"):
        select_top([values.to(DEVICE)], 50, exclude=[torch.tensor([5], device=DEVICE)], backend="triton")


def test_an_empty_tensor_and_one_that_is_excluded_altogether() -> None:
    tensors = [torch.empty(0), random_values(300, torch.float32), random_values(50, torch.float32)]
    assert_agrees(tensors, 30, exclude=[None, torch.arange(300), None])


@pytest.mark.parametrize("q", [0.0, 0.25, 0.5, 1.0])
def test_quantiles(q: float) -> None:
    tensors, _ = operands("value", 300, torch.bfloat16)
    expected = quantile_of(tensors, q, score="value", backend="reference")
    assert quantile_of(on_device(tensors) or [], q, score="value", backend="triton") == expected


# ---- histograms


@pytest.mark.usefixtures("shipped_tiles")
@pytest.mark.parametrize("exclude", [None, torch.arange(0, 2500, 7)], ids=["all", "excluding"])
@pytest.mark.parametrize(("shift", "bits"), PASSES)
def test_histograms(shift: int, bits: int, exclude: Tensor | None) -> None:
    values = random_values(2500, torch.float32)
    top = int(values[1].abs().view(torch.int32)) | 0x80000000  # the key of one that is not excluded
    prefix = top >> (shift + bits)
    entry = Scored("magnitude", values, None, exclude)
    here = Scored("magnitude", values.to(DEVICE), None, None if exclude is None else exclude.to(DEVICE))
    expected = registry.run("score_histogram", entry, shift, bits, prefix, backend="reference")
    found = registry.run("score_histogram", here, shift, bits, prefix, backend="triton")
    assert expected.sum() > 0
    assert found.dtype == torch.int64
    assert torch.equal(found.cpu(), expected)


def test_programs_that_count_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_PROGRAMS", 2)
    tensors, _ = operands("value", 901, torch.float32)
    assert_agrees(tensors, 100, "value", exclude=[torch.arange(0, 901, 2), None, None])


@pytest.mark.usefixtures("shipped_tiles")
def test_tiles_as_they_are() -> None:
    assert_agrees([random_values(4100, torch.bfloat16)], 1000, exclude=[torch.arange(1, 4100, 3)])


# ---- launches


def test_launches() -> None:
    values = random_values(300, torch.float32).to(DEVICE)
    histogram, tail = "score_histogram_kernel", ["score_count_kernel", "score_collect_kernel"]

    def names(**options: list[Tensor]) -> list[str]:
        return [name for name, _ in launched(lambda: select_top([values], 10, backend="triton", **options))]  # type: ignore[arg-type]

    assert names() == [histogram] * 3 + tail
    assert names(exclude=[torch.arange(5, device=DEVICE)]) == [histogram] * 6 + tail


def test_a_bound_decides_nothing_about_what_is_compiled() -> None:
    """Keys and counts change with every call: each new kernel would take as long as it takes to compile."""
    entry = Scored("magnitude", torch.empty(4096, device="meta"), None, None)
    with recording() as launches:
        for key, ties in ((0x80000010, 1), (0xFFF00000, 16), (3, 1 << 33)):
            kernels.score_collect(entry, key, ties, 5)
            kernels.score_histogram(entry, 0, 10, key >> 10)
    numbers = [
        argument
        for one in launches
        for argument in (one.call.arguments if one.call is not None else ())
        if isinstance(argument, int) and argument > 1 << 40
    ]
    assert len(numbers) == 12
    assert all(number % 16 != 0 and 1 << 62 <= number < 1 << 63 for number in numbers)
