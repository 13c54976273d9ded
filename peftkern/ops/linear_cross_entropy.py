"""The head of a language model and its loss in one: no tensor of [tokens, vocabulary] exists at any time.

    zₜ = c tanh((Wₕ hₜ + B uₜ + b) / c)     scores of one token; without soft-capping Wₕ hₜ + B uₜ + b
    lₜ = log Σᵥ exp(zₜᵥ)
    ℓₜ = lₜ - (1-ε) zₜ[yₜ] - ε/V Σᵥ zₜᵥ + ζ lₜ²       cross-entropy, label smoothing ε, z-loss ζ
    sum = Σₜ wₜ ℓₜ,   mean = Σₜ wₜ ℓₜ / Σₜ wₜ          over the tokens that have a label

    eₜᵥ = (softmax(zₜ)ᵥ (1 + 2 ζ lₜ) - (1-ε) [v = yₜ] - ε/V) (1 - (zₜᵥ / c)²)
    dhₜ = wₜ eₜ Wₕ        dWₕ = Σₜ wₜ eₜᵀ hₜ        db = Σₜ wₜ eₜ
    duₜ = wₜ eₜ B         dB = Σₜ wₜ eₜᵀ uₜ

Shapes: h [tokens, hidden], Wₕ [vocabulary, hidden], b [vocabulary], y and w [tokens]. A head may have a low-rank part,
u [tokens, r] and B [vocabulary, r]: r more columns of the same product, as under LoRA, where uₜ = s A D(hₜ).

Tokens without a label are dropped before the first product. The others pass in chunks through one buffer. Where
gradients are wanted, the forward pass makes those of a chunk from its scores right away: three products, or two with a
frozen head, and the backward pass only scales. What is kept for it is dh and du and, of a trained head, dWₕ, dB and db.
A loss per token (``reduction="none"``) over a trained head is the exception: its dWₕ depends on what comes from above,
so h is kept and the scores are made twice.

Sums are in float32 (float64 for a float64 h). Backends multiply bfloat16 and float16 as PyTorch does, so that
scores and errors may be rounded to that dtype, each once.

Source: Cut Your Losses in Large-Vocabulary Language Models, Wijmans et al. 2024 (arXiv:2411.09009) for the idea that
scores need not be kept; label smoothing as in Szegedy et al. 2016 (arXiv:1512.00567), section 7; z-loss as in PaLM,
Chowdhery et al. 2022 (arXiv:2204.02311), section 5; soft-capping as in Gemma 2 (arXiv:2408.00118), section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.formats import QuantizedTensor
from peftkern.ops.lora_linear import (
    FLOAT_DTYPES,
    WEIGHT_ARGUMENTS,
    WEIGHT_SCHEMA,
    Weight,
    as_matrix,
    compute_dtype,
    dense_weight,
    flatten_weight,
    in_autocast_dtype,
    is_plain_eager,
    unflatten_weight,
    weight_tensors,
)

Reduction = Literal["mean", "sum", "none"]
_REDUCTIONS = ("mean", "sum", "none")


class Terms(NamedTuple):
    """What is added to the cross-entropy, and done to the scores before.

    Attributes:
        ignore_index: label of the tokens that have none.
        label_smoothing: ε.
        z_loss: ζ.
        softcap: c; ``None`` for none.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None


class LowRank(NamedTuple):
    """What is added to the scores beside the product with the weight: ``inner @ lora_B.T``.

    Attributes:
        inner: u, [tokens, r].
        lora_B: [vocabulary, r].
    """

    inner: Tensor
    lora_B: Tensor


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool
    inner: bool = False
    lora_B: bool = False


