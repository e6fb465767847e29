"""What each denoiser of Diffusers means by its timestep, and how its layers see the batch.

A class is looked up by its name, then by those of its base classes; some classes serve models that mean different
things, which their configuration tells apart (`_SETTLED_BY_CONFIG`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .timesteps import TimestepNoise, UndeclaredTimestep


@dataclass(frozen=True)
class Denoiser:
    """What is known of a class of denoisers.

    Attributes:
        meaning, argument, scale: see `TimestepNoise`.
        sample_major: whether layers may see b · k rows, k consecutive ones a sample (frames, positions, tokens),
            where the model sees b. Otherwise another number of rows than the batch's is an error.
    """

    meaning: str = "discrete"
    argument: str = "timestep"
    sample_major: bool = False
    scale: float = 1.0

    def source(self, convention: str | None = None) -> TimestepNoise:
        """What reads λ from its timestep, for adapters whose λ is defined as `convention` (None: as the class does).

        Models of discrete schedules are trained in EDM's terms too, or converted to a rectified flow: an adapter that
        says so is read so.
        """
        meaning = self.meaning
        if meaning == "discrete":
            meaning = {"edm": "edm", "flow": "sigma_1000"}.get(convention or "", meaning)
        return UndeclaredTimestep(meaning, argument=self.argument, scale=self.scale)


_DENOISERS: dict[str, Denoiser] = {
    "UNet2DConditionModel": Denoiser(),
    "UNetMotionModel": Denoiser(sample_major=True),
    "UNet3DConditionModel": Denoiser(sample_major=True),
    "PixArtTransformer2DModel": Denoiser(),
    "HunyuanDiT2DModel": Denoiser(sample_major=True),  # tokens of the text, in its embedder
    "CogVideoXTransformer3DModel": Denoiser(sample_major=True),  # frames, in its patch embedder
    "CogView4Transformer2DModel": Denoiser(),  # a flow whose σ is shifted and whose timestep is not
    "SD3Transformer2DModel": Denoiser("sigma_1000"),
    "SanaTransformer2DModel": Denoiser("sigma_1000"),
    "HunyuanVideoTransformer3DModel": Denoiser("sigma_1000"),
    "WanTransformer3DModel": Denoiser("sigma_1000", sample_major=True),  # timesteps of tokens
    "LTXVideoTransformer3DModel": Denoiser("sigma_1000", sample_major=True),  # timesteps of tokens
    "HiDreamImageTransformer2DModel": Denoiser("sigma_1000", argument="timesteps"),
    "FluxTransformer2DModel": Denoiser("sigma"),
    "Flux2Transformer2DModel": Denoiser("sigma"),
    "ChromaTransformer2DModel": Denoiser("sigma"),
    "QwenImageTransformer2DModel": Denoiser("sigma"),
    "Krea2Transformer2DModel": Denoiser("sigma", sample_major=True),  # tokens of the text, in its text fusion
    "AuraFlowTransformer2DModel": Denoiser("sigma"),
    "CosmosTransformer3DModel": Denoiser("sigma", sample_major=True),  # timesteps of frames
    "LuminaNextDiT2DModel": Denoiser("data"),
    "Lumina2Transformer2DModel": Denoiser("data"),
    "ZImageTransformer2DModel": Denoiser("data", argument="t"),
    "MochiTransformer3DModel": Denoiser("data_1000", sample_major=True),  # frames, in its patch embedder
}


def _settle_sana(denoiser: Denoiser, config: Any) -> Denoiser:
    """SanaSprint, which alone is conditioned on guidance, is given σ; other Sanas 1000 σ · timestep_scale."""
    return (
        replace(denoiser, meaning="sigma") if config.guidance_embeds else replace(denoiser, scale=config.timestep_scale)
    )


def _settle_cosmos(denoiser: Denoiser, config: Any) -> Denoiser:
    """Cosmos 1, which alone learns positions, is given ¼ ln σ of EDM; Cosmos 2 and 2.5 the σ of the flow."""
    return replace(denoiser, meaning="edm") if config.extra_pos_embed_type == "learnable" else denoiser


_SETTLED_BY_CONFIG: dict[str, Callable[[Denoiser, Any], Denoiser]] = {
    "SanaTransformer2DModel": _settle_sana,
    "CosmosTransformer3DModel": _settle_cosmos,
}


def register_denoiser(
    class_name: str, meaning: str = "discrete", *, argument: str = "timestep", sample_major: bool = False
) -> None:
    """Declare what the timestep of a class of denoisers means, before adapters are added to one.

        register_denoiser("MyTransformer2DModel", "sigma")

    Args: see `TimestepNoise` and `Denoiser`.

    Raises:
        ValueError: an unknown meaning, or the class is declared otherwise already.
    """
    TimestepNoise(meaning)
    denoiser = Denoiser(meaning, argument, sample_major)
    if _DENOISERS.setdefault(class_name, denoiser) != denoiser:
        raise ValueError(
            f"{class_name} is declared already, as {_DENOISERS[class_name]}: give a model that means something else a "
            "source of its own, set_noise_source(model, TimestepNoise(meaning))."
        )


def denoiser_of(model: nn.Module) -> Denoiser | None:
    """What is known of the class of `model`, or None if it is no denoiser that anybody declared."""
    name = next((kind.__name__ for kind in type(model).__mro__ if kind.__name__ in _DENOISERS), None)
    if name is None:
        return None
    settle = _SETTLED_BY_CONFIG.get(name)
    return _DENOISERS[name] if settle is None else settle(_DENOISERS[name], model.config)
