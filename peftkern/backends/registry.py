"""One table that decides which backend runs an operation.

Every implementation registers itself with a predicate that says why it can *not* take a call; the first entry, in
the order of :data:`PREFERENCE`, whose predicate has no objection runs. Nothing above this file names a backend.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

logger = logging.getLogger("peftkern")

PREFERENCE = ("cuda", "triton", "cpu", "reference")
"""Backends from the most to the least preferred. The reference takes everything."""


class NotMeant(str):
    """The objection of a backend that is not made for such calls: no reason to speak of a fallback."""


class NotPreferred(NotMeant):
    """The objection of a backend that can run the call, though another does it better: none where it is forced."""


ELSEWHERE = NotMeant("the tensors are on another device")

_MODULES = (
    "peftkern.backends.cpu",
    "peftkern.backends.cpu_sparse_delta",
    "peftkern.backends.cpu_norm",
    "peftkern.backends.cpu_rotary",
    "peftkern.backends.cpu_attention",
    "peftkern.backends.cpu_optimizer",
    "peftkern.backends.cpu_select",
    "peftkern.backends.chunked_loss",
    "peftkern.backends.cuda",
    "peftkern.backends.triton.register",
)

ENVIRONMENT_VARIABLE = "PEFTKERN_BACKEND"

Supports = Callable[..., "str | None"]
Function = TypeVar("Function", bound=Callable[..., Any])


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run the call."""


@dataclass(frozen=True)
class Implementation:
    """How one backend runs one operation.

    ``supports`` takes the operation's arguments and returns ``None``, or the reason why it cannot run them: a
    :class:`NotMeant` where another backend is made for them, such as :data:`ELSEWHERE`. ``form`` takes them as well,
    and names the way that the backend would run them; ``None`` where there is one way only.
    """

    operation: str
    backend: str
    function: Callable[..., Any]
    supports: Supports
    form: Callable[..., str] | None = None


@dataclass(frozen=True)
class Choice:
    """Which backend takes a call, and why: the reasons of those that were passed over, or who forced it."""

    backend: str
    reason: str
    function: Callable[..., Any]


_TABLE: dict[str, dict[str, Implementation]] = {}
_arguments_needed: dict[str, int] = {}
"""How many arguments of each operation the predicates look at."""
_reported: set[tuple[str, str]] = set()
_releases: list[Callable[[], None]] = []


def _supports_everything(*_args: Any, **_kwargs: Any) -> str | None:
    return None


def register(
    operation: str,
    backend: str,
    *,
    supports: Supports = _supports_everything,
    form: Callable[..., str] | None = None,
) -> Callable[[Function], Function]:
    """Decorator that enters a function in the table as ``backend``'s way to run ``operation``.

    Raises:
        ValueError: ``backend`` is unknown, or has registered this operation before.
    """
    if backend not in PREFERENCE:
        raise ValueError(f"register: backend must be one of {PREFERENCE}, got {backend!r}")

    def enter(function: Function) -> Function:
        entries = _TABLE.setdefault(operation, {})
        if backend in entries:
            raise ValueError(f"register: {operation!r} already has an implementation for backend {backend!r}")
        entries[backend] = Implementation(operation, backend, function, supports, form)
        needed = _required_parameters(supports)
        _arguments_needed[operation] = max(needed, _arguments_needed.get(operation, 0))
        return function

    return enter


def _required_parameters(function: Callable[..., Any]) -> int:
    parameters = inspect.signature(function).parameters.values()
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in named and p.default is inspect.Parameter.empty for p in parameters)


@cache
def _load_backends() -> None:
    for module in _MODULES:
        importlib.import_module(module)


def forced_backend() -> str | None:
    """The backend named by ``PEFTKERN_BACKEND``, or ``None``.

    Raises:
        BackendError: the variable names no backend.
    """
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    if not name:
        return None
    if name not in PREFERENCE:
        raise BackendError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(PREFERENCE)}; got {name!r}")
    return name


def _too_few_arguments(operation: str, entries: dict[str, Implementation], got: int) -> TypeError:
    names = list(inspect.signature(entries["reference"].function).parameters)
    needed = ", ".join(names[: _arguments_needed[operation]])
    return TypeError(
        f"{operation} takes ({', '.join(names)}), and its backend depends on {needed}; got {got} "
        f"argument{'' if got == 1 else 's'}"
    )


