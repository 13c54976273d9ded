"""Checkpoints that bitsandbytes made, loaded without it, and ours, described so that it loads them.

The tensors are the same; only ``quantization_config`` in ``config.json`` differs. transformers hands a folder whose
configuration names bitsandbytes to its own quantizer, which needs that package, and refuses another
``quantization_config=``. What it does take is a model configuration, so:

    config = peftkern.integrations.config_from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftkern.integrations.quant_config import QuantConfig
from peftkern.integrations.registration import register

BITSANDBYTES = "bitsandbytes"


def config_from_pretrained(name_or_path: str, **kwargs: Any) -> Any:
    """The model configuration of a checkpoint, with a quantization by bitsandbytes restated as a ``QuantConfig``.

    Args:
        name_or_path: folder, or name on the hub.
        kwargs: as for ``AutoConfig.from_pretrained``.

    Returns:
        What ``from_pretrained(name_or_path, config=...)`` takes. Checkpoints that are not quantized, or in another way,
        get their configuration unchanged.

    Raises:
        ValueError: the quantization config is inconsistent.
        OSError: there is no such checkpoint.
    """
    from transformers import AutoConfig

    register()
    config = AutoConfig.from_pretrained(name_or_path, **kwargs)
    for part in (config, config.get_text_config(decoder=True)):
        stated = getattr(part, "quantization_config", None)
        if isinstance(stated, Mapping) and is_bitsandbytes(stated):
            part.quantization_config = from_bitsandbytes(stated).to_dict()
    return config


def is_bitsandbytes(quantization_config: Mapping[str, Any]) -> bool:
    """Whether the ``quantization_config`` of a ``config.json`` is one of bitsandbytes."""
    flags = [bool(quantization_config.get(name, False)) for name in ("load_in_4bit", "load_in_8bit")]
    return any(flags) or quantization_config.get("quant_method") == BITSANDBYTES


def from_bitsandbytes(quantization_config: Mapping[str, Any]) -> QuantConfig:
    """Restate bitsandbytes' ``quantization_config``.

    Raises:
        ValueError: it asks for both or neither of 4 and 8 bit, or for an unknown 4-bit format.
    """
    four_bit, eight_bit = (bool(quantization_config.get(name, False)) for name in ("load_in_4bit", "load_in_8bit"))
    if four_bit == eight_bit:
        raise ValueError(
            "quantization_config: exactly one of load_in_4bit and load_in_8bit must be true, "
            f"got {four_bit} and {eight_bit}"
        )
    skip_modules = quantization_config.get("llm_int8_skip_modules")
    if eight_bit:
        return QuantConfig("int8", skip_modules=skip_modules)
    format = quantization_config.get("bnb_4bit_quant_type", "fp4")
    if format not in ("nf4", "fp4"):
        raise ValueError(f"quantization_config: bnb_4bit_quant_type must be nf4 or fp4, got {format!r}")
    double_quant = bool(quantization_config.get("bnb_4bit_use_double_quant", False))
    return QuantConfig(format, double_quant=double_quant, skip_modules=skip_modules)


def to_bitsandbytes(config: QuantConfig) -> dict[str, Any]:
    """The ``quantization_config`` that makes transformers load with bitsandbytes what we saved; for ``config.json``.

    Raises:
        ValueError: bitsandbytes has no linear layer for this format.
    """
    if config.format == "int8":
        stated: dict[str, Any] = {"load_in_8bit": True}
    elif config.format in ("nf4", "fp4"):
        stated = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": config.format,
            "bnb_4bit_use_double_quant": config.double_quant,
        }
    else:
        raise ValueError(f"bitsandbytes has no linear layer for {config.format}")
    return {"quant_method": BITSANDBYTES, "llm_int8_skip_modules": config.skip_modules, **stated}
