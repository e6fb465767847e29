"""Runs of dreambooth_sdxl.py and dreambooth.py: what they write, and that the card's code gives the run's pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open

from nara_diffusion import core_matrix
from tests.acceptance._commands import by_the_card, metrics, names, results, run, tensors
from tests.acceptance._runs import ASSETS, IMAGES, image_flags
from tests.helpers.pipelines.families import FAMILY_PIPELINES
from tests.helpers.small_pipelines import small_sd3, small_sdxl

pytestmark = pytest.mark.filterwarnings("ignore:.*torch_dtype.*")
SHORT: dict[str, Any] = {"max_train_steps": 2, "checkpointing_steps": None, "curve_points": 1}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return image_flags(tmp_path_factory.mktemp("sdxl"), small_sdxl())


@pytest.fixture(scope="module")
def finished(sdxl: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on SDXL that was measured with encoders, and sampled after the third step, too."""
    folder = tmp_path_factory.mktemp("run") / "out"
    encoders = {"similarity_model": ASSETS / "clip-tiny", "alignment_model": ASSETS / "clip-tiny"}
    run("dreambooth_sdxl.py", **{**sdxl, **encoders, "validation_steps": 0.5}, output_dir=folder)
    return folder


def settings(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "config.yaml").read_text())


def drawn(pipe: Any, folder: Path) -> np.ndarray:
    """The image that the run's report has first."""
    pipe.set_progress_bar_config(disable=True)
    args = settings(folder)
    call = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": args["guidance_scale"]}
    call |= {name: args[name] for name in ("max_sequence_length",) if args[name] is not None}
    generator = torch.Generator().manual_seed(args["seed"])
    return np.asarray(pipe(args["instance_prompt"], generator=[generator], **call).images[0])


def written(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def check_pixels(folder: Path, base: Any) -> Any:
    """The written samples are the base's, and those of the pipeline that the card's code loads."""
    (first,), (last,) = written(folder / "samples-before"), written(folder / "samples-after")
    np.testing.assert_array_equal(drawn(base, folder), first)
    pipe = by_the_card(folder, until="image = ")["pipe"]
    np.testing.assert_array_equal(drawn(pipe, folder), last)
    assert (first != last).any()
    return pipe


def test_run_writes_its_files(finished: Path) -> None:
    promised = {IMAGES, "README.md", "config.yaml", "results.json", "metrics.jsonl", "samples.png"}
    promised |= {"noise_level_curve.png", "samples-before", "samples-after", "samples-by-step.png"}
    assert promised <= names(finished)
    assert {name for name in names(finished) if name.startswith("checkpoint")} == {"checkpoint-4", "checkpoint-6"}
    assert not [name for name in names(finished) if name.startswith(".")]
    figures = results(finished)
    measured = [f"{metric}_{when}" for metric in ("similarity", "text_alignment") for when in ("before", "after")]
    assert all(-1 < figures[name] < 1 for name in measured)
    assert {"seconds", "validation_loss_before", "validation_loss_after", "noise_levels"} <= figures.keys()
    assert (figures["n"], figures["adapter"], figures["resolution"]) == (1, "nara", 16)
    base = settings(finished)["pretrained_model_name_or_path"]
    assert Path(figures["base_model"]).name == Path(base).name
    card = (finished / "README.md").read_text()
    assert f"- base: {Path(base).name} at 16 pixels\n" in card
    assert "- sizes (height x width): 3 images at 16 x 16; samples at 16 x 16\n" in card
    lines = metrics(finished)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "validation_loss" in line] == [3, 6]


def test_card_code_loads_adapter_and_draws_same_pixels(finished: Path, sdxl: dict[str, Any]) -> None:
    base = StableDiffusionXLPipeline.from_pretrained(sdxl["pretrained_model_name_or_path"])
    pipe = check_pixels(finished, base)
    C = core_matrix(pipe.unet, torch.tensor([0.1, 0.9]), adapter_name=pipe.get_active_adapters()[0])
    assert C.shape == (2, 3, 3)
    assert (C[0] - C[1]).abs().max() > 1e-6
    pipe.unload_nara_weights()
    np.testing.assert_array_equal(drawn(pipe, finished), written(finished / "samples-before")[0])


