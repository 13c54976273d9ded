"""The experts of mixture-of-experts models, whose weights transformers packs into parameters [experts, out, in].

    yₜ = Σₖ wₜₖ down(act(gate(xₜ)) * up(xₜ))        over the experts that the router chose for token t

PEFT adapts such a parameter (`target_parameters`) by adding the product of its factors to the whole of it in every
call, whose gradient is as large again. Here every expert multiplies the tokens that were sent to it with its own slice
of the weights and of the factors, and neither the sum nor its gradient is ever made.

A class is known by its forward, as gated blocks are.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from peftkern.ops.gated_lora_linear import gated_lora_linear
from peftkern.ops.lora_linear import lora_linear
from peftkern.ops.silu_mul import silu_mul
from peftkern.patch.arguments import is_hooked, running_adapters
from peftkern.patch.gated import activation_name, runs_forward_of
from peftkern.patch.weights import NotFused, read_frozen

# module of transformers.models -> class
PACKED_EXPERTS: Mapping[str, str] = {
    "afmoe.modeling_afmoe": "AfmoeExperts",
    "axk1.modeling_axk1": "AXK1Experts",
    "axk2.modeling_axk2": "AXK2Experts",
    "bailing_hybrid.modeling_bailing_hybrid": "BailingHybridExperts",
    "cohere2_moe.modeling_cohere2_moe": "Cohere2MoeExperts",
    "deepseek_ocr2.modeling_deepseek_ocr2": "DeepseekOcr2TextExperts",
    "deepseek_v2.modeling_deepseek_v2": "DeepseekV2Experts",
    "deepseek_v3.modeling_deepseek_v3": "DeepseekV3Experts",
    "deepseek_v32.modeling_deepseek_v32": "DeepseekV32Experts",
    "diffusion_gemma.modeling_diffusion_gemma": "DiffusionGemmaTextExperts",
    "dots1.modeling_dots1": "Dots1Experts",
    "dots3_note.modeling_dots3_note": "Dots3NoteExperts",
    "ernie4_5_moe.modeling_ernie4_5_moe": "Ernie4_5_MoeExperts",
    "ernie4_5_vl_moe.modeling_ernie4_5_vl_moe": "Ernie4_5_VLMoeMoeExperts",
    "exaone_moe.modeling_exaone_moe": "ExaoneMoeExperts",
    "flex_olmo.modeling_flex_olmo": "FlexOlmoExperts",
    "flint.modeling_flint": "FlintExperts",
    "gemma4.modeling_gemma4": "Gemma4TextExperts",
    "glm4_moe.modeling_glm4_moe": "Glm4MoeExperts",
    "glm4_moe_lite.modeling_glm4_moe_lite": "Glm4MoeLiteExperts",
    "glm4v_moe.modeling_glm4v_moe": "Glm4vMoeTextExperts",
    "glm_moe_dsa.modeling_glm_moe_dsa": "GlmMoeDsaExperts",
    "granitemoe.modeling_granitemoe": "GraniteMoeExperts",
    "granitemoe_swa.modeling_granitemoe_swa": "GraniteMoeSWAExperts",
    "granitemoehybrid.modeling_granitemoehybrid": "GraniteMoeHybridExperts",
    "granitemoeshared.modeling_granitemoeshared": "GraniteMoeSharedExperts",
    "hunyuan_v1_moe.modeling_hunyuan_v1_moe": "HunYuanMoEV1Experts",
    "hy_v3.modeling_hy_v3": "HYV3Experts",
    "inkling.modeling_inkling": "InklingExperts",
    "jamba.modeling_jamba": "JambaExperts",
    "kimi_linear.modeling_kimi_linear": "KimiLinearExperts",
    "kolibri1.modeling_kolibri1": "Kolibri1Experts",
    "laguna.modeling_laguna": "LagunaExperts",
    "lara_mini.modeling_lara_mini": "LaraMiniExperts",
    "lfm2_moe.modeling_lfm2_moe": "Lfm2MoeExperts",
    "mellum.modeling_mellum": "MellumExperts",
    "mimo_v2_flash.modeling_mimo_v2_flash": "MiMoV2FlashExperts",
    "minimax.modeling_minimax": "MiniMaxExperts",
    "minimax_m2.modeling_minimax_m2": "MiniMaxM2Experts",
    "mistral4.modeling_mistral4": "Mistral4Experts",
    "mistral_large4.modeling_mistral_large4": "MistralLarge4TextExperts",
    "mixtral.modeling_mixtral": "MixtralExperts",
    "olmoe.modeling_olmoe": "OlmoeExperts",
    "phimoe.modeling_phimoe": "PhimoeExperts",
    "qwen2_moe.modeling_qwen2_moe": "Qwen2MoeExperts",
    "qwen3_5_moe.modeling_qwen3_5_moe": "Qwen3_5MoeExperts",
    "qwen3_moe.modeling_qwen3_moe": "Qwen3MoeExperts",
    "qwen3_next.modeling_qwen3_next": "Qwen3NextExperts",
    "qwen3_vl_moe.modeling_qwen3_vl_moe": "Qwen3VLMoeTextExperts",
    "qwen4_exp.modeling_qwen4_exp": "Qwen4ExpTextExperts",
    "solar_open.modeling_solar_open": "SolarOpenExperts",
    "unlimited_ocr.modeling_unlimited_ocr": "UnlimitedOcrTextExperts",
    "zaya.modeling_zaya": "ZayaExperts",
}

ON_A_PARAMETER = "LoRA on a parameter (target_parameters): PEFT adds it to the whole weight in every call"
_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
_SAME_NUMBERS = (None, "eager", "batched_mm", "grouped_mm")
"""Ways of transformers to compute experts that differ in speed alone."""


def holds_packed_experts(module: nn.Module) -> bool:
    """Whether ``module`` is called experts and holds their weights itself, as three-dimensional parameters."""
    has_stack = any(parameter.dim() == 3 for parameter in module._parameters.values() if parameter is not None)
    return has_stack and type(module).__name__.endswith("Experts")


def is_param_wrapper(layer_class: type) -> bool:
    """Whether the class runs the forward of PEFT's LoRA on a parameter."""
    package = sys.modules.get("peft.tuners.lora.layer")
    return package is not None and getattr(layer_class, "forward", None) is package.ParamWrapper.forward


