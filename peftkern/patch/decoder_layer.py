"""Decoder layers of transformers that add the residual stream right before a norm.

    h = x + self_attn(input_layernorm(x))
    y = h + mlp(post_attention_layernorm(h))

The sum h and its norm are one operation. A layer is known by the `forward` of its class, as in
:mod:`peftkern.patch.known`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from peftkern.patch.attention import takes_renamed
from peftkern.patch.known import known_row
from peftkern.patch.norms import add_and_normalize, norm_kind, runs_original
from peftkern.patch.weights import NotFused, original_class

_LAYERS = (
    "arcee.modeling_arcee.ArceeDecoderLayer",
    "aria.modeling_aria.AriaTextDecoderLayer",
    "bitnet.modeling_bitnet.BitNetDecoderLayer",
    "csm.modeling_csm.CsmDecoderLayer",
    "cwm.modeling_cwm.CwmDecoderLayer",
    "deepseek_v2.modeling_deepseek_v2.DeepseekV2DecoderLayer",
    "deepseek_v3.modeling_deepseek_v3.DeepseekV3DecoderLayer",
    "diffllama.modeling_diffllama.DiffLlamaDecoderLayer",
    "dots1.modeling_dots1.Dots1DecoderLayer",
    "ernie4_5.modeling_ernie4_5.Ernie4_5DecoderLayer",
    "ernie4_5_moe.modeling_ernie4_5_moe.Ernie4_5_MoeDecoderLayer",
    "eurobert.modeling_eurobert.EuroBertDecoderLayer",
    "gemma.modeling_gemma.GemmaDecoderLayer",
    "glm.modeling_glm.GlmDecoderLayer",
    "glm4_moe.modeling_glm4_moe.Glm4MoeDecoderLayer",
    "hunyuan_v1_dense.modeling_hunyuan_v1_dense.HunYuanDenseV1DecoderLayer",
    "hunyuan_v1_moe.modeling_hunyuan_v1_moe.HunYuanMoEV1DecoderLayer",
    "llama.modeling_llama.LlamaDecoderLayer",
    "ministral.modeling_ministral.MinistralDecoderLayer",
    "ministral3.modeling_ministral3.Ministral3DecoderLayer",
    "mistral.modeling_mistral.MistralDecoderLayer",
    "mistral4.modeling_mistral4.Mistral4DecoderLayer",
    "mixtral.modeling_mixtral.MixtralDecoderLayer",
    "olmoe.modeling_olmoe.OlmoeDecoderLayer",
    "phimoe.modeling_phimoe.PhimoeDecoderLayer",
    "qwen2.modeling_qwen2.Qwen2DecoderLayer",
    "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLDecoderLayer",
    "qwen2_moe.modeling_qwen2_moe.Qwen2MoeDecoderLayer",
    "qwen2_vl.modeling_qwen2_vl.Qwen2VLDecoderLayer",
    "qwen3.modeling_qwen3.Qwen3DecoderLayer",
    "qwen3_moe.modeling_qwen3_moe.Qwen3MoeDecoderLayer",
    "qwen3_vl.modeling_qwen3_vl.Qwen3VLTextDecoderLayer",
    "qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeTextDecoderLayer",
    "seed_oss.modeling_seed_oss.SeedOssDecoderLayer",
    "smollm3.modeling_smollm3.SmolLM3DecoderLayer",
    "solar_open.modeling_solar_open.SolarOpenDecoderLayer",
    "youtu.modeling_youtu.YoutuDecoderLayer",
)

DECODER_LAYERS: Mapping[str, bool] = dict.fromkeys(_LAYERS, True)

BEHIND = "post_attention_layernorm"
"""The norm behind the sum."""


def is_decoder_layer(layer_class: type) -> bool:
    """Whether the class runs the forward of one of `DECODER_LAYERS`."""
    return known_row(layer_class, DECODER_LAYERS) is not None


@cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def run_layer(original: Any, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], backend: str | None) -> Any:
    """What the original forward returns, by one kernel less; ``None`` where nothing is gained.

    Raises:
        NotFused: it is called in a way that is not covered; nothing has run yet.
    """
    if takes_renamed(original.forward, kwargs):
        raise NotFused("called with a name of an argument that is no longer used")
    bound = _signature(original.forward).bind(layer, *args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    arguments |= arguments.pop("kwargs", {})
    del arguments["self"]
    x = arguments.pop("hidden_states")
    if runs_original(x, backend):
        return None
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(x), **arguments)
    norm = getattr(layer, BEHIND)
    kind = norm_kind(original_class(type(norm)))
    try:
        if kind is None:
            raise NotFused("its norm is another one now")
        y, total = add_and_normalize(norm, kind, attended, x, backend)
    except NotFused:  # the norm says why, if it is called
        total = x + attended
        y = norm(total)
    return total + layer.mlp(y)
