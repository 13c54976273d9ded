"""Change what an optimizer trains, while it runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def hand_over(optimizer: torch.optim.Optimizer, trained: Iterable[nn.Parameter]) -> None:
    """Let ``optimizer`` train exactly ``trained``.

    Parameters that stay keep their group and their state; those that go lose their gradient and their state, so that
    no momentum is left when they come back; those that come join the first group and start without state.

    Raises:
        ValueError: ``trained`` is empty.
    """
    wanted = {id(parameter): parameter for parameter in trained}
    if not wanted:
        raise ValueError("hand_over: trained must hold at least one parameter")
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if _stays(optimizer, p, wanted)]
    present = {id(p) for group in optimizer.param_groups for p in group["params"]}
    optimizer.param_groups[0]["params"] += [p for key, p in wanted.items() if key not in present]


def _stays(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, wanted: dict[int, Any]) -> bool:
    if id(parameter) in wanted:
        return True
    drop_state(optimizer, [parameter])
    return False


def drop_state(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Forget the gradient and the state of ``parameters``, which stay in their group.

    An optimizer passes over a parameter without gradient, and what was forgotten does not move it when it comes back.
    """
    for parameter in parameters:
        parameter.grad = None
        optimizer.state.pop(parameter, None)
