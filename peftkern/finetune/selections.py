"""Policies by the name that ``--select`` takes. A new one is one more row, and the class that the row names."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftkern.finetune.errors import InputError

if TYPE_CHECKING:
    from peftkern.finetune.config import FinetuneConfig
    from peftkern.select.policy import Policy


@dataclass(frozen=True)
class SelectEntry:
    """A policy.

    Attributes:
        implementation: ``"module:Class"`` of a `peftkern.select.policy.Policy`.
        arguments: of the class, in front of those that are settings of a run.
    """

    name: str
    summary: str
    implementation: str
    arguments: tuple[Any, ...] = ()


_PRESET = "peftkern.select.presets:Preset"

SELECTIONS: Mapping[str, SelectEntry] = {
    entry.name: entry
    for entry in (
        SelectEntry(
            "green", "the most important tensors within a budget", "peftkern.select.green_trainer:GreenTrainer"
        ),
        SelectEntry("random", "random tensors within a budget", "peftkern.select.random_selection:RandomSelection"),
        SelectEntry("lisa", "two random blocks, and all that is outside of blocks", "peftkern.select.lisa:LISA"),
        SelectEntry("last-block", "the last block", _PRESET, ("last_block",)),
        SelectEntry("head", "the head that gives the logits, where it is not tied", _PRESET, ("head",)),
        SelectEntry("embeddings", "the embeddings", _PRESET, ("embeddings",)),
        SelectEntry("embeddings-head", "the embeddings and the head", _PRESET, ("embeddings", "head")),
        SelectEntry("biases", "biases (BitFit)", _PRESET, ("biases",)),
        SelectEntry("norms", "normalisation layers", _PRESET, ("norms",)),
    )
}

_ARGUMENT_OF = {"rho": "rho", "select_interval": "interval", "select_budget": "budget"}
"""Argument of a policy by the setting that gives it."""


def build(config: FinetuneConfig) -> Policy:
    """The policy that ``config.select`` names, with those settings that it takes.

    Raises:
        InputError: a setting is one that this policy does not take, or has a value that does not fit.
    """
    entry = SELECTIONS[str(config.select)]
    parameters = _parameters_of(entry)
    arguments: dict[str, Any] = {"seed": config.seed} if "seed" in parameters else {}
    for setting, argument in _ARGUMENT_OF.items():
        value = getattr(config, setting)
        if value is not None and argument not in parameters:
            raise InputError(_not_taken(setting, argument, entry))
        if value is not None:
            arguments[argument] = value
    try:
        policy: Policy = _class_of(entry)(*entry.arguments, **arguments)
    except (ValueError, TypeError) as error:
        raise InputError(f"--select {entry.name}: {error}") from error
    policy.record_costs = True
    return policy


def _class_of(entry: SelectEntry) -> Any:
    module, _, name = entry.implementation.partition(":")
    return getattr(importlib.import_module(module), name)


def _parameters_of(entry: SelectEntry) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_class_of(entry)).parameters


def _not_taken(setting: str, argument: str, entry: SelectEntry) -> str:
    takers = [other.name for other in SELECTIONS.values() if argument in _parameters_of(other)]
    option = "--" + setting.replace("_", "-")
    return f"{option}: --select {entry.name} does not take it; those that do: {', '.join(takers)}"
