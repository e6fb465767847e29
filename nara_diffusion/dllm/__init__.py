"""Masked-diffusion language models: backbones, loss, generation, data and evaluation."""

from nara_diffusion.dllm.backbones import load_backbone
from nara_diffusion.dllm.generation import Generation, generate
from nara_diffusion.dllm.loss import MaskedDiffusionLoss, masked_cross_entropy, masked_diffusion_loss
from nara_diffusion.dllm.masking import MaskedBatch, mask_answers

__all__ = [
    "Generation",
    "MaskedBatch",
    "MaskedDiffusionLoss",
    "generate",
    "load_backbone",
    "mask_answers",
    "masked_cross_entropy",
    "masked_diffusion_loss",
]
