"""`verify`: a patched model against itself unpatched, on one batch."""

from __future__ import annotations

import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from peftkern.patch.arguments import compute_dtype, is_lora_class, running_adapters
from peftkern.patch.attention import rotary_kind
from peftkern.patch.decoder_layer import is_decoder_layer
from peftkern.patch.language_model import is_language_model
from peftkern.patch.table import format_table, pattern_of
from peftkern.patch.walk import originals, patched_modules
from peftkern.patch.weights import original_class

TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""Largest ‖patched - unpatched‖ / ‖unpatched‖ of one module's output, by the narrowest dtype it computes in."""

ACCUMULATION = 10.0
"""A gradient has gone through many modules, whose errors add up like the square root of their number: it may differ
by that root times more than one module's output, and at least this many times."""

VANISHING = 0.1
"""The gradient of a bias can be zero by symmetry (softmax does not see the bias of the keys) and hold nothing but
rounding errors. So that of a vector is measured against this part of the largest gradient where that is larger."""


@dataclass(frozen=True)
class VerifyRow:
    """One comparison.

    Attributes:
        what: the ``"output"`` of a module for one and the same input, the ``"gradient"`` of a parameter, or the
            ``"loss"``.
        name: of the module or parameter; empty for the loss.
        error: ‖patched - unpatched‖ / ‖unpatched‖, the worst over all calls of the module; see also `VANISHING`.
        tolerance: the largest error that passes.
    """

    what: Literal["output", "gradient", "loss"]
    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class VerifyReport:
    """How far a patched model is from the unpatched one.

    Attributes:
        rows: all comparisons.
        loss_patched, loss_unpatched: the two losses.
        notes: what the batch could not show.
    """

    rows: tuple[VerifyRow, ...]
    loss_patched: float
    loss_unpatched: float
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every comparison is within its tolerance."""
        return all(row.ok for row in self.rows)

    @property
    def worst(self) -> VerifyRow:
        """The row whose error is largest against its tolerance."""
        return max(self.rows, key=_severity)

    def to_dict(self) -> dict[str, Any]:
        """The report as data that `json.dumps` takes."""
        rows = [{**asdict(row), "ok": row.ok} for row in self.rows]
        losses = {"loss_patched": self.loss_patched, "loss_unpatched": self.loss_unpatched}
        return {"ok": self.ok, **losses, "notes": list(self.notes), "rows": rows}

    def __str__(self) -> str:
        groups: defaultdict[tuple[str, str], list[VerifyRow]] = defaultdict(list)
        for row in self.rows:
            groups[row.what, pattern_of(row.name)].append(row)
        table = format_table(
            ("compared", "name", "count", "worst error", "tolerance", ""), [_format_group(g) for g in groups.values()]
        )
        verdict = "agrees with" if self.ok else "DIFFERS from"
        losses = f"loss {self.loss_patched:.8g} patched, {self.loss_unpatched:.8g} unpatched"
        notes = "".join(f"\nnote: {note}" for note in self.notes)
        return f"{table}\nthe patched model {verdict} the unpatched one; {losses}{notes}"


def _severity(row: VerifyRow) -> float:
    return math.inf if math.isnan(row.error) else row.error / row.tolerance


def _format_group(rows: list[VerifyRow]) -> tuple[str, ...]:
    worst = max(rows, key=_severity)
    name = worst.name if len(rows) == 1 else pattern_of(worst.name)
    failed = sum(not row.ok for row in rows)
    verdict = f"{failed} FAILED, worst {worst.name}" if failed else "ok"
    return worst.what, name, str(len(rows)), f"{worst.error:.1e}", f"{worst.tolerance:.0e}", verdict


def verify(model: nn.Module, batch: Mapping[str, Any]) -> VerifyReport:
    """Run forward and backward of ``model`` on ``batch`` patched and unpatched, and compare.

    Every patched module is compared on its own, its original forward being run on the same input, and then the whole
    model: the loss, and the gradient of each parameter that is trained.

    Both runs are in training mode, because that is where bitsandbytes computes what it computes in training, and start
    from the same state of the random generators. LoRA's own dropout is off: its masks come from another generator and
    differ by design. Other dropout stays, and drops the same elements twice. Afterwards training flags, gradients,
    buffers and generators are as they were.

    Args:
        model: a patched model.
        batch: keyword arguments of its forward. The loss is the output's ``loss``, which `transformers` computes when
            ``labels`` are given; without one, a weighted mean square of the outputs serves.

    Raises:
        TypeError: ``model`` is no module, or ``batch`` no mapping.
        ValueError: nothing in ``model`` is patched, or its output holds nothing to differentiate.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"verify: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(batch, Mapping):
        raise TypeError(f"verify: batch must be a mapping of the model's arguments, got {type(batch).__name__}")
    modules = patched_modules(model)
    if not modules:
        raise ValueError("verify: nothing in the model is patched; call peftkern.patch(model) first")
    with ExitStack() as stack:
        for preserved in (_random_state(), _gradients(model), _modules_state(model)):
            stack.enter_context(preserved)
        return _compare(model, batch, modules)


