"""Train some parameters of a model, and do none of the work that only the others would need.

    execution = Execution(model)
    execution.apply(["model.layers.3.mlp.up_proj.weight"], optimizer)       # until the next `apply`
    execution.undo()

What autograd is told is which tensors ask for a gradient. From that follows the rest: no error is handed on below the
lowest of them, no gradient of a weight is formed for the others, and the forward pass keeps no activation that no
gradient needs. `Execution` sees to what would undo this: hooks that let embeddings ask for a gradient, checkpointing
of regions without one (:mod:`peftkern.select.checkpointing`), and what the optimizer holds.

An optimizer is made once, with all parameters that will ever be trained, so that its checkpoints fit any selection.
Parameters that go keep their moments in 8 bits (`peftkern.optim.AdamW.park`) and take them up again when they come
back; other optimizers forget them. Without a gradient, decay and momentum do not touch a parameter: its bits stay.

Under `DistributedDataParallel`, all processes have to train the same parameters. It needs
``find_unused_parameters=True`` (``TrainingArguments(ddp_find_unused_parameters=True)``), and is made while all
parameters that will ever be trained ask for a gradient.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from peftkern.nn.sparse_linear import SparseDelta
from peftkern.optim import AdamW
from peftkern.select.checkpointing import Skipping
from peftkern.select.hand_over import drop_state

logger = logging.getLogger("peftkern")


class Execution:
    """What is trained in ``model``.

    Attributes:
        names: of the trained parameters, in the model's order; empty before `apply`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names: tuple[str, ...] = ()
        self._model = model
        self._asked: dict[str, bool] = {}
        self._checkpointing = Skipping(model)
        self._has_warned = False

    def apply(
        self, names: Iterable[str], optimizer: torch.optim.Optimizer | None = None, *, parked: bool = True
    ) -> None:
        """Train exactly the parameters of these names from the next forward pass on.

        Args:
            names: as in ``model.named_parameters()``; any of its names where a parameter has several.
            optimizer: that holds all of them; ``None``: there is none yet.
            parked: whether parameters that go keep their state, in 8 bits. Only `peftkern.optim.AdamW` can: with
                another optimizer they lose it, which is logged.

        Raises:
            ValueError: there are no names; there is no parameter of a name, it is quantized, sharded, or out of use (an
                adapter or delta that is not active); the optimizer does not hold it; or `DistributedDataParallel` would
                wait for the others. The model is as it was.
            RuntimeError: there are gradients: an update has begun.
        """
        trained = find_trained(self._model, names)
        if optimizer is not None:
            _check_held(optimizer, trained)
        _check_distributed(self._model, trained)
        check_between_updates(self._model)
        if not self._asked:
            self._asked = {name: parameter.requires_grad for name, parameter in self._model.named_parameters()}
        on = {id(parameter) for parameter in trained.values()}
        off = [parameter for parameter in self._model.parameters() if id(parameter) not in on]
        for parameter in off:
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in trained.values():
            parameter.requires_grad_(True)
        if optimizer is not None:
            self._put_aside(optimizer, off, parked)
        self.skip_idle_regions()
        self.names = tuple(trained)

    def skip_idle_regions(self) -> None:
        """Checkpointing and hooks on embeddings as `apply` wants them, whatever is trained: for measuring before it."""
        self._checkpointing.start()

    def _put_aside(self, optimizer: torch.optim.Optimizer, off: list[nn.Parameter], parked: bool) -> None:
        with_state = [parameter for parameter in off if optimizer.state.get(parameter)]
        if parked and isinstance(optimizer, AdamW):
            optimizer.park(with_state)
            return
        drop_state(optimizer, with_state)
        if parked and with_state and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s forgets the state of parameters that are not trained for a while; peftkern.optim.AdamW keeps it",
                type(optimizer).__name__,
            )

    def undo(self) -> None:
        """Every parameter asks for a gradient as it did before the first `apply`; hooks and checkpointing are back."""
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(self._asked.get(name, parameter.requires_grad))
        self._checkpointing.stop()
        self._asked, self.names = {}, ()


# ---- checks


