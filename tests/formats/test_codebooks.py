from __future__ import annotations

import hashlib
import struct

import bitsandbytes.functional as bnb
import pytest
import torch

from peftkern.formats import DYNAMIC_8BIT, DYNAMIC_8BIT_UNSIGNED, FP4, NF4, codebook


def _bits(values: tuple[float, ...]) -> list[str]:
    return [struct.pack(">f", value).hex() for value in values]


@pytest.mark.parametrize(("format", "values"), [("nf4", NF4), ("fp4", FP4)])
def test_four_bit_codebooks_are_those_of_bitsandbytes(format: str, values: tuple[float, ...]) -> None:
    theirs = bnb.get_4bit_type(format, device="cpu")
    assert torch.equal(codebook(format).view(torch.int32), theirs.view(torch.int32))
    assert torch.tensor(values).tolist() == list(values)  # the digits are those of float32 values


@pytest.mark.parametrize(("format", "signed"), [("int8_blockwise", True), ("uint8_blockwise", False)])
def test_dynamic_codebook_is_that_of_bitsandbytes(format: str, signed: bool) -> None:
    difference = codebook(format).view(torch.int32) - bnb.create_dynamic_map(signed).view(torch.int32)
    assert difference.abs().max() <= 2
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":  # PyTorch's linspace without fused multiply-adds
        assert (difference == 0).all()


def test_four_bit_codebooks_by_hand() -> None:
    assert _bits(NF4)[::5] == ["bf800000", "be3d353f", "3e7c04dd", "3f800000"]
    assert list(NF4) == sorted(NF4)
    assert [round(value * 12, 6) for value in FP4[:8]] == [0, 0.0625, 8, 12, 4, 6, 2, 3]
    assert [-value for value in FP4[:8]] == list(FP4[8:])
    assert _bits(FP4)[0] == _bits(FP4)[8] == "00000000"


def test_dynamic_codebook_by_hand() -> None:
    assert len(DYNAMIC_8BIT) == len(set(DYNAMIC_8BIT)) == 256
    assert list(DYNAMIC_8BIT) == sorted(DYNAMIC_8BIT)
    assert (DYNAMIC_8BIT[127], DYNAMIC_8BIT[255]) == (0.0, 1.0)
    assert [-value for value in DYNAMIC_8BIT[126::-1]] == list(DYNAMIC_8BIT[128:255])
    assert DYNAMIC_8BIT[128] == pytest.approx(5.5e-7)  # the middle of (1e-7, 1e-6)
    assert DYNAMIC_8BIT[254] == pytest.approx(1 - 0.9 / 64 / 2)


def test_unsigned_dynamic_codebook_by_hand() -> None:
    assert len(DYNAMIC_8BIT_UNSIGNED) == len(set(DYNAMIC_8BIT_UNSIGNED)) == 256
    assert list(DYNAMIC_8BIT_UNSIGNED) == sorted(DYNAMIC_8BIT_UNSIGNED)
    assert (DYNAMIC_8BIT_UNSIGNED[0], DYNAMIC_8BIT_UNSIGNED[255]) == (0.0, 1.0)
    assert DYNAMIC_8BIT_UNSIGNED[1:3] == pytest.approx((3.25e-7, 7.75e-7))  # the middles of two halves of (1e-7, 1e-6)
    assert DYNAMIC_8BIT_UNSIGNED[254] == pytest.approx(1 - 0.9 / 128 / 2)


def test_dynamic_codebook_does_not_depend_on_the_processor() -> None:
    digest = hashlib.sha256("".join(_bits(DYNAMIC_8BIT)).encode()).hexdigest()
    assert digest == "9bab59f532bc2aeedff34c2dd1f9a14ac39f8ba3bbc92b7859c70507f540f818"


def test_one_table_per_device_is_shared() -> None:
    assert codebook("nf4") is codebook("nf4", torch.device("cpu"))
    assert codebook("nf4", "meta").device.type == "meta"
    assert codebook("fp4").dtype == torch.float32


@pytest.mark.parametrize("format", ["int8", "", "nf5"])
def test_formats_without_a_codebook(format: str) -> None:
    with pytest.raises(ValueError, match=rf"format must be one of .*'nf4'.*, got '{format}'"):
        codebook(format)
