"""What methods that train sparse deltas have to remember: see `peftkern.select.resume`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from peftkern.formats.sparse_indices import SparseIndices
from peftkern.nn.sparse_linear import SparseDelta


def state_of_deltas(deltas: Mapping[str, SparseDelta]) -> dict[str, dict[str, Tensor]]:
    """Entries and values of deltas by name; copies."""
    return {
        name: {"flat": delta.indices.flat(), "values": delta.values.detach().clone()} for name, delta in deltas.items()
    }


def load_deltas(caller: str, deltas: Mapping[str, SparseDelta], state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Give ``deltas`` the entries and values that `state_of_deltas` has read.

    Raises:
        ValueError: the names are others.
    """
    if state.keys() != deltas.keys():
        raise ValueError(f"{caller}: the checkpoint is of other layers than those that are trained now")
    for name, delta in deltas.items():
        flat, values = state[name]["flat"], state[name]["values"]
        device = delta.values.device
        indices = SparseIndices.from_flat(flat.to(device), delta.shape)
        delta.replace_(indices, values.to(device, delta.values.dtype, copy=True))
