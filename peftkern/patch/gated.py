"""The gated feed-forward blocks of transformers that compute ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``.

Which activations of theirs the kernels compute is told by class as well.

A block is known by the `forward` of its class. A class that somebody else has given another `forward`, or another class
put in its place, is not one of these.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

# module of transformers.models -> class
GATED_MLPS = {
    "afmoe.modeling_afmoe": "AfmoeMLP",
    "aria.modeling_aria": "AriaSharedExpertsMLP",
    "bamba.modeling_bamba": "BambaMLP",
    "chameleon.modeling_chameleon": "ChameleonMLP",
    "cohere.modeling_cohere": "CohereMLP",
    "cohere2.modeling_cohere2": "Cohere2MLP",
    "csm.modeling_csm": "CsmMLP",
    "cwm.modeling_cwm": "CwmMLP",
    "deepseek_v2.modeling_deepseek_v2": "DeepseekV2MLP",
    "deepseek_v3.modeling_deepseek_v3": "DeepseekV3MLP",
    "diffllama.modeling_diffllama": "DiffLlamaMLP",
    "dots1.modeling_dots1": "Dots1MLP",
    "emu3.modeling_emu3": "Emu3MLP",
    "ernie4_5.modeling_ernie4_5": "Ernie4_5MLP",
    "ernie4_5_moe.modeling_ernie4_5_moe": "Ernie4_5_MoeMLP",
    "eurobert.modeling_eurobert": "EuroBertMLP",
    "exaone4.modeling_exaone4": "Exaone4MLP",
    "flex_olmo.modeling_flex_olmo": "FlexOlmoMLP",
    "gemma.modeling_gemma": "GemmaMLP",
    "gemma2.modeling_gemma2": "Gemma2MLP",
    "gemma3.modeling_gemma3": "Gemma3MLP",
    "glm4_moe.modeling_glm4_moe": "Glm4MoeMLP",
    "granite.modeling_granite": "GraniteMLP",
    "helium.modeling_helium": "HeliumMLP",
    "hunyuan_v1_dense.modeling_hunyuan_v1_dense": "HunYuanDenseV1MLP",
    "hunyuan_v1_moe.modeling_hunyuan_v1_moe": "HunYuanMoEV1MLP",
    "jamba.modeling_jamba": "JambaMLP",
    "llama.modeling_llama": "LlamaMLP",
    "minicpm3.modeling_minicpm3": "MiniCPM3MLP",
    "ministral.modeling_ministral": "MinistralMLP",
    "ministral3.modeling_ministral3": "Ministral3MLP",
    "mistral.modeling_mistral": "MistralMLP",
    "mistral4.modeling_mistral4": "Mistral4MLP",
    "mllama.modeling_mllama": "MllamaTextMLP",
    "olmo.modeling_olmo": "OlmoMLP",
    "olmo2.modeling_olmo2": "Olmo2MLP",
    "olmo3.modeling_olmo3": "Olmo3MLP",
    "olmoe.modeling_olmoe": "OlmoeMLP",
    "pixtral.modeling_pixtral": "PixtralMLP",
    "qwen2.modeling_qwen2": "Qwen2MLP",
    "qwen2_5_vl.modeling_qwen2_5_vl": "Qwen2MLP",
    "qwen2_moe.modeling_qwen2_moe": "Qwen2MoeMLP",
    "qwen2_vl.modeling_qwen2_vl": "Qwen2MLP",
    "qwen3.modeling_qwen3": "Qwen3MLP",
    "qwen3_5.modeling_qwen3_5": "Qwen3_5MLP",
    "qwen3_moe.modeling_qwen3_moe": "Qwen3MoeMLP",
    "qwen3_next.modeling_qwen3_next": "Qwen3NextMLP",
    "qwen3_vl.modeling_qwen3_vl": "Qwen3VLTextMLP",
    "qwen3_vl_moe.modeling_qwen3_vl_moe": "Qwen3VLMoeTextMLP",
    "smollm3.modeling_smollm3": "SmolLM3MLP",
    "solar_open.modeling_solar_open": "SolarOpenMLP",
    "stablelm.modeling_stablelm": "StableLmMLP",
    "vaultgemma.modeling_vaultgemma": "VaultGemmaMLP",
    "youtu.modeling_youtu": "YoutuMLP",
    "zamba.modeling_zamba": "ZambaMLP",
}

_PACKAGE = "transformers.models."


def is_gated_mlp(block_class: type) -> bool:
    """Whether the class runs the forward of one of `GATED_MLPS`."""
    return runs_forward_of(block_class, GATED_MLPS)


def runs_forward_of(module_class: type, known: Mapping[str, str]) -> bool:
    """Whether the class runs the forward of one of the classes ``known``, by module of `transformers.models`."""
    forward: Any = getattr(module_class, "forward", None)
    module_name = getattr(forward, "__module__", "")
    class_name = known.get(module_name.removeprefix(_PACKAGE))
    # by name as well: a function that replaces the forward in its class is not the one known here
    if class_name is None or forward.__qualname__ != f"{class_name}.forward":
        return False
    theirs = getattr(sys.modules.get(module_name), class_name, None)
    return getattr(theirs, "forward", None) is forward


# class of transformers.activations -> what it computes, in the words of `peftkern.ops.silu_mul`
_ACTIVATIONS = {
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}
"""By the argument ``approximate`` of PyTorch."""


def activation_name(activation: Any) -> str | None:
    """What calling ``activation`` computes, in the words of `peftkern.ops.silu_mul`; ``None``: something else."""
    activation_class = type(activation)
    if activation_class is nn.SiLU:
        return "silu"
    if activation_class is nn.GELU:
        return _GELU.get(activation.approximate)
    theirs = sys.modules.get("transformers.activations")
    known = getattr(theirs, activation_class.__name__, None)
    return _ACTIVATIONS.get(activation_class.__name__) if known is activation_class else None
