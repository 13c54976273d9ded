"""A backend with a form for groups, which no CPU backend has: the references, entered under the name of the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from peftkern import ops
from peftkern.backends import registry

GROUP_OPERATIONS = {"lora_linear_group": 1, "lora_linear_group_backward": 2}
"""Name, and the position of the members among the arguments."""


def enter(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Enter it for one test. Returns the list of its calls, operation and number of members, which grows."""
    assert ops.lora_linear_group is not None
    monkeypatch.delenv(registry.ENVIRONMENT_VARIABLE, raising=False)
    registry.operations()
    calls: list[tuple[str, int]] = []
    for operation, position in GROUP_OPERATIONS.items():
        entries = registry._TABLE[operation]
        function = _noted(operation, position, entries["reference"].function, calls)
        entry = registry.Implementation(operation, "cpu", function, registry._supports_everything)
        monkeypatch.setitem(entries, "cpu", entry)
    return calls


def _noted(
    operation: str, position: int, function: Callable[..., Any], calls: list[tuple[str, int]]
) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        calls.append((operation, len(args[position])))
        return function(*args)

    return run
