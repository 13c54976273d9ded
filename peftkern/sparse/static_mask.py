"""Sparse pre-training, dense fine-tuning: a random mask stays the same for all of training, and then goes.

    W ⊙ M                      M is drawn once for every matrix and keeps ⌊(1 - s) · out · in⌋ entries

The weights are zero where the mask does not keep them. So every layer computes with W as it is; what is masked is the
gradient, and no optimizer moves a zero whose gradients are all zero, with weight decay and momentum or without. That
makes `release` exact: it changes no number, and only lets the zeros be trained from then on.

Source: SPDF: Sparse Pre-training and Dense Fine-tuning for Large Language Models, Thangarasa et al. 2023
(arXiv:2303.10464). The paper has no public code. Matrices are masked alike; embeddings, norms, biases and heads are
dense.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftkern.formats import BitMask, random_group_mask, random_mask
from peftkern.formats.bit_mask import Pattern, complement
from peftkern.patch.table import format_table, pattern_of
from peftkern.select.hand_over import drop_state, hand_over
from peftkern.select.method import Method, logger
from peftkern.sparse.layers import linear_layers


@dataclass(frozen=True)
class MaskedMatrix:
    """What a mask keeps of one matrix.

    Attributes:
        layer: its name in the model.
        kept, entries: how many entries are kept, and how many there are.
    """

    layer: str
    kept: int
    entries: int


@dataclass(frozen=True)
class StaticMaskReport:
    """What is masked. ``str()`` is a table.

    Attributes:
        rows: one for every masked matrix, in order of the model.
        parameters: entries of all parameters of the model, masked or not.
    """

    seed: int
    rows: tuple[MaskedMatrix, ...]
    parameters: int

    @property
    def density(self) -> float:
        """The share of the masked matrices' entries that is kept."""
        return sum(row.kept for row in self.rows) / sum(row.entries for row in self.rows)

    @property
    def share(self) -> float:
        """The share of all parameters of the model that is trained."""
        return 1 - sum(row.entries - row.kept for row in self.rows) / self.parameters

    def __str__(self) -> str:
        groups: dict[tuple[str, int, int], int] = {}
        for row in self.rows:
            key = pattern_of(row.layer), row.kept, row.entries
            groups[key] = groups.get(key, 0) + 1
        lines = [
            [name, str(count), f"{kept:,} of {entries:,}", f"{kept / entries:.2%}"]
            for (name, kept, entries), count in groups.items()
        ]
        table = format_table(["masked", "count", "kept of each", "density"], lines)
        return f"static mask, seed {self.seed}: {self.share:.1%} of all parameters are trained\n{table}"