def find_trained(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters of ``names`` in the model's order, by their first name there; raises as `Execution.apply` does."""
    everything = dict(model.named_parameters(remove_duplicate=False))
    wanted = list(dict.fromkeys(names))
    if not wanted:
        raise ValueError("Execution: names must hold at least one parameter")
    for name in wanted:
        if name not in everything:
            raise ValueError(f"Execution: the model has no parameter {name!r}")
        _check_trainable(name, everything[name])
    chosen = {id(everything[name]) for name in wanted}
    for name, reason in _out_of_use(model, everything):
        if id(everything[name]) in chosen:
            raise ValueError(f"Execution: {name} cannot be trained: {reason}")
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in chosen}


def _check_trainable(name: str, parameter: nn.Parameter) -> None:
    if not parameter.is_floating_point() or parameter.element_size() == 1 or hasattr(parameter, "quant_state"):
        raise ValueError(
            f"Execution: {name} is quantized ({parameter.dtype}), and has no gradient; train adapters or sparse deltas "
            f"over it"
        )
    if hasattr(parameter, "device_mesh"):  # the other half of FSDP's parameters keeps asking for a gradient
        raise ValueError(f"Execution: {name} is sharded; parameters can be selected in one process, or under DDP")


def _out_of_use(model: nn.Module, everything: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, str]]:
    """Names of parameters that no forward pass reads now, and why."""
    reasons = dict(_idle_prefixes(model))
    if not reasons:
        return
    found = {
        name: reason
        for name in everything
        for prefix, reason in reasons.items()
        if name == prefix or name.startswith(f"{prefix}.")
    }
    in_use = {id(parameter) for name, parameter in everything.items() if name not in found}
    yield from ((name, reason) for name, reason in found.items() if id(everything[name]) not in in_use)


def _idle_prefixes(model: nn.Module) -> Iterator[tuple[str, str]]:
    tuner_layer, wrapper, saved = _peft_classes()
    for name, module in model.named_modules():
        if isinstance(module, SparseDelta) and (module.merged or not module.active):
            yield name, "the sparse delta is merged or not active"
        if not isinstance(module, (*tuner_layer, *wrapper)):
            continue
        layer: Any = module
        is_off = layer.disable_adapters or bool(layer.merged_adapters)
        for attribute in layer.adapter_layer_names:
            adapters = getattr(layer, attribute, None)
            for adapter in adapters if isinstance(adapters, nn.ModuleDict | nn.ParameterDict) else ():
                if is_off or adapter not in layer.active_adapters:
                    yield f"{name}.{attribute}.{adapter}", f"adapter {adapter!r} is merged, disabled or not active"
        if isinstance(module, saved) and not layer.disable_adapters and layer.active_adapters:
            yield f"{name}.original_module", "a copy of its module is trained instead (PEFT's modules_to_save)"


def _peft_classes() -> tuple[tuple[type, ...], tuple[type, ...], tuple[type, ...]]:
    if "peft" not in sys.modules:
        return (), (), ()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    return (BaseTunerLayer,), (AuxiliaryTrainingWrapper,), (ModulesToSaveWrapper,)


def _check_held(optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter]) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in trained.items() if id(parameter) not in held]
    if missing:
        raise ValueError(
            f"Execution: the optimizer does not hold {missing[0]}; make it with all parameters that will ever be "
            f"trained, while they require a gradient"
        )


def _check_distributed(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
    """A replicated model that waits for all gradients would take one wrong step, and stop at the next."""
    replicated = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    if replicated is None or (replicated.find_unused_parameters and not replicated.static_graph):
        return
    on = {id(parameter) for parameter in trained.values()}
    if any(parameter.requires_grad and id(parameter) not in on for parameter in model.parameters()):
        raise ValueError(
            "Execution: DistributedDataParallel waits for the gradients of all parameters; make it with "
            "find_unused_parameters=True and static_graph=False (TrainingArguments(ddp_find_unused_parameters=True))"
        )


def check_between_updates(model: nn.Module) -> None:
    """Raise `RuntimeError` where a parameter has a gradient that is not 0: gradients are being accumulated."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and bool(parameter.grad.any()):
            raise RuntimeError(
                f"Execution: {name} has a gradient, so an update has begun; what is trained can change only between "
                f"updates: after optimizer.step() and optimizer.zero_grad()"
            )
