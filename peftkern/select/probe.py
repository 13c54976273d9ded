"""How important tensors are for the next updates: probes that leave no trace.

    update         I = -Σ g₁ ⊙ (w₁ - w₀)        w₁: w₀ after one update; g₁: the gradient there, of the same batch
    first_order    I = -Σ g₀ ⊙ (w₁ - w₀)        g₀: the gradient at w₀; the loss that the update is expected to save
    fisher         I = Σ g₀²
    gradient_norm  I = ‖g₀‖
    weight_change  I = ‖w - s‖ / max(‖w‖, ‖s‖)   s: what w was at some time before; no batch is looked at

"update" is the published importance. It takes two forward and two backward passes, and no more memory than a training
step: the update is the optimizer's own, on trial, and what the weights were lies in the memory of their gradients. The
second gradients are looked at one by one and dropped. "first_order" and the two below it take one pass of each kind,
and hold one gradient at a time. Values are not normalised; negative ones are no error: training such a tensor is
expected to raise the loss.

Whatever is probed, weights, optimizer, scheduler, gradients and generators of random numbers are afterwards as before,
bit for bit, and both passes draw the same dropout.

Source: GreenTrainer, Huang et al. 2024 (arXiv:2309.13192), section 3.2.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from peftkern.formats import VALUE_DTYPES
from peftkern.ops.importance import importance_dot, probe_dot
from peftkern.select.method import logger
from peftkern.select.probe_step import ProbeStep, put_back
from peftkern.select.sample import sample_batch
from peftkern.select.trace import gradients_put_aside, model_loss

KINDS = ("update", "first_order", "fisher", "gradient_norm", "weight_change")
"""Importances that `probe` measures."""

Loss = Callable[[nn.Module, Any], Tensor]
Scores = Mapping[str, float] | Callable[[nn.Module, Any], Mapping[str, float]]
"""Importances of one's own, by the names of parameters."""


