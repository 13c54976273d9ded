"""bitsandbytes weights as `QuantizedTensor` views, in every state that they can be in."""

from __future__ import annotations

import logging
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from hypothesis import given, settings
from hypothesis import strategies as st
from patch_models import DEEP, OTHERS, OTHERS_LEFT, TOLERANCE, error, llama, lora, text, twin
from torch import Tensor, nn

from peftkern import ops
from peftkern.formats import BLOCK_SIZES
from peftkern.patch import PatchReport, patch, unpatch
from peftkern.patch.weights import REPACKED, NotFused, read_weight


def linear_4bit(in_features: int = 64, out_features: int = 32, **options: Any) -> Linear4bit:
    blocksize = options.pop("blocksize", 64)
    layer = Linear4bit(in_features, out_features, **{"quant_type": "nf4", **options})
    layer.weight.blocksize = blocksize
    layer.requires_grad_(False)
    return layer.to("cpu")


def linear_8bit(**options: Any) -> Linear8bitLt:
    layer = Linear8bitLt(64, 32, **{"has_fp16_weights": False, "threshold": 6.0, **options})
    layer.requires_grad_(False)
    return layer.to("cpu")


def patched(layer: nn.Module) -> tuple[nn.Sequential, PatchReport]:
    model = nn.Sequential(layer)
    return model, patch(model)


def decoded(layer: Linear4bit) -> Tensor:
    """The dense weight, decoded here from flat blocks in row-major order."""
    state = layer.weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = bitsandbytes.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    packed = layer.weight.data.view(torch.uint8).flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: state.shape.numel()]
    scales = absmax.repeat_interleave(state.blocksize)[: state.shape.numel()]
    return (state.code[codes.int()] * scales).view(state.shape)


@settings(max_examples=40, deadline=None)
@given(
    in_features=st.sampled_from([1, 2, 3, 31, 64, 80, 96, 128, 130, 192, 256, 288]),
    out_features=st.integers(1, 9),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    blocksize=st.sampled_from(BLOCK_SIZES[:4]),
    compress_statistics=st.booleans(),
    quant_storage=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]),
    bias=st.booleans(),
)
def test_any_4bit_layer_is_decoded_by_its_format(
    in_features: int, out_features: int, bias: bool, **options: Any
) -> None:
    if in_features * out_features % 8:
        options["quant_storage"] = torch.uint8  # packed bytes must fill whole elements of the storage dtype
    layer = linear_4bit(in_features, out_features, bias=bias, **options)
    weight = decoded(layer)
    view = read_weight(layer)
    view.validate()
    assert torch.equal(ops.dequantize(view), weight)
    x = torch.randn(3, in_features)
    expected = x.double() @ weight.double().T + (layer.bias.double() if bias else 0.0)
    model, report = patched(layer)
    assert report.counts == {"fused": 1, "left": 0}
    assert error(model(x), expected) <= TOLERANCE


@pytest.mark.parametrize("compress_statistics", [False, True])
def test_a_4bit_view_shares_memory(compress_statistics: bool) -> None:
    layer = linear_4bit(compress_statistics=compress_statistics)
    view = read_weight(layer)
    state = layer.weight.quant_state
    assert view.packed.data_ptr() == layer.weight.data_ptr()
    assert view.scales.data_ptr() == state.absmax.data_ptr()
    assert view.packed.shape == (32, 32)
    assert view.scales.shape == (32, 1)
    if compress_statistics:
        assert view.double_quantization.absmax.data_ptr() == state.state2.absmax.data_ptr()


def test_an_8bit_view_shares_memory() -> None:
    layer = linear_8bit()
    view = read_weight(layer)
    assert view.packed.data_ptr() == layer.weight.data_ptr()
    assert view.scales.data_ptr() == layer.weight.SCB.data_ptr()


def test_a_view_is_made_once_and_again_when_the_weight_changes() -> None:
    layer = linear_4bit()
    patched(layer)
    first = read_weight(layer)
    assert read_weight(layer) is first
    other = linear_4bit()
    layer.weight = other.weight
    second = read_weight(layer)
    assert torch.equal(second.packed, read_weight(other).packed)
    layer.weight.data = linear_4bit().weight.data
    assert read_weight(layer).packed.data_ptr() == layer.weight.data_ptr() != second.packed.data_ptr()


def test_values_changed_in_place_are_seen() -> None:
    layer = linear_4bit()
    model, _ = patched(layer)
    x = torch.randn(2, 64)
    model(x)
    layer.weight.data.fill_(0x77)  # code 7 of nf4 is 0
    assert torch.equal(model(x), layer.bias.expand(2, -1))


def test_8bit_scales_are_found_before_and_after_the_first_forward_of_bitsandbytes() -> None:
    layer = linear_8bit().train()
    x = torch.randn(2, 64)
    before = read_weight(layer)
    assert layer.state.SCB is None
    expected = layer(x)
    assert layer.weight.SCB is None
    after = read_weight(layer)
    assert torch.equal(before.scales, after.scales)
    model, _ = patched(layer)
    assert error(model(x), expected) <= TOLERANCE


