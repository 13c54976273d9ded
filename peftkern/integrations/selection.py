"""Which linear modules of a model are quantized, and why the others are not."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftkern.nn import QuantizedLinear
from peftkern.patch.experts import holds_packed_experts

logger = logging.getLogger("peftkern")


@dataclass
class Selection:
    """Names of the modules to quantize, in the order of the model; of the others, by name, why they stay dense."""

    chosen: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def select_linears(model: nn.Module, skip_modules: Sequence[str] | None) -> Selection:
    """Apply the rules to every ``nn.Linear`` (and GPT-2's ``Conv1D``, the same layer with a transposed weight).

    Args:
        model: any module; it may be on the meta device.
        skip_modules: as in :class:`~peftkern.integrations.quant_config.QuantConfig`.
    """
    selection = Selection()
    heads = head_ids(model) if skip_modules is None else set()
    tied, adapters, kept_dense = _tied_ids(model), adapter_ids(model), _float32_names(model)
    for name, module in model.named_modules():
        if holds_packed_experts(module):
            selection.skipped[name] = "packed experts, which only exist dense"
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        if isinstance(module, QuantizedLinear):
            reason = f"quantized before, in {module.format}"
        elif type(module) not in (nn.Linear, Conv1D):
            reason = f"a layer of its own kind, {type(module).__name__}"
        elif id(module) in adapters:
            reason = "part of an adapter"
        elif id(module.weight) in tied:
            reason = "tied to another module"
        elif matches(name, kept_dense):
            reason = "kept in float32 by the model"
        elif id(module) in heads:
            reason = "output embeddings or another head"
        elif matches(name, skip_modules or ()):
            reason = "in skip_modules"
        else:
            selection.chosen.append(name)
            continue
        selection.skipped[name] = reason
    _warn_of_unused_names(model, skip_modules or ())
    return selection


def matches(name: str, entries: Iterable[str]) -> bool:
    """Whether one of ``entries`` is the module's name, or some of its parts between dots."""
    return any(f".{entry}." in f".{name}." for entry in entries)


def _warn_of_unused_names(model: nn.Module, skip_modules: Sequence[str]) -> None:
    names = [name for name, _ in model.named_modules()]
    unused = [entry for entry in skip_modules if not any(matches(name, [entry]) for name in names)]
    if unused:
        logger.warning("skip_modules names modules that %s does not have: %s", type(model).__name__, ", ".join(unused))


def pretrained_models(model: nn.Module) -> Iterator[Any]:
    """The transformers models in ``model``, outermost first."""
    return (module for module in model.modules() if isinstance(module, PreTrainedModel))


def head_ids(model: nn.Module) -> set[int]:
    """Modules of the output embeddings, and everything beside the body of the outermost transformers model."""
    pretrained = next(pretrained_models(model), None)
    if pretrained is None:
        return set()
    body = {id(module) for module in pretrained.base_model.modules()}
    heads = {id(module) for module in pretrained.modules()} - body
    output = pretrained.get_output_embeddings()
    return heads | ({id(module) for module in output.modules()} if output is not None else set())


def _tied_ids(model: nn.Module) -> set[int]:
    """Parameters that several modules hold, or that transformers will tie once they are loaded."""
    counts = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    tied = {identity for identity, count in counts.items() if count > 1}
    for pretrained in pretrained_models(model):
        names = pretrained.all_tied_weights_keys
        parameters = dict(pretrained.named_parameters(remove_duplicate=False))
        tied |= {id(parameters[name]) for name in (*names.keys(), *names.values()) if name in parameters}
    return tied


def _float32_names(model: nn.Module) -> list[str]:
    names: list[str] = []
    for pretrained in pretrained_models(model):
        names.extend(pretrained._keep_in_fp32_modules or ())
        names.extend(pretrained._keep_in_fp32_modules_strict or ())
    return names


def adapter_ids(model: nn.Module) -> set[int]:
    """Modules that PEFT has put into the model: everything in its layers but what they stand in front of."""
    if "peft" not in sys.modules:
        return set()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    adapters: set[int] = set()
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            adapters |= {id(inner) for inner in module.modules()}
        elif isinstance(module, BaseTunerLayer):
            base = {id(inner) for inner in module.get_base_layer().modules()}
            adapters |= {id(inner) for inner in module.modules()} - base
    return adapters