@dataclass
class Stack:
    """One packed weight and the adapters that run on it.

    Attributes:
        weight: [experts, out, in], frozen.
        lora_A: [experts, r, in] of every adapter.
        lora_B: [experts, out, r].
        scaling: of every adapter.
    """

    weight: Tensor
    lora_A: list[tuple[Tensor, ...]] = field(default_factory=list)
    lora_B: list[tuple[Tensor, ...]] = field(default_factory=list)
    scaling: list[float] = field(default_factory=list)

    def adapters_of(self, expert: int) -> tuple[list[Tensor], list[Tensor]]:
        """A and B of one expert."""
        return [a[expert] for a in self.lora_A], [b[expert] for b in self.lora_B]


@dataclass
class Experts:
    """What a call of adapted experts computes with; ``activation`` is as in `peftkern.ops.silu_mul`, or ``None``."""

    module: Any
    gate_up: Stack
    down: Stack
    activation: str | None


# ---- reading


def experts_behind(layer: Any) -> Any:
    """The experts whose parameters ``layer``, and perhaps others within it, adapts.

    Raises:
        NotFused: it adapts parameters of something else.
    """
    experts = layer.get_base_layer()
    if not runs_forward_of(type(experts), PACKED_EXPERTS):
        raise NotFused(ON_A_PARAMETER)
    return experts


def read_experts(layer: Any) -> Experts:
    """What a call of ``layer``, the outermost on its experts, computes with.

    Raises:
        NotFused: on this call it would run other code.
    """
    module = experts_behind(layer)
    _check_experts(module)
    stacks = {name: Stack(read_frozen(module, name)) for name in (_GATE_UP, _DOWN)}
    inner = layer
    while inner is not module:
        if inner is not layer and is_hooked(inner):
            raise NotFused("a layer of PEFT on the experts has hooks")
        _add_adapters(inner, stacks)
        inner = inner.base_layer
    return Experts(module, stacks[_GATE_UP], stacks[_DOWN], activation_name(module.act_fn))


