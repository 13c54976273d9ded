"""`patch` and `unpatch`: the class swap over a model, and the way back.

`patch` first looks at every module and only then changes any; should the change itself fail, it is undone. Modules are
told apart by what their class computes, never by the name or family of the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from peftkern.backends import registry
from peftkern.ops.lora_mlp import RECOMPUTE
from peftkern.patch import fused
from peftkern.patch.examine import Finding, examine, words_of_layers
from peftkern.patch.fused import STATE, LayerState
from peftkern.patch.layer_plan import LayerPlan, read_plan
from peftkern.patch.report import PatchReport
from peftkern.patch.shared_input import SharedInput
from peftkern.patch.weights import original_class


class PatchError(RuntimeError):
    """`patch` or `unpatch` could not do what it was asked to; the model is as it was."""


def patch(
    model: nn.Module,
    *,
    kernels: str = "auto",
    strict: bool = False,
    logits: bool = True,
    recompute: str | Sequence[str] | None = None,
) -> PatchReport:
    """Let the linear layers of ``model`` that are quantized or carry LoRA adapters run on fused kernels, in place.

    Takes the LoRA layers of PEFT over dense, bitsandbytes (4 and 8 bit) and `QuantizedLinear` bases, bitsandbytes
    layers without adapter, and the feed-forward blocks of `transformers` that SiLU or GELU gates, over any layers:
    those keep two tensors for the backward pass instead of three. Layers with sparse deltas (`peftkern.sparse`), with
    adapters over them or without, run base, adapters and deltas as one operation; adapters over a masked weight run as
    one with it. The root mean square norms of `transformers` and PyTorch run as one kernel, and keep one tensor; those
    of short inputs run their own code, which is faster there, and so do all under ``torch.compile``. Packed experts of
    a mixture whose parameters carry LoRA (`target_parameters`) each multiply the tokens that were sent to them.

    Only the class of these instances changes, to a subclass of itself. Adapters may be added, switched, disabled,
    merged and saved afterwards through PEFT's own calls; where PEFT creates new layers, call `patch` again. What the
    fused product does not cover (aLoRA and other variants, `adapter_names`, hooks on inner layers) runs the code that
    it ran before, and is named in the report or, when it depends on the call, logged and counted in the next report.

    With ``logits=False``, causal language models of `transformers` that compute their loss from the logits of a linear
    head and nothing else do so without them in training, when they are given labels: tokens without a label cost
    nothing, and ``logits`` of the output is ``None``. The head is dense or quantized, frozen, trained or under LoRA.
    Without labels, in evaluation mode, with ``logits_to_keep`` or under ``torch.compile`` their own forward runs. A
    head with adapters of another kind keeps the logits, and the report says so.

    With ``recompute="mlp"``, a gated block keeps its input for the backward pass and none of the wider tensors inside,
    which it makes again there at the price of two products. ``"up"`` makes again the half that is not gated, one
    product. The numbers are the same. A block whose layers do more than their product (hooks,
    masks, adapters other than LoRA) keeps what it kept, and the report says why. What was asked for holds until
    `unpatch`, or until another value is given.

    A sequence is a plan with a word for each decoder layer, in their order, as ``["mlp"] * 12 + ["store"] * 4``:

        "store"     keeps what it needs
        "up", "mlp" what is said above, of the gated block in this layer
        "layer"     is made again as a whole, as by the gradient checkpointing of `transformers` (not reentrant), at the
                    price of its forward pass
        "offload"   what it keeps is copied to the CPU's memory, and back when it is needed; for layers on a GPU
        "int8", "float16"  what it keeps is rounded (`peftkern.nn.saved_activations`), and gradients take the error

    All but the last two leave losses and gradients as they are, bit for bit. A plan acts in training mode, and gradient
    checkpointing of the whole model has to be off: otherwise the layers raise. Layers that are made again, offloaded or
    rounded do without the cache of keys and values.

    Where a backend has a form for it, layers that a block calls with one and the same tensor (queries, keys and values;
    the two halves of a gated block) are computed as one group, and the report says so. A block that does not ask for
    all of them is found out at its second call, and its layers then run one by one.

    Two differences to the code replaced: one rounding to the dtype of x instead of several, sums being in float32; and
    over bitsandbytes' int8, the exact product with the dequantized weight, where bitsandbytes rounds activations.

    Args:
        model: any module: a `transformers` model, a `peft.PeftModel`, a part of one.
        kernels: ``"auto"``, or the name of the backend that must run every patched module.
        strict: raise when a LoRA layer over a linear layer, a bitsandbytes linear layer, or a layer with sparse deltas
            has to be left alone.
        logits: whether language models give logits in training although they are given labels. Some trainers read them.

        recompute: what gated blocks make again in the backward pass: ``"mlp"``, ``"up"``; a plan with a word for each
            decoder layer; or ``None`` for nothing that was not asked for before.

    Returns:
        A report with one row per module; ``str(report)`` groups the layers of a model.

    Raises:
        TypeError: ``model`` is no module, or ``recompute`` neither text nor a sequence.
        ValueError: ``kernels`` names no backend, or ``recompute`` is unknown, has not a word for each layer, or asks a
            layer for what it cannot do. The model is unchanged.
        PatchError: with ``strict``, a module could not be taken; or ``kernels`` cannot run one. The model is unchanged.
    """
    _check_model("patch", model)
    if kernels != "auto" and kernels not in registry.PREFERENCE:
        raise ValueError(f"patch: kernels must be 'auto' or one of {list(registry.PREFERENCE)}, got {kernels!r}")
    wanted = _checked_recompute(model, recompute)
    backend = None if kernels == "auto" else kernels
    try:
        findings = examine(model, backend, logits, wanted)
    except registry.BackendError as error:
        raise PatchError(f"patch: kernels={kernels!r}: {error}; the model is unchanged") from error
    rows = tuple(finding.row for finding in findings if finding.row is not None)
    report = PatchReport(rows, words_of_layers(findings))
    if strict:
        _check_all_taken(report)
    _swap(findings, backend)
    return report


def unpatch(model: nn.Module) -> int:
    """Give every patched module of ``model`` back the class that it had; its outputs are bit-identical again.

    Unmerge adapters from `QuantizedLinear` layers before: PEFT itself cannot, and the weight from before they were
    merged is kept only while the model is patched.

    Returns:
        How many modules were put back; 0 for a model that is not patched.

    Raises:
        TypeError: ``model`` is no module.
        PatchError: a patched module has been given yet another class since (`fully_shard` does). Nothing was changed.
    """
    _check_model("unpatch", model)
    modules = patched_modules(model)
    for name, module in modules.items():
        if "_peftkern_original" not in type(module).__dict__:
            raise PatchError(f"unpatch: {name} was patched and then became a {type(module).__name__}; undo that first")
    for module in modules.values():
        fused.set_class(module, original_class(type(module)))
        shared = module.__dict__.pop(STATE).shared
        if shared is not None:
            shared.forget()
    registry.release()
    return len(modules)


def patched_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The patched modules of ``model`` by name."""
    return {name: module for name, module in model.named_modules() if fused.is_fused(module)}


