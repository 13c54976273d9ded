"""SpIEL: sparse deltas of a fixed size whose entries move to where the gradient is.

Every ``period`` updates, in every layer with K entries:

    drop   the ⌊p K⌋ entries with the smallest |value|
    grow   as many others, with value 0, so that K stays

"gradient" (SpIEL-AG) scores entries to grow by |Σ g|, summed over ``window`` updates at K candidates: the entries with
the largest |g| in the first batch of the window. An entry that is both dropped and grown is left alone. Newcomers have
the optimizer's state as if they had been trained in the window with their mean gradient all along, and its age.

"momentum" (SpIEL-MA) needs no gradient but that of the entries it has. Every row and every column of a matrix has an
accumulator, as in the optimizer SM3, and an entry that it does not have is scored by the product of the two:

    ν = min(rᵢ, cⱼ) + gᵢⱼ²          rᵢ = max of ν over the entries of row i,  cⱼ likewise of column j

p is 1 the first time, and then falls from ``rate`` to 0 over the run. The dense gradient of a layer is never there: it
is looked at in tiles, and the weights may be quantized.

Source: Scaling Sparse Fine-Tuning to Large Language Models, Ansell et al. 2024 (arXiv:2401.16405), section 3. The
published code forms the dense gradient of every layer in every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.formats.sparse_indices import SparseIndices
from peftkern.nn.sparse_linear import SparseDelta
from peftkern.ops.select_top import select_top
from peftkern.optim.adamw import AdamW, seeded_moments
from peftkern.sparse.budget import check_density, entries_per_layer, random_entries, total_entries
from peftkern.sparse.collect import LayerGradients, gradient_at, top_of_gradient
from peftkern.sparse.layers import base_layer, linear_layers, weight_shape
from peftkern.sparse.method import SparseMethod

VARIANTS = ("gradient", "momentum")
SCHEDULES = ("linear", "cosine")


# ---- which entries


@dataclass
class Candidates:
    """Entries that may be grown, and their gradients in the window.

    Attributes:
        indices: which.
        update: gradient of the update that is being computed, [candidates] float32.
        total, total_square: sums over updates of it and of its square.
        updates: how many.
    """

    indices: SparseIndices
    update: Tensor
    total: Tensor
    total_square: Tensor
    updates: int = 0

    @classmethod
    def at(cls, flat: Tensor, shape: tuple[int, int]) -> Candidates:
        """With sums of zero."""
        zeros = torch.zeros(3, len(flat), device=flat.device)
        return cls(SparseIndices.from_flat(flat, shape), *zeros)

    def end_update(self) -> None:
        """Add the gradient of an update that is complete."""
        self.total += self.update
        self.total_square += self.update.square()
        self.update.zero_()
        self.updates += 1


@dataclass(frozen=True)
class Change:
    """The entries that a layer has from now on.

    Attributes:
        flat: ascending int64.
        source: for each of them the place that it had before, -1 for newcomers.
    """

    flat: Tensor
    source: Tensor

    @property
    def newcomers(self) -> Tensor:
        """Flat indices of entries that were not there, ascending."""
        return self.flat[self.source < 0]


def drop_and_grow(flat: Tensor, values: Tensor, share: float, candidates: Tensor, scores: Tensor) -> Change:
    """Replace the ⌊share · K⌋ smallest of ``values`` by the candidates with the largest scores.

    Ties go to the lower index: it is kept, or grown.

    Args:
        flat: [K] int64, ascending: where ``values`` are.
        values: [K] floating-point.
        share: from 0 to 1.
        candidates: [n] int64, ascending, in any relation to ``flat``. Those that are kept are passed over. Where fewer
            are left than are dropped, fewer are dropped.
        scores: [n] floating-point, read by their magnitude.
    """
    dropped = math.floor(share * len(flat))
    while True:
        kept = flat[select_top([values], len(flat) - dropped)[0]]
        passed_over = torch.isin(candidates, kept).nonzero().reshape(-1)
        room = len(candidates) - len(passed_over)
        if room >= dropped:
            break
        dropped = room
    grown = candidates[select_top([scores], dropped, exclude=[passed_over])[0]]
    return _change(flat, torch.cat([kept, grown]).sort().values)


def drop_and_grow_outer(flat: Tensor, values: Tensor, share: float, rows: Tensor, columns: Tensor) -> Change:
    """Replace the ⌊share · K⌋ smallest of ``values`` by the entries outside of ``flat`` with the largest rᵢ cⱼ.

    Args:
        flat, values, share: as for `drop_and_grow`; fewer are dropped where fewer are outside.
        rows: r, [out] float32.
        columns: c, [in] float32.
    """
    dropped = min(math.floor(share * len(flat)), len(rows) * len(columns) - len(flat))
    kept = flat[select_top([values], len(flat) - dropped)[0]]
    grown = select_top([rows], dropped, score="outer", other=[columns], exclude=[flat])[0]
    return _change(flat, torch.cat([kept, grown]).sort().values)


def _change(before: Tensor, after: Tensor) -> Change:
    if len(before) == 0:
        return Change(after, after.new_full((len(after),), -1))
    places = torch.searchsorted(before, after).clamp_(max=len(before) - 1)
    return Change(after, torch.where(before[places] == after, places, -1))


@dataclass
class Accumulators:
    """Of the squared gradients of a matrix: r, [out] float32, and c, [in] float32."""

    rows: Tensor
    columns: Tensor

    def add(self, gradient: Tensor, indices: SparseIndices, decay: float) -> None:
        """Take in the gradient of an update, [entries]. Rows and columns without an entry stay as they are."""
        rows, columns = indices.row_of_entries(), indices.columns.long()
        least = torch.minimum(self.rows[rows], self.columns[columns])
        squares = gradient.float().square()
        sums = decay * least + (1 - decay) * squares if decay else least + squares
        self.rows.scatter_reduce_(0, rows, sums, "amax", include_self=False)
        self.columns.scatter_reduce_(0, columns, sums, "amax", include_self=False)


# ---- the method


class SpIEL(SparseMethod):
    """Train a fixed number of entries of every linear layer, and move them to where the gradient is.

    The entries of a layer are in proportion to its size, at random places at first. Everything but the deltas is
    frozen. The optimizer has to be `peftkern.optim.AdamW` or `AdamW8bit`, whose state can move:

        Trainer(model, ..., callbacks=[method], optimizer_cls_and_kwargs=(peftkern.optim.AdamW, {"lr": 1e-4}))

    Weight decay pulls the values to 0, which is the weights to the base. Gradients that newcomers start from are as the
    backward pass gives them, before they are clipped.

    Args:
        density: share of the entries of all trained linear layers.
        count: number of entries instead, over all layers.
        variant: ``"gradient"`` or ``"momentum"``.
        period: updates between two changes of the entries.
        window: updates that gradients are summed over; a change comes at the end of a window.
        rate: share of the entries that the second change replaces, if it came at the start of the run.
        schedule: how that falls to 0: ``"linear"``, rate (1 - t/T), or ``"cosine"``, rate (1 + cos(π t/T)) / 2.
        decay: of "momentum": factor β of min(rᵢ, cⱼ), and 1 - β of gᵢⱼ²; 0 is the sum without factors.
        targets: ``"all-linear"``, a regular expression for whole names, or last parts of names, as for `linear_layers`.
        seed: of the first places.
        name: of the deltas.

    Attributes:
        replaced: how many entries the last change has replaced.

    Raises:
        ValueError: an argument is out of range.
    """

    label = "spiel"

    def __init__(
        self,
        density: float = 0.01,
        count: int | None = None,
        variant: str = "gradient",
        period: int = 20,
        window: int = 5,
        rate: float = 0.2,
        schedule: str = "linear",
        decay: float = 0.0,
        targets: str | list[str] = "all-linear",
        seed: int = 0,
        name: str = "default",
    ) -> None:
        super().__init__(name)
        check_density("SpIEL", density)
        for argument, word, allowed in (("variant", variant, VARIANTS), ("schedule", schedule, SCHEDULES)):
            if word not in allowed:
                raise ValueError(f"SpIEL: {argument} must be one of {list(allowed)}, got {word!r}")
        if not 1 <= window <= period:
            raise ValueError(f"SpIEL: window must be from 1 to period, {period}; got {window}")
        if not 0 <= rate <= 1:
            raise ValueError(f"SpIEL: rate must be from 0 to 1, got {rate}")
        if not 0 <= decay < 1:
            raise ValueError(f"SpIEL: decay must be from 0 to below 1, got {decay}")
        self._density, self._count, self._targets, self._seed = density, count, targets, seed
        self._variant, self._period, self._window = variant, period, window
        self._rate, self._schedule, self._decay = rate, schedule, decay
        self._candidates: dict[str, Candidates] = {}
        self._accumulators: dict[str, Accumulators] = {}
        self._watching: LayerGradients | None = None
        self.replaced = 0

    def prepare(self, model: nn.Module) -> None:
        """Put deltas of zeros at random entries, and freeze the rest.

        Raises:
            ValueError: ``targets`` matches nothing, a layer cannot carry a delta, or there are fewer entries than
                ``count``.
        """
        super().prepare(model)
        if self.deltas:
            return
        try:
            self.take(model, self._first_indices(model))
        except ValueError:
            self.model = None
            raise
        if self._variant == "momentum":
            for name, delta in self.deltas.items():
                rows, columns = (torch.zeros(size, device=delta.values.device) for size in delta.shape)
                self._accumulators[name] = Accumulators(rows, columns)

    def _first_indices(self, model: nn.Module) -> dict[str, SparseIndices]:
        shapes = {name: weight_shape(base_layer(layer)) for name, layer in linear_layers(model, self._targets).items()}
        sizes = {name: math.prod(shape) for name, shape in shapes.items() if shape is not None}
        total = total_entries("SpIEL", sum(sizes.values()), self._density, self._count)
        generator = torch.Generator().manual_seed(self._seed)
        return {
            name: SparseIndices.from_flat(random_entries(sizes[name], entries, generator), shapes[name] or (0, 0))
            for name, entries in entries_per_layer(sizes, total).items()
        }

    def start(self, optimizer: torch.optim.Optimizer, steps: int | None = None) -> None:
        """Begin, or go on from the checkpoint that ``optimizer`` has loaded.

        Raises:
            TypeError: the state of ``optimizer`` cannot move.
            ValueError: ``steps`` is not known; or the checkpoint is of another method or of other layers.
        """
        if not isinstance(optimizer, AdamW):
            raise TypeError(
                f"SpIEL: needs peftkern.optim.AdamW or AdamW8bit, whose state moves with the entries, got "
                f"{type(optimizer).__name__}; of a Trainer: optimizer_cls_and_kwargs=(peftkern.optim.AdamW, {{...}})"
            )
        if steps is None:
            raise ValueError("SpIEL: start needs the number of updates, over which the share that is replaced falls")
        super().start(optimizer, steps)
        self._watch()

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
        if self._variant == "gradient" and args.fp16:
            raise ValueError(
                "SpIEL: fp16=True scales the loss, and with it the gradients that newcomers start from; use bf16=True, "
                "or SpIEL(variant='momentum')"
            )
        super().on_train_begin(args, state, control, optimizer, **kwargs)

    def before_update(self) -> None:
        """Reads the gradient: of the candidates, or of the entries."""
        for candidates in self._candidates.values():
            candidates.end_update()
        for name, accumulators in self._accumulators.items():
            delta = self.deltas[name]
            if delta.values.grad is not None:
                accumulators.add(delta.values.grad, delta.indices, self._decay)

    def after_update(self) -> None:
        """At the end of a window: drops and grows."""
        if self.steps_done % self._period == self._window % self._period and self.steps_done < (self.steps or 0):
            self._reselect(self.share_at(self.steps_done))
        self._watch()

    def finish(self) -> None:
        self._stop_watching()
        super().finish()

    def share_at(self, step: int) -> float:
        """p, the share of the entries that a change after ``step`` updates replaces."""
        assert self.steps is not None
        if step == self._window:
            return 1.0
        progress = step / self.steps
        if self._schedule == "linear":
            return self._rate * (1 - progress)
        return self._rate * (1 + math.cos(math.pi * progress)) / 2

    # ---- the window

    def _watch(self) -> None:
        """Watch gradients in windows, and only there: hooks keep fused paths away."""
        wanted = self._variant == "gradient" and self.steps_done % self._period < self._window
        if not wanted:
            self._stop_watching()
        elif self._watching is None:
            model = self.prepared()
            layers = {name: model.get_submodule(name) for name in self.deltas}
            self._watching = LayerGradients(layers, self._receive)

    def _stop_watching(self) -> None:
        if self._watching is not None:
            self._watching.close()
        self._watching = None
        self._candidates = {}

    def _receive(self, name: str, x: Tensor, grad: Tensor) -> None:
        delta = self.deltas[name]
        if name not in self._candidates:
            flat = top_of_gradient(x, grad, len(delta))
            self._candidates[name] = Candidates.at(flat, (delta.shape[0], delta.shape[1]))
        candidates = self._candidates[name]
        candidates.update += gradient_at(x, grad, candidates.indices)

    # ---- the change

    @torch.no_grad()
    def _reselect(self, share: float) -> None:
        self.replaced = 0
        for name, delta in self.deltas.items():
            flat, values = delta.indices.flat(), delta.values
            if self._variant == "momentum":
                sums = self._accumulators[name]
                self._replace(delta, drop_and_grow_outer(flat, values, share, sums.rows, sums.columns), None)
            elif name in self._candidates:  # a layer that no token has passed has none
                candidates = self._candidates[name]
                change = drop_and_grow(flat, values, share, candidates.indices.flat(), candidates.total)
                self._replace(delta, change, candidates)
        self._candidates = {}

    def _replace(self, delta: SparseDelta, change: Change, candidates: Candidates | None) -> None:
        optimizer, old = self.started(), delta.values.detach().clone()
        assert isinstance(optimizer, AdamW)
        new = torch.where(change.source < 0, 0, old[change.source.clamp(min=0)])
        delta.replace_(SparseIndices.from_flat(change.flat, delta.shape), new)
        newcomers = change.newcomers
        self.replaced += len(newcomers)
        if candidates is None:
            optimizer.reindex(delta.values, change.source)
            return
        places, updates = torch.searchsorted(candidates.indices.flat(), newcomers), candidates.updates
        mean, mean_square = candidates.total[places] / updates, candidates.total_square[places] / updates
        moments = seeded_moments(mean, mean_square, updates, _betas(optimizer, delta.values))
        optimizer.reindex(delta.values, change.source, moments, torch.full_like(newcomers, updates, dtype=torch.int32))

    # ---- between runs

    def state(self) -> dict[str, Any]:
        candidates = {
            name: {
                "flat": one.indices.flat(),
                "total": one.total.clone(),
                "total_square": one.total_square.clone(),
                "updates": one.updates,
            }
            for name, one in self._candidates.items()
        }
        sums = {
            name: {"rows": one.rows.clone(), "columns": one.columns.clone()} for name, one in self._accumulators.items()
        }
        return {**super().state(), "candidates": candidates, "accumulators": sums}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        for name, saved in state["candidates"].items():
            delta = self.deltas[name]
            one = Candidates.at(saved["flat"].to(delta.values.device), (delta.shape[0], delta.shape[1]))
            one.total.copy_(saved["total"])
            one.total_square.copy_(saved["total_square"])
            one.updates = saved["updates"]
            self._candidates[name] = one
        for name, sums in self._accumulators.items():
            sums.rows.copy_(state["accumulators"][name]["rows"])
            sums.columns.copy_(state["accumulators"][name]["columns"])


def _betas(optimizer: AdamW, parameter: Tensor) -> tuple[float, float]:
    group = next(group for group in optimizer.param_groups if any(parameter is one for one in group["params"]))
    betas: tuple[float, float] = group["betas"]
    return betas