def operations() -> list[str]:
    """Names of all registered operations."""
    _load_backends()
    return sorted(_TABLE)


def choose(operation: str, *args: Any, backend: str | None = None, **kwargs: Any) -> Choice:
    """The backend that would run ``operation`` on these arguments.

    Args:
        operation: a registered name, for example ``"lora_linear"``.
        backend: take this one, or raise. ``None`` lets ``PEFTKERN_BACKEND`` decide, and without it the table.

    Raises:
        ValueError: no such operation.
        TypeError: too few arguments to decide.
        BackendError: ``backend`` is no backend's name, or a forced backend cannot run the call.
    """
    _load_backends()
    if operation not in _TABLE:
        raise ValueError(f"operation must be one of {sorted(_TABLE)}, got {operation!r}")
    entries = _TABLE[operation]
    if len(args) + len(kwargs) < _arguments_needed[operation]:
        raise _too_few_arguments(operation, entries, len(args) + len(kwargs))
    forced = forced_backend() if backend is None else backend
    if forced is not None:
        return _choose_forced(operation, entries, forced, args, kwargs)
    objections: list[str] = []
    for name in PREFERENCE:
        if name not in entries:
            continue
        objection = entries[name].supports(*args, **kwargs)
        if objection is None:
            return Choice(name, "; ".join(objections) or "first choice", entries[name].function)
        if not isinstance(objection, NotMeant):
            objections.append(f"{name}: {objection}")
    raise BackendError(f"{operation}: no backend takes this call ({'; '.join(objections)})")


def _choose_forced(
    operation: str, entries: dict[str, Implementation], forced: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Choice:
    if forced not in PREFERENCE:
        raise BackendError(f"{operation}: backend must be one of {', '.join(PREFERENCE)}; got {forced!r}")
    if forced not in entries:
        raise BackendError(f"{operation}: backend {forced!r} has no implementation; there are {sorted(entries)}")
    objection = entries[forced].supports(*args, **kwargs)
    if objection is not None and not isinstance(objection, NotPreferred):
        raise BackendError(f"{operation}: backend {forced!r} was forced and cannot run this call: {objection}")
    return Choice(forced, "forced", entries[forced].function)


def describe(operation: str, *args: Any, backend: str | None = None) -> str:
    """The backend that :func:`choose` picks, and in brackets its form if it has several."""
    chosen = choose(operation, *args, backend=backend).backend
    form = _TABLE[operation][chosen].form
    return chosen if form is None else f"{chosen} ({form(*args)})"


def run(operation: str, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
    """Run ``operation`` on the backend that :func:`choose` picks; a fallback is logged once per reason."""
    if _stand_in is not None:
        return _stand_in(operation, *args, **kwargs)
    choice = choose(operation, *args, backend=backend, **kwargs)
    if choice.reason not in ("forced", "first choice"):
        _report_fallback(operation, choice)
    return choice.function(*args, **kwargs)


_stand_in: Callable[..., Any] | None = None


@contextmanager
def standing_in(function: Callable[..., Any]) -> Iterator[None]:
    """Inside, ``function(operation, *args, **kwargs)`` runs every operation in place of the backends."""
    global _stand_in
    before, _stand_in = _stand_in, function
    try:
        yield
    finally:
        _stand_in = before


def reference(operation: str) -> Callable[..., Any]:
    """The function that says in plain PyTorch what ``operation`` computes."""
    _load_backends()
    return _TABLE[operation]["reference"].function


def _report_fallback(operation: str, choice: Choice) -> None:
    key = (operation, choice.reason)
    if key in _reported:
        return
    _reported.add(key)
    logger.warning("%s runs on the %s backend (%s)", operation, choice.backend, choice.reason)


def at_release(function: Callable[[], None]) -> Callable[[], None]:
    """Decorator: ``function`` frees memory that a backend keeps from call to call."""
    _releases.append(function)
    return function


def release() -> None:
    """Free what backends keep from call to call. They take it anew when they need it."""
    for function in _releases:
        function()
