"""Pairs of a function and the first line of its docstring, from the Python standard library on this machine."""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import platform
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftkern.finetune.cache import cached
from peftkern.finetune.errors import InputError

INSTRUCTION = "Write the first line of the docstring of this Python function."
HELD_OUT_SHARE = 0.2  # of the modules
TRAIN_FILE, HELD_OUT_FILE = "train.jsonl", "held_out.jsonl"

_DATA_VERSION = 1
_SHORTEST_LINE, _LONGEST_LINE = 20, 90  # characters: below is no description, above is no one-liner
_LONGEST_SOURCE = 400  # so that a training step is a matter of seconds on two cores
_LEFT_OUT = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Pair:
    """A function's source without its docstring, and that docstring's first line."""

    module: str
    source: str
    summary: str


def docstring_data(train: int, held_out: int) -> Path:
    """A folder with ``train.jsonl`` and ``held_out.jsonl``: chats that ask for a docstring line. Cached.

    Args:
        train, held_out: how many, or all where there are fewer.

    Raises:
        InputError: Python's standard library is not on this machine as source.
    """
    library = standard_library()
    key = hashlib.sha256(f"{_DATA_VERSION} {library} {train} {held_out}".encode()).hexdigest()[:8]
    name = f"docstrings-python-{platform.python_version()}-{key}"
    return cached(name, lambda target: _write_data(library, target, train, held_out))


def _write_data(library: Path, target: Path, train: int, held_out: int) -> None:
    to_learn, to_hold_out = split_by_module(collect_pairs(library), HELD_OUT_SHARE)
    if not to_learn or not to_hold_out:
        raise InputError(
            f"there are no functions with docstrings in {library}; the demo learns from Python's own source"
        )
    _write_chats(target / TRAIN_FILE, choose_varied(to_learn, train))
    _write_chats(target / HELD_OUT_FILE, choose_varied(to_hold_out, held_out))


def _write_chats(path: Path, pairs: Sequence[Pair]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for pair in pairs:
            file.write(json.dumps({"messages": _chat(pair), "module": pair.module}) + "\n")


def _chat(pair: Pair) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": pair.source},
        {"role": "assistant", "content": pair.summary},
    ]


def standard_library() -> Path:
    """The folder of the standard library's Python sources."""
    return Path(sysconfig.get_path("stdlib"))


def collect_pairs(folder: Path) -> list[Pair]:
    """All pairs in the Python files below ``folder``, in a fixed order, each function and each line once."""
    pairs: list[Pair] = []
    seen: set[str] = set()
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if _LEFT_OUT.intersection(parts):
            continue
        for pair in _pairs_of_file(path, ".".join(parts)):
            if pair.source not in seen and pair.summary not in seen:
                seen |= {pair.source, pair.summary}
                pairs.append(pair)
    return pairs


def split_by_module(pairs: list[Pair], held_out_share: float) -> tuple[list[Pair], list[Pair]]:
    """Pairs to learn from, and pairs of modules that are held out whole: always the same ones, by their names' hash.

    The files of one package count as one module, because they share names and style.
    """
    train = [pair for pair in pairs if _position(pair) >= held_out_share]
    held_out = [pair for pair in pairs if _position(pair) < held_out_share]
    return train, held_out


def choose_varied(pairs: list[Pair], count: int) -> list[Pair]:
    """``count`` of the pairs (all, if there are fewer): one of each top-level module, then a second one of each, ..."""
    by_module: defaultdict[str, list[Pair]] = defaultdict(list)
    for pair in sorted(pairs, key=lambda pair: _digest(pair.source)):
        by_module[_top_level(pair)].append(pair)
    rounds = itertools.zip_longest(*(by_module[module] for module in sorted(by_module)))
    return [pair for one_round in rounds for pair in one_round if pair is not None][:count]


def _top_level(pair: Pair) -> str:
    return pair.module.split(".")[0]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _position(pair: Pair) -> float:
    """A number in [0, 1) that depends on the top-level module alone."""
    return int.from_bytes(_digest(_top_level(pair))[:6], "big") / 2**48


def _pairs_of_file(path: Path, module: str) -> Iterator[Pair]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return  # the standard library holds a few files that are no valid UTF-8 or Python, on purpose
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            pair = _pair_of_function(node, module)
            if pair is not None:
                yield pair


def _pair_of_function(node: ast.FunctionDef | ast.AsyncFunctionDef, module: str) -> Pair | None:
    docstring = ast.get_docstring(node)
    if not docstring or all(_does_nothing(statement) for statement in node.body):
        return None
    summary, *more = (line.strip() for line in docstring.strip().splitlines())
    if more and more[0]:
        return None  # the first line is no sentence of its own
    if not _SHORTEST_LINE <= len(summary) <= _LONGEST_LINE or not summary[0].isalpha():
        return None
    node.body = node.body[1:]
    source = ast.unparse(node)
    return Pair(module, source, summary) if len(source) <= _LONGEST_SOURCE else None


def _does_nothing(statement: ast.stmt) -> bool:
    """Whether it is ``pass``, ``...`` or a docstring."""
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )
