"""LT-SFT: train everything once to find which entries matter, go back, and train those alone.

    1. full      all linear weights are trained
    2. select    the K entries with the largest |θ - θ₀| over all layers; exactly K, ties to the earlier one
    3. rewind    every parameter has its bits from before 1 again; the optimizer starts without state
    4. sparse    the K entries are trained: θ = θ₀ + φ, φ in sparse deltas beside the frozen weights

With several iterations each adds its share of the K entries to those before, and goes back to where it started.

What phase 4 trains, its gradient and the state of the optimizer are of K entries, and no other entry can move, weight
decay and momentum or not. Weight decay pulls φ to 0, which is θ to θ₀.

Source: Composable Sparse Fine-Tuning for Cross-Lingual Transfer, Ansell et al. 2022 (arXiv:2110.07560), section 3. The
published code masks gradients only, so that weight decay moves all of θ toward 0, and selects more than K where scores
are equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from peftkern.formats.sparse_indices import SparseIndices
from peftkern.nn.sparse_linear import SparseDelta
from peftkern.ops.lora_linear import FLOAT_DTYPES
from peftkern.ops.select_top import select_top
from peftkern.select.hand_over import drop_state
from peftkern.select.method import logger
from peftkern.sparse.budget import check_density, total_entries
from peftkern.sparse.layers import base_layer, linear_layers, weight_shape
from peftkern.sparse.method import SparseMethod


@dataclass(frozen=True)
class Phase:
    """Updates from ``begin`` to before ``end``, counted from 0 over the run."""

    iteration: int
    full: bool
    begin: int
    end: int


def phases_of(steps: int, iterations: int, full_share: float) -> list[Phase]:
    """The phases of a run; every one has an update at least.

    Raises:
        ValueError: there are not two updates for every iteration.
    """
    if steps < 2 * iterations:
        raise ValueError(
            f"LotteryTicket: a run of {iterations} iterations needs {2 * iterations} updates at least, got {steps}"
        )
    phases = []
    for iteration in range(iterations):
        begin, end = steps * iteration // iterations, steps * (iteration + 1) // iterations
        full = min(max(round(full_share * (end - begin)), 1), end - begin - 1)
        phases += [Phase(iteration, True, begin, begin + full), Phase(iteration, False, begin + full, end)]
    return phases


class LotteryTicket(SparseMethod):
    """Sparse fine-tuning of the entries that full fine-tuning moves most.

    The linear layers must be dense: the first phase trains their weights. Everything else (embeddings, norms, biases,
    the head that gives logits) is frozen in both phases, but for what ``dense`` names.

    All parameters of both phases belong to the optimizer from the start, so that checkpoints fit whatever phase they
    are from; it has state for those in training alone. A copy of the dense weights is held until `finish`.

    The Trainer's learning-rate schedule runs once in every phase, where it is one of transformers' (a `LambdaLR`); in a
    loop of one's own, `repeat_schedule` does that.

    Args:
        density: share of the entries of all trained linear layers.
        count: number of entries instead, over all layers.
        iterations: how often entries are selected.
        full_share: share of the updates that the full phase gets; of 13 epochs, 3 are full in the published runs.
        full_l1: factor of Σ|θ - θ₀| / N in the loss of the full phase, N being the number of all parameters. Its
            gradient is added once an update, after clipping; what ``dense`` names is left out.
        sparse_l1: likewise of Σ|φ| / N in the sparse phase.
        targets: ``"all-linear"``, a regular expression for whole names, or last parts of names, as for `linear_layers`.
        dense: names of modules or parameters that both phases train whole, such as a classification head, separated by
            commas; the last parts of names will do. The update holds them as they are.
        name: of the deltas.

    Raises:
        ValueError: an argument is out of range.
    """

    label = "lt-sft"

    def __init__(
        self,
        density: float = 0.01,
        count: int | None = None,
        iterations: int = 1,
        full_share: float = 0.25,
        full_l1: float = 0.0,
        sparse_l1: float = 0.0,
        targets: str | list[str] = "all-linear",
        dense: str | None = None,
        name: str = "default",
    ) -> None:
        super().__init__(name)
        check_density("LotteryTicket", density)
        if iterations < 1:
            raise ValueError(f"LotteryTicket: iterations must be at least 1, got {iterations}")
        if not 0 < full_share < 1:
            raise ValueError(f"LotteryTicket: full_share must be between 0 and 1, got {full_share}")
        for argument, value in (("full_l1", full_l1), ("sparse_l1", sparse_l1)):
            if not value >= 0:
                raise ValueError(f"LotteryTicket: {argument} must be at least 0, got {value}")
        self._density, self._count, self._iterations = density, count, iterations
        self._full_share, self._full_l1, self._sparse_l1 = full_share, full_l1, sparse_l1
        self._targets = targets
        self._dense_names = [part.strip() for part in (dense or "").split(",") if part.strip()]
        self._layers: dict[str, _Layer] = {}
        self._whole: dict[str, _Rewindable] = {}
        self._phases: list[Phase] = []
        self._phase: Phase | None = None
        self._entries = 0
        self._parameters = 0
        self._bits = 0

    # ---- what is trained

    def prepare(self, model: nn.Module) -> None:
        """Put empty deltas on the layers, freeze what is not trained, and copy what is.

        Raises:
            ValueError: a layer is quantized, shares its weight, or carries a PEFT adapter; ``targets`` or ``dense``
                match nothing; there are fewer entries than ``count``.
        """
        super().prepare(model)
        if self._layers:
            return
        try:
            layers = _dense_layers(model, self._targets)
            dense = _named_parameters(model, self._dense_names)
            sizes = [weight.numel() for weight in layers.values()]
            entries = total_entries("LotteryTicket", sum(sizes), self._density, self._count)
            empty = {name: SparseIndices.empty(weight.shape, weight.device) for name, weight in layers.items()}
            self.take(model, empty, (*layers.values(), *dense.values()))
        except (ValueError, TypeError):
            self.model = None
            raise
        self._entries, self._dense = entries, tuple(dense)
        self._parameters = sum(parameter.numel() for parameter in model.parameters())
        self._layers = {name: _Layer(_Rewindable.of(layers[name]), delta) for name, delta in self.deltas.items()}
        self._whole = {name: _Rewindable.of(parameter) for name, parameter in dense.items()}
        self._bits = sum(_sum_of_bits(layer.weight.start) for layer in self._layers.values())

    def parameters(self) -> Iterator[nn.Parameter]:
        """What any of the phases trains: the linear weights, the values of their deltas, and what is dense."""
        self.prepared()
        for layer in self._layers.values():
            yield layer.weight.parameter
            yield layer.delta.values
        for dense in self._whole.values():
            yield dense.parameter

    def start(self, optimizer: torch.optim.Optimizer, steps: int | None = None) -> None:
        """Begin, or go on where the checkpoint that ``optimizer`` was loaded from ends.

        Raises:
            ValueError: ``steps`` is not known, or too small for two phases in every iteration; or the checkpoint is of
                another number of updates, or of another base.
        """
        if steps is None:
            raise ValueError("LotteryTicket: start needs the number of updates, of which both phases get a share")
        self._phases = phases_of(steps, self._iterations, self._full_share)
        super().start(optimizer, steps)
        self._enter(self._phase_at(self.steps_done))

    def before_update(self) -> None:
        """Adds the gradients of the L1 terms."""
        phase = self._running()
        for layer in self._layers.values():
            if phase.full:
                layer.pull_weight(self._full_l1 / self._parameters)
            else:
                layer.pull_values(self._sparse_l1 / self._parameters)

    def after_update(self) -> None:
        """At the end of a full phase: selects and rewinds."""
        phase = self._running()
        if self.steps_done < phase.end:
            return
        if phase.full:
            self._select(phase)
            self._rewind()
        if phase is not self._phases[-1]:
            self._enter(self._phase_at(self.steps_done))

    def finish(self) -> None:
        """The deltas stay; everything asks for a gradient as it did before, but for the weights beneath them.

        A run that was stopped in its full phase keeps the differences of the entries that are selected then.
        """
        if self._phase is not None and self._phase.full:
            logger.warning("LotteryTicket: stopped in the full phase; keeps its %d largest differences", self._entries)
            self._select(self._phase, keep_differences=True)
            for layer in self._layers.values():
                layer.weight.rewind()
        for layer in self._layers.values():
            layer.act(full=False)
            layer.weight.forget()
        for dense in self._whole.values():
            dense.forget()
        self._phase = None
        super().finish()

    # ---- the learning rate

    def repeat_schedule(self, scheduler: Any) -> None:
        """Let ``scheduler`` run from its start to its end in every phase, in place of once over the run.

        Args:
            scheduler: a `torch.optim.lr_scheduler.LambdaLR`, such as transformers makes; of another one a warning is
                logged, and it stays as it is.
        """
        scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
        if not isinstance(scheduler, LambdaLR):
            logger.warning("LotteryTicket: %s is not restarted for each phase", type(scheduler).__name__)
            return
        scheduler.lr_lambdas = [self._in_phases(factor) for factor in scheduler.lr_lambdas]

    def _in_phases(self, factor: Any) -> Any:
        def factor_in_phase(step: int) -> Any:
            phase, steps = self._phase_at(step), self._phases[-1].end
            return factor((step - phase.begin) * steps / (phase.end - phase.begin))

        return factor_in_phase

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, optimizer, **kwargs)
        self.repeat_schedule(kwargs.get("lr_scheduler"))

    # ---- phases

    def _phase_at(self, step: int) -> Phase:
        return next((phase for phase in self._phases if step < phase.end), self._phases[-1])

    def _running(self) -> Phase:
        self.started()
        assert self._phase is not None
        return self._phase

    def _enter(self, phase: Phase) -> None:
        begins = phase.full and self.steps_done == phase.begin
        self._phase = phase
        for layer in self._layers.values():
            layer.act(phase.full)
        if begins:
            for dense in self._whole.values():
                dense.keep()
            drop_state(self.started(), self.parameters())

    @torch.no_grad()
    def _select(self, phase: Phase, keep_differences: bool = False) -> None:
        layers = list(self._layers.values())
        before = self._entries * phase.iteration // self._iterations
        wanted = self._entries * (phase.iteration + 1) // self._iterations - before
        found = select_top(
            [layer.weight.parameter for layer in layers],
            wanted,
            score="difference",
            other=[layer.weight.start for layer in layers],
            exclude=[layer.delta.indices.flat() for layer in layers],
        )
        for layer, flat in zip(layers, found, strict=True):
            layer.add(flat, layer.difference_at(flat) if keep_differences else torch.zeros(len(flat)))

    def _rewind(self) -> None:
        for layer in self._layers.values():
            layer.weight.rewind()
        for dense in self._whole.values():
            dense.rewind()
        drop_state(self.started(), self.parameters())

    # ---- between runs

    def state(self) -> dict[str, Any]:
        whole = {name: dense.start.clone() for name, dense in self._whole.items()}
        return {**super().state(), "steps": self.steps, "start": self._bits, "dense": whole}

    def load_state(self, state: dict[str, Any]) -> None:
        if state["steps"] != self.steps:
            raise ValueError(
                f"LotteryTicket: the checkpoint is of a run of {state['steps']} updates, whose phases a run of "
                f"{self.steps} would move; go on with {state['steps']}"
            )
        if state["start"] != self._bits:
            raise ValueError(
                "LotteryTicket: the weights that were prepared are not those that the checkpoint's run started from; "
                "prepare the base model, and load the checkpoint's weights into it afterwards"
            )
        super().load_state(state)
        for name, dense in self._whole.items():
            dense.start.copy_(state["dense"][name])


# ---- parts of a model


@dataclass
class _Rewindable:
    """A parameter and a copy of it."""

    parameter: nn.Parameter
    start: Tensor

    @classmethod
    def of(cls, parameter: nn.Parameter) -> _Rewindable:
        return cls(parameter, parameter.detach().clone())

    @torch.no_grad()
    def keep(self) -> None:
        self.start.copy_(self.parameter)

    @torch.no_grad()
    def rewind(self) -> None:
        self.parameter.copy_(self.start)

    def forget(self) -> None:
        self.start = self.start.new_empty(0)


@dataclass
class _Layer:
    """A linear layer: its weight, which starts at θ₀, and its delta φ."""

    weight: _Rewindable
    delta: SparseDelta

    def act(self, full: bool) -> None:
        """Train the weight or the values. What the delta holds acts in both phases."""
        self.weight.parameter.requires_grad_(full)
        self.delta.values.requires_grad_(not full)
        self.delta.active = len(self.delta) > 0

    @torch.no_grad()
    def difference_at(self, flat: Tensor) -> Tensor:
        """θ - θ₀ of the weight, float32."""
        now, start = self.weight.parameter.reshape(-1)[flat], self.weight.start.reshape(-1)[flat]
        return now.float() - start.float()

    @torch.no_grad()
    def add(self, flat: Tensor, values: Tensor) -> None:
        """Give the delta more entries."""
        delta = self.delta
        merged, order = torch.cat([delta.indices.flat(), flat]).sort()
        indices = SparseIndices.from_flat(merged, delta.shape)
        delta.replace_(indices, torch.cat([delta.values, values.to(delta.values)])[order])

    @torch.no_grad()
    def pull_weight(self, factor: float) -> None:
        """Add ``factor`` · sign(θ - θ₀) to the gradient of the weight."""
        gradient, delta = self.weight.parameter.grad, self.delta
        if gradient is None or factor == 0:
            return
        difference = self.weight.parameter.float() - self.weight.start.float()
        difference.view(-1)[delta.indices.flat()] += delta.values.float()
        gradient.add_(difference.sign_(), alpha=factor)

    @torch.no_grad()
    def pull_values(self, factor: float) -> None:
        """Add ``factor`` · sign(φ) to the gradient of the values."""
        if self.delta.values.grad is not None and factor > 0:
            self.delta.values.grad.add_(self.delta.values.sign(), alpha=factor)


def _sum_of_bits(tensor: Tensor) -> int:
    """Of the bits of every number, read as an integer: alike in whatever order they are summed."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(tensor.view(integers[tensor.element_size()]).sum(dtype=torch.int64))


