"""AdamW in place, its update masked or scaled, with the age of a parameter or of each of its entries.

    m ← m + (1 - β₁)(g - m)                        v ← β₂ v + (1 - β₂) g²
    u = η (m / (1 - β₁ᵗ)) / (√v / √(1 - β₂ᵗ) + ε) + η λ p
    p ← p - s u

t is the number of updates that an entry has had, this one included. s masks and scales the *update*: decay is part of
u, and an entry with s = 0 keeps p, m, v and its age. (Scaling the gradient instead changes nothing: the constant
cancels between m and √v.)

Arithmetic is in float32, one operation after the other without fused multiply-adds, and p is rounded to nearest once.
The coefficients are computed in float64 and rounded to float32; `Coefficients` holds them. Backends that keep to this
order agree bit for bit.

8-bit moments are codes into the dynamic codebooks, signed for m and unsigned for v, with one scale, the greatest
magnitude, per block of 256 entries in row-major order. A v that is not 0 never rounds to 0: divided by its root, m
would explode. A block without trained entries stays as it is. Frozen entries of other blocks keep p and their age,
while their moments are rounded anew when the scale of their block changes; moments that are 0 stay 0.

Source: Decoupled Weight Decay Regularization, Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2; 8-bit
Optimizers via Block-wise Quantization, Dettmers et al. 2022 (arXiv:2110.02861), section 2.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.formats import VALUE_DTYPES, BitMask, codebook
from peftkern.formats.quantized_tensor import block_count

MOMENT_BLOCK_SIZE = 256
_ZERO_CODES = (127, 0)  # of the first and the second moment

Scale = float | Tensor | BitMask | None
"""What the update is multiplied by: a number, one for each row, or 1 at the kept entries and 0 elsewhere."""


@dataclass(frozen=True)
class Coefficients:
    """The numbers of one update, each exactly a float32.

    Attributes:
        lr: η.
        mean_weight: 1 - β₁.
        square_decay: β₂.
        square_weight: 1 - β₂.
        eps: ε.
        decay: η λ.
        mean_correction: 1 / (1 - β₁ᵗ); 1 where entries have ages.
        root_correction: 1 / √(1 - β₂ᵗ); 1 where entries have ages.
        corrections: [ages, 2] float32, both by t, where entries have ages; older ones take the last row.
    """

    lr: float
    mean_weight: float
    square_decay: float
    square_weight: float
    eps: float
    decay: float
    mean_correction: float
    root_correction: float
    corrections: Tensor | None


def adamw_(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    scale: Scale = None,
    backend: str | None = None,
) -> None:
    """One update of ``parameter`` and its moments, in place.

    Args:
        parameter: float32, bfloat16 or float16, any shape.
        gradient: of the shape and device of ``parameter``, float32, bfloat16 or float16.
        exp_avg: m, float32, contiguous, of the shape of ``parameter``.
        exp_avg_sq: v, likewise.
        lr: η.
        betas: (β₁, β₂), both at least 0 and below 1.
        eps: ε.
        weight_decay: λ.
        step: t, from 1 on; or the updates that each entry has had before this one, int32 of the shape of
            ``parameter``, contiguous, which are counted up in place.
        scale: s. A tensor is [rows] float32, one for each row ``parameter[i]``; a `BitMask` has the parameter's shape.
        backend: name of the backend that must run it; ``None`` lets the table decide.

    Raises:
        ValueError: a shape, device, layout or number does not fit.
        TypeError: a dtype or type does not fit.
        BackendError: a forced backend cannot run the call.
    """
    _check_common("adamw_", parameter, gradient, step, scale)
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check_state("adamw_", name, moment, parameter.shape, torch.float32, parameter.device)
    coefficients, age = coefficients_of(parameter.device, lr, betas, eps, weight_decay, step)
    moments = (exp_avg, exp_avg_sq)
    _run("adamw", (parameter, gradient, *moments, coefficients, age, scale), backend)


def adamw_8bit_(
    parameter: Tensor,
    gradient: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    scale: Scale = None,
    backend: str | None = None,
) -> None:
    """:func:`adamw_` with moments of 8 bits.

    Args:
        state1: codes of m, uint8, contiguous, of the shape of ``parameter``.
        state2: codes of v, likewise.
        absmax1: [⌈entries / 256⌉] float32, the scales of m's blocks.
        absmax2: [⌈entries / 256⌉] float32, those of v's.

    The other arguments, and what is raised, are those of `adamw_`. :func:`empty_moments` makes the first state.
    """
    _check_common("adamw_8bit_", parameter, gradient, step, scale)
    moments = (state1, state2, absmax1, absmax2)
    _check_codes("adamw_8bit_", parameter, moments)
    coefficients, age = coefficients_of(parameter.device, lr, betas, eps, weight_decay, step)
    _run("adamw_8bit", (parameter, gradient, *moments, coefficients, age, scale), backend)


def adamw_probe_(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    scale: Scale = None,
    backend: str | None = None,
) -> None:
    """What :func:`adamw_` would make of ``parameter``, to be undone: moments and ages are only read.

    ``parameter`` becomes what the update would make it, bit for bit, and ``gradient`` what ``parameter`` was. Copying
    it back undoes the probe without a second copy of anything.

    Args:
        gradient: of the dtype of ``parameter``; it is overwritten, entries with scale 0 as well.
        exp_avg: m; ``None``, for both moments, where they are zero.
        exp_avg_sq: v, likewise.
        step: t, of the update that is tried; or the updates that each entry has had.

    The other arguments, and what is raised, are those of `adamw_`.

    Source: GreenTrainer, Huang et al. 2024 (arXiv:2309.13192), section 3.2: the step whose gain it predicts.
    """
    _check_probe("adamw_probe_", parameter, gradient, step, scale)
    if (exp_avg is None) != (exp_avg_sq is None):
        raise TypeError("adamw_probe_: exp_avg and exp_avg_sq must both be tensors or both be None")
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if moment is not None:
            _check_state("adamw_probe_", name, moment, parameter.shape, torch.float32, parameter.device)
    coefficients, age = coefficients_of(parameter.device, lr, betas, eps, weight_decay, step)
    _run_probe("adamw_probe", (parameter, gradient, exp_avg, exp_avg_sq, coefficients, age, scale), backend)


def adamw_8bit_probe_(
    parameter: Tensor,
    gradient: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    scale: Scale = None,
    backend: str | None = None,
) -> None:
    """:func:`adamw_probe_` with moments of 8 bits, as :func:`adamw_8bit_` has them; they are only read."""
    _check_probe("adamw_8bit_probe_", parameter, gradient, step, scale)
    moments = (state1, state2, absmax1, absmax2)
    _check_codes("adamw_8bit_probe_", parameter, moments)
    coefficients, age = coefficients_of(parameter.device, lr, betas, eps, weight_decay, step)
    _run_probe("adamw_8bit_probe", (parameter, gradient, *moments, coefficients, age, scale), backend)


def _run(operation: str, arguments: tuple[Any, ...], backend: str | None) -> None:
    parameter, gradient, *rest, scale = arguments
    if isinstance(scale, float | int):
        scale = _float32(scale)
        if scale == 0:
            return
    with torch.no_grad():
        registry.run(operation, parameter.detach(), gradient.detach(), *rest, scale, backend=backend)
    # native kernels write past autograd, which has to learn that what it saved has changed
    torch.autograd.graph.increment_version(parameter)


def _run_probe(operation: str, arguments: tuple[Any, ...], backend: str | None) -> None:
    parameter, gradient, *_, scale = arguments
    if isinstance(scale, float | int) and _float32(scale) == 0:
        with torch.no_grad():
            gradient.copy_(parameter)
        return
    _run(operation, arguments, backend)
    torch.autograd.graph.increment_version(gradient)


# ---- checks


def _check_common(caller: str, parameter: Any, gradient: Any, step: Any, scale: Any) -> None:
    for name, value in (("parameter", parameter), ("gradient", gradient)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{caller}: {name} must be a tensor, got {type(value).__name__}")
        if value.layout != torch.strided:
            raise ValueError(f"{caller}: {name} must be dense, got {value.layout}; use {name}.to_dense()")
        if value.dtype not in VALUE_DTYPES:
            raise TypeError(f"{caller}: {name} must be float32, bfloat16 or float16, got {value.dtype}")
    if gradient.shape != parameter.shape:
        raise ValueError(
            f"{caller}: gradient must have the shape of parameter, {list(parameter.shape)}; got {list(gradient.shape)}"
        )
    if gradient.device != parameter.device:
        raise ValueError(f"{caller}: gradient is on {gradient.device} and parameter on {parameter.device}")
    check_scale(caller, parameter, scale)
    if isinstance(step, Tensor):
        _check_state(caller, "step", step, parameter.shape, torch.int32, parameter.device)
    elif isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"{caller}: step must be an int or an int32 tensor, got {type(step).__name__}")
    elif step < 1:
        raise ValueError(f"{caller}: step must be at least 1, the number of this update; got {step}")


def _check_probe(caller: str, parameter: Any, gradient: Any, step: Any, scale: Any) -> None:
    _check_common(caller, parameter, gradient, step, scale)
    if gradient.dtype != parameter.dtype:
        raise TypeError(
            f"{caller}: gradient must be {parameter.dtype} as parameter is, whose values it takes; got {gradient.dtype}"
        )


def _check_codes(caller: str, parameter: Tensor, moments: tuple[Any, Any, Any, Any]) -> None:
    blocks = torch.Size([block_count(parameter.numel(), MOMENT_BLOCK_SIZE)])
    for name, codes in zip(("state1", "state2"), moments[:2], strict=True):
        _check_state(caller, name, codes, parameter.shape, torch.uint8, parameter.device)
    for name, absmax in zip(("absmax1", "absmax2"), moments[2:], strict=True):
        _check_state(caller, name, absmax, blocks, torch.float32, parameter.device)


def _check_state(
    caller: str, name: str, tensor: Any, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{caller}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise TypeError(f"{caller}: {name} must be {dtype}, got {tensor.dtype}")
    if tensor.shape != shape or tensor.device != device or not tensor.is_contiguous():
        raise ValueError(
            f"{caller}: {name} must be {list(shape)} on {device}, contiguous; got {list(tensor.shape)} on "
            f"{tensor.device} with strides {tensor.stride()}"
        )


def check_scale(caller: str, parameter: Tensor, scale: Any) -> None:
    """Raise where ``scale`` is no scale for ``parameter``; reads no values of a tensor.

    Raises:
        TypeError: it is none of the types of `Scale`, or a tensor of another dtype.
        ValueError: its shape or device differs, or the number is negative, infinite or NaN.
    """
    if scale is None:
        return
    if isinstance(scale, BitMask):
        scale.validate()
        if scale.shape != parameter.shape or scale.device != parameter.device:
            raise ValueError(
                f"{caller}: scale must be a BitMask of {list(parameter.shape)} on {parameter.device}; got one of "
                f"{list(scale.shape)} on {scale.device}"
            )
    elif isinstance(scale, Tensor):
        _check_state(caller, "scale", scale, parameter.shape[:1], torch.float32, parameter.device)
        if parameter.dim() == 0:
            raise ValueError(f"{caller}: scale must be a number for a parameter without rows, got a tensor")
    elif isinstance(scale, bool) or not isinstance(scale, float | int):
        raise TypeError(f"{caller}: scale must be a number, a tensor, a BitMask or None, got {type(scale).__name__}")
    elif not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"{caller}: scale must be finite and at least 0, got {scale}")


# ---- coefficients


def coefficients_of(
    device: torch.device, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int | Tensor
) -> tuple[Coefficients, Tensor | None]:
    """The coefficients of an update, and the ages where ``step`` holds those; see `adamw_` for arguments and errors."""
    beta1, beta2 = betas
    for name, beta in (("betas[0]", beta1), ("betas[1]", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"adamw_: {name} must be at least 0 and below 1, got {beta}")
    age = step if isinstance(step, Tensor) else None
    mean_correction, root_correction = (1.0, 1.0) if isinstance(step, Tensor) else corrections_at(step, betas)
    coefficients = Coefficients(
        lr=_float32(lr),
        mean_weight=_float32(1 - beta1),
        square_decay=_float32(beta2),
        square_weight=_float32(1 - beta2),
        eps=_float32(eps),
        decay=_float32(lr * weight_decay),
        mean_correction=mean_correction,
        root_correction=root_correction,
        corrections=None if age is None else _corrections((beta1, beta2), device),
    )
    return coefficients, age


def _float32(value: float) -> float:
    return ctypes.c_float(value).value


def corrections_at(step: int, betas: tuple[float, float]) -> tuple[float, float]:
    """1 / (1 - β₁ᵗ) and 1 / √(1 - β₂ᵗ), each exactly a float32."""
    beta1, beta2 = betas
    return _float32(1 / (1 - beta1**step)), _float32(1 / math.sqrt(1 - beta2**step))


@lru_cache(maxsize=8)
def _corrections(betas: tuple[float, float], device: torch.device) -> Tensor:
    """[ages, 2] float32: row t is `corrections_at` t, up to where both are 1; row 0 is not used."""
    # below half a unit in the last place of 1, βᵗ changes neither correction
    last = max(1 if beta == 0 else math.ceil(-26 * math.log(2) / math.log(beta)) for beta in betas)
    rows = [(1.0, 1.0), *(corrections_at(age, betas) for age in range(1, last + 1))]
    return torch.tensor(rows, dtype=torch.float32, device=device)


# ---- 8-bit moments


def empty_moments(parameter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """state1, state2, absmax1 and absmax2 of moments that are all zero."""
    state1, state2 = (
        torch.full(parameter.shape, code, dtype=torch.uint8, device=parameter.device) for code in _ZERO_CODES
    )
    blocks = block_count(parameter.numel(), MOMENT_BLOCK_SIZE)
    absmax1, absmax2 = (torch.zeros(blocks, dtype=torch.float32, device=parameter.device) for _ in _ZERO_CODES)
    return state1, state2, absmax1, absmax2


def moment_values(signed: bool, device: torch.device) -> Tensor:
    """What each code of a moment stands for, before its block's scale: [256] float32, ascending."""
    return codebook("int8_blockwise" if signed else "uint8_blockwise", device)


