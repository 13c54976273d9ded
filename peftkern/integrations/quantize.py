"""Quantizing a model that is in memory."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftkern.formats import VALUE_DTYPES, QuantizedTensor
from peftkern.integrations.quant_config import QuantConfig
from peftkern.integrations.quantizer import PeftkernQuantizer, model_bytes
from peftkern.integrations.registration import METHOD
from peftkern.integrations.report import QuantizeReport
from peftkern.integrations.selection import pretrained_models, select_modules
from peftkern.nn import QuantizedEmbedding, TiedQuantizedLinear, quantized_class
from peftkern.ops.quantize import quantize


def quantize_(model: nn.Module, config: QuantConfig) -> QuantizeReport:
    """Turn the linear layers of ``model``, in place, into quantized ones; embeddings as well where ``config`` says so.

    The layers, their names, hooks and biases stay the objects they are. A transformers model can then be trained with
    adapters, saved and loaded as if ``from_pretrained`` had quantized it. In a PEFT model, base layers are quantized
    and adapters are left alone. Layers that were quantized before are left as they are.

    All of it happens or nothing: every weight is quantized before the first layer changes. Until then the dense model
    and the packed weights, an eighth to a quarter of its size, are both in memory. Where that is too much, let
    ``from_pretrained(..., quantization_config=config)`` quantize while it loads.

    Args:
        model: any module, on any device but meta; also a model loaded from a GGUF file.
        config: format and skip rules.

    Returns:
        What was quantized, what was left and why, and the size before and after. Tensors that the caller still refers
        to are not freed.

    Raises:
        TypeError: ``model`` is not a module or ``config`` not a ``QuantConfig``.
        ValueError: a weight that would be quantized has NaN or infinite values, another dtype than float32, bfloat16
            and float16, or is on the meta device; embeddings whose rows share blocks; or another method has quantized
            the model. The model is as before.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, QuantConfig):
        raise TypeError(f"quantize_: config must be a peftkern.QuantConfig, got {type(config).__name__}")
    _check_other_quantizer(model)
    selection = select_modules(model, config)
    report = QuantizeReport(config.format, selection.chosen, selection.skipped, model_bytes(model))
    modules = {name: model.get_submodule(name) for name in selection.chosen}
    for name, module in modules.items():
        _check_module(name, module)
    quantized = {
        name: _quantize_weight(name, module, config.arguments_for(selection.chosen[name]))
        for name, module in modules.items()
    }
    for name, module in modules.items():
        quantized_class(module).convert_(module, quantized.pop(name))
    if selection.tied is not None:
        embeddings, head = selection.tied
        TiedQuantizedLinear.tie_(model.get_submodule(head), cast(QuantizedEmbedding, model.get_submodule(embeddings)))
        report.formats[head] = report.formats[embeddings]
    if report.quantized:
        _mark_as_quantized(model, config, report)
    report.bytes_after = model_bytes(model)
    return report


def _check_other_quantizer(model: nn.Module) -> None:
    for pretrained in pretrained_models(model):
        quantizer = getattr(pretrained, "hf_quantizer", None)
        # A GGUF file that was loaded dense leaves its quantizer behind, with an empty list of packed modules.
        packed = getattr(quantizer, "packed_modules", True)
        if quantizer is not None and packed and not isinstance(quantizer, PeftkernQuantizer):
            method = getattr(quantizer.quantization_config, "quant_method", "another method")
            raise ValueError(f"quantize_: the model is already quantized by {getattr(method, 'value', method)}")


def _check_module(name: str, module: nn.Module) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.dtype not in VALUE_DTYPES:
        raise ValueError(f"quantize_: {name}.weight must be float32, bfloat16 or float16, got {weight.dtype}")
    if weight.is_meta:
        raise ValueError(f"quantize_: {name}.weight is on the meta device; load the weights first")
    if "forward" in module.__dict__:
        raise ValueError(
            f"quantize_: {name} has a forward of its own, as accelerate sets it for a device_map; "
            "pass quantization_config to from_pretrained instead"
        )


def _quantize_weight(name: str, module: nn.Module, arguments: dict[str, Any]) -> QuantizedTensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    dense = weight.detach().t().contiguous() if isinstance(module, Conv1D) else weight.detach()
    try:
        quantized = quantize(dense, **arguments)
        quantized_class(module).check(quantized)
    except (ValueError, TypeError) as error:
        raise ValueError(f"quantize_: {name}.weight: {error}") from error
    return quantized


def _mark_as_quantized(model: nn.Module, config: QuantConfig, report: QuantizeReport) -> None:
    """Leave the transformers model as ``from_pretrained`` would, so that it can be saved and trained the same way."""
    for index, pretrained in enumerate(pretrained_models(model)):
        pretrained.config._is_quantized = True
        if index == 0:
            _attach_quantizer(pretrained, config, report)


def _attach_quantizer(pretrained: Any, config: QuantConfig, report: QuantizeReport) -> None:
    quantizer = PeftkernQuantizer(config)
    quantizer.report = report
    pretrained.hf_quantizer = quantizer
    pretrained.config.quantization_config = config
    pretrained.quantization_method = METHOD
    pretrained.is_quantized = True
