"""Fixed choices of what is trained: the last block, the head, embeddings, biases, norms, a range of layers.

A model is a stack of blocks, the entries of its ``ModuleList`` (``model.layers.3``). Where it has several stacks, as an
encoder and a decoder, the last one's last block is the last, and layers are counted over all of them.

Sources: last block (L-LDB), embeddings and head (L-EO): the presets of personalised code models, Zlotchevski et al.
2022 (arXiv:2208.14815). Biases: BitFit, Ben Zaken et al. 2022 (arXiv:2106.10199). Lower layers frozen: the
stabilised fine-tuning of BERT, Zhang et al. 2021 (arXiv:2006.05987) and Lee et al. 2019 (arXiv:1911.03090).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from peftkern.select.parts import is_norm
from peftkern.select.policy import Policy
from peftkern.select.selection import Selection


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks in order: the entries of every ``ModuleList`` that is not inside of a block."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{block}.") for block in found):
            found += [f"{name}.{index}" if name else str(index) for index in range(len(module))]
    return found


def block_indices(model: nn.Module, names: Iterable[str]) -> dict[str, int | None]:
    """Which of `find_blocks` each parameter is in; ``None`` outside of blocks."""
    blocks = {block: index for index, block in enumerate(find_blocks(model))}

    def index_of(name: str) -> int | None:
        components = name.split(".")
        prefixes = (".".join(components[:length]) for length in range(1, len(components)))
        return next((blocks[prefix] for prefix in prefixes if prefix in blocks), None)

    return {name: index_of(name) for name in names}


# ---- the parts


def _all(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def _last_block(model: nn.Module) -> set[str]:
    indices = block_indices(model, _all(model))
    last = max((index for index in indices.values() if index is not None), default=None)
    return {name for name, index in indices.items() if index is not None and index == last}


def _embeddings(model: nn.Module) -> set[str]:
    """Of tokens, positions and kinds, outside of blocks."""
    indices = block_indices(model, _all(model))
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return {name for name in _names(model, modules) if indices[name] is None}


def _head(model: nn.Module) -> set[str]:
    """What gives the logits: the output embeddings, or all that stands outside of the model that the head is put on."""
    find: Any = getattr(model, "get_output_embeddings", None)
    output = None if find is None else find()
    if output is not None:
        return _names(model, [output])
    prefix = getattr(_inner(model), "base_model_prefix", "")
    inside = (
        {id(parameter) for parameter in getattr(_inner(model), prefix, nn.Module()).parameters()} if prefix else set()
    )
    return {name for name, parameter in model.named_parameters() if inside and id(parameter) not in inside}


def _biases(model: nn.Module) -> set[str]:
    return {name for name in _all(model) if name.split(".")[-1].endswith("bias")}


def _norms(model: nn.Module) -> set[str]:
    return _names(model, [module for module in model.modules() if is_norm(module)])


def _inner(model: nn.Module) -> Any:
    """The model that PEFT has put its adapters in."""
    find: Any = getattr(model, "get_base_model", None)
    return model if find is None else find()


def _names(model: nn.Module, modules: Iterable[nn.Module]) -> set[str]:
    """Parameters of these modules, by their first name in the model."""
    ids = {id(parameter) for module in modules for parameter in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


PARTS: Mapping[str, Callable[[nn.Module], set[str]]] = {
    "all": _all,
    "last_block": _last_block,
    "head": _head,
    "embeddings": _embeddings,
    "biases": _biases,
    "norms": _norms,
}


# ---- the policies


class Preset(Policy):
    """Train the parts of these names, and nothing else, for the whole run.

    ``"all"``; ``"last_block"``, which ends the backward pass there; ``"head"``, with no backward pass through any
    block; ``"embeddings"``; ``"biases"`` (BitFit); ``"norms"``. Several parts are trained together:
    ``Preset("embeddings", "head")``, ``Preset("biases", "head")``.

    Where head and embeddings are one tensor (``tie_word_embeddings``), its gradient has the contributions of both, and
    the error goes all the way down for it. ``"embeddings"`` trains that tensor then. ``"head"`` by itself is refused,
    because what it promises is that no block has a backward pass.

    Raises:
        ValueError: no part is named, or one is unknown. In `prepare`: a part has no parameter that requires a gradient,
            or is a head that is tied to the embeddings without ``"embeddings"`` or ``"all"`` beside it.
    """

    def __init__(self, *parts: str) -> None:
        super().__init__()
        unknown = [part for part in parts if part not in PARTS]
        if unknown or not parts:
            raise ValueError(f"Preset: parts must be some of {list(PARTS)}, got {unknown[0] if unknown else 'none'!r}")
        self.parts = parts
        self._chosen: set[str] = set()

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        try:
            self._chosen = set[str]().union(*(self._find(model, part) for part in self.parts))
        except ValueError:
            self.model = self._execution = None
            raise

    def _find(self, model: nn.Module, part: str) -> set[str]:
        found = PARTS[part](model)
        tied = part == "head" and found & _embeddings(model)
        if tied and not {"embeddings", "all"} & set(self.parts):
            raise ValueError(
                f"Preset: {min(tied)} is head and embeddings in one, so the error would go through all blocks for it; "
                "name both ('embeddings', 'head'), or untie them"
            )
        found &= set(self.candidates)
        if not found:
            raise ValueError(f"Preset: {part!r} has no parameter that requires a gradient")
        return found

    def select(self) -> Selection:
        return self.selected(self._chosen)


class LayerRange(Policy):
    """Train the blocks from ``first`` up to, and without, ``stop``, and nothing else, for the whole run.

    Args:
        first: negative numbers count from the end, as in Python.
        stop: ``None``: to the end.

    Raises:
        ValueError: in `prepare`: the range has no parameter that requires a gradient.
    """

    def __init__(self, first: int, stop: int | None = None) -> None:
        super().__init__()
        self.first, self.stop = first, stop
        self._chosen: set[str] = set()

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        blocks = range(len(find_blocks(model)))[self.first : self.stop]
        self._chosen = {name for name, index in self._indices(model).items() if self._is_trained(index, blocks)}
        if not self._chosen:
            self.model = self._execution = None
            count = len(find_blocks(model))
            raise ValueError(
                f"{type(self).__name__}: the model has {count} blocks, and none of those from {self.first} to "
                f"{count if self.stop is None else self.stop} has a parameter that requires a gradient"
            )

    def _indices(self, model: nn.Module) -> dict[str, int | None]:
        return block_indices(model, self.candidates)

    def _is_trained(self, index: int | None, blocks: range) -> bool:
        return index is not None and index in blocks

    def select(self) -> Selection:
        return self.selected(self._chosen)


class FreezeLower(LayerRange):
    """Freeze the embeddings and the lowest ``layers`` blocks, and train everything above: the backward pass ends there.

    A head that is tied to the embeddings is frozen with them.

    Raises:
        ValueError: ``layers`` is negative. In `prepare`: nothing is left to train.
    """

    def __init__(self, layers: int) -> None:
        if layers < 0:
            raise ValueError(f"FreezeLower: layers must be at least 0, got {layers}")
        super().__init__(layers)

    def _indices(self, model: nn.Module) -> dict[str, int | None]:
        below = below_blocks(model)
        return {name: index for name, index in super()._indices(model).items() if name not in below}

    def _is_trained(self, index: int | None, blocks: range) -> bool:
        return index is None or index in blocks


def below_blocks(model: nn.Module) -> set[str]:
    """Parameters outside of blocks that stand in front of the first one: embeddings and what is beside them."""
    embeddings = _embeddings(model)
    holders = {name.rpartition(".")[0].rpartition(".")[0] for name in embeddings} - {""}
    blocks = find_blocks(model)
    indices = block_indices(model, _all(model))
    beside = {holder for holder in holders if not any(block.startswith(f"{holder}.") for block in blocks)}
    inside = {
        name for name, index in indices.items() if index is None and any(name.startswith(f"{h}.") for h in beside)
    }
    return embeddings | inside
