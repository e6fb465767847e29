"""What a run on images says of its base, resolution and identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from nara_diffusion.dreambooth.draws import draw_noise
from tests.acceptance import _commands

ASSETS = _commands.ROOT / "examples" / "assets"
PROMPT = "a photo of sks toy"
FEW: dict[str, Any] = {
    **{"max_train_steps": 1, "train_batch_size": 1, "num_inference_steps": 1, "num_validation_images": 1},
    **{"similarity_model": None, "alignment_model": None, "validation_steps": None, "checkpointing_steps": None},
    "evaluation_options": {"curve_points": 3},
}


class Ran(NamedTuple):
    results: dict[str, Any]
    log: str
    card: str
    held_out: Path


def write_pictures(folder: Path, count: int, seed: int) -> Path:
    """Of 64 × 64, soft, unequal."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    for number in range(count):
        blocks = Image.fromarray(generator.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        blocks.resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module", params=["converted", "flow"])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """On two own images: ε → v for one step, with three validation images; or the other script's own toy."""
    folder = tmp_path_factory.mktemp(request.param)
    script, held_out = "dreambooth", write_pictures(folder / "held_out", 3, seed=1)
    flags = FEW | {"instance_data_dir": write_pictures(folder / "images", 2, seed=0), "instance_prompt": PROMPT}
    if request.param == "converted":
        script = "dreambooth_sdxl"
        flags |= {"prediction_type": "v_prediction", "validation_data_dir": held_out, "snr_gamma": 5}
    log = _commands.printed(f"{script}.py", **flags, output_dir=folder / "run")
    return Ran(_commands.results(folder / "run"), log, (folder / "run" / "README.md").read_text(), held_out)


def test_results_facts_and_card_name_base_and_resolution_and_how_sdxl_is_asked_for(ran: Ran) -> None:
    name = "sdxl-tiny" if "identity_loss" in ran.results else "sd-tiny-flow"
    assert Path(ran.results["base_model"]).resolve() == ASSETS / name
    assert ran.results["resolution"] == 64
    assert f"base: {ran.results['base_model']} at 64 pixels" in ran.log
    assert f"- base: {ran.results['base_model']} at 64 pixels" in ran.card
    (line,) = [line for line in ran.log.splitlines() if "no model" in line]
    for part in ("64 pixels", ran.results["base_model"], "for SDXL"):
        assert part in line
    model = "pretrained_model_name_or_path{}stabilityai/stable-diffusion-xl-base-1.0"
    assert "--config train_scripts/configs/sdxl_dreambooth.yaml" in line
    assert f"--{model.format(' ')}" in line
    assert model.format(": ") in (_commands.ROOT / "train_scripts/configs/sdxl_dreambooth.yaml").read_text()


@torch.no_grad()
def losses_by_hand(held_out: Path) -> tuple[float, float]:
    """Of v̂ = (ε̂ − √(1 − ᾱ) x_t) / √ᾱ, and of ε̂ taken for v, at the middles of three thirds of the timesteps."""
    pipe = StableDiffusionXLPipeline.from_pretrained(ASSETS / "sdxl-tiny", dtype=torch.float32)
    encoded = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    states, pooled = encoded[0], encoded[2]
    config = pipe.scheduler.config
    assert config.beta_schedule == "scaled_linear"
    roots = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000, dtype=torch.float64)
    alphas = (1 - roots**2).cumprod(0)
    read, as_it_is = [], []
    for timestep in (166, 500, 833):
        for position, path in enumerate(sorted(held_out.glob("*.png"))):
            pixels = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)[None] / 127.5 - 1
            clean = pipe.vae.encode(pixels).latent_dist.mode().double() * pipe.vae.config.scaling_factor
            noise = draw_noise([position], clean.shape[1:], seed=0, role="validation").double()
            signal, sigma = alphas[timestep].sqrt(), (1 - alphas[timestep]).sqrt()
            seen, target = signal * clean + sigma * noise, signal * noise - sigma * clean
            conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
            said = pipe.unet(seen.float(), timestep, states, added_cond_kwargs=conditions).sample.double()
            read.append(((said - sigma * seen) / signal - target).square().mean().item())
            as_it_is.append((said - target).square().mean().item())
    return float(np.mean(read)), float(np.mean(as_it_is))


def test_conversion_says_the_loss_of_the_base_read_by_the_identity_before_and_after(ran: Ran) -> None:
    if "identity_loss" not in ran.results:
        assert "identity" not in ran.log  # it converts nothing
        return
    identity, start = losses_by_hand(ran.held_out)
    assert identity < start / 2
    assert ran.results["identity_loss"] == pytest.approx(identity, rel=1e-3)
    assert ran.results["validation_loss_before"] == pytest.approx(start, rel=1e-3)
    line = f"the base, read by the identity (no training): held-out loss {identity:.3f}; "
    line += f"as it is, where a new adapter starts: {start:.3f}"
    assert line in ran.log
    assert ran.log.index(line) < ran.log.index("train:")
    assert f"held-out loss {identity:.3f}" in ran.card
    reached = ran.results["validation_loss_after"]
    assert reached > ran.results["identity_loss"]
    better = f"the base read by the identity, {ran.results['identity_loss']:.3f}, is better than what the training "
    assert f"{better}reached, {reached:.3f}" in ran.log
