"""Stable Diffusion XL with the NaRA methods in its class, for editors.

    from pipelines.stable_diffusion_xl_nara import StableDiffusionXLPipeline

or, without this file's folder on the path,

    DiffusionPipeline.from_pretrained(
        "stabilityai/stable-diffusion-xl-base-1.0",
        custom_pipeline="pipelines/stable_diffusion_xl_nara.py",
        trust_remote_code=True,
    )

`import nara_diffusion` gives every pipeline these methods, but an editor only sees them in a class.
This class has the name of Diffusers' own, so that it saves a stock pipeline and
`AutoPipelineForImage2Image.from_pipe` knows it.
"""

import diffusers

from nara_diffusion.loaders.weights import load_nara_weights, save_nara_weights, unload_nara_weights


class StableDiffusionXLPipeline(diffusers.StableDiffusionXLPipeline):
    """Diffusers' Stable Diffusion XL, with methods to load, save and unload NaRA adapters."""

    load_nara_weights = load_nara_weights
    save_nara_weights = save_nara_weights
    unload_nara_weights = unload_nara_weights
