"""What a run on images says: its base and resolution, how SDXL is asked for, what the untrained base can do unaided."""

import logging
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from nara_diffusion.dreambooth.draws import draw_noise
from tests.acceptance import _commands

ROOT = Path(__file__).parents[2]
SDXL_TINY = ROOT / "examples" / "assets" / "sdxl-tiny"
PROMPT = "a photo of sks toy"
FEW = "--max_train_steps 1 --train_batch_size 1 --num_inference_steps 1 --num_validation_images 1 "
FEW += "--evaluation_options curve_points=3 "
FEW += "--similarity_model none --alignment_model none --validation_steps none --checkpointing_steps none"


class Ran(NamedTuple):
    results: dict[str, Any]
    log: str
    card: str


def write_pictures(folder: Path, count: int, seed: int) -> Path:
    """Of 64 × 64, soft, unequal."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    for number in range(count):
        blocks = Image.fromarray(generator.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        blocks.resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def run_script(script: str, folder: Path, *flags: str) -> Ran:
    """The command as a user types it, on two own images."""
    images = write_pictures(folder / "images", 2, seed=0)
    given = ["--instance_data_dir", str(images), "--instance_prompt", PROMPT, "--output_dir", str(folder / "run")]
    log, root = StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(log), root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        with redirect_stdout(log), redirect_stderr(log):
            _commands.run(f"{script}.py", *given, *FEW.split(), *flags)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    card = (folder / "run" / "README.md").read_text()
    return Ran(_commands.results(folder / "run"), log.getvalue(), card)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[Ran, Path]:
    """ε → v for one step, with three validation images; and these images."""
    folder = tmp_path_factory.mktemp("converted")
    held_out = write_pictures(folder / "held_out", 3, seed=1)
    flags = ["--prediction_type", "v_prediction", "--validation_data_dir", str(held_out), "--snr_gamma", "5"]
    return run_script("dreambooth_sdxl", folder, *flags), held_out


@pytest.fixture(scope="module")
def flow(tmp_path_factory) -> Ran:
    """The other script's own toy, without any conversion."""
    return run_script("dreambooth", tmp_path_factory.mktemp("flow"))


def test_results_facts_and_card_name_base_and_resolution(converted, flow) -> None:
    for (results, log, card), name in ((converted[0], "sdxl-tiny"), (flow, "sd-tiny-flow")):
        assert Path(results["base_model"]).resolve() == ROOT / "examples" / "assets" / name
        assert results["resolution"] == 64
        assert f"base: {results['base_model']} at 64 pixels" in log
        assert f"- base: {results['base_model']} at 64 pixels" in card


def test_own_images_without_a_model_are_told_how_sdxl_is_asked_for(converted, flow) -> None:
    for ran, script in ((converted[0], "dreambooth_sdxl"), (flow, "dreambooth")):
        (line,) = [line for line in ran.log.splitlines() if "no model" in line]
        assert "64 pixels" in line
        assert ran.results["base_model"] in line
        assert "for SDXL" in line
        assert "--config train_scripts/configs/sdxl_dreambooth.yaml" in line
        assert "--pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0" in line, script
    config = (ROOT / "train_scripts" / "configs" / "sdxl_dreambooth.yaml").read_text()
    assert "pretrained_model_name_or_path: stabilityai/stable-diffusion-xl-base-1.0" in config


@torch.no_grad()
def losses_by_hand(held_out: Path) -> tuple[float, float]:
    """Of v̂ = (ε̂ − √(1 − ᾱ) x_t) / √ᾱ, and of ε̂ taken for v, at the middles of three thirds of the timesteps."""
    pipe = StableDiffusionXLPipeline.from_pretrained(SDXL_TINY, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
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


def test_conversion_says_the_loss_of_the_base_read_by_the_identity(converted) -> None:
    ran, held_out = converted
    identity, start = losses_by_hand(held_out)
    assert identity < start / 2
    assert ran.results["identity_loss"] == pytest.approx(identity, rel=1e-3)
    assert ran.results["validation_loss_before"] == pytest.approx(start, rel=1e-3)
    line = f"the base, read by the identity (no training): held-out loss {identity:.3f}; "
    line += f"as it is, where a new adapter starts: {start:.3f}"
    assert line in ran.log
    assert ran.log.index(line) < ran.log.index("train:")
    assert f"held-out loss {identity:.3f}" in ran.card


def test_end_of_a_conversion_says_that_the_identity_is_better_than_what_was_reached(converted) -> None:
    ran, _ = converted
    reached = ran.results["validation_loss_after"]
    assert reached > ran.results["identity_loss"]
    line = (
        f"the base read by the identity, {ran.results['identity_loss']:.3f}, is better than what the training reached, "
    )
    assert f"{line}{reached:.3f}" in ran.log


def test_run_without_conversion_says_nothing_of_the_identity(flow) -> None:
    assert "identity" not in flow.log
    assert "identity_loss" not in flow.results
