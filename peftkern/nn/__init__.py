"""Modules made of :mod:`peftkern.ops`."""

from peftkern.nn.quantized_embedding import QuantizedEmbedding, quantized_class
from peftkern.nn.quantized_linear import QuantizedLinear, TiedQuantizedLinear
from peftkern.nn.quantized_module import QuantizedModule
from peftkern.nn.saved_activations import saved_activations

__all__ = [
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedModule",
    "TiedQuantizedLinear",
    "quantized_class",
    "saved_activations",
]
