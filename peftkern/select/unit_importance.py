"""How important heads, intermediate features and outputs of feed-forward networks are, by masks that do not exist.

    y = m ⊙ u        m = 1, u one head's output or one feature;  ∂L/∂m = Σ over tokens of ∂L/∂y ⊙ u
    Î = |tanh((x - mean) / std)|        x: the sum of ∂L/∂m over batches, by tokens; mean and std over one layer

The masks are hooks, which are gone again afterwards. Heads are masked at the input of the output projection, "up" in
front of the product with the gate, "down" at the output of the feed-forward network.

Objective ``"kl"`` is the published one: two passes with dropout behind every mask, L = 0.1 · KL(second ‖ first), summed
with sign. Without dropout the passes are equal and the gradient is 0. Near an optimum of the divergence it is small and
noisy in any case; ``"language_modeling"``, |∂L/∂m| of the loss in one pass without dropout, is the stable form.

Standardising makes both tails large: a unit that matters far less than its layer's mean has a large Î as well.

Source: CoFiTune, Zhang et al. 2024 (arXiv:2404.10306). Dropout of heads is of attention weights there, and here of the
heads' outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from peftkern.nn.row_sliced_linear import Range
from peftkern.ops.importance import accumulate_importance_
from peftkern.select.parts import Matrix, config_of, find_parts, heads_of, row_count
from peftkern.select.pieces import probing

HEADS, UP, DOWN = "heads", "up", "down"
_UNITS = {"o": HEADS, "up": UP, "down": DOWN}
"""By the role of the matrix at which units are masked."""

OBJECTIVES = ("kl", "language_modeling")
_KL_FACTOR = 0.1
_FORMAT = {"format": "peftkern unit importance", "version": "1"}

Batch = Mapping[str, Any]


def unit_key(group: str, units: str) -> str:
    """Name of the units of an attention or feed-forward network, as ``model.layers.3.mlp:up``."""
    return f"{group}:{units}"


@dataclass(frozen=True, eq=False)
class UnitImportance:
    """Î of units, from 0 to 1.

    Attributes:
        values: [units] float32 on the CPU, by `unit_key`; the group is the `Matrix.group` of their matrices.
    """

    values: Mapping[str, Tensor]

    def combined(self, *others: UnitImportance) -> UnitImportance:
        """The largest importance of every unit.

        Raises:
            ValueError: the models have other units.
        """
        values = dict(self.values)
        for other in others:
            if {k: v.shape for k, v in values.items()} != {k: v.shape for k, v in other.values.items()}:
                raise ValueError("UnitImportance.combined: the two are of models with different units")
            values = {key: value.maximum(other.values[key]) for key, value in values.items()}
        return UnitImportance(values)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        safetensors.torch.save_file(dict(self.values), path, metadata=_FORMAT)

    @classmethod
    def load(cls, path: str | Path) -> UnitImportance:
        """What `save` has written.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no such file.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                if file.metadata() != _FORMAT:
                    raise ValueError(f"its metadata are {file.metadata()}, expected {_FORMAT}")
                values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dictionary
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"UnitImportance.load: {path}: {error}") from None
        for key, value in values.items():
            if value.dtype != torch.float32 or value.dim() != 1 or not bool(((value >= 0) & (value <= 1)).all()):
                raise ValueError(f"UnitImportance.load: {path}: {key} must be [units] float32 from 0 to 1")
        return cls(values)


def standardised(raw: Tensor) -> Tensor:
    """Î = |tanh((raw - mean) / std)|, std of a sample; 0 where all are equal. ``raw`` [units]; returns float32."""
    x = raw.double()
    if x.numel() < 2 or float(x.std()) == 0.0:
        return torch.zeros(x.shape, dtype=torch.float32)
    return ((x - x.mean()) / x.std()).tanh().abs().float()


def measure_importance(
    model: nn.Module, data: Iterable[Batch], objective: str = "kl", dropout: float = 0.003, seed: int = 0
) -> UnitImportance:
    """The importance of all heads, intermediate features and outputs of feed-forward networks of ``model``.

    The model is as before afterwards; no gradient of its parameters is formed. PyTorch's generators are left alone.

    Args:
        model: a causal or sequence-to-sequence language model with dense blocks.
        data: batches, of which ``model(**batch)`` gives ``logits``, and ``loss`` for "language_modeling". They are
            moved to the model's device. Positions where ``attention_mask`` is 0 do not count.
        objective: ``"kl"`` or ``"language_modeling"``; see above.
        dropout: probability to drop a number behind a mask, for "kl".
        seed: of that dropout.

    Raises:
        ValueError: an argument is out of range; the model has no units that are known, or experts that share a
            parameter; there is no batch.
        RuntimeError: a layer with units was not called, and has no importance.
    """
    check_objective("measure_importance", objective, dropout)
    sites = _find_sites(model)
    totals = {site.key: torch.zeros(site.units, dtype=torch.float64) for site in sites}
    device = next(model.parameters()).device
    tokens = 0
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), probing(model, training=objective == "kl"):
        torch.manual_seed(seed)
        for batch in data:
            moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}
            measure = _kl_gradients if objective == "kl" else _language_modeling_gradients
            gradients, count = measure(model, sites, moved, dropout)
            tokens += count
            for key, gradient in gradients.items():
                totals[key] += gradient.cpu().double()
    if tokens == 0:
        raise ValueError("measure_importance: data must hold at least one batch with a token that counts")
    return UnitImportance({key: standardised(total / tokens) for key, total in totals.items()})


