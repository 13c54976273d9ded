"""What runs a product, in words: one backend, several, and their forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from peftkern.backends import by_tokens, registry
from peftkern.backends.registry import NotMeant

FORMS: dict[str, Callable[[int], str]] = {
    "triton": lambda tokens: "few" if tokens <= 64 else "staged",
}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> str:
    """An operation on a number of tokens that one backend runs up to 16, and another one in two forms."""
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
    monkeypatch.setattr(registry, "_arguments_needed", dict(registry._arguments_needed))
    supports: dict[str, Callable[..., Any]] = {
        "cuda": lambda tokens: None if tokens <= 16 else NotMeant("many tokens"),
        "triton": lambda tokens: None,
    }
    for backend, support in supports.items():
        registry.register("count", backend, supports=support, form=FORMS.get(backend))(lambda tokens: tokens)
    return "count"


def test_backends_and_forms_by_tokens(few: str) -> None:
    assert by_tokens.describe(few, lambda tokens: (tokens,)) == "cuda to 16 tokens, triton (few) to 64, triton (staged)"


def test_a_forced_backend_is_all_there_is(few: str) -> None:
    described = by_tokens.describe(few, lambda tokens: (tokens,), "triton")
    assert described == "triton (few) to 64 tokens, triton (staged)"


def test_one_way_for_any_number_of_tokens(few: str) -> None:
    assert by_tokens.describe(few, lambda _tokens: (3,)) == "cuda"


def test_a_forced_backend_may_take_some_of_it_alone(few: str) -> None:
    assert by_tokens.describe(few, lambda tokens: (tokens,), "cuda") == "cuda to 16 tokens, nothing"


def test_a_forced_backend_that_takes_none_of_it_raises(few: str) -> None:
    with pytest.raises(registry.BackendError, match="many tokens"):
        by_tokens.describe(few, lambda tokens: (tokens + 16,), "cuda")


def test_a_form_is_named_behind_the_backend(few: str) -> None:
    assert registry.describe(few, 100) == "triton (staged)"
    assert registry.describe(few, 1) == "cuda"
