"""Settings that fit a run into a budget of memory: `peftkern.plan` decides, this asks it and applies what it found."""

from __future__ import annotations

import gc
import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from peftkern.finetune import memory
from peftkern.finetune.config import FinetuneConfig, option_name
from peftkern.finetune.encoding import IGNORED, Example, Splits
from peftkern.finetune.errors import InputError
from peftkern.finetune.modeling import dtype_of

if TYPE_CHECKING:
    from rich.table import Table

    from peftkern.plan import Plan
    from peftkern.plan.devices import Device

PLANNED_METHODS = ("lora", "full")

_LEFT_BY_PLANNING = 200e6
"""Bytes that a search leaves in a process at most: imports, caches of PyTorch, and what Python's allocator keeps. One
for SmolLM2-135M left 145 MB."""

_IN_CHECKPOINT = ("block_size", "double_quant", "embeddings", "head")
"""Settings that a quantized checkpoint has decided."""

_CHOSEN: Mapping[str, str] = {
    "quantization": "of those that fit, the one of least time",
    "embeddings": "fits thereby",
    "head": "fits thereby",
    "optimizer": "fits thereby",
    "logits": "fits thereby",
    "recompute": "of all plans that fit, the one of least time",
    "gradient_checkpointing": "fits thereby",
    "batch_size": "takes less time than making layers again",
    "gradient_accumulation": "as many examples in a step",
}
"""The settings that are chosen, and why one is, where it is not what it was."""


@dataclass(frozen=True)
class Fit:
    """What was chosen, and what it is predicted to take. Memory in bytes, times in seconds.

    Attributes:
        settings: of `FinetuneConfig`, by their names.
        reasons: why each is what it is.
        shape: the largest pass, [examples, tokens].
        device: what trains.
        on_gpu: whether memory is that of a GPU.
        budget: what was asked for.
        beside: what is taken beside tensors, of ``load`` and ``peak`` each.
        load: at the peak of loading.
        peak: at the peak of a step.
        seconds: of a step, without the optimizer; an estimate.
    """

    settings: dict[str, Any]
    reasons: dict[str, str]
    shape: tuple[int, int]
    device: str
    on_gpu: bool
    budget: float
    beside: float
    load: float
    peak: float
    seconds: float

    @property
    def comparable_peak(self) -> float:
        """Of ``peak`` what a run measures: all of the process on a CPU, tensors on a GPU."""
        return self.peak - self.beside if self.on_gpu else self.peak

    def as_data(self) -> dict[str, Any]:
        """All of it; ``Fit(**data)`` is the same."""
        return asdict(self)

    def applied_to(self, config: FinetuneConfig) -> FinetuneConfig:
        """The settings with what was chosen."""
        return replace(config, **self.settings)

    def table(self) -> Table:
        """A rich table with a row for each setting and figure."""
        from rich.table import Table

        rows, tokens = self.shape
        title = f"fitted into {self.budget / 1e9:.4g} GB, for passes of up to {rows} x {tokens} tokens"
        table = Table(title=title, title_justify="left", header_style="bold")
        for heading in ("setting", "value", "why"):
            table.add_column(heading)
        for name, value in self.settings.items():
            table.add_row(option_name(name), _shown(value), self.reasons[name])
        table.add_section()
        beside = "CUDA and its allocator, an estimate" if self.on_gpu else "in it: this process before the model"
        table.add_row("peak of loading", f"{self.load / 1e9:.3f} GB", "predicted")
        table.add_row("peak of a step", f"{self.peak / 1e9:.3f} GB", "predicted", style="bold")
        table.add_row("", f"{self.beside / 1e9:.3f} GB", beside)
        table.add_row("time of a step", f"{self.seconds:.3g} s", f"an estimate for {self.device}")
        return table

    def command(self) -> str:
        """The options that say the same."""
        return " ".join(filter(None, (_option(name, value) for name, value in self.settings.items())))

    def comparison(self, resident_mb: float, gpu_mb: float | None) -> str:
        """Predicted beside measured."""
        measured = resident_mb if gpu_mb is None else gpu_mb
        predicted = self.comparable_peak / 1e6
        line = f"{predicted:.0f} MB predicted, {measured:.0f} MB measured: {predicted / measured:.3f} of it"
        exceeded = measured * 1e6 + (self.beside if self.on_gpu else 0.0) > self.budget
        return f"{line}; --memory was exceeded" if exceeded else line


def check(config: FinetuneConfig) -> None:
    """Whether a run with these settings can be planned.

    Raises:
        InputError: it cannot.
    """
    if config.method not in PLANNED_METHODS:
        raise InputError(
            f"--memory: what --method {config.method} takes cannot be predicted; --method "
            f"{' and '.join(PLANNED_METHODS)} can be fitted"
        )
    if config.select is not None:
        raise InputError("--memory: what --select takes cannot be predicted; give one of the two")


