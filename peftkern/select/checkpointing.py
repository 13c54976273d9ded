"""Gradient checkpointing where only some tensors are trained, and the hook that comes with it.

Checkpointing computes the activations of a region again, whether a gradient needs them or not; and `transformers` and
`peft` let the output of the embeddings ask for a gradient wherever it is on, which hands the error down through the
whole model. Inside of `Skipping`

    a region that nothing trained is in or before runs as it is: nothing is kept, nothing is computed again
    the lowest region with trained tensors has the gradients that reentrant checkpointing gives no one whose inputs
    need none: its input asks for one, and hands the error no further
    the embeddings' output asks for a gradient only where the embeddings are trained
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

logger = logging.getLogger("peftkern")

_FUNCTION = "_gradient_checkpointing_func"
_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")
"""Names of the hooks on embeddings: of `transformers`, and of `peft`."""


class Skipping:
    """Keeps checkpointing of ``model`` from working for nothing, between `start` and `stop`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._regions: list[tuple[nn.Module, _Region]] = []
        self._hooks: list[tuple[nn.Module, int, Callable[..., Any]]] = []

    def start(self) -> None:
        """Begin, or take in what has been switched on since."""
        checkpointed = [module for module in self._model.modules() if getattr(module, "gradient_checkpointing", False)]
        for module in checkpointed:
            function = getattr(module, _FUNCTION, None)
            if function is not None and not isinstance(function, _Region):
                region = _Region(module, function)
                setattr(module, _FUNCTION, region)
                self._regions.append((module, region))
        unknown = [type(module).__name__ for module in checkpointed if getattr(module, _FUNCTION, None) is None]
        hooks = list(_embedding_hooks(self._model))
        if unknown and hooks:
            logger.warning(
                "gradient checkpointing of %s is out of reach, so the output of the embeddings goes on asking for a "
                "gradient: the error is handed down to there, whatever is trained",
                unknown[0],
            )
            return
        for module, key, hook in hooks:
            del module._forward_hooks[key]
            self._hooks.append((module, key, hook))

    def stop(self) -> None:
        """Everything is as it was."""
        for module, region in self._regions:
            if getattr(module, _FUNCTION, None) is region:
                setattr(module, _FUNCTION, region.function)
        for module, key, hook in self._hooks:
            module._forward_hooks[key] = hook
        self._regions, self._hooks = [], []


def _embedding_hooks(model: nn.Module) -> Iterator[tuple[nn.Module, int, Callable[..., Any]]]:
    for module in model.modules():
        for key, hook in module._forward_hooks.items():
            if getattr(hook, "__name__", "") in _HOOKS:
                yield module, key, hook


class _Region:
    """A checkpointing function of `transformers` that leaves out regions without a gradient."""

    def __init__(self, owner: nn.Module, function: Callable[..., Any]) -> None:
        self.owner = owner
        self.function = function

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs, _bound(run))) if isinstance(leaf, Tensor)]
        if any(tensor.requires_grad for tensor in given):
            return self.function(run, *args, **kwargs)
        if not any(parameter.requires_grad for parameter in _module_of(run, self.owner).parameters()):
            return run(*args)
        return self.function(run, *(_asking(args) if self._is_reentrant else args), **kwargs)

    @property
    def _is_reentrant(self) -> bool:
        keywords = getattr(self.function, "keywords", {})
        return bool(keywords.get("use_reentrant", True))  # where it is not said, asking for a gradient is right as well


def _bound(run: Callable[..., Any]) -> Any:
    return (run.args, run.keywords) if isinstance(run, partial) else ()


def _module_of(run: Callable[..., Any], owner: nn.Module) -> nn.Module:
    """The module that ``run`` runs: its owner, or one of the owner's."""
    while isinstance(run, partial):
        if run.args and isinstance(run.args[0], nn.Module):
            return run.args[0]
        run = run.func
    bound = getattr(run, "__self__", None)
    return bound if isinstance(bound, nn.Module) else owner


def _asking(args: tuple[Any, ...]) -> list[Any]:
    """``args``, the first floating-point tensor asking for a gradient of its own."""
    new = list(args)
    for index, value in enumerate(new):
        if isinstance(value, Tensor) and torch.is_floating_point(value):
            new[index] = value.detach().requires_grad_()
            break
    return new
