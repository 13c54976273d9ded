"""QuantizedLinear: the numbers of a dense layer with the dequantized weight, whatever is done to the module."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftkern.nn import QuantizedLinear
from peftkern.nn.packed_weight import PackedWeight
from peftkern.ops import dequantize, quantize

FORMATS = [
    ("nf4", False),
    ("nf4", True),
    ("fp4", True),
    ("int8", False),
    ("int8_blockwise", False),
    ("int8_blockwise", True),
]
SHAPES = [(64, 128), (1, 64), (33, 65), (7, 1), (96, 80)]


def make(shape: tuple[int, int] = (48, 96), format: str = "nf4", double_quant: bool = True, bias: bool = True) -> Any:
    torch.manual_seed(0)
    out_features, in_features = shape
    linear = nn.Linear(in_features, out_features, bias=bias)
    return linear, QuantizedLinear.from_linear(linear, format, 64, double_quant)


def relative_error(value: Tensor, reference: Tensor) -> float:
    error = ((value.double() - reference.double()).norm() / reference.double().norm()).item()
    assert error == error
    return error


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("format", "double_quant"), FORMATS)
def test_forward_and_gradient_are_those_of_the_dequantized_weight(
    format: str, double_quant: bool, shape: tuple[int, int]
) -> None:
    linear, module = make(shape, format, double_quant)
    x = torch.randn(2, 3, shape[1], requires_grad=True)
    dense = x.detach().double().requires_grad_()
    weight = dequantize(quantize(linear.weight.detach(), format, 64, double_quant), torch.float64)
    reference = dense @ weight.t() + linear.bias.detach().double()
    y = module(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    reference.backward(grad.double())
    assert relative_error(y, reference) <= 5e-6
    assert x.grad is not None and dense.grad is not None
    assert relative_error(x.grad, dense.grad) <= 5e-6
    assert relative_error(module.bias.grad, grad.sum((0, 1))) <= 5e-6


def test_weight_is_packed_frozen_and_small() -> None:
    _, module = make((64, 256))
    assert isinstance(module, nn.Linear)
    assert module.weight.dtype == torch.uint8 and tuple(module.weight.shape) == (64, 128)
    assert not module.weight.requires_grad and module.bias.requires_grad
    packed_bytes = sum(t.nbytes for t in [module.weight, *module.buffers()])
    assert packed_bytes < 64 * 256 * 4 / 7
    assert "format=nf4, block_size=64, double_quant=True" in repr(module)


def test_from_linear_keeps_bias_training_mode_and_dtype() -> None:
    linear = nn.Linear(64, 32, dtype=torch.bfloat16).eval()
    module = QuantizedLinear.from_linear(linear)
    assert module.bias is linear.bias and not module.training
    assert module.weight_dtype == torch.bfloat16 and module.dequantize().dtype == torch.bfloat16
    assert module.dequantize(torch.float32).dtype == torch.float32
    assert module(torch.randn(3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_convert_keeps_identity_hooks_and_bias() -> None:
    linear = nn.Linear(64, 32)
    calls: list[int] = []
    linear.register_forward_hook(lambda *_: calls.append(1))
    bias = linear.bias
    module = QuantizedLinear.convert_(linear, quantize(linear.weight.detach()))
    assert module is linear and module.bias is bias and type(linear) is QuantizedLinear
    module(torch.randn(2, 64))
    assert calls == [1]


def test_dequantize_in_place_gives_a_dense_frozen_layer_back() -> None:
    _, module = make()
    x, dense = torch.randn(4, 96), module.dequantize()
    expected = module(x)
    linear = module.dequantize_()
    assert linear is module and type(linear) is nn.Linear
    assert torch.equal(linear.weight, dense) and not linear.weight.requires_grad
    assert not list(linear.buffers()) and set(linear.state_dict()) == {"weight", "bias"}
    assert torch.allclose(linear(x), expected, atol=1e-5)


# ---- the view


def test_quantized_is_made_once_and_shares_memory() -> None:
    _, module = make()
    view = module.quantized
    assert module.quantized is view
    assert view.packed.data_ptr() == module.weight.data_ptr() and view.scales is module.scales
    view.validate()


def test_quantized_follows_every_replacement() -> None:
    _, module = make()
    _, other = make(bias=False)
    other.merge_(torch.full((48, 96), 0.5))
    expected = other.dequantize()
    x = torch.randn(2, 96)

    module.quantized  # noqa: B018 (fills the cache that must not survive)
    module.weight = PackedWeight(other.weight)
    module.scales, module.scales_absmax, module.scales_offset = other.scales, other.scales_absmax, other.scales_offset
    assert torch.equal(module.dequantize(), expected)

    _, module = make()
    module.quantized  # noqa: B018
    module.replace_(other.quantized)
    assert torch.equal(module.dequantize(), expected)

    _, module = make()
    module.quantized  # noqa: B018
    module.load_state_dict({**other.state_dict(), "bias": module.bias})
    assert torch.equal(module.dequantize(), expected)
    assert torch.allclose(module(x), x @ expected.t() + module.bias, atol=1e-5)


def test_quantized_follows_a_move_of_memory() -> None:
    _, module = make()
    before = module.quantized
    with module.weight.unlocked():
        module.weight.data = module.weight.data.clone()
    assert module.quantized is not before
    assert module.quantized.packed.data_ptr() == module.weight.data_ptr()


# ---- casting, moving, copying


@pytest.mark.parametrize("format,double_quant", FORMATS)
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16).float(),
        lambda m: m.type(torch.float16),
        lambda m: m.to("cpu", torch.float16),
    ],
    ids=["half", "bfloat16", "double", "there and back", "type", "device and dtype"],
)
def test_casts_leave_codes_and_scales_alone(cast: Any, format: str, double_quant: bool) -> None:
    _, module = make(format=format, double_quant=double_quant)
    expected, dtypes = module.dequantize(), [t.dtype for t in (module.weight, *module.buffers())]
    cast(module)
    assert torch.equal(module.dequantize(), expected)
    assert [t.dtype for t in (module.weight, *module.buffers())] == dtypes
    module.quantized.validate()


def test_a_cast_of_the_parent_casts_the_bias() -> None:
    _, module = make()
    parent = nn.Sequential(module, nn.Linear(48, 4))
    parent.to(torch.bfloat16)
    assert module.bias.dtype == torch.bfloat16
    assert parent(torch.randn(2, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("format,double_quant", FORMATS)
def test_copies_are_equal_and_independent(format: str, double_quant: bool) -> None:
    _, module = make(format=format, double_quant=double_quant)
    module.quantized  # noqa: B018 (a copied cache must not point to the original)
    expected = module.dequantize()
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)]
    module.merge_(torch.ones(48, 96))
    for clone in copies:
        assert torch.equal(clone.dequantize(), expected)
        assert type(clone.weight) is PackedWeight
        assert clone.quantized.packed.data_ptr() == clone.weight.data_ptr()


def test_meta_device() -> None:
    module = QuantizedLinear.empty(96, 48, double_quant=True, device="meta")
    assert all(t.is_meta for t in [*module.parameters(), *module.buffers()])
    assert set(module.state_dict()) == {"weight", "bias"}
    assert module(torch.empty(2, 96, device="meta")).shape == (2, 48)
    _, source = make()
    module.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(module.dequantize(), source.dequantize()) and not module.weight.is_meta

    module = QuantizedLinear.empty(96, 48, double_quant=True, device="meta").to_empty(device="cpu")
    module.load_state_dict(source.state_dict())
    assert torch.equal(module.dequantize(), source.dequantize())


def test_compiles_without_graph_breaks() -> None:
    _, module = make()
    x = torch.randn(3, 96, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert torch.allclose(y, module(x), atol=1e-5)
    y.sum().backward()
    assert torch.allclose(x.grad, module.dequantize().sum(0).expand(3, -1), atol=1e-4)  # type: ignore[arg-type]
    module.merge_(torch.ones(48, 96))
    assert torch.allclose(compiled(x), module(x), atol=1e-4)


# ---- state dict


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format,double_quant", FORMATS)
def test_state_dict_round_trip(format: str, double_quant: bool, shape: tuple[int, int]) -> None:
    _, module = make(shape, format, double_quant)
    empty = QuantizedLinear.empty(shape[1], shape[0], format=format, double_quant=double_quant, dtype=torch.float32)
    assert empty.load_state_dict(module.state_dict()) == ([], [])
    assert torch.equal(empty.dequantize(), module.dequantize()) and torch.equal(empty.bias, module.bias)
    assert empty.weight.data_ptr() != module.weight.data_ptr()


def test_loading_into_another_format_takes_the_checkpoint_format() -> None:
    _, source = make(format="fp4", double_quant=False)
    _, module = make(format="int8", double_quant=False)
    module.load_state_dict(source.state_dict())
    assert module.format == "fp4" and module.block_size == 64
    assert torch.equal(module.dequantize(), source.dequantize())
    assert module.weight.data_ptr() != source.weight.data_ptr()


def test_loading_the_same_layout_keeps_the_parameter() -> None:
    _, source = make()
    source.merge_(torch.ones(48, 96))
    _, module = make()
    weight, scales = module.weight, module.scales
    module.load_state_dict(source.state_dict())
    assert module.weight is weight and module.scales is scales
    assert torch.equal(module.dequantize(), source.dequantize())


def test_state_dict_values_share_no_memory() -> None:
    model = nn.Sequential(make()[1], make()[1])
    pointers = [value.data_ptr() for value in model.state_dict().values()]
    assert len(pointers) == len(set(pointers))


def test_loading_names_what_is_wrong_and_changes_nothing() -> None:
    _, module = make()
    before, state = module.dequantize(), module.state_dict()

    def complaint(changed: dict[str, Tensor], strict: bool = True) -> str:
        with pytest.raises(RuntimeError) as error:
            nn.ModuleDict({"layer": module}).load_state_dict(
                {f"layer.{key}": value for key, value in changed.items()}, strict=strict
            )
        assert torch.equal(module.dequantize(), before)
        return str(error.value)

    without = {key: value for key, value in state.items() if key != "weight.absmax"}
    assert "layer.weight.absmax: missing" in complaint(without)
    assert "layer.weight: [48, 96] in nf4 takes 2304 bytes" in complaint({**state, "weight": state["weight"][:1]})
    assert "size mismatch" in complaint(make((32, 96))[1].state_dict(), strict=False)
    assert '"layer.weight"' in complaint({key: value for key, value in state.items() if not key.startswith("weight")})
    assert '"layer.bias"' in complaint({key: value for key, value in state.items() if key != "bias"})
    assert '"layer.scales"' in complaint({**state, "scales": module.scales})
    assert '"layer.other"' in complaint({**state, "other": torch.zeros(1)})
    assert "layer.weight" in complaint({"weight": torch.zeros(48, 96), "bias": state["bias"]})
    assert module.load_state_dict({"bias": state["bias"]}, strict=False).missing_keys == ["weight"]


# ---- bad arguments


def test_construction_names_what_is_wrong() -> None:
    linear = nn.Linear(8, 8)
    quantized = quantize(linear.weight.detach())
    with pytest.raises(ValueError, match="bias must be"):
        QuantizedLinear(quantized, torch.zeros(9))
    with pytest.raises(ValueError, match=r"\[out_features, in_features\]"):
        QuantizedLinear(quantize(torch.zeros(8)))
    with pytest.raises(ValueError, match="format"):
        QuantizedLinear.from_linear(linear, "nf5")
    with pytest.raises(ValueError, match="format"):
        QuantizedLinear.empty(8, 8, format="nf5")
    with pytest.raises(ValueError, match="block_size"):
        QuantizedLinear.empty(8, 8, block_size=48)
    with pytest.raises(ValueError, match="replace_: quantized must be"):
        QuantizedLinear(quantized).replace_(quantize(torch.zeros(8, 9)))


# ---- merging


@pytest.mark.parametrize("format,double_quant", FORMATS)
def test_merge_adds_requantizes_and_reports_the_error(format: str, double_quant: bool) -> None:
    _, module = make(format=format, double_quant=double_quant)
    delta = torch.randn(48, 96) * 0.1
    target = module.dequantize() + delta
    x = torch.randn(4, 96)
    error = module.merge_(delta)
    assert error == pytest.approx(relative_error(module.dequantize(), target), rel=1e-3)
    assert 0 < error < 0.15
    assert (module.format, module.weight_dtype, module.scales_block_size > 0) == (format, torch.float32, double_quant)
    assert torch.allclose(module(x), x @ module.dequantize().t() + module.bias, atol=1e-5)


def test_merge_keeps_the_dtype_of_the_weight() -> None:
    module = QuantizedLinear.from_linear(nn.Linear(64, 32, dtype=torch.float16))
    module.merge_(torch.ones(32, 64, dtype=torch.float16))
    assert module.weight_dtype == torch.float16 and module.dequantize().dtype == torch.float16


@pytest.mark.parametrize(
    "delta", [torch.zeros(48, 95), torch.full((48, 96), float("nan")), torch.full((48, 96), float("inf"))]
)
def test_a_bad_merge_changes_nothing(delta: Tensor) -> None:
    _, module = make()
    before = module.dequantize()
    with pytest.raises(ValueError, match=r"delta|finite"):
        module.merge_(delta)
    assert torch.equal(module.dequantize(), before)


# ---- the packed weight protects itself


@pytest.mark.parametrize("format,double_quant", FORMATS)
def test_assigning_other_data_is_refused(format: str, double_quant: bool) -> None:
    _, module = make(format=format, double_quant=double_quant)
    before = module.weight.data.clone()
    for value in (torch.zeros(48, 96), module.weight.data.clone(), module.weight.data.float()):
        with pytest.raises(RuntimeError, match=r"peftkern\.patch"):
            module.weight.data = value
    assert torch.equal(module.weight, before)
    module.weight.data = module.weight.data
    assert torch.equal(module.weight, before)


def test_packed_weight_has_no_gradient() -> None:
    with pytest.raises(ValueError, match="no gradient"):
        PackedWeight(torch.zeros(2, dtype=torch.uint8), requires_grad=True)
