"""D-Pruner: drop the weights that neither general knowledge nor a domain needs.

    Hₗ = Xₗᵀ Xₗ + λI                                       the inputs of layer l, of a general text
    G_ij = W_ij² / [Hₗ⁻¹]_jj                               the error that dropping W_ij costs at best (OBS)
    L = L_domain + μ Σ G (θ' - θ)²,  θ' = θ - α g          of which the gradient is taken as  g + 2 μ α² G ⊙ g
    S = |Σ_batches (∂L/∂θ · θ + c (∂L/∂θ · θ)²)|           what is kept is the largest of S, in every matrix

g is the gradient of the domain's loss; the second derivatives that the regularised loss would have are left out, as
published. The square stands for the diagonal of the empirical Fisher information; c = ½ is the published sign, c = -½
the Taylor expansion of dropping a weight, c = 0 the first order alone.

Nothing of the size of the weights is kept but the bits of the masks and, for the layers at work, S; a gradient exists
for one layer at a time, from its input and that of its output. So quantized weights can be pruned as well.

Source: Pruning as a Domain-specific LLM Extractor, Zhang et al. 2024 (arXiv:2405.06275), sections 3 and 4; the error of
dropping a weight: Optimal Brain Surgeon, Hassibi and Stork 1993. The authors have withdrawn their code; what the
abstract leaves open is an argument here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftkern.formats import BitMask, QuantizedTensor, largest_mask
from peftkern.formats.bit_mask import complement, kept_count
from peftkern.nn.masked_linear import masked_weight
from peftkern.ops.dequantize import dequantize
from peftkern.select.pieces import probing
from peftkern.sparse.layers import base_layer, linear_layers
from peftkern.sparse.masking import check_maskable, mask_layers, release_masks

Batches = Collection[Mapping[str, Any]]
"""What ``model(**batch)`` takes, several times over: a list, a DataLoader."""


# ---- the formulas


def inverse_diagonal(gram: Tensor, damping: float = 0.01) -> Tensor:
    """[(XᵀX + λI)⁻¹]_jj, with λ = ``damping`` times the mean of the diagonal of XᵀX.

    Args:
        gram: XᵀX, [in, in]. A column of X that is all zero counts as one of length 1.
        damping: 0 or more.

    Returns:
        [in], in the dtype of ``gram``.

    Raises:
        ValueError: the damped matrix is not positive definite.
    """
    diagonal = gram.diagonal()
    damped = gram.clone()
    damped.diagonal().copy_(torch.where(diagonal == 0, 1.0, diagonal) + damping * diagonal.mean())
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed) or not bool(factor.isfinite().all()):
        raise ValueError(
            f"inverse_diagonal: XᵀX + λI is not positive definite with damping={damping}; use more tokens or more of it"
        )
    return torch.cholesky_inverse(factor).diagonal().clone()


def general_importance(weight: Tensor, inverse: Tensor) -> Tensor:
    """G, [out, in]: the squared error that dropping one weight adds at least, the others of its row adapting.

    Args:
        weight: [out, in].
        inverse: [in], of `inverse_diagonal`.
    """
    return weight.square() / inverse


def dual_importance(
    weight: Tensor, gradient: Tensor, general: Tensor | None, regularization: float, lookahead: float, second: float
) -> Tensor:
    """∂L/∂θ · θ + c (∂L/∂θ · θ)² of one batch, [out, in], still with its sign.

    Args:
        weight, gradient: [out, in]; the gradient is that of the domain's loss.
        general: G, [out, in]; ``None`` stands for zero.
        regularization, lookahead, second: μ, α and c.
    """
    change = gradient * weight
    if general is not None:
        change.mul_(1 + 2 * regularization * lookahead**2 * general)
    return change + second * change.square()


# ---- the pruner


class DPruner:
    """Prunes the linear layers of a model to what is important in general and for a domain.

        pruner = DPruner(model, sparsity=0.5)
        pruner.collect_general(general_batches)     # inputs of the layers: forward passes alone
        pruner.collect(domain_batches)              # gradients
        pruner.apply()

    The model may be dense or quantized, trained or frozen, with PEFT adapters over it or without; while batches run it
    is in evaluation mode, and its parameters get no gradient. Batches should be of equal size: their losses count
    alike. Rows that an ``attention_mask`` of a batch leaves out are no input of a layer.

    Args:
        model: that gives a loss for ``model(**batch)``.
        sparsity: the share of every matrix that is dropped.
        regularization: μ; 0 prunes for the domain alone, without `collect_general`.
        lookahead: α, the step size of the published regularisation.
        second_order: c.
        damping: of the inverse, as for `inverse_diagonal`.
        block_columns: ``None`` keeps the share of every matrix; a number keeps it of every so many columns.
        targets: which layers, as for `peftkern.sparse.linear_layers`.
        layers_at_once: ``None`` works on all layers in one pass over the batches; a number bounds the memory to that of
            so many layers (XᵀX and S, in float32), at the price of a pass for each of them.

    Attributes:
        masks: by name of the layer; empty before `collect`.

    Raises:
        ValueError: a number is out of its range, or no layer matches or one has a mask already.
        TypeError: a layer is of a class that cannot be masked, such as those of bitsandbytes.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float = 0.5,
        *,
        regularization: float = 0.1,
        lookahead: float = 0.03,
        second_order: float = 0.5,
        damping: float = 0.01,
        block_columns: int | None = None,
        targets: str | Sequence[str] = "all-linear",
        layers_at_once: int | None = None,
    ) -> None:
        _check_at_least("regularization", regularization, 0.0)
        _check_at_least("damping", damping, 0.0)
        _check_at_least("block_columns", block_columns, 1)
        _check_at_least("layers_at_once", layers_at_once, 1)
        if not 0.0 < sparsity < 1.0:
            raise ValueError(f"DPruner: sparsity must be between 0 and 1, got {sparsity}")
        self.model, self.density = model, complement(sparsity)
        self.regularization, self.lookahead, self.second_order = regularization, lookahead, second_order
        self.damping, self.block_columns, self.layers_at_once = damping, block_columns, layers_at_once
        self.masks: dict[str, BitMask] = {}
        self._layers = {name: base_layer(layer) for name, layer in linear_layers(model, targets).items()}
        self._inverse: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            check_maskable(name, layer, "DPruner")

    def collect_general(self, batches: Batches) -> None:
        """Take the inputs of the layers from a general text: XᵀX of every layer, of which [in] numbers are kept.

        Raises:
            TypeError: ``batches`` runs out after one pass.
            ValueError: XᵀX of a layer is singular, or a layer was not called.
        """
        _check_batches("collect_general", batches)
        inverse: dict[str, Tensor] = {}
        for layers in self._portions():
            grams = self._grams(layers, batches)
            for name in layers:
                if name not in grams:
                    raise ValueError(f"collect_general: {name} was not called by any batch; leave it out of targets")
                inverse[name] = _inverse(name, grams.pop(name), self.damping)
        self._inverse = inverse

    def collect(self, batches: Batches) -> dict[str, BitMask]:
        """Take the importance of every weight from the domain's batches, and choose what is kept.

        Returns:
            The masks by name of the layer, which is what `masks` is from then on.

        Raises:
            TypeError: ``batches`` runs out after one pass.
            RuntimeError: `collect_general` has not been called, and ``regularization`` is not 0.
            ValueError: a batch has no loss, a layer got no gradient, or its importance is not a number.
        """
        _check_batches("collect", batches)
        if self.regularization > 0 and not self._inverse:
            raise RuntimeError("DPruner: call collect_general(batches) first, or use regularization=0")
        masks: dict[str, BitMask] = {}
        for layers in self._portions():
            scores = self._scores(layers, batches)
            for name in layers:
                if name not in scores:
                    raise ValueError(f"collect: no gradient reached {name}; leave it out of targets")
                masks[name] = self._choose(name, scores.pop(name).abs_())
        self.masks = masks
        return masks

    def apply(self, *, zeros: bool = False) -> None:
        """Put the masks on the model, as `peftkern.sparse.mask_layers` does.

        Args:
            zeros: write zeros into the weights instead, dense or quantized, and leave no masks; that cannot be undone.

        Raises:
            RuntimeError: `collect` has not been called.
            ValueError, TypeError: as `mask_layers` raises them.
        """
        if not self.masks:
            raise RuntimeError("DPruner: call collect(batches) before apply()")
        mask_layers(self.model, self.masks)
        if zeros:
            release_masks(self.model, keep_zeros=True)

    # ---- passes over the batches

    def _portions(self) -> Iterator[dict[str, nn.Module]]:
        remaining = iter(self._layers.items())
        while portion := dict(islice(remaining, self.layers_at_once or len(self._layers))):
            yield portion

    @torch.no_grad()
    def _grams(self, layers: Mapping[str, nn.Module], batches: Batches) -> dict[str, Tensor]:
        grams: dict[str, Tensor] = {}
        kept: Tensor | None = None

        def add(name: str, x: Tensor) -> None:
            rows = _rows(x, kept).float()
            if name in grams:
                grams[name].addmm_(rows.t(), rows)
            else:
                grams[name] = rows.t() @ rows

        with probing(self.model, training=False), _hooked(layers, lambda name, x, y: add(name, x)):
            for batch in batches:
                kept = _kept_tokens(batch)
                self.model(**batch)
        return grams

    def _scores(self, layers: Mapping[str, nn.Module], batches: Batches) -> dict[str, Tensor]:
        """Σ over batches of `dual_importance`, float32, by name of the layer."""
        scores: dict[str, Tensor] = {}
        gradients = _Gradients(lambda name, gradient: self._add_score(scores, name, gradient))
        with probing(self.model, training=False), _hooked(layers, gradients.watch), torch.enable_grad():
            for batch in batches:
                loss: Tensor | None = getattr(self.model(**batch), "loss", None)
                if loss is None:
                    raise ValueError("collect: the model gives no loss for a batch; batches need labels")
                loss.backward()  # type: ignore[no-untyped-call]
                gradients.finish()
        return scores

    @torch.no_grad()
    def _add_score(self, scores: dict[str, Tensor], name: str, gradient: Tensor) -> None:
        weight = _dense(self._layers[name])
        general = general_importance(weight, self._inverse[name]) if self.regularization > 0 else None
        numbers = (self.regularization, self.lookahead, self.second_order)
        score = dual_importance(weight, gradient, general, *numbers)
        scores[name] = scores[name].add_(score) if name in scores else score

    def _choose(self, name: str, scores: Tensor) -> BitMask:
        width = self.block_columns or scores.shape[1]
        try:
            parts = [
                largest_mask(part, kept_count(part.numel(), self.density)) for part in torch.split(scores, width, dim=1)
            ]
        except ValueError as error:
            raise ValueError(f"collect: {name}: {error}") from error
        return BitMask.from_mask(torch.cat([part.mask() for part in parts], dim=1))


