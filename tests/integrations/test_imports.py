"""What happens in a fresh process: the order of imports, and a machine without bitsandbytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import load, logits

from peftkern.integrations import config_from_pretrained, register, register_on_import

LOAD = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r})
tokens = torch.arange(1, 15).view(2, 7)
torch.save(model(input_ids=tokens).logits.detach(), {result!r})
"""


def run(code: str) -> str:
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_importing_peftkern_imports_none_of_the_others() -> None:
    code = """
import sys, peftkern, peftkern.nn, peftkern.integrations
print([name for name in ("transformers", "peft", "bitsandbytes", "triton") if name in sys.modules])
"""
    assert run(code).strip() == "[]"


@pytest.mark.parametrize(
    "imports",
    ["import peftkern", "import transformers.modeling_utils\nimport peftkern"],
    ids=["before transformers", "after transformers"],
)
def test_a_plain_reload_works_in_either_order(imports: str, nf4_folder: Path, tmp_path: Path) -> None:
    result = tmp_path / "logits.pt"
    run(imports + LOAD.format(folder=str(nf4_folder), result=str(result)))
    assert torch.allclose(torch.load(result), logits(load(nf4_folder)), atol=1e-6)


def test_the_import_hook_removes_itself_and_hides_nothing() -> None:
    code = """
import importlib.util, inspect, sys
before = list(sys.meta_path)
import peftkern
assert len(sys.meta_path) == len(before) + 1
importlib.util.find_spec("transformers.quantizers.auto")  # looking is not loading
from transformers.quantizers import auto
assert [f for f in sys.meta_path if f in before] == before
assert not any(type(finder).__name__ == "_RegistryFinder" for finder in sys.meta_path)
assert "peftkern" in auto.AUTO_QUANTIZER_MAPPING and "peftkern" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
assert "def register_quantizer" in inspect.getsource(auto)
importlib.reload(auto)
import peftkern.integrations
peftkern.integrations.register()
peftkern.integrations.register()
assert "peftkern" in auto.AUTO_QUANTIZER_MAPPING
"""
    run(code)


def test_registering_twice_is_harmless() -> None:
    from transformers.quantizers import auto

    before = (dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING))
    register()
    register_on_import()
    assert before == (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)


def test_bitsandbytes_checkpoints_load_without_bitsandbytes(dense_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    for name, config in {"4bit": four_bit, "8bit": BitsAndBytesConfig(load_in_8bit=True)}.items():
        load(dense_folder, quantization_config=config).save_pretrained(tmp_path / name)
    code = f"""
import sys
sys.modules["bitsandbytes"] = None
import torch, peft, peftkern
from peftkern.integrations import config_from_pretrained
from transformers import AutoModelForCausalLM
from transformers.utils import is_bitsandbytes_available
assert not is_bitsandbytes_available()
tokens = torch.arange(1, 15).view(2, 7)
for name in ("4bit", "8bit"):
    folder = {str(tmp_path)!r} + "/" + name
    model = AutoModelForCausalLM.from_pretrained(folder, config=config_from_pretrained(folder))
    torch.save(model(input_ids=tokens).logits.detach(), folder + "/logits.pt")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert sum(p.grad is not None for p in model.parameters()) == 28
"""
    run(code)
    for name in ("4bit", "8bit"):
        here = load(tmp_path / name, config=config_from_pretrained(str(tmp_path / name)))
        assert torch.allclose(torch.load(tmp_path / name / "logits.pt"), logits(here), atol=1e-6)
