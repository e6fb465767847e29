"""ControlNets beside an adapted UNet, with guidance and without; and NaRA on what is no declared denoiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from torch import Tensor

from nara_diffusion import register_denoiser
from tests.diffusers.reference import ATTENTION, ROUNDING, adapt, compare_calls, latents, watch
from tests.helpers.adapted import disturb, nara_config, relative_error
from tests.helpers.rounding import rounding_of
from tests.helpers.small_pipelines import small_sd, small_sdxl

CONDITION = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def controlnet(unet: Any) -> ControlNetModel:
    """With the sizes of `unet`; its zero convolutions are random, so that it has a say."""
    torch.manual_seed(2)
    model = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("options", [{}, {"guess_mode": True}, {"guidance_scale": 1.0}], ids=["CFG", "guess", "alone"])
@pytest.mark.parametrize("make", [small_sd, small_sdxl])
def test_a_controlnet_beside(make, options):
    stock = make()
    kind = StableDiffusionControlNetPipeline if make is small_sd else StableDiffusionXLControlNetPipeline
    optional = {"requires_safety_checker": False} if make is small_sd else {}
    pipe = kind(**stock.components, controlnet=controlnet(stock.unet), **optional)
    pipe.set_progress_bar_config(disable=True)
    unet, plain = adapt(pipe.unet)
    errors, levels = compare_calls(unet, plain), watch(unet)
    output = latents(pipe, ["a toy", "red"], image=CONDITION, **options)
    assert len(errors) == len(levels) >= 3
    assert max(errors) < ROUNDING
    assert not torch.allclose(latents(pipe, ["a toy", "red"], image=1 - CONDITION, **options), output, atol=1e-2)


@pytest.mark.usefixtures("_registry")
def test_a_controlnet_of_its_own_adapter_once_it_is_registered():
    def run(model: Any, timestep: Any, rows: slice = slice(None)) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        sample, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 5, 16, generator=generator)
        with torch.no_grad():
            return model(sample[rows], timestep, text[rows], CONDITION.expand(3, -1, -1, -1)[rows])[1]

    def adapted() -> Any:
        torch.manual_seed(1)
        model: Any = controlnet(small_sd().unet)
        model.add_adapter(nara_config(target_modules=ATTENTION))
        disturb(model)
        return model

    with pytest.raises(ValueError, match=r"register_denoiser\('ControlNetModel', meaning\) before adding adapters"):
        run(adapted(), 500)
    register_denoiser("ControlNetModel")
    model, timesteps = adapted(), torch.tensor([20, 500, 900])
    batch = run(model, timesteps)
    for i in range(3):
        alone = run(model, timesteps[i], slice(i, i + 1))
        assert relative_error(batch[i : i + 1], alone) < rounding_of(model)