# ---- one layer


def _check_at_least(name: str, value: float | None, least: float) -> None:
    if value is not None and not value >= least:
        raise ValueError(f"DPruner: {name} must be at least {least}, got {value}")


def _check_batches(caller: str, batches: Batches) -> None:
    if isinstance(batches, Iterator):
        raise TypeError(f"{caller}: batches must be run through several times; pass a list of them")


def _dense(layer: nn.Module) -> Tensor:
    """The weight of ``layer``, [out, in] float32."""
    weight = masked_weight(layer)
    return dequantize(weight, torch.float32) if isinstance(weight, QuantizedTensor) else weight.detach().float()


def _inverse(name: str, gram: Tensor, damping: float) -> Tensor:
    try:
        return inverse_diagonal(gram, damping)
    except ValueError as error:
        raise ValueError(f"collect_general: {name}: {error}") from error


def _kept_tokens(batch: Mapping[str, Any]) -> Tensor | None:
    mask = batch.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _rows(x: Tensor, kept: Tensor | None) -> Tensor:
    """[tokens, in], without the tokens that are padding, where ``x`` still tells which those are."""
    if kept is not None and x.shape[:-1] == kept.shape:
        return x[kept]
    return x.reshape(-1, x.shape[-1])


# ---- gradients, one layer at a time


