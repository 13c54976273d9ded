"""Memory and work of one set of options; what several sets share is made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.backends import chunked_loss
from peftkern.optim import AdamW, AdamW8bit
from peftkern.plan import memory, work
from peftkern.plan.devices import Device
from peftkern.plan.memory import Parts
from peftkern.plan.model import Subject, build, load_config, stand_in
from peftkern.plan.options import Options
from peftkern.plan.result import Plan

SHALLOW = 4
"""Layers of the shallower of two models from which a deep one follows; both ends and two in between."""


class Predictor:
    """Plans of one model on one device."""

    def __init__(self, model: Any, device: Device) -> None:
        self.device = device
        self.config = load_config(model)
        self._model = model
        self._built: tuple[Options, Subject] | None = None
        self._peaks: dict[Options, Parts] = {}

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
        """Bytes at the peak of a step, all parts and what the device takes."""
        tensors = sum(self.peak(options).values())
        return tensors + self.device.beside(tensors)

    def plan(self, options: Options) -> Plan:
        """All that a plan says."""
        subject = self._subject(options)
        peak = self.peak(options)
        counted = self._work(options)
        tensors = peak["weights"] + subject.largest_dense
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
            forward_flops=counted.forward_flops,
            backward_flops=counted.backward_flops,
            bytes_moved=counted.bytes,
            seconds=counted.seconds,
        )

    def _segments(self, options: Options) -> Mapping[str, Parts]:
        subject, batch = self._subject(options), _batch(options)
        state = _state_bytes(options.optimizer)
        scratch = self._own_scratch(subject)

        def peaks(depth: int | None) -> Mapping[str, Parts]:
            with subject.with_depth(depth), chunked_loss.assuming("cuda" if self.device.is_gpu else "cpu"):
                return memory.watch_step(subject, batch, state).peaks()

        count = len(subject.layers) if subject.layers is not None else 0
        if count > SHALLOW + 2:
            found = memory.extrapolate(peaks(SHALLOW), peaks(SHALLOW + 1), count - SHALLOW - 1)
        else:
            found = {name: dict(parts) for name, parts in peaks(None).items()}
        return {name: {**parts, "scratch": parts["scratch"] + scratch} for name, parts in found.items()}

    def _own_scratch(self, subject: Subject) -> float:
        """What the kernels of a GPU keep from call to call: room for one decoded weight."""
        return float(subject.largest_dense) if self.device.is_gpu else 0.0

    def _work(self, options: Options) -> work.Work:
        subject, batch, rates = self._subject(options), _batch(options), self.device.rates
        count = len(subject.layers) if subject.layers is not None else 0
        if count <= SHALLOW + 2:
            return work.count_work(subject, batch, rates)
        with subject.with_depth(SHALLOW):
            shallow = work.count_work(subject, batch, rates)
        with subject.with_depth(SHALLOW + 1):
            deep = work.count_work(subject, batch, rates)
        return deep.extrapolated(shallow, count - SHALLOW - 1)

    def _subject(self, options: Options) -> Subject:
        key = replace(options, batch=1, length=1, labelled=1.0, optimizer="SGD")
        if self._built is None or self._built[0] != key:
            self._built = None
            subject = stand_in(self._model, options) if options.method is None else build(self.config, options)
            self._built = key, subject
        return self._built[1]


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
