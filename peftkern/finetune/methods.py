"""Training methods by the name that ``--method`` takes. A new one is one more row, and the class that the row names."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from peftkern.finetune.errors import InputError

if TYPE_CHECKING:
    from peftkern.finetune.config import FinetuneConfig
    from peftkern.select.method import Method

ADAPTER, DELTA, MODEL, PRUNED = "adapter", "delta", "model", "pruned"
"""What a run writes: PEFT's adapter, a `peftkern.sparse.SparseUpdate`, a model folder of transformers, and masks over
the base weights, a `peftkern.sparse.Pruned`."""


@dataclass(frozen=True)
class MethodEntry:
    """A method, and what a run needs to know of it.

    Attributes:
        implementation: ``"module:Class"`` of a `peftkern.select.method.Method`; ``None``: the Trainer alone.
        trains_weights: the method trains the weights themselves, so they must be dense.
        low_rank: LoRA adapters are put on the model.
        results: names of what it writes.
    """

    name: str
    summary: str
    results: tuple[str, ...]
    implementation: str | None = None
    trains_weights: bool = False
    low_rank: bool = False


METHODS: Mapping[str, MethodEntry] = {
    entry.name: entry
    for entry in (
        MethodEntry("lora", "low-rank adapters", (ADAPTER,), low_rank=True),
        MethodEntry("full", "every weight", (MODEL,), trains_weights=True),
        MethodEntry(
            "hft",
            "half of the matrices, drawn at random",
            (MODEL,),
            "peftkern.select.half_fine_tuning:HalfFineTuning",
            trains_weights=True,
        ),
        MethodEntry(
            "cofitune",
            "a few kinds of matrices in a quarter of the layers",
            (MODEL,),
            "peftkern.select.cofitune:CoFiTune",
            trains_weights=True,
        ),
        MethodEntry(
            "spdf",
            "every weight that a static random mask keeps",
            (MODEL,),
            "peftkern.sparse.static_mask:StaticMask",
            trains_weights=True,
        ),
        MethodEntry(
            "lt-sft",
            "the few entries of the weights that full fine-tuning moves most",
            (DELTA,),
            "peftkern.sparse.lottery_ticket:LotteryTicket",
            trains_weights=True,
        ),
        MethodEntry(
            "spiel",
            "a few entries of the weights, which move to where the gradient is",
            (DELTA,),
            "peftkern.sparse.spiel:SpIEL",
        ),
        MethodEntry(
            "rosa",
            "low-rank adapters and a few entries of the weights",
            (ADAPTER, DELTA),
            "peftkern.sparse.rosa:RoSA",
            low_rank=True,
        ),
        MethodEntry(
            "dsee",
            "low-rank adapters and a few entries of the weights, which are pruned on the way",
            (ADAPTER, DELTA, PRUNED),
            "peftkern.sparse.dsee:DSEE",
            low_rank=True,
        ),
    )
}


def build(config: FinetuneConfig) -> Method | None:
    """The method that the settings ask for; ``None`` where the Trainer does without.

    Its arguments ``targets`` and ``seed`` are the settings of these meanings, the others come from
    ``method_options``.

    Raises:
        InputError: an option is unknown, or its value does not fit.
    """
    entry, options = METHODS[config.method], _split(config.method_options)
    if entry.implementation is None:
        if options:
            raise InputError(f"--method-options: {entry.name} has none, got {', '.join(options)}")
        return None
    module, _, name = entry.implementation.partition(":")
    implementation = getattr(importlib.import_module(module), name)
    known = {name: hint for name, hint in get_type_hints(implementation.__init__).items() if _readers_of(hint)}
    settings = {"targets": config.target_module_names, "seed": config.seed}
    parameters = inspect.signature(implementation).parameters
    arguments = {name: value for name, value in settings.items() if name in parameters}
    arguments |= {name: _convert(name, text, known, entry) for name, text in options.items()}
    try:
        method: Method = implementation(**arguments)
    except (ValueError, TypeError) as error:
        raise InputError(f"--method-options: {error}") from error
    return method


def _split(text: str | None) -> dict[str, str]:
    options: dict[str, str] = {}
    for item in (text or "").split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not item.strip():
            continue
        if not equals or not name or name in options:
            problem = "is given twice" if name in options else "is not NAME=VALUE"
            raise InputError(f"--method-options: {item.strip()!r} {problem}; write for example density=0.01,seed=3")
        options[name] = value
    return options


def _convert(name: str, text: str, known: Mapping[str, Any], entry: MethodEntry) -> Any:
    key = name.replace("-", "_")
    if key not in known:
        close = difflib.get_close_matches(key, known, 1)
        guess = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(sorted(known))}"
        raise InputError(f"--method-options: {entry.name} has no option {name!r}; {guess}")
    readers = _readers_of(known[key])
    for read in readers.values():
        try:
            return read(text)
        except (ValueError, KeyError):
            continue
    raise InputError(f"--method-options: {name} must be {' or '.join(readers)}, got {text!r}")


_READERS: Mapping[type, tuple[str, Callable[[str], Any]]] = {
    NoneType: ("none", {"none": None}.__getitem__),
    bool: ("true or false", {"true": True, "false": False}.__getitem__),
    int: ("int", int),
    float: ("float", float),
    str: ("str", str),
}


def _readers_of(hint: Any) -> dict[str, Callable[[str], Any]]:
    """How a value of this type is read from text; empty for types that have no text, such as batches."""
    types = get_args(hint) or (hint,)
    if not set(types) <= _READERS.keys() or types == (NoneType,):
        return {}
    return dict(reader for wanted, reader in _READERS.items() if wanted in types)
