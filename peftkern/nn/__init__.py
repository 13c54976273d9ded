"""Modules made of :mod:`peftkern.ops`."""

from peftkern.nn.quantized_linear import QuantizedLinear

__all__ = ["QuantizedLinear"]
