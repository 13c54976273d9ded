"""Which module of a model is at work: in the forward pass the innermost one that was called, in the backward pass the
one whose forward made the autograd node that runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peftkern.bench.traffic.operators import tensors

OUTSIDE = "(outside)"
"""Stands for no module of the model."""

_KEY = "peftkern.bench.traffic"


class Scopes:
    """Follows the calls of the modules of one model.

    It stands in front of the call itself. Hooks, on these modules or on all, would be noticed: a layer with hooks may
    run other code than one without.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._stack: list[str] = []
        self._makers: WeakKeyDictionary[torch.UntypedStorage, str] = WeakKeyDictionary()

    def current(self) -> str:
        """Dotted name of the module at work, or :data:`OUTSIDE`."""
        if self._stack:
            return self._stack[-1]
        node = running_node()
        return OUTSIDE if node is None else str(node.metadata.get(_KEY, OUTSIDE))

    def maker(self, tensor: Tensor) -> str:
        """The innermost module that has returned this memory, or :data:`OUTSIDE`."""
        return self._makers.get(tensor.untyped_storage(), OUTSIDE)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Inside, :meth:`current` and :meth:`maker` are up to date."""
        original: Any = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            name = self._names.get(module)
            if name is None:
                return original(module, *args, **kwargs)
            self._claim((args, kwargs), self._stack[-1] if self._stack else OUTSIDE)  # what made the inputs
            self._stack.append(name)
            try:
                outputs = original(module, *args, **kwargs)
                self._claim(outputs, name)
            finally:
                self._stack.pop()
            for tensor in tensors(outputs):
                self._makers.setdefault(tensor.untyped_storage(), name)
            return outputs

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]

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
