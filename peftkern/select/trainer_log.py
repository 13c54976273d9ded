"""Numbers of a callback in the Trainer's logs: the console, ``log_history``, and every service in ``report_to``.

The Trainer calls its callbacks in order, and those of ``report_to`` come before any that the user gives. What these
add to a log is therefore too late for TensorBoard. `TrainerLog` stands in front of all while training lasts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler


class TrainerLog(TrainerCallback):  # type: ignore[misc]
    """Adds to every log of a training loss what ``read`` returns then.

    Args:
        read: names and numbers.
    """

    def __init__(self, read: Callable[[], Mapping[str, float]]) -> None:
        self._read = read
        self._handler: Any = None

    def enter(self) -> None:
        """Go to the front of the callbacks of the Trainer that is calling now, until `leave`.

        Raises:
            RuntimeError: no Trainer is calling.
        """
        self.leave()
        self._handler = _calling_handler()
        # a new list: the handler is going through the old one
        self._handler.callbacks = [self, *self._handler.callbacks]

    def leave(self) -> None:
        """The Trainer's callbacks are those that it had before."""
        if self._handler is not None:
            self._handler.callbacks = [callback for callback in self._handler.callbacks if callback is not self]
        self._handler = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            numbers = self._read()
            logs |= numbers
            state.log_history[-1] |= numbers  # the Trainer has put a copy of the log there


def _calling_handler() -> Any:
    """The Trainer's list of callbacks, which calls the one that calls this. Callbacks are not given it."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back
    raise RuntimeError("TrainerLog.enter: must be called from an event of a callback that a Trainer calls")
