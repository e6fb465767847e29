"""Stable Diffusion XL with the NaRA methods in its class, for completion in editors.

    from pipelines.stable_diffusion_xl_nara import StableDiffusionXLPipeline

If the folder of this file isn't on the Python path, use:

    DiffusionPipeline.from_pretrained(
        "stabilityai/stable-diffusion-xl-base-1.0",
        custom_pipeline="pipelines/stable_diffusion_xl_nara.py",
        trust_remote_code=True,
    )

`import nara_diffusion` gives every pipeline these methods, but an editor only sees them in a class.
This class has the same name as Diffusers' class. It therefore saves a stock pipeline, and
`AutoPipelineForImage2Image.from_pipe` recognises it.
"""

import diffusers

from nara_diffusion.loaders.weights import load_nara_weights, save_nara_weights, unload_nara_weights


class StableDiffusionXLPipeline(diffusers.StableDiffusionXLPipeline):
    """Diffusers' Stable Diffusion XL, with methods to load, save and unload NaRA adapters."""

    load_nara_weights = load_nara_weights
    save_nara_weights = save_nara_weights
    unload_nara_weights = unload_nara_weights
