"""The λ that each class of denoisers has at some timesteps, written down by hand from what its pipelines pass."""

from __future__ import annotations

import math
from typing import Any

DISCRETE = {0: 0.0, 250: 0.25, 500: 0.5, 999: 0.999, 1000: 1.0}
SIGMA_1000 = {0.0: 0.0, 250.0: 0.25, 500.0: 0.5, 1000.0: 1.0}
SIGMA = {0.0: 0.0, 0.25: 0.25, 0.5: 0.5, 1.0: 1.0}
DATA = {1.0: 0.0, 0.75: 0.25, 0.5: 0.5, 0.0: 1.0}
DATA_1000 = {1000.0: 0.0, 750.0: 0.25, 500.0: 0.5, 0.0: 1.0}
RATIO = {0.0: 0.0, 0.25: 0.25, 0.5: 0.5, 1.0: 1.0}
ANGLE = {0.0: 0.0, 2 / math.pi * math.atan(1 / 3): 0.25, 0.5: 0.5, 1.0: 1.0}
LOG_SIGMA = {-3.4: 1 / (1 + math.exp(13.6)), math.log(1 / 3) / 4: 0.25, 0.0: 0.5, 3.4: 1 / (1 + math.exp(-13.6))}
EXPECTED: dict[str, dict[Any, float]] = {
    "UNet2DConditionModel": DISCRETE,
    "UNetMotionModel": DISCRETE,
    "UNet3DConditionModel": DISCRETE,
    "PixArtTransformer2DModel": DISCRETE,
    "HunyuanDiT2DModel": DISCRETE,
    "CogVideoXTransformer3DModel": DISCRETE,
    "CogView4Transformer2DModel": DISCRETE,
    "AllegroTransformer3DModel": DISCRETE,
    "AudioLDM2UNet2DConditionModel": DISCRETE,
    "CogView3PlusTransformer2DModel": DISCRETE,
    "ConsisIDTransformer3DModel": DISCRETE,
    "DiTTransformer2DModel": DISCRETE,
    "GlmImageTransformer2DModel": DISCRETE,
    "I2VGenXLUNet": DISCRETE,
    "Kandinsky3UNet": DISCRETE,
    "LatteTransformer3DModel": DISCRETE,
    "PriorTransformer": DISCRETE,
    "UNetControlNetXSModel": DISCRETE,
    "StableCascadeUNet": RATIO,
    "WuerstchenDiffNeXt": RATIO,
    "WuerstchenPrior": RATIO,
    "SD3Transformer2DModel": SIGMA_1000,
    "SanaTransformer2DModel": SIGMA_1000,
    "HunyuanVideoTransformer3DModel": SIGMA_1000,
    "WanTransformer3DModel": SIGMA_1000,
    "LTXVideoTransformer3DModel": SIGMA_1000,
    "HiDreamImageTransformer2DModel": SIGMA_1000,
    "AnyFlowFARTransformer3DModel": SIGMA_1000,
    "AnyFlowTransformer3DModel": SIGMA_1000,
    "BriaFiboTransformer2DModel": SIGMA_1000,
    "BriaTransformer2DModel": SIGMA_1000,
    "ChronoEditTransformer3DModel": SIGMA_1000,
    "Cosmos3OmniTransformer": SIGMA_1000,
    "DreamLiteUNetModel": SIGMA_1000,
    "EasyAnimateTransformer3DModel": SIGMA_1000,
    "ErnieImageTransformer2DModel": SIGMA_1000,
    "HeliosTransformer3DModel": SIGMA_1000,
    "HunyuanImageTransformer2DModel": SIGMA_1000,
    "HunyuanVideo15Transformer3DModel": SIGMA_1000,
    "HunyuanVideoFramepackTransformer3DModel": SIGMA_1000,
    "JoyImageEditPlusTransformer3DModel": SIGMA_1000,
    "JoyImageEditTransformer3DModel": SIGMA_1000,
    "Kandinsky5Transformer3DModel": SIGMA_1000,
    "Kandinsky6SRTransformer3DModel": SIGMA_1000,
    "Kandinsky6Transformer3DModel": SIGMA_1000,
    "LTX2VideoTransformer3DModel": SIGMA_1000,
    "MotifVideoTransformer3DModel": SIGMA_1000,
    "SanaVideoTransformer3DModel": SIGMA_1000,
    "SanaWMTransformer3DModel": SIGMA_1000,
    "SkyReelsV2Transformer3DModel": SIGMA_1000,
    "WanAnimate2Transformer3DModel": SIGMA_1000,
    "WanAnimateTransformer3DModel": SIGMA_1000,
    "WanVACETransformer3DModel": SIGMA_1000,
    "FluxTransformer2DModel": SIGMA,
    "Flux2Transformer2DModel": SIGMA,
    "ChromaTransformer2DModel": SIGMA,
    "QwenImageTransformer2DModel": SIGMA,
    "Krea2Transformer2DModel": SIGMA,
    "AuraFlowTransformer2DModel": SIGMA,
    "CosmosTransformer3DModel": SIGMA,
    "AceStepTransformer1DModel": SIGMA,
    "BriaFibo2Transformer2DModel": SIGMA,
    "Flux3Transformer2DModel": SIGMA,
    "LongCatAudioDiTTransformer": SIGMA,
    "LongCatImageTransformer2DModel": SIGMA,
    "NucleusMoEImageTransformer2DModel": SIGMA,
    "OvisImageTransformer2DModel": SIGMA,
    "PRXTransformer2DModel": SIGMA,
    "QwenImage21Transformer2DModel": SIGMA,
    "StableAudio3DiTModel": SIGMA,
    "LuminaNextDiT2DModel": DATA,
    "Lumina2Transformer2DModel": DATA,
    "ZImageTransformer2DModel": DATA,
    "Ideogram4Transformer2DModel": DATA,
    "MiniMaxH3Transformer3DModel": DATA,
    "MiniMaxMusic3Transformer1DModel": DATA,
    "OmniGenTransformer2DModel": DATA,
    "RFD4ProteinaTransformer": DATA,
    "SanaWMLTX2RefinerTransformer3DModel": SIGMA_1000,  # by its timestep_scale_multiplier of 1000
    "MochiTransformer3DModel": DATA_1000,
    "StableAudioDiTModel": ANGLE,
    "UNetSpatioTemporalConditionModel": LOG_SIGMA,
}
"""What the pipelines' arguments mean: timestep → λ, both ends among them."""

CONVENTIONS = {
    **dict.fromkeys(map(id, (DISCRETE, RATIO)), "timestep"),
    **dict.fromkeys(map(id, (SIGMA_1000, SIGMA, DATA, DATA_1000)), "flow"),
    **dict.fromkeys(map(id, (ANGLE, LOG_SIGMA)), "edm"),
}
ARGUMENTS = {
    "Cosmos3OmniTransformer": "vision_timesteps",
    "HiDreamImageTransformer2DModel": "timesteps",
    "RFD4ProteinaTransformer": "bb_ca_time",
    "StableCascadeUNet": "timestep_ratio",
    "WuerstchenDiffNeXt": "r",
    "WuerstchenPrior": "r",
    "ZImageTransformer2DModel": "t",
}
ONE_LEVEL = ("Cosmos3OmniTransformer", "ErnieImageTransformer2DModel", "MiniMaxH3Transformer3DModel")
"""Their layers see tokens where others see samples: a batch shares its λ."""
BATCHED = [name for name in EXPECTED if name not in ONE_LEVEL]
