"""The optimizers: PyTorch's AdamW where nothing is masked, what masks keep, and state that moves with its entries."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from isa_backends import ISA_BACKENDS, select
from same_bits import DTYPES, assert_same_bits, random_tensor
from torch import Tensor, nn

from peftkern.backends import registry
from peftkern.formats import BitMask, random_mask
from peftkern.ops.adamw import dequantize_moment
from peftkern.optim import AdamW, AdamW8bit, seeded_moments

BETAS = (0.9, 0.999)
OPTIMIZERS = [AdamW, AdamW8bit]
SHAPE = (24, 300)  # large enough for moments of 8 bits


@pytest.fixture(params=ISA_BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, select(request.param, monkeypatch))


def parameter(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(random_tensor(shape, dtype, seed))


def train(optimizer: torch.optim.Optimizer, weight: nn.Parameter, steps: range, rows: Tensor | None = None) -> None:
    """Steps with the gradients of these seeds; those of ``rows`` where the weight has only some of them."""
    for seed in steps:
        whole = random_tensor(SHAPE if rows is not None else tuple(weight.shape), weight.dtype, 1000 + seed)
        weight.grad = whole if rows is None else whole[rows]
        optimizer.step()


def moments_of(optimizer: AdamW, weight: nn.Parameter) -> list[Tensor]:
    return [moment.clone() for moment in optimizer._moments(optimizer.state[weight])]


# ---- unmasked


def test_steps_are_those_of_torch() -> None:
    weight, twin = parameter(), nn.Parameter(random_tensor(SHAPE, torch.float32).double())
    numbers: dict[str, Any] = {"lr": 1e-2, "betas": BETAS, "eps": 1e-8, "weight_decay": 0.1}
    optimizer, peer = AdamW([weight], **numbers), torch.optim.AdamW([twin], **numbers)
    for step in range(20):
        weight.grad = random_tensor(SHAPE, torch.float32, step)
        twin.grad = weight.grad.double()
        optimizer.step()
        peer.step()
    assert float((weight - twin).detach().abs().max()) < 3e-6  # 20 roundings of values up to 4


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_parameter_without_a_gradient_stays(kind: type[AdamW]) -> None:
    weight = parameter()
    optimizer = kind([weight])
    optimizer.step()
    assert_same_bits(weight.detach(), parameter().detach())
    assert not optimizer.state[weight]


def test_small_parameters_have_float32_moments_in_the_8_bit_optimizer() -> None:
    small, large = parameter((7, 9)), parameter()
    optimizer, exact = AdamW8bit([small, large]), AdamW([copy.deepcopy(small)])
    train(optimizer, small, range(3))
    train(optimizer, large, range(1))
    twin = exact.param_groups[0]["params"][0]
    train(exact, twin, range(4))
    assert "exp_avg" in optimizer.state[small] and optimizer.state[large]["state1"].dtype == torch.uint8
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32


# ---- masks and scales


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_masked_entries_stay_with_decay_and_momentum_from_before_the_mask(
    kind: type[AdamW], dtype: torch.dtype
) -> None:
    weight = parameter(dtype=dtype)
    optimizer = kind([weight], lr=1e-2, weight_decay=0.1)
    train(optimizer, weight, range(5))
    assert all(bool(moment.any()) for moment in moments_of(optimizer, weight))
    mask = random_mask(SHAPE, 0.2, seed=1)
    frozen = ~mask.mask()
    before = weight.detach().clone()
    optimizer.set_scale(weight, mask)
    train(optimizer, weight, range(5, 35))
    assert_same_bits(weight.detach()[frozen], before[frozen])
    assert bool((weight.detach() != before)[~frozen].any())


def test_masking_the_gradient_instead_lets_decay_and_momentum_move_the_rest() -> None:
    """What the update's mask is for: the same run with PyTorch's optimizer and a masked gradient moves every entry."""
    weight = parameter()
    optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1)
    train(optimizer, weight, range(5))
    frozen, before = ~random_mask(SHAPE, 0.2, seed=1).mask(), weight.detach().clone()
    weight.grad = random_tensor(SHAPE, torch.float32, 9).masked_fill(frozen, 0.0)
    optimizer.step()
    assert bool((weight.detach() != before)[frozen].all())


def test_a_masked_dense_update_is_the_update_of_the_kept_entries_alone() -> None:
    mask = random_mask(SHAPE, 0.2, seed=1)
    kept = mask.mask()
    dense = parameter()
    sparse = nn.Parameter(dense.detach()[kept])
    of_dense, of_sparse = AdamW([dense], weight_decay=0.1), AdamW([sparse], weight_decay=0.1)
    of_dense.set_scale(dense, mask)
    for step in range(20):
        dense.grad = random_tensor(SHAPE, torch.float32, step)
        sparse.grad = dense.grad[kept]
        of_dense.step()
        of_sparse.step()
    assert_same_bits(dense.detach()[kept], sparse.detach())


def test_rows_of_scale_zero_never_move_and_others_in_proportion() -> None:
    weight, plain, start = parameter(), parameter(), parameter().detach()
    optimizer, other = AdamW([weight], eps=0.0), AdamW([plain], eps=0.0)
    optimizer.set_scale(weight, torch.tensor([0.0, 0.25, 1.0] * 8))
    train(optimizer, weight, range(1))
    train(other, plain, range(1))
    moved, whole = weight.detach() - start, plain.detach() - start
    assert_same_bits(weight.detach()[0::3], start[0::3])
    assert torch.allclose(moved[1::3], whole[1::3] / 4, rtol=1e-3, atol=2e-7)
    assert_same_bits(weight.detach()[2::3], plain.detach()[2::3])


def test_scaling_the_gradient_is_no_step_smaller_where_scaling_the_update_is() -> None:
    weights = [parameter() for _ in range(3)]
    optimizers = [AdamW([weight], eps=0.0, weight_decay=0.0) for weight in weights]
    optimizers[2].set_scale(weights[2], 0.5)
    for step in range(30):
        for weight, factor in zip(weights, (1.0, 0.5, 1.0), strict=True):
            weight.grad = random_tensor(SHAPE, torch.float32, step) * factor
        for optimizer in optimizers:
            optimizer.step()
    plain, scaled_gradient, scaled_update = (weight.detach() - parameter().detach() for weight in weights)
    assert float((scaled_gradient - plain).abs().max()) == 0.0
    assert torch.allclose(scaled_update, plain / 2, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("scale", [0.5, torch.linspace(0, 1, 24), random_mask(SHAPE, 0.5, seed=1), None])
def test_a_scale_is_part_of_the_state(scale: Any) -> None:
    weight, twin = parameter(), parameter()
    optimizer = AdamW([weight])
    optimizer.set_scale(weight, scale)
    train(optimizer, weight, range(2))
    resumed = AdamW([twin])
    twin.data.copy_(weight.detach())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, weight, range(2, 4))
    train(resumed, twin, range(2, 4))
    assert_same_bits(weight.detach(), twin.detach())


# ---- moving entries


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_rows_move_with_their_index(kind: type[AdamW]) -> None:
    weight = parameter()
    optimizer = kind([weight])
    train(optimizer, weight, range(3))
    order = torch.randperm(SHAPE[0], generator=torch.Generator().manual_seed(0))
    before = moments_of(optimizer, weight)
    weight.data.copy_(weight.detach()[order])
    optimizer.reindex(weight, order)
    for moment, old in zip(moments_of(optimizer, weight), before, strict=True):
        bound = 0.008 * float(old.abs().max()) if kind is AdamW8bit else 0.0  # 8-bit blocks are rounded anew
        assert float((moment - old[order]).abs().max()) <= bound
    assert bool((optimizer.state[weight]["age"] == 3).all())


def test_training_on_after_a_permutation_is_the_permuted_training() -> None:
    weight, moved = parameter(), parameter()
    optimizer, other = AdamW([weight], weight_decay=0.1), AdamW([moved], weight_decay=0.1)
    train(optimizer, weight, range(3))
    train(other, moved, range(3))
    order = torch.randperm(SHAPE[0], generator=torch.Generator().manual_seed(0))
    moved.data.copy_(moved.detach()[order])
    other.reindex(moved, order)
    train(optimizer, weight, range(3, 6))
    train(other, moved, range(3, 6), rows=order)
    assert_same_bits(moved.detach(), weight.detach()[order])


def test_newcomers_begin_where_others_go_on() -> None:
    weight, fresh = parameter((6,)), nn.Parameter(torch.zeros(2))
    optimizer, other = AdamW([weight]), AdamW([fresh])
    train(optimizer, weight, range(4))
    source = torch.tensor([5, -1, 0, 2, -1, 1])
    weight.data.copy_(torch.where(source < 0, 0.0, weight.detach()[source]))
    kept = optimizer.state[weight]["exp_avg"].clone()
    optimizer.reindex(weight, source)
    state = optimizer.state[weight]
    assert state["age"].tolist() == [4, 0, 4, 4, 0, 4]
    assert torch.equal(state["exp_avg"], torch.where(source < 0, 0.0, kept[source]))
    weight.grad = torch.arange(1.0, 7.0)
    fresh.grad = torch.tensor([2.0, 5.0])
    optimizer.step()
    other.step()
    assert_same_bits(weight.detach()[source < 0], fresh.detach())
    assert state["age"].tolist() == [5, 1, 5, 5, 1, 5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_ages_advance_for_every_dtype(kind: type[AdamW], dtype: torch.dtype) -> None:
    weight = parameter(dtype=dtype)
    optimizer = kind([weight])
    optimizer.reindex(weight, torch.full(SHAPE[:1], -1))
    for step in (1, 2):
        train(optimizer, weight, range(1))
        assert bool((optimizer.state[weight]["age"] == step).all())


def test_seeded_moments_are_the_plain_means_after_bias_correction() -> None:
    gradients = torch.stack([random_tensor((50,), torch.float32, seed) for seed in range(5)])
    mean, mean_square = gradients.mean(0), (gradients**2).mean(0)
    for age in (1, 5, 40):
        first, second = seeded_moments(mean, mean_square, age, BETAS)
        assert torch.allclose(first / (1 - BETAS[0] ** age), mean, rtol=1e-6)
        assert torch.allclose(second / (1 - BETAS[1] ** age), mean_square, rtol=1e-6)
    ages = torch.randint(1, 40, (50,), dtype=torch.int32)
    first, second = seeded_moments(mean, mean_square, ages, BETAS)
    assert torch.allclose(first / (1 - BETAS[0] ** ages.double()).float(), mean, rtol=1e-6)
    assert torch.allclose(second / (1 - BETAS[1] ** ages.double()).float(), mean_square, rtol=1e-6)


def test_a_seeded_newcomer_steps_as_if_it_had_been_trained_with_its_mean_gradient() -> None:
    mean, age = torch.tensor([0.5, -2.0]), 5
    trained, seeded = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer, other = AdamW([trained], weight_decay=0.0), AdamW([seeded], weight_decay=0.0)
    for _ in range(age):
        trained.grad = mean.clone()
        optimizer.step()
    ages = torch.full((2,), age, dtype=torch.int32)
    other.reindex(seeded, torch.tensor([-1, -1]), seeded_moments(mean, mean**2, age, BETAS), ages)
    start = trained.detach().clone()
    trained.grad, seeded.grad = mean.clone(), mean.clone()
    optimizer.step()
    other.step()
    assert torch.allclose(seeded.detach(), trained.detach() - start, rtol=1e-4)
    assert other.state[seeded]["age"].tolist() == [6, 6]


def _reindex(source: Any, **more: Any) -> Callable[[AdamW, nn.Parameter], None]:
    return lambda optimizer, weight: optimizer.reindex(weight, source, **more)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (_reindex(torch.zeros(6)), TypeError, "source must be int64"),
        (_reindex(torch.tensor([0, 1])), ValueError, r"source must be \[6\]"),
        (_reindex(torch.tensor([0, 1, 2, 3, 4, 6])), ValueError, "within -1 and 5, got 0 to 6"),
        (_reindex(torch.tensor([0, 0, 2, 3, 4, 5])), ValueError, "names a row twice"),
        (_reindex(torch.tensor([-1, 0, 2, 3, 4, 5]), age=torch.ones(1)), TypeError, "age must be torch.int32"),
        (
            _reindex(torch.tensor([-1, 0, 2, 3, 4, 5]), moments=(torch.ones(2), torch.ones(1))),
            ValueError,
            r"moments must be \[1\], the newcomers; got \[2\]",
        ),
        (lambda optimizer, _: optimizer.set_scale(nn.Parameter(torch.zeros(6)), 1.0), ValueError, "optimizer trains"),
        (lambda optimizer, weight: optimizer.set_scale(weight, torch.full((6,), -1.0)), ValueError, "got -1.0 to -1.0"),
        (lambda optimizer, weight: optimizer.set_scale(weight, float("inf")), ValueError, "got inf"),
    ],
)
def test_a_refused_call_leaves_the_state(call: Any, error: type[Exception], message: str) -> None:
    weight = parameter((6,))
    optimizer = AdamW([weight])
    optimizer.set_scale(weight, 0.5)
    train(optimizer, weight, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=message):
        call(optimizer, weight)
    after = optimizer.state_dict()
    assert after["state"][0].keys() == before["state"][0].keys()
    for name, value in before["state"][0].items():
        assert torch.equal(torch.as_tensor(after["state"][0][name]), torch.as_tensor(value)), name


def test_rows_cannot_move_under_a_scale_for_each_row() -> None:
    weight = parameter()
    optimizer = AdamW([weight])
    for scale in (torch.ones(24), random_mask(SHAPE, 0.5, seed=0)):
        optimizer.set_scale(weight, scale)
        with pytest.raises(ValueError, match="call set_scale"):
            optimizer.reindex(weight, torch.arange(24))


# ---- resuming


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resuming_is_going_on(kind: type[AdamW], dtype: torch.dtype) -> None:
    weight, twin = parameter(dtype=dtype), parameter(dtype=dtype)
    optimizer, resumed = kind([weight]), kind([twin])
    train(optimizer, weight, range(3))
    optimizer.reindex(weight, torch.arange(24).roll(1))
    train(optimizer, weight, range(3, 5))
    twin.data.copy_(weight.detach())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name, value in optimizer.state[weight].items():
        if isinstance(value, Tensor):
            assert_same_bits(resumed.state[twin][name], value)
    train(optimizer, weight, range(5, 8))
    train(resumed, twin, range(5, 8))
    assert_same_bits(weight.detach(), twin.detach())


def test_8_bit_moments_hold_a_quarter_of_the_memory() -> None:
    weight, exact = parameter((256, 1024)), parameter((256, 1024))
    small, large = AdamW8bit([weight]), AdamW([exact])
    train(small, weight, range(1))
    train(large, exact, range(1))
    used = [
        sum(v.nbytes for v in optimizer.state[p].values() if isinstance(v, Tensor))
        for optimizer, p in ((small, weight), (large, exact))
    ]
    assert used[1] == 8 * exact.numel()
    assert used[0] / used[1] < 0.2501 + 1 / 256
    first = dequantize_moment(small.state[weight]["state1"], small.state[weight]["absmax1"], signed=True)
    assert float((first - large.state[exact]["exp_avg"]).abs().max()) < 0.0071 * float(first.abs().max())


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"eps": float("nan")}, "eps must be at least 0, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
    ],
)
def test_numbers_out_of_range_are_refused(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW8bit([parameter()], **numbers)


def test_masks_of_another_shape_are_refused() -> None:
    weight = parameter()
    with pytest.raises(ValueError, match=r"scale must be a BitMask of \[24, 300\] on cpu"):
        AdamW([weight]).set_scale(weight, BitMask.from_mask(torch.ones(300, 24, dtype=torch.bool)))