@contextmanager
def originals(modules: Iterable[nn.Module]) -> Iterator[None]:
    """In this context those of ``modules`` that are patched have their original class."""
    swapped = [(module, type(module)) for module in modules if fused.is_fused(module)]
    try:
        for module, layer_class in swapped:
            fused.set_class(module, original_class(layer_class))
        yield
    finally:
        for module, layer_class in swapped:
            fused.set_class(module, layer_class)


def _checked_recompute(model: nn.Module, recompute: str | Sequence[str] | None) -> str | LayerPlan | None:
    if recompute is None or recompute in RECOMPUTE:
        return recompute
    if isinstance(recompute, str):
        known = ", ".join(RECOMPUTE)
        raise ValueError(f"patch: recompute must be one of {known}, a word for each layer, or None; got {recompute!r}")
    return read_plan(model, recompute)


def _check_model(function: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def _check_all_taken(report: PatchReport) -> None:
    missed = [row for row in report.left if row.wanted]
    if not missed:
        return
    lines = "\n".join(f"  {row.module}: {row.reason}" for row in missed[:10])
    more = f"\n  and {len(missed) - 10} more" if len(missed) > 10 else ""
    raise PatchError(
        f"patch: strict=True, and {len(missed)} modules cannot be taken; the model is unchanged. "
        f"strict=False leaves them on their own code.\n{lines}{more}"
    )


def _swap(findings: list[Finding], backend: str | None) -> None:
    warned = {finding.row.reason for finding in findings if finding.row is not None and finding.row.action == "left"}
    done: list[tuple[nn.Module, type, LayerState | None]] = []
    try:
        for finding in findings:
            if finding.layer_class is None:
                continue
            module, before = finding.module, finding.module.__dict__.get(STATE)
            done.append((module, type(module), before))
            state = LayerState(finding.name, backend, warned, finding.recompute)
            if before is not None:
                state = replace(before, name=finding.name, backend=backend, recompute=finding.recompute, shared=None)
            module.__dict__[STATE] = state
            if not fused.is_fused(module):
                fused.set_class(module, finding.layer_class)
        _share_inputs(findings)
    except BaseException:
        for module, layer_class, before in reversed(done):
            _restore(module, layer_class, before)
        raise


def _share_inputs(findings: list[Finding]) -> None:
    groups: defaultdict[tuple[str, ...], list[nn.Module]] = defaultdict(list)
    for finding in findings:
        if finding.group:
            groups[finding.group].append(finding.module)
    for layers in groups.values():
        shared = SharedInput(layers)
        for layer in layers:
            layer.__dict__[STATE].shared = shared


def _restore(module: nn.Module, layer_class: type, state: LayerState | None) -> None:
    if type(module) is not layer_class:
        fused.set_class(module, layer_class)
    if state is None:
        module.__dict__.pop(STATE, None)
    else:
        module.__dict__[STATE] = state
