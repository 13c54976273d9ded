"""Which entries of a matrix are there: a sorted index set, in row order and in column order.

A sparse product walks over rows of the matrix forward and over columns backward, so that every sum has one place and
needs no atomics. Both orders are kept: 12 bytes for each entry, and 8 for each row and column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

_MOST_ENTRIES = 2**31 - 1


@dataclass(frozen=True)
class SparseIndices:
    """A set of entries of a matrix [out, in]. Make one with :meth:`from_flat` or :meth:`from_mask`.

    In row order, entry i is at ``(row, columns[i])`` with ``row_offsets[row] <= i < row_offsets[row + 1]``.
    Values that belong to the set are kept in this order. Entry k in column order is ``order[k]`` in row order.

    Attributes:
        shape: [out, in].
        row_offsets: [out + 1] int64.
        columns: [entries] int32, ascending within each row.
        column_offsets: [in + 1] int64.
        rows: [entries] int32, in column order, ascending within each column.
        order: [entries] int32.
    """

    shape: torch.Size
    row_offsets: Tensor
    columns: Tensor
    column_offsets: Tensor
    rows: Tensor
    order: Tensor

    @classmethod
    def from_flat(cls, flat: Tensor, shape: tuple[int, int] | torch.Size) -> SparseIndices:
        """From ``row * in + column`` of every entry.

        Args:
            flat: [entries], any integer dtype, strictly ascending.
            shape: [out, in].

        Raises:
            ValueError: ``flat`` is not one row of strictly ascending integers within the matrix.
        """
        out_features, in_features = shape
        flat = _checked(flat, out_features, in_features)
        rows, columns = flat // max(in_features, 1), flat % max(in_features, 1)
        order = torch.argsort(columns, stable=True)
        return cls(
            torch.Size((out_features, in_features)),
            _offsets(rows, out_features),
            columns.to(torch.int32),
            _offsets(columns, in_features),
            rows[order].to(torch.int32),
            order.to(torch.int32),
        )

    @classmethod
    def from_mask(cls, mask: Tensor) -> SparseIndices:
        """The entries where ``mask``, [out, in] bool, is true.

        Raises:
            ValueError: ``mask`` is no bool matrix.
        """
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise ValueError(f"from_mask: mask must be [out, in] bool, got {list(mask.shape)} {mask.dtype}")
        return cls.from_flat(mask.reshape(-1).nonzero().reshape(-1), mask.shape)

    @classmethod
    def empty(cls, shape: tuple[int, int] | torch.Size, device: torch.device | str | None = None) -> SparseIndices:
        """No entry at all."""
        return cls.from_flat(torch.empty(0, dtype=torch.int64, device=device), shape)

    def __len__(self) -> int:
        return self.columns.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.columns.device

    @property
    def density(self) -> float:
        """The share of the matrix's entries that are in the set."""
        return len(self) / max(self.shape.numel(), 1)

    def row_of_entries(self) -> Tensor:
        """The row of every entry, in row order: [entries] int64."""
        counts = self.row_offsets.diff()
        return torch.repeat_interleave(torch.arange(self.shape[0], device=self.device), counts)

    def flat(self) -> Tensor:
        """``row * in + column`` of every entry, ascending: [entries] int64."""
        return self.row_of_entries() * self.shape[1] + self.columns

    def mask(self) -> Tensor:
        """[out, in] bool, true at the entries."""
        mask = torch.zeros(self.shape.numel(), dtype=torch.bool, device=self.device)
        mask[self.flat()] = True
        return mask.view(self.shape)

    def gather(self, matrix: Tensor) -> Tensor:
        """The values of ``matrix``, [out, in], at the entries, in row order."""
        return matrix.reshape(-1)[self.flat()]

    def to_dense(self, values: Tensor) -> Tensor:
        """The matrix [out, in] that holds ``values``, [entries] in row order, and zero elsewhere."""
        dense = values.new_zeros(self.shape.numel())
        return dense.index_copy(0, self.flat(), values).view(self.shape)

    def tensors(self) -> tuple[Tensor, ...]:
        """``row_offsets``, ``columns``, ``column_offsets``, ``rows`` and ``order``."""
        return self.row_offsets, self.columns, self.column_offsets, self.rows, self.order

    def to(self, device: torch.device | str) -> SparseIndices:
        """The same set on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> SparseIndices:
        return SparseIndices(self.shape, *(function(tensor) for tensor in self.tensors()))

    def validate(self) -> None:
        """Raise `ValueError` where lengths, dtypes or devices do not fit each other; reads no values."""
        out_features, in_features = self.shape
        entries = len(self)
        lengths = (out_features + 1, entries, in_features + 1, entries, entries)
        dtypes = (torch.int64, torch.int32, torch.int64, torch.int32, torch.int32)
        names = [field.name for field in fields(self) if field.name != "shape"]
        for name, tensor, length, dtype in zip(names, self.tensors(), lengths, dtypes, strict=True):
            if tuple(tensor.shape) != (length,) or tensor.dtype != dtype or tensor.device != self.device:
                raise ValueError(
                    f"SparseIndices: {name} must be [{length}] {dtype} on {self.device}, "
                    f"got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
                )


def _checked(flat: Tensor, out_features: int, in_features: int) -> Tensor:
    if flat.dim() != 1 or flat.is_floating_point() or flat.dtype == torch.bool:
        raise ValueError(f"from_flat: flat must be [entries] of integers, got {list(flat.shape)} {flat.dtype}")
    if flat.shape[0] > _MOST_ENTRIES:
        raise ValueError(f"from_flat: at most {_MOST_ENTRIES} entries in one matrix, got {flat.shape[0]}")
    flat = flat.to(torch.int64)
    if flat.shape[0] == 0:
        return flat
    if bool((flat.diff() <= 0).any()):
        raise ValueError("from_flat: flat must ascend strictly; sort it and drop duplicates: flat.unique()")
    first, last, size = int(flat[0]), int(flat[-1]), out_features * in_features
    if first < 0 or last >= size:
        raise ValueError(f"from_flat: flat must be within 0 and {size - 1}, got {first} to {last}")
    return flat


def _offsets(indices: Tensor, size: int) -> Tensor:
    offsets = torch.zeros(size + 1, dtype=torch.int64, device=indices.device)
    torch.cumsum(torch.bincount(indices, minlength=size), 0, out=offsets[1:])
    return offsets
