"""The classes that patched layers get: subclasses of their own class with another `forward`.

Nothing of a layer but its class changes: parameters, buffers, hooks, names and `isinstance` checks stay. The state that
a fused layer needs sits in one entry of its `__dict__`, and goes when the layer is unpatched.

    y = x Wᵀ + Σᵢ sᵢ (Dᵢ(x) Aᵢᵀ) Bᵢᵀ + b + Σᵢ sᵢ bᵢ          i over the active adapters of this layer
    y = down(silu(gate(x)) ⊙ up(x))                          a gated block, over layers of any kind

Whatever this does not cover raises `NotFused` and then runs what the original runs, counted and logged.
"""

from __future__ import annotations

import functools
import logging
import sys
import types
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.formats import QuantizedTensor
from peftkern.ops.lora_linear import FLOAT_DTYPES, lora_linear
from peftkern.ops.silu_mul import silu_mul
from peftkern.patch import merging
from peftkern.patch.gated import is_gated_mlp, is_silu
from peftkern.patch.weights import NotFused, ViewCache, base_kind, original_class, read_weight

logger = logging.getLogger("peftkern")

STATE = "_peftkern"
"""Key of a patched layer's `__dict__` that holds its `LayerState`."""

_LORA_LAYERS = (
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.bnb", "Linear8bitLt"),
)


