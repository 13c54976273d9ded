"""What fits into a budget: the largest batch x length, or the cheapest options."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

from peftkern.patch.layer_plan import in_words
from peftkern.plan.errors import PlanError
from peftkern.plan.options import Options

if TYPE_CHECKING:
    from peftkern.plan.predict import Predictor

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_BINARY = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

_LENGTH_STEP = 64
_LARGEST_BATCH = 4096


def parse_bytes(text: str | float) -> float:
    """Bytes from a number, or text such as ``"12GB"``, ``"11.5 GiB"``.

    Raises:
        PlanError: it is neither, or not above 0.
    """
    if isinstance(text, str):
        found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([KMGT]?)(I?)B?\s*", text.upper())
        if found is None:
            raise PlanError(f"budget must be bytes, or text such as '12GB' or '11.5GiB'; got {text!r}")
        number, unit, binary = found.groups()
        value = float(number) * (_BINARY if binary else _UNITS)[unit]
    else:
        value = float(text)
    if not 0 < value < float("inf"):
        raise PlanError(f"budget must be above 0, got {text!r}")
    return value


def fit(predictor: Predictor, options: Options, budget: float, free_batch: bool, free_length: bool) -> Options:
    """The options that `peftkern.plan` finds for a budget.

    Raises:
        PlanError: nothing fits; the message has the smallest figure that does.
    """
    if not free_batch and not free_length:
        return _cheapest(predictor, options, budget)
    if free_length:
        options = _longest(predictor, options, budget)
        if not free_batch or options.length < predictor.longest:
            return options
    return _largest(predictor, options, budget)


# ---- batch x length


def _longest(predictor: Predictor, options: Options, budget: float) -> Options:
    step = min(_LENGTH_STEP, predictor.longest)
    most = predictor.longest // step
    count = _search(lambda n: predictor.total(replace(options, length=n * step)), budget, most)
    if count == 0:
        raise _refusal(predictor, replace(options, length=step), budget)
    return replace(options, length=predictor.longest if count == most else count * step)


def _largest(predictor: Predictor, options: Options, budget: float) -> Options:
    count = _search(lambda n: predictor.total(replace(options, batch=n)), budget, _LARGEST_BATCH)
    if count == 0:
        raise _refusal(predictor, replace(options, batch=1), budget)
    return replace(options, batch=count)


def _search(total: Callable[[int], float], budget: float, most: int) -> int:
    """The largest number up to ``most`` whose ``total`` is within the budget; 0: none. ``total`` grows."""
    low, high = 0, most + 1  # the last that is known to fit, the first that is known not to
    guess = 1
    low_total = 0.0
    while low + 1 < high:
        value = total(guess)
        if value > budget:
            high = guess
        else:
            # memory grows nearly linearly: the next guess is where the line through two points meets the budget
            slope = (value - low_total) / (guess - low) if low else 0.0
            low, low_total = guess, value
            if slope > 0:
                guess = low + max(1, int((budget - value) / slope))
                guess = min(guess, high - 1)
                continue
        guess = min(2 * low, high - 1) if high == most + 1 and low else (low + high) // 2
        guess = max(guess, low + 1)
    return low


# ---- options


_SAVINGS: tuple[tuple[str, Any, int], ...] = (
    ("logits", False, 0),
    ("optimizer", "AdamW8bit", 1),
    ("quantization", "nf4", 2),
)
"""An option, the value of it that takes less memory, and its rank in what that costs in time: each more than all before
it together, and next to nothing beside what making layers again costs."""


def _cheapest(predictor: Predictor, options: Options, budget: float) -> Options:
    for variant in _variants(options):
        if predictor.total(variant) <= budget:
            return variant
    leanest = variant
    layers = predictor.layers(leanest) if _may_be_planned(options) else None
    if layers is not None:
        words = layers.cheapest(predictor.room(leanest, budget))
        saving = None if words is None else replace(leanest, recompute=_in_short(words))
    else:
        saving = _checkpointed(leanest)
    if saving is not None and predictor.total(saving) <= budget:
        return saving
    raise _refusal(predictor, options, budget)


def _may_be_planned(options: Options) -> bool:
    """Whether a search may give words to layers: what was asked for stays."""
    return options.recompute is None and not options.gradient_checkpointing


def _in_short(words: tuple[str, ...]) -> str | tuple[str, ...] | None:
    if set(words) == {"store"}:
        return None
    return words[0] if set(words) in ({"mlp"}, {"up"}) else words


def _checkpointed(options: Options) -> Options | None:
    """Of models whose layers cannot have words, or where others were asked for."""
    if options.method is None or isinstance(options.recompute, tuple) or options.gradient_checkpointing:
        return None
    return replace(options, gradient_checkpointing=True)


def _variants(options: Options) -> Iterator[Options]:
    """The options, and all that save memory, from what costs the least time to what costs the most."""
    possible = [saving for saving in _SAVINGS if _is_possible(options, *saving[:2])]
    chosen = [
        [saving for saving, on in zip(possible, flags, strict=True) if on]
        for flags in product((False, True), repeat=len(possible))
    ]
    for savings in sorted(chosen, key=lambda savings: sum(cost for _, _, cost in savings)):
        yield replace(options, **{name: value for name, value, _ in savings})


def _is_possible(options: Options, name: str, value: Any) -> bool:
    if getattr(options, name) == value or options.method is None:
        return False
    if name == "logits":
        return options.patched
    if name == "optimizer":
        return options.optimizer == "AdamW"
    if name == "quantization":
        return options.method != "full" and options.quantization in ("none", "int8")
    return True


def _refusal(predictor: Predictor, options: Options, budget: float) -> PlanError:
    variants = list(_variants(options))
    layers = predictor.layers(variants[-1]) if _may_be_planned(options) else None
    others = [_checkpointed(variants[-1]) if layers is None else replace(variants[-1], recompute=layers.smallest())]
    variant = min([*variants, *filter(None, others)], key=predictor.total)
    needed = predictor.total(variant)
    names = (*(name for name, *_ in _SAVINGS), "recompute", "gradient_checkpointing")
    changed = [_setting(variant, name) for name in names if getattr(variant, name) != getattr(options, name)]
    with_ = f" with {', '.join(changed)}" if changed else ""
    tokens = f"{variant.batch} x {variant.length} tokens"
    return PlanError(
        f"budget: nothing fits into {budget / 1e9:.3g} GB; the smallest for {tokens} is {needed / 1e9:.4g} GB{with_}"
    )


def _setting(options: Options, name: str) -> str:
    value = getattr(options, name)
    return in_words(value) if isinstance(value, tuple) else f"{name}={value!r}"
