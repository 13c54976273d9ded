"""A model as it would be trained, of tensors that have shapes and no memory.

It is built on the meta device, then quantized, given what is trained and patched by the code that does so with a real
model. At last its tensors become fake ones on the CPU: with these PyTorch chooses the operators of a CPU, where the
meta device would take attention apart.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peftkern.patch.weights import original_class
from peftkern.plan.errors import PlanError
from peftkern.plan.options import Options

_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM")
"""In the order in which they are asked; one that the configuration's own architecture names comes first."""


@dataclass
class Subject:
    """A model of fake tensors.

    Attributes:
        model: in training mode.
        added: storages, by their number, of what was attached to be trained: adapters, or sparse deltas.
        layers: the list of its equal layers; ``None`` where it has no such list, or several.
        largest_dense: bytes of the largest weight that is quantized on loading, as it is before.
        largest_decoded: the same of those that products decode; embeddings decode single rows.
    """

    model: Any
    added: frozenset[int]
    layers: nn.ModuleList | None
    largest_dense: int
    largest_decoded: int

    @property
    def config(self) -> Any:
        """Of the transformers model."""
        return self.model.config

    @contextlib.contextmanager
    def with_depth(self, count: int | None) -> Iterator[None]:
        """In this context the model has the first ``count`` of its equal layers; ``None``: all."""
        if count is None or self.layers is None:
            yield
            return
        whole = dict(self.layers._modules)
        try:
            for name in list(whole)[count:]:
                del self.layers._modules[name]
            yield
        finally:
            self.layers._modules.update(whole)


def load_config(model: Any) -> Any:
    """The transformers configuration that ``model`` is, has, or names.

    Raises:
        PlanError: there is none.
    """
    if isinstance(model, str):
        return _read_config(model)
    config = getattr(model, "config", model)
    from transformers import PreTrainedConfig

    if not isinstance(config, PreTrainedConfig):
        raise PlanError(
            f"model must be a transformers model, its config, or the name or folder of one; got {type(model).__name__}"
        )
    return config


def _read_config(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # transformers and the hub's client each raise types of their own
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PlanError(f"model: the configuration of {name!r} cannot be read ({first_line})") from error


def build(config: Any, options: Options) -> Subject:
    """The model of ``config``, as ``options`` say.

    Raises:
        PlanError: transformers has no language model for it, or it cannot be adapted so.
    """
    model = _empty_model(config, options.dtype)
    sizes = _quantize(model, options) if options.quantization != "none" else (0, 0)
    base = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    model = _attach(model, options)
    added = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in base]
    return _finish(model, options, added, *sizes)


