"""The causal language models of transformers whose loss is ``loss_function(lm_head(hidden states), labels)``.

A model is known by the `forward` of its class, as gated blocks are. Of such a model the loss can be had without logits:

    hidden = base(inputs)           what every forward of `LANGUAGE_MODELS` begins with
    loss   = Σₜ cross_entropy(softcap(lm_head(hiddenₜ)), label of the token behind t) / number of labels
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.ops.linear_cross_entropy import linear_cross_entropy
from peftkern.patch.arguments import has_own_forward
from peftkern.patch.head import Head, read_head
from peftkern.patch.weights import NotFused, original_class


@dataclass(frozen=True)
class Tail:
    """How a class goes from its inputs to its output.

    Attributes:
        class_name: of the model.
        base: path of the module that gives the hidden states.
        softcap: whether ``config.final_logit_softcapping`` acts on the logits.
        output: class of `transformers.modeling_outputs` that is returned.
    """

    class_name: str
    base: str = "model"
    softcap: bool = False
    output: str = "CausalLMOutputWithPast"


# module of transformers.models -> what its class does
LANGUAGE_MODELS: Mapping[str, Tail] = {
    "apertus.modeling_apertus": Tail("ApertusForCausalLM"),
    "arcee.modeling_arcee": Tail("ArceeForCausalLM"),
    "bitnet.modeling_bitnet": Tail("BitNetForCausalLM"),
    "cwm.modeling_cwm": Tail("CwmForCausalLM"),
    "diffllama.modeling_diffllama": Tail("DiffLlamaForCausalLM"),
    "ernie4_5.modeling_ernie4_5": Tail("Ernie4_5ForCausalLM"),
    "exaone4.modeling_exaone4": Tail("Exaone4ForCausalLM"),
    "gemma.modeling_gemma": Tail("GemmaForCausalLM"),
    "gemma2.modeling_gemma2": Tail("Gemma2ForCausalLM", softcap=True),
    "gemma3.modeling_gemma3": Tail("Gemma3ForCausalLM", softcap=True),
    "glm.modeling_glm": Tail("GlmForCausalLM"),
    "glm4.modeling_glm4": Tail("Glm4ForCausalLM"),
    "gpt2.modeling_gpt2": Tail("GPT2LMHeadModel", base="transformer", output="CausalLMOutputWithCrossAttentions"),
    "gpt_neox.modeling_gpt_neox": Tail("GPTNeoXForCausalLM", base="gpt_neox"),
    "gptj.modeling_gptj": Tail("GPTJForCausalLM", base="transformer"),
    "helium.modeling_helium": Tail("HeliumForCausalLM"),
    "lfm2.modeling_lfm2": Tail("Lfm2ForCausalLM"),
    "llama.modeling_llama": Tail("LlamaForCausalLM"),
    "ministral.modeling_ministral": Tail("MinistralForCausalLM"),
    "ministral3.modeling_ministral3": Tail("Ministral3ForCausalLM"),
    "mistral.modeling_mistral": Tail("MistralForCausalLM"),
    "nemotron.modeling_nemotron": Tail("NemotronForCausalLM"),
    "olmo.modeling_olmo": Tail("OlmoForCausalLM"),
    "olmo2.modeling_olmo2": Tail("Olmo2ForCausalLM"),
    "olmo3.modeling_olmo3": Tail("Olmo3ForCausalLM"),
    "opt.modeling_opt": Tail("OPTForCausalLM", base="model.decoder"),
    "persimmon.modeling_persimmon": Tail("PersimmonForCausalLM"),
    "phi.modeling_phi": Tail("PhiForCausalLM"),
    "phi3.modeling_phi3": Tail("Phi3ForCausalLM"),
    "qwen2.modeling_qwen2": Tail("Qwen2ForCausalLM"),
    "qwen3.modeling_qwen3": Tail("Qwen3ForCausalLM"),
    "seed_oss.modeling_seed_oss": Tail("SeedOssForCausalLM"),
    "smollm3.modeling_smollm3": Tail("SmolLM3ForCausalLM"),
    "stablelm.modeling_stablelm": Tail("StableLmForCausalLM"),
    "starcoder2.modeling_starcoder2": Tail("Starcoder2ForCausalLM"),
}

NO_LOGITS = "logits are None in training"
"""What a user must know about a model that is taken."""

_PACKAGE = "transformers.models."
_OF_THE_HEAD = ("labels", "logits_to_keep", "return_dict")
"""Arguments that the hidden states do not depend on."""


def is_language_model(model_class: type) -> bool:
    """Whether the class is a causal language model of transformers, known here or not."""
    package = sys.modules.get("transformers.modeling_utils")
    is_theirs = package is not None and issubclass(model_class, package.PreTrainedModel)
    return is_theirs and model_class.__name__.endswith(("ForCausalLM", "LMHeadModel"))


def tail_of(model_class: type) -> Tail | None:
    """What the class does, if it runs the forward of one of `LANGUAGE_MODELS`."""
    forward: Any = getattr(model_class, "forward", None)
    module_name = getattr(forward, "__module__", "")
    tail = LANGUAGE_MODELS.get(module_name.removeprefix(_PACKAGE))
    # by name as well: a function that replaces the forward in its class is not the one known here
    if tail is None or forward.__qualname__ != f"{tail.class_name}.forward":
        return None
    known = getattr(sys.modules.get(module_name), tail.class_name, None)
    return tail if getattr(known, "forward", None) is forward else None


def check_head(model: Any) -> Head:
    """The head of ``model``.

    Raises:
        NotFused: the loss is more than the cross-entropy of a linear layer, with LoRA over it or without.
    """
    head = read_head(model)
    if head.weight.shape[0] != model.config.vocab_size:
        raise NotFused(f"its head has {head.weight.shape[0]} rows for a vocabulary of {model.config.vocab_size}")
    losses: Any = sys.modules.get("transformers.loss.loss_utils")
    if losses is None or model.loss_function is not losses.ForCausalLMLoss:
        raise NotFused("its loss_function is not transformers' ForCausalLMLoss")
    return head


@functools.cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def wants_loss_alone(original: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The call's arguments by name, if it is one of training that gives labels and asks for no logits."""
    if not model.training or torch.compiler.is_compiling():
        return None
    bound = _signature(original.forward).bind(model, *args, **kwargs).arguments
    arguments = {**bound.pop("kwargs", {}), **bound}
    del arguments["self"]
    keep = arguments.get("logits_to_keep", 0)
    asks_for_logits = not isinstance(keep, int) or keep != 0
    return None if arguments.get("labels") is None or asks_for_logits else arguments


