"""Classes of Diffusers that adapters go on and that have no λ of their own, with the reason."""

from __future__ import annotations

STATIC: dict[str, str] = {
    "AutoencoderKL": "a VAE",
    "AutoencoderKLFlux2": "a VAE",
    "AnimaTextConditioner": "a part of the text encoder",
    "LTX2TextConnectors": "a part of the text encoder",
}
"""Pipelines run them before or after the denoising loop, where an adapter's update cannot depend on λ."""

_BESIDE = "a ControlNet is told the timestep of the denoiser that it runs beside, so declare it as that is declared"

_PART = "it is a part of other denoisers, whose adapters reach into it"

UNDECLARED: dict[str, str] = {
    **dict.fromkeys(
        (
            "ControlNetModel",
            "ControlNetUnionModel",
            "CosmosControlNetModel",
            "FluxControlNetModel",
            "FluxMultiControlNetModel",
            "HunyuanDiT2DControlNetModel",
            "HunyuanDiT2DMultiControlNetModel",
            "MultiControlNetModel",
            "MultiControlNetUnionModel",
            "QwenImageControlNetModel",
            "QwenImageMultiControlNetModel",
            "SD3ControlNetModel",
            "SD3MultiControlNetModel",
            "SanaControlNetModel",
            "SparseControlNetModel",
            "ZImageControlNetModel",
        ),
        _BESIDE,
    ),
    **dict.fromkeys(("DreamLiteTransformer2DModel", "TransformerTemporalModel", "UTransformer2DModel"), _PART),
    "UNet1DModel": "its pipelines pass timesteps of unlike meanings",
    "UNet2DModel": "its pipelines pass timesteps of unlike meanings, t of a discrete schedule, σ, ln σ and others",
    "UVit2DModel": "it is told no timestep, its noise is the share of masked tokens",
    "Transformer2DModel": "it is a part of other denoisers, and a denoiser of discrete tokens in VQDiffusionPipeline",
    "T5FilmDecoder": "its time runs in a schedule of its pipeline alone",
    "UniDiffuserModel": "it is told one timestep for the image and one for the text, either of which may be clean",
    "UNetFlatConditionModel": "VersatileDiffusionPipeline runs parts of it inside another UNet",
}
"""They are told the noise in a way that their class does not fix: λ is not known until somebody declares it."""
