from __future__ import annotations

from typing import Any

import bitsandbytes_peer
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from same_bits import CASES, DTYPES, assert_same_bits, assert_same_quantized, random_tensor
from tensors import FUZZ, SHAPES, block_sizes, tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern import ops
from peftkern.backends import registry
from peftkern.formats import BLOCK_SIZES, codebook
from peftkern.ops.quantize import CHUNK_ELEMENTS, quantize_reference

# ---- against bitsandbytes


def _peer(w: Tensor, format: str, block_size: int, double_quant: bool) -> bool:
    """Whether bitsandbytes has this case: for 8 bits, its blocks of scales are as long as those of values."""
    return not (format == "int8_blockwise" and double_quant and block_size != 256)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize(("format", "double_quant"), CASES)
def test_blocks_match_bitsandbytes(
    backend: str, format: str, double_quant: bool, block_size: int, dtype: torch.dtype
) -> None:
    if not _peer(torch.empty(0), format, block_size, double_quant):
        double_quant = False
    for seed, shape in enumerate(SHAPES):
        w = random_tensor(shape, dtype, seed)
        expected = bitsandbytes_peer.quantize(w, format, block_size, double_quant)
        assert_same_quantized(ops.quantize(w, format, block_size, double_quant), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 64), (7, 33), (1, 1), (600, 3), (3, 5000)])
def test_rows_match_bitsandbytes(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w = random_tensor(shape, dtype)
    w[-1, 1:] = 0
    assert_same_quantized(ops.quantize(w, "int8"), bitsandbytes_peer.quantize(w, "int8"))


@settings(FUZZ, max_examples=150)
@given(w=tensors(), case=st.sampled_from(CASES), block_size=block_sizes)
def test_any_blocks_match_bitsandbytes(backend: str, w: Tensor, case: tuple[str, bool], block_size: int) -> None:
    format, double_quant = case
    if not _peer(w, format, block_size, double_quant):
        block_size = 256
    expected = bitsandbytes_peer.quantize(w, format, block_size, double_quant)
    assert_same_quantized(ops.quantize(w, format, block_size, double_quant), expected)


@settings(FUZZ, max_examples=100)
@given(w=tensors(dimensions=2))
def test_any_rows_match_bitsandbytes(backend: str, w: Tensor) -> None:
    assert_same_quantized(ops.quantize(w, "int8"), bitsandbytes_peer.quantize(w, "int8"))


@settings(FUZZ, max_examples=100)
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70))
@pytest.mark.parametrize("format", ["nf4", "fp4", "int8_blockwise"])
def test_any_values_match_bitsandbytes(backend: str, format: str, values: list[float]) -> None:
    w = torch.tensor(values)
    assert_same_quantized(ops.quantize(w, format, 32), bitsandbytes_peer.quantize(w, format, 32))


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8_blockwise"])
def test_values_beside_every_threshold_match_bitsandbytes(backend: str, format: str) -> None:
    values = codebook(format).sort().values
    middles = (values[:-1] + values[1:]) / 2
    neighbours = [middles, values, torch.arange(65536) / 32767.5 - 1, (torch.arange(65536) - 0.5) / 32767.5 - 1]
    neighbours += [torch.nextafter(v, torch.tensor(side)) for v in neighbours for side in (-2.0, 2.0)]
    w = torch.cat(neighbours).clamp(-1, 1)
    w = torch.nn.functional.pad(w, (0, -len(w) % 31), value=0.0).view(-1, 31)
    w = torch.nn.functional.pad(w, (1, 0), value=1.0)  # a one in every block of 32: the quotients are the values
    assert_same_quantized(ops.quantize(w, format, 32), bitsandbytes_peer.quantize(w, format, 32))


@pytest.mark.parametrize(("format", "double_quant"), CASES)
def test_more_than_one_chunk_matches_bitsandbytes(backend: str, format: str, double_quant: bool) -> None:
    w = random_tensor((2 * CHUNK_ELEMENTS + 4097,), torch.float32)
    expected = bitsandbytes_peer.quantize(w, format, 256, double_quant)
    assert_same_quantized(ops.quantize(w, format, 256, double_quant), expected)


# ---- by hand


