"""DoRA's layer is its formula over a dense weight, which never exists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from peftkern.formats import QuantizedTensor
from peftkern.ops import dequantize, dora_linear, quantize
from peftkern.ops.dequantize import row_blocks
from peftkern.ops.dora_linear import row_squares

TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
SCALING = 1.5
FORMATS = ("dense", "nf4", "fp4", "int8", "int8_blockwise")


def error(actual: Tensor, expected: Tensor) -> float:
    difference = torch.linalg.vector_norm(actual.double() - expected.double())
    return (difference / torch.linalg.vector_norm(expected.double())).item()


def weight_of(format: str, rows: int, columns: int, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """The weight, and its values in float64."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    if format == "dense":
        return values, values.double()
    packed = quantize(values.float(), format, 64, format == "nf4")
    return packed, dequantize(packed, torch.float32).double()


def problem(dtype: torch.dtype, rows: int = 24, columns: int = 64, rank: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"x": (2, 5, columns), "lora_A": (rank, columns), "lora_B": (rows, rank), "bias": (rows,)}
    parts = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    parts["lora_A"] /= 8
    # away from the norms, so that both matter, and a row of length 0
    parts["magnitude"] = torch.rand(rows, generator=generator).to(dtype) * 10
    parts["magnitude"][3] = 0.0
    return {name: value.requires_grad_() for name, value in parts.items()}


def formula(weight: Tensor, parts: dict[str, Tensor], mask: Tensor | None = None) -> Tensor:
    x, lora_A, lora_B, magnitude = (parts[name].double() for name in ("x", "lora_A", "lora_B", "magnitude"))
    turned = weight + SCALING * (lora_B @ lora_A)
    scale = magnitude / turned.norm(dim=1).detach()
    dropped = x if mask is None else x * mask.double()
    y = scale * (dropped @ turned.t()) + (x - dropped) @ weight.t()
    return y + parts["bias"].double()


def call(weight: Any, parts: dict[str, Tensor], **options: Any) -> Tensor:
    names = ("x", "lora_A", "lora_B", "magnitude")
    x, *rest = (parts[name] for name in names)
    return dora_linear(x, weight, *rest, SCALING, parts["bias"], **options)


def gradients(y: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return dict(zip(parts, torch.autograd.grad(y, list(parts.values()), upstream), strict=True))


def assert_formula(weight: Any, values: Tensor, parts: dict[str, Tensor], tolerance: float) -> None:
    y = call(weight, parts)
    expected = formula(values, parts)
    assert y.dtype == parts["x"].dtype
    assert error(y, expected) <= tolerance
    ours, theirs = gradients(y, parts), gradients(expected, parts)
    for name, gradient in ours.items():
        assert error(gradient, theirs[name]) <= tolerance, name


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("format", FORMATS)
def test_result_and_gradients_are_the_formulas(format: str, dtype: torch.dtype) -> None:
    weight, values = weight_of(format, 24, 64, dtype)
    # what a quantized row is as long as follows from its numbers in float32
    tolerance = max(TOLERANCES[dtype], 0.0 if format == "dense" else 1e-7)
    assert_formula(weight, values, problem(dtype), tolerance)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_that_are_no_whole_blocks(format: str) -> None:
    weight, values = weight_of(format, 7, 50, torch.float32)
    assert_formula(weight, values, problem(torch.float32, 7, 50, 3), TOLERANCES[torch.float32])


@pytest.mark.parametrize("format", ["dense", "nf4"])
def test_gradcheck(format: str) -> None:
    weight, _ = weight_of(format, 5, 64, torch.float64)
    parts = {name: value.detach().double() for name, value in problem(torch.float64, 5, 64, 2).items()}
    # of the norms there is no gradient: where only what they do not depend on moves, numbers and formula agree
    fixed, moved = ("lora_A", "lora_B"), ("x", "magnitude", "bias")
    inputs = [parts[name].requires_grad_() for name in moved]

    def function(*values: Tensor) -> Tensor:
        return call(weight, {**{name: parts[name] for name in fixed}, **dict(zip(moved, values, strict=True))})

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("format", ["dense", "nf4"])
def test_dropout_is_in_front_of_weight_and_adapter_alike(format: str) -> None:
    weight, values = weight_of(format, 24, 64, torch.float32)
    parts = problem(torch.float32)
    torch.manual_seed(7)
    y = call(weight, parts, dropout_p=0.4)
    torch.manual_seed(7)
    mask = functional.dropout(torch.ones_like(parts["x"]), 0.4)
    expected = formula(values, parts, mask)
    assert error(y, expected) <= 5e-6
    ours, theirs = gradients(y, parts), gradients(expected, parts)
    for name, gradient in ours.items():
        assert error(gradient, theirs[name]) <= 5e-6, name


@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_measured_a_few_at_a_time(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, values = weight_of(format, 24, 64, torch.float32)
    expected = values.square().sum(1)
    at_once = []

    def decode(tensor: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        at_once.append(tensor.shape[0])
        return dequantize(tensor, dtype)

    monkeypatch.setitem(row_squares.__globals__, "_DECODED_AT_ONCE", 5 * 64)
    monkeypatch.setitem(row_blocks.__globals__, "dequantize", decode)
    assert error(row_squares(weight), expected) <= 1e-6
    assert at_once == ([] if format == "dense" else [5, 5, 5, 5, 4])


def test_kept_squares_are_used() -> None:
    weight, _ = weight_of("nf4", 24, 64, torch.float32)
    parts = problem(torch.float32)
    assert torch.equal(call(weight, parts, squares=row_squares(weight)), call(weight, parts))
    assert not torch.equal(call(weight, parts, squares=2 * row_squares(weight)), call(weight, parts))


def test_under_autocast_small_changes_of_the_magnitude_count() -> None:
    weight, _ = weight_of("nf4", 24, 64, torch.float32)
    parts = {name: value.detach() for name, value in problem(torch.float32).items()}
    moved = {**parts, "magnitude": parts["magnitude"] * (1 + 2**-9), "bias": torch.zeros_like(parts["bias"])}
    parts["bias"] = moved["bias"]
    with torch.autocast("cpu", torch.bfloat16):
        before, after = call(weight, parts), call(weight, moved)
    assert before.dtype == torch.bfloat16
    # bfloat16 knows no 1 + 2⁻⁹; the products that are rounded upwards show it
    assert after.double().norm() / before.double().norm() == pytest.approx(1 + 2**-9, rel=2**-11)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"magnitude": torch.ones(5)}, ValueError, r"magnitude must be \[out\] = \[24\], got \[5\]"),
        ({"magnitude": torch.ones(24, dtype=torch.int64)}, TypeError, "magnitude must be a floating-point tensor"),
        ({"magnitude": 1.0}, TypeError, "magnitude must be a floating-point tensor, got float"),
        ({"lora_A": torch.ones(4, 63)}, ValueError, "lora_A must be"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    weight, _ = weight_of("nf4", 24, 64, torch.float32)
    with pytest.raises(kind, match=message):
        call(weight, {**problem(torch.float32), **change})


def test_no_dense_weight_is_made() -> None:
    """The largest tensor of a call is the activations', where the weight is far larger."""
    weight, _ = weight_of("nf4", 512, 256, torch.float32)
    parts = problem(torch.float32, 512, 256)
    squares = row_squares(weight)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(leaf.numel() for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, Tensor))
            return out

    with Sizes():
        call(weight, parts, squares=squares).sum().backward()
    assert max(sizes) <= 10 * 512
    assert weight.shape.numel() > 20 * max(sizes)
