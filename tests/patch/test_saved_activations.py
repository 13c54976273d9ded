"""Activations kept in fewer bits: what is converted, the memory that it takes, and the error of the gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from patch_models import error, llama, lora, text
from torch import Tensor

from peftkern.nn.saved_activations import FORMS, _Kept, saved_activations
from peftkern.patch import patch

ERRORS = {"int8": 2.5e-2, "float16": 2e-3, "cpu": 0.0}
"""Relative error of a gradient; measured 1.8e-2 and 6e-4, the worst of all parameters."""


def adapted(recompute: str | None = None) -> Any:
    model = lora(llama("nf4"), r=4)
    patch(model, recompute=recompute)
    return model


def gradients(model: Any, form: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    batch = text(4, 32)
    if form is None:
        loss = model(**batch).loss
    else:
        with saved_activations(model, form):
            loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


@pytest.mark.parametrize("recompute", [None, "mlp"])
@pytest.mark.parametrize("form", FORMS)
def test_the_loss_is_exact_and_gradients_are_near(form: str, recompute: str | None) -> None:
    model = adapted(recompute)
    exact_loss, exact = gradients(model)
    loss, found = gradients(model, form)
    assert torch.equal(loss, exact_loss)
    assert found.keys() == exact.keys()
    errors = {name: error(found[name], gradient) for name, gradient in exact.items()}
    assert max(errors.values()) <= ERRORS[form], errors
    assert (max(errors.values()) > 0) == (form != "cpu")


def kept_bytes(form: str, x: Tensor, *others: Tensor) -> int:
    """Of what two products of one x keep."""
    kept: dict[int, int] = {}
    with saved_activations(torch.nn.Module(), form):  # type: ignore[arg-type]
        y = x.exp() + x.sin()
    node = y.grad_fn
    assert node is not None
    for function, _ in node.next_functions:
        for name in ("_raw_saved_result", "_raw_saved_self"):
            raw = getattr(function, name, None)
            data = None if raw is None else raw.data
            if isinstance(data, _Kept):
                value = data.value
                kept[id(data)] = value.nbytes
    return sum(kept.values())


@pytest.mark.parametrize(("form", "share"), [("int8", 0.26), ("float16", 0.5)])
def test_memory_is_a_part(form: str, share: float) -> None:
    x = torch.randn(64, 128, requires_grad=True) * 1.0
    assert 0 < kept_bytes(form, x) <= 2 * share * x.nbytes


def test_what_two_keep_is_converted_once() -> None:
    x = torch.randn(64, 128, requires_grad=True) * 1.0
    kept: list[Any] = []
    with saved_activations(torch.nn.Module(), "int8"):
        y = x.sin() + x.cos()
    for function, _ in y.grad_fn.next_functions:
        kept.append(function._raw_saved_self.data)
    assert isinstance(kept[0], _Kept) and kept[0] is kept[1]


def test_changed_memory_is_converted_again() -> None:
    weight = torch.randn(64, 128, requires_grad=True)
    x = torch.randn(64, 128)
    with saved_activations(torch.nn.Module(), "float16"):
        first = weight * x
        x.add_(1)
        second = weight * x
    (gradient,) = torch.autograd.grad(second.sum(), weight)
    assert torch.equal(gradient, x.half().float())
    (gradient,) = torch.autograd.grad(first.sum(), weight)
    assert torch.equal(gradient, (x - 1).half().float()) or error(gradient, x - 1) <= 1e-3


def test_parameters_small_tensors_and_integers_stay() -> None:
    layer = torch.nn.Linear(128, 64)
    small = torch.randn(3, 5, requires_grad=True)
    with saved_activations(layer, "int8"):
        y = layer(torch.randn(64, 128, requires_grad=True))
        z = small.exp()
    assert isinstance(z.grad_fn._raw_saved_result.data, Tensor)
    assert isinstance(y.grad_fn._raw_saved_mat2.data, Tensor)
    assert isinstance(y.grad_fn._raw_saved_mat1.data, _Kept)


def test_bad_form() -> None:
    with (
        pytest.raises(ValueError, match="form must be one of int8, float16, cpu; got 'fp4'"),
        saved_activations(
            torch.nn.Module(),
            "fp4",  # type: ignore[arg-type]
        ),
    ):
        pass
