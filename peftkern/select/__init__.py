"""What is trained: methods that choose among the tensors, rows or entries of a model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftkern.select.cofitune import CoFiTune as CoFiTune
    from peftkern.select.cofitune_search import cofitune_search as cofitune_search
    from peftkern.select.cost_graph import CostGraph as CostGraph
    from peftkern.select.cost_graph import Segment as Segment
    from peftkern.select.cost_graph import TensorCost as TensorCost
    from peftkern.select.execution import Execution as Execution
    from peftkern.select.freeze_as_guard import FreezeAsGuard as FreezeAsGuard
    from peftkern.select.freeze_as_guard import FreezeGuard as FreezeGuard
    from peftkern.select.freeze_as_guard import apply_guard as apply_guard
    from peftkern.select.green_trainer import GreenTrainer as GreenTrainer
    from peftkern.select.half_fine_tuning import HalfFineTuning as HalfFineTuning
    from peftkern.select.half_fine_tuning import half_reset as half_reset
    from peftkern.select.ladder import LadderClassifier as LadderClassifier
    from peftkern.select.layer_decay import layer_decay_groups as layer_decay_groups
    from peftkern.select.layer_decay import reinit_top as reinit_top
    from peftkern.select.lisa import LISA as LISA
    from peftkern.select.method import Method as Method
    from peftkern.select.policy import Policy as Policy
    from peftkern.select.presets import FreezeLower as FreezeLower
    from peftkern.select.presets import LayerRange as LayerRange
    from peftkern.select.presets import Preset as Preset
    from peftkern.select.random_selection import RandomSelection as RandomSelection
    from peftkern.select.savings import PowerMeter as PowerMeter
    from peftkern.select.savings import Savings as Savings
    from peftkern.select.savings import compute_savings as compute_savings
    from peftkern.select.selection import Selection as Selection
    from peftkern.select.solver import BudgetError as BudgetError
    from peftkern.select.solver import Solution as Solution
    from peftkern.select.solver import solve as solve
    from peftkern.select.unit_importance import UnitImportance as UnitImportance
    from peftkern.select.unit_importance import measure_importance as measure_importance
    from peftkern.select.view import SelectionView as SelectionView
    from peftkern.select.view import view_history as view_history

_LAZY = {
    "BudgetError": "peftkern.select.solver",
    "CoFiTune": "peftkern.select.cofitune",
    "CostGraph": "peftkern.select.cost_graph",
    "Execution": "peftkern.select.execution",
    "FreezeAsGuard": "peftkern.select.freeze_as_guard",
    "FreezeGuard": "peftkern.select.freeze_as_guard",
    "FreezeLower": "peftkern.select.presets",
    "GreenTrainer": "peftkern.select.green_trainer",
    "HalfFineTuning": "peftkern.select.half_fine_tuning",
    "LISA": "peftkern.select.lisa",
    "LayerRange": "peftkern.select.presets",
    "LadderClassifier": "peftkern.select.ladder",
    "Method": "peftkern.select.method",
    "Policy": "peftkern.select.policy",
    "PowerMeter": "peftkern.select.savings",
    "Preset": "peftkern.select.presets",
    "RandomSelection": "peftkern.select.random_selection",
    "Savings": "peftkern.select.savings",
    "Segment": "peftkern.select.cost_graph",
    "Selection": "peftkern.select.selection",
    "SelectionView": "peftkern.select.view",
    "Solution": "peftkern.select.solver",
    "TensorCost": "peftkern.select.cost_graph",
    "UnitImportance": "peftkern.select.unit_importance",
    "apply_guard": "peftkern.select.freeze_as_guard",
    "cofitune_search": "peftkern.select.cofitune_search",
    "compute_savings": "peftkern.select.savings",
    "half_reset": "peftkern.select.half_fine_tuning",
    "layer_decay_groups": "peftkern.select.layer_decay",
    "measure_importance": "peftkern.select.unit_importance",
    "reinit_top": "peftkern.select.layer_decay",
    "solve": "peftkern.select.solver",
    "view_history": "peftkern.select.view",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'peftkern.select' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


__all__ = sorted(_LAZY)
