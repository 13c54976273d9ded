"""Row ranges of a weight that train in place: the gradient of their rows alone, nothing for the others."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftkern.nn import QuantizedLinear
from peftkern.nn.row_sliced_linear import slice_rows, unslice

RANGES = [(0, 3), (5, 6), (6, 11)]
TOLERANCE = 5e-6


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(7, 11)


def conv1d() -> Conv1D:
    torch.manual_seed(0)
    layer = Conv1D(11, 7)
    nn.init.normal_(layer.bias)
    return layer


class Experts(nn.Module):
    """Three experts in one parameter, of which a call uses two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Parameter(torch.randn(3, 4, 7))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.experts[0]) + nn.functional.linear(x, self.experts[2])


MAKERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "linear": (linear, "weight"),
    "conv1d": (conv1d, "weight"),
    "experts": (Experts, "experts"),
}


@pytest.fixture(params=MAKERS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, str]:
    """A dense module, its twin with slices, and the name of the parameter."""
    maker, name = MAKERS[request.param]
    dense, sliced = maker(), maker()
    slice_rows(sliced, name, RANGES)
    return dense, sliced, name


def rows(module: nn.Module, tensor: Tensor, begin: int, end: int) -> Tensor:
    if isinstance(module, Conv1D) and tensor.dim() == 2:
        return tensor[:, begin:end]
    return tensor.reshape(-1, tensor.shape[-1])[begin:end] if tensor.dim() > 1 else tensor[begin:end]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 5, 7, generator=generator), torch.randn(2, 5, 11, generator=generator)


def backward(module: nn.Module) -> tuple[Tensor, Tensor]:
    x, grad = batch()
    x.requires_grad_()
    y = module(x)
    y.backward(grad[..., : y.shape[-1]])
    assert x.grad is not None
    return y.detach(), x.grad


def test_output_and_every_gradient_are_those_of_the_dense_layer(pair: tuple[nn.Module, nn.Module, str]) -> None:
    dense, sliced, _ = pair
    for expected, actual in zip(backward(dense), backward(sliced), strict=True):
        assert torch.equal(expected, actual)
    for name, whole in dense.named_parameters():
        assert whole.grad is not None
        for begin, end in RANGES:
            part = sliced.get_parameter(f"{name}_rows_{begin}_{end}").grad
            assert part is not None
            torch.testing.assert_close(part, rows(dense, whole.grad, begin, end), rtol=TOLERANCE, atol=TOLERANCE)
        assert sliced._parameters[name].grad is None  # type: ignore[union-attr]


def test_an_optimizer_moves_the_rows_in_the_weight_and_no_others(pair: tuple[nn.Module, nn.Module, str]) -> None:
    dense, sliced, name = pair
    before = sliced._parameters[name].detach().clone()  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW([p for p in sliced.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        backward(sliced)
        optimizer.step()
        optimizer.zero_grad()
    changed = sliced._parameters[name] != before
    used = torch.zeros_like(changed)
    for begin, end in RANGES:
        rows(dense, used, begin, end).fill_(True)
    assert torch.equal(changed, used)


def test_a_range_that_asks_for_no_gradient_gets_none(pair: tuple[nn.Module, nn.Module, str]) -> None:
    _, sliced, name = pair
    frozen = sliced.get_parameter(f"{name}_rows_0_3").requires_grad_(False)
    backward(sliced)
    assert frozen.grad is None
    assert sliced.get_parameter(f"{name}_rows_5_6").grad is not None


def test_gradients_do_not_share_the_memory_of_a_whole_one(pair: tuple[nn.Module, nn.Module, str]) -> None:
    _, sliced, _ = pair
    backward(sliced)
    for parameter in sliced.parameters():
        if parameter.grad is not None:
            assert parameter.grad.untyped_storage().nbytes() == parameter.grad.nbytes


def test_state_dict_has_the_keys_of_the_plain_layer(pair: tuple[nn.Module, nn.Module, str]) -> None:
    dense, sliced, name = pair
    assert sliced.state_dict().keys() == dense.state_dict().keys()
    other = {key: torch.randn_like(value) for key, value in dense.state_dict().items()}
    for assign in (False, True):
        sliced.load_state_dict(other, assign=assign)
        view = sliced.get_parameter(f"{name}_rows_5_6")
        assert torch.equal(view, rows(dense, other[name], 5, 6))
        with torch.no_grad():
            view.fill_(3.0)
        assert bool((rows(dense, sliced.state_dict()[name], 5, 6) == 3.0).all())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.double()])
