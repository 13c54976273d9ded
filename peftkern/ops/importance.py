"""Sums over batches that tell how much entries of a weight matter.

    "sum"      total += g                "square"   total += g²               "product"  total += g ⊙ other
    importance_dot(g, d) = Σ g ⊙ d
    probe_dot(g, w, s) = Σ g ⊙ (w - s)

g is a gradient. A total of [rows] takes the sums over rows. "product" with the difference of two models is the
gradient of a mask over that difference; its sum, `importance_dot`, is the predicted change of the loss. `probe_dot` is
that of a weight w that was s, without a tensor for the difference.

Arithmetic is in float32, differences and products rounded before they are added; sums over entries are in float64 in an
order that depends on shapes alone, and are rounded to float32 once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.formats import VALUE_DTYPES

KINDS = {"sum": False, "square": False, "product": True}
"""Names of terms, and whether they take a second tensor."""


def accumulate_importance_(
    total: Tensor, gradient: Tensor, kind: str, other: Tensor | None = None, *, backend: str | None = None
) -> None:
    """Add one gradient to a running total, in place.

    Args:
        total: float32, contiguous, of the shape of ``gradient``, or [rows] for sums over each ``gradient[i]``.
        gradient: float32, bfloat16 or float16, any shape and strides.
        kind: ``"sum"``, ``"square"`` or ``"product"``.
        other: for "product": float32, bfloat16 or float16, of the shape of ``gradient``.
        backend: name of the backend that must run it; ``None`` lets the table decide.

    Raises:
        ValueError: unknown ``kind``; a shape or device does not fit.
        TypeError: a dtype or type does not fit.
        BackendError: a forced backend cannot run the call.
    """
    _check_kind(kind, other)
    _check_pair("accumulate_importance_", "gradient", gradient, "other", other)
    _check_total(total, gradient)
    with torch.no_grad():
        arguments = (total.detach(), gradient.detach(), kind, None if other is None else other.detach())
        registry.run("accumulate_importance", *arguments, backend=backend)
    torch.autograd.graph.increment_version(total)


def importance_dot(gradient: Tensor, delta: Tensor, *, backend: str | None = None) -> Tensor:
    """Σ gradient ⊙ delta over all entries, a float32 tensor without dimensions on their device.

    Args:
        gradient: float32, bfloat16 or float16, any shape and strides.
        delta: likewise, of the same shape and on the same device.
        backend: name of the backend that must run it; ``None`` lets the table decide.

    Raises:
        ValueError: shapes or devices differ.
        TypeError: a dtype or type does not fit.
        BackendError: a forced backend cannot run the call.
    """
    _check_pair("importance_dot", "gradient", gradient, "delta", delta)
    with torch.no_grad():
        result: Tensor = registry.run("importance_dot", gradient.detach(), delta.detach(), backend=backend)
    return result


def probe_dot(gradient: Tensor, weight: Tensor, saved: Tensor, *, backend: str | None = None) -> Tensor:
    """Σ gradient ⊙ (weight - saved) over all entries, a float32 tensor without dimensions on their device.

    Args:
        gradient: float32, bfloat16 or float16, any shape and strides.
        weight: of the shape of ``gradient`` and on its device; float32, bfloat16 or float16, any strides.
        saved: what ``weight`` was, of its dtype.
        backend: name of the backend that must run it; ``None`` lets the table decide.

    Raises:
        ValueError: shapes or devices differ.
        TypeError: a dtype or type does not fit.
        BackendError: a forced backend cannot run the call.

    Source: GreenTrainer, Huang et al. 2024 (arXiv:2309.13192), section 3.2.
    """
    _check_pair("probe_dot", "gradient", gradient, "weight", weight)
    _check_pair("probe_dot", "weight", weight, "saved", saved)
    if saved.dtype != weight.dtype:
        raise TypeError(f"probe_dot: saved must be {weight.dtype} as weight is, got {saved.dtype}")
    with torch.no_grad():
        arguments = (gradient.detach(), weight.detach(), saved.detach())
        result: Tensor = registry.run("probe_dot", *arguments, backend=backend)
    return result


# ---- checks


def _check_kind(kind: str, other: Any) -> None:
    if kind not in KINDS:
        raise ValueError(f"accumulate_importance_: kind must be one of {sorted(KINDS)}, got {kind!r}")
    if KINDS[kind] != (other is not None):
        needs = "needs other" if KINDS[kind] else "takes no other"
        raise ValueError(f"accumulate_importance_: kind {kind!r} {needs}")


def _check_pair(caller: str, first: str, a: Any, second: str, b: Any) -> None:
    for name, tensor in ((first, a), (second, b)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{caller}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in VALUE_DTYPES:
            raise TypeError(f"{caller}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise ValueError(f"{caller}: {name} must be dense, got {tensor.layout}; use {name}.to_dense()")
        if tensor.shape != a.shape or tensor.device != a.device:
            raise ValueError(
                f"{caller}: {second} must be {list(a.shape)} on {a.device} as {first} is; got {list(tensor.shape)} on "
                f"{tensor.device}"
            )


def _check_total(total: Any, gradient: Tensor) -> None:
    if not isinstance(total, Tensor):
        raise TypeError(f"accumulate_importance_: total must be a tensor, got {type(total).__name__}")
    if total.dtype != torch.float32:
        raise TypeError(f"accumulate_importance_: total must be float32, got {total.dtype}")
    fits = total.shape == gradient.shape or total.shape == gradient.shape[:1]
    if not fits or total.device != gradient.device or not total.is_contiguous():
        raise ValueError(
            f"accumulate_importance_: total must be {list(gradient.shape)} or {list(gradient.shape[:1])} on "
            f"{gradient.device}, contiguous; got {list(total.shape)} on {total.device} with strides {total.stride()}"
        )


# ---- reference


@registry.register("accumulate_importance", "reference")
def accumulate_importance_reference(total: Tensor, gradient: Tensor, kind: str, other: Tensor | None) -> None:
    """:func:`accumulate_importance_` in plain PyTorch, without its checks."""
    g = gradient.float()
    if kind == "square":
        g = g * g
    elif kind == "product":
        assert other is not None
        g = g * other.float()
    if total.shape == gradient.shape:
        total += g
    else:
        total.copy_(total.double() + g.flatten(1).sum(dim=1, dtype=torch.float64))


@registry.register("importance_dot", "reference")
def importance_dot_reference(gradient: Tensor, delta: Tensor) -> Tensor:
    """:func:`importance_dot` in plain PyTorch, without its checks."""
    return (gradient.float() * delta.float()).sum(dtype=torch.float64).float()


@registry.register("probe_dot", "reference")
def probe_dot_reference(gradient: Tensor, weight: Tensor, saved: Tensor) -> Tensor:
    """:func:`probe_dot` in plain PyTorch, without its checks."""
    return importance_dot_reference(gradient, weight.float() - saved.float())
