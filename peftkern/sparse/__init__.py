"""Sparse deltas and masks: index sets, layers, files and the methods that train them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftkern.integrations.fingerprint import Fingerprint as Fingerprint
    from peftkern.integrations.fingerprint import WrongBaseError as WrongBaseError
    from peftkern.sparse.dsee import DSEE as DSEE
    from peftkern.sparse.layers import attach as attach
    from peftkern.sparse.layers import deltas as deltas
    from peftkern.sparse.layers import detach as detach
    from peftkern.sparse.layers import disabled as disabled
    from peftkern.sparse.layers import linear_layers as linear_layers
    from peftkern.sparse.layers import set_active as set_active
    from peftkern.sparse.lottery_ticket import LotteryTicket as LotteryTicket
    from peftkern.sparse.merging import merge as merge
    from peftkern.sparse.merging import unmerge as unmerge
    from peftkern.sparse.rosa import RoSA as RoSA
    from peftkern.sparse.skill_grafting import SkillGrafting as SkillGrafting
    from peftkern.sparse.spiel import SpIEL as SpIEL
    from peftkern.sparse.update import SparseUpdate as SparseUpdate

_LAZY = {
    "DSEE": "peftkern.sparse.dsee",
    "Fingerprint": "peftkern.integrations.fingerprint",
    "SkillGrafting": "peftkern.sparse.skill_grafting",
    "LotteryTicket": "peftkern.sparse.lottery_ticket",
    "SpIEL": "peftkern.sparse.spiel",
    "RoSA": "peftkern.sparse.rosa",
    "SparseUpdate": "peftkern.sparse.update",
    "WrongBaseError": "peftkern.integrations.fingerprint",
    "attach": "peftkern.sparse.layers",
    "deltas": "peftkern.sparse.layers",
    "detach": "peftkern.sparse.layers",
    "disabled": "peftkern.sparse.layers",
    "linear_layers": "peftkern.sparse.layers",
    "merge": "peftkern.sparse.merging",
    "set_active": "peftkern.sparse.layers",
    "unmerge": "peftkern.sparse.merging",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'peftkern.sparse' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


__all__ = sorted(_LAZY)
