"""The demonstration: SmolLM2-135M learns to write one-line docstrings from the standard library's own functions.

It is an ordinary run of :mod:`peftkern.finetune.run` on data that it collects, with samples and a comparison around it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from peftkern.demo.compare import Comparison, compare_with_peer
from peftkern.finetune import run
from peftkern.finetune.config import FinetuneConfig
from peftkern.finetune.docstrings import HELD_OUT_FILE, TRAIN_FILE, docstring_data
from peftkern.finetune.encoding import IGNORED, Example
from peftkern.finetune.gguf import smollm2_file, smollm2_folder
from peftkern.finetune.modeling import padding_token

STEPS = 40
BATCH_SIZE = 8
HELD_OUT_PAIRS = 32
SAMPLES = 3
TIMED_STEPS = 3
MEMORY_BEFORE_SECONDS = 360
"""Measuring memory takes one to two minutes; a machine that is slower than this leaves it out, to end within eight."""

_LONGEST_ANSWER = 32  # tokens


@dataclass(frozen=True)
class Sample:
    """A held-out function, its real docstring line, and what the model writes before and after training."""

    prompt: str
    reference: str
    before: str
    after: str


@dataclass(frozen=True)
class Demonstration:
    """What the demonstration shows. ``comparison`` is ``None`` if it was not asked for."""

    results: run.Results
    samples: list[Sample]
    comparison: Comparison | None


def demonstrate(output: Path, steps: int, compare: bool, resume: bool, console: Console) -> Demonstration:
    """Train, then show samples and the comparison; ``demo.json`` in ``output`` holds both.

    Raises:
        InputError: the package with the model is not installed, or ``output`` cannot be used.
        InterruptedRunError, RunError: as :func:`peftkern.finetune.run.finetune`.
    """
    config = make_config(output, steps, resume)
    session = run.start(config, console)
    results = run.finish(session, run.train_session(session))
    session.reporter.say("\nwriting samples, without the adapter and with it")
    samples = write_samples(session, SAMPLES)
    comparison = None
    if compare:
        memory_until = session.started + MEMORY_BEFORE_SECONDS
        comparison = compare_with_peer(smollm2_folder(), TIMED_STEPS, session.reporter.say, memory_until)
    record = {
        "samples": [asdict(sample) for sample in samples],
        "comparison": None if comparison is None else asdict(comparison),
    }
    text = json.dumps(record, indent=2) + "\n"
    session.output.replace("demo.json", lambda path: path.write_text(text, encoding="utf-8"))
    return Demonstration(results, samples, comparison)


def make_config(output: Path, steps: int, resume: bool) -> FinetuneConfig:
    """The settings of the demonstration; collects its data, or finds them in the cache."""
    # as many as the steps take: batches are grouped by length over the whole file, so a part of it would be biased
    model, data = smollm2_file(), docstring_data(STEPS * BATCH_SIZE, HELD_OUT_PAIRS)
    return FinetuneConfig(
        model=str(model),
        data=str(data / TRAIN_FILE),
        eval_data=str(data / HELD_OUT_FILE),
        output=str(output),
        overwrite=not resume and _is_earlier_run(output),
        resume=resume,
        quantization="nf4",
        double_quant=True,
        dtype="float32",
        rank=16,
        alpha=32.0,
        max_steps=steps,
        batch_size=BATCH_SIZE,
        learning_rate=5e-4,
        warmup=0.1,
        max_length=256,
        max_eval_examples=HELD_OUT_PAIRS,
        checkpoint_every=25,
    )


def _is_earlier_run(output: Path) -> bool:
    return any((output / name).exists() for name in ("summary.json", "demo.json", "checkpoints"))


# ---- samples


def write_samples(session: run.Session, count: int) -> list[Sample]:
    """What the model writes for the first ``count`` held-out functions, without its adapter and with it."""
    model, tokenizer = session.adapted.model, session.tokenizer
    samples = []
    for example in session.splits.held_out[:count]:
        prompt, reference = _split_at_answer(example)
        with model.disable_adapter():
            before = _answer(model, tokenizer, prompt)
        after = _answer(model, tokenizer, prompt)
        text = tokenizer.decode(prompt, skip_special_tokens=True)
        samples.append(Sample(text, tokenizer.decode(reference, skip_special_tokens=True), before, after))
    return samples


def _split_at_answer(example: Example) -> tuple[list[int], list[int]]:
    ids, labels = example["input_ids"], example["labels"]
    start = next(index for index, label in enumerate(labels) if label != IGNORED)
    return ids[:start], [label for label in labels if label != IGNORED]


def _answer(model: Any, tokenizer: Any, prompt: list[int]) -> str:
    """The most likely continuation, token by token, up to a fixed length."""
    import torch

    ids = torch.tensor([prompt], device=model.device)
    model.eval()
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_LONGEST_ANSWER,
            do_sample=False,
            use_cache=True,
            pad_token_id=padding_token(tokenizer),
        )
    answer: str = tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
    return " ".join(answer.split())
