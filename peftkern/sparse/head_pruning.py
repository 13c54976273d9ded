"""Take whole heads out of attentions: their rows of q, k and v, and their columns of the output layer.

Query heads that share a key and value head go and stay together: a group is one key and value head with the query
heads that read it, which is a single head where nothing is shared. What lies over the layers is cut along: rows of
LoRA's B (columns of A over the output layer), rows or columns of sparse deltas.

Source: DSEE, Chen et al. 2021 (arXiv:2111.00160), section 3.3. The published code counts 12 heads in every model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.formats.sparse_indices import SparseIndices
from peftkern.integrations.fingerprint import plain_name, remember_base, unwrapped
from peftkern.nn.sparse_linear import SparseDelta, deltas_of, resize_, under_deltas
from peftkern.patch.walk import patched_modules
from peftkern.select.parts import attention_roles, is_norm
from peftkern.sparse.layers import base_layer, linear_layers, weight_shape

_HEADS = ("num_attention_heads", "num_heads", "n_heads")
_GROUPS = ("num_key_value_heads", "num_kv_heads")
_WIDTH = ("all_head_size",)
_HEAD_SIZES = ("head_dim", "attention_head_size")


@dataclass(frozen=True)
class Attention:
    """An attention whose heads can be taken out.

    Attributes:
        parent: the module that holds q, k and v.
        q, k, v, o: their names, and that of the output layer, as `linear_layers` has them.
        head_size: rows of q for each head.
        heads, groups: of query heads, and of key and value heads.
    """

    parent: nn.Module
    q: str
    k: str
    v: str
    o: str
    head_size: int
    heads: int
    groups: int

    @property
    def query_rows(self) -> int:
        """Rows of q, and columns of the output layer, of one group."""
        return self.heads // self.groups * self.head_size


def find_attentions(model: nn.Module) -> dict[str, Attention]:
    """The attentions of ``model`` by their name without PEFT's wrapper, each one prunable.

    Raises:
        ValueError: there is none; the model is patched; a layer is quantized, masked or shares its matrix with others;
            or an attention has parameters of its own, or sizes that do not fit each other.
    """
    if patched_modules(model):
        raise ValueError("heads: the model is patched; call peftkern.unpatch(model) before, and patch it again after")
    model = unwrapped(model)
    layers = linear_layers(model, ".*")
    by_plain_name = {plain_name(name): name for name in layers}
    found = {}
    for group, roles in attention_roles(by_plain_name).items():
        missing = [role for role in "qkvo" if role not in roles]
        if missing:
            raise ValueError(f"heads: {group} has no layers of its own for {', '.join(missing)}, so heads stay whole")
        found[group] = _read(group, model, {role: by_plain_name[roles[role]] for role in "qkvo"}, layers)
    if not found:
        raise ValueError("heads: found no attention with linear layers for q, k, v and the output")
    return found


def _read(group: str, model: nn.Module, names: Mapping[str, str], layers: Mapping[str, nn.Module]) -> Attention:
    parent = model.get_submodule(names["q"].rpartition(".")[0])
    head_size = next((getattr(parent, name) for name in _HEAD_SIZES if hasattr(parent, name)), None)
    if not isinstance(head_size, int):
        raise ValueError(f"heads: {group} does not tell the size of a head; none of {', '.join(_HEAD_SIZES)} is there")
    for name in names.values():
        _check_sliceable(name, base_layer(layers[name]))
    _check_nothing_else(group, parent, {id(layers[name]) for name in names.values()}, head_size)
    rows = {role: (weight_shape(base_layer(layers[name])) or (0, 0)) for role, name in names.items()}
    heads, groups = rows["q"][0] // head_size, rows["k"][0] // head_size
    fits = rows["v"][0] == rows["k"][0] == groups * head_size and rows["q"][0] == rows["o"][1] == heads * head_size
    if not fits or groups == 0 or heads % groups:
        raise ValueError(f"heads: {group} has q, k, v and output layers of {rows}, which are no heads of {head_size}")
    return Attention(parent, names["q"], names["k"], names["v"], names["o"], head_size, heads, groups)


def _check_sliceable(name: str, layer: Any) -> None:
    if under_deltas(type(layer)) is not nn.Linear:
        raise ValueError(
            f"heads: {name} is a {type(layer).__name__}; heads are cut out of dense layers without a mask, load the "
            "model dense"
        )
    merged = [delta_name for delta_name, delta in deltas_of(layer).items() if delta.merged]
    if merged:
        raise ValueError(f"heads: delta {merged[0]!r} is merged into {name}; unmerge it first")


def _check_nothing_else(group: str, parent: nn.Module, known: Collection[int], head_size: int) -> None:
    """What else an attention has must not depend on the number of heads."""
    inside = {id(module) for layer in parent.modules() if id(layer) in known for module in layer.modules()}
    for name, module in parent.named_modules():
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if id(module) in inside or not own:
            continue
        if not is_norm(module) or any(parameter.numel() != head_size for parameter in own):
            raise ValueError(
                f"heads: {group} has parameters in {name or 'itself'}, and it is not known how to cut them"
            )


# ---- taking out


def remove_heads(model: nn.Module, kept: Mapping[str, Collection[int]]) -> None:
    """Keep these groups of heads, and no others. All attentions are cut, or none.

    Parameters stay the objects that they are, so that an optimizer trains them on; it has to forget their state.
    Where the model's configuration has a size of heads and all attentions keep the same number, it is brought up to
    date, so that what is saved can be loaded again.

    Args:
        model: with PEFT adapters and sparse deltas or without.
        kept: by name of an attention, as in `find_attentions`: the groups that stay, from 0.

    Raises:
        ValueError: there is no such attention or group; none is left; or as for `find_attentions`.
    """
    model = unwrapped(model)
    attentions = find_attentions(model)
    for name, groups in kept.items():
        if name not in attentions:
            raise ValueError(f"remove_heads: kept names {name!r}; the attentions are {', '.join(attentions)}")
        if not groups or not all(0 <= group < attentions[name].groups for group in groups):
            last = attentions[name].groups - 1
            raise ValueError(f"remove_heads: kept must name groups from 0 to {last} of {name}, got {sorted(groups)}")
    remember_base(model)
    layers = linear_layers(model, ".*")
    for name, groups in kept.items():
        _cut(attentions[name], sorted(set(groups)), layers)
    if kept.keys() == attentions.keys() and len({len(set(groups)) for groups in kept.values()}) == 1:
        _update_configuration(model, next(iter(attentions.values())), len(set(next(iter(kept.values())))))


def _cut(attention: Attention, groups: list[int], layers: Mapping[str, nn.Module]) -> None:
    queries = _positions(groups, attention.query_rows)
    shared = _positions(groups, attention.head_size)
    _keep_rows(layers[attention.q], queries)
    _keep_rows(layers[attention.k], shared)
    _keep_rows(layers[attention.v], shared)
    _keep_columns(layers[attention.o], queries)
    sizes = {
        **dict.fromkeys(_HEADS, len(queries) // attention.head_size),
        **dict.fromkeys(_GROUPS, len(groups)),
        **dict.fromkeys(_WIDTH, len(queries)),
    }
    for name, size in sizes.items():
        if hasattr(attention.parent, name):
            setattr(attention.parent, name, size)


def _positions(groups: list[int], size: int) -> Tensor:
    return (torch.tensor(groups).unsqueeze(1) * size + torch.arange(size)).reshape(-1)


@torch.no_grad()
def _keep_rows(layer: Any, rows: Tensor) -> None:
    base: Any = base_layer(layer)
    for parameter in (base.weight, base.bias):
        _select(parameter, rows, 0)
    base.out_features = len(rows)
    for delta in deltas_of(base).values():
        _select_entries(delta, rows, 0)
    if base is layer:
        return
    layer.out_features = len(rows)
    for b in layer.lora_B.values():
        _select(b.weight, rows, 0)
        _select(b.bias, rows, 0)
        b.out_features = len(rows)


@torch.no_grad()
def _keep_columns(layer: Any, columns: Tensor) -> None:
    base: Any = base_layer(layer)
    _select(base.weight, columns, 1)
    base.in_features = len(columns)
    for delta in deltas_of(base).values():
        _select_entries(delta, columns, 1)
    if base is layer:
        return
    layer.in_features = len(columns)
    for a in layer.lora_A.values():
        _select(a.weight, columns, 1)
        a.in_features = len(columns)


def _select(parameter: nn.Parameter | None, positions: Tensor, dim: int) -> None:
    if parameter is not None:
        resize_(parameter, parameter.detach().index_select(dim, positions.to(parameter.device)))


def _select_entries(delta: SparseDelta, positions: Tensor, dim: int) -> None:
    """Keep the entries in rows (``dim`` 0) or columns at ascending ``positions``."""
    shape = list(delta.shape)
    moved = torch.full((shape[dim],), -1, dtype=torch.int64)
    moved[positions] = torch.arange(len(positions))
    flat = delta.indices.flat()
    places = [flat // shape[1], flat % shape[1]]
    places[dim] = moved.to(flat.device)[places[dim]]
    stays = places[dim] >= 0
    shape[dim] = len(positions)
    delta.shape = torch.Size(shape)
    indices = SparseIndices.from_flat((places[0] * shape[1] + places[1])[stays], delta.shape)
    delta.replace_(indices, delta.values.detach()[stays])


def _update_configuration(model: nn.Module, before: Attention, groups: int) -> None:
    configuration: Any = getattr(model, "config", None)
    if getattr(configuration, "head_dim", None) is None:
        return
    heads = before.heads // before.groups * groups
    # transformers refuses a configuration whose width is no multiple of its heads, whatever the size of a head
    if getattr(configuration, "hidden_size", 0) % heads == 0:
        configuration.num_attention_heads, configuration.num_key_value_heads = heads, groups
