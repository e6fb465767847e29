"""MultiAlign's folder, against its published forward in float64, per sample.

The format was read in FluxTimestepLoRALoader of modelscope/DiffSynth-Studio; the writer is this project's own.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.adapted import relative_error
from tests.helpers.rounding import rounding_of
from tests.helpers.small_pipelines import small_flux

SIGMAS = torch.tensor([0.0, 0.031, 0.5, 1.0])
RANK = 3
PLACES = ("attn.to_q", "attn.to_out.0", "ff.net.2", "attn.add_k_proj")


def sinusoid(timestep: Tensor) -> Tensor:
    """[cos, sin] of t / 10000^(i / 128), i < 128: (b, 256), float64."""
    angles = [[float(t) / 10000 ** (i / 128) for i in range(128)] for t in timestep]
    return torch.tensor([[*map(math.cos, row), *map(math.sin, row)] for row in angles], dtype=torch.float64)


def written(folder: Path, model: Any, *, rslora: bool = False, beta: float = 0.0) -> dict[str, dict[str, Tensor]]:
    """adapter_model.safetensors and adapter_config.json, and each layer's tensors."""
    generator = torch.Generator().manual_seed(2)
    layers, tensors = {}, {}
    names = [n for n, _ in model.named_modules() if n.startswith("transformer_blocks") and n.endswith(PLACES)]
    for name in [*names, "single_transformer_blocks.0.attn.to_v"]:
        d_out, d_in = model.get_submodule(name).weight.shape
        own = {
            "lora_A.weight": torch.randn(RANK, d_in, generator=generator),
            "lora_B.weight": torch.randn(d_out, RANK, generator=generator),
            "lora_time_gamma.weight": 0.2 * torch.randn(RANK, 256, generator=generator),
            "lora_time_gamma.bias": torch.randn(RANK, generator=generator),
            "lora_time_beta.weight": torch.zeros(RANK, 256),
            "lora_time_beta.bias": torch.full((RANK,), beta),
        }
        layers[name] = {key: tensor.double() for key, tensor in own.items()}
        tensors |= {f"base_model.model.{name}.{key}": tensor for key, tensor in own.items()}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 5, "use_rslora": rslora}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return layers


def predicted(transformer: Any) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    config, n, dtype = transformer.config, len(SIGMAS), next(transformer.parameters()).dtype
    image, text = torch.randn(n, 4, config.in_channels, generator=generator), torch.randn(
        n, 3, config.joint_attention_dim, generator=generator)  # fmt: skip
    pooled = torch.randn(n, config.pooled_projection_dim, generator=generator)
    with torch.no_grad():
        return transformer(
            image.to(dtype), text.to(dtype), pooled.to(dtype), SIGMAS.to(dtype), torch.zeros(4, 3), torch.zeros(3, 3),
            guidance=torch.ones(n, dtype=dtype) if config.guidance_embeds else None,
        ).sample  # fmt: skip


@pytest.mark.parametrize("rslora", [False, True])
def test_multialign_is_its_forward_per_sample(tmp_path, rslora):
    pipe = small_flux()
    layers = written(tmp_path / "theirs", pipe.transformer, rslora=rslora)
    scale, e = 5 / (RANK**0.5 if rslora else RANK), sinusoid(1000 * SIGMAS.double())
    base = predicted(pipe.transformer)
    transformer = pipe.transformer.double()

    def add(own: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        gamma = e @ own["lora_time_gamma.weight"].T + own["lora_time_gamma.bias"]
        return y + scale * ((x @ own["lora_A.weight"].T) * gamma[:, None]) @ own["lora_B.weight"].T

    handles = [
        transformer.get_submodule(name).register_forward_hook(lambda m, args, y, own=own: add(own, args[0], y))
        for name, own in layers.items()
    ]
    expected = predicted(transformer)
    for handle in handles:
        handle.remove()
    pipe.transformer.float()
    pipe.load_nara_weights(tmp_path / "theirs", "toy")
    found = predicted(pipe.transformer)
    assert relative_error(found, expected) < 1000 * rounding_of(pipe.transformer)  # 1000 λ radians in float32
    assert relative_error(base, expected) > 1e-2
    assert pipe.transformer.peft_config["toy"].noise_convention == "flow"
    pipe.save_nara_weights(tmp_path / "ours", adapter_name="toy")
    other = small_flux()
    other.load_nara_weights(tmp_path / "ours")
    assert torch.equal(predicted(other.transformer), found)


def test_beta_is_refused_by_name(tmp_path):
    pipe = small_flux()
    written(tmp_path, pipe.transformer, beta=0.25)
    with pytest.raises(
        ValueError, match=r"has a lora_time_beta.bias that isn't 0 in '.*', up to 0.25: β\(t\), an offset"
    ):
        pipe.load_nara_weights(tmp_path)
    assert not hasattr(pipe.transformer, "peft_config")


def test_half_a_layer_a_missing_configuration_and_rank_mask_min_are_refused(tmp_path):
    pipe = small_flux()
    written(tmp_path, pipe.transformer)
    with pytest.raises(ValueError, match=r"but .* is a MultiAlign: leave it out"):
        pipe.load_nara_weights(tmp_path, rank_mask_min=1)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"has no adapter_config\.json, which tells α"):
        pipe.load_nara_weights(tensors)
    save_file({k: t for k, t in tensors.items() if "single" not in k or "gamma.bias" not in k},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match="damaged"):
        pipe.load_nara_weights(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="PEFT writes both"):
        pipe.load_nara_weights(tmp_path)
