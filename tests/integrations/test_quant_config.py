"""QuantConfig: what it takes, what it refuses, and how it goes through JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

import peftkern
from peftkern.integrations.bitsandbytes import from_bitsandbytes, is_bitsandbytes, to_bitsandbytes


def test_defaults() -> None:
    config = peftkern.QuantConfig()
    assert config.to_dict() == {
        "quant_method": "peftkern",
        "format": "nf4",
        "block_size": 64,
        "double_quant": True,
        "skip_modules": None,
        "embeddings": None,
        "head": None,
    }


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "int8_blockwise"])
@pytest.mark.parametrize("skip_modules", [None, [], ["lm_head", "mlp"]])
def test_json_round_trip(format: str, skip_modules: list[str] | None) -> None:
    config = peftkern.QuantConfig(format, 128, False, skip_modules, embeddings="int8", head=format)
    again = peftkern.QuantConfig.from_dict(json.loads(config.to_json_string()))
    assert again == config and again != peftkern.QuantConfig()


def test_row_wise_int8_is_never_double_quantized() -> None:
    assert peftkern.QuantConfig("int8").quantize_arguments["double_quant"] is False
    assert peftkern.QuantConfig("int8_blockwise").quantize_arguments["double_quant"] is True


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"format": "nf5"}, ValueError, "format must be one of fp4, int8, int8_blockwise, nf4; got 'nf5'"),
        ({"format": None}, ValueError, "format"),
        ({"block_size": 48}, ValueError, "block_size must be one of"),
        ({"block_size": 64.0}, ValueError, "block_size"),
        ({"block_size": True}, ValueError, "block_size"),
        ({"double_quant": 1}, TypeError, "double_quant must be True or False, got 1"),
        ({"skip_modules": "lm_head"}, TypeError, "skip_modules must be a list"),
        ({"skip_modules": [1]}, TypeError, "skip_modules"),
        ({"skip_modules": [""]}, TypeError, "skip_modules"),
        ({"embeddings": "8bit"}, ValueError, "embeddings must be None or one of fp4, int8, .*; got '8bit'"),
        ({"head": True}, ValueError, "head must be None or one of"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        peftkern.QuantConfig(**arguments)


def test_unknown_fields_of_a_file_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown fields \['blocksize'\]"):
        peftkern.QuantConfig.from_dict({"quant_method": "peftkern", "blocksize": 64})


def test_from_dict_takes_overrides_and_returns_the_rest() -> None:
    config, unused = peftkern.QuantConfig.from_dict(
        {"format": "fp4"}, return_unused_kwargs=True, block_size=32, other=1
    )
    assert (config.format, config.block_size, unused) == ("fp4", 32, {"other": 1})


def test_bitsandbytes_and_back() -> None:
    stated = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_skip_modules": ["lm_head"],
    }
    config = from_bitsandbytes(stated)
    assert config == peftkern.QuantConfig("nf4", 64, True, ["lm_head"])
    assert from_bitsandbytes(to_bitsandbytes(config)) == config
    assert from_bitsandbytes({"load_in_4bit": True}) == peftkern.QuantConfig("fp4", double_quant=False)
    assert from_bitsandbytes({"load_in_8bit": True}).format == "int8"
    assert to_bitsandbytes(peftkern.QuantConfig("int8"))["load_in_8bit"] is True
    assert is_bitsandbytes(stated) and is_bitsandbytes({"load_in_8bit": True})
    assert not is_bitsandbytes({"quant_method": "gptq"})


def test_bitsandbytes_config_that_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="exactly one of load_in_4bit and load_in_8bit"):
        from_bitsandbytes({"load_in_4bit": True, "load_in_8bit": True})
    with pytest.raises(ValueError, match="exactly one of"):
        from_bitsandbytes({"quant_method": "bitsandbytes"})
    with pytest.raises(ValueError, match="bnb_4bit_quant_type must be nf4 or fp4, got 'nf2'"):
        from_bitsandbytes({"load_in_4bit": True, "bnb_4bit_quant_type": "nf2"})
    with pytest.raises(ValueError, match="int8_blockwise"):
        to_bitsandbytes(peftkern.QuantConfig("int8_blockwise"))
