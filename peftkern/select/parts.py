"""Which matrix of a model plays which part: the table of names, and the walk that finds them.

A model is a stack of blocks, the entries of a ``ModuleList`` (``model.layers.3``, ``transformer.h.3``). In a block, the
name of a parameter says its part; where one parameter holds several matrices, the sizes come from the model's
configuration. A mixture of experts has three matrices for every expert.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftkern.nn.row_sliced_linear import Range, out_features

ATTENTION, FFN, UNPAIRED = "attention", "ffn", "unpaired"


@dataclass(frozen=True)
class Matrix:
    """A matrix of a block.

    Attributes:
        module: name of the module that holds it.
        parameter: its name there.
        block: name of the block, as ``model.layers.3``.
        category: ``"attention"`` or ``"ffn"``; ``"unpaired"`` for one that belongs to neither, such as a router.
        role: ``"q"``, ``"k"``, ``"v"``, ``"o"``, ``"gate"``, ``"up"``, ``"down"``, or another name of the table.
        group: the matrices of one attention, of one feed-forward network, or of one expert have the same.
        rows: which rows of the parameter it is; ``None`` where it is all of it.
        entries: how many numbers it holds.
    """

    module: str
    parameter: str
    block: str
    category: str
    role: str
    group: str
    rows: Range | None
    entries: int

    @property
    def name(self) -> str:
        """Name of the parameter in the model, and the rows where it is not all of it."""
        parameter = f"{self.module}.{self.parameter}"
        return parameter if self.rows is None else f"{parameter}[{self.rows[0]}:{self.rows[1]}]"


@dataclass(frozen=True)
class Norm:
    """A normalisation layer of a block: the names of its parameters."""

    block: str
    parameters: tuple[str, ...]
    entries: int


@dataclass(frozen=True)
class Parts:
    """What `find_parts` found. ``unknown`` names matrices in blocks that the table has no row for."""

    matrices: tuple[Matrix, ...]
    norms: tuple[Norm, ...]
    unknown: tuple[str, ...]

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks in order."""
        return list(dict.fromkeys(matrix.block for matrix in self.matrices))


# ---- sizes of matrices that share a parameter


def heads_of(config: Any) -> tuple[int, int]:
    """How many heads queries have, and how many keys and values have, which queries share."""
    heads = config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads


def _qkv_rows(config: Any, _rows: int) -> list[int]:
    heads, shared = heads_of(config)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return [heads * head_size, shared * head_size, shared * head_size]


