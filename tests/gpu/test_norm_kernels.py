"""Norms of rows on the device, against float64."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DEVICE
from torch import Tensor

from peftkern.backends import registry
from peftkern.ops.norm import NormForm, norm_backward_reference, norm_reference

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}
SHAPES = [(1, 3), (3, 17), (65, 96), (0, 5)]
FORMS = {
    "llama": NormForm(1e-5, round_before_weight=True),
    "gemma": NormForm(1e-5, weight_offset=1.0),
    "layer": NormForm(1e-5, centered=True),
}


def _close(result: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    assert result is not None and expected is not None
    error = (result.cpu().double() - expected).norm()
    assert error <= tolerance * expected.norm()  # false for NaN


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_forward_and_backward(form: str, dtype: torch.dtype, residual: bool) -> None:
    for shape in SHAPES:
        torch.manual_seed(0)
        x, other, grad, grad_total = (torch.randn(shape).to(dtype) for _ in range(4))
        weight, bias = (torch.randn(shape[-1]).to(dtype) for _ in range(2))
        bias_or_none = bias if form == "layer" else None
        given = (x, other if residual else None, weight, bias_or_none)
        on_device = [None if t is None else t.to(DEVICE) for t in given]
        y, total, mean, rstd = registry.run("norm", *on_device, FORMS[form], backend="triton")
        exact_total = x if not residual else x + other  # rounded once, as the kernel's
        expected = norm_reference(exact_total.double(), None, weight.double(), _double(bias_or_none), FORMS[form])
        _close(y, expected[0], TOLERANCE[dtype])
        assert (total is None) == (not residual) and (mean is None) == (form != "layer")
        if total is not None:
            assert torch.equal(total.cpu(), exact_total)
        arriving = (grad.to(DEVICE), grad_total.to(DEVICE) if residual else None)
        saved = (on_device[0] if total is None else total, on_device[2], mean, rstd)
        needs = (True, True, form == "layer")
        gradients = registry.run("norm_backward", *arriving, *saved, FORMS[form], *needs, backend="triton")
        exact = norm_backward_reference(
            grad.double(),
            grad_total.double() if residual else None,
            exact_total.double(),
            weight.double(),
            *expected[2:],
            FORMS[form],
            *needs,
        )
        for result, reference, need in zip(gradients, exact, needs, strict=True):
            if need:
                _close(result, reference, TOLERANCE[dtype])
            else:
                assert result is None


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def test_rows_with_a_stride_and_a_frozen_weight() -> None:
    torch.manual_seed(1)
    wide = torch.randn(5, 50).to(DEVICE)
    x = wide[:, 3:43]
    form = FORMS["llama"]
    y, _, _, rstd = registry.run("norm", x, None, None, None, form, backend="triton")
    _close(y, norm_reference(x.cpu().double(), None, None, None, form)[0], 5e-6)
    grad_x, *others = registry.run(
        "norm_backward", wide[:, :40], None, x, None, None, rstd, form, True, False, False, backend="triton"
    )
    assert others == [None, None]
    exact, grad = x.cpu().double(), wide[:, :40].cpu().double()
    _close(
        grad_x,
        norm_backward_reference(grad, None, exact, None, None, rstd.cpu().double(), form, True, False, False)[0],
        5e-6,
    )