def output_without_logits(original: Any, model: Any, arguments: dict[str, Any], backend: str | None) -> Any:
    """What the original returns for a call in training, but for logits.

    Raises:
        NotFused: it takes something that is not covered here.
    """
    tail = tail_of(original)
    assert tail is not None
    head = check_head(model)
    if "past_key_values" in arguments:
        raise NotFused("called with past_key_values")
    returns_tuple = arguments.get("return_dict") is False
    if returns_tuple or (arguments.get("return_dict") is None and not model.config.return_dict):
        raise NotFused("it is to return a tuple")
    inputs = {name: value for name, value in arguments.items() if name not in _OF_THE_HEAD}
    outputs = model.get_submodule(tail.base)(**inputs)
    loss = _loss(model, tail, outputs.last_hidden_state, head, arguments, backend)
    output_class = getattr(sys.modules["transformers.modeling_outputs"], tail.output)
    names = ("cache", "hidden_states", "attentions", "cross_attentions")
    others = {name: getattr(outputs, name, None) for name in names if name in output_class.__dataclass_fields__}
    return output_class(loss=loss, **others)


def _loss(
    model: Any, tail: Tail, hidden: Tensor, head: Head, arguments: Mapping[str, Any], backend: str | None
) -> Tensor:
    """As `ForCausalLMLoss` of transformers: its arguments, and what they do, are the same."""
    ignore_index = arguments.get("ignore_index", -100)
    labels = arguments.get("shift_labels")
    if labels is None:
        labels = nn.functional.pad(arguments["labels"], (0, 1), value=ignore_index)[..., 1:]
    items = arguments.get("num_items_in_batch")
    hidden = hidden.flatten(0, -2)
    loss = linear_cross_entropy(
        hidden,
        head.weight,
        labels.reshape(-1).to(hidden.device),
        head.bias,
        ignore_index=ignore_index,
        reduction="mean" if items is None else "sum",
        softcap=model.config.final_logit_softcapping if tail.softcap else None,
        low_rank=head.low_rank(hidden),
        backend=backend,
    ).float()
    if items is None:
        return loss
    return loss / (items.to(loss.device) if isinstance(items, Tensor) else items)


def check_model(model: Any) -> Head:
    """Its head, or `NotFused` with why the loss of ``model`` cannot be computed without logits."""
    if tail_of(original_class(type(model))) is None:
        raise NotFused("its loss is computed from logits: no forward that is known here")
    if has_own_forward(model):
        raise NotFused("its loss is computed from logits: its forward was replaced on the instance")
    return check_head(model)
