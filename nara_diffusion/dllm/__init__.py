"""Masked-diffusion language models: backbones, loss, generation, data and evaluation."""

from nara_diffusion.noise.sources import InputIdsNoise

from .batches import AnswerCollator
from .decoding import Sampling
from .encoding import EncodedRecords, encode_records
from .exact_match import ExactMatch, exact_match
from .likelihood import log_likelihood
from .loss import (
    MaskedDiffusionLoss,
    masked_cross_entropy,
    masked_diffusion_loss,
    noise_level_curve,
)
from .masking import MaskedBatch, mask_answers
from .models.forward_rows import read_noise_from_input_ids
from .models.pretrained import load_backbone
from .preference_loss import preference_loss
from .records import read_records
from .sampler import Generation, GenerationStep, generate
from .tokenizer import encode_prompts, prompt_text, stop_token_ids

__all__ = [
    "AnswerCollator",
    "EncodedRecords",
    "ExactMatch",
    "Generation",
    "GenerationStep",
    "InputIdsNoise",
    "MaskedBatch",
    "MaskedDiffusionLoss",
    "Sampling",
    "encode_prompts",
    "encode_records",
    "exact_match",
    "generate",
    "load_backbone",
    "log_likelihood",
    "mask_answers",
    "masked_cross_entropy",
    "masked_diffusion_loss",
    "noise_level_curve",
    "preference_loss",
    "prompt_text",
    "read_noise_from_input_ids",
    "read_records",
    "stop_token_ids",
]
