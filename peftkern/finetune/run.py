"""The flow of a run: check, load, evaluate, train, evaluate, write."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from peftkern.finetune import fitting, methods, selections
from peftkern.finetune.config import FinetuneConfig, changed_settings
from peftkern.finetune.encoding import PadRight, Splits, load_splits
from peftkern.finetune.errors import InputError
from peftkern.finetune.evaluation import HeldOutLoss, held_out_loss
from peftkern.finetune.methods import METHODS
from peftkern.finetune.modeling import (
    AdaptedModel,
    ModelSource,
    find_model,
    load_adapted_model,
    load_model_config,
    load_tokenizer,
    padding_token,
)
from peftkern.finetune.output import OutputFolder
from peftkern.finetune.plot import draw_loss_curve
from peftkern.finetune.progress import Reporter
from peftkern.finetune.selections import SELECTIONS
from peftkern.finetune.training import Collator, TrainingRecord, train
from peftkern.finetune.versions import versions

if TYPE_CHECKING:
    from peftkern.select.view import SelectionView

_BEFORE, _FIT = "held_out_before", "fit"
_SELECTION_FILES = ("selection.png", "selection.json")
_PACKAGES = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class Session:
    """A run that is ready to train."""

    config: FinetuneConfig
    output: OutputFolder
    reporter: Reporter
    source: ModelSource
    tokenizer: Any
    splits: Splits
    adapted: AdaptedModel
    before: HeldOutLoss | None
    started: float
    fit: fitting.Fit | None = None

    @property
    def pad(self) -> PadRight:
        """Makes batches of examples to evaluate, and to train on where they are not packed."""
        return PadRight(padding_token(self.tokenizer))

    @property
    def collate(self) -> Collator:
        """Makes batches of examples to train on."""
        from peftkern.integrations.packing import PackingCollator

        return PackingCollator() if self.config.packing else self.pad


@dataclass(frozen=True)
class Results:
    """What a run gives: the record of training, the loss on held-out data, ``None`` without such data, and what was
    selected, ``None`` where nothing was."""

    record: TrainingRecord
    before: HeldOutLoss | None
    after: HeldOutLoss | None
    selection: SelectionView | None
    seconds: float


def finetune(config: FinetuneConfig, console: Console, given: Collection[str] = ()) -> Results:
    """Fine-tune a model as the settings say, and write adapter, loss curve and summary to the output folder.

    ``given`` names settings that ``config.memory`` leaves as they are: what the user has said. Those that are not what
    they are by default are left as well.

    Raises:
        InputError: something that was asked for cannot be done; nothing was written.
        InterruptedRunError: stopped on request, with a checkpoint.
        RunError: the run failed on its way.
    """
    session = start(config, console, given)
    return finish(session, train_session(session))


def start(config: FinetuneConfig, console: Console, given: Collection[str] = ()) -> Session:
    """Check the settings against files and data, load the model, and evaluate it on the held-out data."""
    started = time.perf_counter()
    output = OutputFolder.prepare(config)
    with output.discarded_on_failure():
        return _start(config, given, output, Reporter(console), started)


def _start(
    config: FinetuneConfig, given: Collection[str], output: OutputFolder, reporter: Reporter, started: float
) -> Session:
    if config.memory is not None:
        fitting.check(config)
    method = methods.build(config) if config.select is None else selections.build(config)
    source = find_model(config.model, reporter.say)
    tokenizer = load_tokenizer(source)
    model_config = load_model_config(source)
    max_length = _longest_input(config, model_config, reporter)
    splits = load_splits(config, tokenizer, max_length)
    _describe_data(splits, max_length, reporter)
    asked, fit = config, None
    if config.memory is not None:
        fit = _fit(config, given, model_config, splits, output, reporter)
        config = fit.applied_to(config)
    adapted = load_adapted_model(config, source, model_config, method)
    reporter.say(f"\n{source.name}: {adapted.quantization}; {_describe_method(config)}, {adapted.trained:,} numbers")
    reporter.say(f"{adapted.report}\n")
    if config.packing:
        _prepare_packing(adapted.model)
    session = Session(config, output, reporter, source, tokenizer, splits, adapted, None, started, fit)
    if config.resume:
        noted = output.read_facts()[_BEFORE]
        before = None if noted is None else HeldOutLoss(**noted)
    else:
        before = _evaluate(session, "held-out loss before")
        facts = {_BEFORE: None if before is None else asdict(before), _FIT: None if fit is None else fit.as_data()}
        output.start_checkpoints(asked, facts)
    return replace(session, before=before)


def _fit(
    config: FinetuneConfig,
    given: Collection[str],
    model_config: Any,
    splits: Splits,
    output: OutputFolder,
    reporter: Reporter,
) -> fitting.Fit:
    """What ``config.memory`` chooses; a run that goes on keeps what it began with."""
    if config.resume:
        fit = fitting.Fit(**output.read_facts()[_FIT])
    else:
        with reporter.waiting(f"memory: looking for the fastest settings that fit into {config.memory}"):
            fit = fitting.fit(config, {*given, *changed_settings(config)}, model_config, splits)
    reporter.show(fit.table())
    reporter.say(f"the same without --memory: {fit.command()}")
    return fit


def train_session(session: Session) -> TrainingRecord:
    """Train the model."""
    with session.output.discarded_on_failure():
        return train(
            session.config,
            session.adapted.model,
            session.adapted.method,
            session.splits.train,
            session.collate,
            session.output,
            session.reporter,
        )


def finish(session: Session, record: TrainingRecord) -> Results:
    """Evaluate again, then write results, loss curve and summary; each is whole or as it was before."""
    after = _evaluate(session, "held-out loss after")
    results = Results(record, session.before, after, _view(session), time.perf_counter() - session.started)
    output = session.output
    for name in METHODS[session.config.method].results:
        output.replace(name, partial(_WRITERS[name], session))
    output.replace("loss.png", lambda path: _draw(path, session, results))
    if results.selection is not None:
        for name in _SELECTION_FILES:
            output.replace(name, results.selection.save)
    text = json.dumps(summarise(session, results), indent=2, allow_nan=False) + "\n"
    output.replace("summary.json", lambda path: path.write_text(text, encoding="utf-8"))
    for line in _closing_lines(session, results):
        session.reporter.say(line)
    return results


def _write_model(session: Session, path: Path) -> None:
    session.adapted.model.save_pretrained(path)
    session.tokenizer.save_pretrained(path)


def _write_adapter(session: Session, path: Path) -> None:
    session.adapted.model.save_pretrained(path)


def _write_delta(session: Session, path: Path) -> None:
    from peftkern.sparse.method import SparseMethod

    method = session.adapted.method
    assert isinstance(method, SparseMethod)
    method.update().save(path)


def _write_pruned(session: Session, path: Path) -> None:
    from peftkern.integrations.fingerprint import base_of
    from peftkern.sparse import DSEE, Pruned

    method = session.adapted.method
    assert isinstance(method, DSEE)
    pruned = method.pruned or Pruned({}, {}, base_of(session.adapted.model))
    pruned.save(path)


_WRITERS = {
    methods.ADAPTER: _write_adapter,
    methods.DELTA: _write_delta,
    methods.MODEL: _write_model,
    methods.PRUNED: _write_pruned,
}


def _view(session: Session) -> SelectionView | None:
    from peftkern.select.policy import Policy

    policy = session.adapted.method
    if not isinstance(policy, Policy) or not policy.history:
        return None
    return policy.view(watts=session.config.select_watts)


def _describe_method(config: FinetuneConfig) -> str:
    entry = METHODS[config.method]
    options = f" ({config.method_options})" if config.method_options else ""
    low_rank = f", LoRA rank {config.rank} on {config.target_modules}" if entry.low_rank else ""
    selected = "" if config.select is None else f", {config.select}: {SELECTIONS[config.select].summary}"
    return f"{entry.name}{options}: {entry.summary}{low_rank}{selected}"


def _evaluate(session: Session, what: str) -> HeldOutLoss | None:
    examples = session.splits.held_out
    if not examples:
        return None
    batch_size = session.config.batch_size
    with session.reporter.activity(what, total=len(examples)) as reporter:
        logits = session.config.logits
        loss = held_out_loss(session.adapted.model, examples, session.pad, batch_size, logits, reporter.advance)
    session.reporter.say(f"{what}: {loss.loss:.4f} (perplexity {loss.perplexity:.2f}, {loss.tokens} tokens)")
    return loss


def _prepare_packing(model: Any) -> None:
    from peftkern.integrations.packing import attend_by_example, check_packing

    attend_by_example(model)
    try:
        check_packing(model)
    except ValueError as error:
        raise InputError(f"--packing: {error}") from error


def _longest_input(config: FinetuneConfig, model_config: Any, reporter: Reporter) -> int:
    """``--max-length``, or what the model takes if that is less."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None) or config.max_length
    if positions < config.max_length:
        reporter.say(f"data: the model takes {positions} tokens, so --max-length {config.max_length} counts as that")
    return min(positions, config.max_length)


