from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkern import ops
from peftkern.formats import (
    BLOCK_SIZES,
    FORMATS,
    VALUE_DTYPES,
    DoubleQuantization,
    QuantizedTensor,
    codebook,
    packed_shape,
    scales_shape,
)
from peftkern.formats.bitsandbytes import read_weight

DOUBLE_QUANTIZABLE = sorted(FORMATS - {"int8"})


def _quantized(format: str = "nf4", double_quant: bool = False, shape: tuple[int, ...] = (6, 128)) -> QuantizedTensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return ops.quantize(w, format, 64, double_quant)


# ---- shapes


@pytest.mark.parametrize(
    ("shape", "format", "block_size", "packed", "scales"),
    [
        ((6, 128), "nf4", 64, (6, 64), (6, 2)),
        ((6, 128), "fp4", 128, (6, 64), (6, 1)),
        ((6, 128), "int8_blockwise", 64, (6, 128), (6, 2)),
        ((6, 128), "int8", 128, (6, 128), (6,)),
        ((6, 80), "nf4", 64, (240,), (8,)),
        ((3, 33), "nf4", 32, (50,), (4,)),
        ((3, 33), "int8_blockwise", 32, (3, 33), (4,)),
        ((2, 3, 64), "nf4", 32, (2, 3, 32), (2, 3, 2)),
        ((128,), "nf4", 64, (64,), (2,)),
        ((), "nf4", 64, (1,), (1,)),
        ((0, 64), "nf4", 64, (0, 32), (0, 1)),
        ((64, 0), "nf4", 64, (64, 0), (64, 0)),
    ],
)
def test_shapes_of_codes_and_scales(
    shape: tuple[int, ...], format: str, block_size: int, packed: tuple[int, ...], scales: tuple[int, ...]
) -> None:
    assert packed_shape(torch.Size(shape), format, block_size) == packed
    assert scales_shape(torch.Size(shape), format, block_size) == scales
    q = ops.quantize(torch.ones(shape), format, block_size)
    q.validate()
    assert (q.packed.shape, q.scales.shape) == (packed, scales)


def test_bytes_by_hand() -> None:
    assert _quantized().nbytes == 6 * 64 + 6 * 2 * 4
    assert _quantized(double_quant=True).nbytes == 6 * 64 + 6 * 2 + 4 + 4
    assert _quantized("int8").nbytes == 6 * 128 + 6 * 4
    assert _quantized("nf4", shape=(3, 33)).nbytes == 50 + 2 * 4


# ---- scales


def test_plain_scales_are_handed_out_as_they_are() -> None:
    q = _quantized()
    assert q.scale_values() is q.scales


@pytest.mark.parametrize("format", DOUBLE_QUANTIZABLE)
@pytest.mark.parametrize("shape", [(300, 64), (301, 3), (5,)])
def test_double_quantized_scales_are_close(format: str, shape: tuple[int, ...]) -> None:
    exact = _quantized(format, shape=shape).scales
    decoded = _quantized(format, double_quant=True, shape=shape).scale_values()
    assert decoded.dtype == torch.float32
    assert decoded.shape == exact.shape
    assert torch.linalg.vector_norm(decoded - exact) < 0.01 * torch.linalg.vector_norm(exact)


def test_double_quantized_scales_by_hand() -> None:
    codes = torch.tensor([255, 127, 0, 254] * 75, dtype=torch.uint8)
    nested = DoubleQuantization(torch.tensor([2.0, 4.0]), torch.tensor(10.0))
    packed = torch.zeros(300, 32, dtype=torch.uint8)
    q = QuantizedTensor(packed, codes.view(300, 1), "nf4", torch.Size((300, 64)), torch.float32, 64, nested)
    q.validate()
    dynamic = codebook("int8_blockwise").tolist()
    decoded = q.scale_values().flatten()
    assert decoded[:2].tolist() == [12.0, 10.0]
    assert decoded[2].item() == pytest.approx(10 + 2 * dynamic[0])
    assert decoded[256:258].tolist() == [14.0, 10.0]
    assert decoded[259].item() == pytest.approx(10 + 4 * dynamic[254])


# ---- moving, copying


