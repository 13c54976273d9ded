"""The two conversions that turn linear layers into quantized ones while transformers loads a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D

from peftkern.formats import QuantizedTensor
from peftkern.formats.bitsandbytes import read_weight
from peftkern.nn import quantized_class
from peftkern.ops.quantize import quantize

if TYPE_CHECKING:
    from peftkern.integrations.quantizer import PeftkernQuantizer

Tensors = Mapping[str, "list[Tensor] | Tensor"]


class _Operation(ConversionOps):  # type: ignore[misc]
    """An operation that reports to the quantizer of its model."""

    def __init__(self, hf_quantizer: PeftkernQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # transformers copies the operation for every weight; they all report to the one quantizer
        return self


class QuantizeWeight(_Operation):
    """Dense weight in, quantized layer out."""

    def convert(
        self,
        input_dict: Tensors,
        source_patterns: Any = None,
        target_patterns: Any = None,
        *,
        model: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            tensor = _single(value)
            if not self.hf_quantizer.param_needs_quantization(model, name):
                result[name] = tensor
                continue
            module_name = name.rpartition(".")[0]
            module = model.get_submodule(module_name)
            dense = tensor.t().contiguous() if isinstance(module, Conv1D) else tensor
            try:
                arguments = self.hf_quantizer.quantization_config.arguments_for(self.hf_quantizer.chosen[module_name])
                result[name] = _convert_(module, quantize(dense, **arguments))
            except (ValueError, TypeError) as error:
                self.hf_quantizer.errors.append(f"{name}: {error}")
            self.hf_quantizer.pages.release(tensor)
        return result


class ReadWeight(_Operation):
    """Packed weight and companions in, quantized layer out; a dense weight is passed on in the dtype of the model."""

    def convert(
        self,
        input_dict: Tensors,
        source_patterns: Any = None,
        target_patterns: Any = None,
        *,
        model: Any,
        full_layer_name: str,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        tensors = {name: _single(value) for name, value in input_dict.items()}
        weight = tensors.pop("weight", None)
        module = model.get_submodule(full_layer_name.rpartition(".")[0])
        try:
            if weight is None:
                raise ValueError(f"missing, although {', '.join(sorted(tensors))} are there")
            if not tensors and weight.is_floating_point():
                return {full_layer_name: weight.to(_dense_dtype(model, full_layer_name))}
            return {full_layer_name: _read_module_(module, weight, tensors, full_layer_name)}
        except (ValueError, TypeError) as error:
            message = str(error)
            prefix = "" if message.startswith(full_layer_name.removesuffix("weight")) else f"{full_layer_name}: "
            self.hf_quantizer.errors.append(prefix + message)
            return {}


def _single(value: list[Tensor] | Tensor) -> Tensor:
    return value[0] if isinstance(value, list) else value


def _dense_dtype(model: Any, name: str) -> torch.dtype:
    """The dtype that a weight gets which is not quantized, as transformers decides it for dense checkpoints."""
    dtype: torch.dtype = model.get_parameter_or_buffer(name).dtype
    if not dtype.is_floating_point:
        raise ValueError("is dense, but the model holds integers there")
    plan: Mapping[str, torch.dtype] = model._get_dtype_plan(model.config.dtype)
    return next((planned for part, planned in plan.items() if f".{part}." in f".{name}."), dtype)


def _convert_(module: nn.Module, quantized: QuantizedTensor) -> Tensor:
    converted = quantized_class(module).convert_(module, quantized)
    for buffer in converted.buffers(recurse=False):
        buffer._is_hf_initialized = True  # type: ignore[attr-defined]  # or remote code may initialize the layer again
    return converted.weight


def _read_module_(module: nn.Module, weight: Tensor, companions: Mapping[str, Tensor], key: str) -> Tensor:
    if type(module) not in (nn.Linear, nn.Embedding, Conv1D):
        raise ValueError(f"is quantized, but the model has a {type(module).__name__} there, which only exists dense")
    dense = module.weight
    assert isinstance(dense, Tensor)
    quantized = read_weight(weight, companions, key, dense.dtype)
    expected = dense.shape[::-1] if isinstance(module, Conv1D) else dense.shape
    if quantized.shape != expected:
        raise ValueError(f"size mismatch, the model has {list(expected)} and the checkpoint {list(quantized.shape)}")
    return _convert_(module, quantized)