def probe(
    model: nn.Module,
    batch: Any,
    names: Iterable[str],
    optimizer: torch.optim.Optimizer | None = None,
    kind: str | Scores = "update",
    sample: float = 0.25,
    seed: int = 0,
    loss: Loss | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """The importances of some parameters of ``model``, in the order of ``names``.

    Parameters that require no gradient can be probed as well; they do so during the probe. Gradients that have been
    accumulated so far are set aside. A parameter that the loss does not depend on has importance 0. Where processes
    train together (`torch.distributed`), all of them get the mean, and all have to call this.

    Args:
        model: called in the mode that it is in.
        batch: of which ``model(**batch)`` gives ``loss``, on the model's device.
        names: of parameters, dense and float32, bfloat16 or float16. A parameter that has several names has to be named
            once.
        optimizer: for "update" and "first_order", the one that trains the model; see `probe_step` for what it takes.
            "first_order" needs one of `peftkern.optim.AdamW`, `AdamW8bit` and torch's SGD, Adam and AdamW.
        kind: one of `KINDS`; or the importances themselves, by name; or a function that gives them for
            ``(model, batch)``.
        sample: share of the batch's rows, and where that is less than one row of its tokens, that the probe looks at;
            see `sample_batch`. A batch that is no mapping is looked at as a whole.
        seed: by which they are drawn.
        loss: gives the loss of ``(model, batch)`` instead.
        start: for "weight_change", the weights to compare with, by name.

    Raises:
        ValueError: an argument does not fit; or all importances are 0, or one is not a number, which no choice can be
            made by.
        RuntimeError: a gradient that is needed as a whole came in parts, as reentrant checkpointing gives it.
    """
    model = model.module if isinstance(model, DistributedDataParallel) else model
    parameters = _find(model, names)
    if not isinstance(kind, str):
        found = _given(kind, model, batch, parameters)
    elif kind not in KINDS:
        raise ValueError(f"probe: kind must be one of {list(KINDS)}, a mapping or a function; got {kind!r}")
    elif kind == "weight_change":
        found = _weight_changes(parameters, start)
    else:
        found = _by_gradients(kind, model, _part(model, batch, sample, seed), parameters, optimizer, loss)
    found = _mean_of_processes(found, next(iter(parameters.values())).device)
    _check_found(found, kind)
    return found


# ---- arguments


def _find(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    present = dict(model.named_parameters(remove_duplicate=False))
    parameters: dict[str, nn.Parameter] = {}
    for name in names:
        if name not in present:
            raise ValueError(f"probe: the model has no parameter {name!r}")
        _check_parameter(name, present[name])
        parameters[name] = present[name]
    if not parameters:
        raise ValueError("probe: names must hold at least one name")
    if len({id(parameter) for parameter in parameters.values()}) != len(parameters):
        raise ValueError("probe: two of the names are of one parameter")
    return parameters


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    if isinstance(parameter, DTensor):
        raise ValueError(f"probe: {name} is sharded; whole tensors can be probed only")
    if parameter.dtype not in VALUE_DTYPES:
        raise ValueError(
            f"probe: {name} must be float32, bfloat16 or float16, got {parameter.dtype}; of a quantized layer, probe "
            "the adapters"
        )
    if parameter._post_accumulate_grad_hooks:
        raise ValueError(f"probe: {name} has a hook that uses its gradient as soon as it is there, and so would train")


def _part(model: nn.Module, batch: Any, sample: float, seed: int) -> Any:
    if isinstance(batch, Mapping):
        two_sequences = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        return sample_batch(batch, sample, seed, cut_tokens=not two_sequences)
    if sample < 1:
        logger.info("the probe sees the whole batch: it is no mapping but %s", type(batch).__name__)
    return batch


# ---- importances without a gradient


def _given(kind: Scores, model: nn.Module, batch: Any, parameters: Mapping[str, Any]) -> dict[str, float]:
    scores = kind(model, batch) if callable(kind) else kind
    missing = [name for name in parameters if name not in scores]
    if missing:
        raise ValueError(f"probe: kind gives no importance for {missing[0]!r} ({len(missing)} are missing)")
    return {name: float(scores[name]) for name in parameters}


@torch.no_grad()
def _weight_changes(parameters: Mapping[str, nn.Parameter], start: Mapping[str, Tensor] | None) -> dict[str, float]:
    if start is None:
        raise ValueError("probe: kind 'weight_change' needs start, the weights to compare with")
    found = {}
    for name, parameter in parameters.items():
        before = start.get(name)
        if before is None or before.shape != parameter.shape:
            got = "nothing" if before is None else list(before.shape)
            raise ValueError(f"probe: start must have {name} of {list(parameter.shape)}, got {got}")
        before = before.to(parameter.device)
        size = max(float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in (parameter, before))
        moved = float(torch.linalg.vector_norm(parameter.float() - before.float(), dtype=torch.float64))
        found[name] = moved / size if size > 0 else 0.0
    return found


# ---- importances of gradients


def _by_gradients(
    kind: str,
    model: nn.Module,
    batch: Any,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    loss: Loss | None,
) -> dict[str, float]:
    step = _step_of(kind, optimizer)
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})

    def run() -> None:
        with _same_random_numbers(devices), torch.enable_grad():
            (loss or model_loss)(model, batch).backward()  # type: ignore[no-untyped-call]

    with _undisturbed(model, parameters.values()):
        values = _values(kind, run, parameters.values(), step)
    return dict(zip(parameters, _to_floats(values, parameters.values()), strict=True))


def _step_of(kind: str, optimizer: torch.optim.Optimizer | None) -> ProbeStep | None:
    if kind not in ("update", "first_order"):
        return None
    if optimizer is None:
        raise ValueError(f"probe: kind {kind!r} needs the optimizer, whose update it tries")
    step = ProbeStep(optimizer)
    if kind == "first_order" and not step.by_tensor:
        raise ValueError(
            f"probe: kind 'first_order' does not know {type(step.optimizer).__name__} tensor by tensor; use 'update'"
        )
    return step


Values = dict[nn.Parameter, Tensor]
"""Importances of those parameters that had a gradient, float32 without dimensions, on their devices."""


def _values(kind: str, run: Callable[[], None], parameters: Iterable[nn.Parameter], step: ProbeStep | None) -> Values:
    if kind == "update":
        assert step is not None
        return _update_values(run, parameters, step)
    with _gradients_into(parameters, lambda p, g: _term(kind, p, g, step), whole=True) as values:
        run()
    return {p: value.sqrt() for p, value in values.items()} if kind == "gradient_norm" else values


def _update_values(run: Callable[[], None], parameters: Iterable[nn.Parameter], step: ProbeStep) -> Values:
    run()
    saved = step.step_all_([parameter for parameter in parameters if parameter.grad is not None])
    try:
        # the error still passes through the stepped weights: they are put back when all of it is done
        with _gradients_into(saved, lambda p, g: -probe_dot(g, p, saved[p]), whole=False) as values:
            run()
    finally:
        put_back(saved)
    return values


