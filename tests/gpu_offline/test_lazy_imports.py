"""On a machine without a GPU nothing of Triton or CUDA is loaded, whatever runs on its CPU.

PyTorch's compiler imports Triton by itself once an operator is called, so a module named ``triton`` proves nothing.
What counts is that no kernel of ours is loaded, and that all works where Triton cannot be imported at all.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import peftkern.backends.triton as triton_backend

FOLDER = Path(triton_backend.__file__).parent
KERNEL_MODULES = {
    f"{triton_backend.__name__}.{file.stem}" for file in FOLDER.glob("*.py") if "\nimport triton\n" in file.read_text()
}

OPERATIONS = """
w = torch.randn(64, 64)
for format in ("nf4", "int8"):
    q = ops.quantize(w, format)
    ops.dequantize(q)
    x = torch.randn(3, 64, requires_grad=True)
    ops.lora_linear(x, q, torch.randn(4, 64), torch.randn(64, 4)).sum().backward()
"""
PATCH = """
import peft
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
)
model = peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(r=4, target_modules="all-linear"))
peftkern.patch(model)
tokens = torch.tensor([[1, 2, 3]])
model(input_ids=tokens, labels=tokens).loss.backward()
peftkern.unpatch(model)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("triton", ["as it is", "absent"])
@pytest.mark.parametrize("work", [OPERATIONS, PATCH], ids=["operations", "patch"])
def test_no_kernel_is_loaded(work: str, triton: str) -> None:
    assert len(KERNEL_MODULES) > 5
    hide = 'sys.modules["triton"] = None\n' if triton == "absent" else ""
    program = (
        f"import sys, torch\n{hide}import peftkern\nfrom peftkern import ops\n{work}\n"
        f"print(sorted(({KERNEL_MODULES!r} | {{'peftkern._cuda'}}) & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
