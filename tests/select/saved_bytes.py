"""What a forward pass keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Saved(dict[tuple[int, int], Tensor]):
    """Tensors that were kept, each once, parameters aside."""

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.values())


@contextmanager
def saved_by_forward(*modules: nn.Module) -> Iterator[Saved]:
    """What is kept in the block, but for parameters and buffers of ``modules``."""
    own = {tensor.untyped_storage().data_ptr() for m in modules for tensor in (*m.parameters(), *m.buffers())}
    saved = Saved()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.data_ptr(), tensor.numel()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@contextmanager
def saved_inside(module: nn.Module) -> Iterator[Saved]:
    """What the forward pass of ``module`` keeps, as part of a larger one."""
    saved = Saved()
    contexts: list[torch.autograd.graph.saved_tensors_hooks] = []

    def enter(*_: object) -> None:
        own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                saved[tensor.data_ptr(), tensor.numel()] = tensor
            return tensor

        contexts.append(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        contexts[-1].__enter__()

    def leave(*_: object) -> None:
        contexts.pop().__exit__(None, None, None)

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield saved
    finally:
        for handle in handles:
            handle.remove()
