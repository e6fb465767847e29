"""nara-eval's `load_in_4bit` is QLoRA's: NF4, its constants quantised once more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nara_diffusion.dllm import load_backbone

LLADA_TINY = str(Path(__file__).parents[2] / "examples" / "assets" / "llada-tiny")


def test_weights_are_rounded_to_nf4_with_double_quantisation() -> None:
    pytest.importorskip("lm_eval")
    bnb = pytest.importorskip("bitsandbytes.functional")
    from nara_diffusion.lm_eval.harness_model import NaraDLLM

    small: Any = NaraDLLM(LLADA_TINY, device="cpu", load_in_4bit=True, dtype="float32").model
    whole, _ = load_backbone(LLADA_TINY)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        rounded, weight = small.get_submodule(name).weight, whole.get_submodule(name).weight.detach()
        expected = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
        assert torch.equal(bnb.dequantize_4bit(rounded.data, rounded.quant_state), expected)
        assert (rounded.quant_state.quant_type, rounded.quant_state.nested) == ("nf4", True)