@dataclass
class LayerState:
    """What a patched layer carries.

    Attributes:
        name: of the layer in its model, for the log.
        backend: which every call of this layer must use; `None` lets the table of backends decide.
        warned: reasons that some layer of the model has already warned about; shared by all of them.
        calls_left: how many calls ran the original forward, by reason.
        unmerged: weight and bias of a `QuantizedLinear` base as they were before adapters were merged into it.
        views: made of this layer's own weight; never copied or saved along.
    """

    name: str
    backend: str | None
    warned: set[str]
    calls_left: Counter[str] = field(default_factory=Counter)
    unmerged: tuple[QuantizedTensor, Tensor | None] | None = None
    views: ViewCache = field(default_factory=ViewCache)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "views": ViewCache()}

    def note(self, reason: str) -> None:
        """Count a call that the fused path did not take; the model warns once per reason, each layer logs once."""
        self.calls_left[reason] += 1
        if self.calls_left[reason] > 1:
            return
        level = logging.DEBUG if reason in self.warned else logging.WARNING
        self.warned.add(reason)
        logger.log(level, "%s runs its original forward: %s", self.name, reason)


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` is patched."""
    return original_class(type(module)) is not type(module)


def set_class(module: nn.Module, layer_class: type) -> None:
    """Give ``module`` another class of the same layout."""
    module.__class__ = layer_class


@functools.cache
def fused_class(original: type) -> type | None:
    """The fused subclass of a class of layers, one per class; `None` when its forward is not one we stand in for.

    It has the name of its original, because PEFT and others look at class names.
    """
    methods = _methods(original)
    if methods is None:
        return None

    def reduce(self: Any, _protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (original,), self.__getstate__()

    namespace = {
        "__module__": __name__,
        "__qualname__": original.__qualname__,
        "__doc__": f"{original.__qualname__} with the forward of `peftkern`.",
        "__reduce_ex__": reduce,
        "_peftkern_original": original,
        **methods,
    }
    fused: type = types.new_class(original.__name__, (original,), {}, lambda body: body.update(namespace))
    return fused


def _rebuild(original: type) -> Any:
    """An empty instance of the fused class, for `pickle` and `copy`, which then fill in its state."""
    layer_class = fused_class(original)
    if layer_class is None:
        raise TypeError(f"{original.__name__} was patched where it was saved, and its forward is not known here")
    return object.__new__(layer_class)


def _methods(original: Any) -> dict[str, Callable[..., Any]] | None:
    if is_lora_class(original):
        return {"forward": _lora_forward(original), "merge": _merge(original), "unmerge": _unmerge(original)}
    if is_gated_mlp(original):
        return {"forward": _gated_forward}
    kind = base_kind(original)
    return {"forward": _base_forward(original)} if kind is not None and kind.swap else None


def is_lora_class(layer_class: type) -> bool:
    """Whether the class runs the forward of one of PEFT's LoRA layers for linear layers."""
    forward = getattr(layer_class, "forward", None)
    modules = ((sys.modules.get(module_name), class_name) for module_name, class_name in _LORA_LAYERS)
    return any(module is not None and getattr(module, name).forward is forward for module, name in modules)


# ---- forwards


def _lora_forward(original: Any) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = running_adapters(self)
        if not names:  # the base layer alone
            return original.forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
        try:
            _check_arguments(args, kwargs)
            return _fused_lora(self, names, x)
        except NotFused as refusal:
            reason = str(refusal)
        self.__dict__[STATE].note(reason)
        return original.forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]

    return forward


def _base_forward(original: Any) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        state = self.__dict__[STATE]
        try:
            weight = read_weight(self)
            _check_device(x, weight)
        except NotFused as refusal:
            state.note(str(refusal))
        else:
            return _run(self, x, functools.partial(lora_linear, weight=weight, bias=self.bias, backend=state.backend))
        return original.forward(self, x)  # type: ignore[no-any-return]

    return forward


def _gated_forward(self: Any, x: Tensor) -> Tensor:
    # the results of gate_proj and up_proj are not named here: without gradients they are freed before down_proj runs
    return self.down_proj(_gated(self, self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return]


def _gated(block: Any, gate: Tensor, up: Tensor) -> Tensor:
    state = block.__dict__[STATE]
    try:
        check_activation(block.act_fn)
        _check_gate(gate, up)
    except NotFused as refusal:
        state.note(str(refusal))
    else:
        return silu_mul(gate, up, backend=state.backend)
    return block.act_fn(gate) * up  # type: ignore[no-any-return]


def check_activation(activation: Any) -> None:
    """Raise `NotFused` unless calling ``activation`` is SiLU and nothing more."""
    if not is_silu(activation):
        raise NotFused(f"the activation is {type(activation).__name__}, not SiLU")
    if _is_hooked(activation):
        raise NotFused("the activation has hooks, which the fused product would skip")


def _check_gate(gate: Tensor, up: Tensor) -> None:
    if type(gate) is not Tensor or type(up) is not Tensor:
        raise NotFused(f"the activations are of type {type(gate).__name__} and {type(up).__name__}, not plain tensors")
    if gate.dtype != up.dtype or gate.dtype not in FLOAT_DTYPES:
        raise NotFused(f"gate_proj gives {gate.dtype} and up_proj {up.dtype}")
    if gate.shape != up.shape or gate.device != up.device:
        raise NotFused("gate_proj and up_proj give results of different shapes or on different devices")


def _merge(original: Any) -> Callable[..., None]:
    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if not _has_quantized_linear(self):
            return original.merge(self, safe_merge, adapter_names)  # type: ignore[no-any-return]
        names = sys.modules["peft.tuners.tuners_utils"].check_adapters_to_merge(self, adapter_names)
        return merging.merge(self, names, self.__dict__[STATE])

    return merge


def _unmerge(original: Any) -> Callable[..., None]:
    def unmerge(self: Any) -> None:
        if not self.merged or not _has_quantized_linear(self):
            return original.unmerge(self)  # type: ignore[no-any-return]
        return merging.unmerge(self, self.__dict__[STATE])

    return unmerge


def _has_quantized_linear(layer: Any) -> bool:
    package = sys.modules.get("peftkern.nn.quantized_linear")
    return package is not None and isinstance(layer.get_base_layer(), package.QuantizedLinear)


def running_adapters(layer: Any) -> list[str]:
    """Names of the adapters that this layer adds to its base layer now."""
    if layer.disable_adapters or layer.merged_adapters:
        return []
    present = layer.lora_A._modules
    return [name for name in layer.active_adapters if name in present]


def _check_arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    given = [name for name, value in kwargs.items() if value is not None]
    if args or given:
        raise NotFused(f"called with {', '.join(given) or 'further positional arguments'}")


@dataclass
class LoraArguments:
    """The adapters of one layer, as `lora_linear` takes them."""

    lora_A: list[Tensor] = field(default_factory=list)
    lora_B: list[Tensor] = field(default_factory=list)
    scaling: list[float] = field(default_factory=list)
    dropout_p: list[float] = field(default_factory=list)
    bias: Tensor | None = None


def lora_arguments(layer: Any, names: Sequence[str]) -> LoraArguments:
    """Gather the adapters called ``names``.

    Raises:
        NotFused: one of them is not plain LoRA.
    """
    base = layer._modules["base_layer"]
    arguments = LoraArguments(bias=base.bias)
    for name in names:
        _add_adapter(arguments, layer, name)
    return arguments


def _add_adapter(arguments: LoraArguments, layer: Any, name: str) -> None:
    modules = layer._modules
    if name in layer.lora_variant:
        raise NotFused(f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}")
    lora_A, lora_B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    for part in (lora_A, lora_B):
        if type(part) is not nn.Linear:
            raise NotFused(f"adapter {name!r} holds a {type(part).__name__}, not a plain Linear")
    for part in (lora_A, lora_B, dropout):
        if _is_hooked(part):
            raise NotFused(f"adapter {name!r} has hooks on its layers")
    scaling = layer.scaling[name]
    arguments.lora_A.append(lora_A.weight)
    arguments.lora_B.append(lora_B.weight)
    arguments.scaling.append(scaling)
    arguments.dropout_p.append(_dropout_p(dropout, name))
    if lora_B.bias is not None:
        bias = scaling * lora_B.bias
        arguments.bias = bias if arguments.bias is None else arguments.bias + bias


def _dropout_p(dropout: nn.Module, name: str) -> float:
    if type(dropout) is nn.Identity:
        return 0.0
    if type(dropout) is not nn.Dropout:
        raise NotFused(f"adapter {name!r} has a {type(dropout).__name__} as its dropout")
    return dropout.p if dropout.training else 0.0


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or has_own_forward(module)
    )


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody (for example accelerate's hooks) has put a forward on the instance, in front of its class."""
    return "forward" in module.__dict__


def check_base(base: nn.Module) -> None:
    """Raise `NotFused` when calling ``base`` does more than its class says."""
    if _is_hooked(base) and not _only_aligns_devices(base):
        raise NotFused("the base layer has hooks, which the fused product would skip")


def _only_aligns_devices(base: nn.Module) -> bool:
    """Whether the base layer's only hook is accelerate's, and that one moves inputs and never weights."""
    hooks = sys.modules.get("accelerate.hooks")
    hook: Any = getattr(base, "_hf_hook", None)
    if hooks is None or type(hook) is not hooks.AlignDevicesHook or hook.offload:
        return False
    return not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)


def _check_device(x: Tensor, weight: Tensor | QuantizedTensor) -> None:
    if x.device != weight.device:
        raise NotFused(f"the input is on {x.device} and the base weight on {weight.device}")


def _fused_lora(layer: Any, names: Sequence[str], x: Tensor) -> Tensor:
    base = layer._modules["base_layer"]
    check_base(base)
    weight = read_weight(base)
    _check_device(x, weight)
    adapters = lora_arguments(layer, names)

    def product(x: Tensor) -> Tensor:
        return lora_linear(
            x,
            weight,
            adapters.lora_A,
            adapters.lora_B,
            adapters.scaling,
            adapters.bias,
            adapters.dropout_p,
            backend=layer.__dict__[STATE].backend,
        )

    return _run(base, x, product)


def _run(base: Any, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """Call ``product`` in the dtype that ``base`` is set to compute in.

    bitsandbytes' 4-bit layers compute in `compute_dtype` and return the dtype of their input, under autocast too. A
    `compute_dtype` wider than the input would copy it to no gain: sums are in float32 anyway.
    """
    if "compute_dtype" not in base.__dict__:
        return product(x)
    return product(x.to(compute_dtype(base, x.dtype))).to(x.dtype)


def compute_dtype(base: Any, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which ``base`` multiplies an input of ``dtype``."""
    wanted: torch.dtype | None = base.__dict__.get("compute_dtype")
    return dtype if wanted is None or wanted.itemsize > dtype.itemsize else wanted
