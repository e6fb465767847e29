"""Diffusers' pipelines with an adapted denoiser: each call equals that of the stock one, given the same, at its λ.

Its weights are W0 + s·B·C(λ)·A, written anew at the λ of each timestep.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPAGPipeline,
)
from torch import Tensor

from nara_diffusion import TimestepNoise, register_denoiser, set_noise_source
from tests.acceptance._noise_models import UNET_TARGETS, Stock, adapt, distance, run, tensor_of
from tests.helpers.adapted import disturb, nara_config
from tests.helpers.denoisers import told
from tests.helpers.rounding import rounding_of
from tests.helpers.small_pipelines import pixels, small_sd, small_sdxl

pytestmark = pytest.mark.filterwarnings("ignore:.*PAG.*deprecated:FutureWarning")
IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def errors_of(pipe: Any, stock: Stock, **options: Any) -> tuple[list[float], list[float]]:
    """How far each forward of the denoiser is from the stock one's at the λ of its timestep, and these λ."""
    errors, levels = [], []

    def compare(unet: Any, args: Any, kwargs: Any, output: Any) -> None:
        stock.model.set_attn_processor(dict(unet.attn_processors))  # pipelines set some when they are called
        levels.append(float(args[1]) / 1000)
        errors.append(distance(tensor_of(output), run(stock.at(levels[-1]), *args, **kwargs)))

    handle = stock.adapted.register_forward_hook(compare, with_kwargs=True)
    call = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}
    pipe(["a photo of a toy", "red"], generator=torch.Generator().manual_seed(0), **{**call, **options})
    handle.remove()
    return errors, levels


def controlnet(unet: Any) -> ControlNetModel:
    """With the sizes of `unet`; its zero convolutions are random, so that it has a say."""
    torch.manual_seed(2)
    model = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


class OwnProcessor:
    """A custom attention processor in the manner of xFormers': heads in the batch, an attention of one's own."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *_: Any, **__: Any
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key, value = (attn.head_to_batch_dim(part).contiguous() for part in (query, key, value))
        attended = torch.softmax(query @ key.transpose(1, 2) * attn.scale, dim=-1) @ value
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(attended)))


def of_kind(kind: Any, **more: Any) -> Any:
    pipe = kind(**{name: part for name, part in small_sdxl().components.items() if part is not None}, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


SIZE = {"height": 16, "width": 16}
PIPELINES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], dict[str, Any]]] = {
    "sliced attention": (small_sdxl, lambda unet: unet.set_attention_slice("auto"), SIZE),
    "a processor of one's own": (small_sdxl, lambda unet: unet.set_attn_processor(OwnProcessor()), SIZE),
    "channels last": (small_sdxl, lambda unet: unet.to(memory_format=torch.channels_last), SIZE),
    "two images a prompt": (small_sdxl, lambda unet: None, {**SIZE, "num_images_per_prompt": 2}),
    "an end before the last step": (small_sdxl, lambda unet: None, {**SIZE, "denoising_end": 0.5}),
    "from an image": (
        lambda: of_kind(StableDiffusionXLImg2ImgPipeline),
        lambda unet: None,
        {"image": IMAGE, "strength": 0.7},
    ),
    "perturbed attention": (
        lambda: of_kind(StableDiffusionXLPAGPipeline, pag_applied_layers=["mid"]),
        lambda unet: None,
        {**SIZE, "pag_scale": 2.0},
    ),
    "a ControlNet": (
        lambda: of_kind(StableDiffusionXLControlNetPipeline, controlnet=controlnet(small_sdxl().unet)),
        lambda unet: None,
        {"image": IMAGE, "guess_mode": True},
    ),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_calls_of_a_pipeline_equal_the_stock_denoisers_at_the_level_of_their_timestep(name: str) -> None:
    make, change, options = PIPELINES[name]
    pipe = make()
    unet, stock = adapt(pipe.unet, UNET_TARGETS, scale=0.3)
    for model in (unet, stock.model):
        change(model)
    errors, levels = errors_of(pipe, stock, **options)
    assert len(set(levels)) == (3 if "denoising_end" not in options and name != "from an image" else len(levels)) > 0
    assert max(errors) < 4 * rounding_of(unet), errors


@pytest.mark.usefixtures("_registry")
def test_controlnet_with_an_adapter_of_its_own_reads_its_timestep_once_it_is_registered() -> None:
    inputs = torch.randn(3, 4, 8, 8), torch.tensor([20, 500, 900]), torch.randn(3, 5, 16), IMAGE.expand(3, -1, -1, -1)
    model, _ = adapt(controlnet(small_sd().unet), ["to_q", "to_v"])
    with pytest.raises(ValueError, match=r"register_denoiser\('ControlNetModel', meaning\) before adding adapters"):
        model(*inputs)
    register_denoiser("ControlNetModel")
    model, stock = adapt(controlnet(small_sd().unet), ["to_q", "to_v"])
    found = model(*inputs)[1]
    for i, level in enumerate((0.02, 0.5, 0.9)):
        with torch.no_grad():
            expected = stock.at(level)(*(each[i : i + 1] for each in inputs))[1]
        assert distance(found[i : i + 1], expected) < rounding_of(model)


def test_adapter_trained_in_edm_terms_is_read_in_them_after_loading(tmp_path: Path) -> None:
    pipe: Any = small_sdxl()
    pipe.unet.add_adapter(nara_config(target_modules=["to_q"], noise_convention="edm"))
    disturb(pipe.unet)
    pipe.save_nara_weights(tmp_path)
    loaded: Any = small_sdxl()
    loaded.load_nara_weights(tmp_path, adapter_name="default")
    added = {"text_embeds": torch.randn(1, 24), "time_ids": torch.ones(1, 6)}
    call = partial(run, loaded.unet, torch.randn(1, 4, 8, 8), encoder_hidden_states=torch.randn(1, 5, 40))
    assert told(loaded.unet, lambda: call(timestep=0.0, added_cond_kwargs=added)) == [0.5]  # σ = 1
    with pytest.raises(ValueError, match=r"timestep is 999.* as 'edm' is no λ"):
        pixels(loaded)
    with pytest.raises(ValueError, match="trained with λ defined as 'edm', but the source of λ tells 'timestep'"):
        set_noise_source(loaded.unet, TimestepNoise())
