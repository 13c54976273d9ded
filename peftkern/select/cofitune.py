"""CoFiTune: train some kinds of matrices in a range of layers, and those of their rows less that matter most already.

    coarse   which layers (by quarters of the stack) and which matrices are trained; all else is frozen
    fine     row i moves by (1 - Î_i) of its update, Î from `peftkern.select.unit_importance`

The published form multiplies gradients by 1 - Î. Adam divides a gradient by its own size, so that a factor that does
not change over time cancels: soft masks on gradients do nothing there. Here updates are multiplied by default.

Source: CoFiTune, Zhang et al. 2024 (arXiv:2404.10306): the coarse and the fine level.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.nn.row_sliced_linear import Range, row_dimension
from peftkern.optim import AdamW
from peftkern.patch.table import format_table
from peftkern.select.method import Method, logger
from peftkern.select.parts import Matrix, config_of, find_parts, heads_of, row_count
from peftkern.select.pieces import check_dense, check_pieces, give_back, take_pieces
from peftkern.select.unit_importance import (
    DOWN,
    HEADS,
    OBJECTIVES,
    UP,
    UnitImportance,
    check_objective,
    measure_importance,
    unit_key,
)

RANGES: dict[str, tuple[int, int]] = {
    "bottom1": (0, 1),
    "bottom2": (1, 2),
    "bottom-plus": (0, 2),
    "middle": (2, 3),
    "middle-plus": (1, 3),
    "top": (3, 4),
    "top-plus": (2, 4),
}
"""Ranges of layers: the first quarter of the stack, and the one after the last. The input's end is the bottom."""

MODULES = {"q": HEADS, "k": HEADS, "v": HEADS, "up": UP, "down": DOWN}
"""Matrices that can be trained, by their role, and the units that their rows belong to."""


