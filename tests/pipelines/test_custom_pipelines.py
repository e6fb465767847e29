"""The files of `pipelines/` as Diffusers' custom pipelines: SDXL's has the stock pipeline's pixels, in and out."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import diffusers.utils.dynamic_modules_utils as dynamic_modules
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline, StableDiffusionXLImg2ImgPipeline

from pipelines.llada import LLaDAPipeline
from pipelines.stable_diffusion_xl_nara import StableDiffusionXLPipeline
from tests.helpers.adapted import disturb, nara_config
from tests.helpers.small_pipelines import pixels, quiet, small_sdxl

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _own_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A place of its own, for each test, to which Diffusers copies the file of a custom pipeline."""
    monkeypatch.setattr(dynamic_modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers_modules"]:
        del sys.modules[name]


def load(folder: Path, file: str, **options: Any) -> Any:
    custom = {"custom_pipeline": str(ROOT / "pipelines" / file), "trust_remote_code": True}
    return quiet(DiffusionPipeline.from_pretrained(folder, **custom, **options))


def test_llada_s_saved_pipeline_is_read_by_diffusers(tmp_path: Path) -> None:
    LLaDAPipeline.from_pretrained(ROOT / "examples" / "assets" / "llada-tiny").save_pretrained(tmp_path)
    pipe = load(tmp_path, "llada.py", dtype=torch.bfloat16)
    assert pipe.dtype == torch.bfloat16
    assert pipe("upper: planet", gen_length=12).texts == ["PLANET"]


@pytest.mark.slow
def test_sdxl_gives_stock_pixels_and_converts_to_tasks(tmp_path: Path) -> None:
    trained, saved = small_sdxl(), tmp_path / "sdxl"
    trained.save_pretrained(saved)
    trained.unet.add_adapter(nara_config(target_modules=["to_q", "to_v"]))
    disturb(trained.unet)
    trained.save_nara_weights(tmp_path / "adapter")
    stock_pipe, pipe = StableDiffusionXLPipeline.from_pretrained(saved), load(saved, "stable_diffusion_xl_nara.py")
    stock = quiet(diffusers.StableDiffusionXLPipeline.from_pretrained(saved))
    assert type(stock_pipe) is StableDiffusionXLPipeline
    assert type(pipe).__module__.startswith("diffusers_modules.")
    base = pixels(stock)
    for pipeline in (quiet(stock_pipe), pipe):
        assert torch.equal(pixels(pipeline), base)
        pipeline.save_pretrained(tmp_path / "again")
        again = quiet(DiffusionPipeline.from_pretrained(tmp_path / "again"))
        assert type(again) is diffusers.StableDiffusionXLPipeline
        assert torch.equal(pixels(again), base)
    for loaded in (pipe, stock):
        loaded.load_nara_weights(tmp_path / "adapter", adapter_name="subject")
    changed = pixels(stock)
    assert torch.equal(pixels(pipe), changed)
    assert not torch.equal(changed, base)
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(other) is StableDiffusionXLImg2ImgPipeline
    assert other.get_active_adapters() == ["subject"]
    pipe.unload_nara_weights()
    assert torch.equal(pixels(pipe), base)


def test_editor_sees_methods_with_arguments_and_docstrings() -> None:
    for name in ["load_nara_weights", "save_nara_weights", "unload_nara_weights"]:
        method = vars(StableDiffusionXLPipeline)[name]
        assert inspect.signature(method) == inspect.signature(getattr(DiffusionPipeline, name))
        assert method.__doc__