def _check_experts(module: Any) -> None:
    if is_hooked(module) or is_hooked(module.act_fn):
        raise NotFused("the experts have hooks, which the fused product would skip")
    implementation = getattr(module.config, "_experts_implementation", None)
    if implementation not in _SAME_NUMBERS:
        raise NotFused(f"the experts run as {implementation!r}")
    if module._is_expert_parallel:
        raise NotFused("the experts are spread over processes")


def _add_adapters(layer: Any, stacks: Mapping[str, Stack]) -> None:
    stack = stacks.get(layer.parameter_name)
    if stack is None:
        raise NotFused(f"an adapter is on {layer.parameter_name!r} of the experts")
    for name in running_adapters(layer):
        lora_A, lora_B = layer.lora_A[name], layer.lora_B[name]
        if name in layer.lora_variant or {type(lora_A), type(lora_B)} != {nn.Linear} or lora_B.bias is not None:
            raise NotFused(f"adapter {name!r} on the experts is more than two factors")
        if is_hooked(lora_A) or is_hooked(lora_B):
            raise NotFused(f"adapter {name!r} has hooks on its layers")
        count = stack.weight.shape[0]
        # as PEFT has them: A is [experts * r, in], expert by expert, and B is [out, r * experts], r by r
        of_A = lora_A.weight.view(count, -1, lora_A.weight.shape[1])
        of_B = lora_B.weight.view(lora_B.weight.shape[0], -1, count).permute(2, 0, 1).contiguous()
        stack.lora_A.append(of_A.unbind())
        stack.lora_B.append(of_B.unbind())
        stack.scaling.append(layer.scaling[name])


# ---- computing


def run_experts(experts: Experts, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, backend: str | None) -> Tensor:
    """The sum over the chosen experts of every token.

    Args:
        experts: what to compute with.
        x: [tokens, hidden].
        top_k_index: [tokens, k], the chosen experts.
        top_k_weights: [tokens, k], how much they count.
        backend: that must run it.

    Returns:
        [tokens, hidden] in the dtype of x.
    """
    chosen = top_k_index.flatten()
    order = chosen.argsort(stable=True)
    tokens = order // top_k_index.shape[1]
    count = experts.gate_up.weight.shape[0]
    lengths = _tokens_of_each(chosen, count)
    rows = x.index_select(0, tokens).split_with_sizes(lengths)
    shares = top_k_weights.flatten()[order, None].split_with_sizes(lengths)
    y = torch.zeros_like(x)
    for expert, places in enumerate(tokens.split_with_sizes(lengths)):
        if len(places):
            part = _run_expert(experts, expert, rows[expert], backend) * shares[expert]
            y.index_add_(0, places, part.to(y.dtype))
    return y


def _tokens_of_each(chosen: Tensor, count: int) -> list[int]:
    """How many tokens go to each expert; as even as can be where the tensor has no numbers, which is in planning."""
    if isinstance(chosen, FakeTensor):
        return [len(range(expert, len(chosen), count)) for expert in range(count)]
    lengths: list[int] = torch.bincount(chosen, minlength=count).tolist()
    return lengths


def _run_expert(experts: Experts, expert: int, x: Tensor, backend: str | None) -> Tensor:
    stack, half = experts.gate_up, experts.gate_up.weight.shape[1] // 2
    lora_A, lora_B = stack.adapters_of(expert)
    gate, up = (
        lora_linear(
            x,
            stack.weight[expert, part],
            lora_A,
            [b[part] for b in lora_B],
            stack.scaling,
            backend=backend,
        )
        for part in (slice(half), slice(half, None))
    )
    stack = experts.down
    lora_A, lora_B = stack.adapters_of(expert)
    arguments = (stack.weight[expert], lora_A, lora_B, stack.scaling)
    if experts.activation is None:
        return lora_linear(experts.module.act_fn(gate) * up, *arguments, backend=backend)
    if torch.is_grad_enabled() and any(a.requires_grad for a in lora_A):
        return gated_lora_linear(gate, up, *arguments, activation=experts.activation, backend=backend)
    x = silu_mul(gate, up, activation=experts.activation, backend=backend)
    return lora_linear(x, *arguments, backend=backend)