class _Gradients:
    """dY ᵀ X of each layer for one batch, handed to ``take`` as soon as it is complete."""

    def __init__(self, take: Callable[[str, Tensor], None]) -> None:
        self._take = take
        self._waiting: dict[str, int] = {}
        self._parts: dict[str, Tensor] = {}

    def watch(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """The output of a call of the layer; what comes back to it makes the gradient."""
        if not torch.is_grad_enabled():
            return y
        self._waiting[name] = self._waiting.get(name, 0) + 1
        x = x.detach()
        anchor = torch.zeros((), requires_grad=True, device=y.device)  # a graph, where nothing below asks for one
        watched = cast(Any, _Watch).apply(y, anchor, lambda grad: self._add(name, grad, x))
        return cast(Tensor, watched)

    def _add(self, name: str, grad: Tensor, x: Tensor) -> None:
        part = grad.reshape(-1, grad.shape[-1]).float().t() @ x.reshape(-1, x.shape[-1]).float()
        self._parts[name] = self._parts[name].add_(part) if name in self._parts else part
        self._waiting[name] -= 1
        if self._waiting[name] == 0:
            self._take(name, self._parts.pop(name))

    def finish(self) -> None:
        """The backward pass is over: calls of which nothing came back count for nothing."""
        for name in list(self._parts):
            self._take(name, self._parts.pop(name))
        self._waiting.clear()


class _Watch(torch.autograd.Function):
    """The identity; hands its gradient on."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, take: Callable[[Tensor], None]) -> Tensor:
        ctx.take = take
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            ctx.take(grad)
        return grad if ctx.needs_input_grad[0] else None, None, None


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """In this context ``see(name, x, y)`` runs on every call of a layer, and may give another y."""

    def hook_of(name: str) -> Callable[..., Tensor | None]:
        return lambda _layer, arguments, y: see(name, arguments[0], y)

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(hook_of(name)).remove)
        yield
