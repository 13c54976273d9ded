"""Rotary embeddings and attention inside of the attention blocks of transformers.

A block is known by the `forward` of its class, as in :mod:`peftkern.patch.known`. It calls the function
`apply_rotary_pos_emb` of its module, and what `ALL_ATTENTION_FUNCTIONS` has under the name of its attention. Those stay
what they are, for every other model; the forward of a patched block is run with others under these names, by giving its
code a copy of the module's names, made anew in every call.

Of attentions, `sdpa` is ours where a kernel takes the call, which on GPUs none does: PyTorch's own is as good there.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.ops.attention import LARGEST_HEAD_DIM, attention
from peftkern.ops.lora_linear import FLOAT_DTYPES
from peftkern.ops.rotary import rotary
from peftkern.patch.known import known_row
from peftkern.patch.weights import KNOWN_TENSORS, NotFused

FUNCTION = "apply_rotary_pos_emb"
INTERFACES = "ALL_ATTENTION_FUNCTIONS"
SDPA = "sdpa"
"""The name of the attention that can be ours, as `_attn_implementation` of a config."""
_SDPA_MODULE, _SDPA_FUNCTION = "transformers.integrations.sdpa_attention", "sdpa_attention_forward"

RENAMED = ("past_key_values",)
"""Keywords that a decorator of a forward translates where the forward itself does not take them."""


@dataclass(frozen=True)
class RotaryKind:
    """What a module's `apply_rotary_pos_emb` computes.

    Attributes:
        interleaved: as in `ops.rotary`.
        spread: whether the first half of the angles is meant for pairs that are neighbours.
        promotes: whether results have the wider dtype of states and angles, not that of the states.
        is_ours: whether `ops.rotary` computes it; the others turn otherwise or not at all, and only attend.
    """

    interleaved: bool = False
    spread: bool = False
    promotes: bool = True
    is_ours: bool = True


_LLAMA = RotaryKind()
_OLMO = RotaryKind(promotes=False)
_COHERE = RotaryKind(interleaved=True, promotes=False)
_ERNIE = RotaryKind(interleaved=True, spread=True, promotes=False)
_GLM = RotaryKind(interleaved=True, spread=True)
_OTHER = RotaryKind(is_ours=False)

ATTENTIONS: Mapping[str, RotaryKind] = {
    "afmoe.modeling_afmoe.AfmoeAttention": _LLAMA,
    "apertus.modeling_apertus.ApertusAttention": _LLAMA,
    "arcee.modeling_arcee.ArceeAttention": _LLAMA,
    "aria.modeling_aria.AriaTextAttention": _LLAMA,
    "bamba.modeling_bamba.BambaAttention": _LLAMA,
    "bitnet.modeling_bitnet.BitNetAttention": _LLAMA,
    "chameleon.modeling_chameleon.ChameleonAttention": _LLAMA,
    "csm.modeling_csm.CsmAttention": _LLAMA,
    "cwm.modeling_cwm.CwmAttention": _LLAMA,
    "deepseek_v3.modeling_deepseek_v3.DeepseekV3Attention": _LLAMA,
    "diffllama.modeling_diffllama.DiffLlamaAttention": _LLAMA,
    "dots1.modeling_dots1.Dots1Attention": _LLAMA,
    "emu3.modeling_emu3.Emu3Attention": _LLAMA,
    "eurobert.modeling_eurobert.EuroBertAttention": _LLAMA,
    "exaone4.modeling_exaone4.Exaone4Attention": _LLAMA,
    "gemma.modeling_gemma.GemmaAttention": _LLAMA,
    "gemma2.modeling_gemma2.Gemma2Attention": _LLAMA,
    "gemma3.modeling_gemma3.Gemma3Attention": _LLAMA,
    "glm4_moe.modeling_glm4_moe.Glm4MoeAttention": _LLAMA,
    "gpt_neox.modeling_gpt_neox.GPTNeoXAttention": _LLAMA,
    "granite.modeling_granite.GraniteAttention": _LLAMA,
    "hunyuan_v1_dense.modeling_hunyuan_v1_dense.HunYuanDenseV1Attention": _LLAMA,
    "hunyuan_v1_moe.modeling_hunyuan_v1_moe.HunYuanMoEV1Attention": _LLAMA,
    "lfm2.modeling_lfm2.Lfm2Attention": _LLAMA,
    "llama.modeling_llama.LlamaAttention": _LLAMA,
    "minicpm3.modeling_minicpm3.MiniCPM3Attention": _LLAMA,
    "ministral.modeling_ministral.MinistralAttention": _LLAMA,
    "ministral3.modeling_ministral3.Ministral3Attention": _LLAMA,
    "mistral.modeling_mistral.MistralAttention": _LLAMA,
    "mistral4.modeling_mistral4.Mistral4Attention": _LLAMA,
    "mixtral.modeling_mixtral.MixtralAttention": _LLAMA,
    "mllama.modeling_mllama.MllamaTextSelfAttention": _LLAMA,
    "olmoe.modeling_olmoe.OlmoeAttention": _LLAMA,
    "persimmon.modeling_persimmon.PersimmonAttention": _LLAMA,
    "phi.modeling_phi.PhiAttention": _LLAMA,
    "qwen2.modeling_qwen2.Qwen2Attention": _LLAMA,
    "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLAttention": _LLAMA,
    "qwen2_moe.modeling_qwen2_moe.Qwen2MoeAttention": _LLAMA,
    "qwen2_vl.modeling_qwen2_vl.Qwen2VLAttention": _LLAMA,
    "qwen3.modeling_qwen3.Qwen3Attention": _LLAMA,
    "qwen3_5.modeling_qwen3_5.Qwen3_5Attention": _LLAMA,
    "qwen3_moe.modeling_qwen3_moe.Qwen3MoeAttention": _LLAMA,
    "qwen3_next.modeling_qwen3_next.Qwen3NextAttention": _LLAMA,
    "qwen3_vl.modeling_qwen3_vl.Qwen3VLTextAttention": _LLAMA,
    "qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeTextAttention": _LLAMA,
    "seed_oss.modeling_seed_oss.SeedOssAttention": _LLAMA,
    "smollm3.modeling_smollm3.SmolLM3Attention": _LLAMA,
    "solar_open.modeling_solar_open.SolarOpenAttention": _LLAMA,
    "stablelm.modeling_stablelm.StableLmAttention": _LLAMA,
    "starcoder2.modeling_starcoder2.Starcoder2Attention": _LLAMA,
    "vaultgemma.modeling_vaultgemma.VaultGemmaAttention": _LLAMA,
    "youtu.modeling_youtu.YoutuAttention": _LLAMA,
    "flex_olmo.modeling_flex_olmo.FlexOlmoAttention": _OLMO,
    "olmo.modeling_olmo.OlmoAttention": _OLMO,
    "olmo2.modeling_olmo2.Olmo2Attention": _OLMO,
    "olmo3.modeling_olmo3.Olmo3Attention": _OLMO,
    "cohere.modeling_cohere.CohereAttention": _COHERE,
    "cohere2.modeling_cohere2.Cohere2Attention": _COHERE,
    "ernie4_5.modeling_ernie4_5.Ernie4_5Attention": _ERNIE,
    "ernie4_5_moe.modeling_ernie4_5_moe.Ernie4_5_MoeAttention": _ERNIE,
    "glm.modeling_glm.GlmAttention": _GLM,
    "glm4.modeling_glm4.Glm4Attention": _GLM,
    "helium.modeling_helium.HeliumAttention": _GLM,
    "bert.modeling_bert.BertSelfAttention": _OTHER,
    "gpt2.modeling_gpt2.GPT2Attention": _OTHER,
    "opt.modeling_opt.OPTAttention": _OTHER,
    "phi3.modeling_phi3.Phi3Attention": _OTHER,
    "roberta.modeling_roberta.RobertaSelfAttention": _OTHER,
    "vit.modeling_vit.ViTAttention": _OTHER,
}


def rotary_kind(block_class: type) -> RotaryKind | None:
    """How the class turns queries and keys, if it runs the forward of one of `ATTENTIONS`."""
    return known_row(block_class, ATTENTIONS)


@cache
def _written(forward: Callable[..., Any]) -> types.FunctionType:
    """The function below the decorators of a forward."""
    written = inspect.unwrap(forward)
    assert isinstance(written, types.FunctionType)
    return written


def takes_renamed(forward: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a decorator of ``forward`` has something to translate in a call with ``kwargs``."""
    return any(name in kwargs and name not in _written(forward).__code__.co_varnames for name in RENAMED)


