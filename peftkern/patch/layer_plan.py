"""What each decoder layer keeps for the backward pass: a plan has a word for each, in their order.

    "store"     what its operators ask for
    "up"        its gated block makes up again
    "mlp"       its gated block makes gate and up again
    "layer"     its input: the whole layer is made again, as by the gradient checkpointing of transformers
    "offload"   what "store" keeps, in the CPU's memory
    "int8"      the same, in 8 bits: gradients are no longer exact
    "float16"   the same, in 16 bits where it has 32: gradients are no longer exact

Decoder layers are those that transformers itself can checkpoint.

Sources: Training Deep Nets with Sublinear Memory Cost, Chen et al. 2016 (arXiv:1604.06174); Checkmate, Jain et al. 2020
(arXiv:1910.02653), section 3, for a choice by layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from peftkern.nn.saved_activations import Form, saved_activations
from peftkern.ops.lora_mlp import RECOMPUTE
from peftkern.patch.arguments import has_own_forward
from peftkern.patch.gated import is_gated_mlp
from peftkern.patch.weights import original_class

TEXTS: Mapping[str, str] = {
    "store": "keeps what it needs in the backward pass",
    "up": "its gated block makes up again in the backward pass",
    "mlp": "its gated block makes gate and up again in the backward pass",
    "layer": "is made again as a whole in the backward pass",
    "offload": "what it keeps for the backward pass waits in the CPU's memory",
    "int8": "what it keeps for the backward pass is rounded to 8 bits",
    "float16": "what it keeps for the backward pass in float32 is rounded to float16",
}
"""What the report says of a layer, by its word."""

_FORMS: Mapping[str, Form] = {"offload": "cpu", "int8": "int8", "float16": "float16"}

LayerPlan = Mapping[str, str]
"""The word of every decoder layer, by its name in the model and in their order."""

NO_CACHE = "its keys and values are not cached: they would outlive what the plan drops"


def is_planned_layer(layer_class: type) -> bool:
    """Whether the class is one of those that transformers can checkpoint."""
    package = sys.modules.get("transformers.modeling_layers")
    return package is not None and issubclass(layer_class, package.GradientCheckpointingLayer)


def read_plan(model: nn.Module, words: Any) -> LayerPlan:
    """``words`` by the names of the layers.

    Args:
        model: of transformers, with adapters or not, or a part of one.
        words: one for each decoder layer.

    Raises:
        TypeError: ``words`` is no sequence.
        ValueError: a word is unknown, there are too many or too few, or a layer cannot do what is asked of it.
    """
    if not isinstance(words, Sequence):
        raise TypeError(f"patch: recompute must be a word, one for each layer, or None; got {type(words).__name__}")
    unknown = [word for word in words if word not in TEXTS]
    if unknown:
        raise ValueError(f"patch: recompute: the words for layers are {', '.join(TEXTS)}; got {unknown[0]!r}")
    name, layers = _decoder_layers(model)
    if len(words) != len(layers):
        raise ValueError(f"patch: recompute has {len(words)} words, and {name or 'the model'} has {len(layers)} layers")
    plan = {f"{name}.{index}".lstrip("."): word for index, word in enumerate(words)}
    for (layer_name, word), layer in zip(plan.items(), layers, strict=True):
        _check_layer(layer_name, layer, word)
    return plan


def in_words(plan: Iterable[str]) -> str:
    """A plan in a line, for example ``"layers 0-11: mlp, 12-15: store"``; empty where there is none."""
    runs, first = [], 0
    for word, group in groupby(plan):
        last = first + len(list(group)) - 1
        runs.append(f"{first}-{last}: {word}" if last > first else f"{first}: {word}")
        first = last + 1
    return f"layers {', '.join(runs)}" if runs else ""


def _decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    found = {name: module for name, module in model.named_modules() if _is_stack(module)}
    if len(found) != 1:
        have = f"has {len(found)}: {', '.join(found)}" if found else "has none"
        raise ValueError(
            "patch: recompute: a word for each layer takes one list of layers that transformers can checkpoint; "
            f"the model {have}"
        )
    name, layers = next(iter(found.items()))
    assert isinstance(layers, nn.ModuleList)
    return name, layers


def _is_stack(module: nn.Module) -> bool:
    is_list = isinstance(module, nn.ModuleList) and len(module) > 0
    return is_list and all(is_planned_layer(original_class(type(layer))) for layer in module.children())


def _check_layer(name: str, layer: nn.Module, word: str) -> None:
    if has_own_forward(layer):
        raise ValueError(f"patch: recompute: the forward of {name} was replaced on the instance; undo that first")
    if getattr(layer, "gradient_checkpointing", False):
        raise ValueError(
            f"patch: recompute: gradient checkpointing is enabled in {name}; disable it, and let the layers that are "
            "to be made again have the word 'layer'"
        )
    if word in RECOMPUTE and not any(is_gated_mlp(original_class(type(module))) for module in layer.modules()):
        raise ValueError(f"patch: recompute: {name} has no gated block that {word!r} could be for; 'layer' would do")
    if word == "offload" and any(parameter.device.type == "cpu" for parameter in layer.parameters()):
        raise ValueError(
            f"patch: recompute: {name} is in the CPU's memory, to which 'offload' would move what it keeps; "
            "'mlp' and 'layer' take less there"
        )


def run_planned(
    word: str,
    forward: Callable[..., Any],
    layer: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    warn: Callable[[str, str], None],
) -> Any:
    """What ``forward`` returns for a layer in training, which keeps what ``word`` says.

    Args:
        word: as above.
        forward: of the class of the layer.
        layer: itself.
        args, kwargs: of the call; the first are the hidden states.
        warn: is told what is done otherwise than asked, and why.

    Raises:
        RuntimeError: gradient checkpointing was enabled after the model was patched.
    """
    if layer.gradient_checkpointing:
        raise RuntimeError(
            "gradient checkpointing was enabled in a model whose layers follow a plan of peftkern.patch: disable it, "
            "or unpatch the model and patch it without a plan"
        )
    if word not in ("layer", *_FORMS):
        return forward(layer, *args, **kwargs)
    args, kwargs = _without_cache(args, kwargs, warn)
    if word == "layer":
        return checkpoint(partial(forward, layer, **kwargs), *args, use_reentrant=False)
    # masks and positions are the caller's, who holds them for all layers
    shared = [leaf for leaf in tree_leaves((args[1:], kwargs)) if isinstance(leaf, Tensor)]
    with saved_activations(layer, _FORMS[word], shared):
        return forward(layer, *args, **kwargs)


def _without_cache(
    args: tuple[Any, ...], kwargs: dict[str, Any], warn: Callable[[str, str], None]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments without the cache of keys and values, as the checkpointing of transformers calls layers."""
    package = sys.modules.get("transformers.cache_utils")
    caches = () if package is None else (package.Cache,)
    if any(isinstance(value, caches) for value in (*args, *kwargs.values())):
        if not torch.compiler.is_compiling():
            warn("does without its cache", NO_CACHE)
        args = tuple(None if isinstance(value, caches) else value for value in args)
        kwargs = {name: None if isinstance(value, caches) else value for name, value in kwargs.items()}
    return args, {**kwargs, "use_cache": False} if "use_cache" in kwargs else kwargs
