"""RoSA: low-rank adapters and sparse deltas together, where the gradient says that sparse ones are worth most.

    y = x (W + S)ᵀ + s D(x) Aᵀ Bᵀ + b          S [out, in] sparse with fixed entries

After a warm-up in which the adapters are trained alone, the gradient of every weight is looked at for some batches, and
the entries with the largest mean square (or mean) become those of S. From then on both are trained.

One batch needs no memory but that of the chosen entries: its gradient is looked at in tiles, layer by layer, as the
backward pass reaches them. Sums over several batches are kept on the CPU, 4 bytes for every entry of the weights. The
weights may be quantized.

Source: RoSA: Accurate Parameter-Efficient Fine-Tuning via Robust Adaptation, Nikdan et al. 2024 (arXiv:2401.04679),
sections 3 and 4. The published code keeps columns as 16-bit integers, which wrap beyond 32767; here they have 32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.formats.sparse_indices import SparseIndices
from peftkern.ops.importance import accumulate_importance_
from peftkern.ops.select_top import select_top
from peftkern.select.method import logger
from peftkern.sparse.budget import check_density
from peftkern.sparse.collect import LayerGradients, gradient_tiles, top_of_gradient
from peftkern.sparse.layers import base_layer, detach, linear_layers, weight_shape
from peftkern.sparse.method import SparseMethod

STATISTICS = {"mean_squared": "square", "mean": "sum"}
"""What is selected by, and the term of `peftkern.ops.accumulate_importance_` that it is a sum of."""


@dataclass(frozen=True)
class Schedule:
    """What is trained when.

    Attributes:
        adapters: whether adapters are trained.
        deltas: whether deltas are.
        warm_up: updates before gradients are looked at.
    """

    adapters: bool
    deltas: bool
    warm_up: int = 0

    @classmethod
    def read(cls, text: str) -> Schedule:
        """``"wl64"`` (64 updates of warm-up, then both), ``"lora_only"`` or ``"spa_only"``.

        Raises:
            ValueError: it is none of them.
        """
        if text == "lora_only":
            return cls(adapters=True, deltas=False)
        if text == "spa_only":
            return cls(adapters=False, deltas=True)
        match = re.fullmatch(r"wl(\d+)", text)
        if match is None:
            raise ValueError(f"RoSA: schedule must be 'lora_only', 'spa_only', or 'wl' and a number, got {text!r}")
        return cls(adapters=True, deltas=True, warm_up=int(match[1]))


class GradientStatistic:
    """The largest entries of one matrix by the mean, or the mean square, of its gradients in some batches.

    Args:
        shape: [out, in].
        entries: how many are chosen.
        batches: how many are looked at; those that come later are not.
        statistic: a name of `STATISTICS`.
    """

    def __init__(self, shape: tuple[int, int], entries: int, batches: int, statistic: str) -> None:
        self.batches_seen = 0
        self.total: Tensor | None = None
        self._flat: Tensor | None = None
        self._shape, self._entries, self._batches = shape, entries, batches
        self._term = STATISTICS[statistic]

    def add(self, x: Tensor, grad: Tensor) -> None:
        """Take in the gradient dyᵀ x of a batch: x [tokens, in], dy [tokens, out]."""
        if self.batches_seen == self._batches:
            return
        self.batches_seen += 1
        if self._batches == 1:
            self._flat = top_of_gradient(x, grad, self._entries)
            return
        if self.total is None:
            self.total = torch.zeros(self._shape)
        for first, tile in gradient_tiles(x, grad):
            accumulate_importance_(self.total[first : first + len(tile)], tile.cpu(), self._term)

    def top(self) -> Tensor:
        """Flat indices, ascending int64; ties to the lower one. None at all where no batch has reached the layer."""
        if self._flat is not None:
            return self._flat
        if self.total is None:
            return torch.empty(0, dtype=torch.int64)
        return select_top([self.total], self._entries)[0]

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        tensors = {"total": self.total, "flat": self._flat}
        kept = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
        return {"batches_seen": self.batches_seen, **kept}

    def load(self, state: dict[str, Any]) -> None:
        """Go back to where `state` was read."""
        self.batches_seen = state["batches_seen"]
        self.total, self._flat = state.get("total"), state.get("flat")


class RoSA(SparseMethod):
    """Train LoRA adapters and sparse deltas of fixed entries.

    Adapters that the model has are trained; a model without gets some from PEFT. To save them in PEFT's format, wrap
    the model first: ``peft.get_peft_model(model, config)``; a Trainer asks for that too where bitsandbytes has
    quantized the weights. All else is frozen. The deltas are empty until their entries are chosen, at the end of an
    update; adapters are trained while gradients are looked at.

    `update` is the sparse part alone.

    Args:
        density: share of every matrix that its delta has.
        schedule: ``"wl64"``: 64 updates of the adapters alone, then both; ``"lora_only"`` or ``"spa_only"``.
        num_gradients: how many batches are looked at.
        statistic: ``"mean_squared"`` or ``"mean"`` of the gradients; for one batch they are the same.
        rank, alpha, dropout: of adapters that are made here.
        targets: ``"all-linear"``, a regular expression for whole names, or last parts of names, as for `linear_layers`.
        name: of the deltas, and of adapters that are made here.

    Raises:
        ValueError: an argument is out of range.
    """

    label = "rosa"

    def __init__(
        self,
        density: float = 0.003,
        schedule: str = "wl0",
        num_gradients: int = 1,
        statistic: str = "mean_squared",
        rank: int = 8,
        alpha: float = 8.0,
        dropout: float = 0.0,
        targets: str | list[str] = "all-linear",
        name: str = "default",
    ) -> None:
        super().__init__(name)
        check_density("RoSA", density)
        if statistic not in STATISTICS:
            raise ValueError(f"RoSA: statistic must be one of {sorted(STATISTICS)}, got {statistic!r}")
        for argument, number in (("num_gradients", num_gradients), ("rank", rank)):
            if number < 1:
                raise ValueError(f"RoSA: {argument} must be at least 1, got {number}")
        if not 0 <= dropout < 1:
            raise ValueError(f"RoSA: dropout must be from 0 to below 1, got {dropout}")
        self._schedule = Schedule.read(schedule)
        self._density, self._batches, self._statistic = density, num_gradients, statistic
        self._adapter = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}
        self._targets = targets
        self._lora: list[nn.Parameter] = []
        self._gradients: dict[str, GradientStatistic] = {}
        self._watching: LayerGradients | None = None

    @property
    def chosen(self) -> bool:
        """Whether the deltas have their entries."""
        return any(len(delta) for delta in self.deltas.values())

    def prepare(self, model: nn.Module) -> None:
        """Make adapters where there are none, attach empty deltas, and freeze the rest.

        Raises:
            ValueError: ``targets`` matches nothing, a layer cannot carry a delta, or adapters are there but not to be
                trained, or are no LoRA.
        """
        super().prepare(model)
        if self.deltas or self._lora:
            return
        try:
            self._prepare(model)
        except (ValueError, TypeError):
            self.model = None
            raise

    def _prepare(self, model: nn.Module) -> None:
        layers = linear_layers(model, self._targets)
        adapters = _check_adapters(model) if self._schedule.adapters else []
        shapes = {name: weight_shape(base_layer(layer)) or (0, 0) for name, layer in layers.items()}
        empty = {name: SparseIndices.empty(shape, _device(base_layer(layers[name]))) for name, shape in shapes.items()}
        self.take(model, empty if self._schedule.deltas else {}, adapters)
        try:
            if self._schedule.adapters and not adapters:
                adapters = _inject(model, list(layers), self._adapter, self._name)
        except BaseException:
            self._undo(model)
            raise
        self._lora = adapters
        for parameter in self.parameters():  # PEFT freezes what it has not made
            parameter.requires_grad_(True)
        for name in self.deltas:
            entries = max(1, round(self._density * math.prod(shapes[name])))
            self._gradients[name] = GradientStatistic(shapes[name], entries, self._batches, self._statistic)
        self._activate()

    def _undo(self, model: nn.Module) -> None:
        if self.deltas:
            detach(model, self._name)
        self.deltas = {}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._asked.get(name, parameter.requires_grad))

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the adapters, and the values of the deltas."""
        yield from self._lora
        yield from super().parameters()

    def start(self, optimizer: torch.optim.Optimizer, steps: int | None = None) -> None:
        """Begin, or go on from the checkpoint that ``optimizer`` has loaded.

        Raises:
            ValueError: the warm-up leaves no update for the deltas; or the checkpoint is of another method or of other
                layers.
        """
        if self._schedule.deltas and steps is not None and self._schedule.warm_up >= steps:
            raise ValueError(
                f"RoSA: the warm-up is {self._schedule.warm_up} updates long, and the run {steps}; shorten it, for "
                f"example schedule='wl{steps // 4}'"
            )
        super().start(optimizer, steps)
        self._watch()

    def after_update(self) -> None:
        """Gives the deltas their entries, where enough batches have been looked at."""
        seen = [one.batches_seen for one in self._gradients.values()]
        if self._watching is not None and seen and max(seen) >= self._batches:
            self._choose()
        self._watch()

    def finish(self) -> None:
        self._stop_watching()
        super().finish()

    # ---- the entries

    def _watch(self) -> None:
        """Watch gradients between the end of the warm-up and the choice, and only there."""
        if not self._schedule.deltas or self.chosen or self.steps_done < self._schedule.warm_up:
            self._stop_watching()
        elif self._watching is None:
            model = self.prepared()
            layers = {name: model.get_submodule(name) for name in self.deltas}
            self._watching = LayerGradients(layers, lambda name, x, grad: self._gradients[name].add(x, grad))

    def _stop_watching(self) -> None:
        if self._watching is not None:
            self._watching.close()
        self._watching = None

    @torch.no_grad()
    def _choose(self) -> None:
        unseen = [name for name, one in self._gradients.items() if one.batches_seen == 0]
        if unseen:
            logger.warning(
                "RoSA: no gradient has reached %d layers, which stay without a delta: %s", len(unseen), unseen
            )
        for name, delta in self.deltas.items():
            flat = self._gradients[name].top().to(delta.values.device)
            values = torch.zeros(len(flat), dtype=delta.values.dtype, device=delta.values.device)
            delta.replace_(SparseIndices.from_flat(flat, delta.shape), values)
        self._gradients = {}
        self._activate()

    def _activate(self) -> None:
        """An empty delta takes no part: an optimizer would keep a state of no entries for it."""
        for delta in self.deltas.values():
            delta.active = len(delta) > 0

    # ---- between runs

    def state(self) -> dict[str, Any]:
        return {**super().state(), "gradients": {name: one.state() for name, one in self._gradients.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        if self.chosen:
            self._gradients = {}
        for name, saved in state["gradients"].items():
            self._gradients[name].load(saved)
        self._activate()


# ---- adapters


def _check_adapters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the model's LoRA adapters that are trained; none where it has no adapters.

    Raises:
        ValueError: it has adapters of another kind, or they are all frozen.
    """
    configs: Any = getattr(model, "peft_config", None)
    if not configs:
        return []
    kinds = {str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()}
    if kinds != {"LORA"}:
        raise ValueError(f"RoSA: the model's adapters are {', '.join(sorted(kinds))}, and must be LORA")
    trained = [parameter for parameter in _lora_parameters(model) if parameter.requires_grad]
    if not trained:
        raise ValueError("RoSA: the model's adapters are frozen; load them with is_trainable=True")
    return trained


def _lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


def _inject(model: nn.Module, names: list[str], options: dict[str, Any], adapter: str) -> list[nn.Parameter]:
    """Make adapters on the layers called ``names``. Returns their parameters."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=names, **options), model, adapter_name=adapter)
    return _lora_parameters(model)


def _device(layer: nn.Module) -> torch.device:
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight.device
