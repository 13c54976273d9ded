"""How much memory and time training will take, before anything is loaded."""

from peftkern.plan.errors import PlanError as PlanError
from peftkern.plan.planning import plan as plan
from peftkern.plan.result import Plan as Plan

__all__ = ["Plan", "PlanError", "plan"]
