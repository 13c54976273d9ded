"""Memory and work of one set of options; what several sets share is made once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.backends import chunked_loss
from peftkern.optim import AdamW, AdamW8bit
from peftkern.plan import memory, work
from peftkern.plan.devices import Device
from peftkern.plan.errors import PlanError
from peftkern.plan.layers import DEPTH, Layers, WordCosts, plus, word_costs
from peftkern.plan.memory import Parts
from peftkern.plan.model import Subject, build, load_config, stand_in
from peftkern.plan.options import LAYER_WORDS, Options
from peftkern.plan.result import Plan

SHALLOW = 4
"""Layers of the shallower of two models from which a deep one follows; both ends and two in between."""


class Predictor:
    """Plans of one model on one device."""

    def __init__(self, model: Any, device: Device) -> None:
        self.device = device
        self.config = load_config(model)
        self._model = model
        self._built: dict[Options, Subject] = {}
        self._watched: dict[tuple[Options, int | None], Mapping[str, memory.Segment]] = {}
        self._peaks: dict[Options, Parts] = {}
        self._works: dict[Options, work.Work] = {}
        self._costs: dict[Options, WordCosts] = {}
        self._shallow: dict[Options, work.Work] = {}

    @property
    def longest(self) -> int:
        """The most tokens that a sequence may have."""
        text = self.config.get_text_config()
        return int(getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 1 << 20)

    def peak(self, options: Options) -> Parts:
        """Bytes of each part at the peak of a step."""
        if options not in self._peaks:
            segments = self._segments(options)
            self._peaks[options] = max(segments.values(), key=lambda parts: sum(parts.values()))
        return self._peaks[options]

    def total(self, options: Options) -> float:
        """Bytes at the peak of loading or of a step, the higher one: all parts and what the device takes."""
        tensors = max(sum(self.peak(options).values()), self._loading(options))
        return tensors + self.device.beside(tensors)

    def seconds(self, options: Options) -> float:
        """Of a step."""
        return options.gradient_accumulation * self._work(options).seconds

    def can_be(self, options: Options) -> bool:
        """Whether there is such a model."""
        try:
            self._subject(options)
        except PlanError:
            return False
        return True

    def plan(self, options: Options) -> Plan:
        """All that a plan says."""
        subject = self._subject(options)
        peak = self.peak(options)
        counted, passes = self._work(options), options.gradient_accumulation
        tensors = self._loading(options)
        load = tensors + self.device.beside(tensors)
        trained = sum(parameter.numel() for parameter in subject.model.parameters() if parameter.requires_grad)
        return Plan(
            model=_name_of(self._model, self.config),
            options=options,
            device=self.device.name,
            rates_measured=self.device.measured,
            device_memory=self.device.memory,
            beside=self.device.beside(sum(peak.values())),
            load=load,
            parts=dict(peak),
            trained=trained,
            forward_flops=passes * counted.forward_flops,
            backward_flops=passes * counted.backward_flops,
            bytes_moved=passes * counted.bytes,
            seconds=passes * counted.seconds,
        )

    def room(self, options: Options, budget: float) -> float:
        """What a budget leaves for what `layers` counts, in bytes."""
        tensors = (budget - self.device.beside(0.0)) / (1.0 + self.device.rounded_up)
        return tensors - self._own_scratch(self._subject(options))

    def layers(self, options: Options, words: Iterable[str] = LAYER_WORDS) -> Layers | None:
        """The layers of a deep model under any plan of those of ``words`` that they can have; ``None``: the model is
        not one of many equal layers, or they can have no plan.
        """
        stored = replace(options, recompute=None)
        subject = self._subject(stored)
        if not self._is_deep(subject) or not options.patched or options.method is None:
            return None
        assert subject.layers is not None
        count = len(subject.layers)
        layer, gradients = memory.of_a_layer(subject, _state_bytes(options.optimizer))
        if options.gradient_accumulation > 1:  # they are there at any time
            layer, gradients = plus(layer, gradients), plus(gradients, gradients, -1)
        costs = {}
        for word in dict.fromkeys(("store", *words)):
            try:
                costs[word] = self._costs_of(replace(options, recompute=(word,) * count))
            except PlanError:
                if word == "store":
                    return None
        if stored not in self._shallow:
            self._shallow[stored] = self._work_at(DEPTH - 1, subject, options)
        return Layers(count, costs, layer, gradients, self._shallow[stored])

    def _costs_of(self, options: Options) -> WordCosts:
        """Of layers that all have the same word."""
        if options not in self._costs:
            subject = self._subject(options)
            segments = self._watch_at(DEPTH, subject, options)
            self._costs[options] = word_costs(segments, self._work_at(DEPTH, subject, options))
        return self._costs[options]

    def _segments(self, options: Options) -> Mapping[str, Parts]:
        subject = self._subject(options)
        scratch = self._own_scratch(subject)
        if not self._is_deep(subject):
            found: Mapping[str, Parts] = _peaks(self._watch_at(None, subject, options))
        elif isinstance(options.recompute, tuple):
            layers = self.layers(options, options.recompute)
            assert layers is not None
            found = layers.segments(options.recompute)
        else:
            shallow, deep = (_peaks(self._watch_at(depth, subject, options)) for depth in (SHALLOW, SHALLOW + 1))
            found = memory.extrapolate(shallow, deep, len(subject.layers or ()) - SHALLOW - 1)
        return {name: {**parts, "scratch": parts["scratch"] + scratch} for name, parts in found.items()}

    def _is_deep(self, subject: Subject) -> bool:
        return subject.layers is not None and len(subject.layers) > SHALLOW + 2

    def _watch_at(self, depth: int | None, subject: Subject, options: Options) -> Mapping[str, memory.Segment]:
        """With what is there at any time: the state of the optimizer, and gradients of the passes before."""
        key = replace(options, optimizer="SGD", gradient_accumulation=1), depth
        with subject.with_depth(depth):
            if key not in self._watched:
                with chunked_loss.assuming("cuda" if self.device.is_gpu else "cpu"):
                    self._watched[key] = memory.watch_step(subject, _batch(options)).segments()
            trained = [parameter for parameter in subject.model.parameters() if parameter.requires_grad]
        state = _state_bytes(options.optimizer)
        there = {"optimizer": float(sum(state(parameter) for parameter in trained))}
        if options.gradient_accumulation > 1:
            there["gradients"] = float(sum(parameter.nbytes for parameter in trained))
        return {name: segment.with_parts(there) for name, segment in self._watched[key].items()}

    def _loading(self, options: Options) -> float:
        """Bytes of tensors."""
        return self.peak(options)["weights"] + self._subject(options).largest_dense

    def _own_scratch(self, subject: Subject) -> float:
        """What the kernels of a GPU keep from call to call: room for one decoded weight."""
        return float(subject.largest_decoded) if self.device.is_gpu else 0.0

    def _work(self, options: Options) -> work.Work:
        """Of one pass."""
        key = replace(options, optimizer="SGD", gradient_accumulation=1)
        if key not in self._works:
            self._works[key] = self._count_work(options)
        return self._works[key]

    def _count_work(self, options: Options) -> work.Work:
        subject = self._subject(options)
        if not self._is_deep(subject):
            return self._work_at(None, subject, options)
        if isinstance(options.recompute, tuple):
            layers = self.layers(options, options.recompute)
            assert layers is not None
            return layers.work(options.recompute)
        shallow, deep = (self._work_at(depth, subject, options) for depth in (SHALLOW, SHALLOW + 1))
        return deep.extrapolated(shallow, len(subject.layers or ()) - SHALLOW - 1)

    def _work_at(self, depth: int | None, subject: Subject, options: Options) -> work.Work:
        with subject.with_depth(depth):
            return work.count_work(subject, _batch(options), self.device.rates)

    def _subject(self, options: Options) -> Subject:
        key = replace(options, batch=1, length=1, labelled=1.0, optimizer="SGD", gradient_accumulation=1)
        if key not in self._built:
            subject = stand_in(self._model, options) if options.method is None else build(self.config, options)
            self._built[key] = subject
        return self._built[key]


def _peaks(segments: Mapping[str, memory.Segment]) -> dict[str, dict[str, float]]:
    return {name: segment.peak for name, segment in segments.items()}


def _batch(options: Options) -> dict[str, Tensor]:
    ids = torch.zeros(options.batch, options.length, dtype=torch.int64)
    labels = ids.clone()
    labels[:, : options.length - max(1, round(options.labelled * options.length))] = -100
    return {"input_ids": ids, "labels": labels}


def _state_bytes(optimizer: str) -> Callable[[Tensor], int]:
    if optimizer == "SGD":
        return lambda _parameter: 0
    made = {"AdamW": AdamW, "AdamW8bit": AdamW8bit}[optimizer]([nn.Parameter(torch.empty(0))])
    return lambda parameter: sum(state.nbytes for state in made._empty(parameter).values())


def _name_of(model: Any, config: Any) -> str:
    if isinstance(model, str):
        return model
    return str(getattr(config, "name_or_path", "") or type(config).__name__.removesuffix("Config"))
