"""The arguments of what is trained: the base model and its adapter."""

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata, not a shared default)
from __future__ import annotations

from dataclasses import dataclass

from nara_diffusion.dreambooth.denoiser import UNET_TARGETS
from nara_diffusion.training.arguments.cli import option
from nara_diffusion.training.arguments.common import AdapterArguments


@dataclass
class ModelArguments:
    """Model"""

    pretrained_model_name_or_path: str = option(
        "", "Folder or Hub id of the model to adapt, which has a model_index.json.", content="base model"
    )
    pretrained_vae_model_name_or_path: str | None = option(
        None, "Another autoencoder, such as madebyollin/sdxl-vae-fp16-fix.", content="base model"
    )
    revision: str | None = option(None, "Branch, tag or commit of the model on the Hub.", content="base model")
    variant: str | None = option(None, "Variant of the weight files, such as fp16.", content="base model")
    cache_dir: str | None = option(None, "Where downloads are kept; none means the Hub's usual cache.", resumable=True)
    upcast_vae: bool = option(True, "Encode images in float32 whatever the precision, as SDXL's autoencoder needs.")


@dataclass
class DreamBoothAdapterArguments(AdapterArguments):
    """Adapter"""

    target_modules: list[str] = option(UNET_TARGETS, "Names of the denoiser's modules to adapt, or all-linear.")
    train_text_encoder: bool = option(
        False,
        "Also adapt the text encoders of Stable Diffusion 1, 2 and XL, with the same options; there C = I, since they "
        "know no λ.",
    )
    text_encoder_lr: float | None = option(None, "Learning rate of those; none means --learning_rate.")
    adam_weight_decay_text_encoder: float | None = option(None, "Weight decay of those; none means --weight_decay.")
