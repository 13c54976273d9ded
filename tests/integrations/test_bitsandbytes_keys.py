"""bitsandbytes' keys: what we write it reads, what it wrote we read, and all else is a ValueError."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftkern.formats.bitsandbytes import COMPANION_KEYS, STATE_KEYS, parse_quant_state, read_weight, write_companions
from peftkern.ops import dequantize, quantize

bnb = pytest.importorskip("bitsandbytes", reason="the peer is a development dependency")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 128), (3, 64), (1, 128), (128, 64)]  # whole blocks: where bitsandbytes decodes rightly on a CPU
STATE_KEY = "layer.weight.quant_state.bitsandbytes__nf4"


def weight_of(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(shape[0] * 1000 + shape[1])
    return torch.randn(shape).to(dtype)


def bitsandbytes_tensors(weight: Tensor, format: str, double_quant: bool, **kwargs: Any) -> dict[str, Tensor]:
    """The weight as a checkpoint of bitsandbytes holds it, by key relative to the module."""
    packed, state = bnb.functional.quantize_4bit(weight, quant_type=format, compress_statistics=double_quant, **kwargs)
    companions = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    return {"weight": packed, **companions}


def our_tensors(weight: Tensor, format: str, double_quant: bool, block_size: int = 64) -> dict[str, Tensor]:
    quantized = quantize(weight, format, block_size, double_quant)
    return {"weight": quantized.packed, **write_companions(quantized)}


def read(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Any:
    companions = {name: value for name, value in tensors.items() if name != "weight"}
    return read_weight(tensors["weight"], companions, "layer.weight", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_both_ways_bit_identical(format: str, double_quant: bool, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = weight_of(shape, dtype)
    theirs, ours = bitsandbytes_tensors(weight, format, double_quant), our_tensors(weight, format, double_quant)
    assert theirs.keys() == ours.keys()
    for key in theirs:
        assert torch.equal(theirs[key].flatten(), ours[key].flatten()), key

    read_theirs = read(theirs)
    assert read_theirs.dtype == dtype and tuple(read_theirs.shape) == shape
    stats = {name.removeprefix("weight."): value for name, value in ours.items() if name != "weight"}
    loaded = bnb.nn.Params4bit.from_prequantized(data=ours["weight"], quantized_stats=stats, device="cpu")
    expected = bnb.functional.dequantize_4bit(
        theirs["weight"],
        bnb.functional.QuantState.from_dict(
            {name.removeprefix("weight."): value for name, value in theirs.items() if name != "weight"}, device="cpu"
        ),
    )
    assert torch.equal(
        bnb.functional.dequantize_4bit(loaded.data, loaded.quant_state).view(shape), expected.view(shape)
    )
    assert torch.equal(dequantize(read_theirs), expected)


@pytest.mark.parametrize("shape", [(5, 7), (3, 65), (1, 1), (33, 96)], ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
def test_rows_that_are_no_whole_blocks(shape: tuple[int, int], double_quant: bool) -> None:
    weight = weight_of(shape)
    theirs = read(bitsandbytes_tensors(weight, "nf4", double_quant))
    assert torch.equal(dequantize(theirs), dequantize(quantize(weight, "nf4", 64, double_quant)))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=str)
def test_codes_kept_in_another_storage_dtype(storage: torch.dtype) -> None:
    weight = weight_of((64, 128))
    tensors = bitsandbytes_tensors(weight, "nf4", True, quant_storage=storage)
    assert tensors["weight"].dtype == storage
    assert torch.equal(dequantize(read(tensors)), dequantize(quantize(weight, "nf4", 64, True)))


def test_int8_both_ways() -> None:
    weight = weight_of((48, 96))
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    expected = bnb.functional.int8_vectorwise_dequant(codes, scales)
    layout = torch.zeros((), dtype=torch.uint8)
    read_theirs = read({"weight": codes, "SCB": scales, "weight_format": layout})
    assert torch.equal(dequantize(read_theirs), expected.float())

    layer = bnb.nn.Linear8bitLt(96, 48, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, SCB=torch.zeros_like(scales))
    assert layer.load_state_dict(our_tensors(weight, "int8", False)) == ([], [])
    found = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    assert torch.equal(found, dequantize(quantize(weight, "int8")))


@pytest.mark.parametrize("block_size", [32, 64, 128, 4096])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int8_blockwise"])
def test_own_round_trip(format: str, double_quant: bool, block_size: int) -> None:
    weight = weight_of((9, 256), torch.bfloat16)
    quantized = quantize(weight, format, block_size, double_quant)
    again = read(our_tensors(weight, format, double_quant, block_size))
    again.validate()
    assert again.packed.shape == quantized.packed.shape and again.scales.shape == quantized.scales.shape
    assert again.block_size == block_size and again.dtype == torch.bfloat16
    assert torch.equal(dequantize(again), dequantize(quantized))


# ---- corrupt checkpoints


def state_tensor(**changes: Any) -> Tensor:
    fields = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 128], **changes}
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


STATE = STATE_KEYS["nf4"]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"weight": torch.zeros(4095, 1, dtype=torch.uint8)}, "layer.weight"),
        ({"weight": torch.zeros(64, 128)}, "layer.weight"),
        ({"weight.absmax": None}, "layer.weight.absmax"),
        ({"weight.absmax": torch.ones(127)}, "layer.weight.absmax"),
        ({"weight.absmax": torch.ones(128).half()}, "layer.weight.absmax"),
        ({"weight.absmax": torch.zeros(128, dtype=torch.uint8)}, "layer.weight.absmax"),
        ({"weight.absmax": torch.full((128,), float("nan"))}, "layer.weight.absmax"),
        ({"weight.quant_map": None}, "layer.weight.quant_map"),
        ({"weight.quant_map": torch.linspace(-1, 1, 16)}, "layer.weight.quant_map"),
        ({"weight.quant_map": torch.zeros(15)}, "layer.weight.quant_map"),
        ({"weight.quant_map": torch.full((16,), float("nan"))}, "layer.weight.quant_map"),
        ({STATE: None}, "layer.weight"),
        ({STATE_KEYS["fp4"]: state_tensor()}, "layer.weight"),
        ({STATE: state_tensor(quant_type="fp4")}, STATE_KEY),
        ({STATE: state_tensor(quant_type="nf5")}, STATE_KEY),
        ({STATE: state_tensor(quant_type=["nf4"])}, STATE_KEY),
        ({STATE: state_tensor(blocksize=48)}, STATE_KEY),
        ({STATE: state_tensor(blocksize=-64)}, STATE_KEY),
        ({STATE: state_tensor(blocksize=True)}, STATE_KEY),
        ({STATE: state_tensor(dtype="float8")}, STATE_KEY),
        ({STATE: state_tensor(shape=None)}, STATE_KEY),
        ({STATE: state_tensor(shape=[64, -128])}, STATE_KEY),
        ({STATE: state_tensor(shape=[2**40, 2**40])}, STATE_KEY),
        ({STATE: state_tensor(shape=[64, 129])}, "layer.weight"),
        ({STATE: state_tensor(nested_offset=0.5)}, STATE_KEY),
        ({STATE: state_tensor(nested_offset=0.5, nested_blocksize=256)}, "layer.weight.absmax"),
        ({STATE: state_tensor()[:-1]}, STATE_KEY),
        ({STATE: state_tensor().int()}, STATE_KEY),
        ({STATE: torch.zeros(0, dtype=torch.uint8)}, STATE_KEY),
        ({STATE: torch.full((1 << 20,), 91, dtype=torch.uint8)}, STATE_KEY),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, str) else "",
)
def test_corrupt_4bit_names_the_key(changes: dict[str, Tensor | None], key: str) -> None:
    tensors = {**our_tensors(weight_of((64, 128)), "nf4", False), **changes}
    with pytest.raises(ValueError) as error:
        read({name: value for name, value in tensors.items() if value is not None})
    assert str(error.value).startswith(f"{key}: ")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"weight.nested_absmax": None}, "layer.weight.nested_absmax"),
        ({"weight.nested_absmax": torch.ones(2)}, "layer.weight.nested_absmax"),
        ({"weight.nested_absmax": torch.full((1,), float("inf"))}, "layer.weight.nested_absmax"),
        ({"weight.nested_quant_map": None}, "layer.weight.nested_quant_map"),
        ({"weight.nested_quant_map": torch.linspace(-1, 1, 256)}, "layer.weight.nested_quant_map"),
        ({"weight.absmax": torch.ones(128)}, "layer.weight.absmax"),
        ({STATE: state_tensor(nested_blocksize=256, nested_offset=float("nan"))}, STATE_KEY),
        ({STATE: state_tensor(nested_blocksize=256, nested_offset=10**300)}, STATE_KEY),
        ({STATE: state_tensor(nested_blocksize=0, nested_offset=0.5)}, STATE_KEY),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, str) else "",
)
def test_corrupt_double_quantization_names_the_key(changes: dict[str, Tensor | None], key: str) -> None:
    tensors = {**our_tensors(weight_of((64, 128)), "nf4", True), **changes}
    with pytest.raises(ValueError) as error:
        read({name: value for name, value in tensors.items() if value is not None})
    assert str(error.value).startswith(f"{key}: ")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"weight": torch.zeros(48, 96, dtype=torch.uint8)}, "layer.weight"),
        ({"weight": torch.zeros(48 * 96, dtype=torch.int8)}, "layer.weight"),
        ({"SCB": torch.ones(47)}, "layer.SCB"),
        ({"SCB": torch.ones(48).half()}, "layer.SCB"),
        ({"SCB": torch.full((48,), float("nan"))}, "layer.SCB"),
        ({"weight_format": torch.tensor(2, dtype=torch.uint8)}, "layer.weight_format"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_corrupt_int8_names_the_key(changes: dict[str, Tensor], key: str) -> None:
    with pytest.raises(ValueError) as error:
        read({**our_tensors(weight_of((48, 96)), "int8", False), **changes})
    assert str(error.value).startswith(f"{key}: ")


def parse(data: bytes) -> None:
    """Any outcome but a valid state or a ValueError that names the key fails."""
    tensor = torch.tensor(list(data), dtype=torch.uint8)
    try:
        state = parse_quant_state(tensor, "some.key")
    except ValueError as error:
        assert str(error).startswith("some.key: ")
    else:
        assert state.format in STATE_KEYS and len(state.shape) == 2


@given(st.binary(max_size=300))
@example(b"")
@example(b"\xff\xfe{}")
@example(b"[" * 60000)
@example(b'{"a":' * 10000)
@example(b"1" * 60000)
@example(b'{"quant_type":' + b"[" * 900 + b"]" * 900 + b"}")
@example(b"NaN")
def test_fuzz_quant_state_with_bytes(data: bytes) -> None:
    parse(data)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # the first draw builds tables of characters
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "quant_type": st.sampled_from(["nf4", "fp4", "int8_blockwise"]) | _JSON,
            "blocksize": st.sampled_from([64, 32, 4096]) | _JSON,
            "dtype": st.sampled_from(["float32", "bfloat16"]) | _JSON,
            "shape": st.lists(st.integers(-2, 2**33), max_size=3) | _JSON,
            "nested_blocksize": st.just(256) | _JSON,
            "nested_offset": st.floats() | _JSON,
        },
    )
)
def test_fuzz_quant_state_with_json(fields: dict[str, Any]) -> None:
    parse(json.dumps(fields).encode())


_TENSORS = st.builds(
    lambda shape, dtype, fill: torch.full(shape, fill).to(dtype),
    st.lists(st.integers(0, 70), max_size=3),
    st.sampled_from([torch.uint8, torch.int8, torch.float32, torch.bfloat16, torch.int64]),
    st.sampled_from([0.0, 1.0, float("nan"), float("inf")]),
)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([("nf4", False), ("fp4", True), ("int8", False), ("int8_blockwise", True)]),
    st.dictionaries(st.sampled_from(["weight", *COMPANION_KEYS]), _TENSORS, max_size=3),
    st.sets(st.sampled_from(COMPANION_KEYS), max_size=2),
)
def test_fuzz_whole_weight(kind: tuple[str, bool], replaced: dict[str, Tensor], dropped: set[str]) -> None:
    tensors = {**our_tensors(weight_of((5, 64)), *kind), **replaced}
    try:
        quantized = read({name: value for name, value in tensors.items() if name not in dropped})
    except ValueError as error:
        assert str(error).startswith("layer.")
    else:
        assert torch.isfinite(dequantize(quantized)).all()
