"""The parameter that holds packed codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_TENSOR_DATA: Any = torch.Tensor.data  # the descriptor that the property below stands in front of


class PackedWeight(nn.Parameter):
    """A frozen parameter of packed codes whose ``.data`` cannot be overwritten by arithmetic.

    PEFT merges an adapter by ``weight.data += delta``. On 4-bit codes PyTorch refuses that, but PEFT's "safe" merge
    rounds the delta to the integer dtype first, adds what is left (mostly zeros), assigns the sum and calls the adapter
    merged: the model silently forgets what it learned. Initialisations such as LoftQ assign floating-point weights the
    same way. So assigning ``.data`` raises, except where the codes stay what they are: the same memory, another device,
    or inside :meth:`unlocked`.
    """

    _locked = True

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> PackedWeight:
        if requires_grad:
            raise ValueError("PackedWeight: packed codes have no gradient; requires_grad must be False")
        weight: PackedWeight = torch.Tensor._make_subclass(cls, data.detach(), False)
        return weight

    @property
    def data(self) -> Tensor:
        plain: Tensor = _TENSOR_DATA.__get__(self)
        return plain

    @data.setter
    def data(self, value: Tensor) -> None:
        same_memory = value.device == self.device and value.data_ptr() == self.data_ptr()
        moved = value.device != self.device
        if self._locked and (value.dtype != self.dtype or not (same_memory or moved)):
            raise RuntimeError(
                f"weight.data holds packed {self.dtype} codes and cannot be replaced by {value.dtype} "
                f"{list(value.shape)}. PEFT does that to merge an adapter or to initialise one from the weights: call "
                "peftkern.patch(model) before merging, QuantizedLinear.replace_() to set other codes, or "
                "model.dequantize() to get dense weights back"
            )
        _TENSOR_DATA.__set__(self, value)

    @contextmanager
    def unlocked(self) -> Iterator[None]:
        """Lets ``.data`` be assigned, for code that knows that it moves or restores the codes."""
        self._locked = False
        try:
            yield
        finally:
            del self._locked
