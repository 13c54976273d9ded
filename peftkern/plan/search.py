"""What fits into a budget: the largest batch x length, or the cheapest options."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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


def fit(
    predictor: Predictor,
    options: Options,
    budget: float,
    free_batch: bool,
    free_length: bool,
    freedom: Freedom | None = None,
) -> Options:
    """The options that `peftkern.plan` finds for a budget.

    Raises:
        PlanError: nothing fits; the message has the smallest figure that does.
    """
    if not free_batch and not free_length:
        return _cheapest(predictor, options, budget, freedom or Freedom())
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
        raise _too_large(predictor, replace(options, length=step), budget)
    return replace(options, length=predictor.longest if count == most else count * step)


def _largest(predictor: Predictor, options: Options, budget: float) -> Options:
    count = _search(lambda n: predictor.total(replace(options, batch=n)), budget, _LARGEST_BATCH)
    if count == 0:
        raise _too_large(predictor, replace(options, batch=1), budget)
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


def _too_large(predictor: Predictor, options: Options, budget: float) -> PlanError:
    freedom = Freedom()
    return _refusal(predictor, options, budget, freedom, _formats(predictor, options, freedom))


# ---- options


_SAVINGS: Mapping[str, Any] = {"logits": False, "optimizer": "AdamW8bit", "embeddings": "int8", "head": "int8"}
"""Options, and the value of each that takes less memory. In the order of what that costs in time: each more than all
before it together, a narrower format of the weights more than all of them, and next to nothing beside what smaller
passes and making layers again cost."""

_MADE_AGAIN = ("recompute", "gradient_checkpointing")
SEARCHED = (*_SAVINGS, "quantization", *_MADE_AGAIN)
"""What a search may change."""

_ENDS = ("embeddings", "head")
_SAME_TIME = 0.02
"""Of two formats whose steps differ by less than this share, the one that rounds less is taken."""


@dataclass(frozen=True)
class Freedom:
    """What a search may change where batch and length are given.

    Attributes:
        keep: names of options that stay.
        any_format: whether the format of the weights is free, whatever the options say.
        split_batch: whether a batch may be divided into several passes.
    """

    keep: frozenset[str] = frozenset()
    any_format: bool = False
    split_batch: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(self.keep - set(SEARCHED))
        if unknown:
            raise PlanError(f"keep: a search changes {', '.join(SEARCHED)}; got {unknown[0]!r}")


def _cheapest(predictor: Predictor, options: Options, budget: float, freedom: Freedom) -> Options:
    formats = _formats(predictor, options, freedom)
    best: Options | None = None
    for divided in _splits(options, freedom):
        saving = _with_savings(predictor, divided, formats, budget, freedom)
        made_again = saving is None
        if saving is None:
            saving = _with_layers_made_again(predictor, divided, formats, budget, freedom)
        if saving is not None and (best is None or predictor.seconds(saving) < predictor.seconds(best)):
            best = saving
        if not made_again:  # what fits as it is takes more time in smaller passes
            break
    if best is None:
        raise _refusal(predictor, options, budget, freedom, formats)
    return best


def _splits(options: Options, freedom: Freedom) -> Iterator[Options]:
    """The options with the batch in one pass, then in more and more of fewer rows."""
    yield options
    if freedom.split_batch:
        for rows in range(options.batch - 1, 0, -1):
            if options.batch % rows == 0:
                passes = options.gradient_accumulation * options.batch // rows
                yield replace(options, batch=rows, gradient_accumulation=passes)


def _formats(predictor: Predictor, options: Options, freedom: Freedom) -> list[str]:
    """Of the weights, from the one of least time to the one of least memory."""
    given = options.quantization
    if options.method in ("full", None) or "quantization" in freedom.keep:
        return [given]
    if not freedom.any_format:
        return [given, "nf4"] if given in ("none", "int8") else [given]
    possible = ["int8", "nf4"] if options.embeddings or options.head else ["none", "int8", "nf4"]
    seconds = {format: predictor.seconds(replace(options, quantization=format)) for format in possible}
    return [
        format
        for index, format in enumerate(possible)  # a wider one than another has to be faster
        if all(seconds[format] <= (1 + _SAME_TIME) * seconds[narrower] for narrower in possible[index + 1 :])
    ]


def _with_savings(
    predictor: Predictor, options: Options, formats: Sequence[str], budget: float, freedom: Freedom
) -> Options | None:
    """The cheapest that fits without making anything again; ``None``: nothing does."""
    for format in formats:
        plain = replace(options, quantization=format)
        if predictor.total(plain) <= budget:
            return plain
        taken = _savings(predictor, plain, freedom)
        if predictor.total(replace(plain, **taken)) > budget:
            continue
        for name in reversed(list(taken)):  # first what costs most: is it needed, with all that cost less?
            without = {other: value for other, value in taken.items() if other != name}
            if predictor.total(replace(plain, **without)) <= budget:
                taken = without
        return replace(plain, **taken)
    return None


def _savings(predictor: Predictor, options: Options, freedom: Freedom) -> dict[str, Any]:
    """All that can be taken, from what costs the least time to what costs the most."""
    found = {
        name: value
        for name, value in _SAVINGS.items()
        if name not in freedom.keep and _is_possible(options, name, value)
    }
    for end in reversed(_ENDS):
        if end not in found:
            continue
        without = {name: value for name, value in found.items() if name != end}
        # the model may have none that can be quantized, or a head that takes more to decode than it saves
        possible = predictor.can_be(replace(options, **found))
        if not possible or predictor.total(replace(options, **found)) >= predictor.total(replace(options, **without)):
            found = without
    return found


def _is_possible(options: Options, name: str, value: Any) -> bool:
    if options.method is None or getattr(options, name) == value:
        return False
    if name == "logits":
        return options.patched
    if name == "optimizer":
        return options.optimizer == "AdamW"
    # tied ends have one format
    return options.quantization != "none" and {options.embeddings, options.head} <= {None, value}


def _with_layers_made_again(
    predictor: Predictor, options: Options, formats: Sequence[str], budget: float, freedom: Freedom
) -> Options | None:
    leanest = _leanest(predictor, options, formats, freedom)
    layers = predictor.layers(leanest) if _may_be_planned(options, freedom) else None
    if layers is not None:
        words = layers.cheapest(predictor.room(leanest, budget))
        saving = None if words is None else replace(leanest, recompute=_in_short(words))
    else:
        saving = _checkpointed(leanest, freedom)
    return saving if saving is not None and predictor.total(saving) <= budget else None


def _leanest(predictor: Predictor, options: Options, formats: Sequence[str], freedom: Freedom) -> Options:
    narrow = replace(options, quantization=formats[-1])
    return replace(narrow, **_savings(predictor, narrow, freedom))


def _may_be_planned(options: Options, freedom: Freedom) -> bool:
    """Whether a search may give words to layers: what was asked for stays."""
    return options.recompute is None and not options.gradient_checkpointing and "recompute" not in freedom.keep


def _in_short(words: tuple[str, ...]) -> str | tuple[str, ...] | None:
    if set(words) == {"store"}:
        return None
    return words[0] if set(words) in ({"mlp"}, {"up"}) else words


def _checkpointed(options: Options, freedom: Freedom) -> Options | None:
    """Of models whose layers cannot have words, or where others were asked for."""
    kept = options.gradient_checkpointing or "gradient_checkpointing" in freedom.keep
    if options.method is None or isinstance(options.recompute, tuple) or kept:
        return None
    return replace(options, gradient_checkpointing=True)


def _refusal(
    predictor: Predictor, options: Options, budget: float, freedom: Freedom, formats: Sequence[str]
) -> PlanError:
    *_, smallest = _splits(options, freedom)
    leanest = _leanest(predictor, smallest, formats, freedom)
    layers = predictor.layers(leanest) if _may_be_planned(options, freedom) else None
    if layers is not None:
        again: Options | None = replace(leanest, recompute=layers.smallest())
    else:
        again = _checkpointed(leanest, freedom)
    variant = min(filter(None, (smallest, leanest, again)), key=predictor.total)
    needed = predictor.total(variant)
    changed = [_setting(variant, name) for name in SEARCHED if getattr(variant, name) != getattr(options, name)]
    with_ = f" with {', '.join(changed)}" if changed else ""
    tokens = f"{variant.batch} x {variant.length} tokens"
    return PlanError(
        f"budget: nothing fits into {budget / 1e9:.3g} GB; the smallest for {tokens} is {_rounded_up(needed)} GB{with_}"
    )


def _rounded_up(size: float) -> str:
    """In GB, by at most a thousandth: a budget of this figure is kept to."""
    step = 10.0 ** (math.floor(math.log10(size)) - 3)
    return f"{math.ceil(size / step) * step / 1e9:.4g}"


def _setting(options: Options, name: str) -> str:
    value = getattr(options, name)
    return in_words(value) if isinstance(value, tuple) else f"{name}={value!r}"