def _dense_layers(model: nn.Module, targets: str | list[str]) -> dict[str, nn.Parameter]:
    """The weights of the layers to train.

    Raises:
        ValueError: one cannot be trained itself.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(
            "LotteryTicket: the model carries PEFT adapters, and the full phase trains the weights themselves; call "
            "merge_and_unload() first, or use RoSA"
        )
    weights: dict[str, nn.Parameter] = {}
    holders = [id(p) for module in model.modules() for p in module._parameters.values()]
    for name, layer in linear_layers(model, targets).items():
        weight = base_layer(layer)._parameters["weight"]
        assert weight is not None
        if weight.dtype not in FLOAT_DTYPES or tuple(weight.shape) != weight_shape(layer):
            raise ValueError(
                f"LotteryTicket: {name} is quantized ({weight.dtype}), and the full phase trains dense weights; load "
                "the model without quantization, or use SpIEL or RoSA, which find their entries over quantized weights"
            )
        if holders.count(id(weight)) > 1:
            raise ValueError(f"LotteryTicket: {name} shares its weight with another module; leave it out of targets")
        weights[name] = weight
    return weights


def _named_parameters(model: nn.Module, names: list[str]) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for name in names:
        own = {key: p for key, p in model.named_parameters() if f".{name}." in f".{key}."}
        if not own:
            raise ValueError(f"LotteryTicket: dense names {name!r}, and the model has no such module or parameter")
        found |= own
    return found