def _term(kind: str, parameter: nn.Parameter, gradient: Tensor, step: ProbeStep | None) -> Tensor:
    if kind != "first_order":
        return importance_dot(gradient, gradient)
    assert step is not None
    moved, before = parameter.detach().clone(), gradient.clone()
    step.swap_(parameter, moved, before)
    return -probe_dot(gradient, moved, before)


@contextlib.contextmanager
def _gradients_into(
    parameters: Iterable[nn.Parameter], term: Callable[[nn.Parameter, Tensor], Tensor], whole: bool
) -> Iterator[Values]:
    """Gradients go into ``term`` and nowhere else; its values are summed. ``whole``: there may be one value only."""
    values: Values = {}

    def take(parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if whole and parameter in values:
            raise RuntimeError(
                "probe: a gradient came in parts, and only kind 'update' can be summed over them; use "
                "use_reentrant=False for gradient checkpointing"
            )
        value = term(parameter, gradient)
        values[parameter] = values[parameter] + value if parameter in values else value

    handles = [p.register_post_accumulate_grad_hook(take) for p in parameters]  # type: ignore[no-untyped-call]
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()


def _to_floats(values: Values, parameters: Iterable[nn.Parameter]) -> list[float]:
    """One transfer from each device, not one for every tensor."""
    found: dict[nn.Parameter, float] = {}
    for device in {parameter.device for parameter in values}:
        own = [parameter for parameter in values if parameter.device == device]
        found.update(zip(own, torch.stack([values[p] for p in own]).tolist(), strict=True))
    return [found.get(parameter, 0.0) for parameter in parameters]


# ---- what must not change


@contextlib.contextmanager
def _undisturbed(model: nn.Module, probed: Iterable[nn.Parameter]) -> Iterator[None]:
    """Of the model's parameters only ``probed`` require a gradient, and all have none, for a while."""
    chosen = {id(parameter) for parameter in probed}
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with _same_buffers(model), gradients_put_aside(model):
        try:
            for parameter, _ in asked:
                parameter.requires_grad_(id(parameter) in chosen)
            yield
        finally:
            for parameter, wanted in asked:
                parameter.requires_grad_(wanted)


@contextlib.contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Running statistics and counters, which are vectors and numbers, are put back; what else is written is logged."""
    buffers = dict(model.named_buffers())
    kept = {name: buffer.clone() for name, buffer in buffers.items() if _is_statistic(buffer)}
    versions = {name: buffer._version for name, buffer in buffers.items() if name not in kept}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, before in kept.items():
                # their versions do not tell: batch normalisation writes without counting
                if not torch.equal(buffers[name], before):
                    buffers[name].copy_(before)
        lost = [name for name, version in versions.items() if buffers[name]._version != version]
        if lost:
            logger.warning("the model's forward has changed %s during the probe; they are not put back", lost)


def _is_statistic(buffer: Tensor) -> bool:
    return buffer.dim() == 0 or (buffer.dim() == 1 and buffer.is_floating_point())


@contextlib.contextmanager
def _same_random_numbers(devices: list[int]) -> Iterator[None]:
    """Random numbers that are drawn inside are drawn again afterwards."""
    numpy = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


# ---- results


def _mean_of_processes(found: dict[str, float], device: torch.device) -> dict[str, float]:
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return found
    values = torch.tensor(list(found.values()), dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return dict(zip(found, (values / dist.get_world_size()).tolist(), strict=True))


def _check_found(found: Mapping[str, float], kind: str | Scores) -> None:
    wrong = [name for name, value in found.items() if math.isnan(value)]
    if wrong:
        raise ValueError(
            f"probe: the importance of {wrong[0]} is not a number, and of {len(wrong)} in all; look at the batch's loss"
        )
    if all(value == 0 for value in found.values()):
        reasons = {"update": _NO_STEP, "first_order": _NO_STEP, "weight_change": "no weight has moved since start"}
        reason = reasons.get(kind, _NO_PATH) if isinstance(kind, str) else "these were given"
        raise ValueError(f"probe: all importances are 0, and no choice can be made by them; {reason}")


_NO_PATH = "the loss depends on none of the parameters"
_NO_STEP = f"the learning rate is 0 and there is no initial_lr, or {_NO_PATH}"
