"""The settings of a run: one dataclass, from which the command line's options and the YAML file's keys derive."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from peftkern.finetune.errors import InputError
from peftkern.finetune.methods import METHODS
from peftkern.finetune.selections import SELECTIONS
from peftkern.formats import BLOCK_SIZES
from peftkern.ops.lora_mlp import RECOMPUTE
from peftkern.patch.layer_plan import TEXTS as RECOMPUTED_LAYERS
from peftkern.plan.errors import PlanError
from peftkern.plan.search import parse_bytes

FORMATS = ("nf4", "fp4", "int8")
QUANTIZATIONS = (*FORMATS, "none")
DTYPES = ("auto", "float32", "bfloat16", "float16")
OPTIMIZERS = ("AdamW", "AdamW8bit")
MATMUL_PRECISIONS = ("highest", "high", "medium")
ALL_LINEAR = "all-linear"
DEFAULT_EVAL_FRACTION = 0.1


def _setting(default: Any, help: str, group: str, choices: Sequence[str] = ()) -> Any:
    metadata = {"help": help, "group": group, "choices": tuple(choices)}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _required(help: str, group: str) -> Any:
    return _setting(dataclasses.MISSING, help, group)


DATA, METHOD, SELECTION, ADAPTER = "Data", "Method", "Selection", "Adapter"
MODEL, TRAINING, MEMORY, OUTPUT = "Model", "Training", "Memory", "Output"


@dataclass(frozen=True)
class FinetuneConfig:
    """All settings of a run. Invalid values raise :class:`InputError` when it is built, naming the option."""

    model: str = _required("Local folder, hub id, or GGUF file.", MODEL)
    data: str = _required("A .jsonl, .csv, .tsv, .txt or .md file, or the name of a data set on the hub.", DATA)
    output: str = _setting("peftkern-output", "Folder for results, summary.json, loss.png and checkpoints.", OUTPUT)
    overwrite: bool = _setting(False, "Replace an earlier run in the output folder.", OUTPUT)
    resume: bool = _setting(False, "Continue from the last checkpoint in the output folder.", OUTPUT)
    checkpoint_every: int = _setting(100, "Optimizer steps between checkpoints.", OUTPUT)

    dataset_subset: str | None = _setting(None, "Subset (configuration) of a data set on the hub.", DATA)
    dataset_split: str = _setting("train", "Split of a data set on the hub.", DATA)
    messages_column: str | None = _setting(None, "Column with chat messages. [default: messages, if there]", DATA)
    prompt_column: str | None = _setting(None, "Column with the prompt. [default: prompt, if there]", DATA)
    response_column: str | None = _setting(None, "Column with the response. [default: response, if there]", DATA)
    text_column: str | None = _setting(None, "Column with plain text. [default: text, if there]", DATA)
    chat_template: bool = _setting(True, "Format prompts with the tokenizer's chat template, if it has one.", DATA)
    response_only: bool = _setting(True, "Learn the responses only, not the prompts.", DATA)
    eval_data: str | None = _setting(None, "Held-out data, like --data.", DATA)
    eval_fraction: float | None = _setting(
        None, f"Share of --data to hold out, 0 for none. [default: {DEFAULT_EVAL_FRACTION}]", DATA
    )
    max_eval_examples: int = _setting(256, "Evaluate on at most so many held-out examples.", DATA)
    max_length: int = _setting(1024, "Longest example in tokens; longer ones are cut.", DATA)

    method: str = _setting("lora", "How the model is trained.", METHOD, tuple(METHODS))
    method_options: str | None = _setting(None, "Of the method, as name=value with commas between.", METHOD)

    select: str | None = _setting(
        None, "Train some of the tensors of --method lora or full at a time.", SELECTION, tuple(SELECTIONS)
    )
    rho: float | None = _setting(
        None, "Of green: cost of a step, as a share of the full one. [default: 0.5]", SELECTION
    )
    select_interval: int | None = _setting(
        None, "Of green, random and lisa: optimizer steps between selections.", SELECTION
    )
    select_budget: str | None = _setting(
        None, "Of green: what --rho is a share of. [default: flops]", SELECTION, ("flops", "seconds")
    )
    select_watts: float | None = _setting(
        None, "Power of the machine in training, to estimate the energy that was saved.", SELECTION
    )

    rank: int = _setting(16, "Rank of LoRA.", ADAPTER)
    alpha: float = _setting(32.0, "LoRA's alpha; the adapter is scaled by alpha / rank.", ADAPTER)
    dropout: float = _setting(0.0, "Dropout in front of the adapter.", ADAPTER)
    target_modules: str = _setting(ALL_LINEAR, f"{ALL_LINEAR}, or names of modules with commas between.", ADAPTER)

    quantization: str = _setting("nf4", "Format of the frozen weights.", MODEL, QUANTIZATIONS)
    block_size: int = _setting(64, "Weights per scale: a power of two from 32 to 4096.", MODEL)
    double_quant: bool = _setting(True, "Quantize the scales as well.", MODEL)
    embeddings: str | None = _setting(
        None, "Format of the embeddings, and of a head that is tied to them.", MODEL, FORMATS
    )
    head: str | None = _setting(None, "Format of the head.", MODEL, FORMATS)
    dtype: str = _setting(
        "auto", "Of activations and dense weights; auto: bfloat16 on a GPU, else float32.", MODEL, DTYPES
    )
    matmul_precision: str = _setting(
        "highest", "torch.set_float32_matmul_precision; lower is faster on some CPUs.", MODEL, MATMUL_PRECISIONS
    )

    epochs: float = _setting(1.0, "Passes over the data, unless --max-steps is given.", TRAINING)
    max_steps: int | None = _setting(None, "Optimizer steps.", TRAINING)
    batch_size: int = _setting(4, "Examples per forward pass.", TRAINING)
    packing: bool = _setting(False, "Join the examples of a forward pass in one row, without padding.", TRAINING)
    gradient_accumulation: int = _setting(1, "Forward passes per optimizer step.", TRAINING)
    learning_rate: float = _setting(2e-4, "Peak learning rate of AdamW.", TRAINING)
    warmup: float = _setting(0.05, "Warm-up: steps, or below 1 the share of all steps.", TRAINING)
    optimizer: str = _setting("AdamW", "AdamW8bit keeps a quarter of the state.", TRAINING, OPTIMIZERS)
    seed: int = _setting(0, "Seed of initialisation, order of examples and dropout.", TRAINING)
    memory: str | None = _setting(
        None, "Fit the run into so much, as 12GB: what no setting says is chosen, and shown.", MEMORY
    )
    gradient_checkpointing: bool = _setting(False, "Compute activations again in backward to save memory.", MEMORY)
    recompute: str | None = _setting(
        None, "What gated blocks compute again, mlp or up; or a word for each layer, as layer*4,mlp*20,store*6.", MEMORY
    )
    logits: bool = _setting(True, "Compute logits in training; without them the loss takes less memory.", MEMORY)

    def __post_init__(self) -> None:
        for name, text in (("model", self.model), ("data", self.data), ("output", self.output)):
            _require(bool(text), name, "must not be empty", text)
        for name, allowed in _choices().items():
            value = getattr(self, name)
            _require(value is None or value in allowed, name, f"must be one of {', '.join(allowed)}", value)
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            within = value is None or (math.isfinite(value) and low <= value <= high)
            _require(within, name, _range_text(low, high), value)
        _require(self.block_size in BLOCK_SIZES, "block_size", f"must be one of {sorted(BLOCK_SIZES)}", self.block_size)
        self._check_memory()
        self._check_combinations()

    def _check_memory(self) -> None:
        if self.memory is not None:
            try:
                parse_bytes(self.memory)
            except PlanError as error:
                raise InputError(f"--memory: {error}") from error
        if isinstance(self.recompute_words, list) and self.gradient_checkpointing:
            raise InputError("give --gradient-checkpointing or a --recompute with words for layers, not both")

    def _check_combinations(self) -> None:
        if self.eval_data is not None and self.eval_fraction is not None:
            raise InputError("give --eval-data or --eval-fraction, not both")
        if self.resume and self.overwrite:
            raise InputError("give --resume or --overwrite, not both")
        if (self.prompt_column is None) != (self.response_column is None):
            raise InputError("--prompt-column and --response-column go together; one of them is missing")
        if METHODS[self.method].trains_weights and self.quantization != "none":
            raise InputError(
                f"--method {self.method} trains the weights themselves, and --quantization {self.quantization} freezes "
                "them; add --quantization none"
            )
        if self.quantization == "none" and not self.embeddings is self.head is None:
            raise InputError("--embeddings and --head are quantized along with the layers; drop --quantization none")
        self._check_selection()
        if not self.target_module_names:
            raise InputError(f"--target-modules must be {ALL_LINEAR} or names with commas between, got an empty list")

    def _check_selection(self) -> None:
        given = [name for name in _OF_SELECT if getattr(self, name) is not None]
        if self.select is None and given:
            raise InputError(f"{option_name(given[0])} needs --select; add --select {', '.join(SELECTIONS)}")
        if self.select is not None and METHODS[self.method].implementation is not None:
            plain = [entry.name for entry in METHODS.values() if entry.implementation is None]
            raise InputError(
                f"--select {self.select} chooses among what --method {' or '.join(plain)} trains; "
                f"--method {self.method} chooses itself"
            )

    @property
    def target_module_names(self) -> str | list[str]:
        """What ``peft.LoraConfig(target_modules=...)`` takes."""
        if self.target_modules == ALL_LINEAR:
            return ALL_LINEAR
        return [name.strip() for name in self.target_modules.split(",") if name.strip()]

    @property
    def recompute_words(self) -> str | list[str] | None:
        """What ``peftkern.patch(recompute=...)`` takes."""
        if self.recompute is None or self.recompute in RECOMPUTE:
            return self.recompute
        words: list[str] = []
        for item in self.recompute.split(","):
            word, _, count = (part.strip() for part in item.partition("*"))
            times = int(count) if count.isdigit() else 0 if count else 1
            if word not in RECOMPUTED_LAYERS or times < 1:
                raise InputError(
                    f"--recompute must be {' or '.join(RECOMPUTE)}, or words for layers with commas between, as "
                    f"layer*4,mlp*20,store*6, of {', '.join(RECOMPUTED_LAYERS)}; got {self.recompute!r}"
                )
            words += [word] * times
        return words

    @property
    def held_out_share(self) -> float:
        """The share of the data to hold out, in [0, 1); 0 where held-out data come from a place of their own."""
        if self.eval_data is not None:
            return 0.0
        return DEFAULT_EVAL_FRACTION if self.eval_fraction is None else self.eval_fraction


_BELOW_ONE = math.nextafter(1.0, 0.0)
_MAX = math.inf
_TINY = math.nextafter(0.0, 1.0)
_RANGES: Mapping[str, tuple[float, float]] = {
    "checkpoint_every": (1, _MAX),
    "eval_fraction": (0, _BELOW_ONE),
    "max_eval_examples": (1, _MAX),
    "max_length": (2, _MAX),
    "rho": (_TINY, 1),
    "select_interval": (1, _MAX),
    "select_watts": (_TINY, _MAX),
    "rank": (1, 256),
    "alpha": (_TINY, _MAX),
    "dropout": (0, _BELOW_ONE),
    "epochs": (_TINY, _MAX),
    "max_steps": (1, _MAX),
    "batch_size": (1, _MAX),
    "gradient_accumulation": (1, _MAX),
    "learning_rate": (_TINY, _MAX),
    "warmup": (0, _MAX),
    "seed": (0, 2**32 - 1),
}


_OF_SELECT = ("rho", "select_interval", "select_budget", "select_watts")


def _choices() -> dict[str, Sequence[str]]:
    fields = dataclasses.fields(FinetuneConfig)
    return {field.name: field.metadata["choices"] for field in fields if field.metadata["choices"]}


def _range_text(low: float, high: float) -> str:
    lower = "above 0" if low == _TINY else f"at least {low:g}"
    if high == _MAX:
        return f"must be {lower}"
    upper = "below 1" if high == _BELOW_ONE else f"at most {high:g}"
    return f"must be {lower} and {upper}"


def _require(condition: bool, name: str, rule: str, value: Any) -> None:
    if not condition:
        raise InputError(f"{option_name(name)} {rule}, got {value!r}")


def option_name(field: str) -> str:
    """How messages call a setting: as the option of the command line, ``MODEL`` for its argument."""
    return "MODEL" if field == "model" else "--" + field.replace("_", "-")


def changed_settings(config: FinetuneConfig) -> list[str]:
    """Names of settings that are not what they are by default."""
    return [field.name for field in dataclasses.fields(config) if getattr(config, field.name) != field.default]


# ---- from a YAML file and options


def given_settings(yaml_file: Path | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a YAML file, overridden by ``options`` (those that are not ``None``); no defaults are among them.

    Raises:
        InputError: the file cannot be read, a key is unknown, a value has another type, or MODEL or --data is missing.
    """
    settings = {} if yaml_file is None else _read_yaml(yaml_file)
    settings |= {name: value for name, value in options.items() if value is not None}
    missing = [name for name in ("model", "data") if settings.get(name) is None]
    if missing:
        raise InputError(f"{option_name(missing[0])} is missing: give it on the command line or in the --config file")
    return settings


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config: cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"--config: {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"--config: {path} must hold settings as 'name: value' lines, got a {type(content).__name__}")
    types = field_types()
    return {_known(key, path, types): _convert(key, value, types, path) for key, value in content.items()}


