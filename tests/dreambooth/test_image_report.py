"""The model card of an image run: the code that loads the adapter, and what is said of the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import StableDiffusionXLPipeline

from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments
from nara_diffusion.dreambooth.image_report import _loading
from nara_diffusion.dreambooth.samples import SampleSettings
from nara_diffusion.training.command import gathered
from tests.helpers.small_pipelines import small_sdxl


def card_code(**flags: Any) -> str:
    """The code on the card of a run with `flags`."""
    flags = {"pretrained_model_name_or_path": "base", "instance_data_dir": "pictures"} | flags
    args = DreamBoothArguments(**gathered(DreamBoothArguments, flags))
    settings = SampleSettings(["a toy"], 1, seed=0, batch_size=1, call={"num_inference_steps": 2})
    return _loading(args, settings, "out", small_sdxl(), "")


def test_card_loads_the_files_of_the_run(tmp_path: Path) -> None:
    small_sdxl().save_pretrained(tmp_path, variant="fp16")
    code = card_code(pretrained_model_name_or_path=str(tmp_path), model_options={"variant": "fp16", "revision": "main"})
    scope: dict[str, Any] = {}
    exec(code.split("```python")[1].partition("\npipe.load_nara_weights")[0], scope)
    assert type(scope["pipe"]) is StableDiffusionXLPipeline
    assert "revision='main', variant='fp16')" in code
    assert "variant" not in card_code()
