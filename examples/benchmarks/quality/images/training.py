"""What an image run trains, by the arguments of train_scripts/dreambooth_sdxl.py: the UNet of a method, told a λ."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

from nara_diffusion import noise_level
from nara_diffusion.dreambooth.draws import draw_indices
from nara_diffusion.dreambooth.families import SDXL
from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments
from nara_diffusion.training.adapters import adapter_config, check_target_modules
from quality.images.held_out import BACKBONE, SIZE, SUBJECTS, base, check_subject, instance_prompt
from quality.running import ASSETS, BASE, RANK, Settings, arguments_of
from quality.wrong_noise import while_evaluating

DEFAULTS: dict[str, Any] = {
    "resolution": SIZE[0],
    "rank": RANK,
    "train_batch_size": 5,
    "max_train_steps": 120,
    "learning_rate": 2e-3,
    "core_learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 0.05,
    "stratified_timesteps": True,
    "num_inference_steps": 12,
    "guidance_scale": 2.5,
    "num_validation_images": 3,
    "sample_batch_size": 16,
}


def arguments(subject: str, method: str, seed: int, overrides: Settings) -> DreamBoothArguments:
    """Those of one run; overrides win over the defaults.

    Raises:
        ValueError: an unknown subject, an override that is no argument of the script, or whose value it refuses.
    """
    check_subject(subject)
    data = {"instance_data_dir": str(ASSETS / SUBJECTS[subject]), "instance_prompt": instance_prompt(subject)}
    adapter = {} if method in (BASE, "full") else {"adapter": method}
    model = {"pretrained_model_name_or_path": str(ASSETS / BACKBONE)}
    values = {**DEFAULTS, **model, **data, **overrides, **adapter, "seed": seed}
    return arguments_of(DreamBoothArguments, values)


def adapted(method: str, args: Any) -> Any:
    """A copy of the base's UNet, in which what `method` trains requires a gradient, and nothing else.

    Raises:
        ValueError: a name in `target_modules` matches nothing, or a module that the method can't adapt.
    """
    unet = copy.deepcopy(base().pipe.unet)
    if method == BASE:
        return unet
    if method == "full":
        return unet.requires_grad_(True)
    config: Any = adapter_config(args, noise_convention="timestep")
    check_target_modules(unet, config.target_modules)
    return inject_adapter_in_model(config, unet)


def shuffled_noise_levels(positions: Sequence[int], seed: int, levels: int, group_size: int) -> Tensor:
    """λ (b,) of samples at `positions`: drawn as the true ones are, and independent of them.

    A permutation within a batch of five would leave one sample in five its own λ.
    """
    options: dict[str, Any] = {"stratified": True, "group_size": group_size, "role": "shuffled"}
    return draw_indices(positions, torch.arange(levels), seed=seed, **options) / levels


class ControlledDenoiser(nn.Module):
    """The UNet as a training step calls it, told the λ of a control."""

    def __init__(self, unet: Any, control: str | None) -> None:
        super().__init__()
        self.unet, self.control = unet, control
        self.shuffled: Tensor | None = None  # λ of the next forward, for the control of that name

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        time_ids: Tensor,
        embeddings: tuple[Tensor, Tensor],
        sources: tuple[Tensor, ...] = (),
    ) -> Tensor:
        shuffled = self.control == "shuffled"
        with noise_level(self.unet, self.shuffled) if shuffled else while_evaluating(self.unet, self.control):
            return SDXL.predict(self.unet, sample, timestep, time_ids, embeddings, sources)
