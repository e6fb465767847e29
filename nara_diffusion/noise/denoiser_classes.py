"""What the pipelines of Diffusers pass to each class of denoisers, read off their sources.

Some classes serve models that mean different things, which their configuration tells apart (`SETTLED_BY_CONFIG`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .denoisers.denoiser import Denoiser

_DISCRETE = {
    "UNet2DConditionModel": Denoiser(),
    "UNetMotionModel": Denoiser(sample_major=True),
    "UNet3DConditionModel": Denoiser(sample_major=True),
    "AudioLDM2UNet2DConditionModel": Denoiser(),
    "I2VGenXLUNet": Denoiser(sample_major=True),
    "Kandinsky3UNet": Denoiser(),
    "UNetControlNetXSModel": Denoiser(),
    "AllegroTransformer3DModel": Denoiser(sample_major=True),  # frames, in its patch embedder
    "CogVideoXTransformer3DModel": Denoiser(sample_major=True),  # frames, in its patch embedder
    "CogView3PlusTransformer2DModel": Denoiser(),
    "CogView4Transformer2DModel": Denoiser(),  # a flow whose σ is shifted and whose timestep is not
    "ConsisIDTransformer3DModel": Denoiser(sample_major=True),  # frames, in its patch embedder
    "DiTTransformer2DModel": Denoiser(),
    "GlmImageTransformer2DModel": Denoiser(),  # as CogView4, from t - 1; 0 while it reads the given image
    "HunyuanDiT2DModel": Denoiser(sample_major=True),  # tokens of the text, in its embedder
    "LatteTransformer3DModel": Denoiser(sample_major=True),
    "PixArtTransformer2DModel": Denoiser(),
    "PriorTransformer": Denoiser(),
}

_SHARE_OF_TIME = {
    "StableCascadeUNet": Denoiser("ratio", argument="timestep_ratio"),
    "WuerstchenDiffNeXt": Denoiser("ratio", argument="r"),
    "WuerstchenPrior": Denoiser("ratio", argument="r"),
}

_NOISE_TIMES_N = {
    "AnyFlowFARTransformer3DModel": Denoiser("sigma_1000", sample_major=True),  # timesteps of frames
    "AnyFlowTransformer3DModel": Denoiser("sigma_1000", sample_major=True),  # timesteps of frames
    "BriaFiboTransformer2DModel": Denoiser("sigma_1000"),
    "BriaTransformer2DModel": Denoiser("sigma_1000"),
    "ChronoEditTransformer3DModel": Denoiser("sigma_1000"),
    "Cosmos3OmniTransformer": Denoiser(
        "sigma_1000", argument="vision_timesteps", also=("sound_timesteps", "action_timesteps"), packed=True
    ),
    "DreamLiteUNetModel": Denoiser("sigma_1000"),
    "EasyAnimateTransformer3DModel": Denoiser("sigma_1000", sample_major=True),  # frames, in its patch embedder
    "ErnieImageTransformer2DModel": Denoiser("sigma_1000", one_level=True),  # tokens first, then samples
    "HeliosTransformer3DModel": Denoiser("sigma_1000"),
    "HiDreamImageTransformer2DModel": Denoiser("sigma_1000", argument="timesteps"),
    "HunyuanImageTransformer2DModel": Denoiser("sigma_1000"),
    "HunyuanVideo15Transformer3DModel": Denoiser("sigma_1000"),
    "HunyuanVideoFramepackTransformer3DModel": Denoiser("sigma_1000"),
    "HunyuanVideoTransformer3DModel": Denoiser("sigma_1000"),
    "JoyImageEditPlusTransformer3DModel": Denoiser("sigma_1000", sample_major=True),  # patches, in its embedder
    "JoyImageEditTransformer3DModel": Denoiser("sigma_1000"),
    "Kandinsky5Transformer3DModel": Denoiser("sigma_1000"),
    "Kandinsky6SRTransformer3DModel": Denoiser("sigma_1000"),
    "Kandinsky6Transformer3DModel": Denoiser("sigma_1000"),
    "LTX2VideoTransformer3DModel": Denoiser("sigma_1000", sample_major=True, also=("audio_timestep",)),  # of tokens
    "LTXVideoTransformer3DModel": Denoiser("sigma_1000", sample_major=True),  # timesteps of tokens
    "MotifVideoTransformer3DModel": Denoiser("sigma_1000"),
    "SD3Transformer2DModel": Denoiser("sigma_1000"),
    "SanaTransformer2DModel": Denoiser("sigma_1000"),
    "SanaVideoTransformer3DModel": Denoiser("sigma_1000", sample_major=True),  # timesteps of frames
    "SanaWMTransformer3DModel": Denoiser("sigma_1000", sample_major=True),  # timesteps of frames
    "SkyReelsV2Transformer3DModel": Denoiser("sigma_1000", sample_major=True),  # timesteps of frames
    "WanAnimate2Transformer3DModel": Denoiser("sigma_1000", pinned=("kv_cache_mode", "extract", 1.0)),
    "WanAnimateTransformer3DModel": Denoiser("sigma_1000", sample_major=True),  # heads, in its face encoder
    "WanTransformer3DModel": Denoiser("sigma_1000", sample_major=True),  # timesteps of tokens
    "WanVACETransformer3DModel": Denoiser("sigma_1000"),
}

_NOISE = {
    "AceStepTransformer1DModel": Denoiser("sigma"),
    "AuraFlowTransformer2DModel": Denoiser("sigma"),
    "BriaFibo2Transformer2DModel": Denoiser("sigma"),
    "ChromaTransformer2DModel": Denoiser("sigma"),
    "CosmosTransformer3DModel": Denoiser("sigma", sample_major=True),  # timesteps of frames
    "Flux2Transformer2DModel": Denoiser("sigma"),
    "Flux3Transformer2DModel": Denoiser("sigma"),
    "FluxTransformer2DModel": Denoiser("sigma"),
    "Krea2Transformer2DModel": Denoiser("sigma", sample_major=True),  # tokens of the text, in its text fusion
    "LongCatAudioDiTTransformer": Denoiser("sigma"),
    "LongCatImageTransformer2DModel": Denoiser("sigma"),
    "NucleusMoEImageTransformer2DModel": Denoiser("sigma"),
    "OvisImageTransformer2DModel": Denoiser("sigma"),
    "PRXTransformer2DModel": Denoiser("sigma"),
    "QwenImage21Transformer2DModel": Denoiser("sigma"),
    "QwenImageTransformer2DModel": Denoiser("sigma"),
    "SanaWMLTX2RefinerTransformer3DModel": Denoiser("sigma", sample_major=True),  # timesteps of tokens
    "StableAudio3DiTModel": Denoiser("sigma"),
}

_DATA = {
    "Ideogram4Transformer2DModel": Denoiser("data"),
    "Lumina2Transformer2DModel": Denoiser("data"),
    "LuminaNextDiT2DModel": Denoiser("data"),
    "MiniMaxH3Transformer3DModel": Denoiser("data", packed=True),  # the distinct timesteps of its tokens
    "MiniMaxMusic3Transformer1DModel": Denoiser("data"),
    "MochiTransformer3DModel": Denoiser("data_1000", sample_major=True),  # frames, in its patch embedder
    "OmniGenTransformer2DModel": Denoiser("data"),
    "RFD4ProteinaTransformer": Denoiser("data", argument="bb_ca_time", also=("local_latents_time",)),
    "ZImageTransformer2DModel": Denoiser("data", argument="t"),
}

_EDM = {
    "StableAudioDiTModel": Denoiser("angle"),
    "UNetSpatioTemporalConditionModel": Denoiser("edm", sample_major=True),
}

DENOISERS: dict[str, Denoiser] = {**_DISCRETE, **_SHARE_OF_TIME, **_NOISE_TIMES_N, **_NOISE, **_DATA, **_EDM}
"""Class name → what is known of it."""


def _settle_sana(denoiser: Denoiser, config: Any) -> Denoiser:
    """SanaSprint, which alone is conditioned on guidance, is given σ; other Sanas 1000 σ · timestep_scale."""
    return (
        replace(denoiser, meaning="sigma") if config.guidance_embeds else replace(denoiser, scale=config.timestep_scale)
    )


def _settle_cosmos(denoiser: Denoiser, config: Any) -> Denoiser:
    """Cosmos 1, which alone learns positions, is given ¼ ln σ of EDM; Cosmos 2 and 2.5 the σ of the flow."""
    return replace(denoiser, meaning="edm") if config.extra_pos_embed_type == "learnable" else denoiser


def _settle_refiner(denoiser: Denoiser, config: Any) -> Denoiser:
    """It is given σ · timestep_scale_multiplier."""
    return replace(denoiser, scale=config.timestep_scale_multiplier)


SETTLED_BY_CONFIG: dict[str, Callable[[Denoiser, Any], Denoiser]] = {
    "SanaTransformer2DModel": _settle_sana,
    "CosmosTransformer3DModel": _settle_cosmos,
    "SanaWMLTX2RefinerTransformer3DModel": _settle_refiner,
}
