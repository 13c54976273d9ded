"""Train some row ranges of a parameter, in place, while the rest of it stays frozen.

Every range is an ``nn.Parameter`` that is a view of the frozen parameter's memory: what an optimizer does to it happens
in the weight. Only ranges that ask for a gradient get one, and the optimizer keeps state for those alone. A range
counts over the rows of the parameter with its leading dimensions flattened, ``[..., rows, in]``; for the layer of
GPT-2 that holds its weight as [in, out], over its columns.

    slice_rows(layer, "weight", [(0, 64), (64, 96)])     # layer.weight_rows_0_64, layer.weight_rows_64_96
    unslice(layer)                                       # the plain layer again, with what was trained

The class of the module becomes a subclass of itself; hooks, names, `isinstance` checks and the keys of its state dict
stay. A linear layer computes one product forward and the gradient of the wanted rows alone; a parameter with three
dimensions, as transformers keeps the experts of a mixture in, is read through a property, and its whole gradient exists
for as long as the backward pass needs to take the wanted rows out.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

_STATE = "_peftkern_rows"
Range = tuple[int, int]


@dataclass
class _State:
    """What a sliced module carries: its ranges by parameter, and which parameters asked for a gradient before."""

    ranges: dict[str, list[Range]] = field(default_factory=dict)
    asked: dict[str, bool] = field(default_factory=dict)

    def names(self) -> list[str]:
        return [_name(parameter, range_) for parameter, ranges in self.ranges.items() for range_ in ranges]


def _name(parameter: str, range_: Range) -> str:
    return f"{parameter}_rows_{range_[0]}_{range_[1]}"


# ---- the public functions


def out_features(module: nn.Module, parameter: str = "weight") -> int:
    """How many rows `slice_rows` counts in ``parameter`` of ``module``."""
    tensor = _whole(module, parameter)
    return tensor.shape[-1] if _is_transposed(type(module)) else tensor.shape[:-1].numel()


def row_dimension(module: nn.Module, parameter: str = "weight") -> int:
    """Along which dimension `slice_rows` counts the rows of ``parameter`` of ``module``, as `row_view` gives them."""
    return 1 if parameter != "bias" and _is_transposed(type(module)) else 0


def check_sliceable(module: nn.Module, parameter: str = "weight") -> None:
    """Raise `TypeError` unless `slice_rows` can take ``parameter`` of ``module``."""
    tensor = _whole(module, parameter)
    if not tensor.is_floating_point():
        raise TypeError(f"slice_rows: {parameter} of {type(module).__name__} is {tensor.dtype}; only dense ones train")
    if tensor.dim() == 2 and parameter == "weight" and not _is_linear(_original(type(module))):
        raise TypeError(
            f"slice_rows: {type(module).__name__} computes something of its own; "
            f"taken are nn.Linear, transformers' Conv1D, and parameters with three dimensions"
        )
    if tensor.dim() not in (2, 3) or not tensor.is_contiguous():
        raise TypeError(f"slice_rows: {parameter} must be contiguous with 2 or 3 dimensions, got {list(tensor.shape)}")


def slice_rows(module: nn.Module, parameter: str, ranges: Sequence[Range]) -> list[list[nn.Parameter]]:
    """Freeze ``parameter`` of ``module`` and make a trainable parameter of each of its row ranges.

    A bias of a linear layer is sliced with its weight. Parameters that exist already are kept, so that an optimizer
    goes on with them.

    Args:
        module: ``nn.Linear`` or transformers' ``Conv1D`` with ``parameter="weight"``, or any module with a parameter of
            three dimensions.
        ranges: (begin, end), ascending, without overlap.

    Returns:
        For each range its parameters: the weight's, and the bias's where there is one.

    Raises:
        TypeError: the module or the parameter is of another kind.
        ValueError: the ranges are not ascending or not within the parameter.
    """
    check_sliceable(module, parameter)
    _check_ranges(ranges, out_features(module, parameter))
    state: _State = module.__dict__.setdefault(_STATE, _State())
    names = [parameter]
    if getattr(module, "bias", None) is not None and parameter == "weight" and _is_linear(_original(type(module))):
        names.append("bias")
    for name in names:
        state.ranges[name] = list(ranges)
        whole = _whole(module, name)
        state.asked.setdefault(name, whole.requires_grad)
        whole.requires_grad_(False)
    module.__class__ = _sliced_class(_original(type(module)), tuple(sorted(state.ranges)))
    return [[_slice(module, name, range_) for name in names] for range_ in ranges]


def unslice(module: nn.Module) -> None:
    """Undo `slice_rows`: the class, the parameters and what asks for a gradient are as before; trained values stay.

    Raises:
        ValueError: ``module`` is not sliced.
    """
    if not _is_sliced(module):
        raise ValueError(f"unslice: {type(module).__name__} has no sliced parameter")
    state: _State = module.__dict__.pop(_STATE)
    for name in state.names():
        del module._parameters[name]
    module.__class__ = _original(type(module))
    for name, asked in state.asked.items():
        _whole(module, name).requires_grad_(asked)


def _whole(module: nn.Module, name: str) -> nn.Parameter:
    # not by attribute: the property of a sliced parameter gives what autograd sees of it
    return cast(nn.Parameter, module._parameters[name])


def _check_ranges(ranges: Sequence[Range], rows: int) -> None:
    end_before = 0
    for begin, end in ranges:
        if not end_before <= begin < end <= rows:
            raise ValueError(f"slice_rows: ranges must ascend within 0 and {rows} without overlap, got {list(ranges)}")
        end_before = end


def _slice(module: nn.Module, name: str, range_: Range) -> nn.Parameter:
    slice_name = _name(name, range_)
    present = module._parameters.get(slice_name)
    if present is not None:
        return present
    part = nn.Parameter(_view(module, name, range_))
    module.register_parameter(slice_name, part)
    return part


def _view(module: nn.Module, name: str, range_: Range) -> Tensor:
    return row_view(module, name, _whole(module, name).detach(), range_)


def row_view(module: nn.Module, parameter: str, tensor: Tensor, range_: Range) -> Tensor:
    """The rows of ``tensor``, of the shape of ``parameter`` of ``module``, as `slice_rows` counts them."""
    begin, end = range_
    if parameter == "bias":
        return tensor[begin:end]
    if _is_transposed(type(module)):
        return tensor[:, begin:end]
    return tensor.view(-1, tensor.shape[-1])[begin:end]


# ---- classes


def _original(module_class: type) -> type:
    original: type = module_class.__dict__.get("_peftkern_unsliced", module_class)
    return original


def _is_sliced(module: nn.Module) -> bool:
    return _STATE in module.__dict__


def _is_linear(module_class: type) -> bool:
    return getattr(module_class, "forward", None) is nn.Linear.forward or _is_transposed(module_class)


def _is_transposed(module_class: type) -> bool:
    """Whether the class is transformers' Conv1D, a linear layer with its weight as [in, out]."""
    module = sys.modules.get("transformers.pytorch_utils")
    return module is not None and getattr(_original(module_class), "forward", None) is module.Conv1D.forward


