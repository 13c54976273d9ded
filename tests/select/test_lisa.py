"""LISA: how many blocks are drawn, when, and that an interruption changes nothing."""

from __future__ import annotations

from collections import Counter

import pytest
from select_models import batches, changed, llama, values

from peftkern.optim import AdamW
from peftkern.select.lisa import LISA


def begun(policy: LISA, layers: int = 6, state: dict[str, object] | None = None, model: object = None) -> LISA:
    policy.prepare(llama(num_hidden_layers=layers, tie_word_embeddings=False) if model is None else model)  # type: ignore[arg-type]
    optimizer = AdamW(policy.parameters(), lr=0.01, weight_decay=0.1)
    if state is not None:
        optimizer.load_state_dict(state)
    policy.start(optimizer)
    return policy


def drawn(policy: LISA) -> list[set[int]]:
    return [{int(name.split(".")[2]) for name in s.names if ".layers." in name} for s in policy.history]


def run(policy: LISA, steps: int, first: int = 0) -> LISA:
    for batch in batches(steps)[first:]:
        policy.step(policy.prepared(), batch)
    return policy


def test_it_trains_gamma_blocks_and_everything_outside_of_blocks() -> None:
    policy = begun(LISA(blocks=2, interval=2))
    for batch in batches(4):
        before = values(policy.prepared())
        policy.step(policy.prepared(), batch)
        assert policy.selection is not None
        names = set(policy.selection.names)
        assert changed(policy.prepared(), before) == names
        assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} < names
    assert [len(blocks) for blocks in drawn(policy)] == [2, 2]


def test_blocks_are_drawn_anew_every_interval_and_all_alike() -> None:
    policy = begun(LISA(blocks=2, interval=1, seed=4), layers=6)
    counts = Counter[int]()
    for _ in range(600):
        selection = policy.select()
        policy.history.append(selection)
        counts.update({int(name.split(".")[2]) for name in selection.names if ".layers." in name})
    # 200 are expected, with a standard deviation of 12
    assert sum(counts.values()) == 1200
    assert all(150 < counts[block] < 250 for block in range(6))


def test_the_seed_decides() -> None:
    first, again, other = (drawn(run(begun(LISA(2, 1, seed=seed)), 5)) for seed in (1, 1, 2))
    assert first == again != other


def test_an_interruption_changes_nothing() -> None:
    whole = run(begun(LISA(2, 3, seed=5)), 8)
    part = run(begun(LISA(2, 3, seed=5)), 4)
    state = part.started().state_dict()
    part.finish()
    resumed = run(begun(LISA(2, 3, seed=5), state=state, model=part.prepared()), 8, first=4)
    assert drawn(resumed) == drawn(whole)
    assert changed(resumed.prepared(), values(whole.prepared())) == set()


def test_wrong_numbers_of_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        LISA(0)
    policy = LISA(3)
    with pytest.raises(ValueError, match="at most 2"):
        policy.prepare(llama())
    policy.prepare(llama(num_hidden_layers=3))