def check_objective(caller: str, objective: str, dropout: float) -> None:
    """Raise `ValueError` where there is no such objective, or dropout is out of range for it."""
    if objective not in OBJECTIVES:
        raise ValueError(f"{caller}: importance must be one of {list(OBJECTIVES)}, got {objective!r}")
    if objective == "kl" and not 0.0 < dropout < 1.0:
        raise ValueError(
            f"{caller}: dropout must be between 0 and 1, got {dropout}; without it both passes are equal and their "
            f"divergence has no gradient; importance='language_modeling' needs none"
        )


# ---- objectives


def _kl_gradients(model: nn.Module, sites: list[_Site], batch: Batch, dropout: float) -> tuple[dict[str, Tensor], int]:
    with _masked(model, sites, dropout) as masks:
        # with labels, a patched model in training gives no logits
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        first, second = (model(**inputs).logits.float() for _ in range(2))
        counted = batch.get("attention_mask")
        if counted is None or counted.shape != first.shape[:-1]:
            counted = first.new_ones(first.shape[:-1])
        divergence = F.kl_div(first.log_softmax(-1), second.softmax(-1), reduction="none").sum(-1)
        loss = _KL_FACTOR * (divergence * counted).sum() / first.shape[0]
        return _gradients(loss, masks), int(counted.sum())


def _language_modeling_gradients(
    model: nn.Module, sites: list[_Site], batch: Batch, _dropout: float
) -> tuple[dict[str, Tensor], int]:
    if batch.get("labels") is None:
        raise ValueError("measure_importance: with objective 'language_modeling' every batch must have labels")
    with _masked(model, sites, dropout=0.0) as masks:
        count = int((batch["labels"] != -100).sum())
        # the loss is a mean over tokens
        gradients = _gradients(model(**batch).loss * count, masks)
        return {key: gradient.abs() for key, gradient in gradients.items()}, count


def _gradients(loss: Tensor, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(loss, list(masks.values()), allow_unused=True)
    found: dict[str, Tensor] = {}
    for key, gradient in zip(masks, gradients, strict=True):
        if gradient is None:
            raise RuntimeError(
                f"measure_importance: {key} has no gradient; its layer was not called, or its hooks were passed over"
            )
        found[key] = gradient
    return found


# ---- masks


@dataclass(frozen=True)
class _Site:
    """Where units are masked: the input of a module, its output, or some columns of that."""

    key: str
    module: str
    before: bool
    columns: Range | None
    units: int


def _find_sites(model: nn.Module) -> list[_Site]:
    sites = [_site(model, matrix) for matrix in find_parts(model).matrices if matrix.role in _UNITS]
    if not sites:
        raise ValueError("measure_importance: found no blocks with attention or feed-forward matrices that are known")
    return sites


def _site(model: nn.Module, matrix: Matrix) -> _Site:
    module = model.get_submodule(matrix.module)
    if module.get_parameter(matrix.parameter).dim() != 2:
        raise ValueError(
            f"measure_importance: {matrix.name} holds several experts in one parameter, and their outputs are out of "
            f"reach; importance='none' trains them without soft masks"
        )
    units = _UNITS[matrix.role]
    key = unit_key(matrix.group, units)
    if units == HEADS:
        return _Site(key, matrix.module, True, None, heads_of(config_of(model, matrix.module))[0])
    return _Site(key, matrix.module, False, matrix.rows, row_count(model, matrix))


@contextlib.contextmanager
def _masked(model: nn.Module, sites: list[_Site], dropout: float) -> Iterator[dict[str, Tensor]]:
    """Masks of ones by the keys of ``sites``, in effect inside of the with block."""
    device = next(model.parameters()).device
    masks = {site.key: torch.ones(site.units, device=device, requires_grad=True) for site in sites}
    handles = []
    try:
        for site in sites:
            module, put = model.get_submodule(site.module), _putter(site, masks[site.key], dropout)
            handles.append(_hook(module, site, put))
        yield masks
    finally:
        for handle in handles:
            handle.remove()


def _hook(module: nn.Module, site: _Site, put: Callable[[Tensor], Tensor]) -> Any:
    if site.before:
        return module.register_forward_pre_hook(lambda _module, inputs: (put(inputs[0]), *inputs[1:]))
    return module.register_forward_hook(lambda _module, _inputs, output: put(output))


def _putter(site: _Site, mask: Tensor, dropout: float) -> Callable[[Tensor], Tensor]:
    def put(x: Tensor) -> Tensor:
        if site.columns is None:
            return F.dropout(_apply_mask(x, mask), dropout)
        begin, end = site.columns
        return torch.cat([x[..., :begin], F.dropout(_apply_mask(x[..., begin:end], mask), dropout), x[..., end:]], -1)

    return put


class _Mask(torch.autograd.Function):
    """x [..., units * width], multiplied by a mask of ones: itself.

    dmask[unit] = Σ over tokens and the unit's width of grad ⊙ x
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.units = mask.numel()
        return torch.ops.aten._unsafe_view(x, x.shape)  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        total = torch.zeros(ctx.units, dtype=torch.float32, device=grad.device)
        by_unit = (t.reshape(-1, ctx.units, t.shape[-1] // ctx.units).transpose(0, 1) for t in (grad, x))
        accumulate_importance_(total, next(by_unit), "product", next(by_unit))
        return grad, total


_apply_mask = cast(Callable[..., Tensor], _Mask.apply)
