"""AdamW on the device: parameter, moments and ages are those of the reference, bit for bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from gpu_cases import DEVICE, launched
from same_bits import DTYPES, assert_same_bits
from torch import Tensor

from peftkern.backends.triton import adamw as kernels
from peftkern.backends.triton import launch
from peftkern.backends.triton.adamw import cell_edges
from peftkern.formats import BitMask, random_mask
from peftkern.ops.adamw import (
    Scale,
    adamw_,
    adamw_8bit_,
    adamw_8bit_probe_,
    adamw_probe_,
    empty_moments,
    moment_magnitudes,
    quantize_moment,
)
from peftkern.optim import AdamW8bit

NUMBERS: dict[str, Any] = {"lr": 3e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
SCALES = ("none", "number", "rows", "mask")


def scale_of(kind: str, shape: tuple[int, ...]) -> Scale:
    """Half of the rows have scale 0, as half of a mask has; one row of a mask is empty."""
    if kind == "number":
        return 0.3
    if kind == "rows":
        return torch.arange(shape[0], dtype=torch.float32).fmod(2) * 1.7
    if kind == "mask":
        mask = random_mask((shape[0], shape[1]), 0.5, 3).mask()
        mask[shape[0] // 2] = False
        return BitMask.from_mask(mask)
    return None


def on_device(scale: Scale) -> Scale:
    return scale.to(DEVICE) if isinstance(scale, Tensor | BitMask) else scale


@dataclasses.dataclass
class Update:
    """A parameter with its state: on the CPU for the reference, on the device for the kernels."""

    parameter: Tensor
    state: list[Tensor]
    age: Tensor | None
    scale: Scale

    @classmethod
    def make(
        cls, shape: tuple[int, ...], dtype: torch.dtype, *, bits: int = 32, aged: bool = False, scale: str = "none"
    ) -> Update:
        generator = torch.Generator().manual_seed(7)
        parameter = torch.randn(shape, generator=generator).to(dtype)
        state = [torch.zeros(shape), torch.zeros(shape)] if bits == 32 else list(empty_moments(parameter))
        age = torch.randint(0, 30_000, shape, generator=generator, dtype=torch.int32) if aged else None
        return cls(parameter, state, age, scale_of(scale, shape))

    def to(self, device: str) -> Update:
        """A copy."""
        state = [tensor.to(device, copy=True) for tensor in self.state]
        age = None if self.age is None else self.age.to(device, copy=True)
        return Update(self.parameter.to(device, copy=True), state, age, on_device(self.scale))

    def step(self, gradient: Tensor, number: int, backend: str, **numbers: Any) -> None:
        update = adamw_ if len(self.state) == 2 else adamw_8bit_
        step = number if self.age is None else self.age
        update(
            self.parameter,
            gradient,
            *self.state,
            step=step,
            scale=self.scale,
            backend=backend,
            **(NUMBERS | numbers),
        )

    def tensors(self) -> dict[str, Tensor]:
        named = {f"state {number}": tensor for number, tensor in enumerate(self.state)} | {"parameter": self.parameter}
        return named if self.age is None else named | {"age": self.age}


def gradient_of(update: Update, number: int, dtype: torch.dtype) -> Tensor:
    """Of very different magnitudes, so that codes of 8 bits are needed of every decade; some are 0."""
    generator = torch.Generator().manual_seed(100 + number)
    shape = update.parameter.shape
    values = torch.randn(shape, generator=generator) * 10 ** (-6 * torch.rand(shape, generator=generator))
    return (values * (torch.rand(shape, generator=generator) > 0.1)).to(dtype)


def assert_same(found: Update, expected: Update) -> None:
    for name, tensor in expected.tensors().items():
        assert_same_bits(found.tensors()[name].cpu(), tensor)


def assert_agrees(expected: Update, steps: int = 2, dtype: torch.dtype | None = None, **numbers: Any) -> None:
    found = expected.to(DEVICE)
    for number in range(1, steps + 1):
        gradient = gradient_of(expected, number, dtype or expected.parameter.dtype)
        expected.step(gradient, number, "reference", **numbers)
        found.step(gradient.to(DEVICE), number, "triton", **numbers)
    assert_same(found, expected)


# ---- results


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("aged", [False, True], ids=["step", "ages"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [32, 8])
def test_agrees_with_the_reference(bits: int, dtype: torch.dtype, aged: bool, scale: str) -> None:
    assert_agrees(Update.make((5, 260), dtype, bits=bits, aged=aged, scale=scale))


@pytest.mark.parametrize("shape", [(), (1,), (255,), (257,), (1024,), (2, 3, 171)], ids=str)
@pytest.mark.parametrize("bits", [32, 8])
def test_shapes(bits: int, shape: tuple[int, ...]) -> None:
    assert_agrees(Update.make(shape, torch.float32, bits=bits))


@pytest.mark.parametrize(
    ("shape", "scale"), [((1100,), "rows"), ((600, 2), "rows"), ((3, 1100), "mask"), ((300, 5), "mask")]
)
@pytest.mark.parametrize("bits", [32, 8])
def test_rows_shorter_and_longer_than_a_program(bits: int, shape: tuple[int, ...], scale: str) -> None:
    assert_agrees(Update.make(shape, torch.bfloat16, bits=bits, scale=scale))


@pytest.mark.parametrize("scale", ["rows", "mask"])
def test_rows_that_are_counted_in_64_bits(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_WIDE_COLUMNS", 1)
    assert_agrees(Update.make((7, 300), torch.bfloat16, scale=scale))


@pytest.mark.parametrize("bits", [32, 8])
def test_a_gradient_of_another_dtype(bits: int) -> None:
    assert_agrees(Update.make((5, 60), torch.bfloat16, bits=bits), dtype=torch.float32)


@pytest.mark.parametrize("numbers", [{"eps": 0.0}, {"weight_decay": 0.0}, {"betas": (0.0, 0.0)}, {"lr": 0.0}], ids=str)
@pytest.mark.parametrize("bits", [32, 8])
def test_numbers_at_the_ends_of_their_ranges(bits: int, numbers: dict[str, Any]) -> None:
    expected = Update.make((3, 100), torch.float32, bits=bits)
    for squares in expected.state[1::2]:
        squares += 100  # without eps nothing is divided by 0: a NaN's bits are not specified
    assert_agrees(expected, **numbers)
    assert not expected.parameter.isnan().any()


@pytest.mark.parametrize("bits", [32, 8])
def test_strides(bits: int) -> None:
    expected = Update.make((40, 30), torch.float32, bits=bits)
    gradient = gradient_of(expected, 1, torch.float32)
    found = expected.to(DEVICE)
    memory = torch.full((30, 42), 7.0, device=DEVICE)
    memory[:, 1:-1] = expected.parameter.t().to(DEVICE)
    found.parameter = memory[:, 1:-1].t()
    expected.step(gradient, 1, "reference")
    found.step(gradient.t().contiguous().t().to(DEVICE), 1, "triton")
    assert_same(found, expected)
    assert bool((memory[:, [0, -1]] == 7).all())


def test_a_number_that_is_zero_in_float32_changes_nothing() -> None:
    update = Update.make((3, 100), torch.float32, aged=True).to(DEVICE)
    update.scale = 1e-50
    before = update.to(DEVICE)
    update.step(torch.ones(3, 100, device=DEVICE), 1, "triton")
    assert_same(update, before.to("cpu"))


# ---- 8-bit moments


@pytest.mark.parametrize("signed", [True, False], ids=["mean", "square"])
def test_no_cell_of_magnitudes_has_two_bounds(signed: bool) -> None:
    """What `nearest_codes` relies on. A bound on an edge belongs to the cell that it begins."""
    edges, bounds = cell_edges(), moment_magnitudes(signed, torch.device("cpu"))[1]
    assert bool((edges.diff() > 0).all()) and edges[0] == 0 and edges[-2] == 1
    inside = torch.bucketize(edges[1:], bounds) - torch.bucketize(edges[:-1], bounds)
    assert inside.max() == 1
    assert inside.sum() == len(bounds)


@pytest.mark.parametrize("signed", [True, False], ids=["mean", "square"])
def test_every_code_and_every_bound(signed: bool) -> None:
    """Moments that stay as they are, quantized anew: each magnitude, each bound and its neighbours."""
    magnitudes, bounds = moment_magnitudes(signed, torch.device("cpu"))
    near = [bounds, bounds.nextafter(torch.tensor(2.0)), bounds.nextafter(torch.tensor(-1.0)).clamp(min=0)]
    values = torch.cat([magnitudes, *near, torch.tensor([1e-30, 1e-45])])
    values = torch.cat([values, -values]) if signed else values
    values = torch.stack([torch.cat([torch.ones(1), part]) for part in values.split(255) if len(part) == 255])
    # the gradient alone decides the moment
    numbers = {"betas": (0.0, 0.0)}
    gradient = values if signed else values.double().sqrt().float()
    expected = Update.make(values.shape, torch.float32, bits=8)
    found = expected.to(DEVICE)
    expected.step(gradient, 1, "reference", **numbers)
    found.step(gradient.to(DEVICE), 1, "triton", **numbers)
    assert_same(found, expected)
    if signed:
        assert_same_bits(found.state[0].cpu(), quantize_moment(values, True)[0])
    assert expected.state[0 if signed else 1].unique().numel() > 200


def test_blocks_without_trained_entries_stay_as_they_are() -> None:
    update = Update.make((4, 256), torch.float32, bits=8)
    update.step(gradient_of(update, 1, torch.float32), 1, "reference")
    update.scale = torch.tensor([1.0, 0.0, 1.0, 0.0])
    found, before = update.to(DEVICE), update.to("cpu")
    found.step(torch.full((4, 256), 50.0, device=DEVICE), 2, "triton")
    for name, tensor in found.tensors().items():
        same = (tensor.cpu() == before.tensors()[name]).view(4, -1).all(1)
        assert same.tolist() == [False, True, False, True], name


def test_a_square_that_is_not_zero_never_becomes_zero() -> None:
    update = Update.make((1, 256), torch.float32, bits=8).to(DEVICE)
    gradient = torch.full((1, 256), 1e-12, device=DEVICE)
    gradient[0, 0] = 1.0
    update.step(gradient, 1, "triton")
    assert bool((update.state[1] > 0).all())


@pytest.mark.parametrize("bits", [32, 8])
def test_not_a_number_is_not_hidden(bits: int) -> None:
    update = Update.make((2, 256), torch.float32, bits=bits).to(DEVICE)
    gradient = torch.ones(2, 256, device=DEVICE)
    gradient[1, 3] = float("nan")
    update.step(gradient, 1, "triton")
    assert update.parameter.isnan().sum() == 1
    update.step(torch.ones(2, 256, device=DEVICE), 2, "triton")
    assert update.parameter[0].isfinite().all()
    assert bool(update.parameter[1, 3].isnan())


# ---- an update on trial


def trial(update: Update, gradient: Tensor, number: int, backend: str) -> None:
    tried = adamw_probe_ if len(update.state) == 2 else adamw_8bit_probe_
    step = number if update.age is None else update.age
    tried(update.parameter, gradient, *update.state, step=step, scale=update.scale, backend=backend, **NUMBERS)  # type: ignore[operator]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("aged", [False, True], ids=["step", "ages"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [32, 8])
def test_an_update_on_trial_is_the_update_and_leaves_the_state(
    bits: int, dtype: torch.dtype, aged: bool, scale: str
) -> None:
    update = Update.make((5, 260), dtype, bits=bits, aged=aged, scale=scale)
    update.step(gradient_of(update, 1, dtype), 1, "reference")  # moments that are not 0
    found, before, gradient = update.to(DEVICE), update.to("cpu"), gradient_of(update, 2, dtype)
    there = gradient.to(DEVICE, copy=True)
    trial(found, there, 2, "triton")
    update.step(gradient, 2, "reference")
    assert_same_bits(found.parameter.cpu(), update.parameter)
    assert_same_bits(there.cpu(), before.parameter)
    found.parameter = there
    assert_same(found, before)


@pytest.mark.parametrize("shape", [(), (1,), (255,), (257,), (2, 3, 171)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_trial_without_moments(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    update = Update.make(shape, dtype)
    found, before, gradient = update.to(DEVICE), update.parameter.clone(), gradient_of(update, 1, dtype)
    there = gradient.to(DEVICE, copy=True)
    adamw_probe_(found.parameter, there, None, None, step=1, backend="triton", **NUMBERS)
    update.step(gradient, 1, "reference")
    assert_same_bits(found.parameter.cpu(), update.parameter)
    assert_same_bits(there.cpu(), before)


@pytest.mark.parametrize("bits", [32, 8])
def test_strides_of_a_trial(bits: int) -> None:
    update = Update.make((40, 30), torch.float32, bits=bits)
    gradient = gradient_of(update, 1, torch.float32)
    found, before = update.to(DEVICE), update.parameter.clone()
    found.parameter = found.parameter.t().contiguous().t()
    there = gradient.t().contiguous().t().to(DEVICE)
    trial(found, there, 1, "triton")
    update.step(gradient, 1, "reference")
    assert_same_bits(found.parameter.cpu().contiguous(), update.parameter)
    assert_same_bits(there.cpu().contiguous(), before)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_trial_is_one_launch_that_writes_no_state(bits: int) -> None:
    update = Update.make((9, 256), torch.bfloat16, bits=bits, aged=True, scale="mask").to(DEVICE)
    with launch.recording() as launches:
        trial(update, torch.ones(9, 256, dtype=torch.bfloat16, device=DEVICE), 1, "triton")
    (one,) = launches
    moments = 2 * 4 * 9 * 256 if bits == 32 else 2 * 9 * (256 + 4)
    written = 2 * 2 * 9 * 256
    assert (one.bytes_written, one.bytes_read) == (written, written + moments + 4 * 9 * 256 + 9 * 32)


# ---- launches and the optimizer


@pytest.mark.parametrize("bits", [32, 8])
def test_an_update_is_one_launch_that_moves_every_byte_once(bits: int) -> None:
    update = Update.make((9, 256), torch.bfloat16, bits=bits, aged=True, scale="mask").to(DEVICE)
    with launch.recording() as launches:
        update.step(torch.ones(9, 256, dtype=torch.bfloat16, device=DEVICE), 1, "triton")
    (one,) = launches
    moments = 2 * 4 * 9 * 256 if bits == 32 else 2 * 9 * (256 + 4)
    written = 2 * 9 * 256 + moments + 4 * 9 * 256
    assert (one.bytes_written, one.bytes_read) == (written, written + 2 * 9 * 256 + 9 * 32)


@pytest.mark.parametrize("operation", ["adamw", "adamw_8bit"])
def test_nothing_is_launched_for_nothing(operation: str) -> None:
    update = Update.make((0, 5), torch.float32, bits=8 if operation == "adamw_8bit" else 32).to(DEVICE)
    assert launched(lambda: update.step(torch.ones(0, 5, device=DEVICE), 1, "triton")) == []


def test_the_optimizer_takes_it_by_itself() -> None:
    large, small = (torch.nn.Parameter(torch.ones(rows, 256, device=DEVICE)) for rows in (16, 2))
    optimizer = AdamW8bit([large, small], lr=0.1)
    large.grad, small.grad = torch.ones_like(large), torch.ones_like(small)
    assert launched(optimizer.step) == [("adamw_8bit_kernel", 15 * 4096), ("adamw_kernel", 15 * 512)]
