"""Masked-diffusion language models: backbones, loss, generation, data and evaluation."""

from nara_diffusion.dllm.loss import MaskedDiffusionLoss, masked_cross_entropy, masked_diffusion_loss
from nara_diffusion.dllm.masking import MaskedBatch, mask_answers

__all__ = [
    "MaskedBatch",
    "MaskedDiffusionLoss",
    "mask_answers",
    "masked_cross_entropy",
    "masked_diffusion_loss",
]
