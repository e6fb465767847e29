"""An exported LoRA in a stock PEFT model, and how far its update lies from the NaRA's by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from nara_diffusion.export import PlainLora

EXACT = 1e-6
"""Of the update, as DESIGN.md promises."""


def loaded(lora: PlainLora, folder: Path, base: nn.Module) -> PeftModel:
    """`base` with the adapter as stock PEFT reads it from the files; each of their tensors is in the model."""
    lora.save_pretrained(folder)
    model = PeftModel.from_pretrained(base, str(folder))
    assert type(model.peft_config["default"]).__name__ == "LoraConfig"
    assert not any("nara_core" in name for name, _ in model.named_modules())
    held = {name.replace(".default", ""): t for name, t in model.state_dict().items() if "lora_" in name}
    given = lora.state_dict("base_model.model.")
    given = {f"{key}.weight" if key.endswith("lora_magnitude_vector") else key: t for key, t in given.items()}
    given = {key: tensor for key, tensor in given.items() if "lora_" in key}
    assert held.keys() == given.keys()
    for key, tensor in given.items():
        torch.testing.assert_close(held[key], tensor.to(held[key].dtype), rtol=0, atol=0)
    return model.eval()


def update_of(layer: Any, adapter_name: str = "default", core: Tensor | None = None) -> Tensor:
    """s · B · C · A (d_out, k) of an adapted layer in float64, without groups; C (r, r) or None for I."""
    if adapter_name in layer.lora_embedding_A:
        A, B = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    else:
        A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    A, B = A.detach().double().flatten(1), B.detach().double().flatten(1)
    core = torch.eye(len(A), dtype=torch.float64) if core is None else core.double()[: len(A), : len(A)]
    return layer.scaling[adapter_name] * torch.einsum("or,rs,si->oi", B, core, A)
