"""What a run on images says of its base and resolution."""

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
    "curve_points": 3,
}


class Ran(NamedTuple):
    results: dict[str, Any]
    log: str
    card: str
    base: str


def write_pictures(folder: Path, count: int, seed: int) -> Path:
    """Of 64 × 64, soft, unequal."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    for number in range(count):
        blocks = Image.fromarray(generator.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        blocks.resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module", params=["sdxl", "flow"])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """One step on two own images, by each of the two scripts."""
    folder = tmp_path_factory.mktemp(request.param)
    script, base = "dreambooth", "sd-tiny-flow"
    flags = FEW | {"instance_data_dir": write_pictures(folder / "images", 2, seed=0), "instance_prompt": PROMPT}
    if request.param == "sdxl":
        script, base = "dreambooth_sdxl", "sdxl-tiny"
        flags |= {"validation_data_dir": write_pictures(folder / "held_out", 3, seed=1), "snr_gamma": 5}
    log = _commands.printed(f"{script}.py", **flags, output_dir=folder / "run")
    return Ran(_commands.results(folder / "run"), log, (folder / "run" / "README.md").read_text(), base)


def test_results_facts_and_card_name_base_and_resolution_and_how_sdxl_is_asked_for(ran: Ran) -> None:
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