def with_kernels(
    forward: Callable[..., Any], kind: RotaryKind, backend: str | None, note: Callable[..., None]
) -> Callable[..., Any]:
    """``forward`` of a known class, with our rotary embeddings and attention in place of its module's.

    Args:
        forward: of the class.
        kind: what its module's function computes.
        backend: which must run them; ``None`` lets the table decide.
        note: is told why, where the module's own functions run after all, and what runs instead.
    """
    written = _written(forward)
    names = dict(written.__globals__)
    theirs: Any = names.get(FUNCTION)
    if kind.is_ours and getattr(theirs, "__module__", None) == written.__module__:  # nobody has replaced it
        names[FUNCTION] = partial(_turn, theirs, kind, backend, note)
    names[INTERFACES] = _Interfaces(names[INTERFACES], backend, note)
    ours = types.FunctionType(written.__code__, names, written.__name__, written.__defaults__, written.__closure__)
    ours.__kwdefaults__ = written.__kwdefaults__
    return ours


def _turn(
    theirs: Callable[..., Any],
    kind: RotaryKind,
    backend: str | None,
    note: Callable[..., None],
    *args: Any,
    **kwargs: Any,
) -> Any:
    try:
        q, k, cos, sin = _read(kind, args, kwargs)
    except NotFused as refusal:
        note(str(refusal))
        return theirs(*args, **kwargs)
    return rotary(q, k, cos, sin, kind.interleaved, backend=backend)


