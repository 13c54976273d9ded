"""The classes that patched layers get: subclasses of their own class with another `forward`.

Nothing of a layer but its class changes: parameters, buffers, hooks, names and `isinstance` checks stay. The state that
a fused layer needs sits in one entry of its `__dict__`, and goes when the layer is unpatched.

    y = x Wᵀ + Σᵢ sᵢ (Dᵢ(x) Aᵢᵀ) Bᵢᵀ + b + Σᵢ sᵢ bᵢ          i over the active adapters of this layer
           + Σₖ sₖ x Sₖᵀ                                     k over the sparse deltas of its base layer
    W is W ⊙ M where the base layer has a mask M
    y = c ⊙ (x Wᵀ + s (x Aᵀ) Bᵀ) + b                         where the one active adapter is DoRA's
    y = down(a(gate(x)) ⊙ up(x))                             a gated block, over layers of any kind; where down is
                                                             fused too, its input is not kept but made again, and
                                                             on request gate(x) and up(x) are as well
    y = x / √(mean(x²) + ε) ⊙ (w + o)                        a root mean square norm
    loss = cross_entropy(head(hidden), labels)               a language model in training, without its logits

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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftkern.formats import QuantizedTensor
from peftkern.nn.masked_linear import MERGE_UNDER_MASK, mask_of
from peftkern.nn.sparse_linear import class_with_deltas, under_deltas
from peftkern.ops.dora_linear import dora_linear, row_squares
from peftkern.ops.gated_lora_linear import gated_lora_linear
from peftkern.ops.lora_linear import FLOAT_DTYPES, lora_linear, weight_versions
from peftkern.ops.masked_linear import masked_linear
from peftkern.ops.mixed_lora_linear import mixed_lora_linear
from peftkern.ops.silu_mul import silu_mul
from peftkern.ops.sparse_delta_linear import sparse_delta_linear
from peftkern.patch import merging
from peftkern.patch.arguments import (
    LayerArguments,
    has_global_hooks,
    is_hooked,
    is_lora_class,
    read_base,
    read_by_row,
    read_layer,
    read_lora,
    running_adapters,
)
from peftkern.patch.attention import RotaryKind, rotary_kind, takes_renamed, with_kernels
from peftkern.patch.decoder_layer import BEHIND, is_decoder_layer, run_layer
from peftkern.patch.experts import is_param_wrapper, read_experts, run_experts
from peftkern.patch.gated import activation_name, is_gated_mlp
from peftkern.patch.language_model import output_without_logits, tail_of, wants_loss_alone
from peftkern.patch.layer_plan import is_planned_layer, run_planned
from peftkern.patch.norms import NormKind, norm_kind, normalize, runs_original
from peftkern.patch.recompute import KEEPS, read_block, run_block
from peftkern.patch.weights import KNOWN_TENSORS, LastMade, NotFused, base_kind, original_class

if TYPE_CHECKING:
    from peftkern.patch.shared_input import SharedInput

logger = logging.getLogger("peftkern")

STATE = "_peftkern"
"""Key of a patched layer's `__dict__` that holds its `LayerState`."""


