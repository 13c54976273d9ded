"""Run the linear, LoRA and gated feed-forward layers of a model and its norms on fused kernels, in place, and undo it.

`patch` swaps the class of single layers, `unpatch` puts it back, and `verify` compares both on a batch. Inside of
`adapters_by_row` the rows of a batch train adapters of their own.
"""

from peftkern.patch.by_row import adapters_by_row
from peftkern.patch.report import PatchReport, PatchRow
from peftkern.patch.verification import VerifyReport, VerifyRow, verify
from peftkern.patch.walk import PatchError, patch, unpatch

__all__ = [
    "PatchError",
    "PatchReport",
    "PatchRow",
    "VerifyReport",
    "VerifyRow",
    "adapters_by_row",
    "patch",
    "unpatch",
    "verify",
]
