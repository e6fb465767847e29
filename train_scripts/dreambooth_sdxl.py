"""Teaches Stable Diffusion XL a subject from a few images, with NaRA or another adapter, and shows what that brought.

It is train_scripts/dreambooth.py with the defaults of SDXL, and with a model and images of its own.

The shipped model and images, offline, on CPU, in minutes:
    accelerate launch train_scripts/dreambooth_sdxl.py
Your own five images, on one GPU; the file holds what suits SDXL, flags win over it:
    accelerate launch train_scripts/dreambooth_sdxl.py --config train_scripts/configs/sdxl_dreambooth.yaml \\
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir sks-dog

With --adapter lora, dora, …, full the same is done by another method; --help lists them. --init_adapter starts from
a LoRA or NaRA. --min_noise_level and --max_noise_level train a part of the noise levels (docs/windows.md).
A base that predicts ε taught to predict a rectified flow's velocity, on a folder of captioned images; the adapter
brings the scheduler that then samples (docs/conversion.md). Before training, the log says the loss of the untrained
base read by the identity between the two, which is what an adapter has to beat (identity_loss in results.json):
    accelerate launch train_scripts/dreambooth_sdxl.py --config train_scripts/configs/sdxl_dreambooth.yaml \\
        --instance_data_dir photos --prediction_type flow_prediction --max_train_steps 5000 --output_dir sdxl-flow

What is written to the output folder stands in train_scripts/dreambooth.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from nara_diffusion.dreambooth.denoiser import UNET_TARGETS
from nara_diffusion.training.adapters.method_arguments import without_unread
from nara_diffusion.training.adapters.methods import METHODS
from nara_diffusion.training.main import run_command

try:
    from train_scripts.dreambooth import ASSETS, main, shipped_data
except ModuleNotFoundError:  # run as a program, which finds the files beside it
    from dreambooth import ASSETS, main, shipped_data

# What a run does where no model is named; the flags' own defaults suit SDXL.
SHIPPED_RUN: dict[str, Any] = {
    "pretrained_model_name_or_path": str(ASSETS / "sdxl-tiny"),
    "similarity_model": str(ASSETS / "clip-tiny"),
    "alignment_model": str(ASSETS / "clip-tiny"),
    "resolution": 64,
    "rank": 16,
    "target_modules": [*UNET_TARGETS, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2"],
    "train_batch_size": 5,
    "max_train_steps": 700,
    "learning_rate": 2e-3,
    "core_learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "stratified_timesteps": True,
    "num_inference_steps": 20,
    "guidance_scale": 2.5,
    "sample_batch_size": 8,
    "validation_steps": 350,
    "checkpointing_steps": 350,
}


def shipped_run(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the shipped run, where no model was `given`; without its data, where other data were."""
    if "pretrained_model_name_or_path" in given:
        return {}
    values = without_unread(SHIPPED_RUN | shipped_data(given, SHIPPED_RUN), given)
    if METHODS[given.get("adapter", "nara")].linear_only:
        values["target_modules"] = [name for name in values["target_modules"] if not name.startswith("conv")]
    return values


if __name__ == "__main__":
    run_command(main, DreamBoothArguments, __doc__, SHIPPED_RUN, shipped_run)
