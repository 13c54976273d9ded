"""peftkern: fused kernels for parameter-efficient fine-tuning of Hugging Face models.

Importing this package loads PyTorch and the kernels, and neither transformers, peft, triton nor bitsandbytes. It sees
to it that transformers, once loaded, knows models that were saved with ``QuantConfig``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from peftkern import ops, optim
from peftkern._version import __version__
from peftkern.backends.registry import choose as which
from peftkern.formats import QuantizedTensor
from peftkern.integrations.registration import register_on_import

# This name is both a package and a function. Importing the package binds it first, then the function takes its place.
from peftkern.patch import PatchReport, VerifyReport, adapters_by_row, patch, unpatch, verify

# The same holds for this one.
from peftkern.plan import Plan, plan

if TYPE_CHECKING:
    from peftkern.integrations import PackingCollator as PackingCollator
    from peftkern.integrations import PreferenceLoss as PreferenceLoss
    from peftkern.integrations import QuantConfig as QuantConfig
    from peftkern.integrations import attend_by_example as attend_by_example
    from peftkern.integrations import check_packing as check_packing
    from peftkern.integrations import dpo_loss as dpo_loss
    from peftkern.integrations import orpo_loss as orpo_loss
    from peftkern.integrations import quantize_ as quantize_
    from peftkern.integrations import token_logprobs as token_logprobs
    from peftkern.nn import QuantizedEmbedding as QuantizedEmbedding
    from peftkern.nn import QuantizedLinear as QuantizedLinear
    from peftkern.select.cofitune import CoFiTune as CoFiTune
    from peftkern.select.freeze_as_guard import FreezeAsGuard as FreezeAsGuard
    from peftkern.select.green_trainer import GreenTrainer as GreenTrainer
    from peftkern.select.half_fine_tuning import HalfFineTuning as HalfFineTuning
    from peftkern.select.lisa import LISA as LISA
    from peftkern.select.presets import FreezeLower as FreezeLower
    from peftkern.select.presets import LayerRange as LayerRange
    from peftkern.select.presets import Preset as Preset
    from peftkern.select.random_selection import RandomSelection as RandomSelection

_LAZY = {
    "CoFiTune": "peftkern.select.cofitune",
    "FreezeAsGuard": "peftkern.select.freeze_as_guard",
    "FreezeLower": "peftkern.select.presets",
    "GreenTrainer": "peftkern.select.green_trainer",
    "HalfFineTuning": "peftkern.select.half_fine_tuning",
    "LISA": "peftkern.select.lisa",
    "LayerRange": "peftkern.select.presets",
    "PackingCollator": "peftkern.integrations",
    "PreferenceLoss": "peftkern.integrations",
    "Preset": "peftkern.select.presets",
    "QuantConfig": "peftkern.integrations",
    "QuantizedEmbedding": "peftkern.nn",
    "QuantizedLinear": "peftkern.nn",
    "RandomSelection": "peftkern.select.random_selection",
    "attend_by_example": "peftkern.integrations",
    "check_packing": "peftkern.integrations",
    "dpo_loss": "peftkern.integrations",
    "orpo_loss": "peftkern.integrations",
    "quantize_": "peftkern.integrations",
    "token_logprobs": "peftkern.integrations",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'peftkern' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


register_on_import()

__all__ = [
    "LISA",
    "CoFiTune",
    "FreezeAsGuard",
    "FreezeLower",
    "GreenTrainer",
    "HalfFineTuning",
    "LayerRange",
    "PackingCollator",
    "PatchReport",
    "Plan",
    "PreferenceLoss",
    "Preset",
    "QuantConfig",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedTensor",
    "RandomSelection",
    "VerifyReport",
    "__version__",
    "adapters_by_row",
    "attend_by_example",
    "check_packing",
    "dpo_loss",
    "ops",
    "optim",
    "orpo_loss",
    "patch",
    "plan",
    "quantize_",
    "token_logprobs",
    "unpatch",
    "verify",
    "which",
]
