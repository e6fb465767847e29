"""Say what the `timestep` of each denoiser class means, and what its layers see: the table.

The table follows the source code of Diffusers' pipelines. A class is looked up by its name, then by
the names of its base classes. `register_denoiser` adds a class. In some classes the model sees b
samples, but its layers see b · k rows, with k consecutive rows for each sample. These rows may be
frames of a video, timesteps of tokens or frames, or text tokens inside an embedder. Such classes
are declared `sample_major`, because sizes do not show it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import nn

from .parts import FrameTokens
from .timesteps import DenoiserNoise

_PLAIN = {
    "discrete": """UNet2DConditionModel AudioLDM2UNet2DConditionModel Kandinsky3UNet UNetControlNetXSModel
        CogView3PlusTransformer2DModel CogView4Transformer2DModel DiTTransformer2DModel GlmImageTransformer2DModel
        PixArtTransformer2DModel PriorTransformer""",
    "sigma_1000": """BriaFiboTransformer2DModel BriaTransformer2DModel ChronoEditTransformer3DModel DreamLiteUNetModel
        HeliosTransformer3DModel HunyuanImageTransformer2DModel HunyuanVideo15Transformer3DModel
        HunyuanVideoFramepackTransformer3DModel HunyuanVideoTransformer3DModel JoyImageEditTransformer3DModel
        Kandinsky5Transformer3DModel Kandinsky6SRTransformer3DModel Kandinsky6Transformer3DModel
        MotifVideoTransformer3DModel SD3Transformer2DModel SanaTransformer2DModel WanVACETransformer3DModel""",
    "sigma": """AceStepTransformer1DModel AuraFlowTransformer2DModel BriaFibo2Transformer2DModel
        ChromaTransformer2DModel Flux2Transformer2DModel Flux3Transformer2DModel FluxTransformer2DModel
        LongCatAudioDiTTransformer LongCatImageTransformer2DModel NucleusMoEImageTransformer2DModel
        OvisImageTransformer2DModel PRXTransformer2DModel QwenImage21Transformer2DModel QwenImageTransformer2DModel
        StableAudio3DiTModel""",
    "data": """Ideogram4Transformer2DModel Lumina2Transformer2DModel LuminaNextDiT2DModel
        MiniMaxMusic3Transformer1DModel OmniGenTransformer2DModel""",
    "angle": "StableAudioDiTModel",
}
"""Meaning of `timestep` → classes with layers that see one row for each sample."""

_SAMPLE_MAJOR = {
    "discrete": """UNetMotionModel UNet3DConditionModel I2VGenXLUNet AllegroTransformer3DModel
        CogVideoXTransformer3DModel ConsisIDTransformer3DModel HunyuanDiT2DModel LatteTransformer3DModel""",
    "sigma_1000": """AnyFlowFARTransformer3DModel AnyFlowTransformer3DModel EasyAnimateTransformer3DModel
        JoyImageEditPlusTransformer3DModel LTXVideoTransformer3DModel SanaVideoTransformer3DModel
        SanaWMTransformer3DModel SkyReelsV2Transformer3DModel WanAnimateTransformer3DModel WanTransformer3DModel""",
    "sigma": "CosmosTransformer3DModel Krea2Transformer2DModel SanaWMLTX2RefinerTransformer3DModel",
    "data_1000": "MochiTransformer3DModel",
    "edm": "UNetSpatioTemporalConditionModel",
}
"""Meaning of `timestep` → classes with layers that may see k rows for each sample."""

_DENOISERS: dict[str, DenoiserNoise] = {
    **{name: DenoiserNoise(meaning) for meaning, names in _PLAIN.items() for name in names.split()},
    **{
        name: DenoiserNoise(meaning, sample_major=True)
        for meaning, names in _SAMPLE_MAJOR.items()
        for name in names.split()
    },
    "StableCascadeUNet": DenoiserNoise("ratio", argument="timestep_ratio"),
    "WuerstchenDiffNeXt": DenoiserNoise("ratio", argument="r"),
    "WuerstchenPrior": DenoiserNoise("ratio", argument="r"),
    "Cosmos3OmniTransformer": DenoiserNoise(
        "sigma_1000",
        argument="vision_timesteps",
        also=("sound_timesteps", "action_timesteps"),
        packed=True,
    ),
    "ErnieImageTransformer2DModel": DenoiserNoise(
        "sigma_1000", one_level=True
    ),  # tokens first, then samples
    "HiDreamImageTransformer2DModel": DenoiserNoise("sigma_1000", argument="timesteps"),
    "LTX2VideoTransformer3DModel": DenoiserNoise(
        "sigma_1000", sample_major=True, also=("audio_timestep",)
    ),
    "WanAnimate2Transformer3DModel": DenoiserNoise(
        "sigma_1000", pinned=("kv_cache_mode", "extract", 1.0)
    ),
    "MiniMaxH3Transformer3DModel": DenoiserNoise(
        "data", packed=True
    ),  # it gets the distinct timesteps of its tokens
    "RFD4ProteinaTransformer": DenoiserNoise(
        "data", argument="bb_ca_time", also=("local_latents_time",)
    ),
    "ZImageTransformer2DModel": DenoiserNoise("data", argument="t"),
}


_WAN = FrameTokens(
    per_sample=re.compile(
        r"patch_embedding|condition_embedder\.(text|image)_embedder\..*|fps_(embedding|projection.*)"
        r"|blocks\.\d+\.attn2\.(to_k|to_v|to_kv|add_k_proj|add_v_proj|to_added_kv)"
    ),
    times=re.compile(r"condition_embedder\.(time_embedder\..*|delta_embedder\..*|time_proj)"),
)
_FRAMES = {
    "WanTransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": _WAN,
    "AnyFlowTransformer3DModel": replace(_WAN, axis=1),
    "CosmosTransformer3DModel": FrameTokens(
        per_sample=re.compile(
            r"transformer_blocks\.\d+\.attn2\.(to_k|to_v|k_img|v_img)|(crossattn|img_context)_proj.*"
        ),
        times=re.compile(r"time_embed\..*|patch_embed\.proj|.*norm.*\.linear_[12]"),
    ),
}
"""Class → where its layers see the frames of a video, for λ a frame."""
_DENOISERS |= {name: replace(_DENOISERS[name], frames=frames) for name, frames in _FRAMES.items()}


def register_denoiser(
    class_name: str,
    meaning: str = "discrete",
    *,
    argument: str = "timestep",
    sample_major: bool = False,
) -> None:
    """Declare what the timestep of a source class means.

        register_denoiser("MyTransformer2DModel", "sigma")

    Call this before you add adapters. The arguments are those of `DenoiserNoise` and `TimestepNoise`.

    Raises:
        ValueError: the meaning is unknown, or the class already has a different declaration.
    """
    source = DenoiserNoise(meaning, argument=argument, sample_major=sample_major)
    if _DENOISERS.setdefault(class_name, source) != source:
        raise ValueError(
            f"{class_name} is already declared, as {_DENOISERS[class_name]}: if the timestep of your model means "
            "something else, call set_noise_source(model, TimestepNoise(meaning))."
        )


def source_of_class(model: nn.Module) -> DenoiserNoise | None:
    """Return the table's entry for the class of `model`, or None if there is none.

    In some classes, the meaning of `timestep` depends on the model's configuration.
    """
    name = next(
        (kind.__name__ for kind in type(model).__mro__ if kind.__name__ in _DENOISERS), None
    )
    if name is None:
        return None
    source: DenoiserNoise = _DENOISERS[name]
    config: Any = getattr(model, "config", None)
    if name == "SanaTransformer2DModel":
        # only SanaSprint is conditioned on guidance; its timestep is σ
        changes = (
            {"meaning": "sigma"} if config.guidance_embeds else {"scale": config.timestep_scale}
        )
        return replace(source, **changes)
    if name == "QwenImageTransformer2DModel" and config.get("zero_cond_t"):
        # its modulations see the samples at their timesteps, then at t = 0 for images to edit
        return replace(source, tiled=True)
    if name == "CosmosTransformer3DModel" and config.extra_pos_embed_type == "learnable":
        # Cosmos 1: ¼ ln σ of EDM
        return replace(source, meaning="edm")
    if name == "SanaWMLTX2RefinerTransformer3DModel":  # it gets σ · timestep_scale_multiplier
        return replace(source, scale=config.timestep_scale_multiplier)
    return source