def test_slices_stay_views_in_copies_and_after_casts(
    pair: tuple[nn.Module, nn.Module, str], copied: Callable[[nn.Module], nn.Module]
) -> None:
    _, sliced, name = pair
    twin = copied(sliced)
    with torch.no_grad():
        twin.get_parameter(f"{name}_rows_0_3").zero_()
    assert bool((rows(twin, twin.state_dict()[name], 0, 3) == 0).all())


def test_torch_save_round_trip() -> None:
    layer = linear()
    slice_rows(layer, "weight", RANGES)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(batch()[0]), layer(batch()[0]))


def test_unslice_gives_the_plain_layer_back_with_what_was_trained(pair: tuple[nn.Module, nn.Module, str]) -> None:
    dense, sliced, name = pair
    with torch.no_grad():
        sliced.get_parameter(f"{name}_rows_5_6").fill_(2.0)
    unslice(sliced)
    assert type(sliced) is type(dense)
    assert dict(sliced.named_parameters()).keys() == dict(dense.named_parameters()).keys()
    assert all(parameter.requires_grad for parameter in sliced.parameters())
    assert bool((rows(dense, sliced.get_parameter(name), 5, 6) == 2.0).all())
    with pytest.raises(ValueError, match="no sliced parameter"):
        unslice(sliced)


def test_slicing_again_keeps_the_parameters_that_an_optimizer_holds() -> None:
    layer = linear()
    first = slice_rows(layer, "weight", RANGES)
    assert [[id(p) for p in parts] for parts in slice_rows(layer, "weight", RANGES)] == [
        [id(p) for p in parts] for parts in first
    ]


def test_autocast_and_checkpointing() -> None:
    layer = linear()
    slice_rows(layer, "weight", RANGES)
    x, grad = batch()
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert y.dtype == torch.bfloat16
    y.backward(grad.to(torch.bfloat16))
    part = layer.get_parameter("weight_rows_0_3").grad
    assert part is not None and part.dtype == torch.float32
    expected = grad[..., :3].reshape(-1, 3).t().double() @ x.reshape(-1, 7).double()
    assert float((part.double() - expected).norm() / expected.norm()) <= 8e-3


def test_without_gradients_it_is_the_plain_layer() -> None:
    layer = linear()
    slice_rows(layer, "weight", RANGES)
    with torch.no_grad():
        assert layer(batch()[0]).grad_fn is None


class Scaled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "ranges", "error", "message"),
    [
        (linear(), [(3, 2)], ValueError, "ascend"),
        (linear(), [(0, 4), (3, 5)], ValueError, "overlap"),
        (linear(), [(0, 12)], ValueError, "within 0 and 11"),
        (Scaled(7, 11), [(0, 1)], TypeError, "computes something of its own"),
        (QuantizedLinear.from_linear(nn.Linear(64, 11)), [(0, 1)], TypeError, "only dense ones train"),
    ],
)
def test_what_cannot_be_sliced_is_an_error_and_changes_nothing(
    layer: nn.Module, ranges: Any, error: type[Exception], message: str
) -> None:
    before = type(layer)
    with pytest.raises(error, match=message):
        slice_rows(layer, "weight", ranges)
    assert type(layer) is before
    assert "_peftkern_rows" not in layer.__dict__
