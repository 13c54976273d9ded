"""What a method has to remember between a checkpoint and the run that goes on from it.

It travels in the state of the optimizer, as an item of the first parameter group: whoever saves and loads the
optimizer, as transformers' Trainer does with ``optimizer.pt``, saves and loads the method with it. It holds numbers,
words and tensors only, so that ``torch.load(..., weights_only=True)`` takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

KEY = "peftkern_method"


class Saving:
    """Lets every ``optimizer.state_dict()`` hold what ``read`` returns then, until `close`.

    Loading a state into the optimizer meanwhile is an error: the method would not see its part of it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, method: str, read: Callable[[], dict[str, Any]]) -> None:
        def add(_optimizer: Any, state_dict: dict[str, Any]) -> None:
            if state_dict["param_groups"]:
                state_dict["param_groups"][0][KEY] = {"method": method, **read()}

        def refuse(_optimizer: Any) -> None:
            raise RuntimeError(
                f"{method}: has started; load the state of the optimizer before method.start(optimizer), which goes "
                "on from it"
            )

        self._handles = (
            optimizer.register_state_dict_post_hook(add),
            optimizer.register_load_state_dict_post_hook(refuse),
        )

    def close(self) -> None:
        """End it."""
        for handle in self._handles:
            handle.remove()


def take_from(optimizer: torch.optim.Optimizer, method: str) -> dict[str, Any] | None:
    """What was saved with the state that ``optimizer`` has loaded; ``None`` where it has loaded none.

    It is there once: the optimizer does not keep it.

    Raises:
        ValueError: it is the state of another method.
    """
    for group in optimizer.param_groups:
        state: dict[str, Any] | None = group.pop(KEY, None)
        if state is not None:
            if state["method"] != method:
                raise ValueError(f"{method}: the checkpoint is of {state['method']}; go on with that, or start anew")
            return state
    return None