class StaticMask(Method):
    """Train a model from its initialisation under a random mask, to be fine-tuned dense afterwards.

    `prepare` sets what the masks do not keep to zero: use it where training begins, not on a model whose weights are to
    stay. Everything that was trained before stays trained. `finish`, as at the end of a Trainer's run, takes the hooks
    off and leaves the zeros; `release` goes on to dense training.

        sparse = StaticMask(0.75)
        Trainer(model, ..., callbacks=[sparse]).train()         # sparse pre-training
        sparse.release()
        Trainer(model, ...).train()                             # dense fine-tuning

    The masks follow from the seed and the names of the layers alone, so that another object with the same arguments
    goes on with a checkpoint.

    Args:
        sparsity: the share of every matrix that is dropped; ignored with ``pattern``.
        pattern: (n, m): keep n random entries of every m consecutive columns instead.
        targets: which linear layers, as for `peftkern.sparse.linear_layers`; ``"all-linear"`` leaves heads dense.
        seed: of the masks.

    Attributes:
        masks: by name of their layer; empty before `prepare`.
        report: ``None`` before `prepare`.

    Raises:
        ValueError: ``sparsity`` is not between 0 and 1, or ``pattern`` is none.
    """

    def __init__(
        self,
        sparsity: float = 0.75,
        *,
        pattern: Pattern | None = None,
        targets: str | Sequence[str] = "all-linear",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0.0 < sparsity < 1.0:
            raise ValueError(f"StaticMask: sparsity must be between 0 and 1, got {sparsity}")
        if pattern is not None and not 0 < pattern[0] <= pattern[1]:
            raise ValueError(f"StaticMask: pattern must be (n, m) with 1 <= n <= m, got {pattern}")
        self.sparsity, self.pattern, self.targets, self.seed = sparsity, pattern, targets, seed
        self.masks: Mapping[str, BitMask] = {}
        self.report: StaticMaskReport | None = None
        self._hooks: list[RemovableHandle] = []

    def prepare(self, model: nn.Module) -> None:
        """Draw the masks, write their zeros, and log what is kept.

        Raises:
            ValueError: a matrix is quantized, not trained, shared with another module or does not fit the pattern, the
                model carries adapters, or no layer matches. The model is as it was.
        """
        super().prepare(model)
        if self._hooks:  # prepared, and not finished
            return
        try:
            layers = _trained_layers(model, self.targets)
            masks = {name: self._draw(name, layer.weight) for name, layer in layers.items()}
        except ValueError:
            self.model = None
            raise
        for name, layer in layers.items():
            _zero(layer.weight, masks[name])
            hook = functools.partial(_kept, masks[name])
            self._hooks.append(layer.weight.register_hook(hook))  # type: ignore[no-untyped-call]
        self.masks, self.report = masks, _report(model, masks, self.seed)
        logger.info("%s", self.report)

    def finish(self) -> None:
        """The hooks go; the zeros stay, and are trained by whoever trains the model next."""
        self.prepared()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def release(self) -> None:
        """Go on dense: no number of the model changes, and every parameter asks for a gradient.

        The optimizer, if training is under way, trains all of them and begins anew: it keeps no state of the sparse
        phase. A learning rate schedule is the caller's.

        Raises:
            RuntimeError: no model was prepared.
        """
        self.finish()
        parameters = list(self.prepared().parameters())
        for parameter in parameters:
            parameter.requires_grad_(True)
        if self.optimizer is not None:
            hand_over(self.optimizer, parameters)
            drop_state(self.optimizer, parameters)

    def _draw(self, name: str, weight: Tensor) -> BitMask:
        seed = (self.seed * 1_000_003 + zlib.crc32(name.encode())) % 2**63
        shape = torch.Size(weight.shape)
        if self.pattern is not None:
            try:
                return random_group_mask(shape, self.pattern, seed).to(weight.device)
            except ValueError as error:
                raise ValueError(f"StaticMask: {name}: {error}") from error
        return random_mask(shape, complement(self.sparsity), seed).to(weight.device)


def _trained_layers(model: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Linear]:
    if hasattr(model, "peft_config"):
        raise ValueError(
            "StaticMask: the model carries PEFT adapters, and this method trains the matrices themselves; "
            "call merge_and_unload() first"
        )
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(name)
    layers: dict[str, nn.Linear] = {}
    for name, layer in linear_layers(model, targets).items():
        assert isinstance(layer, nn.Linear)
        if not layer.weight.is_floating_point():
            raise ValueError(f"StaticMask: {name} is quantized, and this method trains dense matrices; load it dense")
        if not layer.weight.requires_grad:
            raise ValueError(
                f"StaticMask: {name} is not trained; call requires_grad_(True), or leave it out of targets"
            )
        others = [holder for holder in holders[id(layer.weight)] if holder != name]
        if others:
            raise ValueError(f"StaticMask: {name} shares its weight with {others[0]}; leave it out of targets")
        layers[name] = layer
    return layers


@torch.no_grad()
def _zero(weight: Tensor, mask: BitMask) -> None:
    weight.masked_fill_(~mask.mask(), 0.0)


def _kept(mask: BitMask, gradient: Tensor) -> Tensor:
    # not a product, which would leave NaN where it was
    return gradient.masked_fill(~mask.mask().to(gradient.device), 0.0)


def _report(model: nn.Module, masks: Mapping[str, BitMask], seed: int) -> StaticMaskReport:
    rows = tuple(MaskedMatrix(name, mask.kept(), mask.shape.numel()) for name, mask in masks.items())
    return StaticMaskReport(seed, rows, sum(parameter.numel() for parameter in model.parameters()))