def _read(kind: RotaryKind, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if kwargs or len(args) != 4:
        raise NotFused(f"{FUNCTION} is called with more than queries, keys, cosines and sines")
    if not {type(tensor) for tensor in args} <= KNOWN_TENSORS:
        raise NotFused("queries, keys or angles are not plain tensors")
    q, k, cos, sin = args
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or cos.shape[1] != q.shape[2] or k.dtype != q.dtype:
        states = f"queries are {q.dtype} {list(q.shape)}, keys {k.dtype} {list(k.shape)}"
        raise NotFused(f"{states}, angles {list(cos.shape)}")
    if q.dtype not in FLOAT_DTYPES or cos.requires_grad:
        raise NotFused(f"queries are {q.dtype}" if not cos.requires_grad else "the angles are trained")
    if kind.promotes:  # under autocast queries come out of a product narrower than angles
        q, k = (x.to(torch.promote_types(x.dtype, cos.dtype)) for x in (q, k))
    if kind.spread:
        cos, sin = (angles[..., : angles.shape[-1] // 2].repeat_interleave(2, dim=-1) for angles in (cos, sin))
    return q, k, cos, sin


# ---- attention


def runs_attention(arguments: tuple[Tensor, Tensor, Tensor, Tensor | None], backend: str | None) -> bool:
    """Whether a kernel takes attention of these queries, keys and values with this mask, or ``backend`` is forced to.

    Of PyTorch's operators its own attention is the best.
    """
    try:
        choice = registry.choose("attention", *arguments, backend=backend)
    except registry.BackendError:
        return False
    return choice.backend != "reference" or choice.reason == "forced"


class _Interfaces:
    """The attention functions of transformers, with ours for `sdpa`."""

    def __init__(self, theirs: Any, backend: str | None, note: Callable[..., None]) -> None:
        self._theirs, self._backend, self._note = theirs, backend, note

    def __getattr__(self, name: str) -> Any:
        return getattr(self._theirs, name)

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        found: Callable[..., Any] = self._theirs.get_interface(name, default)
        if found is not getattr(sys.modules.get(_SDPA_MODULE), _SDPA_FUNCTION, None):
            return found
        return partial(_attend, found, self._backend, self._note)


def _attend(
    theirs: Callable[..., Any],
    backend: str | None,
    note: Callable[..., None],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> Any:
    try:
        states = _read_states(query, key, value, attention_mask, dropout, options)
        causal = attention_mask is None and _is_causal(module, query, key, options)
    except NotFused as refusal:
        note(str(refusal), "attends as PyTorch does")
        states = None
    if states is None or not runs_attention(states, backend):
        return theirs(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    return attention(*states, causal, scaling, backend=backend).transpose(1, 2), None


def _read_states(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """What the operation takes; ``None`` where a single query has nothing to gain."""
    if query.shape[2] == 1 and key.shape[2] > 1:
        return None
    if dropout > 0:
        raise NotFused("its attention weights are dropped out")
    unknown = [name for name in ("position_bias", "softcap", "output_attentions") if options.get(name) is not None]
    if unknown and options[unknown[0]] is not False:
        raise NotFused(f"its attention is called with {unknown[0]}")
    if not {type(query), type(key), type(value)} <= KNOWN_TENSORS:
        raise NotFused("queries, keys or values are not plain tensors")
    if torch.is_autocast_enabled(query.device.type):  # which PyTorch's attention heeds
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    _check_states(query, key, value)
    if mask is not None:
        _check_mask(mask)
    return query, key, value, mask


def _is_causal(module: Any, query: Tensor, key: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether a call without a mask is, as `sdpa_attention_forward` decides it."""
    asked = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if asked is None else asked
    if not causal or query.shape[2] == 1:
        return False
    if key.shape[2] != query.shape[2]:
        raise NotFused(f"{query.shape[2]} queries meet {key.shape[2]} keys without a mask")
    return True


def _check_mask(mask: Tensor) -> None:
    if type(mask) not in KNOWN_TENSORS:
        raise NotFused("the mask of its attention is no plain tensor")
    if mask.requires_grad:
        raise NotFused("the mask of its attention is trained")
    if mask.dim() != 4 or mask.dtype not in (torch.bool, *FLOAT_DTYPES):
        raise NotFused(f"the mask of its attention is {mask.dtype} with {mask.dim()} dimensions")


def _check_states(query: Tensor, key: Tensor, value: Tensor) -> None:
    head_dim = query.shape[-1]
    sizes = f"queries are {list(query.shape)}, keys {list(key.shape)} and values {list(value.shape)}"
    if query.dtype not in FLOAT_DTYPES or not query.dtype == key.dtype == value.dtype:
        raise NotFused(f"queries are {query.dtype}, keys {key.dtype} and values {value.dtype}")
    if head_dim > LARGEST_HEAD_DIM or key.shape[-1] != head_dim or value.shape != key.shape:
        raise NotFused(sizes)
    if key.shape[0] != query.shape[0] or query.shape[1] % key.shape[1] != 0:
        raise NotFused(sizes)
