"""Bridges to transformers: loading quantized, quantizing in memory, bitsandbytes checkpoints.

Importing this package imports none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from peftkern.integrations.registration import register, register_on_import

if TYPE_CHECKING:
    from peftkern.integrations.bitsandbytes import config_from_pretrained as config_from_pretrained
    from peftkern.integrations.packing import PackingCollator as PackingCollator
    from peftkern.integrations.packing import check_packing as check_packing
    from peftkern.integrations.quant_config import QuantConfig as QuantConfig
    from peftkern.integrations.quantize import quantize_ as quantize_
    from peftkern.integrations.report import QuantizeReport as QuantizeReport

_LAZY = {
    "PackingCollator": "peftkern.integrations.packing",
    "QuantConfig": "peftkern.integrations.quant_config",
    "QuantizeReport": "peftkern.integrations.report",
    "check_packing": "peftkern.integrations.packing",
    "config_from_pretrained": "peftkern.integrations.bitsandbytes",
    "quantize_": "peftkern.integrations.quantize",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'peftkern.integrations' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


__all__ = [
    "PackingCollator",
    "QuantConfig",
    "QuantizeReport",
    "check_packing",
    "config_from_pretrained",
    "quantize_",
    "register",
    "register_on_import",
]
