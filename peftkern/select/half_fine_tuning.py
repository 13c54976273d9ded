"""Half fine-tuning: each stage trains a random half of the matrices and leaves the other half as it is.

    θ ← θ - η M ⊙ ∇L          M is 0 or 1 for a whole matrix

A frozen matrix has no gradient: its product is not formed, and the optimizer keeps no state for it. The gradient of
the activations is needed all the same below.

Source: HFT: Half Fine-Tuning for Large Language Models, Hui et al. 2024 (arXiv:2404.18466). The paper has no public
code. What it leaves open is an argument here: whether embeddings are trained, what "half" counts in attention blocks
whose keys and values are smaller than their queries, and whether a new half is drawn for a stage or for an epoch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftkern.nn.row_sliced_linear import Range, row_view
from peftkern.patch.table import format_table
from peftkern.select.hand_over import drop_state
from peftkern.select.method import Method, logger
from peftkern.select.parts import ATTENTION, FFN, Matrix, Parts, block_of, find_parts, is_norm
from peftkern.select.pieces import check_dense, check_pieces, give_back, take_pieces

UNKNOWN, NORMS, EMBEDDINGS, OTHERS = "other matrices", "norms", "embeddings", "others"
_DRAWN = (ATTENTION, FFN, UNKNOWN)
LEVELS = ("category", "layer", "model")
_LARGEST_GROUP = 12  # of whose subsets all are looked at

Key = TypeVar("Key", bound=Hashable)


# ---- the draw


def choose(
    groups: Sequence[Mapping[Key, int]], ratio: float, generator: torch.Generator, *, largest: int = _LARGEST_GROUP
) -> set[Key]:
    """A random part of the members of all groups, balanced within every group and over all of them.

    The groups are gone through in random order. In each, a subset is drawn from those that bring what is chosen so far
    nearest to ``ratio`` of what was seen so far. With matrices that count 1 each, 2 are drawn from every group of 4; of
    groups of 3, one half gives 2 and the other half 1, at random, and with an odd number of them one of the two is one
    group larger.

    Args:
        groups: the size of every member.

    Raises:
        ValueError: a group has more than ``largest`` members.
    """
    wanted = Fraction(ratio).limit_denominator(10**6)
    seen, size, chosen = 0, 0, set[Key]()
    for index in torch.randperm(len(groups), generator=generator).tolist():
        group = groups[index]
        if len(group) > largest:
            raise ValueError(f"choose: a group may have {largest} members at most, got {len(group)}")
        seen += sum(group.values())
        subset = _draw(group, wanted * seen - size, generator)
        size += sum(group[key] for key in subset)
        chosen.update(subset)
    return chosen


def _draw(group: Mapping[Key, int], wanted: Fraction, generator: torch.Generator) -> list[Key]:
    subsets = [
        [key for key, taken in zip(group, flags, strict=True) if taken]
        for flags in product((False, True), repeat=len(group))
    ]
    distances = [abs(sum(group[key] for key in subset) - wanted) for subset in subsets]
    nearest = [subset for subset, distance in zip(subsets, distances, strict=True) if distance == min(distances)]
    return nearest[int(torch.randint(len(nearest), (), generator=generator))]


# ---- the report


@dataclass(frozen=True)
class CategoryShare:
    """How much of a category is trained, in tensors and in numbers."""

    category: str
    trained: int
    total: int
    trained_entries: int
    entries: int

    @property
    def share(self) -> float:
        """The trained share of the numbers."""
        return self.trained_entries / max(self.entries, 1)


@dataclass(frozen=True)
class HalfSelection:
    """What a round of half fine-tuning trains. ``str()`` is a table.

    Attributes:
        names: of the trained parameters and row ranges, as ``model.layers.0.self_attn.q_proj.weight``, in order of the
            model. Biases are trained with their matrix.
        rows: one per category.
    """

    level: str
    ratio: float
    seed: int
    round: int
    names: tuple[str, ...]
    rows: tuple[CategoryShare, ...]

    @property
    def share(self) -> float:
        """The trained share of all parameters."""
        return sum(row.trained_entries for row in self.rows) / max(sum(row.entries for row in self.rows), 1)

    @property
    def block_share(self) -> float:
        """The trained share of the matrices in blocks."""
        rows = [row for row in self.rows if row.category in _DRAWN]
        return sum(row.trained_entries for row in rows) / max(sum(row.entries for row in rows), 1)

    def __str__(self) -> str:
        lines = [
            [row.category, f"{row.trained} of {row.total}", f"{row.trained_entries:,}", f"{row.share:.1%}"]
            for row in self.rows
        ]
        table = format_table(["trained", "tensors", "parameters", "share"], lines)
        head = f"half fine-tuning, level {self.level}, ratio {self.ratio:g}, seed {self.seed}, round {self.round}"
        return f"{head}: {self.share:.1%} of all parameters\n{table}"


# ---- what a model consists of


@dataclass(frozen=True)
class _Unit:
    """What is trained or frozen in one piece: a parameter or some rows of it, with the bias that goes with them."""

    name: str
    category: str
    block: str
    group: str
    module: str
    parameters: tuple[str, ...]
    rows: Range | None
    entries: int


def _find_units(model: nn.Module, level: str) -> list[_Unit]:
    """Every parameter of ``model``, a parameter that holds several matrices once for each.

    Raises:
        ValueError: a parameter is quantized, or is a matrix in a block whose part is not known.
    """
    parts = find_parts(model)
    check_dense("HalfFineTuning", model)
    if level == "category" and (parts.unknown or not parts.matrices):
        raise ValueError(_unknown_message(parts))
    matrices = defaultdict[str, list[Matrix]](list)
    for matrix in parts.matrices:
        matrices[f"{matrix.module}.{matrix.parameter}"].append(matrix)
    norms = {name: norm for norm in parts.norms for name in norm.parameters}
    embeddings = _embedding_names(model)
    units: list[_Unit] = []
    for name, parameter in model.named_parameters():
        module, _, own = name.rpartition(".")
        if name in matrices:
            units += [_matrix_unit(model, matrix) for matrix in matrices[name]]
        elif name in norms:
            norm = norms[name]
            units.append(_Unit(name, NORMS, norm.block, norm.parameters[0], module, (own,), None, parameter.numel()))
        elif own != "bias" or f"{module}.weight" not in matrices:
            category = _category(model, name, parts, embeddings)
            units.append(_Unit(name, category, block_of(module) or "", name, module, (own,), None, parameter.numel()))
    return units


def _matrix_unit(model: nn.Module, matrix: Matrix) -> _Unit:
    module = model.get_submodule(matrix.module)
    bias = module._parameters.get("bias") if matrix.parameter == "weight" else None
    parameters = (matrix.parameter,) if bias is None else (matrix.parameter, "bias")
    rows = None if matrix.rows is None else matrix.rows[1] - matrix.rows[0]
    bias_entries = 0 if bias is None else (rows or bias.numel())
    category = matrix.category if matrix.category in (ATTENTION, FFN) else OTHERS
    entries = matrix.entries + bias_entries
    return _Unit(matrix.name, category, matrix.block, matrix.group, matrix.module, parameters, matrix.rows, entries)


def _category(model: nn.Module, name: str, parts: Parts, embeddings: set[str]) -> str:
    if name in parts.unknown:
        return UNKNOWN
    if name in embeddings:
        return EMBEDDINGS
    return NORMS if is_norm(model.get_submodule(name.rpartition(".")[0])) else OTHERS


def _embedding_names(model: nn.Module) -> set[str]:
    """Parameters of the embeddings outside of blocks, and of the head that gives the logits."""
    modules = [m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and block_of(name) is None]
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = None if find_head is None else find_head()
    ids = {id(p) for module in [*modules, *([head] if head is not None else [])] for p in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def _unknown_message(parts: Parts) -> str:
    what = f"no part is known for {', '.join(parts.unknown[:3])}" if parts.unknown else "found no blocks with matrices"
    more = f" and {len(parts.unknown) - 3} more" if len(parts.unknown) > 3 else ""
    return f"HalfFineTuning: {what}{more}; level='layer' and level='model' do without"


# ---- the method


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"HalfFineTuning: {name} must be one of {list(allowed)}, got {value!r}")


@dataclass(frozen=True)
class _Settings:
    """What decides a draw."""

    ratio: float
    level: str
    balance: str
    embeddings: str
    norms: str
    seed: int

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"HalfFineTuning: ratio must be between 0 and 1, got {self.ratio}")
        _check_choice("level", self.level, LEVELS)
        _check_choice("balance", self.balance, ("count", "params"))
        _check_choice("embeddings", self.embeddings, ("train", "freeze"))
        _check_choice("norms", self.norms, ("half", "train", "freeze"))

    def draw(self, units: Iterable[_Unit], round: int) -> set[str]:
        """Names of the units that are trained in this round."""
        trained: set[str] = set()
        draws: dict[str, dict[str, dict[str, list[_Unit]]]] = {}
        for unit in units:
            place = self._place(unit)
            if place is None:
                trained |= {unit.name} if self._is_trained(unit) else set()
                continue
            draw, group, member = place
            draws.setdefault(draw, {}).setdefault(group, {}).setdefault(member, []).append(unit)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + round)
        for groups in draws.values():
            chosen = choose([self._sizes(group) for group in groups.values()], self.ratio, generator)
            trained |= {u.name for group in groups.values() for m in group if m in chosen for u in group[m]}
        return trained

    def _place(self, unit: _Unit) -> tuple[str, str, str] | None:
        """Draw, group and member that the unit belongs to; ``None`` where nothing is drawn."""
        if unit.category == NORMS and (self.norms != "half" or not unit.block):
            return None
        if self.level == "layer":
            return ("blocks", unit.block, unit.block) if unit.block else None
        if unit.category == NORMS:
            return NORMS, unit.block, unit.group
        if unit.category not in _DRAWN:
            return None
        return (unit.category, unit.group, unit.name) if self.level == "category" else ("all", unit.name, unit.name)

    def _is_trained(self, unit: _Unit) -> bool:
        if unit.category == EMBEDDINGS:
            return self.embeddings == "train"
        # the last norm, outside of the blocks, has no partner, and neither has a router
        return unit.category != NORMS or self.norms != "freeze"

    def _sizes(self, group: Mapping[str, Sequence[_Unit]]) -> dict[str, int]:
        if self.balance == "count":
            return dict.fromkeys(group, 1)
        return {member: sum(unit.entries for unit in units) for member, units in group.items()}

    def report(self, units: Sequence[_Unit], trained: set[str], round: int) -> HalfSelection:
        """What the draw comes to."""
        rows = []
        for category in (*_DRAWN, NORMS, EMBEDDINGS, OTHERS):
            all_ = [unit for unit in units if unit.category == category]
            on = [unit for unit in all_ if unit.name in trained]
            if all_:
                counts = len(on), len(all_), sum(u.entries for u in on), sum(u.entries for u in all_)
                rows.append(CategoryShare(category, *counts))
        names = tuple(unit.name for unit in units if unit.name in trained)
        return HalfSelection(self.level, self.ratio, self.seed, round, names, tuple(rows))


class HalfFineTuning(Method):
    """Train a random half of the matrices, another half in every round.

    At level ``"category"``, 2 of the 4 matrices of every attention are trained; of the three of a feed-forward network,
    2 in a random half of the layers and 1 in the others; and 1 of the two norms of a layer. ``"layer"`` trains half of
    the blocks, ``"model"`` half of all matrices whatever their part. The last norm, routers and classification heads
    are always trained: they have no partner.

    Where one parameter holds several matrices (``qkv_proj``, ``gate_up_proj``, ``c_attn``, the experts of a mixture),
    its row ranges become parameters of their own until `finish`, as in `peftkern.nn.row_sliced_linear`.

    A round is a stage of training: calling `prepare` after `finish`, as a second Trainer does, draws another half.
    With ``reselect="epoch"`` every epoch is a round. The optimizer then holds all matrices from the start, so that
    checkpoints fit whatever round they are from; it keeps state only for those in training, and forgets it when they
    leave. (`DistributedDataParallel` needs ``find_unused_parameters`` for that.)

    Args:
        ratio: the share that is trained.
        level: ``"category"``, ``"layer"`` or ``"model"``.
        balance: what the share counts: matrices (``"count"``, the published form) or their numbers (``"params"``), for
            models whose keys and values are smaller than their queries.
        embeddings: ``"train"`` (the published form) or ``"freeze"`` embeddings and the head that gives logits.
        norms: ``"half"``, ``"train"`` or ``"freeze"``.
        reselect: ``"stage"`` or ``"epoch"``.
        seed: the same seed draws the same halves.

    Attributes:
        report: what the present round trains; ``None`` before `prepare`.

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(
        self,
        ratio: float = 0.5,
        level: str = "category",
        balance: str = "count",
        embeddings: str = "train",
        norms: str = "half",
        reselect: str = "stage",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._settings = _Settings(ratio, level, balance, embeddings, norms, seed)
        _check_choice("reselect", reselect, ("stage", "epoch"))
        self.reselect = reselect
        self.report: HalfSelection | None = None
        self._first_round = 0
        self._units: list[_Unit] = []
        self._parameters: dict[str, list[nn.Parameter]] = {}
        self._asked: dict[str, bool] = {}

    def prepare(self, model: nn.Module) -> None:
        """Draw the first half, freeze the other one, and log both.

        Raises:
            ValueError: a parameter is quantized, the model carries adapters, or no part is known for a matrix.
            TypeError: several matrices share a parameter of a module that cannot be sliced.
        """
        super().prepare(model)
        if self._units:  # prepared, and not finished
            return
        try:
            units = _find_units(model, self._settings.level)
            check_pieces(model, units)
        except (ValueError, TypeError):
            self.model = None
            raise
        self._asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._units = units
        self._parameters = take_pieces(model, units)
        self._select(self._first_round, freeze=self.reselect == "stage")

    def start(self, optimizer: torch.optim.Optimizer, steps: int | None = None) -> None:
        super().start(optimizer, steps)
        self._select(self._round())

    def next_epoch(self) -> HalfSelection:
        """With ``reselect="epoch"``: draw another half. The Trainer does it by itself.

        Raises:
            RuntimeError: this object draws one half for a whole stage, or has not started.
        """
        if self.reselect != "epoch":
            raise RuntimeError("HalfFineTuning: reselect='stage' keeps its half; use HalfFineTuning(reselect='epoch')")
        self.started()
        return self._select(self._round() + 1)

    def finish(self) -> None:
        """Sliced layers are plain again, and every parameter asks for a gradient as it did before."""
        model = self.prepared()
        give_back(model, self._units, self._asked)
        self._first_round = self._round() + 1
        self._units, self._parameters, self.optimizer = [], {}, None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.reselect == "epoch":
            self._select(self._first_round + math.floor(state.epoch + 1e-6))

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
        # the round of the checkpoint that training goes on from, before `start` makes the optimizer forget the others
        self.on_epoch_begin(args, state, control)
        super().on_train_begin(args, state, control, optimizer, **kwargs)

    def _round(self) -> int:
        return self._first_round if self.report is None else self.report.round

    def _select(self, round: int, freeze: bool = True) -> HalfSelection:
        trained = self._settings.draw(self._units, round)
        report = self._settings.report(self._units, trained, round)
        if self.report != report:
            logger.info("%s", report)
        self.report = report
        for name, parameters in self._parameters.items():
            for parameter in parameters:
                parameter.requires_grad_(name in trained or not freeze)
        if self.optimizer is not None:
            frozen = [p for name, own in self._parameters.items() if name not in trained for p in own]
            drop_state(self.optimizer, frozen)
        return report


@torch.no_grad()
def half_reset(
    model: nn.Module,
    base_state: Mapping[str, Tensor],
    ratio: float = 0.5,
    level: str = "category",
    balance: str = "count",
    seed: int = 0,
) -> HalfSelection:
    """Set a random half of the matrices of a tuned model back to what they were before it was tuned.

    Norms, embeddings and everything else that is no matrix of a block stay as tuned.

    Args:
        base_state: of the model before tuning, ``model.state_dict()``.

    Returns:
        Which matrices were set back; "trained" reads "set back" in it.

    Raises:
        ValueError: a matrix is missing in ``base_state`` or has another shape there; the model is unchanged.

    Source: the pilot experiment of the paper above, section 2.
    """
    settings = _Settings(ratio, level, balance, "freeze", "freeze", seed)
    units = [unit for unit in _find_units(model, level) if unit.category in _DRAWN]
    reset = settings.draw(units, 0)
    chosen = [unit for unit in units if unit.name in reset]
    pairs = [pair for unit in chosen for pair in _pairs(model, base_state, unit)]
    for own, base in pairs:
        own.copy_(base)
    return settings.report(units, reset, 0)


def _pairs(model: nn.Module, base_state: Mapping[str, Tensor], unit: _Unit) -> Iterator[tuple[Tensor, Tensor]]:
    module = model.get_submodule(unit.module)
    for parameter in unit.parameters:
        name, own = f"{unit.module}.{parameter}", module.get_parameter(parameter)
        base = base_state.get(name)
        if base is None or base.shape != own.shape:
            found = "is missing" if base is None else f"has shape {list(base.shape)}"
            raise ValueError(f"half_reset: {name} must be in base_state with shape {list(own.shape)}, and {found}")
        if unit.rows is None:
            yield own, base
        else:
            yield row_view(module, parameter, own, unit.rows), row_view(module, parameter, base, unit.rows)
