"""Which modules of a model are quantized, and why the others are not."""

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

from peftkern.integrations.quant_config import QuantConfig
from peftkern.nn import QuantizedEmbedding, QuantizedLinear
from peftkern.patch.experts import holds_packed_experts

logger = logging.getLogger("peftkern")


@dataclass
class Selection:
    """What to quantize.

    Attributes:
        chosen: names of the modules to quantize, in the order of the model, and their formats.
        skipped: names of the other modules, and why they stay dense.
        tied: names of the embeddings in ``chosen`` and of the head that has its weight from them.
    """

    chosen: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    tied: tuple[str, str] | None = None


@dataclass
class _Ends:
    """The input and the output embeddings of a model, beneath adapters, by name; ``None`` where it has none."""

    embeddings: str | None = None
    head: str | None = None
    tied: bool = False


def select_modules(model: nn.Module, config: QuantConfig) -> Selection:
    """Apply the rules to every ``nn.Linear`` (and GPT-2's ``Conv1D``, the same layer with a transposed weight), and to
    the input embeddings where ``config`` asks for it.

    Args:
        model: any module; it may be on the meta device.
        config: formats and skip rules.

    Raises:
        ValueError: ``config`` asks for embeddings or a head of something that is no transformers model, or for
            different formats of tied ones.
    """
    ends = _ends(model, config)
    selection = Selection()
    _select_embeddings(model, config, ends, selection)
    _select_linears(model, config, ends, selection)
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    selection.chosen = dict(sorted(selection.chosen.items(), key=lambda item: order[item[0]]))
    return selection


def _ends(model: nn.Module, config: QuantConfig) -> _Ends:
    if config.embeddings is None and config.head is None:
        return _Ends()
    pretrained = next(pretrained_models(model), None)
    if pretrained is None:
        raise ValueError(f"embeddings and head: {type(model).__name__} is no model of transformers, which has them")
    modules = [pretrained.get_input_embeddings(), pretrained.get_output_embeddings()]
    embeddings, head = (getattr(module, "base_layer", module) for module in modules)
    names = {id(module): name for name, module in model.named_modules()}
    ends = _Ends(names.get(id(embeddings)), names.get(id(head)))
    ends.tied = head is not None and _are_tied(pretrained, embeddings, head)
    if ends.tied and None not in (config.embeddings, config.head) and config.embeddings != config.head:
        raise ValueError(
            f"embeddings and head must have one format, because they are tied; got {config.embeddings!r} and "
            f"{config.head!r}"
        )
    return ends


def _are_tied(pretrained: Any, embeddings: Any, head: Any) -> bool:
    weights = [getattr(module, "weight", None) for module in (embeddings, head)]
    if weights[0] is weights[1]:
        return True
    names = {id(parameter): name for name, parameter in pretrained.named_parameters(remove_duplicate=False)}
    tied = pretrained.all_tied_weights_keys
    return bool(tied.get(names.get(id(weights[1])), "") == names.get(id(weights[0])))


def _select_embeddings(model: nn.Module, config: QuantConfig, ends: _Ends, selection: Selection) -> None:
    format = config.embeddings or (config.head if ends.tied else None)
    if format is None or ends.embeddings is None:
        return
    module: Any = model.get_submodule(ends.embeddings)
    if isinstance(module, QuantizedEmbedding):
        reason = f"quantized before, in {module.format}"
    elif type(module) is not nn.Embedding:
        reason = f"a layer of its own kind, {type(module).__name__}"
    elif module.max_norm is not None:
        reason = "its weight changes on look-ups (max_norm)"
    elif id(module) in adapter_ids(model):
        reason = "part of an adapter"
    elif _holders(model, module.weight) > 1 + ends.tied:
        reason = "tied to several modules"
    elif matches(ends.embeddings, _float32_names(model)):
        reason = "kept in float32 by the model"
    elif matches(ends.embeddings, config.skip_modules or ()):
        reason = "in skip_modules"
    else:
        selection.chosen[ends.embeddings] = format
        selection.tied = (ends.embeddings, ends.head) if ends.tied and ends.head is not None else None
        return
    selection.skipped[ends.embeddings] = reason


def _holders(model: nn.Module, weight: Any) -> int:
    """How many modules hold ``weight``, or will when transformers has tied them."""
    holders = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight}
    for pretrained in pretrained_models(model):
        names = {id(parameter): name for name, parameter in pretrained.named_parameters(remove_duplicate=False)}
        own = names.get(id(weight))
        prefix = next(name for name, module in model.named_modules() if module is pretrained)
        tied = [target for target, source in pretrained.all_tied_weights_keys.items() if source == own]
        holders |= {f"{prefix}.{name}".removeprefix(".") for name in tied}
    return len(holders)


def _select_linears(model: nn.Module, config: QuantConfig, ends: _Ends, selection: Selection) -> None:
    skip_modules = config.skip_modules
    heads = head_ids(model) if skip_modules is None else set()
    if config.head is not None and ends.head is not None:
        heads.discard(id(model.get_submodule(ends.head)))
    tied, adapters, kept_dense = _tied_ids(model), adapter_ids(model), _float32_names(model)
    for name, module in model.named_modules():
        if holds_packed_experts(module):
            selection.skipped[name] = "packed experts, which only exist dense"
        if not isinstance(module, (nn.Linear, Conv1D)) or name in (selection.tied or ()):
            continue
        if isinstance(module, QuantizedLinear):
            reason = f"quantized before, in {module.quantized.format}"
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
            selection.chosen[name] = config.head if config.head is not None and name == ends.head else config.format
            continue
        selection.skipped[name] = reason
    _warn_of_unused_names(model, skip_modules or ())


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