@functools.cache
def _sliced_class(original: type, parameters: tuple[str, ...]) -> type:
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": original.__qualname__,
        "__doc__": f"{original.__qualname__} of which some rows are trained.",
        "_peftkern_unsliced": original,
    }
    if _is_linear(original):
        namespace["forward"] = _linear_forward(original)
    else:
        # a module keeps its parameters elsewhere, so that a property is found first by the code that reads them
        namespace.update({name: property(functools.partial(_assembled, name=name)) for name in parameters})
    return types.new_class(original.__name__, (_Sliced, original), {}, lambda body: body.update(namespace))


def _rebuild(original: type, parameters: tuple[str, ...]) -> Any:
    """An empty instance of the sliced class, for `pickle` and `copy`, which then fill in its state."""
    return object.__new__(_sliced_class(original, parameters))


class _Sliced(nn.Module):
    """What every sliced module does beside computing: its slices stay views, and out of its state dict."""

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        parameters = tuple(sorted(self.__dict__[_STATE].ranges))
        return _rebuild, (_original(type(self)), parameters), self.__getstate__()  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._link()

    def _link(self) -> None:
        """Let the slices be views again, where the parameters that they are of were moved or replaced."""
        state: _State = self.__dict__[_STATE]
        for name, ranges in state.ranges.items():
            for range_ in ranges:
                cast(nn.Parameter, self._parameters[_name(name, range_)]).data = _view(self, name, range_)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._link()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.__dict__[_STATE].names():
            del destination[prefix + name]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {prefix + name for name in self.__dict__[_STATE].names()}
        missing: list[str] = []
        arguments = (state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        super()._load_from_state_dict(*arguments)
        missing_keys.extend(name for name in missing if name not in own)
        self._link()


def _wanted(module: nn.Module, names: Iterable[str]) -> list[tuple[str, Range, nn.Parameter]]:
    """The slices of these parameters that ask for a gradient."""
    ranges = module.__dict__[_STATE].ranges
    slices = [(name, range_, module._parameters[_name(name, range_)]) for name in names for range_ in ranges[name]]
    return [(name, range_, part) for name, range_, part in slices if part is not None and part.requires_grad]


# ---- linear layers: the gradient of the wanted rows alone


def _linear_forward(original: Any) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        y: Tensor = original.forward(self, x)
        if not torch.is_grad_enabled():
            return y
        wanted = _wanted(self, self.__dict__[_STATE].ranges)
        if not wanted:
            return y
        names, ranges, parameters = zip(*wanted, strict=True)
        return _apply_rows(y, x, names, ranges, _is_transposed(type(self)), *parameters)

    return forward


class _Rows(torch.autograd.Function):
    """y, unchanged, with the row ranges that it was computed with as parents.

    dW[range] = dY[:, range]ᵀ X     db[range] = Σ dY[:, range]
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        names: Sequence[str],
        ranges: Sequence[Range],
        transposed: bool,
        *parameters: nn.Parameter,
    ) -> Tensor:
        ctx.call = (names, ranges, transposed, [parameter.dtype for parameter in parameters])
        ctx.save_for_backward(x if "weight" in names else None)
        # not a view in autograd's eyes: the output of a layer may be modified in place
        return torch.ops.aten._unsafe_view(y, y.shape)  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        names, ranges, transposed, dtypes = ctx.call
        (x,) = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        inputs = None if x is None else x.reshape(-1, x.shape[-1]).to(grad.dtype)
        gradients: list[Tensor | None] = []
        for index, (name, (begin, end)) in enumerate(zip(names, ranges, strict=True)):
            part = rows[:, begin:end]
            if not ctx.needs_input_grad[5 + index]:
                gradients.append(None)
            elif name == "bias":
                gradients.append(part.sum(0).to(dtypes[index]))
            else:
                gradients.append(_product(part, inputs, transposed).to(dtypes[index]))
        return grad, None, None, None, None, *gradients


def _product(part: Tensor, inputs: Tensor | None, transposed: bool) -> Tensor:
    assert inputs is not None
    return inputs.t() @ part if transposed else part.t() @ inputs


_apply_rows = cast(Callable[..., Tensor], _Rows.apply)


# ---- parameters with three dimensions


def _assembled(module: nn.Module, name: str) -> Tensor:
    whole = _whole(module, name)
    wanted = _wanted(module, [name])
    if not wanted or not torch.is_grad_enabled():
        return whole
    _names, ranges, parameters = zip(*wanted, strict=True)
    return cast(Tensor, _Assembled.apply(whole, ranges, *parameters))  # type: ignore[no-untyped-call]


class _Assembled(torch.autograd.Function):
    """The whole parameter, with its trained row ranges as parents."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, ranges: Sequence[Range], *_parameters: nn.Parameter) -> Tensor:
        ctx.ranges = ranges
        return torch.ops.aten._unsafe_view(whole, whole.shape)  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows = grad.reshape(-1, grad.shape[-1])
        # copies, so that the gradient of the whole does not stay for the sake of its parts
        return None, None, *(rows[begin:end].clone() for begin, end in ctx.ranges)
