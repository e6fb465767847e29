"""A T-LoRA that LyCORIS itself wrote, against LyCORIS' own forward with its own mask."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from safetensors.torch import save_file
from torch import Tensor, nn

from nara_diffusion.loaders.file import AdapterFile
from tests.helpers.adapted import relative_error
from tests.helpers.small_pipelines import BETAS, small_flux, small_sdxl
from tests.helpers.tlora_files import SETTINGS

pytestmark = pytest.mark.slow

TIMESTEPS = (0, 1, 99, 250, 333, 500, 666, 750, 870, 999)
RANK, LEAST, EXPONENT = 5, 2, 2.0


@pytest.fixture
def tlora(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """LyCORIS' module of T-LoRA, which has one mask for all networks, with the layers that SimpleTuner trains."""
    from lycoris import LycorisNetwork  # type: ignore[import-not-found]
    from lycoris.modules import tlora  # type: ignore[import-not-found]

    monkeypatch.setattr(tlora, "gc", SimpleNamespace(collect=lambda: 0))  # 0.1 s a layer
    monkeypatch.setattr(LycorisNetwork, "TARGET_REPLACE_MODULE", ["Attention", "FeedForward"])
    monkeypatch.setattr(LycorisNetwork, "TARGET_REPLACE_NAME", ["down_blocks.1.resnets.0.conv_shortcut"])
    yield tlora
    tlora.clear_timestep_mask()


def trained(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with LyCORIS' layers, moved from their start; and SimpleTuner's files in `folder`."""
    from lycoris import create_lycoris  # type: ignore[import-not-found]

    model = copy.deepcopy(model)
    network = create_lycoris(model, linear_dim=RANK, linear_alpha=3, algo="tlora", warn_on_unmatched=False)
    generator, tensors = torch.Generator().manual_seed(1), {}
    for layer in network.loras:
        for parameter in (layer.q_layer.weight, layer.p_layer.weight, layer.lambda_layer):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        for field, tensor in layer.custom_state_dict().items():
            tensors[f"{layer.lora_name}.{field}"] = tensor.detach().clone()
    network.apply_to()
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    settings = SETTINGS | {"linear_dim": RANK, "tlora_min_rank": LEAST, "tlora_alpha": EXPONENT}
    (folder / "lycoris_config.json").write_text(json.dumps(settings))
    return model


def set_mask(tlora: Any, t: float) -> None:
    tlora.set_timestep_mask(tlora.compute_timestep_mask(t, 1000, RANK, LEAST, EXPONENT))


@torch.no_grad()
def output(unet: Any, timestep: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    text, width = unet.config.cross_attention_dim, unet.config.projection_class_embeddings_input_dim - 24
    sample, states, pooled = (torch.randn(3, *shape, generator=generator) for shape in ((4, 8, 8), (5, text), (width,)))
    condition = {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 4, 16, 16]] * 3)}
    return unet(sample, timestep, states, added_cond_kwargs=condition).sample


def test_unet_equals_lycoris_forward_at_each_timestep(tmp_path, tlora) -> None:
    pipe: Any = small_sdxl()
    reference = trained(pipe.unet, tmp_path)
    pipe.load_nara_weights(tmp_path)
    rows = {}
    for t in TIMESTEPS:
        set_mask(tlora, t)
        rows[t] = output(reference, torch.tensor(t))
        assert relative_error(output(pipe.unet, torch.tensor(t)), rows[t]) <= 1e-4
    expected = torch.stack([rows[t][index] for index, t in enumerate((999, 333, 0))])
    assert relative_error(output(pipe.unet, torch.tensor([999, 333, 0])), expected) <= 1e-4
    assert relative_error(rows[999], rows[0]) > 1e-2


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_samples_with_guidance_equal_lycoris(scheduler: Any, tmp_path, tlora) -> None:
    pipe, reference = small_sdxl(), small_sdxl()
    reference.unet = trained(pipe.unet, tmp_path)  # type: ignore[assignment]
    reference.unet.register_forward_pre_hook(lambda _, args: set_mask(tlora, float(args[1])))
    pipe.load_nara_weights(tmp_path)  # type: ignore[attr-defined]
    images = []
    for either in (pipe, reference):
        either.scheduler = scheduler(**BETAS)
        generator = torch.Generator().manual_seed(0)
        call: dict[str, Any] = {"num_inference_steps": 5, "height": 16, "width": 16, "output_type": "latent"}
        images.append(either("a photo of a toy", generator=generator, guidance_scale=4.0, **call).images)
    assert relative_error(*images) <= 1e-4


def test_flux_samples_equal_lycoris(tmp_path, tlora) -> None:
    pipe, reference = small_flux(), small_flux()
    reference.transformer = trained(pipe.transformer, tmp_path)  # type: ignore[assignment]

    def follow(_: Any, args: Any, kwargs: Any) -> None:
        set_mask(tlora, 1000 * float(kwargs["timestep"][0]))

    reference.transformer.register_forward_pre_hook(follow, with_kwargs=True)
    pipe.load_nara_weights(tmp_path)  # type: ignore[attr-defined]
    images = []
    for either in (pipe, reference):
        generator = torch.Generator().manual_seed(0)
        call: dict[str, Any] = {"num_inference_steps": 5, "height": 16, "width": 16, "output_type": "latent"}
        images.append(either("toy", generator=generator, max_sequence_length=12, **call).images)
    assert relative_error(*images) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize(("padding", "stride"), [(1, 1), (0, 2)])
def test_kernels_of_convolutions_work_as_in_lycoris(padding, stride, tmp_path, tlora) -> None:
    layer = nn.Conv2d(6, 9, padding + 2, stride, padding)
    model = nn.ModuleDict({"conv": layer})
    module = tlora.TLoraModule("lycoris_conv", copy.deepcopy(layer), lora_dim=RANK, alpha=3)
    tensors = {f"lycoris_conv.{field}": tensor.clone() for field, tensor in module.custom_state_dict().items()}
    tensors["lycoris_conv.lambda_layer"] *= 2
    module.lambda_layer.data *= 2
    x = torch.randn(2, 6, 8, 4)
    if padding:
        with pytest.raises(RuntimeError, match="size of tensor"):
            module(x)
        with pytest.raises(ValueError, match="fails in it"):
            AdapterFile.read(tensors, base=lambda: model, rank_mask={})
        return
    (part,) = AdapterFile.read(tensors, base=lambda: model, rank_mask={}).parts.values()
    A, B = (part.tensors[f"conv.lora_{factor}.weight"] for factor in "AB")
    update = 3 / RANK * nn.functional.conv2d(nn.functional.conv2d(x, A, stride=stride), B)
    torch.testing.assert_close(layer(x) + update, module(x), rtol=1e-4, atol=1e-5)