@dataclass
class LayerState:
    """What a patched layer carries.

    Attributes:
        name: of the layer in its model, for the log.
        backend: which every call of this layer must use; `None` lets the table of backends decide.
        recompute: what a gated block makes again in the backward pass, or the word of a decoder layer in a plan, as
            `patch` takes them.
        shared: the group of layers that this one shares its input with; `None` where it has none.
        warned: reasons that some layer of the model has already warned about; shared by all of them.
        calls_left: how many calls ran the original forward, by reason.
        unused: how many outputs its group computed for this layer in vain.
        unmerged: weight and bias of a `QuantizedLinear` base as they were before adapters were merged into it.
        views: made of this layer's own weight; never copied or saved along.
        squares: of the rows of this layer's own weight; neither.
        rows: the adapter of each row of the batch (`adapters_by_row`); ``None``: the active ones for all.
    """

    name: str
    backend: str | None
    warned: set[str]
    recompute: str | None = None
    shared: SharedInput | None = None
    calls_left: Counter[str] = field(default_factory=Counter)
    unused: int = 0
    unmerged: tuple[QuantizedTensor, Tensor | None] | None = None
    views: LastMade[QuantizedTensor] = field(default_factory=LastMade)
    squares: LastMade[Tensor] = field(default_factory=LastMade)
    rows: tuple[str, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "views": LastMade(), "squares": LastMade()}

    def note(self, reason: str, instead: str = "runs its original forward") -> None:
        """Count a call that the fused path did not take; the model warns once per reason, each layer logs once."""
        self.calls_left[reason] += 1
        if self.calls_left[reason] == 1:
            self.warn(instead, reason)

    def warn(self, what: str, reason: str) -> None:
        """Log what this layer does and why; the model warns of each reason once."""
        level = logging.DEBUG if reason in self.warned else logging.WARNING
        self.warned.add(reason)
        logger.log(level, "%s %s: %s", self.name, what, reason)


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` is patched."""
    return original_class(type(module)) is not type(module)


def set_class(module: nn.Module, layer_class: type) -> None:
    """Give ``module`` another class of the same layout."""
    module.__class__ = layer_class


def exchange_class(module: nn.Module, layer_class: type) -> None:
    """Give ``module`` another class beneath its patch; where that has no fused class, the patch goes."""
    if is_fused(module):
        state, fused = module.__dict__[STATE], fused_class(layer_class)
        if state.shared is not None:
            state.shared.forget()
        if fused is None:
            del module.__dict__[STATE]
        layer_class = fused or layer_class
    set_class(module, layer_class)


@functools.cache
def fused_class(original: type) -> type | None:
    """The fused subclass of a class of layers, one per class; `None` when its forward is not one we stand in for.

    It has the name of its original, because PEFT and others look at class names.
    """
    methods = _methods(original)
    if methods is None:
        return None

    def reduce(self: Any, _protocol: Any) -> tuple[Any, ...]:
        under = under_deltas(original)
        return _rebuild, (under, under is not original), self.__getstate__()

    namespace = {
        # PEFT writes down where the class of a model is from
        "__module__": __name__ if tail_of(original) is None else original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": f"{original.__qualname__} with the forward of `peftkern`.",
        "__reduce_ex__": reduce,
        "_peftkern_original": original,
        **methods,
    }
    fused: type = types.new_class(original.__name__, (original,), {}, lambda body: body.update(namespace))
    return fused


def _rebuild(original: type, with_deltas: bool = False) -> Any:
    """An empty instance of the fused class, for `pickle` and `copy`, which then fill in its state."""
    layer_class = fused_class(class_with_deltas(original) if with_deltas else original)
    if layer_class is None:
        raise TypeError(f"{original.__name__} was patched where it was saved, and its forward is not known here")
    return object.__new__(layer_class)


def _methods(original: Any) -> dict[str, Callable[..., Any]] | None:
    if is_lora_class(original):
        return {"forward": _lora_forward(original), "merge": _merge(original), "unmerge": _unmerge(original)}
    if is_param_wrapper(original):
        return {"forward": _experts_forward(original)}
    if is_gated_mlp(original):
        return {"forward": _gated_forward}
    if tail_of(original) is not None:
        return {"forward": _language_model_forward(original)}
    rotary = rotary_kind(original)
    if rotary is not None:
        return {"forward": _attention_forward(original, rotary)}
    if is_planned_layer(original):
        return {"forward": _planned_forward(original)}
    norm = norm_kind(original)
    if norm is not None:
        return {"forward": _norm_forward(original, norm)}
    kind = base_kind(original)
    has_deltas = under_deltas(original) is not original
    return {"forward": _base_forward(original)} if kind is not None and (kind.swap or has_deltas) else None


# ---- forwards


def _lora_forward(original: Any) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = self.__dict__[STATE].rows
        if rows is not None and not self.disable_adapters:
            return _run_by_row(self, x, rows, args, kwargs)
        names = running_adapters(self)
        if not names:  # the base layer alone
            return original.forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
        try:
            _check_arguments(args, kwargs)
            arguments = read_lora(self, names, x)
        except NotFused as refusal:
            reason = str(refusal)
        else:
            return _run(self, x, arguments)
        self.__dict__[STATE].note(reason)
        return original.forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]

    return forward


def _base_forward(original: Any) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        try:
            arguments = read_base(self, x)
        except NotFused as refusal:
            reason = str(refusal)
        else:
            return _run(self, x, arguments)
        self.__dict__[STATE].note(reason)
        return original.forward(self, x)  # type: ignore[no-any-return]

    return forward


def _experts_forward(original: Any) -> Callable[..., Any]:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not _has_running_adapters(self):
            return original.forward(self, x, *args, **kwargs)
        state = self.__dict__[STATE]
        try:
            if len(args) != 2 or kwargs:
                raise NotFused("the experts are not called with tokens, chosen experts and their weights")
            return run_experts(read_experts(self), x, *args, state.backend)
        except NotFused as refusal:
            reason = str(refusal)
        state.note(reason)
        return original.forward(self, x, *args, **kwargs)

    return forward


def _has_running_adapters(layer: Any) -> bool:
    """Whether this layer on a parameter, or one within it, adds an adapter now."""
    while is_param_wrapper(original_class(type(layer))):
        if running_adapters(layer):
            return True
        layer = layer.base_layer
    return False


def _language_model_forward(original: Any) -> Callable[..., Any]:
    # with the signature of the original, which the Trainer and `generate` look at
    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = wants_loss_alone(original, self, args, kwargs)
        if arguments is None:
            return original.forward(self, *args, **kwargs)
        state = self.__dict__[STATE]
        try:
            return output_without_logits(original, self, arguments, state.backend)
        except NotFused as refusal:
            reason = str(refusal)
        state.note(reason)
        return original.forward(self, *args, **kwargs)

    return forward


def _norm_forward(original: Any, kind: NormKind) -> Callable[..., Tensor]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        state = self.__dict__[STATE]
        if kwargs or len(args) != 1:
            reason = "called with its input by name"
        elif runs_original(args[0], state.backend):
            return original.forward(self, *args)  # type: ignore[no-any-return]
        else:
            try:
                return normalize(self, kind, args[0], state.backend)
            except NotFused as refusal:
                reason = str(refusal)
        state.note(reason)
        return original.forward(self, *args, **kwargs)  # type: ignore[no-any-return]

    return forward


def _attention_forward(original: Any, kind: RotaryKind) -> Callable[..., Any]:
    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__[STATE]
        # a compiler fuses what it finds, and would not see through the names
        if torch.compiler.is_compiling() or takes_renamed(original.forward, kwargs):
            return original.forward(self, *args, **kwargs)
        return with_kernels(original.forward, kind, state.backend, state.note)(self, *args, **kwargs)

    return forward


def _decoder_layer_forward(original: Any) -> Callable[..., Any]:
    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__[STATE]
        if _is_only_a_norm(self, getattr(self, BEHIND)) and not torch.compiler.is_compiling():
            try:
                output = run_layer(original, self, args, kwargs, state.backend)
            except NotFused as refusal:
                state.note(str(refusal))
            else:
                if output is not None:
                    return output
        return original.forward(self, *args, **kwargs)

    return forward


def _planned_forward(original: Any) -> Callable[..., Any]:
    by_itself = _decoder_layer_forward(original) if is_decoder_layer(original) else original.forward

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__[STATE]
        if state.recompute is None or not self.training or not torch.is_grad_enabled():
            return by_itself(self, *args, **kwargs)
        return run_planned(state.recompute, by_itself, self, args, kwargs, state.warn)

    return forward


def _is_only_a_norm(layer: Any, norm: Any) -> bool:
    """Whether calling ``norm`` is the fused norm, on the same backend, and nothing more."""
    if not is_fused(norm) or is_hooked(norm) or has_global_hooks():
        return False
    return bool(norm.__dict__[STATE].backend == layer.__dict__[STATE].backend)


def _gated_forward(self: Any, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        y = _recomputed_block(self, x)
        return _gated_down(self, self.gate_proj(x), self.up_proj(x)) if y is None else y
    # the results of gate_proj and up_proj are not named here: without gradients they are freed before down_proj runs
    return self.down_proj(_gated(self, self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return]


def _recomputed_block(block: Any, x: Tensor) -> Tensor | None:
    """The block as one operation that keeps x; `None` where it was not asked for, or cannot be."""
    state = block.__dict__[STATE]
    if state.recompute is None:
        return None
    try:
        activation = read_activation(block.act_fn)
        layers = read_block(block, x, _check_in_block)
    except NotFused as refusal:
        state.note(str(refusal), KEEPS)
        return None
    return run_block(x, layers, activation, state.recompute, state.backend)


def _check_in_block(layer: nn.Module) -> None:
    if not is_fused(layer):
        raise NotFused("it is not patched")
    if layer.__dict__[STATE].rows is not None:
        raise NotFused("rows of the batch have adapters of their own")


def _gated_down(block: Any, gate: Tensor, up: Tensor) -> Tensor:
    """The gate and the layer behind it, as one operation that keeps nothing in between where both run fused."""
    arguments = _arguments_behind_gate(block, gate, up)
    if arguments is None:
        return block.down_proj(_gated(block, gate, up))  # type: ignore[no-any-return]
    return gated_lora_linear(
        gate,
        up,
        arguments.weight,
        arguments.lora_A,
        arguments.lora_B,
        arguments.scaling,
        arguments.total_bias(),
        arguments.dropout_p,
        values=arguments.values,
        indices=arguments.indices,
        delta_scaling=arguments.delta_scaling,
        activation=read_activation(block.act_fn),
        backend=block.down_proj.__dict__[STATE].backend,
    )


def _arguments_behind_gate(block: Any, gate: Tensor, up: Tensor) -> LayerArguments | None:
    """What ``down_proj`` multiplies with; `None` where calling it is more than that, or does not keep its input."""
    down = block.down_proj
    if not is_fused(down) or is_hooked(down) or has_global_hooks() or torch.compiler.is_compiling():
        return None
    state = down.__dict__[STATE]
    if state.backend != block.__dict__[STATE].backend or state.rows is not None:
        return None
    try:
        read_activation(block.act_fn)
        _check_gate(gate, up)
        arguments = read_layer(down, gate)
    except NotFused:  # whatever runs instead says why
        return None
    if arguments.mask is not None or arguments.magnitude is not None:
        return None
    keeps_input = any(tensor.requires_grad for tensor in (*arguments.lora_A, *arguments.values))
    return arguments if keeps_input and arguments.compute_dtype(gate.dtype) == gate.dtype else None


def _gated(block: Any, gate: Tensor, up: Tensor) -> Tensor:
    state = block.__dict__[STATE]
    try:
        activation = read_activation(block.act_fn)
        _check_gate(gate, up)
    except NotFused as refusal:
        state.note(str(refusal))
    else:
        return silu_mul(gate, up, activation=activation, backend=state.backend)
    return block.act_fn(gate) * up  # type: ignore[no-any-return]


def read_activation(activation: Any) -> str:
    """What calling ``activation`` computes; raises `NotFused` where the kernels do not, or it does more."""
    name = activation_name(activation)
    if name is None:
        raise NotFused(f"the activation is {type(activation).__name__}, not SiLU or GELU")
    if is_hooked(activation):
        raise NotFused("the activation has hooks, which the fused product would skip")
    return name


def _check_gate(gate: Tensor, up: Tensor) -> None:
    if not {type(gate), type(up)} <= KNOWN_TENSORS:
        raise NotFused(f"the activations are of type {type(gate).__name__} and {type(up).__name__}, not plain tensors")
    if gate.dtype != up.dtype or gate.dtype not in FLOAT_DTYPES:
        raise NotFused(f"gate_proj gives {gate.dtype} and up_proj {up.dtype}")
    if gate.shape != up.shape or gate.device != up.device:
        raise NotFused("gate_proj and up_proj give results of different shapes or on different devices")


def _merge(original: Any) -> Callable[..., None]:
    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        _forget_outputs(self)
        if mask_of(self.get_base_layer()) is not None:
            raise ValueError(MERGE_UNDER_MASK)
        if not _has_quantized_linear(self):
            return original.merge(self, safe_merge, adapter_names)  # type: ignore[no-any-return]
        names = sys.modules["peft.tuners.tuners_utils"].check_adapters_to_merge(self, adapter_names)
        return merging.merge(self, names, self.__dict__[STATE])

    return merge


def _unmerge(original: Any) -> Callable[..., None]:
    def unmerge(self: Any) -> None:
        _forget_outputs(self)
        if not self.merged or not _has_quantized_linear(self):
            return original.unmerge(self)  # type: ignore[no-any-return]
        return merging.unmerge(self, self.__dict__[STATE])

    return unmerge


def _forget_outputs(layer: Any) -> None:
    shared = layer.__dict__[STATE].shared
    if shared is not None:
        shared.forget()


def _has_quantized_linear(layer: Any) -> bool:
    package = sys.modules.get("peftkern.nn.quantized_linear")
    return package is not None and isinstance(layer.get_base_layer(), package.QuantizedLinear)


def _check_arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    given = [name for name, value in kwargs.items() if value is not None]
    if args or given:
        raise NotFused(f"called with {', '.join(given) or 'further positional arguments'}")


def _run(layer: Any, x: Tensor, arguments: LayerArguments) -> Tensor:
    state = layer.__dict__[STATE]
    if arguments.values:
        y = sparse_delta_linear(
            arguments.to_compute(x),
            arguments.weight,
            arguments.values,
            arguments.indices,
            arguments.delta_scaling,
            arguments.lora_A,
            arguments.lora_B,
            arguments.scaling,
            arguments.total_bias(),
            arguments.dropout_p,
            backend=state.backend,
        )
        return arguments.from_compute(y, x)
    if arguments.mask is not None:
        y = masked_linear(
            arguments.to_compute(x),
            arguments.weight,
            arguments.mask,
            arguments.lora_A,
            arguments.lora_B,
            arguments.scaling,
            arguments.total_bias(),
            arguments.dropout_p,
            backend=state.backend,
        )
        return arguments.from_compute(y, x)
    if arguments.magnitude is not None:
        y = dora_linear(
            arguments.to_compute(x),
            arguments.weight,
            arguments.lora_A[0],
            arguments.lora_B[0],
            arguments.magnitude,
            arguments.scaling[0],
            arguments.bias,
            arguments.dropout_p[0],
            squares=_row_squares(state, arguments),
            backend=state.backend,
        )
        return arguments.from_compute(y, x)
    if state.shared is not None and not torch.compiler.is_compiling():
        y = state.shared.output(layer, x, arguments)
        if y is not None:
            return arguments.from_compute(y, x)
    y = lora_linear(
        arguments.to_compute(x),
        arguments.weight,
        arguments.lora_A,
        arguments.lora_B,
        arguments.scaling,
        arguments.total_bias(),
        arguments.dropout_p,
        backend=state.backend,
    )
    return arguments.from_compute(y, x)


def _run_by_row(layer: Any, x: Tensor, rows: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    state = layer.__dict__[STATE]
    try:
        _check_arguments(args, kwargs)
        arguments, adapters = read_by_row(layer, rows, x)
    except NotFused as refusal:
        raise ValueError(f"adapters_by_row: {state.name}: {refusal}") from refusal
    y = mixed_lora_linear(
        arguments.to_compute(x),
        arguments.weight,
        arguments.lora_A,
        arguments.lora_B,
        adapters,
        arguments.scaling,
        arguments.bias,
        arguments.dropout_p,
        backend=state.backend,
    )
    return arguments.from_compute(y, x)


def _row_squares(state: LayerState, arguments: LayerArguments) -> Tensor:
    weight = arguments.weight
    if torch.compiler.is_compiling():  # a graph must not keep what was made while tracing
        return row_squares(weight)
    if not isinstance(weight, Tensor):
        return state.squares.get((weight, *weight_versions(weight)), lambda: row_squares(weight))
    key = (arguments.base.weight, weight.data_ptr(), *weight_versions(weight))  # the weight itself may be a new view
    return state.squares.get(key, lambda: row_squares(weight))
