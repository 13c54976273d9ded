"""What autograd keeps for the backward pass, in another form: fewer bits, or the CPU's memory.

    "int8"      whole numbers up to 127 with a float32 scale for each 256 elements (for each row, where that fails)
    "float16"   of float32 tensors; others are kept as they are
    "cpu"       copies in the CPU's memory

A tensor that several operations keep is converted once. Parameters and buffers, tensors that are not floating-point,
and tensors of fewer than 4096 elements are kept as they are. Forward passes are exact; gradients take the error of the
form.

Source: GACT, Liu et al. 2022 (arXiv:2206.11357), section 3, for training on compressed activations.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftkern.formats import QuantizedTensor
from peftkern.ops.dequantize import dequantize
from peftkern.ops.lora_linear import FLOAT_DTYPES
from peftkern.ops.quantize import quantize

Form = Literal["int8", "float16", "cpu"]
FORMS: tuple[Form, ...] = ("int8", "float16", "cpu")

SMALLEST = 4096
"""Tensors of fewer elements stay: seeds, statistics of norms, h."""
_ROW = 256


@contextmanager
def saved_activations(model: nn.Module, form: Form, others: Iterable[Tensor] = ()) -> Iterator[None]:
    """Inside, what the forward pass of ``model`` keeps for the backward pass is kept in another form.

        with saved_activations(model, "int8"):
            loss = model(**batch).loss
        loss.backward()

    Args:
        model: whose parameters and buffers stay where they are.
        form: as above.
        others: that stay where they are as well, because somebody else holds them.

    Raises:
        ValueError: ``form`` is unknown.
    """
    if form not in FORMS:
        raise ValueError(f"saved_activations: form must be one of {', '.join(FORMS)}; got {form!r}")
    keeper = _Keeper([*model.parameters(), *model.buffers(), *others], form)
    with torch.autograd.graph.saved_tensors_hooks(keeper.pack, _unpack):
        yield


@dataclass(eq=False)
class _Kept:
    """A converted tensor, and what gives it back."""

    value: Tensor | QuantizedTensor
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def tensor(self) -> Tensor:
        value = dequantize(self.value, torch.float32) if isinstance(self.value, QuantizedTensor) else self.value
        return value.to(self.device, self.dtype).view(self.shape)


class _Keeper:
    """Converts, each tensor once."""

    def __init__(self, held: Iterable[Tensor], form: Form) -> None:
        self._form = form
        self._held = {tensor.untyped_storage().data_ptr() for tensor in held}
        # by memory: what has been converted, for as long as both it and the memory are there
        self._kept: weakref.WeakKeyDictionary[torch.UntypedStorage, weakref.WeakValueDictionary[Any, _Kept]]
        self._kept = weakref.WeakKeyDictionary()

    def pack(self, tensor: Tensor) -> Tensor | _Kept:
        if not self._is_converted(tensor):
            return tensor
        of_memory = self._kept.setdefault(tensor.untyped_storage(), weakref.WeakValueDictionary())
        key = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        kept = of_memory.get(key)
        if kept is None:
            kept = of_memory[key] = _Kept(self._convert(tensor.detach()), tensor.shape, tensor.dtype, tensor.device)
        return kept

    def _is_converted(self, tensor: Tensor) -> bool:
        if type(tensor) is not Tensor or tensor.dtype not in FLOAT_DTYPES or tensor.numel() < SMALLEST:
            return False
        if self._form == "float16" and tensor.dtype != torch.float32:
            return False
        if self._form == "cpu" and tensor.device.type == "cpu":
            return False
        return tensor.untyped_storage().data_ptr() not in self._held

    def _convert(self, tensor: Tensor) -> Tensor | QuantizedTensor:
        if self._form == "int8":
            row = _ROW if tensor.numel() % _ROW == 0 else tensor.shape[-1]
            return quantize(tensor.reshape(-1, row), "int8")
        return tensor.half() if self._form == "float16" else tensor.to("cpu")


def _unpack(kept: Tensor | _Kept) -> Tensor:
    return kept.tensor() if isinstance(kept, _Kept) else kept