@pytest.mark.parametrize(("format", "double_quant"), [("nf4", False), ("nf4", True), ("int8", False)])
def test_to_moves_every_tensor(format: str, double_quant: bool) -> None:
    q = _quantized(format, double_quant)
    moved = q.to("meta")
    moved.validate()
    assert moved.device.type == "meta"
    assert moved.scales.device.type == "meta"
    assert moved.nbytes == q.nbytes
    assert (moved.format, moved.shape, moved.dtype, moved.block_size) == (q.format, q.shape, q.dtype, q.block_size)
    if moved.double_quantization is not None:
        assert moved.double_quantization.absmax.device.type == "meta"
        assert moved.double_quantization.offset.device.type == "meta"
    assert q.device.type == "cpu"


def test_to_where_it_is_shares_the_data() -> None:
    q = _quantized()
    assert q.to("cpu").packed is q.packed


def test_fields_cannot_be_assigned() -> None:
    with pytest.raises(FrozenInstanceError):
        _quantized().block_size = 32  # type: ignore[misc]


def test_equality_is_identity() -> None:
    q = _quantized()
    assert q == q
    assert q != _quantized()
    assert len({q, q}) == 1


# ---- validation


def _with_nested(q: QuantizedTensor, **fields: Any) -> QuantizedTensor:
    assert q.double_quantization is not None
    return replace(q, double_quantization=replace(q.double_quantization, **fields))


CORRUPTIONS: list[tuple[str, Any]] = [
    ("format", lambda q: replace(q, format="nf5")),
    ("format", lambda q: replace(q, format=None)),
    ("dtype", lambda q: replace(q, dtype=torch.float64)),
    ("dtype", lambda q: replace(q, dtype=torch.uint8)),
    ("block_size", lambda q: replace(q, block_size=0)),
    ("block_size", lambda q: replace(q, block_size=48)),
    ("block_size", lambda q: replace(q, block_size=-64)),
    ("scales", lambda q: replace(q, block_size=32)),
    ("shape", lambda q: replace(q, shape=tuple(q.shape))),
    ("shape", lambda q: replace(q, shape=None)),
    ("packed", lambda q: replace(q, shape=torch.Size((q.shape[0] + 1, *q.shape[1:])))),
    ("packed", lambda q: replace(q, packed=q.packed[..., :-1])),
    ("packed", lambda q: replace(q, packed=q.packed[None])),
    ("packed", lambda q: replace(q, packed=q.packed.view(torch.int8))),
    ("packed", lambda q: replace(q, packed=q.packed.float())),
    ("packed", lambda q: replace(q, packed=q.packed.tolist())),
    ("scales", lambda q: replace(q, scales=torch.cat([q.scales, q.scales]))),
    ("scales", lambda q: replace(q, scales=q.scales[:-1])),
    ("scales", lambda q: replace(q, scales=q.scales[None])),
    ("scales", lambda q: replace(q, scales=q.scales.half())),
    ("scales", lambda q: replace(q, scales=None)),
    ("scales", lambda q: replace(q, scales=q.scales.to("meta"))),
    ("scales", lambda q: replace(q, scales=q.scales.to_sparse())),
    ("packed", lambda q: replace(q, packed=q.packed.to_sparse())),
]
NESTED_CORRUPTIONS: list[tuple[str, Any]] = [
    ("scales", lambda q: replace(q, double_quantization=None)),
    ("scales", lambda q: replace(q, scales=q.scales.float())),
    ("double_quantization", lambda q: replace(q, double_quantization=(1, 2))),
    ("absmax", lambda q: _with_nested(q, absmax=torch.ones(9))),
    ("absmax", lambda q: _with_nested(q, absmax=torch.ones(()))),
    ("absmax", lambda q: _with_nested(q, absmax=torch.ones(1).double())),
    ("absmax", lambda q: _with_nested(q, absmax=3.0)),
    ("offset", lambda q: _with_nested(q, offset=torch.ones(1))),
    ("offset", lambda q: _with_nested(q, offset=torch.tensor(1))),
    ("offset", lambda q: _with_nested(q, offset=torch.tensor(1.0, device="meta"))),
    ("block_size", lambda q: _with_nested(q, block_size=0)),
    ("block_size", lambda q: _with_nested(q, block_size=100)),
]


