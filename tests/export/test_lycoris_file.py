"""T-LoRA in LyCORIS' format, by its formula in float64. (LyCORIS itself: tests/acceptance/test_lycoris.py.)"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn

import nara_command
from nara_diffusion import noise_level
from tests.helpers.adapted import OneLayer, TwoLayers, adapted, nara_config, relative_error
from tests.helpers.small_pipelines import small_sd

WEIGHTS, CONFIG = "pytorch_lora_weights.safetensors", "lycoris_config.json"
RANK = 3  # T-LoRA's
MASK = {"core_type": "rank_mask", "rank_mask_step": 2, "rank_mask_min": 2, "r": 2 * RANK, "rank_mask_exponent": 2.0}


def run(*words: object) -> None:
    nara_command.main([str(word) for word in words])


def residual_config(*targets: str, **changes: Any) -> Any:
    values = {**MASK, "lora_a_init": "residual_base", "target_modules": list(targets), **changes}
    return nara_config(**values)


def train(model: nn.Module) -> None:
    """Move the even directions, as training does."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            rows = parameter.data if ".lora_A." in name else parameter.data.T
            rows[0::2] += 0.1 * torch.randn_like(rows[0::2])


def active_rank(timestep: int) -> int:
    return int(((1000 - timestep) / 1000) ** 2.0 * (RANK - 1)) + 1


def by_formula(x: Tensor, layer: nn.Linear, fields: dict[str, Tensor], count: int) -> Tensor:
    """LyCORIS' forward, in float64."""
    P, sigma, Q = (fields[name].double() for name in ("p_layer.weight", "lambda_layer", "q_layer.weight"))
    P0, sigma0, Q0 = torch.linalg.svd(layer.weight.double(), full_matrices=False)
    trained = (P * sigma)[:, :count] @ Q[:count]
    start = (P0 * sigma0)[:, :count] @ Q0[:count]
    scale = fields["alpha"].double() / RANK
    return x @ (layer.weight.double() + scale * (trained - start)).T + layer.bias.double()


def test_written_file_is_lycoris_formula_at_timesteps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = get_peft_model(TwoLayers(), residual_config("first", "second")), torch.randn(4, 7)
    train(model)
    model.eval().save_pretrained(str(tmp_path / "ours"))
    run("convert", tmp_path / "ours", tmp_path / "theirs", "--form", "lycoris")
    tensors = load_file(tmp_path / "theirs" / WEIGHTS)
    settings = json.loads((tmp_path / "theirs" / CONFIG).read_text())
    assert settings == {
        "algo": "tlora", "multiplier": 1.0, "linear_dim": 3, "linear_alpha": 3.0, "tlora_min_rank": 1,
        "tlora_alpha": 2.0,
    }  # fmt: skip
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.partition(".")
        layers.setdefault(name.removeprefix("lycoris_"), {})[field] = tensor
    assert layers.keys() == {"first", "second"}
    assert layers["first"]["lambda_layer"].shape == (1, 3)
    base = model.base_model.model
    for timestep in (0, 1, 293, 294, 500, 999):
        count = active_rank(timestep)
        hidden = torch.tanh(by_formula(x.double(), base.first.get_base_layer(), layers["first"], count))
        expected = by_formula(hidden, base.second.get_base_layer(), layers["second"], count)
        with noise_level(model, timestep / 1000), torch.no_grad():
            assert relative_error(model(x), expected) < 1e-5


def test_comfyuis_names_are_those_of_original_unet(tmp_path: Path) -> None:
    pipe: Any = small_sd(layers_per_block=2)
    inject_adapter_in_model(residual_config("to_k"), pipe.unet, "toy")
    pipe.save_nara_weights(tmp_path / "ours", adapter_name="toy")
    run("convert", tmp_path / "ours", tmp_path / "theirs", "--to", "lycoris", "--base", "sd15")
    names = {key.partition(".")[0] for key in load_file(tmp_path / "theirs" / WEIGHTS)}
    pattern = r"lycoris_(input_blocks_\d+|middle_block|output_blocks_\d+)_1_transformer_blocks_0_attn[12]_to_k"
    assert all(re.fullmatch(pattern, name) for name in names), names
    modules = [name for name, _ in pipe.unet.named_modules() if name.endswith("to_k")]
    assert len(names) == len(modules)


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"lora_a_init": "residual"}, [], "lora_a_init='residual', so it was trained without them"),
        ({"lora_a_init": "orthogonal", "rank_mask_step": 1}, [], "lora_a_init='orthogonal'"),
        ({"strength": [[0, 1], [1, 0]]}, [], "so a strength over λ"),
        ({"rank_pattern": {"second": 4}}, [], "rank_pattern and trained biases"),
        ({}, ["--base", "sd15"], "'first' is not a module of Stable Diffusion's UNet"),
    ],
)
def test_what_lycoris_cannot_express_is_refused(changes: Any, words: Any, message: str, tmp_path: Path) -> None:
    adapted(TwoLayers(), **{**vars_of(residual_config("first", "second")), **changes}).save_pretrained(str(tmp_path))
    with pytest.raises(SystemExit, match=message):
        run("convert", tmp_path, tmp_path / "out", "--to", "lycoris", *words)
    assert not (tmp_path / "out").exists()


def vars_of(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in (*MASK, "lora_a_init", "target_modules")}


def test_convolution_with_kernel_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(OneLayer(nn.Conv2d(7, 5, 3)), residual_config("layer"))
    model.save_pretrained(str(tmp_path / "conv"))
    with pytest.raises(SystemExit, match="'layer' is a convolution with a kernel"):
        run("convert", tmp_path / "conv", tmp_path / "out", "--to", "lycoris")
    with pytest.raises(SystemExit, match="--base is for --to lycoris"):
        run("convert", tmp_path / "conv", tmp_path / "out", "--to", "pipeline", "--base", "flux")
