"""Which module of a model is at work: in the forward pass the innermost one that was called, in the backward pass the
one whose forward made the autograd node that runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as global_hooks

from peftkern.bench.traffic.operators import tensors

OUTSIDE = "(outside)"
"""Stands for no module of the model."""

_KEY = "peftkern.bench.traffic"


class Scopes:
    """Follows the calls of the modules of one model, as a context manager.

    It hangs on PyTorch's hooks for all modules, not on those of the model: a layer with hooks of its own may run other
    code than one without.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._stack: list[str] = []

    def current(self) -> str:
        """Dotted name of the module at work, or :data:`OUTSIDE`."""
        if self._stack:
            return self._stack[-1]
        node = running_node()
        return OUTSIDE if node is None else str(node.metadata.get(_KEY, OUTSIDE))

    @contextmanager
    def following(self) -> Iterator[None]:
        """Inside, :meth:`current` is up to date."""
        handles = [
            global_hooks.register_module_forward_pre_hook(self._enter),
            global_hooks.register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        name = self._names.get(module)
        if name is None:
            return
        # Whatever made the inputs belongs to the caller.
        self._claim(inputs, self._stack[-1] if self._stack else OUTSIDE)
        self._stack.append(name)

    def _leave(self, module: nn.Module, _inputs: Any, outputs: Any) -> None:
        if module in self._names:
            self._claim(outputs, self._stack.pop())

    def _claim(self, values: Any, name: str) -> None:
        """Give ``name`` to all nodes behind ``values`` that have no name yet."""
        nodes: list[Any] = [tensor.grad_fn for tensor in tensors(values)]
        while nodes:
            node = nodes.pop()
            if node is None or _KEY in node.metadata:
                continue
            node.metadata[_KEY] = name
            nodes += [following for following, _ in node.next_functions]


def running_node() -> Any:
    """The autograd node whose backward runs in this thread, or ``None`` outside of the backward pass."""
    return torch._C._current_autograd_node()