@settings(max_examples=150, deadline=None)
@given(
    corruption=st.sampled_from(CORRUPTIONS),
    format=st.sampled_from(DOUBLE_QUANTIZABLE),
    double_quant=st.booleans(),
    shape=st.sampled_from([(6, 128), (3, 33), (70,), (2, 3, 64)]),
)
def test_corrupt_fields_are_named(
    corruption: tuple[str, Any], format: str, double_quant: bool, shape: tuple[int, ...]
) -> None:
    field, corrupt = corruption
    q = corrupt(_quantized(format, double_quant, shape))
    # Fewer or smaller rows can leave one of the two sizes as it was; then it is the other one that does not fit.
    with pytest.raises((TypeError, ValueError), match=rf"QuantizedTensor: {field}\b|scales must have shape"):
        q.validate()


@settings(max_examples=60, deadline=None)
@given(corruption=st.sampled_from(NESTED_CORRUPTIONS), shape=st.sampled_from([(6, 128), (3, 33), (600, 64)]))
def test_corrupt_double_quantization_is_named(corruption: tuple[str, Any], shape: tuple[int, ...]) -> None:
    field, corrupt = corruption
    q = corrupt(_quantized("nf4", True, shape))
    with pytest.raises((TypeError, ValueError), match=rf"QuantizedTensor: (double_quantization\.)?{field}\b"):
        q.validate()


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("block_size", {"block_size": 64}),
        ("shape", {"shape": torch.Size((6, 2, 64))}),
        ("shape", {"shape": torch.Size((6, 0)), "block_size": 0, "packed": torch.zeros(6, 0, dtype=torch.int8)}),
        ("packed", {"packed": torch.zeros(6, 128, dtype=torch.uint8)}),
        ("scales", {"scales": torch.ones(6, 1)}),
        ("double_quantization", {"double_quantization": DoubleQuantization(torch.ones(1), torch.ones(()))}),
    ],
)
def test_corrupt_int8_is_named(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"QuantizedTensor: {field}"):
        replace(_quantized("int8"), **changes).validate()


def test_int8_without_columns_is_not_read_from_a_checkpoint() -> None:
    codes, companions = torch.zeros(6, 0, dtype=torch.int8), {"SCB": torch.ones(6)}
    with pytest.raises(ValueError, match=r"^layer\.weight: QuantizedTensor: shape must have at least one column"):
        read_weight(codes, companions, "layer.weight", torch.float32)


_sizes = st.lists(st.sampled_from([0, 1, 2, 3, 32, 64, 65, 128]), max_size=3)
_any_tensor = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    _sizes,
    st.sampled_from([torch.uint8, torch.int8, torch.float32, torch.float16]),
)


@settings(max_examples=300, deadline=None)
@given(
    packed=_any_tensor,
    scales=_any_tensor,
    format=st.sampled_from(sorted(FORMATS)),
    shape=_sizes.map(torch.Size),
    dtype=st.sampled_from(VALUE_DTYPES),
    block_size=st.sampled_from([*BLOCK_SIZES[:3], 1, 3, 65]),
    nested=st.none() | st.builds(DoubleQuantization, _any_tensor, _any_tensor, st.sampled_from([0, 64, 256])),
)
def test_random_fields_are_refused_or_dequantize(packed: Any, scales: Any, shape: torch.Size, **options: Any) -> None:
    q = QuantizedTensor(
        packed,
        scales,
        options["format"],
        shape,
        options["dtype"],
        options["block_size"],
        options["nested"],
    )
    try:
        q.validate()
    except ValueError as error:
        assert str(error).startswith("QuantizedTensor: ")
        with pytest.raises(ValueError, match="QuantizedTensor: "):
            ops.dequantize(q)
        return
    assert ops.dequantize(q).shape == shape


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(0, 130), min_size=1, max_size=3),
    format=st.sampled_from(sorted(FORMATS)),
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
)
def test_what_quantize_returns_is_valid(shape: list[int], format: str, block_size: int, double_quant: bool) -> None:
    if format == "int8":
        shape, double_quant = [shape[0], shape[-1] + 1], False
    q = ops.quantize(torch.ones(shape), format, block_size, double_quant)
    q.validate()
    assert list(q.shape) == shape
