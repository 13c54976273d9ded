"""Where tensors are, by their names alone: the layer, and the kind of tensor that every layer has one of.

Works for any model: roles where the table of `peftkern.select.parts` knows a name, names of modules elsewhere, with
what follows them for adapters (``q lora_A``) and biases (``q bias``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from peftkern.patch.table import pattern_of
from peftkern.select.parts import block_of, roles_of

OUTSIDE = ""
"""The layer of a tensor that is in no block."""

_SAYS_NOTHING = frozenset({"weight", "default", "base_layer"})
_ORDER = {role: index for index, role in enumerate(["q", "k", "v", "q+k+v", "o", "gate", "up", "gate+up", "down"])}


@dataclass(frozen=True)
class Place:
    """Where a tensor is.

    Attributes:
        layer: its number, with the name of the stack in front where there are several; `OUTSIDE` of blocks.
        kind: as ``"q"``, ``"input_layernorm"``, ``"up lora_B"``; outside of blocks the tensor's own name.
    """

    layer: str
    kind: str


@dataclass(frozen=True)
class Places:
    """The layers of a model, and the kinds of tensors in them.

    Attributes:
        of: place by name of the tensor.
        layers: of each stack in order.
        kinds: of tensors in layers: matrices as attention and feed-forward network use them, then the others.
        outside: kinds of the tensors that are in no layer.
    """

    of: dict[str, Place]
    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    outside: tuple[str, ...]


def find_places(names: Iterable[str]) -> Places:
    """Places of the tensors of these names. Several tensors may share one, as the experts of a layer do."""
    all_names = list(dict.fromkeys(names))
    blocks = {name: block for name in all_names if (block := _block(name)) is not None}
    patterns = {name: pattern_of(name.removeprefix(block + ".")) for name, block in blocks.items()}
    labels = _labels(dict.fromkeys(patterns.values()))
    layers = _layer_names(dict.fromkeys(blocks.values()))
    own = _own_labels([name for name in all_names if name not in blocks])
    of = {
        name: Place(layers[blocks[name]], labels[patterns[name]]) if name in blocks else Place(OUTSIDE, own[name])
        for name in all_names
    }
    return Places(of, tuple(layers.values()), tuple(labels.values()), tuple(own.values()))


def _block(name: str) -> str | None:
    """The block; ``None`` for a parameter whose own name is a number, as in a ``ParameterList``."""
    block = block_of(name)
    return None if block == name else block


def _layer_names(blocks: Iterable[str]) -> dict[str, str]:
    """Name of the layer by block, sorted by number within each stack."""
    split = [block.rpartition(".") for block in blocks]
    stacks = list(dict.fromkeys(stack for stack, _, _ in split))
    ordered = sorted(split, key=lambda parts: (stacks.index(parts[0]), int(parts[2])))
    short = _without_common_beginning(stacks)
    return {
        "".join(parts): parts[2] if len(stacks) == 1 else f"{short[parts[0]]}.{parts[2]}".lstrip(".")
        for parts in ordered
    }


def _without_common_beginning(names: list[str]) -> dict[str, str]:
    split = [name.split(".") for name in names]
    shared = 0
    while split and all(len(parts) > shared + 1 and parts[shared] == split[0][shared] for parts in split):
        shared += 1
    return {name: ".".join(parts[shared:]) for name, parts in zip(names, split, strict=True)}


def _labels(patterns: Iterable[str]) -> dict[str, str]:
    """Label by pattern of names within a block, in the order of columns; longer where the short ones are not unique."""
    labels = {pattern: _label(pattern) for pattern in patterns}
    counts = Counter(label for _, label in labels.values())
    ordered = sorted(labels, key=lambda pattern: labels[pattern][0])
    return {p: labels[p][1] if counts[labels[p][1]] == 1 else _long_label(p) for p in ordered}


def _label(pattern: str) -> tuple[int, str]:
    """Place among the columns, and label."""
    components = pattern.split(".")
    for length in range(len(components), 0, -1):
        roles = "+".join(roles_of(".".join(components[:length])))
        if roles:
            return _ORDER.get(roles, len(_ORDER)), " ".join([roles, *_telling(components[length:])])
    *modules, own = components
    words = [*_telling(modules)[-1:], *_telling([own])]
    return len(_ORDER) + 1, " ".join(words) or own


def _long_label(pattern: str) -> str:
    return ".".join(_telling(pattern.split("."))) or pattern


def _telling(components: list[str]) -> list[str]:
    return [component for component in components if component not in _SAYS_NOTHING]


def _own_labels(names: list[str]) -> dict[str, str]:
    """Short labels of tensors outside of blocks: the last module of the name, or all of it where that is not unique."""
    short = {name: _label(name)[1] for name in names}
    counts = Counter(short.values())
    return {name: label if counts[label] == 1 else name for name, label in short.items()}
