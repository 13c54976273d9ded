"""Pairs of function and docstring line."""

from __future__ import annotations

import ast
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from peftkern.finetune.docstrings import Pair, choose_varied, collect_pairs, split_by_module

SOURCE = '''
def add(a, b):
    """Return the sum of two numbers.

    More is said here.
    """
    # a comment
    return a + b

class Thing:
    @property
    async def name(self):
        """Wait for the name of the thing."""
        return await self._name

    def close(self):
        """Close the file below the thing."""
        self._file.close()

def no_docstring(): return 1
def nothing_but_a_docstring():
    """There is nothing here to be described."""
def empty():
    """There is nothing here to be described either."""
    pass
def too_short():
    """Short."""
    return 1
def goes_on():
    """The first line of this docstring is not a
    sentence of its own."""
    return 1
def starts_oddly():
    """>>> starts_oddly() is an example"""
    return 1
'''


def test_what_is_collected(tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "pack" / "one.py").write_text(SOURCE)
    (tmp_path / "two.py").write_text(SOURCE)  # the same again
    (tmp_path / "test" / "three.py").write_text(SOURCE.replace("sum", "total"))
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "latin.py").write_bytes(b"x = '\xe4'")
    pairs = collect_pairs(tmp_path)
    assert [(pair.module, pair.summary) for pair in pairs] == [
        ("pack.one", "Return the sum of two numbers."),
        ("pack.one", "Wait for the name of the thing."),
        ("pack.one", "Close the file below the thing."),
    ]
    assert pairs[0].source == "def add(a, b):\n    return a + b"
    assert pairs[1].source.startswith("@property\nasync def name(self):")
    for pair in pairs:
        assert pair.summary not in pair.source
        ast.parse(pair.source)


names = st.text("abc", min_size=1, max_size=3)
some_pairs = st.lists(st.tuples(names, st.sampled_from(["x", "y"])), max_size=30).map(
    lambda modules: [Pair(f"{one}.{two}", f"source {n}", f"summary {n}") for n, (one, two) in enumerate(modules)]
)


@given(some_pairs, st.floats(0, 1))
def test_no_module_is_on_both_sides(pairs: list[Pair], share: float) -> None:
    train, held_out = split_by_module(pairs, share)
    assert sorted(pair.source for pair in train + held_out) == sorted(pair.source for pair in pairs)
    assert not {pair.module.split(".")[0] for pair in train} & {pair.module.split(".")[0] for pair in held_out}


@given(some_pairs, st.integers(0, 40))
def test_choice_is_fixed_and_spread_over_modules(pairs: list[Pair], count: int) -> None:
    chosen = choose_varied(pairs, count)
    assert choose_varied(pairs[::-1], count) == chosen
    assert len(chosen) == len(set(chosen)) == min(count, len(pairs))
    modules = {pair.module.split(".")[0] for pair in pairs}
    assert len({pair.module.split(".")[0] for pair in chosen}) == min(count, len(modules))
