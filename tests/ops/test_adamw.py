"""adamw_ and adamw_8bit_: by hand, against PyTorch's, and the same bits on every backend and instruction set."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from isa_backends import ISA_BACKENDS, select
from same_bits import DTYPES, assert_same_bits, random_tensor
from torch import Tensor

from peftkern.backends import cpu
from peftkern.formats import BitMask, random_mask
from peftkern.ops import adamw

NUMBERS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(3, 256), (70, 33), (1, 1), (300,), (2, 3, 96), (), (0, 4), (4, 0)]
SCALES = ["none", "number", "rows", "mask"]
BITS = [pytest.param(32, id="float32 moments"), pytest.param(8, id="8-bit moments")]


@pytest.fixture(params=ISA_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return select(request.param, monkeypatch)


@dataclass
class Problem:
    """A parameter and its state in the middle of training."""

    parameter: Tensor
    moments: tuple[Tensor, ...]
    age: Tensor | None

    def step(self, gradient: Tensor, step: int, backend: str | None, scale: adamw.Scale = None, **numbers: Any) -> None:
        update = adamw.adamw_ if len(self.moments) == 2 else adamw.adamw_8bit_
        count = step if self.age is None else self.age
        update(  # type: ignore[operator]
            self.parameter, gradient, *self.moments, step=count, scale=scale, backend=backend, **(NUMBERS | numbers)
        )

    def tensors(self) -> list[Tensor]:
        return [self.parameter, *self.moments, *([] if self.age is None else [self.age])]

    def mean(self) -> Tensor:
        if len(self.moments) == 2:
            return self.moments[0]
        return adamw.dequantize_moment(self.moments[0], self.moments[2], signed=True)


def make_problem(
    shape: tuple[int, ...], bits: int = 32, dtype: torch.dtype = torch.float32, ages: bool = False, seed: int = 0
) -> Problem:
    mean = random_tensor(shape, torch.float32, seed + 1) * 0.1
    square = random_tensor(shape, torch.float32, seed + 2) ** 2 * 0.01
    moments: tuple[Tensor, ...] = (mean, square)
    if bits == 8:
        (state1, absmax1), (state2, absmax2) = (adamw.quantize_moment(m, m is mean) for m in moments)
        moments = (state1, state2, absmax1, absmax2)
    age = torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    return Problem(random_tensor(shape, dtype, seed), moments, age if ages else None)


def make_scale(kind: str, shape: tuple[int, ...]) -> adamw.Scale:
    if kind == "none":
        return None
    if kind == "number":
        return 0.3
    if kind == "rows":
        return torch.rand(shape[:1], generator=torch.Generator().manual_seed(7)) * (torch.arange(shape[0]) % 3 != 1)
    return random_mask((shape[0], shape[1]), 0.3, seed=7)


def fits(kind: str, shape: tuple[int, ...]) -> bool:
    return {"none": True, "number": True, "rows": len(shape) > 0, "mask": len(shape) == 2}[kind]


def assert_same_values(actual: Tensor, expected: Tensor) -> None:
    """The same bits, but for those that tell one NaN from another."""
    if actual.is_floating_point():
        assert torch.equal(actual.isnan(), expected.isnan())
        actual, expected = actual.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0)
    assert_same_bits(actual, expected)


def assert_same_steps(problem: Problem, gradients: list[Tensor], scale: adamw.Scale, backend: str) -> None:
    expected = copy.deepcopy(problem)
    for step, gradient in enumerate(gradients, start=5):
        problem.step(gradient, step, backend, scale)
        expected.step(gradient, step, "reference", scale)
        for actual, wanted in zip(problem.tensors(), expected.tensors(), strict=True):
            assert_same_values(actual, wanted)


# ---- the same bits everywhere


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("ages", [False, True], ids=["one age", "an age for each entry"])
@pytest.mark.parametrize("kind", SCALES)
def test_every_backend_gives_the_same_bits(backend: str, bits: int, ages: bool, kind: str) -> None:
    for shape in [shape for shape in SHAPES if fits(kind, shape)]:
        for dtype in DTYPES:
            problem = make_problem(shape, bits, dtype, ages)
            gradients = [random_tensor(shape, other, seed) for seed, other in enumerate(DTYPES)]
            assert_same_steps(problem, gradients, make_scale(kind, shape), backend)


@pytest.mark.parametrize("bits", BITS)
def test_infinite_and_nan_gradients_give_the_same_bits(backend: str, bits: int) -> None:
    gradient = random_tensor((3, 1000), torch.float32)
    gradient[0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    gradient[2, 5] = 1e30  # its square overflows
    assert_same_steps(make_problem((3, 1000), bits), [gradient] * 2, None, backend)


@pytest.mark.parametrize("bits", BITS)
def test_tensors_that_are_not_contiguous(backend: str, bits: int) -> None:
    problem = make_problem((70, 33), bits, torch.bfloat16)
    wide = torch.full((33, 140), 7.0, dtype=torch.bfloat16)
    wide[:, ::2] = problem.parameter.t()
    expected = copy.deepcopy(problem)
    problem.parameter = wide[:, ::2].t()
    gradient = random_tensor((33, 70), torch.float32).t()
    mask = random_mask((70, 33), 0.5, seed=1)
    spread = torch.zeros(70, 10, dtype=torch.uint8)
    spread[:, ::2] = mask.bits
    problem.step(gradient, 3, backend, BitMask(spread[:, ::2], mask.shape))
    expected.step(gradient.contiguous(), 3, "reference", mask)
    for actual, wanted in zip(problem.tensors(), expected.tensors(), strict=True):
        assert_same_bits(actual, wanted)
    assert bool((wide[:, 1::2] == 7.0).all())


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 700),
    bits=st.sampled_from([32, 8]),
    ages=st.booleans(),
    density=st.sampled_from([0.0, 0.001, 0.5, 1.0]),
    magnitude=st.sampled_from([-30, -12, 0, 15]),
)
def test_any_size(rows: int, columns: int, bits: int, ages: bool, density: float, magnitude: int) -> None:
    problem = make_problem((rows, columns), bits, ages=ages)
    gradients = [random_tensor((rows, columns), torch.float32, seed) * 10.0**magnitude for seed in range(2)]
    mask = random_mask((rows, columns), density, seed=3)
    assert_same_steps(problem, gradients, mask, "cpu" if cpu.available() else "reference")


@pytest.mark.parametrize("bits", BITS)
def test_threads_change_no_bit(backend: str, bits: int) -> None:
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3):
        problem = make_problem((300, 1000), bits, ages=True)
        torch.set_num_threads(count)
        try:
            problem.step(random_tensor((300, 1000), torch.float32), 1, backend, random_mask((300, 1000), 0.5, seed=3))
        finally:
            torch.set_num_threads(threads)
        results.append(problem.tensors())
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


def test_ages_past_the_table_of_corrections(backend: str) -> None:
    problem = make_problem((4, 300), ages=True)
    problem.age = torch.full((4, 300), 2**30, dtype=torch.int32)
    assert_same_steps(problem, [random_tensor((4, 300), torch.float32)], None, backend)


# ---- what is computed


def test_hand_computed(backend: str) -> None:
    parameter, mean, square = torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([0.0])
    update: dict[str, Any] = {"lr": 0.5, "betas": (0.5, 0.75), "eps": 0.0, "weight_decay": 0.25, "backend": backend}
    adamw.adamw_(parameter, torch.tensor([2.0]), mean, square, step=1, **update)
    # m = 1, v = 1; corrected 2 and 4; u = 0.5 * 2 / 2 + 0.5 * 0.25 * 1
    assert (parameter.item(), mean.item(), square.item()) == (1 - 0.625, 1.0, 1.0)
    adamw.adamw_(parameter, torch.tensor([-2.0]), mean, square, step=2, scale=0.5, **update)
    # m = -0.5, corrected by 1 - 0.25; v = 1.75, corrected by 1 - 0.5625: 4
    expected = 0.375 - 0.5 * (0.5 * (-0.5 / 0.75) / 2 + 0.125 * 0.375)
    assert parameter.item() == pytest.approx(expected, rel=1e-6) and mean.item() == -0.5 and square.item() == 1.75


def test_twenty_steps_are_those_of_torch(backend: str) -> None:
    parameter = torch.nn.Parameter(random_tensor((37, 65), torch.float32).double())
    problem = make_problem((37, 65))
    problem.moments = (torch.zeros(37, 65), torch.zeros(37, 65))
    problem.parameter = parameter.detach().float()
    peer = torch.optim.AdamW([parameter], **NUMBERS)
    for step in range(1, 21):
        gradient = random_tensor((37, 65), torch.float32, step)
        parameter.grad = gradient.double()
        peer.step()
        problem.step(gradient, step, backend)
    assert float((problem.parameter - parameter.detach()).abs().max()) < 1e-6


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rows", "mask"])
def test_frozen_entries_do_not_move_with_decay_and_carried_momentum(
    backend: str, bits: int, dtype: torch.dtype, kind: str
) -> None:
    shape = (12, 300)
    problem = make_problem(shape, bits, dtype, ages=True)
    if kind == "mask":
        scale: adamw.Scale = random_mask(shape, 0.3, seed=2)
        frozen = ~random_mask(shape, 0.3, seed=2).mask()
    else:
        scale = torch.tensor([0.0, 1.0, 0.5] * 4)
        frozen = (scale == 0)[:, None].expand(shape)
    assert problem.age is not None and bool(problem.mean()[frozen].any())  # momentum is carried over
    before = copy.deepcopy(problem)
    for step in range(1, 6):
        problem.step(random_tensor(shape, dtype, step), step, backend, scale)
    assert_same_bits(problem.parameter[frozen], before.parameter[frozen])
    assert problem.age is not None and before.age is not None
    assert torch.equal(problem.age[frozen], before.age[frozen])
    assert torch.equal(problem.age[~frozen], before.age[~frozen] + 5)
    assert bool((problem.parameter != before.parameter)[~frozen].any())
    if bits == 32:
        for moment, old in zip(problem.moments, before.moments, strict=True):
            assert_same_bits(moment[frozen], old[frozen])


@pytest.mark.parametrize("bits", BITS)
def test_kept_entries_move_as_without_a_mask(backend: str, bits: int) -> None:
    masked, whole = make_problem((12, 300), bits), make_problem((12, 300), bits)
    mask, gradient = random_mask((12, 300), 0.3, seed=2), random_tensor((12, 300), torch.float32, 9)
    masked.step(gradient, 1, backend, mask)
    whole.step(gradient, 1, backend)
    assert_same_bits(masked.parameter[mask.mask()], whole.parameter[mask.mask()])


@pytest.mark.parametrize("bits", BITS)
def test_a_mask_that_keeps_all_and_a_scale_of_one_change_no_bit(backend: str, bits: int) -> None:
    everything = BitMask.from_mask(torch.ones(12, 300, dtype=torch.bool))
    gradient, results = random_tensor((12, 300), torch.float32, 9), []
    for scale in (None, 1.0, torch.ones(12), everything):
        results.append(make_problem((12, 300), bits))
        results[-1].step(gradient, 1, backend, scale)
    for result in results[1:]:
        for actual, expected in zip(result.tensors(), results[0].tensors(), strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [0, 0.0, 1e-50], ids=["0", "0.0", "0 as float32"])
def test_a_scale_of_zero_changes_nothing(backend: str, bits: int, scale: float) -> None:
    problem, before = make_problem((12, 300), bits, ages=True), make_problem((12, 300), bits, ages=True)
    problem.step(random_tensor((12, 300), torch.float32), 1, backend, scale)
    for actual, expected in zip(problem.tensors(), before.tensors(), strict=True):
        assert_same_bits(actual, expected)


def test_the_scale_acts_on_the_update_decay_included(backend: str) -> None:
    gradient = random_tensor((12, 300), torch.float32, 9)
    whole, halved, start = make_problem((12, 300)), make_problem((12, 300)), make_problem((12, 300)).parameter
    whole.step(gradient, 1, backend)
    halved.step(gradient, 1, backend, 0.5)
    assert torch.allclose(halved.parameter - start, (whole.parameter - start) / 2, rtol=1e-4, atol=2e-7)
    for one, other in zip(halved.moments, whole.moments, strict=True):
        assert_same_bits(one, other)  # the gradient that they have seen is the same


def test_scaling_the_gradient_does_nothing_where_scaling_the_update_does(backend: str) -> None:
    plain, scaled_gradient, scaled_update = (make_problem((12, 300)) for _ in range(3))
    for problem in (plain, scaled_gradient, scaled_update):
        problem.moments = (torch.zeros(12, 300), torch.zeros(12, 300))
    start = plain.parameter.clone()
    for step in range(1, 31):
        gradient = random_tensor((12, 300), torch.float32, step)
        plain.step(gradient, step, backend, eps=0.0)
        scaled_gradient.step(gradient * 0.5, step, backend, eps=0.0)
        scaled_update.step(gradient, step, backend, 0.5, eps=0.0)
    assert torch.equal(scaled_gradient.parameter, plain.parameter)
    moved = float((scaled_update.parameter - start).norm() / (plain.parameter - start).norm())
    assert moved == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ages_advance_for_every_dtype(backend: str, bits: int, dtype: torch.dtype) -> None:
    problem = make_problem((12, 300), bits, dtype)
    problem.age = torch.zeros(12, 300, dtype=torch.int32)
    for step in (1, 2):
        problem.step(random_tensor((12, 300), dtype), step, backend)
        assert bool((problem.age == step).all())


@pytest.mark.parametrize("bits", BITS)
def test_entries_of_one_age_are_updated_as_a_parameter_of_that_age(backend: str, bits: int) -> None:
    gradient = random_tensor((12, 300), torch.float32, 9)
    by_entry, by_parameter = make_problem((12, 300), bits), make_problem((12, 300), bits)
    by_entry.age = torch.full((12, 300), 6, dtype=torch.int32)
    by_entry.step(gradient, 0, backend)
    by_parameter.step(gradient, 7, backend)
    assert_same_bits(by_entry.parameter, by_parameter.parameter)


# ---- an update on trial


def make_trial(problem: Problem, gradient: Tensor, step: int, backend: str, scale: adamw.Scale) -> None:
    update = adamw.adamw_probe_ if len(problem.moments) == 2 else adamw.adamw_8bit_probe_
    count = step if problem.age is None else problem.age
    update(problem.parameter, gradient, *problem.moments, step=count, scale=scale, backend=backend, **NUMBERS)  # type: ignore[operator]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("ages", [False, True], ids=["one age", "an age for each entry"])
@pytest.mark.parametrize("kind", [*SCALES, "zero"])
def test_a_probe_is_the_update_and_the_gradient_becomes_what_the_parameter_was(
    backend: str, bits: int, ages: bool, kind: str
) -> None:
    for shape in [shape for shape in SHAPES if kind == "zero" or fits(kind, shape)]:
        for dtype in DTYPES:
            scale = 0.0 if kind == "zero" else make_scale(kind, shape)
            tried, updated = make_problem(shape, bits, dtype, ages), make_problem(shape, bits, dtype, ages)
            before, gradient = copy.deepcopy(tried), random_tensor(shape, dtype, 4)
            updated.step(gradient, 6, "reference", scale)
            make_trial(tried, gradient, 6, backend, scale)
            assert_same_bits(tried.parameter, updated.parameter)
            assert_same_bits(gradient, before.parameter)
            for actual, old in zip(tried.tensors()[1:], before.tensors()[1:], strict=True):
                assert_same_bits(actual, old)


def test_moments_that_are_not_there_are_zero(backend: str) -> None:
    for shape in SHAPES:
        tried, updated = make_problem(shape), make_problem(shape)
        updated.moments = (torch.zeros(shape), torch.zeros(shape))
        gradient = random_tensor(shape, torch.float32, 4)
        updated.step(gradient, 1, "reference")
        adamw.adamw_probe_(tried.parameter, gradient, None, None, step=1, backend=backend, **NUMBERS)
        assert_same_bits(tried.parameter, updated.parameter)
        assert_same_bits(gradient, make_problem(shape).parameter)


@pytest.mark.parametrize("bits", BITS)
def test_a_probe_of_tensors_that_are_not_contiguous(backend: str, bits: int) -> None:
    tried, updated = make_problem((70, 33), bits), make_problem((70, 33), bits)
    before = tried.parameter.clone()
    gradient = random_tensor((70, 33), torch.float32, 4)
    wide, spread = torch.full((33, 140), 7.0), gradient.t().contiguous().t()
    wide[:, ::2] = tried.parameter.t()
    tried.parameter = wide[:, ::2].t()
    make_trial(tried, spread, 6, backend, None)
    updated.step(gradient, 6, "reference")
    assert_same_bits(tried.parameter.contiguous(), updated.parameter)
    assert_same_bits(spread.contiguous(), before)
    assert bool((wide[:, 1::2] == 7.0).all())


def test_a_probe_of_infinite_and_nan_gradients_is_undone(backend: str) -> None:
    problem = make_problem((3, 1000))
    before, gradient = problem.parameter.clone(), random_tensor((3, 1000), torch.float32)
    gradient[0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    make_trial(problem, gradient, 6, backend, None)
    assert not bool(problem.parameter.isfinite().all())
    assert_same_bits(gradient, before)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gradient": torch.zeros(3, 4).bfloat16()}, TypeError, "gradient must be torch.float32 as parameter is"),
        ({"exp_avg": None}, TypeError, "must both be tensors or both be None"),
        ({"exp_avg_sq": torch.zeros(4, 3)}, ValueError, r"exp_avg_sq must be \[3, 4\]"),
        ({"step": 0}, ValueError, "step must be at least 1"),
    ],
)
def test_bad_arguments_of_a_probe(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    names = ("parameter", "gradient", "exp_avg", "exp_avg_sq")
    given = {**{name: torch.zeros(3, 4) for name in names}, "step": 1, **NUMBERS, **changes}
    with pytest.raises(error, match=message):
        adamw.adamw_probe_(**given)


# ---- 8-bit moments

MEAN_GAP, SQUARE_GAP = 0.9 / 64, 0.9 / 128
"""The widest steps of the two codebooks, in the decade from 0.1 to 1."""


def test_8_bit_moments_are_within_half_a_step_of_their_block(backend: str) -> None:
    exact, coded = make_problem((12, 300), 32), make_problem((12, 300), 8)
    mean, square = coded.mean(), adamw.dequantize_moment(coded.moments[1], coded.moments[3], signed=False)
    exact.moments = (mean, square)
    gradient = random_tensor((12, 300), torch.float32, 9)
    exact.step(gradient, 4, backend)
    coded.step(gradient, 4, backend)
    assert_same_bits(coded.parameter, exact.parameter)  # codes are rounded after the update
    for index, gap in ((0, MEAN_GAP), (1, SQUARE_GAP)):
        codes, absmax = coded.moments[index], coded.moments[index + 2]
        values = adamw.dequantize_moment(codes, absmax, signed=index == 0)
        bound = absmax.repeat_interleave(256)[: codes.numel()].view(codes.shape) * (gap / 2 + 1e-6)
        assert bool(((values - exact.moments[index]).abs() <= bound).all())


def test_8_bit_moments_train_as_float32_ones_do(backend: str) -> None:
    exact, coded = make_problem((12, 300), 32), make_problem((12, 300), 8)
    exact.moments = (torch.zeros(12, 300), torch.zeros(12, 300))
    coded.moments = adamw.empty_moments(coded.parameter)
    start = exact.parameter.clone()
    target = random_tensor((12, 300), torch.float32, 77)
    for step in range(1, 101):  # a least-squares problem with noise
        noise = random_tensor((12, 300), torch.float32, step) * 0.1
        exact.step(exact.parameter - target + noise, step, backend)
        coded.step(coded.parameter - target + noise, step, backend)
    apart = float((coded.parameter - exact.parameter).norm() / (exact.parameter - start).norm())
    assert 0 < apart < 0.05


def test_a_second_moment_that_is_not_zero_keeps_a_code(backend: str) -> None:
    problem = make_problem((1, 256), 8)
    problem.moments = adamw.empty_moments(problem.parameter)
    gradient = torch.full((1, 256), 1e-6)
    gradient[0, 0], gradient[0, 1] = 1.0, 0.0
    problem.step(gradient, 1, backend)
    assert problem.moments[1].flatten().tolist() == [255, 0, *[1] * 254]
    assert bool((problem.parameter - make_problem((1, 256), 8).parameter).abs().max() < 0.02)


def test_blocks_without_trained_entries_keep_their_codes(backend: str) -> None:
    problem, before = make_problem((8, 256), 8), make_problem((8, 256), 8)
    mask = torch.zeros(8, 256, dtype=torch.bool)
    mask[3, 5] = True
    problem.step(random_tensor((8, 256), torch.float32) * 100, 1, backend, BitMask.from_mask(mask))
    others = torch.arange(8) != 3
    for actual, old in zip(problem.moments, before.moments, strict=True):
        assert_same_bits(actual[others], old[others])
    assert not torch.equal(problem.moments[2][3], before.moments[2][3])


@pytest.mark.parametrize("signed", [True, False])
def test_codes_come_back_from_their_values(signed: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = adamw.dequantize_moment(codes, torch.ones(1), signed)
    assert torch.equal(adamw.quantize_moment(values, signed)[0], codes)
    assert not torch.equal(codes, codes.flip(0))


# ---- autograd, bad arguments


@pytest.mark.parametrize("bits", BITS)
def test_autograd_learns_that_the_parameter_has_changed(backend: str, bits: int) -> None:
    problem = make_problem((12, 300), bits)
    problem.parameter.requires_grad_()
    product = (problem.parameter * problem.parameter).sum()
    problem.step(random_tensor((12, 300), torch.float32), 1, backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gradient": torch.zeros(3, 4)}, ValueError, r"the shape of parameter, \[4, 3\]; got \[3, 4\]"),
        ({"gradient": torch.zeros(4, 3).double()}, TypeError, "gradient must be float32, bfloat16 or float16"),
        ({"parameter": torch.zeros(4, 3).to_sparse()}, ValueError, "parameter must be dense"),
        ({"exp_avg": torch.zeros(4, 3).bfloat16()}, TypeError, "exp_avg must be torch.float32, got torch.bfloat16"),
        ({"exp_avg_sq": torch.zeros(3, 4).t()}, ValueError, "exp_avg_sq must be .* contiguous"),
        ({"step": 0}, ValueError, "step must be at least 1"),
        ({"step": 1.0}, TypeError, "step must be an int or an int32 tensor, got float"),
        ({"step": torch.zeros(4, 3)}, TypeError, "step must be torch.int32, got torch.float32"),
        ({"scale": -1.0}, ValueError, "scale must be finite and at least 0, got -1.0"),
        ({"scale": float("nan")}, ValueError, "scale must be finite and at least 0, got nan"),
        ({"scale": torch.ones(3)}, ValueError, r"scale must be \[4\] on cpu"),
        ({"scale": "all"}, TypeError, "scale must be a number, a tensor, a BitMask or None, got str"),
        ({"scale": random_mask((3, 4), 0.5, seed=0)}, ValueError, r"scale must be a BitMask of \[4, 3\]"),
        ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] must be at least 0 and below 1, got 1.0"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {name: torch.zeros(4, 3) for name in ("parameter", "gradient", "exp_avg", "exp_avg_sq")}
    with pytest.raises(error, match=message):
        adamw.adamw_(**(arguments | NUMBERS | {"step": 1} | change))


def test_bad_8_bit_state_is_refused() -> None:
    parameter = torch.zeros(4, 300)
    moments = adamw.empty_moments(parameter)
    with pytest.raises(ValueError, match=r"absmax2 must be \[5\] on cpu"):
        adamw.adamw_8bit_(parameter, parameter, *moments[:3], torch.zeros(4), step=1, **NUMBERS)
    with pytest.raises(TypeError, match=r"state1 must be torch.uint8, got torch.float32"):
        adamw.adamw_8bit_(parameter, parameter, parameter, *moments[1:], step=1, **NUMBERS)
