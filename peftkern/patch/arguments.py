"""What a patched layer hands to the product: its frozen weight, and the adapters and deltas that run in it now.

Everything is read on every call, because PEFT, FSDP and users switch adapters and replace weights.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.formats import BitMask, SparseIndices
from peftkern.nn.masked_linear import mask_of
from peftkern.nn.sparse_linear import deltas_of
from peftkern.ops.lora_linear import Adapters, Weight, weight_tensors
from peftkern.ops.lora_linear_group import Member
from peftkern.ops.mixed_lora_linear import NO_ADAPTER
from peftkern.ops.sparse_delta_linear import Deltas
from peftkern.patch.weights import NotFused, original_class, read_weight

_LORA_LAYERS = (
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.bnb", "Linear8bitLt"),
)


@dataclass
class LayerArguments:
    """The arguments of one product but for x.

    Attributes:
        base: the layer that holds the weight.
        weight: [out, in], frozen.
        bias: of the base layer, [out].
        lora_A, lora_B, scaling, dropout_p: of the running adapters; empty where the base layer runs alone.
        lora_biases: those of every B that has one, with their scaling.
        values, indices, delta_scaling: of the running sparse deltas; empty where there is none.
        mask: where the weight counts; ``None``: everywhere.
        magnitude: of the rows under the one running adapter, which is DoRA's; ``None``: it is not.
    """

    base: nn.Module
    weight: Weight
    bias: Tensor | None
    lora_A: list[Tensor] = field(default_factory=list)
    lora_B: list[Tensor] = field(default_factory=list)
    scaling: list[float] = field(default_factory=list)
    dropout_p: list[float] = field(default_factory=list)
    lora_biases: list[tuple[float, Tensor]] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    indices: list[SparseIndices] = field(default_factory=list)
    delta_scaling: list[float] = field(default_factory=list)
    mask: BitMask | None = None
    magnitude: Tensor | None = None

    def runs_alone(self) -> bool:
        """Whether the product is none that layers which share their input, or a gate, can join."""
        return bool(self.values) or self.mask is not None or self.magnitude is not None

    def total_bias(self) -> Tensor | None:
        """The sum of all biases, [out]."""
        total = self.bias
        for scaling, bias in self.lora_biases:
            total = scaling * bias if total is None else total + scaling * bias
        return total

    def adapters(self) -> Adapters:
        """The adapters, without a seed."""
        return Adapters(self.lora_A, self.lora_B, self.scaling, self.dropout_p, None)

    def member(self) -> Member:
        """The layer as `lora_linear_group` takes it: without deltas and mask."""
        return Member(self.weight, self.adapters(), self.total_bias())

    def deltas(self) -> Deltas:
        """The running deltas."""
        return Deltas(self.values, self.indices, self.delta_scaling)

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the product for an input of ``dtype``."""
        return compute_dtype(self.base, dtype)

    def to_compute(self, x: Tensor) -> Tensor:
        """x in the dtype that the base layer is set to compute in.

        bitsandbytes' 4-bit layers compute in `compute_dtype` and return the dtype of their input, under autocast too. A
        `compute_dtype` wider than the input would copy it to no gain: sums are in float32 anyway.
        """
        return x.to(self.compute_dtype(x.dtype)) if self._has_compute_dtype() else x

    def from_compute(self, y: Tensor, x: Tensor) -> Tensor:
        """The product y in the dtype that the layer returns for the input x."""
        return y.to(x.dtype) if self._has_compute_dtype() else y

    def _has_compute_dtype(self) -> bool:
        return "compute_dtype" in self.base.__dict__

    def state(self) -> tuple[Any, ...]:
        """Equal for arguments that give the same result. Compare it only while the older arguments are alive."""
        biases = [self.bias] if self.bias is not None else []
        lora = (*self.lora_A, *self.lora_B, *(b for _, b in self.lora_biases))
        scalings = (*self.scaling, *self.dropout_p, *(scaling for scaling, _ in self.lora_biases), *self.delta_scaling)
        tensors = (*weight_tensors(self.weight), *lora, *biases, *self.values)
        return *map(_tensor_state, tensors), *scalings, *map(id, self.indices)


