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
    from peftkern.integrations.packing import attend_by_example as attend_by_example
    from peftkern.integrations.packing import check_packing as check_packing
    from peftkern.integrations.preference import PreferenceLoss as PreferenceLoss
    from peftkern.integrations.preference import dpo_loss as dpo_loss
    from peftkern.integrations.preference import orpo_loss as orpo_loss
    from peftkern.integrations.preference import token_logprobs as token_logprobs
    from peftkern.integrations.quant_config import QuantConfig as QuantConfig
    from peftkern.integrations.quantize import quantize_ as quantize_
    from peftkern.integrations.report import QuantizeReport as QuantizeReport

_LAZY = {
    "PackingCollator": "peftkern.integrations.packing",
    "PreferenceLoss": "peftkern.integrations.preference",
    "QuantConfig": "peftkern.integrations.quant_config",
    "QuantizeReport": "peftkern.integrations.report",
    "attend_by_example": "peftkern.integrations.packing",
    "check_packing": "peftkern.integrations.packing",
    "config_from_pretrained": "peftkern.integrations.bitsandbytes",
    "dpo_loss": "peftkern.integrations.preference",
    "orpo_loss": "peftkern.integrations.preference",
    "quantize_": "peftkern.integrations.quantize",
    "token_logprobs": "peftkern.integrations.preference",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'peftkern.integrations' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


__all__ = [
    "PackingCollator",
    "PreferenceLoss",
    "QuantConfig",
    "QuantizeReport",
    "attend_by_example",
    "check_packing",
    "config_from_pretrained",
    "dpo_loss",
    "orpo_loss",
    "quantize_",
    "register",
    "register_on_import",
    "token_logprobs",
]