def test_nf4_by_hand(backend: str) -> None:
    w = torch.zeros(2, 64)
    w[0, :4] = torch.tensor([2.0, -2.0, 1.0, 0.0])  # over 2: the nearest of 0.5 is 0.4407, code 12; 0 has code 7
    q = ops.quantize(w)
    assert q.packed.shape == (2, 32)
    assert q.packed[0, :3].tolist() == [0xF0, 0xC7, 0x77]
    assert q.scales.tolist() == [[2.0], [0.0]]
    assert (q.format, q.block_size, q.dtype, q.shape) == ("nf4", 64, torch.float32, torch.Size((2, 64)))


def test_fp4_by_hand(backend: str) -> None:
    w = torch.zeros(32)
    w[:11] = torch.tensor([12, -8, 6, 4, 3, 2, 0.0625, 0, -0.0625, 0.01, -0.01])
    q = ops.quantize(w, "fp4", 32)
    # The two zeros: 0.01 is rounded down to code 8, and -0.01 up to code 0.
    assert q.packed[:6].tolist() == [0x3A, 0x54, 0x76, 0x10, 0x98, 0x00]
    assert q.scales.tolist() == [12.0]


def test_int8_by_hand(backend: str) -> None:
    q = ops.quantize(torch.tensor([[2.0, -1.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]), "int8")
    assert q.packed.tolist() == [[127, -64, 32, 0], [0, 0, 0, 0]]  # -63.5 goes to the even neighbour
    assert q.scales.tolist() == [2.0, 0.0]
    assert q.block_size == 4


def test_int8_blockwise_by_hand(backend: str) -> None:
    w = torch.zeros(2, 32)
    w[0, :3] = torch.tensor([3.0, -3.0, 1.5])
    q = ops.quantize(w, "int8_blockwise", 32)
    # Zero lies between two points of the grid and takes the upper, 1.5e-5, unless its whole block is zero.
    assert q.packed[0, :4].tolist() == [255, 0, 219, 131]
    assert q.packed[1].tolist() == [0] * 32
    assert q.scales.tolist() == [[3.0], [0.0]]


def test_odd_number_of_elements_by_hand(backend: str) -> None:
    w = torch.zeros(33)
    w[32] = -3.0
    q = ops.quantize(w, "nf4", 32)
    assert q.packed.tolist() == [0x77] * 16 + [0x07]  # the nibble that no element owns holds the code of zero
    assert q.scales.tolist() == [0.0, 3.0]


def test_double_quantization_of_equal_scales_by_hand(backend: str) -> None:
    q = ops.quantize(torch.full((300, 64), 0.75), double_quant=True)
    nested = q.double_quantization
    assert nested is not None
    assert (q.scales.dtype, q.scales.shape) == (torch.uint8, (300, 1))
    assert float(nested.offset) == 0.75
    assert nested.absmax.tolist() == [0.0, 0.0]  # 300 scales, 256 to a block
    assert (q.scale_values() == 0.75).all()


# ---- layouts


@pytest.mark.parametrize(("format", "double_quant"), CASES)
@pytest.mark.parametrize("shape", [(0,), (0, 64), (64, 0), (0, 33), (3, 0, 128)])
def test_no_elements(backend: str, shape: tuple[int, ...], format: str, double_quant: bool) -> None:
    q = ops.quantize(torch.empty(shape), format, 64, double_quant)
    q.validate()
    assert q.packed.numel() == 0
    assert q.scales.numel() == 0
    assert ops.dequantize(q).shape == shape


def test_no_rows_of_int8(backend: str) -> None:
    q = ops.quantize(torch.empty(0, 64), "int8")
    q.validate()
    assert ops.dequantize(q).shape == (0, 64)


@pytest.mark.parametrize("format", ["nf4", "int8", "int8_blockwise"])
def test_strides_do_not_matter(backend: str, format: str) -> None:
    w = random_tensor((700, 1100), torch.float32)
    for view in (w.t(), w[::3, 5:905:2], w[:1].expand(40, -1)):
        assert_same_quantized(ops.quantize(view, format), ops.quantize(view.contiguous(), format))


def test_input_is_left_alone_and_no_gradient_is_asked_for(backend: str) -> None:
    w = random_tensor((8, 128), torch.float32).requires_grad_()
    before = w.detach().clone()
    q = ops.quantize(w)
    assert_same_bits(w.detach(), before)
    assert not q.scales.requires_grad


def test_twice_the_same_bits(backend: str) -> None:
    w = random_tensor((65, 4097), torch.bfloat16)
    assert_same_quantized(ops.quantize(w, double_quant=True), ops.quantize(w, double_quant=True))


# ---- errors


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 63, 64, 129])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "int8_blockwise"])
def test_values_that_are_not_finite_are_refused(backend: str, format: str, position: int, value: float) -> None:
    w = torch.ones(1, 130)
    w[0, position] = value
    for dtype in DTYPES:
        with pytest.raises(ValueError, match="w must be finite"):
            ops.quantize(w.to(dtype), format)
        if format != "int8":
            with pytest.raises(ValueError, match="w must be finite"):
                ops.quantize(w.to(dtype), format, double_quant=True)


