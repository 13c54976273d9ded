"""Which base model something was trained on: equal for one model whether it is dense or quantized, in any dtype.

What quantization leaves alone (embeddings, norms, biases) is sampled, rounded to bfloat16; of linear layers, names and
shapes count.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftkern.integrations.selection import adapter_ids

_TENSORS = 16
_NUMBERS = {1: 64, 2: 1024}
"""How many numbers are taken of a tensor, by its number of dimensions."""

_REMEMBERED = "_peftkern_base"


class WrongBaseError(ValueError):
    """Something is of another base model than the one it is to be applied to."""


@dataclass(frozen=True)
class Sample:
    """Elements of one tensor at even distances, in bfloat16, and its shape."""

    shape: tuple[int, ...]
    numbers: Tensor


@dataclass(frozen=True)
class Fingerprint:
    """What a base model is known by.

    Attributes:
        model: its name, for people.
        architecture: class of its body, for example ``"LlamaModel"``.
        layers: number of its linear layers, and a hash of their names and shapes.
        samples: by name in the body, of up to 16 tensors that quantization leaves alone.
    """

    model: str
    architecture: str
    layers: str
    samples: Mapping[str, Sample]

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        """The fingerprint of ``model``, of what is beneath adapters if it has any, and without its head.

        Raises:
            ValueError: the model is on the meta device.
        """
        whole = unwrapped(model)
        if any(parameter.is_meta for parameter in whole.parameters()):
            raise ValueError("Fingerprint.of: the model is on the meta device; load its weights first")
        body = getattr(whole, "base_model", whole)
        linears, others = _linear_layers_and_others(body)
        text = "\n".join(f"{name} {shape}" for name, shape in linears.items())
        layers = f"{len(linears)} {hashlib.sha256(text.encode()).hexdigest()[:16]}"
        samples = {name: _sample(others[name]) for name in _evenly(list(others), _TENSORS)}
        return cls(_name_of(whole), type(body).__name__, layers, samples)

    def difference(self, other: Fingerprint) -> str | None:
        """What tells the two models apart; ``None`` for one and the same.

        Numbers may differ in the last place of bfloat16, and an eighth of them in all: the rounding of a model that was
        loaded in float16 and is then rounded to bfloat16 differs from that to bfloat16 alone in a sixteenth of them.
        """
        if self.architecture != other.architecture:
            return f"one is a {self.architecture}, the other a {other.architecture}"
        if self.layers != other.layers:
            return "their linear layers differ in number, names or shapes"
        if self.samples.keys() != other.samples.keys():
            return "their embeddings, norms and biases differ in number or names"
        rounded, count = 0, 0
        for name, sample in self.samples.items():
            mine, theirs = sample.numbers.float(), other.samples[name].numbers.float()
            if sample.shape != other.samples[name].shape:
                return f"{name} is {list(sample.shape)} in one and {list(other.samples[name].shape)} in the other"
            if bool(((mine - theirs).abs() > 2**-7 * mine.abs().maximum(theirs.abs()) + 2**-24).any()):
                return f"{name} holds other numbers"
            rounded += int((mine != theirs).sum())
            count += mine.numel()
        return f"{rounded} of {count} sampled numbers differ a little" if rounded > count / 8 + 4 else None

    def to_dict(self) -> dict[str, Any]:
        """As data for JSON."""
        samples = {
            name: {"shape": list(sample.shape), "bfloat16": _encode(sample.numbers)}
            for name, sample in self.samples.items()
        }
        return {"model": self.model, "architecture": self.architecture, "layers": self.layers, "samples": samples}

    @classmethod
    def from_dict(cls, data: Any) -> Fingerprint:
        """The way back from `to_dict`.

        Raises:
            ValueError: ``data`` is nothing that `to_dict` returns.
        """
        try:
            words = [data[key] for key in ("model", "architecture", "layers")]
            samples = {str(name): _read_sample(sample) for name, sample in data["samples"].items()}
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"the fingerprint of the base model cannot be read ({reason})") from None
        if not all(isinstance(word, str) for word in words):
            raise ValueError("the fingerprint of the base model cannot be read (model, architecture, layers: no text)")
        model, architecture, layers = words
        return cls(model, architecture, layers, samples)


# ---- the base of a model that is being trained


def remember_base(model: nn.Module) -> None:
    """Keep with ``model`` what it is now as its base, unless that was done before. Nothing happens on ``meta``."""
    whole = unwrapped(model)
    if _REMEMBERED not in whole.__dict__ and not any(parameter.is_meta for parameter in whole.parameters()):
        whole.__dict__[_REMEMBERED] = Fingerprint.of(whole)


def forget_base(model: nn.Module) -> None:
    """Let the next `remember_base` keep what ``model`` is then."""
    unwrapped(model).__dict__.pop(_REMEMBERED, None)


def base_of(model: nn.Module) -> Fingerprint:
    """The base that ``model`` is trained from: what was remembered, or else what the model is now."""
    remembered = unwrapped(model).__dict__.get(_REMEMBERED)
    return remembered if isinstance(remembered, Fingerprint) else Fingerprint.of(model)


def difference_to_base(base: Fingerprint, model: nn.Module) -> str | None:
    """What tells ``base`` and ``model`` apart, both as the model is now and as it was when it was remembered."""
    if base.difference(Fingerprint.of(model)) is None:
        return None
    return base.difference(base_of(model))


# ---- names without adapters


def unwrapped(model: nn.Module) -> nn.Module:
    """The model beneath a `PeftModel`; any other model is its own."""
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model
    base: nn.Module = model.get_base_model()  # type: ignore[operator]
    return base


def plain_name(name: str) -> str:
    """The name that a layer or parameter has where PEFT has put nothing around it."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the model itself by `plain_name`, without those of adapters and sparse deltas."""
    adapters = adapter_ids(model)
    for name, module in model.named_modules():
        parts = name.split(".")
        if "sparse_deltas" not in parts and (id(module) not in adapters or "original_module" in parts):
            yield plain_name(name), module


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `base_modules` by name; a tied one by all its names."""
    return {
        f"{module_name}.{name}".lstrip("."): parameter
        for module_name, module in base_modules(model)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


# ---- parts


def _linear_layers_and_others(body: nn.Module) -> tuple[dict[str, tuple[int, int]], dict[str, nn.Parameter]]:
    """Shapes [out, in] of linear layers by name; and the other parameters of one or two dimensions, with biases."""
    linears: dict[str, tuple[int, int]] = {}
    others: dict[str, nn.Parameter] = {}
    for module_name, module in base_modules(body):
        if isinstance(module, nn.Linear):
            linears[module_name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            linears[module_name] = (module.nf, module.nx)
        for name, parameter in module._parameters.items():
            if parameter is None or (module_name in linears and name == "weight"):
                continue
            if parameter.dim() in _NUMBERS and parameter.is_floating_point():
                others[f"{module_name}.{name}".lstrip(".")] = parameter
    return linears, others


def _evenly(names: list[str], count: int) -> list[str]:
    if len(names) <= count:
        return names
    return [names[index * (len(names) - 1) // (count - 1)] for index in range(count)]


def _count(shape: tuple[int, ...]) -> int:
    return min(math.prod(shape), _NUMBERS[len(shape)])


def _sample(tensor: Tensor) -> Sample:
    shape = tuple(tensor.shape)
    count = _count(shape)
    positions = torch.arange(count, device=tensor.device) * (tensor.numel() - 1) // max(count - 1, 1)
    return Sample(shape, tensor.detach().reshape(-1)[positions].to(torch.bfloat16).cpu())


def _encode(numbers: Tensor) -> str:
    return base64.b64encode(numbers.view(torch.int16).numpy().tobytes()).decode()


def _read_sample(data: Any) -> Sample:
    shape = tuple(data["shape"])
    if len(shape) not in _NUMBERS or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"shape is {data['shape']}")
    raw = base64.b64decode(data["bfloat16"], validate=True)
    if len(raw) != 2 * _count(shape):
        raise ValueError(f"{_count(shape)} numbers expected, got {len(raw)} bytes")
    numbers = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16) if raw else torch.empty(0, dtype=torch.bfloat16)
    return Sample(shape, numbers)


def _name_of(model: nn.Module) -> str:
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return name if isinstance(name, str) and name else type(model).__name__
