"""An exported folder in a process in which this package cannot be imported."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nara_diffusion import noise_level, to_lora
from tests.helpers.adapted import adapted, relative_error
from tests.helpers.rounding import rounding_of

STOCK = """
import sys
sys.modules["nara_diffusion"] = None  # importing it raises ImportError
try:
    import nara_diffusion
except ImportError:
    pass
else:
    raise SystemExit("nara_diffusion can be imported")
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
base = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
base.config.is_causal = False
model = PeftModel.from_pretrained(base, f"{folder}/lora").eval()
given = load_file(f"{folder}/input.safetensors")["ids"]
with torch.no_grad():
    save_file({"logits": model(given).logits}, f"{folder}/output.safetensors")
assert not any(name.startswith("nara_diffusion") and module for name, module in sys.modules.items())
"""


@pytest.mark.parametrize("options", [{}, {"use_dora": True, "core_type": "knots"}], ids=["NaRA", "DoRA with knots"])
def test_stock_peft_loads_and_runs_the_lora(tmp_path: Path, tiny_llama, options):
    tiny_llama.save_pretrained(tmp_path / "base")
    targets = {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}}
    model = adapted(copy.deepcopy(tiny_llama), task_type="CAUSAL_LM", **targets, **options)
    ids = torch.randint(49, (2, 6))
    save_file({"ids": ids}, tmp_path / "input.safetensors")
    to_lora(model, 0.37).save_pretrained(tmp_path / "lora")
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    subprocess.run([sys.executable, "-c", STOCK, str(tmp_path)], check=True, capture_output=True)
    with torch.no_grad(), noise_level(model, 0.37):
        expected = model(ids).logits
    assert relative_error(load_file(tmp_path / "output.safetensors")["logits"], expected) < rounding_of(model)