def layer_range(name: str, layers: int) -> range:
    """The layers of a stack of ``layers`` that are in the range of this name.

    Quarter i begins at layer ⌊i · layers / 4⌋: where 4 does not divide them, quarters differ by one layer, and the
    first half ends in the middle, rounded down.

    Raises:
        ValueError: there is no range of this name, or no layer is in it.
    """
    if name not in RANGES:
        raise ValueError(f"CoFiTune: layers must be one of {list(RANGES)}, got {name!r}")
    first, last = RANGES[name]
    chosen = range(first * layers // 4, last * layers // 4)
    if not chosen:
        raise ValueError(
            f"CoFiTune: no layer of a stack of {layers} is in {name!r}; stacks of 4 and more have all ranges"
        )
    return chosen


def parse_modules(modules: str) -> tuple[str, ...]:
    """The roles in a list as ``"up,down"`` or ``"up+down"``, in the order of the table.

    Raises:
        ValueError: one is not known, is there twice, or there is none.
    """
    asked = [name.strip() for name in modules.replace("+", ",").split(",")]
    if not set(asked) <= set(MODULES) or len(set(asked)) != len(asked):
        raise ValueError(
            f"CoFiTune: modules must be some of {', '.join(MODULES)}, each once, as 'up,down'; got {modules!r}"
        )
    return tuple(role for role in MODULES if role in asked)


# ---- what is trained


@dataclass(frozen=True)
class _Piece:
    """A matrix that is trained, with its bias."""

    matrix: Matrix
    parameters: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.matrix.name

    @property
    def module(self) -> str:
        return self.matrix.module

    @property
    def rows(self) -> Range | None:
        return self.matrix.rows


def _find_pieces(model: nn.Module, layers: str, roles: Sequence[str]) -> list[_Piece]:
    parts = find_parts(model)
    if not parts.blocks:
        raise ValueError("CoFiTune: found no blocks with attention or feed-forward matrices that are known")
    chosen = _blocks_in(layers, parts.blocks)
    matrices = [matrix for matrix in parts.matrices if matrix.block in chosen and matrix.role in roles]
    missing = set(roles) - {matrix.role for matrix in matrices}
    if missing:
        present = sorted({matrix.role for matrix in parts.matrices if matrix.block in chosen} & set(MODULES))
        raise ValueError(
            f"CoFiTune: the model has no {', '.join(sorted(missing))} in {layers}; modules it has there: "
            f"{', '.join(present) or 'none that are known'}"
        )
    return [_Piece(matrix, _parameters_of(model, matrix)) for matrix in matrices]


def _blocks_in(layers: str, blocks: Sequence[str]) -> set[str]:
    """The blocks in the range, of every stack: an encoder and a decoder are two."""
    chosen: set[str] = set()
    for _, stack in groupby(blocks, key=lambda block: block.rpartition(".")[0]):
        names = list(stack)
        chosen.update(names[index] for index in layer_range(layers, len(names)))
    return chosen


def _parameters_of(model: nn.Module, matrix: Matrix) -> tuple[str, ...]:
    has_bias = matrix.parameter == "weight" and model.get_submodule(matrix.module)._parameters.get("bias") is not None
    return (matrix.parameter, "bias") if has_bias else (matrix.parameter,)


# ---- the report


@dataclass(frozen=True)
class ModuleShare:
    """The matrices of one role that are trained: how many, their numbers, and the mean factor of their updates."""

    role: str
    matrices: int
    entries: int
    mean_factor: float


@dataclass(frozen=True)
class CoFiTuneSelection:
    """What CoFiTune trains. ``str()`` is a table.

    Attributes:
        blocks: names of the blocks in the range.
        names: of the trained matrices, as ``model.layers.8.mlp.up_proj.weight``. Biases are trained with their matrix.
        total: numbers in the model.
    """

    layers: str
    blocks: tuple[str, ...]
    names: tuple[str, ...]
    rows: tuple[ModuleShare, ...]
    total: int

    @property
    def share(self) -> float:
        """The trained share of all parameters."""
        return sum(row.entries for row in self.rows) / max(self.total, 1)

    def __str__(self) -> str:
        lines = [[row.role, str(row.matrices), f"{row.entries:,}", f"{row.mean_factor:.3f}"] for row in self.rows]
        table = format_table(["trained", "tensors", "parameters", "mean factor"], lines)
        head = f"CoFiTune, {self.layers}: {self.blocks[0]} to {self.blocks[-1]}, {len(self.blocks)} blocks"
        return f"{head}: {self.share:.1%} of all parameters\n{table}"


# ---- the method


class CoFiTune(Method):
    """Train a few kinds of matrices in a range of layers, important rows less.

    The defaults are the range and modules that the paper reports as best: up and down projections (the gate is not
    among them) in the quarter of the layers just below the middle. `cofitune_search` looks for others.

    Where one parameter holds several matrices (``qkv_proj``, ``gate_up_proj``, ``c_attn``), the row ranges that are
    trained become parameters of their own until `finish`. Keys and values that query heads share have the largest
    importance of these heads.

    Args:
        layers: ``"bottom1"``, ``"bottom2"``, ``"middle"`` and ``"top"`` are the four quarters in order;
            ``"bottom-plus"``, ``"middle-plus"`` and ``"top-plus"`` the first, the inner and the last two of them.
        modules: some of ``q,k,v,up,down``; ``up+down`` is the same as ``up,down``.
        importance: ``"none"``: the coarse level alone; ``"kl"`` (the published form) or ``"language_modeling"``:
            measure importances on ``data`` when the model is prepared; see `peftkern.select.unit_importance`.
        dropout: of the two passes of "kl"; more than 0.
        apply_to: multiply ``"update"`` (needs `peftkern.optim.AdamW`) or ``"gradient"`` (the published form: without
            effect under Adam, see above) by 1 - importance.
        data: batches to measure importances on.
        known: importances that were measured before. Several, and what is measured, are combined by their maximum.
        seed: of the dropout.

    Attributes:
        report: what is trained; ``None`` before `prepare`.
        importance: in use; ``None`` before `prepare`, and at the coarse level alone.

    Raises:
        ValueError: an argument is none of these, or importances are to be measured without data.
    """

    def __init__(
        self,
        layers: str = "bottom2",
        modules: str = "up,down",
        importance: str = "none",
        dropout: float = 0.003,
        apply_to: str = "update",
        data: Iterable[Mapping[str, Any]] | None = None,
        known: Sequence[UnitImportance] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        layer_range(layers, 4)
        _check_importance(importance, dropout, data)
        if apply_to not in ("update", "gradient"):
            raise ValueError(f"CoFiTune: apply_to must be 'update' or 'gradient', got {apply_to!r}")
        self.layers, self.modules, self.apply_to = layers, parse_modules(modules), apply_to
        self.importance: UnitImportance | None = None
        self.report: CoFiTuneSelection | None = None
        self._measured, self._dropout, self._seed = importance, dropout, seed
        self._data, self._known = data, tuple(known)
        self._pieces: list[_Piece] = []
        self._asked: dict[str, bool] = {}
        self._parameters: dict[str, list[nn.Parameter]] = {}
        self._factors: dict[str, Tensor] = {}

    def prepare(self, model: nn.Module) -> None:
        """Measure importances, freeze all but the chosen matrices, and log what is trained.

        Raises:
            ValueError: a parameter is quantized, the model carries adapters, has no such matrices, or units without a
                known importance; or updates of Conv1D, which has its outputs in columns, would have to be multiplied.
            TypeError: several matrices share a parameter of a module that cannot be sliced.
        """
        super().prepare(model)
        if self._pieces:  # prepared, and not finished
            return
        try:
            check_dense("CoFiTune", model)
            pieces = _find_pieces(model, self.layers, self.modules)
            check_pieces(model, pieces)
            self.importance = self._combine(model)
            self._factors = self._find_factors(model, pieces)
        except BaseException:
            self.model = self.importance = None
            raise
        self._asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        total = sum(parameter.numel() for parameter in model.parameters())
        self._pieces, self._parameters = pieces, take_pieces(model, pieces)
        trained = {id(parameter) for own in self._parameters.values() for parameter in own}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        self.report = self._describe(total)
        logger.info("%s", self.report)

    def start(self, optimizer: torch.optim.Optimizer, steps: int | None = None) -> None:
        """Tell the optimizer how much of its updates each row takes.

        Raises:
            TypeError: updates are to be multiplied, and the optimizer is none of ours.
        """
        super().start(optimizer, steps)
        if self.apply_to == "gradient" or not self._factors:
            return
        if not isinstance(optimizer, AdamW):
            raise TypeError(
                f"CoFiTune: apply_to='update' needs peftkern.optim.AdamW, got {type(optimizer).__name__}; give the "
                f"Trainer optimizers=(peftkern.optim.AdamW(...), None), or use apply_to='gradient'"
            )
        for name, factor in self._factors.items():
            for parameter in self._parameters[name]:
                optimizer.set_scale(parameter, factor.to(parameter.device))

    def before_update(self) -> None:
        if self.apply_to == "update":
            return
        for piece in self._pieces:
            factor = self._factors.get(piece.name)
            for name, parameter in zip(piece.parameters, self._parameters[piece.name], strict=True):
                if factor is not None and parameter.grad is not None:
                    _multiply_rows(parameter.grad, factor, row_dimension(self._module(piece), name))

    def finish(self) -> None:
        """Sliced layers are plain again, every parameter asks for a gradient as before, updates are whole."""
        model = self.prepared()
        if isinstance(self.optimizer, AdamW) and self.apply_to == "update":
            for name in self._factors:
                for parameter in self._parameters[name]:
                    self.optimizer.set_scale(parameter, None)
        give_back(model, self._pieces, self._asked)
        self._pieces, self._parameters, self._factors, self.optimizer = [], {}, {}, None

    def _module(self, piece: _Piece) -> nn.Module:
        return self.prepared().get_submodule(piece.module)

    def _combine(self, model: nn.Module) -> UnitImportance | None:
        found = list(self._known)
        if self._measured != "none" and self._data is not None:
            found.append(measure_importance(model, self._data, self._measured, self._dropout, self._seed))
        return found[0].combined(*found[1:]) if found else None

    def _find_factors(self, model: nn.Module, pieces: Sequence[_Piece]) -> dict[str, Tensor]:
        """1 - Î for the rows of every piece."""
        if self.importance is None:
            return {}
        if self.apply_to == "update":
            for piece in pieces:
                if row_dimension(model.get_submodule(piece.module)) != 0:
                    raise ValueError(
                        f"CoFiTune: {piece.module} has its outputs in columns, and the optimizer multiplies updates of "
                        f"rows; use apply_to='gradient' (with SGD), or importance='none'"
                    )
        return {piece.name: 1 - row_importance(model, piece.matrix, self.importance) for piece in pieces}

    def _describe(self, total: int) -> CoFiTuneSelection:
        rows = []
        for role in self.modules:
            own = [piece for piece in self._pieces if piece.matrix.role == role]
            entries = sum(parameter.numel() for piece in own for parameter in self._parameters[piece.name])
            means = [float(self._factors[piece.name].mean()) if self._factors else 1.0 for piece in own]
            rows.append(ModuleShare(role, len(own), entries, sum(means) / len(means)))
        blocks = tuple(dict.fromkeys(piece.matrix.block for piece in self._pieces))
        names = tuple(piece.name for piece in self._pieces)
        return CoFiTuneSelection(self.layers, blocks, names, tuple(rows), total)


def row_importance(model: nn.Module, matrix: Matrix, importance: UnitImportance) -> Tensor:
    """Î of every row of ``matrix``, [rows] float32: of its feature, or of its head.

    Raises:
        ValueError: ``importance`` does not know these units, or not as many.
    """
    units = MODULES[matrix.role]
    key = unit_key(matrix.group, units)
    value = importance.values.get(key)
    if value is None:
        raise ValueError(f"CoFiTune: the importance of {key} is not known; measure it on this model")
    rows = row_count(model, matrix)
    heads, shared = heads_of(config_of(model, matrix.module)) if units == HEADS else (rows, rows)
    if len(value) != heads:
        raise ValueError(f"CoFiTune: {matrix.name} belongs to {heads} {units}, and the importance is of {len(value)}")
    if matrix.role in ("k", "v"):
        value = value.view(shared, heads // shared).amax(1)
    return value.repeat_interleave(rows // len(value))


def _multiply_rows(gradient: Tensor, factor: Tensor, dimension: int) -> None:
    shape = [1] * gradient.dim()
    shape[dimension] = -1
    gradient.mul_(factor.to(gradient.device).view(shape))


def _check_importance(importance: str, dropout: float, data: Any) -> None:
    if importance == "none":
        return
    if importance not in OBJECTIVES:
        raise ValueError(f"CoFiTune: importance must be one of {['none', *OBJECTIVES]}, got {importance!r}")
    check_objective("CoFiTune", importance, dropout)
    if data is None:
        raise ValueError(
            f"CoFiTune: importance={importance!r} is measured on data, which must be batches; got None. "
            f"importance='none' is the coarse level alone"
        )