def test_card_names_what_was_trained(finished: Path, sdxl: dict[str, Any]) -> None:
    card = yaml.safe_load((finished / "README.md").read_text().split("---")[1])
    assert card["library_name"] == "diffusers"
    assert card["instance_prompt"] == "a photo of a toy"
    assert str(sdxl["pretrained_model_name_or_path"]) in (finished / "README.md").read_text()
    saved = tensors(finished)
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert all(value.abs().max() > 0 for name, value in saved.items() if "lora_B" in name)
    with safe_open(finished / IMAGES, "pt") as file:
        config = json.loads(file.metadata()["nara_adapter_metadata"])["components"]["unet"]
    assert (config["r"], config["lora_alpha"], config["noise_convention"]) == (3, 5.0, "timestep")


@pytest.mark.slow
def test_dreambooth_run_uses_the_models_family(tmp_path: Path) -> None:
    flags, out = image_flags(tmp_path, small_sd3()), tmp_path / "out"
    run("dreambooth.py", **{**flags, **SHORT, "max_sequence_length": 5}, output_dir=out)
    saved = settings(out)
    assert (saved["target_modules"][0], saved["guidance_scale"]) == ("attn.to_q", 7.0)
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = check_pixels(out, StableDiffusion3Pipeline.from_pretrained(tmp_path / "model", **absent))
    assert type(pipe) is StableDiffusion3Pipeline
    assert pipe.transformer.peft_config[pipe.get_active_adapters()[0]].noise_convention == "flow"


LENGTHS = {"flux": 12, "flux2": 64, "z_image": 64, "qwen_image": 300, "wan": 20}
SIDES = {"qwen_image": 32, "wan": 32}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(guidance|max_sequence_length).*")
@pytest.mark.parametrize("name", ["sd", *LENGTHS])
def test_other_family_runs_resume_and_load_by_card(name: str, tmp_path: Path) -> None:
    lengths = {"max_sequence_length": LENGTHS[name]} if name in LENGTHS else {}
    flags = image_flags(tmp_path, FAMILY_PIPELINES[name]()) | {"max_train_steps": 3} | lengths
    flags["resolution"] = SIDES.get(name, 16)
    run("dreambooth.py", **flags, output_dir=tmp_path / "out")
    again = {"output_dir": tmp_path / "again", "resume_from_checkpoint": tmp_path / "out" / "checkpoint-2"}
    run("dreambooth.py", **flags, **again)
    one, other = tensors(tmp_path / "out"), tensors(tmp_path / "again")
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    (first,), (last,) = (written(tmp_path / "out" / f"samples-{when}") for when in ("before", "after"))
    assert (first != last).any()
    image = by_the_card(tmp_path / "out", until="image.save")["image"]
    assert isinstance(image, Image.Image)
    np.testing.assert_array_equal(np.asarray(image), last)


PLAIN: dict[str, Any] = {"core_learning_rate": None, "adapter_options": {}}
PATTERNS: dict[str, Any] = {"rank_pattern": {"(to_v|v_proj)": 2}, "alpha_pattern": {"(to_k|k_proj)": 7.0}}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": PLAIN | {"adapter_options": PATTERNS},
    "dora": PLAIN | {"adapter_options": PATTERNS},
    "hira": PLAIN,
    "nara_dora": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_other_adapter_runs_load_by_card(sdxl: dict[str, Any], tmp_path: Path, adapter: str) -> None:
    out = tmp_path / "out"
    flags = {**sdxl, **SHORT, **ADAPTERS[adapter], "adapter": adapter, "train_text_encoder": True}
    run("dreambooth_sdxl.py", **flags, output_dir=out)
    assert results(out)["adapter"] == adapter
    base = StableDiffusionXLPipeline.from_pretrained(sdxl["pretrained_model_name_or_path"])
    check_pixels(out, base)
    if adapter == "lora":
        base.load_lora_weights(out)  # a file that every host of Diffusers reads
        np.testing.assert_array_equal(drawn(base, out), written(out / "samples-after")[0])
