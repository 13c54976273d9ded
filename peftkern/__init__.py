"""peftkern: fused kernels for parameter-efficient fine-tuning of Hugging Face models.

Importing this package loads PyTorch and the kernels, and neither transformers, peft, triton nor bitsandbytes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from peftkern import ops
from peftkern._version import __version__
from peftkern.backends.registry import choose as which
from peftkern.formats import QuantizedTensor

if TYPE_CHECKING:
    from peftkern.integrations import QuantConfig as QuantConfig
    from peftkern.integrations import quantize_ as quantize_

_LAZY = {
    "QuantConfig": "peftkern.integrations",
    "quantize_": "peftkern.integrations",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'peftkern' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


__all__ = ["QuantConfig", "QuantizedTensor", "__version__", "ops", "quantize_", "which"]
