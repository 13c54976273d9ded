"""Modules made of :mod:`peftkern.ops`."""

from peftkern.nn.quantized_linear import QuantizedLinear
from peftkern.nn.saved_activations import saved_activations

__all__ = ["QuantizedLinear", "saved_activations"]