def stand_in(model: nn.Module, options: Options) -> Subject:
    """A copy of ``model``, as it stands, of fake tensors. The model is left as it was."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = [*model.parameters(), *model.buffers()]
    fakes = {id(tensor): _fake(tensor, mode) for tensor in tensors}
    trained = [p for p in model.parameters() if p.requires_grad]
    # where all of it is trained, nothing was attached
    base_is_trained = sum(p.numel() for p in trained) * 2 > sum(p.numel() for p in model.parameters())
    added = [] if base_is_trained else [fakes[id(p)] for p in trained]
    memo: dict[int, Any] = dict(fakes)
    fake_model = copy.deepcopy(model, memo)
    return _finish(fake_model, options, added, 0, 0)


def _empty_model(config: Any, dtype: str) -> Any:
    import transformers

    config = copy.deepcopy(config)
    config.use_cache = False
    problems = []
    kind = str((config.architectures or [""])[0])
    for name in sorted(_AUTO_CLASSES, key=lambda name: not kind.endswith(name.removeprefix("AutoModel"))):
        try:
            with torch.device("meta"):
                return getattr(transformers, name).from_config(config, dtype=getattr(torch, dtype))
        except ValueError as error:
            problems.append(str(error).splitlines()[0])
    raise PlanError(f"model: transformers has no language model for a {type(config).__name__} ({problems[0]})")


def _quantize(model: Any, options: Options) -> tuple[int, int]:
    """Also gives bytes of the largest dense weight, and of the largest that a product decodes."""
    from transformers.pytorch_utils import Conv1D

    from peftkern.integrations import QuantConfig
    from peftkern.integrations.selection import select_modules
    from peftkern.nn import QuantizedLinear, TiedQuantizedLinear, quantized_class

    config = QuantConfig(
        options.quantization,
        options.block_size,
        options.double_quant,
        embeddings=options.embeddings,
        head=options.head,
    )
    largest = decoded = 0
    try:
        selection = select_modules(model, config)
    except ValueError as error:
        raise PlanError(str(error)) from error
    for name, format in selection.chosen.items():
        layer = model.get_submodule(name)
        shape = tuple(layer.weight.shape)
        rows, columns = reversed(shape) if isinstance(layer, Conv1D) else shape
        largest = max(largest, layer.weight.nbytes)
        if selection.tied is not None or not isinstance(layer, nn.Embedding):
            decoded = max(decoded, layer.weight.nbytes)
        arguments = config.arguments_for(format)
        empty = QuantizedLinear.empty(columns, rows, False, layer.weight.dtype, **arguments, device="meta")
        try:
            quantized_class(layer).convert_(layer, empty.quantized)
        except ValueError as error:
            raise PlanError(f"{name}: {error}") from error
    if selection.tied is not None:
        embeddings, head = map(model.get_submodule, selection.tied)
        TiedQuantizedLinear.tie_(head, embeddings)
    return largest, decoded


def _attach(model: Any, options: Options) -> Any:
    if options.method == "full":
        return model.requires_grad_(True)
    model.requires_grad_(False)
    return _attach_lora(model, options) if options.method == "lora" else _attach_sparse(model, options)


def _attach_lora(model: Any, options: Options) -> Any:
    import peft

    targets = options.target_modules
    adapter = peft.LoraConfig(r=options.rank, target_modules=targets if isinstance(targets, str) else list(targets))
    try:
        return peft.get_peft_model(model, adapter, low_cpu_mem_usage=True)  # adapters on the meta device as well
    except ValueError as error:
        raise PlanError(f"target_modules: {str(error).splitlines()[0]}") from error


def _attach_sparse(model: Any, options: Options) -> Any:
    from peftkern.formats.sparse_indices import SparseIndices
    from peftkern.sparse import attach, linear_layers
    from peftkern.sparse.budget import entries_per_layer, total_entries

    layers = linear_layers(model, options.target_modules)
    shapes = {name: torch.Size((layer.out_features, layer.in_features)) for name, layer in layers.items()}  # type: ignore[arg-type]
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    counts = entries_per_layer(sizes, total_entries("plan", sum(sizes.values()), options.density, None))
    indices = {}
    for name, shape in shapes.items():
        lengths = {"columns": counts[name], "rows": counts[name], "order": counts[name]}
        numbers = {field: torch.empty(length, dtype=torch.int32, device="meta") for field, length in lengths.items()}
        row_offsets, column_offsets = (torch.empty(side + 1, dtype=torch.int64, device="meta") for side in shape)
        indices[name] = SparseIndices(shape, row_offsets=row_offsets, column_offsets=column_offsets, **numbers)
    attach(model, indices)
    return model


def _finish(model: Any, options: Options, added: Sequence[Tensor], largest_dense: int, largest_decoded: int) -> Subject:
    from peftkern.patch import patch

    if options.method is not None and options.patched:
        try:
            patch(model, logits=options.logits, recompute=options.recompute)
        except ValueError as error:
            raise PlanError(str(error).removeprefix("patch: ")) from error
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fakes = _make_fake(model)
    numbers = frozenset(storage_of(fakes.get(id(tensor), tensor)) for tensor in added)
    return Subject(model.train(), numbers, _equal_layers(model), largest_dense, largest_decoded)


def storage_of(tensor: Tensor) -> int:
    """The same number for all tensors that share memory."""
    return int(tensor.untyped_storage()._cdata)


def _make_fake(model: nn.Module) -> dict[int, Tensor]:
    """Replaces parameters and buffers; tied ones stay tied. Gives the fake ones by the id of what they replace."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = fakes.get(id(tensor))
                    if fake is None:
                        fake = fakes[id(tensor)] = _fake(tensor, mode)
                        fakes[id(fake)] = fake
                    tensors[name] = fake  # type: ignore[assignment]
    return fakes


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _equal_layers(model: nn.Module) -> nn.ModuleList | None:
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and _are_equal(module)]
    return found[0] if len(found) == 1 else None


def _are_equal(layers: nn.ModuleList) -> bool:
    return len(layers) >= 2 and len({_description(layer) for layer in layers}) == 1


def _description(layer: nn.Module) -> tuple[Any, ...]:
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    return original_class(type(layer)), *(
        (name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in tensors
    )