def _describe_data(splits: Splits, max_length: int, reporter: Reporter) -> None:
    lengths = [len(example["input_ids"]) for example in splits.train]
    mean = sum(lengths) / len(lengths)
    reporter.say(
        f"data: {len(lengths)} examples to learn from ({mean:.0f} tokens on average, {max(lengths)} at most), "
        f"{len(splits.held_out)} held out"
    )
    if splits.cut:
        reporter.say(f"data: {splits.cut} examples are longer than {max_length} tokens and were cut")
    if splits.dropped:
        reporter.say(f"data: {splits.dropped} examples have nothing to learn within that length and were left out")


def _draw(path: Path, session: Session, results: Results) -> None:
    before = None if results.before is None else results.before.loss
    after = None if results.after is None else results.after.loss
    draw_loss_curve(path, results.record.losses, before, after, Path(session.source.name).name)


def summarise(session: Session, results: Results) -> dict[str, Any]:
    """The run as data for ``summary.json``. Memory in MB of 10^6 bytes, times in seconds, losses in nats per token."""
    record, splits = results.record, session.splits
    return {
        "model": session.source.name,
        "quantization": session.adapted.quantization,
        "trained": session.adapted.trained,
        "held_out_loss": {"before": _as_data(results.before), "after": _as_data(results.after)},
        "training_loss": [{"step": step, "loss": loss} for step, loss in record.losses],
        "steps": record.steps,
        "tokens": record.tokens,
        "tokens_per_second": record.tokens_per_second,
        "seconds": {"training": record.seconds, "total": results.seconds},
        "peak_memory_mb": {"resident": record.peak_resident_mb, "gpu": record.peak_gpu_mb},
        "fit": None if session.fit is None else session.fit.as_data(),
        "examples": {
            "train": len(splits.train),
            "held_out": len(splits.held_out),
            "cut": splits.cut,
            "dropped": splits.dropped,
        },
        "selection": _earlier_selection(session) if results.selection is None else results.selection.summary(),
        "patch": {"counts": session.adapted.report.counts, "reasons": session.adapted.report.reasons},
        "settings": asdict(session.config),
        "versions": versions(_PACKAGES),
    }


