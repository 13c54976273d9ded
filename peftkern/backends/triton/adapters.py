"""Adapters as kernel arguments.

The *slots* of one launch are one adapter of every member of a group, so at most three. Members with several active
adapters take several launches of the skinny kernels, and one of the products, which take all slots of all members.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from peftkern.backends.triton.dropout import NO_MASK, Mask, mask_arguments
from peftkern.backends.triton.integers import next_power_of_two
from peftkern.ops.lora_linear import Adapters

SMALLEST_RANK = 16
"""Tensor cores take an inner dimension of at least this; smaller ranks are padded with zeros on the way."""


@dataclass(frozen=True)
class Slots:
    """Equally long tuples, one entry per slot.

    Attributes:
        lora_A: [r, in], rows of any stride.
        lora_B: [out, r], rows of any stride.
        masks: dropout of each.
        scaling: of each.
        columns: the first column of h and g that belongs to it.
    """

    lora_A: tuple[Tensor, ...]
    lora_B: tuple[Tensor, ...]
    masks: tuple[Mask, ...]
    scaling: tuple[float, ...]
    columns: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lora_A)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """r of each."""
        return tuple(lora_A.shape[0] for lora_A in self.lora_A)

    @cached_property
    def a_strides(self) -> tuple[int, ...]:
        """Elements from row to row of each A."""
        return tuple(lora_A.stride(0) for lora_A in self.lora_A)

    @cached_property
    def b_strides(self) -> tuple[int, ...]:
        """Elements from row to row of each B."""
        return tuple(lora_B.stride(0) for lora_B in self.lora_B)

    @cached_property
    def padded_rank(self) -> int:
        """The greatest r as kernels are compiled for it: a power of two."""
        return max(SMALLEST_RANK, next_power_of_two(max(self.ranks)))

    @cached_property
    def dropout(self) -> bool:
        """Whether some slot drops elements."""
        return any(mask.threshold != NO_MASK.threshold for mask in self.masks)

    def only(self, numbers: Sequence[int]) -> Slots:
        """Some of the slots."""
        if len(numbers) == len(self):
            return self

        def pick(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[number] for number in numbers)

        return Slots(pick(self.lora_A), pick(self.lora_B), pick(self.masks), pick(self.scaling), pick(self.columns))

    def part_of(self, matrix: Tensor) -> list[Tensor]:
        """The columns of h or g that belong to each slot."""
        ranks_and_columns = zip(self.ranks, self.columns, strict=True)
        return [matrix[..., column : column + rank] for rank, column in ranks_and_columns]


def all_slots(members: Sequence[Adapters]) -> Slots:
    """The slots of every member, the adapters of one member after another; members have equally many."""
    lora_A, lora_B, masks, scaling, columns = [], [], [], [], []
    column = 0
    for adapters in members:
        for index in range(len(adapters)):
            lora_A.append(_unit_stride(adapters.lora_A[index]))
            lora_B.append(_unit_stride(adapters.lora_B[index]))
            masks.append(mask_arguments(adapters.seed, index, adapters.dropout_p[index]))
            scaling.append(float(adapters.scaling[index]))
            columns.append(column)
            column += adapters.lora_A[index].shape[0]
    return Slots(tuple(lora_A), tuple(lora_B), tuple(masks), tuple(scaling), tuple(columns))


def launches_of(slots: Slots, members: int) -> list[Slots]:
    """``slots`` of all members, apart by the number of the adapter within its member."""
    count = len(slots) // members
    return [slots.only(range(index, len(slots), count)) for index in range(count)]


def _unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.detach().contiguous()


def total_rank(members: Sequence[Adapters]) -> int:
    """Columns of h."""
    return sum(lora_A.shape[0] for adapters in members for lora_A in adapters.lora_A)


def new_inner(x: Tensor, *shape: int) -> Tensor:
    """An uninitialised float32 tensor beside x."""
    return torch.empty(shape, dtype=torch.float32, device=x.device)
