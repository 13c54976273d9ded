"""From the name of a model to one that is quantized, prepared for its training method and runs on the kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkern.finetune import gguf
from peftkern.finetune.config import FinetuneConfig
from peftkern.finetune.errors import InputError
from peftkern.finetune.methods import METHODS
from peftkern.patch import PatchReport, patch

if TYPE_CHECKING:
    from peftkern.select.method import Method


@dataclass(frozen=True)
class ModelSource:
    """What ``from_pretrained`` takes: a folder or a hub id. ``name`` is what the user called it."""

    load_from: str
    name: str


@dataclass(frozen=True)
class AdaptedModel:
    """A model on fused kernels, and what was done to it. ``trained`` is how many numbers training starts with."""

    model: Any
    report: PatchReport
    quantization: str
    method: Method | None
    trained: int


def find_model(name: str, say: Callable[[str], None]) -> ModelSource:
    """Where to load a model from; a GGUF file is converted, or found in the cache. ``say`` is told what takes long.

    Raises:
        InputError: the path is no model folder and no GGUF file, or does not exist.
        RunError: the cache cannot be written.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"MODEL: the folder {name} has no config.json; give a model folder of transformers")
        return ModelSource(str(path), name)
    if path.is_file():
        return ModelSource(str(gguf.model_folder(path, say)), name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix == ".gguf":
        raise InputError(f"MODEL: there is no file or folder {name}")
    return ModelSource(name, name)


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer.

    Raises:
        InputError: the model, or its tokenizer, cannot be found or read.
    """
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, source)


def padding_token(tokenizer: Any) -> int:
    """A token to pad with. Any will do, since padding is masked."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


def load_model_config(source: ModelSource) -> Any:
    """The model's configuration; a quantization by bitsandbytes in it becomes a ``QuantConfig``.

    Raises:
        InputError: the model cannot be found or read.
    """
    from peftkern.integrations import config_from_pretrained

    return _loading(lambda: config_from_pretrained(source.load_from), source)


def load_adapted_model(
    config: FinetuneConfig, source: ModelSource, model_config: Any, method: Method | None
) -> AdaptedModel:
    """Load and quantize the model, prepare it for its method, and patch it.

    Raises:
        InputError: the model cannot be loaded, ``target_modules`` names nothing in it, or the method cannot train it.
    """
    import torch
    from transformers import set_seed

    torch.set_float32_matmul_precision(config.matmul_precision)
    model, quantization = _load_quantized(config, source, model_config)
    model.config.use_cache = False  # of no use in training, and in the way of gradient checkpointing
    set_seed(config.seed)  # so that the adapter's initial values do not depend on what loading drew
    if METHODS[config.method].low_rank:
        model = _attach_adapter(config, model)
    if method is not None:
        _prepare(method, model, config)
    try:
        report = patch(model, logits=config.logits, recompute=config.recompute_words)
    except ValueError as error:
        raise InputError(f"--recompute: {_first_line(error).removeprefix('patch: recompute: ')}") from error
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return AdaptedModel(model, report, quantization, method, trained)


def _prepare(method: Method, model: Any, config: FinetuneConfig) -> None:
    try:
        method.prepare(model)
    except (ValueError, TypeError) as error:
        option = f"--method {config.method}" if config.select is None else f"--select {config.select}"
        raise InputError(f"{option}: {_first_line(error)}") from error


def _load_quantized(config: FinetuneConfig, source: ModelSource, model_config: Any) -> tuple[Any, str]:
    import torch
    from transformers import AutoModelForCausalLM

    from peftkern.integrations import QuantConfig

    options: dict[str, Any] = {"dtype": dtype_of(config.dtype)}
    if torch.cuda.is_available():
        options["device_map"] = {"": torch.cuda.current_device()}
    existing = getattr(model_config, "quantization_config", None)
    if existing is not None:
        method = existing.get("quant_method") if isinstance(existing, dict) else existing.quant_method
        if not config.embeddings is config.head is None:
            raise InputError("--embeddings, --head: the checkpoint is quantized already, and stays what it is")
        model = _from_pretrained(AutoModelForCausalLM, source, config=model_config, **options)
        return model, f"as the checkpoint has it ({getattr(method, 'value', method)})"
    if config.quantization != "none":
        double_quant = config.double_quant and config.quantization != "int8"
        options["quantization_config"] = QuantConfig(
            config.quantization, config.block_size, double_quant, embeddings=config.embeddings, head=config.head
        )
    model = _from_pretrained(AutoModelForCausalLM, source, **options)
    return model, _describe_quantization(config)


def _describe_quantization(config: FinetuneConfig) -> str:
    if config.quantization in ("none", "int8"):
        described = config.quantization
    else:
        scales = ", scales quantized as well" if config.double_quant else ""
        described = f"{config.quantization}, blocks of {config.block_size}{scales}"
    ends = {"embeddings": config.embeddings, "head": config.head}
    return "; ".join([described, *(f"{name} {format}" for name, format in ends.items() if format is not None)])


def dtype_of(name: str) -> Any:
    """PyTorch's, of what ``--dtype`` says."""
    import torch

    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, name)


def _from_pretrained(auto_class: Any, source: ModelSource, **options: Any) -> Any:
    return _loading(lambda: auto_class.from_pretrained(source.load_from, **options), source)


def _loading(load: Callable[[], Any], source: ModelSource) -> Any:
    try:
        return load()
    except Exception as error:  # transformers, safetensors and the hub's client each raise types of their own
        hint = (
            "" if Path(source.load_from).exists() else "; it is no local file or folder, so it was taken for a hub id"
        )
        raise InputError(f"MODEL: cannot load {source.name}{hint}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _attach_adapter(config: FinetuneConfig, model: Any) -> Any:
    import peft

    adapter = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_module_names,
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, adapter)
    except ValueError as error:
        raise InputError(f"--target-modules: {_first_line(error)}") from error
