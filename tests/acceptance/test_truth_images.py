"""What a run on images says of its base, resolution and sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.acceptance import _commands

ASSETS = _commands.ROOT / "examples" / "assets"
PROMPT = "a photo of sks toy"
FEW: dict[str, Any] = {
    **{"max_train_steps": 1, "train_batch_size": 1, "num_inference_steps": 1, "num_validation_images": 1},
    **{"similarity_model": None, "alignment_model": None, "validation_steps": None, "checkpointing_steps": None},
    "curve_points": 1,
}


class Ran(NamedTuple):
    results: dict[str, Any]
    log: str
    card: str
    base: str
    size: tuple[int, int]  # (width, height) of a sample


def write_pictures(folder: Path, sizes: list[tuple[int, int]], seed: int) -> Path:
    """Of the `sizes` (width, height), soft, unequal."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    for number, size in enumerate(sizes):
        blocks = Image.fromarray(generator.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        blocks.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module", params=["sdxl", "flow"])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """One step on own images, by each of the two scripts; SDXL in buckets, on two wide and a tall one."""
    folder = tmp_path_factory.mktemp(request.param)
    script, base, sizes = "dreambooth", "sd-tiny-flow", [(64, 64)] * 2
    flags = FEW | {"instance_data_dir": folder / "images", "instance_prompt": PROMPT}
    if request.param == "sdxl":
        script, base, sizes = "dreambooth_sdxl", "sdxl-tiny", [(70, 120), (120, 66), (96, 54)]
        held_out = write_pictures(folder / "held_out", [(64, 64)] * 3, seed=1)
        flags |= {"validation_data_dir": held_out, "snr_gamma": 5, "aspect_ratio_buckets": "48,80;64,64;80,48"}
    write_pictures(folder / "images", sizes, seed=0)
    log = _commands.printed(f"{script}.py", **flags, output_dir=folder / "run")
    with Image.open(next((folder / "run" / "samples-after").glob("*.png"))) as sample:
        size = sample.size
    return Ran(_commands.results(folder / "run"), log, (folder / "run" / "README.md").read_text(), base, size)


@pytest.mark.slow
def test_results_and_card_name_base_and_resolution(ran: Ran) -> None:
    assert Path(ran.results["base_model"]).resolve() == ASSETS / ran.base
    assert ran.results["resolution"] == 64
    assert f"base: {ran.results['base_model']} at 64 pixels" in ran.log
    assert f"- base: {ran.results['base_model']} at 64 pixels" in ran.card
    (toy,) = [line for line in ran.log.splitlines() if "no model" in line]
    for part in ("64 pixels", ran.results["base_model"]):
        assert part in toy
    (line,) = [line for line in ran.log.splitlines() if "for SDXL" in line]
    model = "pretrained_model_name_or_path{}stabilityai/stable-diffusion-xl-base-1.0"
    assert "--config train_scripts/configs/sdxl_dreambooth.yaml" in line
    assert f"--{model.format(' ')}" in line
    assert model.format(": ") in (_commands.ROOT / "train_scripts/configs/sdxl_dreambooth.yaml").read_text()


@pytest.mark.slow
def test_samples_and_card_have_the_most_frequent_size(ran: Ran) -> None:
    sizes, width, height = "2 images at 64 x 64; samples at 64 x 64", 64, 64
    if ran.base == "sdxl-tiny":
        sizes, width, height = "2 images at 48 x 80, 1 image at 80 x 48; samples at 48 x 80", 80, 48
    assert f"sizes (height x width): {sizes}" in ran.log
    assert f"- sizes (height x width): {sizes}\n" in ran.card
    assert ran.size == (width, height)
    assert f"    height={height},\n    width={width},\n" in ran.card