def fit(config: FinetuneConfig, given: Collection[str], model_config: Any, splits: Splits) -> Fit:
    """Choose what ``given`` does not name, such that the run fits into ``config.memory`` and takes the least time.

    Args:
        config: with ``memory``.
        given: names of settings that stay.
        model_config: of the model, with what its checkpoint says on quantization.
        splits: what is trained and evaluated on.

    Raises:
        InputError: the model cannot be planned, or nothing fits; the message has the smallest budget that would do.
    """
    from peftkern.plan import PlanError, plan

    assert config.memory is not None
    device = _device()
    kept = set(given)
    settings = {name: getattr(config, name) for name in _IN_CHECKPOINT}
    quantization = config.quantization if "quantization" in kept else "auto"
    existing = getattr(model_config, "quantization_config", None)
    if existing is not None:
        quantization, of_checkpoint = _of_checkpoint(existing)
        settings |= of_checkpoint
        kept |= {"quantization", "embeddings", "head"}
    rows, length, labelled = _largest_pass(config, splits)
    try:
        found = plan(
            _without_quantization(model_config),
            method=config.method,
            rank=config.rank,
            target_modules=config.target_module_names,
            quantization=quantization,
            **settings,
            dtype=dtype_of(config.dtype),
            batch=rows,
            length=length,
            gradient_accumulation=config.gradient_accumulation,
            gradient_checkpointing=config.gradient_checkpointing,
            optimizer=config.optimizer,
            logits=config.logits,
            recompute=config.recompute_words,
            labelled=labelled,
            device=device,
            budget=config.memory,
            keep=_searched(kept),
            split_batch=not config.packing and "gradient_accumulation" not in kept,
        )
    except PlanError as error:
        raise InputError(f"--memory: {str(error).removeprefix('budget: ')}") from error
    fit = _fit_of(found, config, kept, device, existing is not None)
    return fit if fit.on_gpu else _with_the_process_of_now(fit)


def _device() -> Device:
    """This machine's. On a CPU with what the process will have, with all that training imports."""
    import peft  # noqa: F401
    from transformers import Trainer  # noqa: F401

    from peftkern.allocator import return_freed_memory
    from peftkern.plan.devices import of_this_machine

    return_freed_memory()  # what an allocator keeps for itself cannot be predicted
    return of_this_machine(_resident() + _LEFT_BY_PLANNING)


def _resident() -> float:
    return memory.resident_mb() * 1e6


def _with_the_process_of_now(fit: Fit) -> Fit:
    """With what the process has taken after the search in place of what it was taken to have."""
    gc.collect()  # the models that were followed
    beside = _resident()
    more = beside - fit.beside
    found = replace(fit, beside=beside, load=fit.load + more, peak=fit.peak + more)
    needed = max(found.load, found.peak)
    if needed > fit.budget:
        raise InputError(f"--memory: the search itself took more than was expected; {needed / 1e9:.3f} GB would do")
    return found


def _searched(kept: Collection[str]) -> list[str]:
    from peftkern.plan.search import SEARCHED

    return [name for name in SEARCHED if name in kept]


def _of_checkpoint(existing: Any) -> tuple[str, dict[str, Any]]:
    """Its format, and the other settings that it has."""
    from peftkern.integrations.registration import METHOD

    stated = existing if isinstance(existing, Mapping) else existing.to_dict()
    if stated.get("quant_method") != METHOD:
        name = stated.get("quant_method")
        raise InputError(f"--memory: the checkpoint is quantized by {name}, which cannot be planned; give a dense one")
    return stated["format"], {name: stated[name] for name in _IN_CHECKPOINT if name in stated}


def _without_quantization(model_config: Any) -> Any:
    import copy

    dense = copy.deepcopy(model_config)
    if hasattr(dense, "quantization_config"):
        del dense.quantization_config
    return dense


def _largest_pass(config: FinetuneConfig, splits: Splits) -> tuple[int, int, float]:
    """Rows, tokens, and the share of them that has labels."""
    examples = [*splits.train, *splits.held_out]
    lengths = heapq.nlargest(config.batch_size, (len(example["input_ids"]) for example in examples))
    labels = sum(heapq.nlargest(config.batch_size, map(_labels, examples)))
    rows, length = (1, sum(lengths)) if config.packing else (config.batch_size, lengths[0])
    return rows, length, min(1.0, labels / (rows * length))


def _labels(example: Example) -> int:
    return sum(label != IGNORED for label in example["labels"])


def _fit_of(found: Plan, config: FinetuneConfig, kept: Collection[str], device: Device, quantized: bool) -> Fit:
    options = found.options
    settings: dict[str, Any] = {
        name: getattr(options, name) for name in ("quantization", "embeddings", "head", "optimizer", "logits")
    }
    settings["recompute"] = _as_text(options.recompute)
    settings["gradient_checkpointing"] = options.gradient_checkpointing
    settings["batch_size"] = config.batch_size if config.packing else options.batch
    settings["gradient_accumulation"] = options.gradient_accumulation
    if quantized:  # what a checkpoint is stays out of the settings
        settings = {
            name: value for name, value in settings.items() if name not in ("quantization", "embeddings", "head")
        }
    reasons = {}
    for name, value in settings.items():
        if name in kept and value == getattr(config, name):
            reasons[name] = "as it was asked for"
        elif value != getattr(config, name) or name == "quantization":
            reasons[name] = _CHOSEN[name]
        else:
            reasons[name] = "nothing else was needed"
    return Fit(
        settings=settings,
        reasons=reasons,
        shape=(options.batch, options.length),
        device=found.device,
        on_gpu=device.is_gpu,
        budget=found.budget or 0.0,
        beside=found.beside,
        load=found.load,
        peak=found.peak,
        seconds=found.seconds,
    )


def _as_text(recompute: str | Sequence[str] | None) -> str | None:
    """As ``--recompute`` takes it."""
    if recompute is None or isinstance(recompute, str):
        return recompute
    return ",".join(f"{word}*{len(list(group))}" for word, group in groupby(recompute))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def _option(name: str, value: Any) -> str:
    if name == "logits":
        return "" if value else "--no-logits"
    if value is None or isinstance(value, bool):
        return option_name(name) if value else ""
    return f"{option_name(name)} {value}"
