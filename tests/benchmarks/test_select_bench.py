"""Benchmarks of choosing at small sizes: both sides compute the same, and rows hold what they say. No timings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from peftkern.bench import DisagreementError, Effort, Measurement, Quantity, select_loss, select_step, smollm2
from peftkern.finetune.encoding import PadRight
from peftkern.select import GreenTrainer

ONCE = Effort(minimum_pairs=1, maximum_pairs=1, seconds=0.0)
SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> smollm2.Checkpoint:
    folder = str(tmp_path_factory.mktemp("model"))
    smollm2.save_random(folder, **SMALL)
    return smollm2.Checkpoint(folder, "small")


Loop = Callable[[str], smollm2.Loop]


@pytest.mark.parametrize(
    ("full", "load"),
    [(smollm2.dense_loop, smollm2.load_dense), (smollm2.LOOPS["ours"], smollm2.load_ours)],
    ids=["dense", "lora"],
)
def test_a_step_that_chooses_agrees_with_the_full_one(
    checkpoint: smollm2.Checkpoint, full: Loop, load: Callable[[str], object]
) -> None:
    pair = select_step.prepare(checkpoint, full, load, GreenTrainer(0.8), batch=2, length=16)
    pair.case("x", ONCE).check()
    name = next(iter(pair.green.policy.selection.names))
    with torch.no_grad():
        pair.full.model.get_parameter(name).add_(0.5)
    with pytest.raises(DisagreementError, match="differ by"):
        pair.check()


def test_the_share_has_what_choosing_takes_of_an_interval_in_it(checkpoint: smollm2.Checkpoint) -> None:
    pair = select_step.prepare(checkpoint, smollm2.dense_loop, smollm2.load_dense, GreenTrainer(0.8), batch=1, length=8)
    pair = select_step.Pair(pair.green, pair.full, 5.0, pair.ids, pair.note)
    seconds = Measurement("x", "s", Quantity.TIME, [0.5, 1.0], [1.0, 2.0])
    assert pair.shares(seconds) == [0.55, 0.525]


def test_the_counted_step_stays_within_the_budget(checkpoint: smollm2.Checkpoint) -> None:
    pair = select_step.prepare(checkpoint, smollm2.dense_loop, smollm2.load_dense, GreenTrainer(0.6), batch=1, length=8)
    counted = [select_step.counted_flops(loop, pair.ids) for loop in (pair.green, pair.full)]
    assert 0 < counted[0] <= 0.6 * counted[1]


def test_choosing_again_is_timed_part_by_part(checkpoint: smollm2.Checkpoint) -> None:
    pair = select_step.prepare(checkpoint, smollm2.dense_loop, smollm2.load_dense, GreenTrainer(0.6), batch=1, length=8)
    rows = list(select_step._overhead(pair, "x", repeats=2))
    assert [len(row.ours) for row in rows] == [2, 1, 2]
    assert all(seconds > 0 for row in rows for seconds in row.ours)


def test_each_run_ends_with_a_loss_and_the_seconds_of_its_steps(checkpoint: smollm2.Checkpoint) -> None:
    examples = [{"input_ids": [i + 3, i + 4, i + 5, 9], "labels": [-100, i + 4, i + 5, 9]} for i in range(12)]
    task = select_loss.Task(checkpoint.folder, examples[:8], examples[8:], PadRight(0))
    full = select_loss.train(task, None, 3, 1e-3, seed=0)
    green = select_loss.train(task, GreenTrainer(0.8, interval=2), 3, 1e-3, seed=0)
    assert len(full.seconds) == len(green.seconds) == 3
    assert full.loss != green.loss
    assert select_loss.train(task, None, 3, 1e-3, seed=0).loss == full.loss
    assert [len(batch["input_ids"]) for batch in task.batches(5, seed=1)] == [4] * 5


@pytest.mark.parametrize("rival", select_loss.RIVALS)
def test_a_rival_trains_as_long_as_ours(checkpoint: smollm2.Checkpoint, rival: str) -> None:
    examples = [{"input_ids": [i + 3, i + 4, i + 5, 9], "labels": [-100, i + 4, i + 5, 9]} for i in range(12)]
    task = select_loss.Task(checkpoint.folder, examples[:8], examples[8:], PadRight(0))
    other = select_loss.RIVALS[rival]
    assert select_loss.steps_in(task, other, select_loss.Run(1.0, [1e-9] * 7), trial=3) == 1
    assert select_loss.steps_in(task, other, select_loss.Run(1.0, [1e3] * 7), trial=3) > 7
