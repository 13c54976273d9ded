"""QuantizedEmbedding: what it looks up, and what a module of packed codes must do; and a head that is tied to one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftkern.formats import QuantizedTensor
from peftkern.nn import QuantizedEmbedding, QuantizedLinear, TiedQuantizedLinear
from peftkern.ops import dequantize, quantize

FORMATS = {"int8": 24, "int8_blockwise": 64, "nf4": 64, "nf4 double": 192, "fp4": 128}
"""Formats, and the length of rows."""
ROWS = 37


def dense(columns: int = 64, padding_idx: int | None = None) -> nn.Embedding:
    torch.manual_seed(columns)
    return nn.Embedding(ROWS, columns, padding_idx=padding_idx)


def packed(case: str, **options: Any) -> QuantizedEmbedding:
    return QuantizedEmbedding.from_embedding(
        dense(FORMATS[case], **options), case.split()[0], 64, double_quant="double" in case
    )


@pytest.mark.parametrize("case", FORMATS)
def test_looks_up_the_rows_of_the_dequantized_weight(case: str) -> None:
    module = packed(case)
    for tokens in (torch.tensor([[0, 36, 5], [5, 1, 36]]), torch.tensor(7), torch.zeros(2, 0, dtype=torch.int64)):
        expected = nn.functional.embedding(tokens, module.dequantize())
        assert torch.equal(module(tokens), expected) and module(tokens).dtype == torch.float32
    with pytest.raises(IndexError):
        module(torch.tensor([ROWS]))


@pytest.mark.parametrize("case", FORMATS)
def test_rows_that_are_taken_are_those_of_the_whole(case: str) -> None:
    whole = packed(case).quantized
    rows = torch.tensor([36, 0, 0, 11])
    part = whole.take(rows)
    part.validate()
    assert part.double_quantization is None and torch.equal(dequantize(part), dequantize(whole)[rows])


def test_only_rows_of_the_batch_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    module, shapes = packed("int8"), []

    def record(quantized: QuantizedTensor, *arguments: Any) -> Tensor:
        shapes.append(tuple(quantized.shape))
        return dequantize(quantized, *arguments)

    monkeypatch.setattr("peftkern.nn.quantized_embedding.dequantize", record)
    module(torch.tensor([3, 4, 3]))
    assert shapes == [(3, 24)]


def test_rows_of_random_weights_are_off_by_about_a_percent() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(1000, 576)
    module = QuantizedEmbedding.from_embedding(embedding)
    rows = (module.dequantize() - embedding.weight).norm(dim=1) / embedding.weight.norm(dim=1)
    assert rows.max() < 0.015 and 0.004 < rows.mean() < 0.01


def test_it_is_an_embedding_to_whoever_asks() -> None:
    module = packed("int8", padding_idx=3)
    assert isinstance(module, nn.Embedding) and module.padding_idx == 3
    assert (module.num_embeddings, module.embedding_dim) == (ROWS, 24)
    assert not module.weight.requires_grad and not module(torch.tensor([3])).any()
    assert repr(module) == "QuantizedEmbedding(37, 24, padding_idx=3, format=int8)"


def test_casts_change_what_it_gives_and_not_what_it_holds() -> None:
    for case in FORMATS:
        module, tokens = packed(case), torch.tensor([1, 2])
        codes, expected = module.weight.clone(), module(tokens)
        for dtype in (torch.bfloat16, torch.float32):
            module.to(dtype)
            assert module(tokens).dtype == dtype and torch.equal(module(tokens), expected.to(dtype))
        assert torch.equal(module.weight, codes) and module.quantized.scale_values().dtype == torch.float32


@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(how: Any) -> None:
    module = packed("nf4 double", padding_idx=2)
    again = how(module)
    assert torch.equal(again(torch.arange(ROWS)), module(torch.arange(ROWS))) and again.padding_idx == 2


@pytest.mark.parametrize("case", FORMATS)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(case: str, assign: bool) -> None:
    module, other = packed(case), packed(case)
    other.replace_(quantize(torch.ones(ROWS, FORMATS[case]), *case.split()[:1], 64, "double" in case))
    other.load_state_dict(module.state_dict(), assign=assign)
    assert torch.equal(other.weight, module.weight) and torch.equal(other.dequantize(), module.dequantize())


def test_it_becomes_a_dense_one_again() -> None:
    module = packed("int8", padding_idx=1)
    expected = module(torch.arange(ROWS))
    again = module.dequantize_()
    assert type(again) is nn.Embedding and again is module and torch.equal(again(torch.arange(ROWS)), expected)
    assert list(again.state_dict()) == ["weight"]


def test_compiled() -> None:
    module = packed("nf4 double")
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.tensor([[1, 5]])), module(torch.tensor([[1, 5]])))


def test_what_cannot_be_looked_up_is_named() -> None:
    with pytest.raises(ValueError, match="rows of 24 share blocks of 64"):
        QuantizedEmbedding.from_embedding(dense(24), "nf4")
    embedding = dense(24)
    with pytest.raises(ValueError, match="rows of 24 share blocks of 64"):
        QuantizedEmbedding.convert_(embedding, quantize(embedding.weight.detach(), "nf4"))
    assert type(embedding) is nn.Embedding
    with pytest.raises(ValueError, match=r"max_norm must be None, got 1\.0"):
        QuantizedEmbedding.from_embedding(nn.Embedding(5, 24, max_norm=1.0))
    with pytest.raises(ValueError, match="take: rows must be whole blocks"):
        quantize(torch.ones(4, 24), "nf4").take(torch.tensor([0]))


# ---- a head that is tied to one


def tied() -> nn.ModuleDict:
    embedding = packed("int8")
    return nn.ModuleDict({"embedding": embedding, "head": TiedQuantizedLinear.tie_(nn.Linear(24, ROWS), embedding)})


def run(model: nn.ModuleDict) -> Tensor:
    hidden: Tensor = model["head"](model["embedding"](torch.arange(5)))
    return hidden.detach()


def assert_tied(model: nn.ModuleDict) -> None:
    embedding, head = model["embedding"], model["head"]
    assert isinstance(embedding, QuantizedEmbedding) and isinstance(head, QuantizedLinear)
    assert head.quantized is embedding.quantized and not list(head.buffers())
    assert head.weight.data_ptr() == embedding.weight.data_ptr()


def test_a_tied_head_has_nothing_of_its_own() -> None:
    model = tied()
    assert_tied(model)
    embedding, head = model["embedding"], model["head"]
    expected = nn.functional.linear(embedding(torch.arange(5)), embedding.dequantize(), head.bias)
    assert (run(model) - expected).norm() <= 1e-6 * expected.norm()
    assert sum(parameter.nbytes for parameter in model.parameters()) == ROWS * 24 + ROWS * 4
    assert list(model.state_dict()) == [
        *(f"embedding.{name}" for name in ("weight", "SCB", "weight_format")),
        *("head.weight", "head.bias"),
    ]
    assert "tied to the embedding" in repr(head) and head.compute_dtype == torch.float32


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), nn.Module.float])
def test_a_tied_head_stays_tied(how: Any) -> None:
    model = tied()
    again = how(model)
    assert_tied(again)
    assert torch.equal(run(again), run(model))


def test_loading_the_embedding_loads_the_head() -> None:
    model, other = tied(), tied()
    with torch.no_grad():
        other["embedding"].replace_(quantize(torch.randn(ROWS, 24), "int8"))
    model.load_state_dict(other.state_dict())
    assert torch.equal(model["head"].quantized.scales, other["embedding"].scales)
    assert (model["head"].dequantize() == other["embedding"].dequantize()).all()


@pytest.mark.parametrize("first", ["embedding", "head"])
def test_a_tied_head_becomes_dense_with_its_embedding(first: str) -> None:
    model = tied()
    expected = run(model)
    for name in (first, "head"):
        if hasattr(model[name], "dequantize_"):
            model[name].dequantize_()
    assert type(model["head"]) is nn.Linear and model["head"].weight is model["embedding"].weight
    assert (run(model) - expected).norm() <= 1e-6 * expected.norm()


def test_a_tied_head_takes_no_other_codes() -> None:
    head = tied()["head"]
    assert isinstance(head, TiedQuantizedLinear)
    for change in (lambda: head.merge_(torch.ones(ROWS, 24)), lambda: head.replace_(head.quantized)):
        with pytest.raises(ValueError, match="the head has its codes from the embedding"):
            change()