def _tensor_state(tensor: Tensor) -> tuple[int, int | None, bool]:
    return id(tensor), None if tensor.is_inference() else tensor._version, tensor.requires_grad


def compute_dtype(base: Any, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which ``base`` multiplies an input of ``dtype``."""
    wanted: torch.dtype | None = base.__dict__.get("compute_dtype")
    return dtype if wanted is None or wanted.itemsize > dtype.itemsize else wanted


# ---- reading a layer


def is_lora_class(layer_class: type) -> bool:
    """Whether the class runs the forward of one of PEFT's LoRA layers for linear layers."""
    forward = getattr(layer_class, "forward", None)
    modules = ((sys.modules.get(module_name), class_name) for module_name, class_name in _LORA_LAYERS)
    return any(module is not None and getattr(module, name).forward is forward for module, name in modules)


def running_adapters(layer: Any) -> list[str]:
    """Names of the adapters that this layer adds to its base layer now."""
    if layer.disable_adapters or layer.merged_adapters:
        return []
    present = layer.lora_A._modules
    return [name for name in layer.active_adapters if name in present]


def read_layer(layer: Any, x: Tensor) -> LayerArguments:
    """What a patched layer, with or without adapters, would multiply x with.

    Raises:
        NotFused: on this call it would run other code.
    """
    if not is_lora_class(original_class(type(layer))):
        return read_base(layer, x)
    names = running_adapters(layer)
    if not names:
        raise NotFused("no adapter runs")
    return read_lora(layer, names, x)


def read_base(base: Any, x: Tensor) -> LayerArguments:
    """What a base layer that runs alone multiplies x with.

    Raises:
        NotFused: as `read_weight` does, or x is on another device.
    """
    weight = read_weight(base)
    _check_device(x, weight)
    return with_deltas(base, weight)


def read_lora(layer: Any, names: Sequence[str], x: Tensor) -> LayerArguments:
    """What a LoRA layer with the running adapters ``names`` multiplies x with.

    Raises:
        NotFused: its base layer or one of the adapters does more than the fused product, or x is on another device.
    """
    base = layer._modules["base_layer"]
    check_base(base)
    weight = read_weight(base)
    _check_device(x, weight)
    return with_adapters(with_deltas(base, weight), layer, names)


def read_by_row(layer: Any, rows: Sequence[str], x: Tensor | None) -> tuple[LayerArguments, list[int]]:
    """What a LoRA layer whose batch has the adapters ``rows`` multiplies with, and which of those each row takes.

    Raises:
        NotFused: as `read_lora` does (x may be missing), or it has merged adapters, a mask or sparse deltas, or an
            adapter is no plain LoRA.
    """
    if layer.merged_adapters:
        raise NotFused("has merged adapters; call unmerge_adapter() first")
    present = [name for name in dict.fromkeys(rows) if name in layer._modules["lora_A"]._modules]
    base = layer._modules["base_layer"]
    check_base(base)
    weight = read_weight(base)
    if x is not None:
        _check_device(x, weight)
    arguments = with_adapters(with_deltas(base, weight), layer, present)
    if arguments.runs_alone() or arguments.lora_biases:
        raise NotFused("sparse deltas, masks, DoRA and biases of adapters cannot differ from row to row")
    position = {name: index for index, name in enumerate(present)}
    return arguments, [position.get(name, NO_ADAPTER) for name in rows]


def with_deltas(base: Any, weight: Weight) -> LayerArguments:
    """What ``base``, whose weight is ``weight``, computes with: weight, mask, bias and running deltas.

    Raises:
        NotFused: somebody watches the calls of a delta, or there are a mask and deltas.
    """
    arguments = LayerArguments(base, weight, base.bias, mask=mask_of(base))
    for name, delta in deltas_of(base).items():
        if not delta.running():
            continue
        if is_hooked(delta):
            raise NotFused(f"sparse delta {name!r} has hooks")
        arguments.values.append(delta.values)
        arguments.indices.append(delta.indices)
        arguments.delta_scaling.append(delta.scaling)
    if arguments.mask is not None and arguments.values:
        raise NotFused("sparse deltas over a masked weight run one after another")
    return arguments


def _check_device(x: Tensor, weight: Weight) -> None:
    if x.device != weight.device:
        raise NotFused(f"the input is on {x.device} and the base weight on {weight.device}")


def with_adapters(arguments: LayerArguments, layer: Any, names: Sequence[str]) -> LayerArguments:
    """``arguments``, to which the adapters called ``names`` were added.

    Raises:
        NotFused: one of them is neither plain LoRA nor the only one and DoRA's.
    """
    for name in names:
        _add_adapter(arguments, layer, name)
    variants = {name: layer.lora_variant[name] for name in names if name in layer.lora_variant}
    for name, variant in variants.items():
        if not _is_dora(variant):
            raise NotFused(f"adapter {name!r} is a {type(variant).__name__}")
        if len(names) > 1:
            raise NotFused(f"adapter {name!r} is DoRA's and not the only one that runs")
        _add_magnitude(arguments, layer, name)
    return arguments


def _is_dora(variant: Any) -> bool:
    module = sys.modules.get("peft.tuners.lora.variants")
    return module is not None and type(variant) is module.DoraLinearVariant


def _add_magnitude(arguments: LayerArguments, layer: Any, name: str) -> None:
    if arguments.values or arguments.mask is not None:
        raise NotFused(f"adapter {name!r} is DoRA's, over sparse deltas or a masked weight")
    if arguments.lora_biases:
        raise NotFused(f"adapter {name!r} is DoRA's and has a bias")
    holder = layer._modules["lora_magnitude_vector"]._modules[name]
    if is_hooked(holder):
        raise NotFused(f"adapter {name!r} has hooks on its layers")
    arguments.magnitude = holder.weight


def _add_adapter(arguments: LayerArguments, layer: Any, name: str) -> None:
    modules = layer._modules
    lora_A, lora_B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    for part in (lora_A, lora_B):
        if type(part) is not nn.Linear:
            raise NotFused(f"adapter {name!r} holds a {type(part).__name__}, not a plain Linear")
    for part in (lora_A, lora_B, dropout):
        if is_hooked(part):
            raise NotFused(f"adapter {name!r} has hooks on its layers")
    scaling = layer.scaling[name]
    arguments.lora_A.append(lora_A.weight)
    arguments.lora_B.append(lora_B.weight)
    arguments.scaling.append(scaling)
    arguments.dropout_p.append(_dropout_p(dropout, name))
    if lora_B.bias is not None:
        arguments.lora_biases.append((scaling, lora_B.bias))


def _dropout_p(dropout: nn.Module, name: str) -> float:
    if type(dropout) is nn.Identity:
        return 0.0
    if type(dropout) is not nn.Dropout:
        raise NotFused(f"adapter {name!r} has a {type(dropout).__name__} as its dropout")
    return dropout.p if dropout.training else 0.0


# ---- hooks


def is_hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class says."""
    return bool(module._forward_hooks) or is_hooked_before(module)


def is_hooked_before(module: nn.Module) -> bool:
    """Whether something may come between the caller of ``module`` and its forward."""
    return bool(
        module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks or has_own_forward(module)
    )


def has_global_hooks() -> bool:
    """Whether calling any module runs hooks that were registered for all of them."""
    return bool(nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody (for example accelerate's hooks) has put a forward on the instance, in front of its class."""
    return "forward" in module.__dict__


def check_base(base: nn.Module) -> None:
    """Raise `NotFused` when calling ``base`` does more than its class says."""
    if is_hooked(base) and not _only_aligns_devices(base):
        raise NotFused("the base layer has hooks, which the fused product would skip")


def _only_aligns_devices(base: nn.Module) -> bool:
    """Whether the base layer's only hook is accelerate's, and that one moves inputs and never weights."""
    hooks = sys.modules.get("accelerate.hooks")
    hook: Any = getattr(base, "_hf_hook", None)
    if hooks is None or type(hook) is not hooks.AlignDevicesHook or hook.offload:
        return False
    return not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
