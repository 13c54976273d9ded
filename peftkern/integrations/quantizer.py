"""The quantizer that transformers calls while it loads a model with :class:`QuantConfig`.

A model is built on the meta device with its ordinary linear layers. As soon as the tensors of one layer have been read,
the layer is turned, itself, into a :class:`QuantizedLinear`: from a dense weight by quantizing it, or from packed codes
and their companions as they are. So at any time at most one dense weight is in memory, and a layer whose weight the
checkpoint does not have stays an ordinary one that transformers initializes.

transformers catches what a conversion raises and replaces it by a message that names nothing. Errors are therefore
collected, and raised together when the loading ends.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from peftkern.formats.bitsandbytes import COMPANION_KEYS
from peftkern.integrations.mapped_file import FilePages
from peftkern.integrations.report import QuantizeReport
from peftkern.nn import QuantizedEmbedding, QuantizedModule, TiedQuantizedLinear
from peftkern.nn.packed_weight import PackedWeight

if TYPE_CHECKING:
    from peftkern.integrations.quant_config import QuantConfig

logger = logging.getLogger("peftkern")

BYTES_PER_WEIGHT = {"nf4": 0.5, "fp4": 0.5, "int8": 1.0, "int8_blockwise": 1.0}


class PeftkernQuantizer(HfQuantizer):  # type: ignore[misc]
    """Quantizes on the way in, or takes packed weights as they are; both kinds can be trained with adapters and saved.

    Attributes:
        report: what was quantized, once the model is loaded.
        pages: gives back what has been read of the checkpoint's files.
    """

    quantization_config: QuantConfig
    requires_calibration = False
    # what the Trainer asks before it takes a quantized model without PEFT's adapters; sparse deltas set it
    is_qat_trainable = False
    serialized_names = {"weight": ["weight", *COMPANION_KEYS]}  # noqa: RUF012 (the parent's declaration)

    def __init__(self, quantization_config: QuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.chosen: dict[str, str] = {}
        self.errors: list[str] = []
        self.pages = FilePages()
        self.report = QuantizeReport(quantization_config.format)

    # ---- what transformers asks before it loads

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("device_map: modules on 'disk' cannot be quantized; use a GPU or 'cpu' for all of them")

    @property
    def quantized_element_size(self) -> float:
        return BYTES_PER_WEIGHT[self.quantization_config.format]

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        module_name, _, name = param_name.rpartition(".")
        return name == "weight" and module_name in self.chosen

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        from peftkern.integrations.selection import select_modules

        selection = select_modules(model, self.quantization_config)
        self.chosen = selection.chosen
        self.report = QuantizeReport(self.quantization_config.format, skipped=selection.skipped)
        self.report.bytes_before = model_bytes(model) - _bytes_to_be_tied(model)

    def get_quantize_ops(self) -> Any:
        from peftkern.integrations.conversion import QuantizeWeight

        return QuantizeWeight(self)

    def get_load_operations(self) -> dict[str, Any]:
        from peftkern.integrations.conversion import ReadWeight

        return {"deserialize": ReadWeight}

    # ---- after it has loaded

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.errors:
            raise ValueError("the weights could not be loaded:\n  " + "\n  ".join(self.errors))
        self._forget_load_operations(model)
        if not self.pre_quantized:
            _release_checkpoint_file(model, self.pages)
        _tie_head(model)
        modules = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedModule)}
        self.report.formats = {name: module.quantized.format for name, module in modules.items()}
        for name in self.report.formats:
            self.report.skipped.pop(name, None)
        for name in self.chosen.keys() - self.report.formats.keys():
            self.report.skipped[name] = "dense in the checkpoint" if self.pre_quantized else "not in the checkpoint"
        self.report.bytes_after = model_bytes(model)
        logger.info("%s", self.report)
        return model

    def _forget_load_operations(self, model: Any) -> None:
        """Packed weights are saved under the keys they were loaded from, so saving has nothing to convert back."""
        from peftkern.integrations.conversion import ReadWeight

        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [
            conversion
            for conversion in conversions
            if not any(isinstance(operation, ReadWeight) for operation in getattr(conversion, "operations", ()))
        ]

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for module in list(model.modules()):
            if isinstance(module, QuantizedModule):
                module.dequantize_(dtype)
        return model

    # ---- what the model can do then

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True


def _tie_head(model: Any) -> None:
    """A head to which transformers has given the codes of the embeddings gets their scales as well."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embeddings, QuantizedEmbedding) and type(head) is nn.Linear and head.weight is embeddings.weight:
        TiedQuantizedLinear.tie_(head, embeddings)


def _release_checkpoint_file(model: nn.Module, pages: FilePages) -> None:
    """Copy the tensors that stayed dense out of the checkpoint's mapped file.

    One tensor that points into it keeps all of it mapped.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and not isinstance(tensor, PackedWeight):
            tensor.data = pages.copy_out(tensor.data)
    pages.flush()


def _bytes_to_be_tied(model: Any) -> int:
    """Bytes of the parameters that transformers will replace by others when it has loaded those."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    pairs = [(parameters[name], parameters[source]) for name, source in model.all_tied_weights_keys.items()]
    return sum(target.nbytes for target, source in pairs if target is not source)


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; tensors on the meta device count as if they were allocated."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
