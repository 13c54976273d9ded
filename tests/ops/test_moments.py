"""8-bit moments: the native codes and values are those of the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from isa_backends import ISA_BACKENDS, select
from torch import Tensor

from peftkern.ops.adamw import decode_moment, empty_moments, encode_moment


def moments(shape: tuple[int, ...], signed: bool) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-12, 3, shape, generator=generator)
    flat = values.view(-1)
    flat[::7] = 0.0
    flat[256:512] = 0.0  # a block of zeros
    return values if signed else values.square()


@pytest.mark.parametrize("native", ISA_BACKENDS[1:])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(1,), (255,), (256,), (3, 171), (64, 80), (5, 7, 41), (300000,)])
def test_native_moments_are_the_reference_s(
    native: str, signed: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = select(native, monkeypatch)
    values = moments(shape, signed)
    codes, absmax = encode_moment(values, signed, backend=backend)
    expected, expected_absmax = encode_moment(values, signed, backend="reference")
    assert torch.equal(codes, expected) and torch.equal(absmax, expected_absmax)
    decoded = decode_moment(codes, absmax, signed, backend=backend)
    assert decoded.shape == values.shape
    assert torch.equal(decoded, decode_moment(codes, absmax, signed, backend="reference"))


def test_the_number_of_threads_changes_nothing() -> None:
    values, threads = moments((700, 900), True), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            codes, absmax = encode_moment(values, True)
            results.append((codes, absmax, decode_moment(codes, absmax, True)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_moments_of_any_strides_and_of_nothing() -> None:
    values = moments((40, 30), True)
    codes, absmax = encode_moment(values.t(), True)
    expected, expected_absmax = encode_moment(values.t().contiguous(), True)
    assert torch.equal(codes, expected) and torch.equal(absmax, expected_absmax)
    codes, absmax = encode_moment(torch.zeros(0, 3), False)
    assert codes.shape == (0, 3) and absmax.shape == (0,)
    assert decode_moment(codes, absmax, False).shape == (0, 3)


def test_empty_moments_are_those_of_zeros() -> None:
    parameter = torch.zeros(3, 171)
    state1, state2, absmax1, absmax2 = empty_moments(parameter)
    for (codes, absmax), signed in (((state1, absmax1), True), ((state2, absmax2), False)):
        expected, expected_absmax = encode_moment(parameter, signed)
        assert torch.equal(codes, expected) and torch.equal(absmax, expected_absmax)


def test_a_second_moment_never_becomes_zero() -> None:
    values = torch.full((256,), 1e-30)
    values[0] = 1.0
    assert float(decode_moment(*encode_moment(values, False), False).min()) > 0


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(TypeError, match=r"encode_moment: moment must be float32, got torch.bfloat16"):
        encode_moment(torch.zeros(3, dtype=torch.bfloat16), True)
    codes, absmax = encode_moment(torch.zeros(300), True)
    with pytest.raises(TypeError, match="decode_moment: codes must be uint8"):
        decode_moment(codes.int(), absmax, True)
    with pytest.raises(ValueError, match=r"decode_moment: absmax must be \[2\]"):
        decode_moment(codes, absmax[:1], True)
