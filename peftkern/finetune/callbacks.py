"""What watches the Trainer. Apart from the rest because it needs transformers to be imported."""

from __future__ import annotations

import math
import time
from typing import Any

from transformers import TrainerCallback

from peftkern.finetune import memory
from peftkern.finetune.errors import RunError
from peftkern.finetune.progress import Reporter
from peftkern.finetune.stopping import StopRequest


class NothingLeftError(Exception):
    """The checkpoint that was resumed has all the steps already."""


class Watch(TrainerCallback):  # type: ignore[misc]
    """Shows progress, stops on request after the step that is running, and raises when the loss is no longer finite."""

    def __init__(self, stop: StopRequest, reporter: Reporter, learning_rate: float) -> None:
        self.stop = stop
        self.reporter = reporter
        self.learning_rate = learning_rate
        self.tokens_before = 0
        self.steps_before = 0
        self._start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tokens_before = state.num_input_tokens_seen
        self.steps_before = state.global_step
        self._start = time.perf_counter()
        self.reporter.expect(state.max_steps, done=state.global_step)
        if state.global_step >= state.max_steps:
            raise NothingLeftError  # the Trainer looks after a step whether it was the last, and would run one more

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stop.made:
            control.should_save = True
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        # logging comes before saving, so no checkpoint ever holds what such a step left
        if not math.isfinite(logs["loss"]):
            raise RunError(
                f"the loss is {logs['loss']} at step {state.global_step}, so training stopped; earlier checkpoints are "
                f"good. Try a --learning-rate below {self.learning_rate:g}, a longer --warmup, or --dtype float32"
            )
        tokens = state.num_input_tokens_seen - self.tokens_before
        rate = tokens / (time.perf_counter() - self._start)
        note = f"loss {logs['loss']:.3f}, {rate:.0f} tokens/s, {memory.resident_mb():.0f} MB"
        if "select/trained_tensors" in logs:
            note += f", {logs['select/trained_tensors']:.0f} tensors selected"
        gpu = memory.peak_gpu_mb()
        self.reporter.advance(note=note if gpu is None else f"{note}, GPU {gpu:.0f} MB")
