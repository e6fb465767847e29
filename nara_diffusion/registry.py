"""Every registration with PEFT and Diffusers, in one place; run on import, harmless when run again."""

from __future__ import annotations

from diffusers.modular_pipelines.modular_pipeline import ModularPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .config import NaraConfig, NaraPeftType
from .loaders.weights import load_nara_weights, save_nara_weights, unload_nara_weights
from .tuner.model import NaraModel
from .wraps import wrap_other_libraries


def register() -> None:
    """Make NaRA a method that PEFT and Diffusers know."""
    _register_with_peft()
    _register_with_diffusers()
    wrap_other_libraries()


def _register_with_peft() -> None:
    # `peft.utils.register_peft_method` takes names of PEFT's own enum only
    PEFT_TYPE_TO_CONFIG_MAPPING[NaraPeftType.NARA] = NaraConfig  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[NaraPeftType.NARA] = NaraModel  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[NaraPeftType.NARA] = NaraModel.prefix  # type: ignore[index]


def _register_with_diffusers() -> None:
    for method in (load_nara_weights, save_nara_weights, unload_nara_weights):
        for kind in (DiffusionPipeline, ModularPipeline):
            setattr(kind, method.__name__, method)