def test_a_layer_that_is_not_quantized_yet_is_left() -> None:
    for layer in (Linear4bit(64, 32, quant_type="nf4"), Linear8bitLt(64, 32, has_fp16_weights=False)):
        _, report = patched(layer)
        assert [row.reason for row in report.left] == [
            "the weight is not quantized yet; move the layer to its device first"
        ]


def test_int8_weights_that_are_trained_are_left() -> None:
    layer = linear_8bit(has_fp16_weights=True)
    _, report = patched(layer)
    assert "has_fp16_weights=True" in report.left[0].reason


def test_another_code_table_is_left() -> None:
    layer = linear_4bit()
    layer.weight.quant_state.code = layer.weight.quant_state.code * 2
    with pytest.raises(NotFused, match="its own code table instead of nf4's"):
        read_weight(layer)


def test_a_transposed_weight_is_left() -> None:
    layer = linear_4bit()
    layer.weight.quant_state.shape = torch.Size([64, 32])
    with pytest.raises(NotFused, match=r"quantized the weight as \[64, 32\], not as \[out, in\]"):
        read_weight(layer)


def test_a_lost_quant_state_is_taken_from_the_module() -> None:
    layer = linear_4bit()
    expected = read_weight(layer)
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert torch.equal(read_weight(layer).packed, expected.packed)


def repack(layer: Linear4bit) -> None:
    data, _ = bitsandbytes.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data = data


def test_a_weight_that_bitsandbytes_repacked_is_left() -> None:
    layer = linear_4bit()
    repack(layer)
    _, report = patched(layer)
    assert [row.reason for row in report.left] == [REPACKED]


def test_a_weight_repacked_after_patching_falls_back_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    layer = linear_4bit().eval()
    model, _ = patched(layer)
    x = torch.randn(2, 64)
    expected = model(x)
    repack(layer)
    with caplog.at_level(logging.WARNING, logger="peftkern"):
        actual = model(x)
    assert error(actual, expected) <= 2e-2  # bitsandbytes' bfloat16 scales
    assert [r.getMessage() for r in caplog.records if r.name == "peftkern"] == [
        f"0 runs its original forward: {REPACKED}"
    ]


@pytest.mark.parametrize("context", ["plain", "disabled", "mixed batch"])
def test_evaluation_never_repacks_a_patched_model(context: str) -> None:
    model = lora(llama("bnb-nf4"))
    patch(model)
    model.eval()
    with torch.no_grad():
        if context == "disabled":
            with model.disable_adapter():
                model(**text())
        else:
            names = {"adapter_names": ["default", "__base__"]} if context == "mixed batch" else {}
            model(input_ids=text()["input_ids"], **names)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)
    model.train()
    assert patch(model).counts["fused"] == 16 + OTHERS


@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compute_dtype_is_kept(dtype: torch.dtype, compute_dtype: torch.dtype | None) -> None:
    layer = linear_4bit(compute_dtype=compute_dtype)
    x = torch.randn(4, 64).to(dtype)
    expected = twin(layer)(x)
    model, _ = patched(layer)
    actual = model(x)
    assert actual.dtype == expected.dtype == dtype
    exact = {torch.float32} == {dtype, compute_dtype or dtype}
    assert error(actual, expected) <= (TOLERANCE if exact else 8e-3)
    if dtype == torch.float32 and not exact:
        assert error(actual, expected) < error(twin(linear_like(layer, torch.float32))(x), expected)


def linear_like(layer: Linear4bit, compute_dtype: torch.dtype) -> Linear4bit:
    copied = twin(layer)
    unpatch(copied)
    copied.compute_dtype = compute_dtype
    return copied


def test_plain_quantized_layers_of_a_model_without_adapters() -> None:
    for base in ("bnb-nf4", "bnb-int8"):
        model = llama(base)
        expected = model(**text()).logits
        report = patch(model, strict=True)
        assert report.counts == {"fused": 16 + OTHERS, "left": 1 + OTHERS_LEFT}
        assert next(row for row in report.fused if row.kind.startswith("bnb.")).reason.startswith("no adapter")
        assert error(model(**text()).logits, expected) <= DEEP


def test_gradient_reaches_the_input_through_a_plain_layer() -> None:
    layer = linear_4bit()
    x = torch.randn(3, 64, requires_grad=True)
    model, _ = patched(layer)
    model(x).sum().backward()
    assert error(x.grad, decoded(layer).sum(0).expand(3, -1)) <= TOLERANCE


def test_a_shape_that_bitsandbytes_decodes_wrongly_is_pointed_out() -> None:
    _, report = patched(linear_4bit(80, 16))
    assert "bitsandbytes itself decodes rows of 80 wrongly" in report.fused[0].reason
    _, report = patched(linear_4bit(128, 16))
    assert "wrongly" not in report.fused[0].reason


def test_int8_says_that_it_does_not_round_activations() -> None:
    _, report = patched(linear_8bit())
    assert "does not round activations" in report.fused[0].reason
