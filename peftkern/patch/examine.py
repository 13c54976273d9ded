"""What each module of a model is, what would run it, and why not."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.backends import by_tokens, registry
from peftkern.formats import QuantizedTensor
from peftkern.nn.masked_linear import mask_of, masked_weight
from peftkern.nn.sparse_linear import deltas_of, under_deltas
from peftkern.ops.lora_linear_group import backend_for
from peftkern.ops.norm import NormForm
from peftkern.patch import fused
from peftkern.patch.arguments import (
    LayerArguments,
    check_base,
    has_own_forward,
    is_lora_class,
    running_adapters,
    with_adapters,
    with_deltas,
)
from peftkern.patch.attention import SDPA, rotary_kind
from peftkern.patch.decoder_layer import BEHIND, is_decoder_layer
from peftkern.patch.experts import experts_behind, holds_packed_experts, is_param_wrapper, read_experts
from peftkern.patch.fused import STATE
from peftkern.patch.gated import is_gated_mlp
from peftkern.patch.language_model import NO_LOGITS, check_model, is_language_model
from peftkern.patch.layer_plan import TEXTS, LayerPlan, is_planned_layer
from peftkern.patch.norms import FEW_RUN_ORIGINAL, norm_kind, read_norm
from peftkern.patch.recompute import KEEPS, MADE_AGAIN, read_block
from peftkern.patch.report import PatchRow
from peftkern.patch.shared_input import group_members, sibling_groups
from peftkern.patch.weights import NotFused, base_kind, original_class, read_weight

_NOT_LINEAR = ("Embedding", "_ConvNd", "MultiheadAttention")
"""Classes of `peft.tuners.lora.layer` that adapt something else than a linear layer."""


OWN_FORWARD = "its forward was replaced on the instance (accelerate's hooks do that), in front of its class"


DELTAS_ALONE = "runs alone, not with the layers that share its input: it has sparse deltas"
MASK_ALONE = "runs alone, not with the layers that share its input: it has a mask"
DORA_ALONE = "runs alone, not with the layers that share its input: its adapter is DoRA's"
OURS = "a module of peftkern, runs it unpatched"


@dataclass(frozen=True)
class Finding:
    """One module.

    Attributes:
        name: in the model.
        module: itself.
        row: in the report, if it gets one.
        layer_class: its fused class, if it is to be patched.
        arguments: of its product, if it has one that runs now.
        recompute: what a gated block makes again in the backward pass, or the word of a decoder layer in a plan.
        group: names of the layers that it shares its input with, itself included; empty where it has none.
    """

    name: str
    module: nn.Module
    row: PatchRow | None
    layer_class: type | None = None
    arguments: LayerArguments | None = None
    recompute: str | None = None
    group: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Setting:
    """What holds for the whole model: the forced backend, and the dtype of activations to choose kernels for."""

    backend: str | None
    dtype: torch.dtype


def examine(
    model: nn.Module, backend: str | None, logits: bool = True, recompute: str | LayerPlan | None = None
) -> list[Finding]:
    """All modules of ``model`` that `patch` has something to say about, outermost first; language models at the end.

    ``recompute``: of all gated blocks, or of every layer.

    Raises:
        BackendError: ``backend`` cannot run one of them.
    """
    setting = _Setting(backend, _activation_dtype(model))
    findings = {finding.name: finding for finding in _findings(model, setting)}
    whole = [] if logits and not _has_loss_alone(model) else list(_language_models(model, setting))
    for group in sibling_groups(_in_features(findings.values())):
        members = [findings[name] for name in group]
        findings |= {finding.name: finding for finding in _in_group(members, setting)}
    plan = _earlier_plan(model) if recompute is None else {} if isinstance(recompute, str) else recompute
    of_blocks = None if isinstance(recompute, Mapping) else recompute
    findings |= {finding.name: finding for finding in _recomputing(findings, of_blocks, plan, setting)}
    following = {finding.name: finding for finding in _following(model, findings, plan)}
    others = [finding for name, finding in findings.items() if name not in following]
    return [*others, *following.values(), *whole]


def words_of_layers(findings: Iterable[Finding]) -> tuple[str, ...]:
    """The plan that the decoder layers follow, in their order; empty where there is none."""
    return tuple(
        finding.recompute
        for finding in findings
        if finding.recompute is not None and is_planned_layer(original_class(type(finding.module)))
    )


def _findings(model: nn.Module, setting: _Setting) -> Iterator[Finding]:
    adapter, adapter_is_fused, copied = None, False, None
    for name, module in model.named_modules():
        if _is_inside(name, adapter):
            if _is_swapped_base(module):
                finding = _base_finding(name, module, setting, "the base layer alone")
                yield replace(finding, row=None) if adapter_is_fused else finding
        elif _is_a(module, "peft.tuners.tuners_utils", "BaseTunerLayer"):
            finding = _adapter_finding(name, module, setting)
            adapter, adapter_is_fused = name, finding.row is not None and finding.row.action == "fused"
            yield finding
        elif _is_swapped_base(module):
            yield _base_finding(name, module, setting, "no adapter")
        elif _is_a(module, "peft.utils.other", "AuxiliaryTrainingWrapper"):
            copied = name
            yield Finding(name, module, _left(name, module, "trained in full, beside the original (modules_to_save)"))
        elif _is_inside(name, copied):
            continue
        elif is_gated_mlp(original_class(type(module))):
            yield _gated_finding(name, module, setting)
        elif norm_kind(original_class(type(module))) is not None:
            yield _norm_finding(name, module, setting)
        elif rotary_kind(original_class(type(module))) is not None:
            yield _attention_finding(name, module, setting)
        elif is_decoder_layer(original_class(type(module))):
            yield _decoder_layer_finding(name, module, setting)
        elif isinstance(module, nn.Linear):
            yield _plain_finding(name, module, setting)
        elif _is_a(module, "transformers.pytorch_utils", "Conv1D"):
            yield Finding(name, module, _left(name, module, "dense, no adapter"))
        elif holds_packed_experts(module):
            yield Finding(name, module, _left(name, module, "packed experts, no adapter"))


def _language_models(model: nn.Module, setting: _Setting) -> Iterator[Finding]:
    for name, module in model.named_modules():
        if is_language_model(original_class(type(module))):
            yield _language_model_finding(name, module, setting)


def _has_loss_alone(model: nn.Module) -> bool:
    """Whether an earlier `patch` has taken a language model: then a later one reports it."""
    return any(fused.is_fused(module) and is_language_model(type(module)) for module in model.modules())


def _is_inside(name: str, outer: str | None) -> bool:
    return outer is not None and (outer == "" or name.startswith(f"{outer}."))


def _is_a(module: nn.Module, defined_in: str, *class_names: str) -> bool:
    """`isinstance` for classes of packages that may not be there; nothing can be of a class that nobody imported."""
    package = sys.modules.get(defined_in)
    return package is not None and isinstance(module, tuple(getattr(package, name) for name in class_names))


def _activation_dtype(model: nn.Module) -> torch.dtype:
    dtype = getattr(model, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.get_default_dtype()


def _is_swapped_base(module: nn.Module) -> bool:
    return bool(deltas_of(module)) or _is_of_bitsandbytes(module)


def _is_of_bitsandbytes(module: nn.Module) -> bool:
    kind = base_kind(original_class(type(module)))
    return kind is not None and kind.swap


# ---- rows


def _class_name(module: nn.Module) -> str:
    layer_class = under_deltas(original_class(type(module)))
    name = layer_class.__qualname__
    if layer_class.__module__.startswith("peft.tuners."):
        return ".".join([layer_class.__module__.removeprefix("peft.tuners.").removesuffix(".layer"), name])
    return f"bnb.{name}" if layer_class.__module__.startswith("bitsandbytes.") else name


def _describe(weight: Tensor | QuantizedTensor) -> str:
    form = weight.format if isinstance(weight, QuantizedTensor) else str(weight.dtype).removeprefix("torch.")
    return f"{form} {weight.shape[0]}×{weight.shape[1]}"


def _left(name: str, module: nn.Module, reason: str, weight: str = "", wanted: bool = False) -> PatchRow:
    return PatchRow(name, _class_name(module), weight, "left", reason=reason, wanted=wanted, calls_left=_calls(module))


def _calls(module: nn.Module) -> dict[str, int]:
    state = module.__dict__.get(STATE)
    return {} if state is None else dict(state.calls_left)


def _unused(module: nn.Module) -> int:
    state = module.__dict__.get(STATE)
    return 0 if state is None else state.unused


def _fused(name: str, module: nn.Module, arguments: LayerArguments, kernel: str, notes: Sequence[str]) -> PatchRow:
    mask_note = "" if arguments.mask is None else f"keeps {arguments.mask.density:.3g} of its weight"
    note = "; ".join(note for note in (*notes, mask_note) if note)
    weight, entries = arguments.weight, sum(map(len, arguments.indices))
    row = PatchRow(name, _class_name(module), _describe(weight), "fused", kernel, note, True, _calls(module))
    return replace(row, unused=_unused(module), entries=entries, density=entries / max(weight.shape.numel(), 1))


def _token(arguments: LayerArguments, setting: _Setting) -> Tensor:
    """One token, [1, in], as the product takes it."""
    weight = arguments.weight
    dtype = setting.dtype if isinstance(weight, QuantizedTensor) else weight.dtype
    return torch.empty(1, weight.shape[1], dtype=arguments.compute_dtype(dtype), device=weight.device)


def _kernel(arguments: LayerArguments, setting: _Setting) -> str:
    row = _token(arguments, setting)
    operands = (arguments.weight, arguments.adapters(), arguments.total_bias())
    if arguments.mask is not None:
        masked = (arguments.weight, arguments.mask, *operands[1:])
        describe = by_tokens.describe(
            "masked_linear", lambda tokens: (row.expand(tokens, -1), *masked), setting.backend
        )
        return f"masked_linear on {describe}"
    chosen = by_tokens.describe("lora_linear", lambda tokens: (row.expand(tokens, -1), *operands), setting.backend)
    if arguments.magnitude is not None:
        return f"dora_linear on {chosen}"
    if not arguments.values:
        return f"lora_linear on {chosen}"
    delta = (arguments.values[0], arguments.indices[0], arguments.delta_scaling[0])
    backend = registry.choose("sparse_delta", row, row, *delta, backend=setting.backend).backend
    elsewhere = "" if chosen.split()[0] == backend else f", deltas on {backend}"
    return f"sparse_delta_linear on {chosen}{elsewhere}"


def _weight_notes(base: nn.Module, weight: Tensor | QuantizedTensor) -> list[str]:
    kind = base_kind(original_class(type(base)))
    notes = [kind.note] if kind is not None else []
    if _is_decoded_wrongly_by_bitsandbytes(base, weight):
        notes.append(
            f"bitsandbytes itself decodes rows of {weight.shape[1]} wrongly on the CPU; this product follows the format"
        )
    return notes


def _is_decoded_wrongly_by_bitsandbytes(base: nn.Module, weight: Tensor | QuantizedTensor) -> bool:
    # its CPU kernel takes rows that are no whole number of blocks as if each began a new block
    if not _is_of_bitsandbytes(base) or not isinstance(weight, QuantizedTensor) or weight.format == "int8":
        return False
    columns = weight.shape[1]
    return weight.device.type == "cpu" and columns % 16 == 0 and columns % weight.block_size != 0


# ---- the kinds of modules


def _plain_finding(name: str, module: nn.Linear, setting: _Setting) -> Finding:
    mask = mask_of(module)
    if mask is None and not _is_a(module, "peftkern.nn.quantized_linear", "QuantizedLinear"):
        return Finding(name, module, _left(name, module, "dense, no adapter"))
    # not `read_weight`, which refuses a trained one: a masked layer may train its own
    arguments = LayerArguments(module, masked_weight(module), module.bias, mask=mask)
    return Finding(name, module, _fused(name, module, arguments, _kernel(arguments, setting), [OURS]))


def _language_model_finding(name: str, model: Any, setting: _Setting) -> Finding:
    try:
        weight = check_model(model).weight
    except NotFused as refusal:
        return Finding(name, model, _left(name, model, str(refusal)))
    hidden = torch.empty(0, weight.shape[1], dtype=setting.dtype, device=weight.device)
    choice = registry.choose("linear_cross_entropy", hidden, weight, backend=setting.backend)
    kernel = f"linear_cross_entropy on {choice.backend}"
    row = PatchRow(name, _class_name(model), "", "fused", kernel, NO_LOGITS, calls_left=_calls(model))
    return Finding(name, model, row, fused.fused_class(original_class(type(model))))


def _gated_finding(name: str, block: Any, setting: _Setting) -> Finding:
    try:
        if has_own_forward(block):
            raise NotFused(OWN_FORWARD)
        activation = fused.read_activation(block.act_fn)
    except NotFused as refusal:
        return Finding(name, block, _left(name, block, str(refusal)))
    device = next((parameter.device for parameter in block.parameters()), None)
    gate = torch.empty(1, dtype=setting.dtype, device=device)
    choice = registry.choose("silu_mul", gate, gate, activation, backend=setting.backend)
    kernel = f"silu_mul on {choice.backend}"
    row = PatchRow(name, _class_name(block), "", "fused", kernel, wanted=True, calls_left=_calls(block))
    return Finding(name, block, row, fused.fused_class(original_class(type(block))))


def _norm_finding(name: str, norm: Any, setting: _Setting) -> Finding:
    kind = norm_kind(original_class(type(norm)))
    assert kind is not None
    try:
        if has_own_forward(norm):
            raise NotFused(OWN_FORWARD)
        weight, eps = read_norm(norm, kind)
        row = torch.empty(1, 1, dtype=setting.dtype, device=None if weight is None else weight.device)
        choice = _choice_of("norm", row, (row, None, None, None, NormForm(eps)), setting)
    except NotFused as refusal:
        return Finding(name, norm, _left(name, norm, str(refusal)))
    note = FEW_RUN_ORIGINAL if choice.reason != "forced" else ""
    kernel = f"rms_norm on {choice.backend}"
    report_row = PatchRow(name, _class_name(norm), "", "fused", kernel, note, calls_left=_calls(norm))
    return Finding(name, norm, report_row, fused.fused_class(original_class(type(norm))))


def _choice_of(operation: str, row: Tensor, arguments: Sequence[Any], setting: _Setting) -> registry.Choice:
    """Which backend runs ``operation``; `NotFused` where none does better than the module itself."""
    try:
        choice = registry.choose(operation, *arguments, backend=setting.backend)
    except registry.BackendError as error:  # there are backends of linear layers alone
        raise NotFused(str(error)) from None
    if choice.backend == "reference" and choice.reason != "forced" and not _stands_for_the_cpu(row):
        raise NotFused(f"no kernel for {row.dtype} on {row.device.type}: {choice.reason}")
    return choice


def _stands_for_the_cpu(row: Tensor) -> bool:
    """Whether ``row`` is of a model on the meta device, and not one whose launches on a GPU are counted."""
    return row.is_meta and registry.choose("silu_mul", row, row, "silu").backend == "reference"


def _device_of(module: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in module.parameters()), None)


def _attention_finding(name: str, block: nn.Module, setting: _Setting) -> Finding:
    kind = rotary_kind(original_class(type(block)))
    assert kind is not None
    state = torch.empty(1, 1, 1, 2, dtype=setting.dtype, device=_device_of(block))
    calls: dict[str, Sequence[Any]] = {}
    if kind.is_ours:
        calls["rotary"] = ((state,), state[0], state[0], False, False)
    attends = getattr(getattr(block, "config", None), "_attn_implementation", None) == SDPA
    if attends:
        calls["attention"] = (state, state, state, None)
    try:
        if has_own_forward(block):
            raise NotFused(OWN_FORWARD)
        if not calls:
            raise NotFused(f"does not attend by {SDPA!r}")
        kernel = _kernels_of(calls, state, setting)
    except NotFused as refusal:
        return Finding(name, block, _left(name, block, str(refusal)))
    row = PatchRow(name, _class_name(block), "", "fused", kernel, calls_left=_calls(block))
    return Finding(name, block, row, fused.fused_class(original_class(type(block))))


def _kernels_of(calls: Mapping[str, Sequence[Any]], row: Tensor, setting: _Setting) -> str:
    """The operations that run here and their backend; `NotFused` where none does."""
    (first, arguments), *others = calls.items()
    chosen, operations = _choice_of(first, row, arguments, setting), [first]
    for operation, arguments in others:
        with suppress(NotFused):
            if _choice_of(operation, row, arguments, setting).backend == chosen.backend:
                operations.append(operation)
    return f"{' and '.join(operations)} on {chosen.backend}"


def _decoder_layer_finding(name: str, layer: Any, setting: _Setting) -> Finding:
    norm = getattr(layer, BEHIND)
    finding = _norm_finding(BEHIND, norm, setting) if norm_kind(original_class(type(norm))) is not None else None
    try:
        if has_own_forward(layer):
            raise NotFused(OWN_FORWARD)
        if finding is None or finding.row is None or finding.layer_class is None:
            raise NotFused(f"no fused form of the norm behind its sum, {type(norm).__name__}")
    except NotFused as refusal:
        return Finding(name, layer, _left(name, layer, str(refusal)))
    kernel = finding.row.kernel.replace("rms_norm", "rms_norm with residual")
    row = PatchRow(name, _class_name(layer), "", "fused", kernel, finding.row.reason, calls_left=_calls(layer))
    return Finding(name, layer, row, fused.fused_class(original_class(type(layer))))


def _base_finding(name: str, module: nn.Module, setting: _Setting, note: str) -> Finding:
    try:
        if has_own_forward(module):
            raise NotFused(OWN_FORWARD)
        arguments = with_deltas(module, read_weight(module))
    except NotFused as refusal:
        return Finding(name, module, _left(name, module, str(refusal), wanted=True))
    notes = ["" if arguments.values else note, *_weight_notes(module, arguments.weight)]
    row = _fused(name, module, arguments, _kernel(arguments, setting), notes)
    return Finding(name, module, row, fused.fused_class(original_class(type(module))), arguments)


def _adapter_finding(name: str, layer: Any, setting: _Setting) -> Finding:
    if not _is_a(layer, "peft.tuners.lora.layer", "LoraLayer"):
        return Finding(name, layer, _left(name, layer, "an adapter of another kind than LoRA"))
    if _is_a(layer, "peft.tuners.lora.layer", *_NOT_LINEAR):
        return Finding(name, layer, _left(name, layer, "LoRA on something else than a linear layer"))
    if is_param_wrapper(original_class(type(layer))):
        return _experts_finding(name, layer, setting)
    try:
        weight = _check_layer(layer)
    except NotFused as refusal:
        return Finding(name, layer, _left(name, layer, str(refusal), wanted=True))
    layer_class = fused.fused_class(original_class(type(layer)))
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    try:
        arguments = with_adapters(with_deltas(layer.base_layer, weight), layer, active)
    except NotFused as refusal:
        # swapped all the same: other adapters may become active, and merging may need it
        return Finding(name, layer, _left(name, layer, str(refusal), _describe(weight), wanted=True), layer_class)
    notes = [_idle_note(layer), *_weight_notes(layer.base_layer, weight)]
    row = _fused(name, layer, arguments, _kernel(arguments, setting), notes)
    return Finding(name, layer, row, layer_class, arguments if running_adapters(layer) else None)


def _experts_finding(name: str, layer: Any, setting: _Setting) -> Finding:
    try:
        experts_behind(layer)
    except NotFused as refusal:
        return Finding(name, layer, _left(name, layer, str(refusal)))
    try:
        if has_own_forward(layer):
            raise NotFused(OWN_FORWARD)
        stack = read_experts(layer).gate_up
    except NotFused as refusal:
        return Finding(name, layer, _left(name, layer, str(refusal), wanted=True))
    lora_A, lora_B = stack.adapters_of(0)
    first = LayerArguments(
        layer.get_base_layer(), stack.weight[0], None, lora_A, lora_B, stack.scaling, [0.0] * len(lora_A)
    )
    weight, kernel = f"{len(stack.weight)} experts, {_describe(stack.weight[0])}", _kernel(first, setting)
    row = PatchRow(name, _class_name(layer), weight, "fused", kernel, _idle_note(layer), True, _calls(layer))
    return Finding(name, layer, row, fused.fused_class(original_class(type(layer))))


def _check_layer(layer: Any) -> Tensor | QuantizedTensor:
    """The base weight of a LoRA layer, or `NotFused` with what keeps the layer, whatever its adapters, from it."""
    original = original_class(type(layer))
    if not is_lora_class(original):
        raise NotFused(f"{_class_name(layer)} computes something of its own")
    if has_own_forward(layer):
        raise NotFused(OWN_FORWARD)
    check_base(layer.base_layer)
    return read_weight(layer.base_layer)


# ---- gated blocks that make again what they need


def _recomputing(
    findings: Mapping[str, Finding], recompute: str | None, plan: LayerPlan, setting: _Setting
) -> Iterator[Finding]:
    """The fused gated blocks, with what they make again in the backward pass."""
    for finding in findings.values():
        asked = _word_of_block(finding.name, plan) if plan else recompute or _recompute(finding.module)
        if asked is None or finding.row is None or finding.layer_class is None:
            continue
        if not is_gated_mlp(original_class(type(finding.module))):
            continue
        why = _why_not_recomputed(finding, findings, setting)
        note = f"{KEEPS}: {why}" if why else MADE_AGAIN[asked]
        kernel = finding.row.kernel if why else finding.row.kernel.replace("silu_mul", "lora_mlp")
        row = replace(finding.row, kernel=kernel, reason="; ".join(filter(None, [finding.row.reason, note])))
        yield replace(finding, row=row, recompute=asked)


def _word_of_block(name: str, plan: LayerPlan) -> str | None:
    """What the plan says to a block in a layer; ``None``: nothing."""
    word = next((word for layer, word in plan.items() if name == layer or name.startswith(f"{layer}.")), None)
    return word if word in MADE_AGAIN else None


def _following(model: nn.Module, findings: Mapping[str, Finding], plan: LayerPlan) -> Iterator[Finding]:
    """The decoder layers, with what the plan says to them; those of an earlier plan, without."""
    for name, layer in model.named_modules():
        word = plan.get(name)
        original = original_class(type(layer))
        if not is_planned_layer(original) or (word is None and _recompute(layer) is None):
            continue
        finding = findings.get(name) or Finding(name, layer, None)
        if word is not None:
            own = PatchRow(name, _class_name(layer), "", "fused", "its own code", calls_left=_calls(layer))
            row = finding.row or own
            finding = replace(finding, row=replace(row, reason="; ".join(filter(None, [row.reason, TEXTS[word]]))))
        yield replace(finding, layer_class=fused.fused_class(original), recompute=word)


def _earlier_plan(model: nn.Module) -> LayerPlan:
    modules = model.named_modules()
    words = {name: _recompute(module) for name, module in modules if is_planned_layer(original_class(type(module)))}
    return {name: word for name, word in words.items() if word is not None}


def _recompute(module: nn.Module) -> str | None:
    """What an earlier `patch` asked for."""
    state = module.__dict__.get(STATE)
    return None if state is None else state.recompute


def _why_not_recomputed(finding: Finding, findings: Mapping[str, Finding], setting: _Setting) -> str:
    """Empty where nothing stands against it."""
    taken = {id(found.module) for found in findings.values() if found.layer_class is not None}

    def check(layer: nn.Module) -> None:
        if id(layer) not in taken:
            raise NotFused("it is left on its own code")

    device = next((parameter.device for parameter in finding.module.parameters()), None)
    x = torch.empty(1, dtype=setting.dtype, device=device)
    try:
        read_block(finding.module, x, check)
    except NotFused as refusal:
        return str(refusal)
    return ""


# ---- layers that share their input


def _in_features(findings: Iterable[Finding]) -> dict[str, int]:
    """Number of inputs of every layer that may share them, by name."""
    found = ((finding, getattr(finding.module, "in_features", None)) for finding in findings)
    return {
        finding.name: in_features
        for finding, in_features in found
        if isinstance(in_features, int) and finding.layer_class is not None and _unused(finding.module) == 0
    }


def _in_group(members: Sequence[Finding], setting: _Setting) -> list[Finding]:
    """``members``, which share their input, with the kernel that runs them as one, if there is one."""
    together = [finding for finding in members if not _why_alone(finding)]
    alone = [finding for finding in members if _why_alone(finding)]
    if alone and _group_kernel(_running(members), setting) is not None:
        alone = [replace(finding, row=_row_alone(finding)) for finding in alone]
    if len(together) < 2:
        return [*together, *alone]
    group, kernel = tuple(finding.name for finding in together), _group_kernel(_running(together), setting)
    return [*(replace(finding, group=group, row=_row_in_group(finding, kernel)) for finding in together), *alone]


def _why_alone(finding: Finding) -> str:
    """Why the layer cannot join those that share its input; empty where it can."""
    if finding.arguments is not None and finding.arguments.magnitude is not None:
        return DORA_ALONE
    layer: Any = finding.module
    base = getattr(layer, "base_layer", layer)
    if deltas_of(base):
        return DELTAS_ALONE
    return "" if mask_of(base) is None else MASK_ALONE


def _running(members: Sequence[Finding]) -> list[LayerArguments]:
    return [finding.arguments for finding in members if finding.arguments is not None]


def _row_alone(finding: Finding) -> PatchRow | None:
    if finding.row is None:
        return None
    return replace(finding.row, reason="; ".join(filter(None, [finding.row.reason, _why_alone(finding)])))


def _group_kernel(together: Sequence[LayerArguments], setting: _Setting) -> str | None:
    if len(together) < 2:
        return None
    row, members = _token(together[0], setting), group_members(together)
    if backend_for(row, members, setting.backend) is None:
        return None
    chosen = by_tokens.describe("lora_linear_group", lambda tokens: (row.expand(tokens, -1), members), setting.backend)
    return f"lora_linear on {chosen} (group of {len(members)})"


def _row_in_group(finding: Finding, kernel: str | None) -> PatchRow | None:
    if finding.row is None or finding.arguments is None or kernel is None:
        return finding.row
    return replace(finding.row, kernel=kernel)


def _idle_note(layer: Any) -> str:
    if running_adapters(layer):
        return ""
    if layer.disable_adapters:
        return "adapters are disabled now: the base layer runs alone"
    if layer.merged:
        return "adapters are merged now: the base layer runs alone"
    return "no active adapter here now: the base layer runs alone"
