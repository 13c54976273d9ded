"""Pages of mapped files: given back once they are read, unless somebody has written to them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from peftkern.integrations.mapped_file import FilePages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists a process's mapped files")

MEGABYTE = 1 << 20


@pytest.fixture
def mapped(tmp_path: Path) -> Tensor:
    """20 MB of float32 that lie in a file, with something before and behind."""
    values = torch.arange(5 * MEGABYTE, dtype=torch.float32)
    save_file({"a": torch.ones(5), "b": values, "c": torch.ones(5)}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt", backend="mmap") as file:
        return file.get_slice("b")[...]


def resident_file_bytes(tensor: Tensor) -> int:
    """Of the mapping that the tensor lies in."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0] and not fields[0].endswith(":"):
            begin, end = (int(part, 16) for part in fields[0].split("-"))
            found = begin <= tensor.data_ptr() < end
        elif found and fields[0] == "Rss:":
            return int(fields[1]) << 10
    raise AssertionError("not mapped")


def test_pages_that_were_read_are_given_back_and_can_be_read_again(mapped: Tensor) -> None:
    total = float(mapped.double().sum())
    before = resident_file_bytes(mapped)
    pages = FilePages()
    pages.release(mapped)
    given = pages.flush()
    assert mapped.nbytes - 2 * 4096 <= given <= mapped.nbytes
    assert before >= mapped.nbytes - 8192
    assert resident_file_bytes(mapped) <= before - given
    assert float(mapped.double().sum()) == total


def test_a_copy_never_holds_the_file_beside_it(mapped: Tensor) -> None:
    pages = FilePages()
    copy = pages.copy_out(mapped.view(5, -1))
    pages.flush()
    assert resident_file_bytes(mapped) < MEGABYTE
    assert copy.shape == (5, MEGABYTE) and torch.equal(copy.view(-1), torch.arange(5 * MEGABYTE).float())
    assert copy.data_ptr() != mapped.data_ptr()


def test_what_was_written_to_a_mapping_is_kept(mapped: Tensor) -> None:
    mapped[MEGABYTE] = -1.0
    pages = FilePages()
    pages.release(mapped)
    assert pages.flush() == 0
    assert float(pages.copy_out(mapped)[MEGABYTE]) == float(mapped[MEGABYTE]) == -1.0


@pytest.mark.parametrize("tensor", [torch.ones(MEGABYTE), torch.ones(8, MEGABYTE // 8).t(), torch.ones(3)])
def test_memory_that_is_no_file_is_left_alone(tensor: Tensor) -> None:
    pages = FilePages()
    assert torch.equal(pages.copy_out(tensor), torch.ones_like(tensor))
    assert pages.flush() == 0


_PEAK = """
import sys, torch
from transformers import AutoModelForCausalLM
import peftkern
from peftkern.bench.memory import reset_peak, resident_megabytes
config = peftkern.QuantConfig("nf4", double_quant=True)
before = resident_megabytes("VmRSS")
reset_peak()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config, dtype=torch.float32)
print(resident_megabytes("VmHWM") - before, resident_megabytes("VmRSS") - before)
"""


def test_loading_holds_no_second_copy(tmp_path: Path) -> None:
    """150 MB of linear weights and 65 MB of embeddings in the file, 85 MB of model, and little more at the peak."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 5, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=32000, **shape, tie_word_embeddings=True)).save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) > 200e6
    run = subprocess.run([sys.executable, "-c", _PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    peak, after = map(float, run.stdout.split())
    assert after < 130 and peak < after + 60
