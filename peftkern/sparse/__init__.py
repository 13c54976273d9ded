"""Sparse deltas and masks: index sets, layers, files and the methods that train them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftkern.integrations.fingerprint import Fingerprint as Fingerprint
    from peftkern.integrations.fingerprint import WrongBaseError as WrongBaseError
    from peftkern.sparse.d_pruner import DPruner as DPruner
    from peftkern.sparse.dsee import DSEE as DSEE
    from peftkern.sparse.head_pruning import remove_heads as remove_heads
    from peftkern.sparse.layers import attach as attach
    from peftkern.sparse.layers import deltas as deltas
    from peftkern.sparse.layers import detach as detach
    from peftkern.sparse.layers import disabled as disabled
    from peftkern.sparse.layers import linear_layers as linear_layers
    from peftkern.sparse.layers import set_active as set_active
    from peftkern.sparse.lottery_ticket import LotteryTicket as LotteryTicket
    from peftkern.sparse.masking import mask_layers as mask_layers
    from peftkern.sparse.masking import masks as masks
    from peftkern.sparse.masking import release_masks as release_masks
    from peftkern.sparse.merging import merge as merge
    from peftkern.sparse.merging import unmerge as unmerge
    from peftkern.sparse.pruned import Pruned as Pruned
    from peftkern.sparse.rosa import RoSA as RoSA
    from peftkern.sparse.skill_grafting import SkillGrafting as SkillGrafting
    from peftkern.sparse.spiel import SpIEL as SpIEL
    from peftkern.sparse.static_mask import StaticMask as StaticMask
    from peftkern.sparse.update import SparseUpdate as SparseUpdate

_LAZY = {
    "DPruner": "peftkern.sparse.d_pruner",
    "DSEE": "peftkern.sparse.dsee",
    "Fingerprint": "peftkern.integrations.fingerprint",
    "LotteryTicket": "peftkern.sparse.lottery_ticket",
    "Pruned": "peftkern.sparse.pruned",
    "RoSA": "peftkern.sparse.rosa",
    "SkillGrafting": "peftkern.sparse.skill_grafting",
    "SpIEL": "peftkern.sparse.spiel",
    "SparseUpdate": "peftkern.sparse.update",
    "StaticMask": "peftkern.sparse.static_mask",
    "WrongBaseError": "peftkern.integrations.fingerprint",
    "attach": "peftkern.sparse.layers",
    "deltas": "peftkern.sparse.layers",
    "detach": "peftkern.sparse.layers",
    "disabled": "peftkern.sparse.layers",
    "linear_layers": "peftkern.sparse.layers",
    "mask_layers": "peftkern.sparse.masking",
    "masks": "peftkern.sparse.masking",
    "merge": "peftkern.sparse.merging",
    "release_masks": "peftkern.sparse.masking",
    "remove_heads": "peftkern.sparse.head_pruning",
    "set_active": "peftkern.sparse.layers",
    "unmerge": "peftkern.sparse.merging",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'peftkern.sparse' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


__all__ = sorted(_LAZY)
