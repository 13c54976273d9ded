"""The quantization configuration that ``from_pretrained`` and :func:`peftkern.quantize_` take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from peftkern.formats import BLOCK_SIZES, FORMATS
from peftkern.integrations.registration import METHOD

_FIELDS = ("format", "block_size", "double_quant", "skip_modules", "embeddings", "head")


class QuantConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How the linear layers of a model are quantized.

        model = AutoModelForCausalLM.from_pretrained(name, quantization_config=peftkern.QuantConfig("nf4"))

    quantizes each weight when it has been read, so that the dense model is never in memory. ``save_pretrained`` writes
    the packed weights and this configuration; loading that folder takes ``import peftkern`` and no argument.

    transformers refuses a ``quantization_config`` together with ``gguf_file=``: load the GGUF file without one and call
    :func:`peftkern.quantize_`.

    Args:
        format: "nf4", "fp4", "int8" (one scale per row, as LLM.int8) or "int8_blockwise".
        block_size: weights per scale, a power of two from 32 to 4096.
        double_quant: whether the scales are quantized as well. Row-wise int8 has neither blocks nor this: there both
            fields say nothing.
        skip_modules: names of modules that stay dense, whole or in parts between dots: "lm_head", "mlp",
            "model.layers.0". ``None`` skips the output embeddings and other heads; a list stands in place of that
            default. Weights that are tied to another module, and those that the model keeps in float32, always stay
            dense.
        embeddings: format of the input embeddings, of which the rows of a batch's tokens are decoded; ``None`` leaves
            them dense. A head that is tied to them stays tied: one packed tensor serves both.
        head: format of the output embeddings (``lm_head``); ``None`` is what ``skip_modules`` says. Of tied ones, this
            and ``embeddings`` mean the same.

    Raises:
        ValueError: a field has a value outside of what is listed here.
        TypeError: ``double_quant`` or ``skip_modules`` has another type.
    """

    def __init__(
        self,
        format: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        skip_modules: Sequence[str] | None = None,
        embeddings: str | None = None,
        head: str | None = None,
    ) -> None:
        if format not in FORMATS:
            raise ValueError(f"QuantConfig: format must be one of {', '.join(sorted(FORMATS))}; got {format!r}")
        for name, value in {"embeddings": embeddings, "head": head}.items():
            if value is not None and value not in FORMATS:
                raise ValueError(
                    f"QuantConfig: {name} must be None or one of {', '.join(sorted(FORMATS))}; got {value!r}"
                )
        if type(block_size) is not int or block_size not in BLOCK_SIZES:
            raise ValueError(f"QuantConfig: block_size must be one of {sorted(BLOCK_SIZES)}, got {block_size!r}")
        if not isinstance(double_quant, bool):
            raise TypeError(f"QuantConfig: double_quant must be True or False, got {double_quant!r}")
        self.quant_method = METHOD
        self.format = format
        self.block_size = block_size
        self.double_quant = double_quant
        self.skip_modules = None if skip_modules is None else _check_names(skip_modules)
        self.embeddings, self.head = embeddings, head

    @property
    def quantize_arguments(self) -> dict[str, Any]:
        """Keyword arguments of :func:`peftkern.ops.quantize`."""
        return self.arguments_for(self.format)

    def arguments_for(self, format: str) -> dict[str, Any]:
        """Those of a module in this format."""
        double_quant = self.double_quant and format != "int8"
        return {"format": format, "block_size": self.block_size, "double_quant": double_quant}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The configuration in a ``config.json``.

        Raises:
            ValueError, TypeError: a field is unknown or has no valid value.
        """
        fields = {key: value for key, value in config_dict.items() if key != "quant_method"}
        unknown = sorted(fields.keys() - set(_FIELDS))
        if unknown:
            raise ValueError(f"QuantConfig: unknown fields {unknown}; there are {list(_FIELDS)}")
        config = cls(**{**fields, **{key: value for key, value in kwargs.items() if key in _FIELDS}})
        unused = {key: value for key, value in kwargs.items() if key not in _FIELDS}
        return (config, unused) if return_unused_kwargs else config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuantConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # it can be changed, like every configuration of transformers


def _check_names(names: Any) -> list[str]:
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) and n for n in names):
        raise TypeError(f"QuantConfig: skip_modules must be a list of module names or None, got {names!r}")
    return list(names)
