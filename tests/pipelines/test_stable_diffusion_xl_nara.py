"""SDXL with the methods typed in: the stock pipeline's pixels, through every way in and out."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline, StableDiffusionXLImg2ImgPipeline

from pipelines.stable_diffusion_xl_nara import StableDiffusionXLPipeline
from tests.helpers.adapted import disturb, nara_config
from tests.helpers.small_pipelines import pixels, small_sdxl

FILE = str(Path(__file__).parents[2] / "pipelines" / "stable_diffusion_xl_nara.py")
OPTIONS = {"custom_pipeline": FILE, "trust_remote_code": True}


@pytest.fixture
def saved(tmp_path) -> Path:
    small_sdxl().save_pretrained(tmp_path / "sdxl")
    return tmp_path / "sdxl"


@pytest.fixture
def adapter(tmp_path) -> Path:
    pipe = small_sdxl()
    pipe.unet.add_adapter(nara_config(target_modules=["to_q", "to_v"]))
    disturb(pipe.unet)
    pipe.save_nara_weights(tmp_path / "adapter")
    return tmp_path / "adapter"


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(folder: Path):
    return quiet(DiffusionPipeline.from_pretrained(folder, **OPTIONS))


def test_loads_as_a_custom_pipeline_and_gives_the_stock_pixels(saved, adapter):
    pipe, stock = load(saved), quiet(diffusers.StableDiffusionXLPipeline.from_pretrained(saved))
    assert type(pipe).__module__.startswith("diffusers_modules.")
    base = pixels(stock)
    assert torch.equal(pixels(pipe), base)
    for loaded in (pipe, stock):
        loaded.load_nara_weights(adapter)
    changed = pixels(stock)
    assert torch.equal(pixels(pipe), changed)
    assert not torch.equal(changed, base)
    pipe.unload_nara_weights()
    assert torch.equal(pixels(pipe), base)


def test_loads_by_its_own_class_too(saved):
    pipe = quiet(StableDiffusionXLPipeline.from_pretrained(saved))
    assert type(pipe) is StableDiffusionXLPipeline
    assert torch.equal(pixels(pipe), pixels(small_sdxl()))


def test_what_it_saves_is_a_stock_pipeline(saved, tmp_path):
    load(saved).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["_class_name"] == (
        "StableDiffusionXLPipeline"
    )
    stock = quiet(DiffusionPipeline.from_pretrained(tmp_path / "again"))
    assert type(stock) is diffusers.StableDiffusionXLPipeline
    assert torch.equal(pixels(stock), pixels(small_sdxl()))


def test_another_task_takes_it_over_with_its_adapter(saved, adapter):
    pipe = load(saved)
    pipe.load_nara_weights(adapter, adapter_name="subject")
    other = quiet(AutoPipelineForImage2Image.from_pipe(pipe))
    assert type(other) is StableDiffusionXLImg2ImgPipeline
    assert other.get_active_adapters() == ["subject"]


def test_an_editor_sees_the_methods_with_their_arguments_and_texts():
    for name in ["load_nara_weights", "save_nara_weights", "unload_nara_weights"]:
        method = vars(StableDiffusionXLPipeline)[name]
        assert inspect.signature(method) == inspect.signature(getattr(DiffusionPipeline, name))
        assert method.__doc__