def _halves(_config: Any, rows: int) -> list[int]:
    return [rows // 2, rows // 2]


Sizes = Callable[[Any, int], list[int]]


@dataclass(frozen=True)
class _Row:
    """Name of a parameter in its block (the last components, without ``weight``), and the matrices that it holds."""

    ending: str
    category: str
    roles: tuple[str, ...]
    sizes: Sizes | None = None


def _rows(category: str, **endings: str) -> list[_Row]:
    """One row for each ending, of which a role may have several, separated by blanks."""
    return [_Row(ending, category, (role,)) for role, names in endings.items() for ending in names.split()]


_TABLE: tuple[_Row, ...] = (
    *_rows(
        ATTENTION,
        q="q_proj query_proj q_lin self.query attention.query SelfAttention.q EncDecAttention.q",
        k="k_proj key_proj k_lin self.key attention.key SelfAttention.k EncDecAttention.k",
        v="v_proj value_proj v_lin self.value attention.value SelfAttention.v EncDecAttention.v",
        o="o_proj self_attn.out_proj encoder_attn.out_proj attn.out_proj attention.out_proj attention.out_lin "
        "self_attn.dense attention.dense attention.output.dense SelfAttention.o EncDecAttention.o attn.c_proj",
        # DeepSeek's attention, whose queries, keys and values are products of two
        q_a="q_a_proj",
        q_b="q_b_proj",
        kv_a="kv_a_proj_with_mqa",
        kv_b="kv_b_proj",
    ),
    *_rows(
        FFN,
        gate="gate_proj w1 wi_0",
        up="up_proj w3 wi_1 wi fc1 lin1 c_fc intermediate.dense dense_h_to_4h",
        down="down_proj w2 wo fc2 lin2 mlp.c_proj output.dense dense_4h_to_h",
    ),
    _Row("qkv_proj", ATTENTION, ("q", "k", "v"), _qkv_rows),
    _Row("attn.c_attn", ATTENTION, ("q", "k", "v"), _qkv_rows),
    _Row("gate_up_proj", FFN, ("gate", "up"), _halves),
    _Row("router", UNPAIRED, ("router",)),
    _Row("gate", UNPAIRED, ("router",)),
    _Row("shared_expert_gate", UNPAIRED, ("router",)),
    _Row("relative_attention_bias", UNPAIRED, ("position",)),
)
_ROW_OF = {row.ending: row for row in _TABLE}
_LONGEST = max(row.ending.count(".") for row in _TABLE) + 1


def find_parts(model: nn.Module) -> Parts:
    """The matrices and normalisation layers in the blocks of ``model``; a parameter that is shared counts once.

    Raises:
        ValueError: the sizes of matrices that share a parameter do not follow from the configuration.
    """
    matrices: list[Matrix] = []
    norms: list[Norm] = []
    unknown: list[str] = []
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        block = block_of(module_name)
        own = {name: p for name, p in module.named_parameters(recurse=False) if id(p) not in seen}
        seen.update(map(id, own.values()))
        if block is None or not own:
            continue
        if is_norm(module):
            names = tuple(f"{module_name}.{name}" for name in own)
            norms.append(Norm(block, names, sum(p.numel() for p in own.values())))
            continue
        for name, parameter in own.items():
            row = _row_of(module_name, name)
            if row is not None:
                matrices += _matrices(model, module_name, name, block, row)
            elif parameter.dim() >= 2:
                unknown.append(f"{module_name}.{name}")
    return Parts(tuple(matrices), tuple(norms), tuple(unknown))


def row_count(model: nn.Module, matrix: Matrix) -> int:
    """How many rows, which are outputs, ``matrix`` has."""
    if matrix.rows is not None:
        return matrix.rows[1] - matrix.rows[0]
    return out_features(model.get_submodule(matrix.module), matrix.parameter)


def attention_roles(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Which of the modules called ``names`` are the matrices of an attention.

    Returns:
        By name of the attention, the names of its matrices by role. One that holds several has a role like ``"q+k+v"``.
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        block, row = block_of(name), _row_of(name, "weight")
        if block is not None and row is not None and row.category == ATTENTION:
            found.setdefault(_attention_group(name, block), {})["+".join(row.roles)] = name
    return found


def roles_of(name: str) -> tuple[str, ...]:
    """The roles of the matrices in the module or parameter of this name in a block; empty for an unknown one."""
    row = _row_of(name, "weight")
    return () if row is None else row.roles


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a normalisation layer, which is known by its name."""
    return "norm" in type(module).__name__.lower()


def block_of(name: str) -> str | None:
    """The block that the module of this name is in: its name up to the first number."""
    components = name.split(".")
    number = next((i for i, component in enumerate(components) if component.isdigit()), None)
    return None if number is None else ".".join(components[: number + 1])


def _row_of(module_name: str, parameter: str) -> _Row | None:
    if parameter == "bias":
        return None
    components = module_name.split(".") if parameter == "weight" else [*module_name.split("."), parameter]
    endings = (".".join(components[-length:]) for length in range(_LONGEST, 0, -1))
    return next((_ROW_OF[ending] for ending in endings if ending in _ROW_OF), None)


def _matrices(model: nn.Module, module_name: str, parameter: str, block: str, row: _Row) -> Iterator[Matrix]:
    module = model.get_submodule(module_name)
    tensor = module.get_parameter(parameter)
    experts = [f".{expert}" for expert in range(tensor.shape[0])] if tensor.dim() == 3 else [""]
    total = out_features(module, parameter)
    sizes = _sizes(model, module_name, row, total // len(experts))
    group = _attention_group(module_name, block) if row.category == ATTENTION else _last_number(module_name)
    begin = 0
    for expert in experts:
        for role, size in zip(row.roles, sizes, strict=True):
            rows = None if size == total else (begin, begin + size)
            entries = tensor.numel() // total * size
            yield Matrix(module_name, parameter, block, row.category, role, group + expert, rows, entries)
            begin += size


def _sizes(model: nn.Module, module_name: str, row: _Row, rows: int) -> list[int]:
    if row.sizes is None:
        return [rows]
    sizes = row.sizes(config_of(model, module_name), rows)
    if sum(sizes) != rows:
        raise ValueError(f"{module_name} has {rows} rows, and {', '.join(row.roles)} take {sizes} by the configuration")
    return sizes


def config_of(model: nn.Module, module_name: str) -> Any:
    """The configuration of the nearest module around this one that has one."""
    components = module_name.split(".")
    for length in range(len(components), -1, -1):
        config = getattr(model.get_submodule(".".join(components[:length])), "config", None)
        if config is not None:
            return config
    raise ValueError(f"{module_name} holds several matrices, and no module around it has a config with their sizes")


def _attention_group(module_name: str, block: str) -> str:
    """The block and the name of the attention in it: a decoder has one to itself and one to the encoder."""
    inner = module_name[len(block) + 1 :].split(".")
    first = next((i for i, component in enumerate(inner) if component != "layer" and not component.isdigit()), 0)
    return ".".join([block, *inner[: first + 1]])


def _last_number(module_name: str) -> str:
    """The block, or the expert in it."""
    match = re.match(r".*\.\d+(?=\.|$)", module_name)
    return match.group() if match else module_name