@lru_cache(maxsize=8)
def moment_magnitudes(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The magnitudes of the codes from 0 to 1, [n] float32, and the bounds between them, [n - 1] float32.

    A value has the magnitude whose number is the count of bounds strictly below it. Bounds are the middles, but for the
    first one without a sign, 0.
    """
    values = moment_values(signed, device)
    magnitudes = values[values >= 0]
    bounds = (magnitudes[:-1] + magnitudes[1:]) / 2
    if not signed:
        bounds[0] = 0.0
    return magnitudes, bounds


def encode_moment(moment: Tensor, signed: bool, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """A moment as codes, uint8 of its shape, and the scales of its blocks, [⌈entries / 256⌉] float32.

    Args:
        moment: float32, of any shape.
        signed: whether it is the first moment; the second has no sign.
        backend: name of the backend that must run it; ``None`` lets the table decide.

    Raises:
        TypeError: the moment is not float32.
        BackendError: a forced backend cannot run the call.
    """
    if moment.dtype != torch.float32:
        raise TypeError(f"encode_moment: moment must be float32, got {moment.dtype}")
    codes, absmax = registry.run("encode_moment", moment.detach(), signed, backend=backend)
    return codes, absmax


def decode_moment(codes: Tensor, absmax: Tensor, signed: bool, *, backend: str | None = None) -> Tensor:
    """The moment that :func:`encode_moment` made ``codes`` and ``absmax`` of: float32, of the shape of ``codes``.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: the number of scales does not fit.
        BackendError: a forced backend cannot run the call.
    """
    if codes.dtype != torch.uint8 or absmax.dtype != torch.float32:
        raise TypeError(f"decode_moment: codes must be uint8 and absmax float32, got {codes.dtype} and {absmax.dtype}")
    blocks = block_count(codes.numel(), MOMENT_BLOCK_SIZE)
    if absmax.shape != (blocks,) or absmax.device != codes.device:
        raise ValueError(
            f"decode_moment: absmax must be [{blocks}] on {codes.device}, got {list(absmax.shape)} on {absmax.device}"
        )
    moment: Tensor = registry.run("decode_moment", codes, absmax, signed, backend=backend)
    return moment


@registry.register("encode_moment", "reference")
def quantize_moment(moment: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """:func:`encode_moment` in plain PyTorch, without its checks."""
    bounds = moment_magnitudes(signed, moment.device)[1]
    flat = moment.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % MOMENT_BLOCK_SIZE)).view(-1, MOMENT_BLOCK_SIZE)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks / torch.where(absmax == 0, 1.0, absmax)[:, None]
    codes = torch.bucketize(scaled.abs(), bounds, out_int32=True)
    if signed:  # 127 negative codes, then 0, 127 positive ones, and 1, which has no negative
        codes = torch.where(scaled.signbit(), 127 - codes.clamp(max=127), 127 + codes)
    return codes.to(torch.uint8).view(-1)[: flat.numel()].view(moment.shape), absmax


@registry.register("decode_moment", "reference")
def dequantize_moment(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """:func:`decode_moment` in plain PyTorch, without its checks."""
    values = moment_values(signed, codes.device)[codes.reshape(-1).int()]
    return (values * absmax.repeat_interleave(MOMENT_BLOCK_SIZE)[: codes.numel()]).view(codes.shape)


# ---- reference


@registry.register("adamw", "reference")
def adamw_reference(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    coefficients: Coefficients,
    age: Tensor | None,
    scale: Scale,
) -> None:
    """:func:`adamw_` in plain PyTorch, without its checks. ``scale`` is no number 0."""
    factor = _factor(parameter, scale)
    trained = None if factor is None else factor != 0
    _count_up(age, trained)
    new_mean, new_square = _new_moments(gradient.float(), exp_avg, exp_avg_sq, coefficients)
    _write(parameter, _updated(parameter.float(), new_mean, new_square, coefficients, age, factor), trained)
    _write(exp_avg, new_mean, trained)
    _write(exp_avg_sq, new_square, trained)


@registry.register("adamw_8bit", "reference")
def adamw_8bit_reference(
    parameter: Tensor,
    gradient: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    coefficients: Coefficients,
    age: Tensor | None,
    scale: Scale,
) -> None:
    """:func:`adamw_8bit_` in plain PyTorch, without its checks. ``scale`` is no number 0."""
    mean = dequantize_moment(state1, absmax1, signed=True)
    square = dequantize_moment(state2, absmax2, signed=False)
    adamw_reference(parameter, gradient, mean, square, coefficients, age, scale)
    trained = _trained_blocks(parameter, scale)
    for moment, codes, absmax, signed in ((mean, state1, absmax1, True), (square, state2, absmax2, False)):
        new_codes, new_absmax = quantize_moment(moment, signed)
        entries = trained.repeat_interleave(MOMENT_BLOCK_SIZE)[: codes.numel()].view(codes.shape)
        _write(codes, new_codes, entries)
        _write(absmax, new_absmax, trained)


@registry.register("adamw_probe", "reference")
def adamw_probe_reference(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    coefficients: Coefficients,
    age: Tensor | None,
    scale: Scale,
) -> None:
    """:func:`adamw_probe_` in plain PyTorch, without its checks. ``scale`` is no number 0."""
    before = parameter.clone()
    mean, square = (
        parameter.new_zeros(parameter.shape, dtype=torch.float32) if moment is None else moment.clone()
        for moment in (exp_avg, exp_avg_sq)
    )
    age = None if age is None else age.clone()
    adamw_reference(parameter, gradient, mean, square, coefficients, age, scale)
    gradient.copy_(before)


@registry.register("adamw_8bit_probe", "reference")
def adamw_8bit_probe_reference(
    parameter: Tensor,
    gradient: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    coefficients: Coefficients,
    age: Tensor | None,
    scale: Scale,
) -> None:
    """:func:`adamw_8bit_probe_` in plain PyTorch, without its checks. ``scale`` is no number 0."""
    mean = dequantize_moment(state1, absmax1, signed=True)
    square = dequantize_moment(state2, absmax2, signed=False)
    adamw_probe_reference(parameter, gradient, mean, square, coefficients, age, scale)


def _factor(parameter: Tensor, scale: Scale) -> Tensor | None:
    """The scale as a float32 tensor that broadcasts against the parameter."""
    if scale is None:
        return None
    if isinstance(scale, BitMask):
        return scale.mask().float()
    if isinstance(scale, Tensor):
        return scale.view(-1, *[1] * (parameter.dim() - 1))
    return torch.tensor(scale, dtype=torch.float32, device=parameter.device)


def _trained_blocks(parameter: Tensor, scale: Scale) -> Tensor:
    """[blocks] bool: whether any entry of a block of moments is trained."""
    factor = _factor(parameter, scale)
    blocks = block_count(parameter.numel(), MOMENT_BLOCK_SIZE)
    if factor is None:
        return torch.ones(blocks, dtype=torch.bool, device=parameter.device)
    trained = (factor != 0).expand(parameter.shape).reshape(-1)
    padded = torch.nn.functional.pad(trained, (0, -trained.numel() % MOMENT_BLOCK_SIZE))
    return padded.view(-1, MOMENT_BLOCK_SIZE).any(dim=1)


def _write(target: Tensor, new: Tensor, where: Tensor | None) -> None:
    new = new.to(target.dtype)
    target.copy_(new if where is None else torch.where(where, new, target))


def _count_up(age: Tensor | None, trained: Tensor | None) -> None:
    if age is not None:
        age += 1 if trained is None else trained.to(age.dtype)


def _new_moments(gradient: Tensor, mean: Tensor, square: Tensor, c: Coefficients) -> tuple[Tensor, Tensor]:
    # multiplications and additions apart: fused operators such as lerp and addcmul round once where this rounds twice
    return mean + (gradient - mean) * c.mean_weight, square * c.square_decay + gradient * gradient * c.square_weight


def _updated(
    parameter: Tensor, mean: Tensor, square: Tensor, c: Coefficients, age: Tensor | None, factor: Tensor | None
) -> Tensor:
    mean_correction, root_correction = _entry_corrections(c, age)
    root = square.double().sqrt().float()  # rounded to nearest, which PyTorch's float32 root on the CPU is not
    step = mean * (mean_correction * c.lr) / (root * root_correction + c.eps) + parameter * c.decay
    return parameter - (step if factor is None else step * factor)


def _entry_corrections(c: Coefficients, age: Tensor | None) -> tuple[Tensor, Tensor]:
    if age is None:
        return torch.tensor(c.mean_correction), torch.tensor(c.root_correction)
    assert c.corrections is not None
    rows = age.clamp(max=c.corrections.shape[0] - 1).long()
    return c.corrections[rows, 0], c.corrections[rows, 1]