def _earlier_selection(session: Session) -> Any:
    """What the summary in the folder says, where there was nothing left to train; ``None`` where it says nothing."""
    path = session.output.path / "summary.json"
    if session.config.select is None or not session.config.resume or not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8")).get("selection")


def _as_data(loss: HeldOutLoss | None) -> dict[str, Any] | None:
    if loss is None:
        return None
    perplexity = loss.perplexity if math.isfinite(loss.perplexity) else None
    return {"loss": loss.loss, "tokens": loss.tokens, "perplexity": perplexity}


def _closing_lines(session: Session, results: Results) -> list[str]:
    record = results.record
    lines = [""]
    if results.before is not None and results.after is not None:
        lines.append(f"held-out loss   {results.before.loss:.4f} before, {results.after.loss:.4f} after")
    written = [f"{name}/" for name in METHODS[session.config.method].results] + ["loss.png"]
    if results.selection is not None:
        written += _SELECTION_FILES
        lines.append(f"selection       {results.selection.now}")
        lines += [f"saved           {line.removeprefix('saved ')}" for line in results.selection.savings.lines()]
    gpu = "" if record.peak_gpu_mb is None else f", {record.peak_gpu_mb:.0f} MB on the GPU"
    fit = session.fit
    return [
        *lines,
        f"training        {record.seconds:.0f} s for {record.steps} steps, {record.tokens_per_second:.0f} tokens/s",
        f"in all          {results.seconds:.0f} s",
        f"peak memory     {record.peak_resident_mb:.0f} MB{gpu}",
        *([] if fit is None else [f"of the budget   {fit.comparison(record.peak_resident_mb, record.peak_gpu_mb)}"]),
        f"written to      {session.output.path}: {', '.join(written)}, summary.json",
    ]