def field_types() -> dict[str, tuple[type, bool]]:
    """Type of each setting, and whether it may be ``None``."""
    hints = get_type_hints(FinetuneConfig)
    return {name: _split_optional(hint) for name, hint in hints.items()}


def _split_optional(hint: Any) -> tuple[type, bool]:
    members = get_args(hint)
    if not members:
        return hint, False
    (inner,) = (member for member in members if member is not type(None))
    return inner, True


def _name_of(key: Any) -> str:
    return str(key).replace("-", "_")


def _known(key: Any, path: Path, types: Mapping[str, Any]) -> str:
    name = _name_of(key)
    if name in types:
        return name
    close = difflib.get_close_matches(name, types, n=1)
    guess = f"did you mean {close[0]!r}?" if close else f"known settings are: {', '.join(sorted(types))}"
    raise InputError(f"--config: {path} has an unknown setting {str(key)!r}; {guess}")


def _convert(key: Any, value: Any, types: Mapping[str, tuple[type, bool]], path: Path) -> Any:
    wanted, optional = types[_name_of(key)]
    if value is None and optional:
        return None
    if _name_of(key) in ("target_modules", "recompute") and isinstance(value, list):
        return ",".join(str(item) for item in value)
    if wanted is float and not isinstance(value, bool):
        # YAML 1.1 reads 2e-4, without a point, as a string
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif type(value) is wanted:
        return value
    raise InputError(f"--config: {path}: {key!r} must be of type {wanted.__name__}, got {value!r}")