def test_scales_that_overflow_when_added_are_refused_only_with_double_quantization(backend: str) -> None:
    w = torch.full((64, 64), 3e38)
    assert (ops.quantize(w).scales == 3e38).all()
    with pytest.raises(ValueError, match="sum of its blocks' scales"):
        ops.quantize(w, double_quant=True)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float64, torch.complex64], ids=str)
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"w must be float32, bfloat16 or float16, got {dtype}"):
        ops.quantize(torch.ones(4, 64).to(dtype))


@pytest.mark.parametrize("w", [None, [1.0, 2.0], 3.0])
def test_what_is_no_tensor_is_refused(w: Any) -> None:
    with pytest.raises(TypeError, match="w must be a tensor, got"):
        ops.quantize(w)


@pytest.mark.parametrize("block_size", [0, -64, 1, 16, 48, 63, 8192, 64.0, None])
def test_other_block_sizes_are_refused(block_size: Any) -> None:
    with pytest.raises(ValueError, match=rf"block_size must be one of \(32, .*4096\), got {block_size}"):
        ops.quantize(torch.ones(4, 64), block_size=block_size)


@pytest.mark.parametrize("format", ["", "NF4", "int4", "fp8"])
def test_other_formats_are_refused(format: str) -> None:
    with pytest.raises(ValueError, match=rf"format must be one of .*'nf4'.*, got '{format}'"):
        ops.quantize(torch.ones(4, 64), format)


@pytest.mark.parametrize("shape", [(), (64,), (2, 3, 64), (4, 0)])
def test_int8_takes_matrices(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"w must be \[out, in\]"):
        ops.quantize(torch.ones(shape), "int8")


def test_int8_has_no_double_quantization() -> None:
    with pytest.raises(ValueError, match="double_quant must be False for int8"):
        ops.quantize(torch.ones(4, 64), "int8", double_quant=True)


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(registry.BackendError, match="backend must be one of cuda, triton, cpu, reference"):
        ops.quantize(torch.ones(4, 64), backend="abacus")


# ---- operator, memory


@pytest.mark.parametrize("shape", [(8, 128), (3, 33)])
@pytest.mark.parametrize(("format", "double_quant"), [*CASES, ("int8", False)])
def test_operator_contract(format: str, double_quant: bool, shape: tuple[int, ...]) -> None:
    w = random_tensor(shape, torch.float32)
    torch.library.opcheck(torch.ops.peftkern.quantize, (w, format, 64, double_quant, None))


@pytest.mark.parametrize(("format", "double_quant"), [*CASES, ("int8", False)])
def test_meta_tensors_have_the_shapes_of_real_ones(format: str, double_quant: bool) -> None:
    for shape in [(8, 128), (3, 33)]:
        q = ops.quantize(torch.empty(shape, device="meta", dtype=torch.bfloat16), format, 64, double_quant)
        q.validate()
        assert q.device.type == "meta"
        assert q.nbytes == ops.quantize(torch.ones(shape, dtype=torch.bfloat16), format, 64, double_quant).nbytes


class _LargestTensor(TorchDispatchMode):
    """Remembers the most bytes that one operation allocated."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and not function.is_view and function._schema.name[-1] != "_":
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("format", ["nf4", "int8", "int8_blockwise"])
def test_reference_needs_little_memory(format: str) -> None:
    w = torch.ones(8, CHUNK_ELEMENTS).t()
    with _LargestTensor() as largest:
        q = quantize_reference(w, format)
    assert largest.nbytes <= max(8 * CHUNK_ELEMENTS, q.packed.nbytes)