def _compare(model: nn.Module, batch: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> VerifyReport:
    outputs: dict[str, VerifyRow] = {}
    # on its own: PEFT's LoRA on a parameter counts as a change of it, which no backward pass behind it would take; and
    # modules that run as one do so only where no hook looks in between
    with _random_state(), _output_checks(modules, outputs), torch.enable_grad():
        model(**batch)
    with _random_state():
        loss, gradients = _forward_backward(model, batch)
    with _random_state(), originals(modules.values()):
        expected_loss, expected_gradients = _forward_backward(model, batch)
    tolerance = max((row.tolerance for row in outputs.values()), default=_tolerance_of(gradients))
    rows = list(outputs.values())
    rows.append(VerifyRow("loss", "", _error(loss, expected_loss), tolerance))
    tolerance *= max(ACCUMULATION, math.sqrt(len(outputs)))
    largest = max((_norm(gradient) for gradient in expected_gradients.values()), default=0.0)
    for name, expected in expected_gradients.items():
        floor = VANISHING * largest if expected.dim() == 1 else 0.0
        rows.append(VerifyRow("gradient", name, _error(gradients.get(name), expected, floor), tolerance))
    return VerifyReport(tuple(rows), loss.item(), expected_loss.item(), tuple(_notes(modules, outputs)))


def _tolerance_of(gradients: Mapping[str, Tensor]) -> float:
    """Where no module but the model itself was compared."""
    dtypes = {gradient.dtype for gradient in gradients.values()} | {torch.float32}
    return max(TOLERANCES[dtype] for dtype in dtypes if dtype in TOLERANCES)


def _notes(modules: Mapping[str, nn.Module], outputs: Mapping[str, VerifyRow]) -> Iterator[str]:
    silent = sum(_adds_nothing(module) for module in modules.values())
    if silent:
        yield (
            f"the adapters of {silent} modules have B = 0, as before the first step: what they add is zero and so are "
            "the gradients of A. Verify again after a step to compare them"
        )
    unused = len([name for name in modules if name not in outputs and _is_checked(name, modules)])
    if unused:
        yield f"{unused} patched modules were not called with this batch"


def _adds_nothing(module: Any) -> bool:
    if not is_lora_class(original_class(type(module))):
        return False
    names = running_adapters(module)
    return bool(names) and not any(module.lora_B[name].weight.any() for name in names)


def _is_checked(name: str, modules: Mapping[str, nn.Module]) -> bool:
    # the output of a language model in training is its loss, which has a row of its own and takes in its head;
    # attention and the layers around it may add to a cache in every call
    original = original_class(type(modules[name]))
    runs_once = is_language_model(original) or is_decoder_layer(original) or rotary_kind(original) is not None
    return not runs_once and not _is_base_of_another(name, modules) and not _is_head(name, modules)


def _is_head(name: str, modules: Mapping[str, nn.Module]) -> bool:
    owner, _, own = name.rpartition(".")
    return own == "lm_head" and owner in modules and is_language_model(original_class(type(modules[owner])))


def _is_base_of_another(name: str, modules: Mapping[str, nn.Module]) -> bool:
    return name.removesuffix(".base_layer") in modules and name.endswith(".base_layer")


# ---- running


def _forward_backward(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.enable_grad():
        loss = _loss_of(model(**batch))
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return loss.detach(), gradients


def _loss_of(output: Any) -> Tensor:
    fields = dict(output) if isinstance(output, Mapping) else {}
    if isinstance(fields.get("loss"), Tensor):
        return fields["loss"]  # type: ignore[no-any-return]
    values = fields.values() or (output if isinstance(output, tuple | list) else [output])
    tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    if not tensors:
        raise ValueError(f"verify: the model returned a {type(output).__name__} without a loss or any floating tensor")
    # random weights, because behind a normalisation the plain mean square is constant
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(tensor.shape, generator=generator).to(tensor.device) for tensor in tensors]
    return torch.stack([(w * t.float().square()).mean() for w, t in zip(weights, tensors, strict=True)]).sum()


@contextmanager
def _output_checks(modules: Mapping[str, nn.Module], rows: dict[str, VerifyRow]) -> Iterator[None]:
    # a base layer inside a patched layer is not called, and a hook on it would send that layer to its original code
    checked = {name: module for name, module in modules.items() if _is_checked(name, modules)}
    handles = [m.register_forward_hook(_check_of(name, rows), with_kwargs=True) for name, m in checked.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_of(name: str, rows: dict[str, VerifyRow]) -> Callable[..., None]:
    def check(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        base = getattr(module, "base_layer", module)
        with torch.no_grad(), originals([module, base]):
            expected = type(module).forward(module, *args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        row = VerifyRow("output", name, _error(output, expected), _tolerance(base, x, output))
        if name not in rows or _severity(row) > _severity(rows[name]):
            rows[name] = row

    return check


def _error(actual: Tensor | None, expected: Tensor, floor: float = 0.0) -> float:
    """‖actual - expected‖ relative to ‖expected‖ or, where that is larger, to ``floor``; infinite for another shape."""
    if actual is None or actual.shape != expected.shape or actual.dtype != expected.dtype:
        return math.inf
    dtype = torch.float64 if expected.dtype == torch.float64 else torch.float32
    difference = _norm(actual.detach().to(dtype) - expected.detach().to(dtype))
    if difference == 0.0 or math.isnan(difference):
        return difference
    return difference / max(_norm(expected), floor, sys.float_info.min)


def _norm(tensor: Tensor) -> float:
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return float(torch.linalg.vector_norm(tensor.detach().to(dtype)))


def _tolerance(base: Any, x: Tensor, output: Tensor) -> float:
    dtypes = {x.dtype, output.dtype, compute_dtype(base, x.dtype)}
    if torch.is_autocast_enabled(x.device.type):
        dtypes.add(torch.get_autocast_dtype(x.device.type))
    if x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        dtypes.add(torch.float16)
    return max(TOLERANCES[dtype] for dtype in dtypes)


# ---- leaving everything as it was


@contextmanager
def _random_state() -> Iterator[None]:
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@contextmanager
def _gradients(model: nn.Module) -> Iterator[None]:
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def _modules_state(model: nn.Module) -> Iterator[None]:
    """Training mode without LoRA's dropout, and afterwards flags, buffers and what bitsandbytes keeps as before."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    attributes = [(holder, dict(holder)) for holder in _bitsandbytes_attributes(model)]
    biases = [(bias, bias.data) for bias in _bitsandbytes_biases(model)]
    try:
        model.train()
        for module in model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout.train(False)  # type: ignore[union-attr]
        yield
    finally:
        for module, training in flags:
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for holder, before in attributes:
            holder.clear()
            holder.update(before)
        for bias, data in biases:
            bias.data = data


def _bitsandbytes_layers(model: nn.Module) -> Iterator[Any]:
    package = sys.modules.get("bitsandbytes.nn.modules")
    if package is not None:
        yield from (m for m in model.modules() if isinstance(m, package.Linear4bit | package.Linear8bitLt))


def _bitsandbytes_attributes(model: nn.Module) -> Iterator[dict[str, Any]]:
    # its forward settles the compute dtype at the first call and moves int8 scales from the parameter to the module
    for layer in _bitsandbytes_layers(model):
        yield from (layer.__dict__, layer.weight.__dict__)
        if hasattr(layer, "state"):
            yield layer.state.__dict__


def _bitsandbytes_biases(model: nn.Module) -> Iterator[Tensor]:
    return (layer.bias for layer in _bitsandbytes_layers(model) if layer.bias is not None)
