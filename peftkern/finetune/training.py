"""The training loop: transformers' Trainer, watched. It stops on request with a checkpoint, and on a loss of NaN."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkern.finetune import memory
from peftkern.finetune.config import FinetuneConfig
from peftkern.finetune.encoding import Example
from peftkern.finetune.errors import InputError, InterruptedRunError, describe_write_failures
from peftkern.finetune.output import OutputFolder
from peftkern.finetune.progress import Reporter
from peftkern.finetune.stopping import stop_on_signals

if TYPE_CHECKING:
    from peftkern.finetune.callbacks import Watch
    from peftkern.select.method import Method

_KEPT_CHECKPOINTS = 2

Collator = Callable[[Sequence[Example]], dict[str, Any]]
"""Makes a batch of examples."""


@dataclass(frozen=True)
class TrainingRecord:
    """What happened. ``losses`` are (step, loss) pairs and go back to the first step of a resumed run; the rest is of
    this run alone. Padding is not counted in ``tokens``."""

    losses: list[tuple[int, float]]
    steps: int
    tokens: int
    seconds: float
    peak_resident_mb: float
    peak_gpu_mb: float | None

    @property
    def tokens_per_second(self) -> float:
        """Tokens that were trained on per second."""
        return self.tokens / self.seconds


def train(
    config: FinetuneConfig,
    model: Any,
    method: Method | None,
    examples: list[Example],
    collate: Collator,
    output: OutputFolder,
    reporter: Reporter,
) -> TrainingRecord:
    """Train ``model`` on ``examples``, from the last checkpoint if the settings say so.

    ``method`` decides what is trained; without one it is whatever requires a gradient.

    Raises:
        InterruptedRunError: the user asked to stop; a checkpoint was written.
        InputError: the budget of a policy is too small.
        RunError: the loss is no longer finite, or a checkpoint cannot be written.
    """
    from peftkern.finetune.callbacks import Watch

    with stop_on_signals(reporter.say) as stop:
        watch = Watch(stop, reporter, config.learning_rate)
        trainer = _make_trainer(config, model, method, examples, collate, output.checkpoints, watch)
        memory.reset_peak()
        start = time.perf_counter()
        _run(trainer, output.last_checkpoint() if config.resume else None, output, reporter)
        seconds = time.perf_counter() - start
    state = trainer.state
    if state.global_step < state.max_steps:
        raise InterruptedRunError(
            f"stopped after step {state.global_step} of {state.max_steps}; the checkpoint is in {output.checkpoints}, "
            "and the same command with --resume continues from it"
        )
    return TrainingRecord(
        losses=[(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry],
        steps=state.global_step - watch.steps_before,
        tokens=state.num_input_tokens_seen - watch.tokens_before,
        seconds=seconds,
        peak_resident_mb=memory.peak_resident_mb(),
        peak_gpu_mb=memory.peak_gpu_mb(),
    )


def _run(trainer: Any, checkpoint: Path | None, output: OutputFolder, reporter: Reporter) -> None:
    from peftkern.finetune.callbacks import NothingLeftError
    from peftkern.select.solver import BudgetError

    hint = "free some space; complete checkpoints are kept, and --resume continues from the last one"
    try:
        with (
            reporter.activity("training", total=trainer.args.max_steps),
            describe_write_failures("a checkpoint", output.checkpoints, hint),
            suppress(NothingLeftError),
        ):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except BudgetError as error:
        enough = math.ceil(error.rho * 1000) / 1000
        raise InputError(f"--rho: too small for this model and its batches; {enough:g} is enough") from error
    finally:
        output.remove_incomplete_checkpoints()


def _make_trainer(
    config: FinetuneConfig,
    model: Any,
    method: Method | None,
    examples: list[Example],
    collate: Collator,
    folder: Path,
    watch: Watch,
) -> Any:
    import torch
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from peftkern.optim import AdamW, AdamW8bit

    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        max_steps=-1 if config.max_steps is None else config.max_steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup,
        seed=config.seed,
        train_sampling_strategy="group_by_length",
        **_checkpointing_arguments(config),
        save_steps=config.checkpoint_every,
        save_total_limit=_KEPT_CHECKPOINTS,
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all" if config.packing else "non_padding",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
    )
    # methods mask and move the optimizer's state; without one the Trainer's own does
    own = {"AdamW": None if method is None else AdamW, "AdamW8bit": AdamW8bit}[config.optimizer]
    optimizer = None if own is None else (own, {"lr": config.learning_rate, "weight_decay": 0.0})
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=collate,
        callbacks=[watch] if method is None else [watch, method],
        optimizer_cls_and_kwargs=optimizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _checkpointing_arguments(config: FinetuneConfig) -> dict[str, Any]:
    from transformers import TrainingArguments

    if not config.gradient_checkpointing:
        return {}
    # transformers renamed it within version 5
    names = ("activation_checkpointing", "gradient_checkpointing")
    name = next(name for name in names if name in TrainingArguments.__dataclass_fields__)
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
