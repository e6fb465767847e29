"""Types of core in Diffusers' pipelines: files, a timestep for each sample, hotswap, text encoders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from nara_diffusion import noise_level
from nara_diffusion.config import config_to_fields
from tests.helpers.adapted import lora_config
from tests.helpers.core_types import TYPES
from tests.helpers.small_pipelines import small_sdxl
from tests.loaders.adapters import FILE, predict, trained


@pytest.mark.parametrize("kind", TYPES)
def test_a_pipeline_saves_loads_and_unloads_it(kind, tmp_path: Path):
    pipe = trained(text=False, target_modules=["to_q", "to_v", "conv1"], **TYPES[kind])
    expected = predict(pipe)
    pipe.save_nara_weights(tmp_path)
    other = small_sdxl()
    base = predict(other)
    torch.manual_seed(123)
    other.load_nara_weights(tmp_path, adapter_name="x")
    assert torch.equal(predict(other), expected)
    assert (expected - base).abs().max() > 1e-3
    other.save_nara_weights(tmp_path / "again", "x")
    one, two = load_file(tmp_path / FILE), load_file(tmp_path / "again" / FILE)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    other.unload_nara_weights()
    assert torch.equal(predict(other), base)


@pytest.mark.parametrize("kind", [name for name in TYPES if "constant" not in name])
def test_a_unets_samples_read_their_own_timesteps(kind):
    pipe = trained(text=False, target_modules=["to_q", "to_v", "conv1"], **TYPES[kind])
    generator = torch.Generator().manual_seed(9)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 40, generator=generator)
    pooled, sizes = torch.randn(2, 24, generator=generator), torch.ones(2, 6) * 16
    timesteps = torch.tensor([33, 870])

    def forward(rows: slice, levels: Tensor | None = None) -> Tensor:
        condition = {"text_embeds": pooled[rows], "time_ids": sizes[rows]}
        arguments = sample[rows], timesteps[rows], text[rows]
        if levels is None:
            return pipe.unet(*arguments, added_cond_kwargs=condition).sample
        with noise_level(pipe.unet, levels):
            return pipe.unet(*arguments, added_cond_kwargs=condition).sample

    with torch.no_grad():
        batch = forward(slice(None))
        assert torch.equal(batch, forward(slice(None), timesteps / 1000))
        for row in range(2):
            rows = slice(row, row + 1)
            torch.testing.assert_close(batch[rows], forward(rows), rtol=1e-4, atol=1e-5)
        assert (batch - forward(slice(None), timesteps.flip(0) / 1000)).abs().max() > 1e-4


def test_text_encoders_refuse_what_depends_on_lambda(tmp_path: Path):
    pipe = trained(text=False, target_modules=["to_q"], core_type="bins", core_bins=2)
    pipe.save_nara_weights(tmp_path)
    tensors = load_file(tmp_path / FILE)
    assert not [key for key in tensors if "nara_core" in key]
    moved = {key.replace("unet.", "text_encoder."): tensor for key, tensor in tensors.items()}
    fields = config_to_fields(pipe.unet.peft_config["default"])
    content = {"format_version": 1, "components": {"text_encoder": fields}}
    metadata = {"nara_adapter_metadata": json.dumps(content)}
    with pytest.raises(
        ValueError, match="The adapter of text_encoder has core_type='bins', but text encoders run before"
    ):
        small_sdxl().load_nara_weights(moved, metadata=metadata)


@pytest.mark.parametrize("kind", ["rank mask", "bins", "knots"])
def test_hotswap_takes_equal_ranks_alone(kind, tmp_path: Path):
    folders = []
    for index, rank in enumerate((4, 4, 2)):
        options = {"target_modules": ["to_q", "conv1"], "r": rank, **TYPES[kind]}
        trained(seed=index, text=False, **options).save_nara_weights(tmp_path / str(index))
        folders.append(tmp_path / str(index))
    fresh = small_sdxl()
    fresh.load_nara_weights(folders[1])
    pipe = small_sdxl()
    pipe.load_nara_weights(folders[0], "x")
    pipe.load_nara_weights(folders[1], "x", hotswap=True)
    assert torch.equal(predict(pipe), predict(fresh))
    with pytest.raises(ValueError, match="r is 2 in the new adapter, and 4 in 'x' of unet"):
        pipe.load_nara_weights(folders[2], "x", hotswap=True)
    assert torch.equal(predict(pipe), predict(fresh))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("kind", ["rank mask", "by layer"])
def test_a_lora_that_would_pad_a_nara_is_refused(kind, tmp_path: Path):
    lora = small_sdxl()
    lora.unet.add_adapter(lora_config(target_modules=["to_q"], r=2), "default")
    layers = {"unet_lora_layers": get_peft_model_state_dict(lora.unet)}
    lora.save_lora_weights(tmp_path, **layers)
    pipe = trained(text=False, target_modules=["to_q", "conv1"], **TYPES[kind])
    expected = predict(pipe)
    pipe.enable_lora_hotswap(target_rank=8, check_compiled="ignore")
    with pytest.raises(ValueError, match="target_rank=8, but 'default', whose update depends on λ, has rank 4"):
        pipe.load_lora_weights(tmp_path, adapter_name="fixed")
    assert torch.equal(predict(pipe), expected)
