"""The root mean square norms of transformers and PyTorch, and the operation that computes them.

A norm is known by the `forward` of its class, as in :mod:`peftkern.patch.known`. `torch.nn.LayerNorm` is none of them:
PyTorch runs it as one kernel already, forward and backward, and keeps as little.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.ops.lora_linear import FLOAT_DTYPES
from peftkern.ops.norm import rms_norm
from peftkern.patch.known import known_row
from peftkern.patch.weights import KNOWN_TENSORS, NotFused


@dataclass(frozen=True)
class NormKind:
    """What the classes of one kind compute.

    Attributes:
        eps: name of the attribute that holds ε.
        weight_offset: what is added to the weight.
        round_before_weight: as in `ops.rms_norm`.
        promotes: whether the result has the wider dtype of input and weight, not that of the input.
        heeds_autocast: whether autocast may change what is computed.
    """

    eps: str
    weight_offset: float = 0.0
    round_before_weight: bool = False
    promotes: bool = False
    heeds_autocast: bool = False


_LLAMA = NormKind("variance_epsilon", round_before_weight=True, promotes=True)
_OLMO2 = NormKind("variance_epsilon")
_GEMMA = NormKind("eps", weight_offset=1.0)
_TORCH = NormKind("eps", promotes=True, heeds_autocast=True)

NORMS: Mapping[str, NormKind] = {
    "apertus.modeling_apertus.ApertusRMSNorm": _LLAMA,
    "arcee.modeling_arcee.ArceeRMSNorm": _LLAMA,
    "aria.modeling_aria.AriaTextRMSNorm": _LLAMA,
    "bamba.modeling_bamba.BambaRMSNorm": _LLAMA,
    "bitnet.modeling_bitnet.BitNetRMSNorm": _LLAMA,
    "chameleon.modeling_chameleon.ChameleonRMSNorm": _LLAMA,
    "csm.modeling_csm.CsmRMSNorm": _LLAMA,
    "cwm.modeling_cwm.CwmRMSNorm": _LLAMA,
    "deepseek_v2.modeling_deepseek_v2.DeepseekV2RMSNorm": _LLAMA,
    "deepseek_v3.modeling_deepseek_v3.DeepseekV3RMSNorm": _LLAMA,
    "diffllama.modeling_diffllama.DiffLlamaRMSNorm": _LLAMA,
    "dots1.modeling_dots1.Dots1RMSNorm": _LLAMA,
    "emu3.modeling_emu3.Emu3RMSNorm": _LLAMA,
    "ernie4_5.modeling_ernie4_5.Ernie4_5RMSNorm": _LLAMA,
    "ernie4_5_moe.modeling_ernie4_5_moe.Ernie4_5_MoeRMSNorm": _LLAMA,
    "eurobert.modeling_eurobert.EuroBertRMSNorm": _LLAMA,
    "exaone4.modeling_exaone4.Exaone4RMSNorm": _LLAMA,
    "glm.modeling_glm.GlmRMSNorm": _LLAMA,
    "glm4.modeling_glm4.Glm4RMSNorm": _LLAMA,
    "glm4_moe.modeling_glm4_moe.Glm4MoeRMSNorm": _LLAMA,
    "granite.modeling_granite.GraniteRMSNorm": _LLAMA,
    "hunyuan_v1_dense.modeling_hunyuan_v1_dense.HunYuanDenseV1RMSNorm": _LLAMA,
    "hunyuan_v1_moe.modeling_hunyuan_v1_moe.HunYuanMoEV1RMSNorm": _LLAMA,
    "jamba.modeling_jamba.JambaRMSNorm": _LLAMA,
    "lfm2.modeling_lfm2.Lfm2RMSNorm": _LLAMA,
    "llama.modeling_llama.LlamaRMSNorm": _LLAMA,
    "minicpm3.modeling_minicpm3.MiniCPM3RMSNorm": _LLAMA,
    "ministral.modeling_ministral.MinistralRMSNorm": _LLAMA,
    "ministral3.modeling_ministral3.Ministral3RMSNorm": _LLAMA,
    "mistral.modeling_mistral.MistralRMSNorm": _LLAMA,
    "mistral4.modeling_mistral4.Mistral4RMSNorm": _LLAMA,
    "mixtral.modeling_mixtral.MixtralRMSNorm": _LLAMA,
    "mllama.modeling_mllama.MllamaTextRMSNorm": _LLAMA,
    "olmoe.modeling_olmoe.OlmoeRMSNorm": _LLAMA,
    "phi3.modeling_phi3.Phi3RMSNorm": _LLAMA,
    "pixtral.modeling_pixtral.PixtralRMSNorm": _LLAMA,
    "qwen2.modeling_qwen2.Qwen2RMSNorm": _LLAMA,
    "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLRMSNorm": _LLAMA,
    "qwen2_moe.modeling_qwen2_moe.Qwen2MoeRMSNorm": _LLAMA,
    "qwen2_vl.modeling_qwen2_vl.Qwen2VLRMSNorm": _LLAMA,
    "qwen3.modeling_qwen3.Qwen3RMSNorm": _LLAMA,
    "qwen3_moe.modeling_qwen3_moe.Qwen3MoeRMSNorm": _LLAMA,
    "qwen3_vl.modeling_qwen3_vl.Qwen3VLTextRMSNorm": _LLAMA,
    "qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeTextRMSNorm": _LLAMA,
    "seed_oss.modeling_seed_oss.SeedOssRMSNorm": _LLAMA,
    "smollm3.modeling_smollm3.SmolLM3RMSNorm": _LLAMA,
    "solar_open.modeling_solar_open.SolarOpenRMSNorm": _LLAMA,
    "youtu.modeling_youtu.YoutuRMSNorm": _LLAMA,
    "zamba.modeling_zamba.ZambaRMSNorm": _LLAMA,
    "mt5.modeling_mt5.MT5LayerNorm": _LLAMA,
    "t5.modeling_t5.T5LayerNorm": _LLAMA,
    "umt5.modeling_umt5.UMT5LayerNorm": _LLAMA,
    "afmoe.modeling_afmoe.AfmoeRMSNorm": _OLMO2,
    "flex_olmo.modeling_flex_olmo.FlexOlmoRMSNorm": _OLMO2,
    "gpt_oss.modeling_gpt_oss.GptOssRMSNorm": _OLMO2,
    "olmo2.modeling_olmo2.Olmo2RMSNorm": _OLMO2,
    "olmo3.modeling_olmo3.Olmo3RMSNorm": _OLMO2,
    "gemma.modeling_gemma.GemmaRMSNorm": _GEMMA,
    "gemma2.modeling_gemma2.Gemma2RMSNorm": _GEMMA,
    "gemma3.modeling_gemma3.Gemma3RMSNorm": _GEMMA,
    "qwen3_5.modeling_qwen3_5.Qwen3_5RMSNorm": _GEMMA,
    "qwen3_next.modeling_qwen3_next.Qwen3NextRMSNorm": _GEMMA,
    "vaultgemma.modeling_vaultgemma.VaultGemmaRMSNorm": _GEMMA,
    "torch.nn.modules.normalization.RMSNorm": _TORCH,
}

FEWEST_NUMBERS = 1 << 14
"""Of fewer numbers the several operators of PyTorch take less time than the way to one kernel: break-even was at 9,000
to 20,000 float32 numbers, 576 in a row, on one thread."""

FEW_RUN_ORIGINAL = f"inputs of fewer than {FEWEST_NUMBERS} numbers run its own code, which is faster there"
"""What a user must know about a norm that is taken."""


def norm_kind(norm_class: type) -> NormKind | None:
    """What the class computes, if it runs the forward of one of `NORMS`."""
    return known_row(norm_class, NORMS)


def read_norm(norm: Any, kind: NormKind) -> tuple[Tensor | None, float]:
    """The weight, [features] or none, and ε.

    Raises:
        NotFused: they are not what the operation takes.
    """
    weight, eps = norm.weight, getattr(norm, kind.eps)
    if weight is not None and type(weight) not in KNOWN_TENSORS:
        raise NotFused(f"its weight is a {type(weight).__name__}, not a plain tensor")
    if weight is not None and (weight.dim() != 1 or weight.dtype not in FLOAT_DTYPES):
        raise NotFused(f"its weight is {weight.dtype} with {weight.dim()} dimensions")
    if weight is None and len(norm.normalized_shape) != 1:
        raise NotFused("it normalises more than the last dimension")
    if eps is None:
        raise NotFused("its eps depends on the dtype of its input")
    return weight, eps


def runs_original(x: Any, backend: str | None) -> bool:
    """Whether the original forward is the better one for the input ``x``: it is short, or a compiler fuses it."""
    if torch.compiler.is_compiling():
        return True
    is_forced = backend is not None or registry.forced_backend() is not None
    return not is_forced and isinstance(x, Tensor) and x.numel() < FEWEST_NUMBERS


def normalize(norm: Any, kind: NormKind, x: Tensor, backend: str | None) -> Tensor:
    """What ``norm`` returns for x.

    Raises:
        NotFused: the operation does not cover it.
    """
    weight, eps = read_norm(norm, kind)
    _check_input(x, weight, kind)
    return rms_norm(
        x, weight, eps, None, kind.weight_offset, round_before_weight=kind.round_before_weight, backend=backend
    )


def add_and_normalize(
    norm: Any, kind: NormKind, x: Tensor, residual: Tensor, backend: str | None
) -> tuple[Tensor, Tensor]:
    """What ``norm`` returns for ``residual + x``, and that sum.

    Raises:
        NotFused: the operation does not cover it.
    """
    weight, eps = read_norm(norm, kind)
    _check_input(x, weight, kind)
    if type(residual) not in KNOWN_TENSORS or (residual.dtype, residual.shape) != (x.dtype, x.shape):
        raise NotFused("the residual stream is of another type, dtype or shape than what is added to it")
    if residual.device != x.device:
        raise NotFused("the residual stream is on another device than what is added to it")
    return rms_norm(
        x, weight, eps, residual, kind.weight_offset, round_before_weight=kind.round_before_weight, backend=backend
    )


def _check_input(x: Any, weight: Tensor | None, kind: NormKind) -> None:
    if type(x) not in KNOWN_TENSORS or x.dtype not in FLOAT_DTYPES or x.dim() == 0:
        what = f"a {type(x).__name__}" if not isinstance(x, Tensor) else f"a {type(x).__name__} of {x.dtype}"
        raise NotFused(f"called with {what}, not with rows of plain floating-point numbers")
    if kind.heeds_autocast and torch.is_autocast_enabled(x.device.type):
        raise NotFused("called under autocast, which decides its dtype")
    if weight is None:
        return
    if weight.shape != x.shape[-1:] or weight.device != x.device:
        raise NotFused("its weight is on another device than its input, or of another size")
    if kind.promotes and torch.promote_types(x.dtype, weight.dtype) != x.dtype:
        raise NotFused(f"its weight is {weight.dtype} and its input {x.dtype}: the result is in the wider one")