class Result(NamedTuple):
    """What a backend gives.

    Attributes:
        losses: wₜ ℓₜ, [tokens], float32 (float64 for a float64 h); zero for tokens without a label.
        grad_hidden: of their sum, [tokens, hidden], in the dtype of h; ``None`` where it is not wanted, as the others.
        grad_weight: [vocabulary, hidden], in the dtype of the weight.
        grad_bias: [vocabulary], in the dtype of the weight.
        grad_inner, grad_lora_B: [tokens, r] and [vocabulary, r], in the dtype of the losses.
    """

    losses: Tensor
    grad_hidden: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    grad_inner: Tensor | None = None
    grad_lora_B: Tensor | None = None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Weight,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    token_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """The cross-entropy of ``hidden @ weight.T + bias`` against ``labels``, without the scores ever being there.

    Labels are not shifted: ``labels[i]`` is what ``hidden[i]`` has to predict. Differentiable, once, in ``hidden``, a
    dense ``weight``, ``bias`` and ``low_rank``; only what asks for a gradient gets one, and costs a product.

    Args:
        hidden: [..., hidden], float64, float32, bfloat16 or float16.
        weight: [vocabulary, hidden], of the dtype of ``hidden`` (cast under autocast), or a ``QuantizedTensor``, of
            which a block of rows is decoded at a time.
        labels: int64, of the leading shape of ``hidden``, each ``ignore_index`` or in [0, vocabulary).
        bias: [vocabulary], floating point.
        ignore_index: label of the tokens that count nowhere and cost nothing.
        reduction: ``"mean"`` over the tokens with a label, by weight where there are weights; ``"sum"``; or ``"none"``.
        token_weights: of the shape of ``labels``, floating point. They get no gradient.
        label_smoothing: ε in [0, 1]: this part of the target is spread over the whole vocabulary.
        z_loss: ζ >= 0: adds ζ times the squared logarithm of the softmax's denominator.
        softcap: c > 0: scores are squeezed into (-c, c) first.
        low_rank: u [..., r] and B [vocabulary, r] of any floating-point dtype: ``u @ B.T`` is added to the scores, with
            sums and gradients in float32 (float64). Under LoRA, u is ``scaling * dropout(hidden) @ lora_A.T``; several
            adapters are one with their columns side by side.
        backend: name of the backend that must run it; ``None`` lets the table decide.

    Returns:
        float32 (float64 for a float64 ``hidden``), without dimensions, or for ``"none"`` of the shape of ``labels``,
        zero where there is no label. As in PyTorch the mean over no labels at all is NaN and their sum 0; gradients
        are 0 in both cases.

    Raises:
        ValueError: a shape, device, label or option does not fit, or ``token_weights`` asks for a gradient.
        TypeError: an argument has another type or dtype.
        BackendError: a forced backend cannot run the call.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction must be one of {list(_REDUCTIONS)}, got {reduction!r}")
    terms = Terms(ignore_index, label_smoothing, z_loss, softcap)
    _check_terms(terms)
    _check_tensors(hidden, weight, labels, bias, token_weights, ignore_index)
    _check_low_rank(low_rank, hidden, weight)
    hidden = in_autocast_dtype(hidden)
    if isinstance(weight, Tensor):
        weight = weight.to(hidden.dtype)
    if bias is not None:
        bias = bias.to(hidden.dtype)
    weights = None if token_weights is None else token_weights.detach().to(compute_dtype(hidden)).reshape(-1)
    flat = labels.reshape(-1)
    part = None
    if low_rank is not None:
        inner, lora_B = (tensor.to(compute_dtype(hidden)) for tensor in low_rank)
        part = LowRank(as_matrix(inner), lora_B)
    loss = _losses(as_matrix(hidden), weight, bias, flat, weights, part, terms, reduction != "none", backend)
    if reduction == "none":
        return loss.view(labels.shape)
    return loss if reduction == "sum" else loss / _denominator(flat, weights, ignore_index, loss)


def label_logprobs(
    hidden: Tensor,
    weight: Weight,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """The logarithm of the probability that each token's label has: what preference losses and data selection need.

    Differentiable and checked as `linear_cross_entropy`, of which it is the negative, token by token.

    Returns:
        float32 (float64 for a float64 ``hidden``), of the shape of ``labels``; 0 where there is no label.
    """
    return -linear_cross_entropy(
        hidden,
        weight,
        labels,
        bias,
        ignore_index=ignore_index,
        reduction="none",
        softcap=softcap,
        low_rank=low_rank,
        backend=backend,
    )


def _denominator(labels: Tensor, weights: Tensor | None, ignore_index: int, loss: Tensor) -> Tensor:
    labelled = (labels != ignore_index).to(loss.dtype)
    return (labelled if weights is None else labelled * weights).sum()


# ---- checks


def _check_terms(terms: Terms) -> None:
    if not 0.0 <= terms.label_smoothing <= 1.0:
        raise ValueError(f"linear_cross_entropy: label_smoothing must be in [0, 1], got {terms.label_smoothing}")
    if not terms.z_loss >= 0.0:
        raise ValueError(f"linear_cross_entropy: z_loss must be at least 0, got {terms.z_loss}")
    if terms.softcap is not None and not terms.softcap > 0.0:
        raise ValueError(f"linear_cross_entropy: softcap must be above 0 or None, got {terms.softcap}")


def _check_tensors(
    hidden: Tensor, weight: Weight, labels: Tensor, bias: Tensor | None, token_weights: Tensor | None, ignore: int
) -> None:
    if not isinstance(weight, Tensor | QuantizedTensor):
        raise TypeError(
            f"linear_cross_entropy: weight must be a tensor or a QuantizedTensor, got {type(weight).__name__}"
        )
    _check_tensor("hidden", hidden, FLOAT_DTYPES)
    _check_tensor("labels", labels, (torch.int64,))
    if isinstance(weight, Tensor):
        _check_tensor("weight", weight, FLOAT_DTYPES)
        _check_same_dtype(hidden, weight)
    if hidden.dim() == 0 or len(weight.shape) != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"linear_cross_entropy: hidden must be [..., hidden] and weight [vocabulary, hidden]; got "
            f"{list(hidden.shape)} and {list(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy: labels must be {list(hidden.shape[:-1])} as hidden is, got {list(labels.shape)}"
        )
    if bias is not None:
        _check_tensor("bias", bias, FLOAT_DTYPES)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"linear_cross_entropy: bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    if token_weights is not None:
        _check_token_weights(token_weights, labels)
    named = {"weight": weight, "labels": labels, "bias": bias, "token_weights": token_weights}
    for name, value in named.items():
        if value is not None and value.device != hidden.device:
            raise ValueError(
                f"linear_cross_entropy: {name} is on {value.device} and hidden on {hidden.device}; move one of them"
            )
    _check_labels(labels, weight.shape[0], ignore)


def _check_tensor(name: str, value: Any, dtypes: Sequence[torch.dtype]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"linear_cross_entropy: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"linear_cross_entropy: {name} must be of {names}; got {value.dtype}")


def _check_same_dtype(hidden: Tensor, weight: Tensor) -> None:
    if weight.dtype == hidden.dtype or (not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type)):
        return
    raise TypeError(
        f"linear_cross_entropy: weight must have the dtype of hidden, {hidden.dtype}; got {weight.dtype}. Cast one of "
        "them, or use autocast"
    )


def _check_token_weights(token_weights: Tensor, labels: Tensor) -> None:
    _check_tensor("token_weights", token_weights, FLOAT_DTYPES)
    if token_weights.shape != labels.shape:
        raise ValueError(
            f"linear_cross_entropy: token_weights must be {list(labels.shape)} as labels are, got "
            f"{list(token_weights.shape)}"
        )
    if token_weights.requires_grad:
        raise ValueError(
            "linear_cross_entropy: token_weights get no gradient here; take reduction='none' and multiply its result"
        )


def _check_low_rank(low_rank: tuple[Tensor, Tensor] | None, hidden: Tensor, weight: Weight) -> None:
    if low_rank is None:
        return
    if not isinstance(low_rank, tuple) or len(low_rank) != 2:
        raise TypeError(
            f"linear_cross_entropy: low_rank must be a pair of tensors or None, got {type(low_rank).__name__}"
        )
    for index, value in enumerate(low_rank):
        _check_tensor(f"low_rank[{index}]", value, FLOAT_DTYPES)
    inner, lora_B = low_rank
    if lora_B.dim() != 2 or lora_B.shape[0] != weight.shape[0] or inner.shape != (*hidden.shape[:-1], lora_B.shape[1]):
        raise ValueError(
            f"linear_cross_entropy: low_rank must be {[*hidden.shape[:-1], 'r']} and {[weight.shape[0], 'r']}, got "
            f"{list(inner.shape)} and {list(lora_B.shape)}"
        )
    for index, value in enumerate(low_rank):
        if value.device != hidden.device:
            raise ValueError(
                f"linear_cross_entropy: low_rank[{index}] is on {value.device} and hidden on {hidden.device}; move one "
                "of them"
            )


def _check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    # elsewhere reading them would make the host wait, and under a tracing mode there is nothing to read
    if labels.device.type != "cpu" or labels.numel() == 0 or not is_plain_eager((labels,)):
        return
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if wrong.any():
        raise ValueError(
            f"linear_cross_entropy: labels must be {ignore_index} (ignore_index) or in [0, {vocabulary}), got "
            f"{int(labels[wrong][0])}"
        )


# ---- reference


@registry.register("linear_cross_entropy", "reference")
def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Weight,
    bias: Tensor | None,
    labels: Tensor,
    token_weights: Tensor | None,
    terms: Terms,
    needs: Needs,
    low_rank: LowRank | None = None,
) -> Result:
    """Losses and gradients in plain PyTorch with all scores at once, in float32 (float64 for float64).

    hidden is [tokens, hidden], labels and token_weights [tokens]; low_rank is in the dtype of the sums.
    """
    dtype = compute_dtype(hidden)
    matrix, weight_dtype = dense_weight(weight, dtype), weight.dtype
    labelled = labels != terms.ignore_index
    target = labels.where(labelled, 0)[:, None]
    factor = labelled.to(dtype) if token_weights is None else torch.where(labelled, token_weights, 0.0)
    scores = hidden.to(dtype) @ matrix.t()
    if low_rank is not None:
        scores = scores + low_rank.inner @ low_rank.lora_B.t()
    if bias is not None:
        scores = scores + bias.to(dtype)
    slope = None
    if terms.softcap is not None:
        squeezed = torch.tanh(scores / terms.softcap)
        scores, slope = terms.softcap * squeezed, 1.0 - squeezed * squeezed
    spread = terms.label_smoothing / scores.shape[1]
    logsumexp = scores.logsumexp(dim=1, keepdim=True)
    losses = logsumexp - (1.0 - terms.label_smoothing) * scores.gather(1, target) - spread * scores.sum(1, keepdim=True)
    losses = (losses + terms.z_loss * logsumexp * logsumexp).squeeze(1)
    error = (scores - logsumexp).exp() * (1.0 + 2.0 * terms.z_loss * logsumexp) - spread
    error.scatter_add_(1, target, torch.full_like(error[:, :1], terms.label_smoothing - 1.0))
    error = (error if slope is None else error * slope) * factor[:, None]
    error = error.masked_fill(~labelled[:, None], 0.0)

    def against(rows: Tensor) -> Tensor:
        # what an ignored token holds must not matter, also where it is not a number
        return error.t() @ rows.to(dtype).masked_fill(~labelled[:, None], 0.0)

    return Result(
        torch.where(labelled, losses * factor, 0.0),
        (error @ matrix).to(hidden.dtype) if needs.hidden else None,
        against(hidden).to(weight_dtype) if needs.weight else None,
        error.sum(0).to(hidden.dtype) if needs.bias else None,
        error @ low_rank.lora_B if low_rank is not None and needs.inner else None,
        against(low_rank.inner) if low_rank is not None and needs.lora_B else None,
    )


# ---- what both ways to call it share

_WEIGHT_TENSORS = 4
"""How many of a flattened weight's parts are tensors, or could be."""


