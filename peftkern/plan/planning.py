"""From a configuration to what training it will take."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from peftkern.plan.errors import PlanError
from peftkern.plan.options import Options
from peftkern.plan.result import Plan

if TYPE_CHECKING:
    import torch

    from peftkern.plan.devices import Device

DEFAULT_BATCH, DEFAULT_LENGTH = 1, 1024


def plan(
    model: Any,
    *,
    method: str | None = None,
    rank: int = 16,
    target_modules: str | Sequence[str] = "all-linear",
    density: float = 0.01,
    quantization: str | None = None,
    block_size: int = 64,
    double_quant: bool = True,
    embeddings: str | None = None,
    head: str | None = None,
    dtype: str | torch.dtype | None = None,
    batch: int | None = None,
    length: int | None = None,
    gradient_checkpointing: bool = False,
    optimizer: str = "AdamW",
    logits: bool = True,
    recompute: str | Sequence[str] | None = None,
    patched: bool = True,
    labelled: float = 1.0,
    gradient_accumulation: int = 1,
    device: str | Device = "cpu",
    budget: str | float | None = None,
    keep: Collection[str] = (),
    split_batch: bool = False,
) -> Plan:
    """The memory and time of training ``model``, before anything of it is loaded.

        print(peftkern.plan("folder or name", length=2048, device="rtx-4090", budget="12GB"))

    The model is built of tensors without memory, quantized, given what is trained and patched, and runs one forward and
    backward pass, in which every storage is followed from its first to its last moment: what a step takes at its peak
    follows from the model's own operators. Memory is that of tensors. A process takes more: the interpreter and
    libraries, some 0.5 GB, and what its allocator does not give back. On GPUs the plan adds an estimate of what CUDA
    and its allocator take. Time is an estimate: operators at the rates of the device, which were measured where it is
    this machine's CPU and are derated figures of the makers for GPUs; the optimizer is not in it.

    With ``budget`` and without ``batch`` or ``length``, the largest that fits is searched: the length first, at batch
    1, up to what the model takes, then the batch. With both given, options that save memory are taken until it fits, in
    the order of what they cost in time: the loss without logits, `AdamW8bit`, int8 embeddings, an int8 head, 4-bit
    weights. Where all of them are not enough, each layer is given a word (`peftkern.patch`) so that the step takes the
    least time; models that are not patched get gradient checkpointing.

    Args:
        model: the name or folder of a transformers model, of which the configuration alone is read; a configuration; or
            a model, of which it is taken. A model without ``method`` is planned as it stands: quantized and patched
            or not, with the adapters that it has, and what requires a gradient is trained.
        method: ``"lora"``, ``"full"`` (every weight) or ``"sparse"`` (entries of the weights, `peftkern.sparse`).
            ``None``: ``"lora"``, but for a model as it stands.
        rank, target_modules: of the adapters; ``target_modules`` of sparse deltas as well.
        density: of sparse deltas, as a share of the entries of the layers that have some.
        quantization: ``"nf4"``, ``"fp4"``, ``"int8"`` or ``"none"``; ``"auto"``: of none, int8 and nf4 the one of least
            time that fits into ``budget``, and of equal ones the one that rounds least. ``None``: nf4, and none for
            ``"full"``.
        block_size, double_quant, embeddings, head: as in `peftkern.QuantConfig`.
        dtype: of the weights that are not quantized, and of activations. ``None``: float32 on the CPU, else bfloat16.
        batch, length: of the token ids, [batch, length]. ``None``: 1 and 1024, or what a budget allows.
        gradient_checkpointing: of every layer, not in the reentrant way.
        optimizer: ``"AdamW"`` or ``"AdamW8bit"``, of `peftkern.optim`, or ``"SGD"`` without momentum.
        logits, recompute: as in `peftkern.patch`; of words for layers, "store", "up", "mlp" and "layer".
        patched: whether the model is patched.
        labelled: share of the tokens that have a label.
        gradient_accumulation: passes of ``batch`` rows in a step, whose gradients are added.
        device: ``"cpu"``, or a GPU: rtx-3090, rtx-4090, rtx-5090, t4, l4, l40s, a100-40gb, a100-80gb, h100, h200, b200;
            or a `peftkern.plan.devices.Device`.
        budget: bytes, or text such as ``"12GB"`` (10⁹ bytes) or ``"11.5GiB"``.
        keep: names of arguments that a search for options leaves as they are: logits, optimizer, embeddings, head,
            quantization, recompute, gradient_checkpointing.
        split_batch: a search for options may divide ``batch`` into more passes of fewer rows, with as many in a step,
            where this takes less time than making layers again.

    Raises:
        PlanError: an argument does not fit; or nothing fits into ``budget``, and the message has the smallest figure
            that does.
    """
    from peftkern.plan import search
    from peftkern.plan.devices import find
    from peftkern.plan.predict import Predictor

    target = find(device) if isinstance(device, str) else device
    as_it_stands = method is None and _is_model(model)
    given = method if as_it_stands else method or "lora"
    auto = quantization == "auto"
    if auto and (budget is None or batch is None or length is None):
        raise PlanError("quantization='auto' is found for a budget, a batch and a length; give all three")
    if auto or quantization is None:
        quantization = "none" if given in ("full", None) else "nf4"
    options = Options(
        method=given,
        rank=rank,
        target_modules=target_modules if isinstance(target_modules, str) else tuple(target_modules),
        density=density,
        quantization=quantization,
        block_size=block_size,
        double_quant=double_quant,
        embeddings=embeddings,
        head=head,
        dtype=str(dtype).removeprefix("torch.") if dtype is not None else "bfloat16" if target.is_gpu else "float32",
        batch=DEFAULT_BATCH if batch is None else batch,
        length=DEFAULT_LENGTH if length is None else length,
        gradient_accumulation=gradient_accumulation,
        gradient_checkpointing=gradient_checkpointing,
        optimizer=optimizer,
        logits=logits,
        recompute=recompute if recompute is None or isinstance(recompute, str) else tuple(recompute),
        patched=patched,
        labelled=labelled,
    )
    predictor = Predictor(model, target)
    if budget is not None:
        freedom = search.Freedom(frozenset(keep), auto, split_batch)
        options = search.fit(predictor, options, search.parse_bytes(budget), batch is None, length is None, freedom)
    found = predictor.plan(options)
    return found if budget is None else found.within(search.parse_bytes(budget))


def _is_model(model: Any) -> bool:
    from torch import nn

    return isinstance(model, nn.Module)


__all__ = ["PlanError", "plan"]