def _needs_now(needs: Needs, reduced: bool) -> Needs:
    """The gradients that the forward pass makes: all of them, unless one depends on the gradients of the losses."""
    of_parameters = needs.weight or needs.bias or needs.lora_B
    return Needs(False, False, False) if not reduced and of_parameters else needs


def _run(*arguments: Any, backend: str | None) -> Result:
    # the operands have their dtypes, and autocast would round again what is summed in float32
    hidden = arguments[0]
    with nullcontext() if hidden.is_meta else torch.autocast(hidden.device.type, enabled=False):
        result: Result = registry.run("linear_cross_entropy", *arguments, backend=backend)
        return result


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """``gradient`` times ``factor``, in its own memory where no second backward pass will ask for it."""
    # a graph that is kept may be run again
    keep = torch._C._autograd._get_current_graph_task_keep_graph()
    return (gradient * factor).to(gradient.dtype) if keep else gradient.mul_(factor)


def _scale_of(grad: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    # the mean over no tokens hands on 1/0, and the gradients of nothing are zero
    return torch.where((labels != ignore_index).any(), grad, 0.0)


def _backward(ctx: Any, grad: Tensor, run: Callable[..., Result]) -> tuple[Tensor | None, ...]:
    """The gradients, in the order of `Needs`."""
    needs, terms = ctx.needs, ctx.terms
    if ctx.deferred:
        hidden, bias, labels, token_weights, inner, lora_B, *tensors = ctx.saved_tensors
        weight = unflatten_weight(hidden.dtype, (*tensors, *ctx.weight_options))
        weights = grad if token_weights is None else grad * token_weights
        return run(hidden, weight, bias, labels, weights, terms, needs, _low_rank(inner, lora_B))[1:]
    labels, *gradients = ctx.saved_tensors
    scale = _scale_of(grad, labels, terms.ignore_index)
    if not ctx.reduced:
        scale = scale[:, None]
    return tuple(None if gradient is None else _scaled(gradient, scale) for gradient in gradients)


def _low_rank(inner: Tensor | None, lora_B: Tensor | None) -> LowRank | None:
    return None if inner is None or lora_B is None else LowRank(inner, lora_B)


def _save(ctx: Any, operands: Sequence[Any], gradients: Sequence[Tensor | None], needs: Needs, reduced: bool) -> None:
    """operands: as the backends take them, the low-rank part as two."""
    hidden, weight, *rest = operands
    flat = flatten_weight(weight)
    ctx.needs, ctx.reduced, ctx.deferred = needs, reduced, _needs_now(needs, reduced) != needs
    ctx.weight_options = flat[_WEIGHT_TENSORS:]
    ctx.save_for_backward(*((hidden, *rest, *flat[:_WEIGHT_TENSORS]) if ctx.deferred else (operands[3], *gradients)))


# ---- eager calls


class _LinearCrossEntropy(torch.autograd.Function):
    """The operator's twin for plain eager calls."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Weight,
        bias: Tensor | None,
        inner: Tensor | None,
        lora_B: Tensor | None,
        labels: Tensor,
        token_weights: Tensor | None,
        terms: Terms,
        reduced: bool,
        backend: str | None,
    ) -> Tensor:
        operands, low_rank = (hidden, weight, bias, labels, token_weights), _low_rank(inner, lora_B)
        needs = Needs(*ctx.needs_input_grad[:5])
        now = _needs_now(needs, reduced)
        losses, *gradients = _run(*operands, terms, now, low_rank, backend=backend)
        ctx.terms, ctx.backend = terms, backend
        _save(ctx, (*operands, inner, lora_B), gradients, needs, reduced)
        return losses.sum() if reduced else losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        def run(*arguments: Any) -> Result:
            return _run(*arguments, backend=ctx.backend)

        return *_backward(ctx, grad, run), None, None, None, None, None


_apply = cast(Callable[..., Tensor], _LinearCrossEntropy.apply)


def _losses(
    hidden: Tensor,
    weight: Weight,
    bias: Tensor | None,
    labels: Tensor,
    token_weights: Tensor | None,
    low_rank: LowRank | None,
    terms: Terms,
    reduced: bool,
    backend: str | None,
) -> Tensor:
    """Σₜ wₜ ℓₜ where ``reduced``, otherwise every wₜ ℓₜ."""
    inner, lora_B = low_rank or (None, None)
    optional = [tensor for tensor in (token_weights, inner, lora_B) if tensor is not None]
    if is_plain_eager((hidden, *weight_tensors(weight), labels, *optional), bias):
        return _apply(hidden, weight, bias, inner, lora_B, labels, token_weights, terms, reduced, backend)
    asked = [
        isinstance(value, Tensor) and torch.is_grad_enabled() and value.requires_grad
        for value in (hidden, weight, bias, inner, lora_B)
    ]
    needs = _needs_now(Needs(*asked), reduced)
    loss: Tensor
    loss, *_ = torch.ops.peftkern.linear_cross_entropy(
        hidden, *flatten_weight(weight), bias, labels, token_weights, inner, lora_B, *terms, *needs, reduced, backend
    )
    return loss


# ---- operators

_SCHEMA = (
    f"(Tensor hidden, {WEIGHT_SCHEMA}, Tensor? bias, Tensor labels, Tensor? token_weights, Tensor? inner, "
    "Tensor? lora_B, int ignore_index, float label_smoothing, float z_loss, float? softcap, bool need_hidden, "
    "bool need_weight, bool need_bias, bool need_inner, bool need_lora_B, bool reduced, str? backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_BIAS = 1 + WEIGHT_ARGUMENTS
_INNER = _BIAS + 3
"""Positions of the bias and of the low-rank part among the arguments; the weight's own tensor is at 1."""


class _Call(NamedTuple):
    """The operator's arguments."""

    operands: tuple[Tensor, Weight, Tensor | None, Tensor, Tensor | None]
    low_rank: LowRank | None
    terms: Terms
    needs: Needs
    reduced: bool
    backend: str | None


@torch.library.custom_op("peftkern::linear_cross_entropy", mutates_args=(), schema=_SCHEMA)
def _operator(*arguments: Any) -> tuple[Tensor, ...]:
    call = _unflatten(arguments)
    losses, *gradients = _run(*call.operands, call.terms, call.needs, call.low_rank, backend=call.backend)
    # an operator has no optional results
    made = [losses.new_empty(0) if gradient is None else gradient for gradient in gradients]
    return losses.sum() if call.reduced else losses, *made


def _unflatten(arguments: Sequence[Any]) -> _Call:
    hidden, rest = arguments[0], arguments[_BIAS:]
    weight = unflatten_weight(hidden.dtype, arguments[1:_BIAS])
    terms, needs = Terms(*rest[5:9]), Needs(*rest[9:14])
    return _Call((hidden, weight, *rest[:3]), _low_rank(*rest[3:5]), terms, needs, rest[14], rest[15])


@_operator.register_fake
def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    (hidden, weight, _bias, labels, _weights), low_rank, _, needs, reduced, _ = _unflatten(arguments)
    inner, lora_B = low_rank or (labels, labels)
    losses = hidden.new_empty([] if reduced else labels.shape, dtype=compute_dtype(hidden))
    return (
        losses,
        hidden.new_empty(hidden.shape) if needs.hidden else losses.new_empty(0),
        hidden.new_empty(weight.shape) if needs.weight else losses.new_empty(0),
        hidden.new_empty(weight.shape[:1]) if needs.bias else losses.new_empty(0),
        losses.new_empty(inner.shape if needs.inner else 0),
        losses.new_empty(lora_B.shape if needs.lora_B else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = _unflatten(inputs)
    ctx.terms, ctx.backend = call.terms, call.backend
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    gradients = [value if need else None for value, need in zip(output[1:], call.needs, strict=True)]
    needs = Needs(*(ctx.needs_input_grad[position] for position in (0, 1, _BIAS, _INNER, _INNER + 1)))
    _save(ctx, (*call.operands, *inputs[_INNER : _INNER + 2]), gradients, needs, call.reduced)


def _operator_backward(ctx: Any, grad: Tensor | None, *_grads: Any) -> tuple[Tensor | None, ...]:
    def run(hidden: Tensor, weight: Weight, *arguments: Any) -> Result:
        *operands, terms, needs, low_rank = arguments
        low_rank = low_rank or (None, None)
        made = torch.ops.peftkern.linear_cross_entropy(
            hidden, *flatten_weight(weight), *operands, *low_rank, *terms, *needs, False, ctx.backend
        )
        wanted = [value if need else None for value, need in zip(made[1:], needs, strict=True)]
        return Result(made[0], *wanted)

    hidden, weight, *rest = (None,) * 5 if grad is None else _backward(ctx, grad, run)
    bias, inner, lora_B = rest
    return hidden, weight, *(None,) * (WEIGHT_ARGUMENTS - 1), bias, None, None, inner, lora_B, *(None,) * 11


_operator.register_autograd(_operator_backward, setup_context=_setup_context)


def labelled_tokens(labels: Tensor, ignore_index: int) -> int:
    """How many tokens have a label; all of them where that cannot be read."""
    readable = type(labels) is Tensor and not labels.is_meta
    return int((labels != ignore_index).sum()) if readable else labels.numel()


def operator_flops(*arguments: Any, out_val: Any = None, **_kwargs: Any) -> int:
    """FLOPs of the operator's products, those that make gradients included.

    `peftkern.select.flops` enters it in PyTorch's table, which importing would import Triton.
    """
    (_hidden, weight, _bias, labels, _weights), low_rank, terms, needs, *_ = _unflatten(arguments)
    elements = weight.shape.numel() * (1 + needs.hidden + needs.weight)
    if low_rank is not None:
        elements += low_rank.lora_B.numel() * (1 + needs.inner + needs.lora_B)
    return 2 * labelled_tokens(labels, terms.ignore_index) * elements
