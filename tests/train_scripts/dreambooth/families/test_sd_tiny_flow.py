"""The shipped configuration of train_scripts/dreambooth.py for sd-tiny-flow: it trains, and loads as its card says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from nara_diffusion.training.arguments.cli import parse_arguments
from tests.train_scripts.dreambooth_runs import by_the_card
from train_scripts.dreambooth import main

ROOT = Path(__file__).parents[4]
CONFIG = "train_scripts/configs/sd_tiny_flow.yaml"


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*")
def test_the_configuration_trains_the_shipped_flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    args = parse_arguments(DreamBoothArguments, ["--config", CONFIG, "--output_dir", str(tmp_path / "run")])
    assert (args.resolution, args.max_sequence_length, args.weighting_scheme) == (64, 0, "logit_normal")
    short = {"max_train_steps": 2, "validation_steps": None, "checkpointing_steps": None}
    less = {"num_inference_steps": 1, "num_validation_images": 1, "curve_points": 2, "rank": 2}
    results = main(replace(args, **short, **less))
    assert results["n"] == len(args.validation_prompts) == 4
    assert 0 < results["validation_loss_before"] < 1

    pipe = by_the_card(tmp_path / "run")
    assert type(pipe) is StableDiffusion3Pipeline
    adapted = [name for name, _ in pipe.transformer.named_modules() if name.endswith(".base_layer")]
    assert len(adapted) == 3 * 12 + 9, "the last block has no layers of the prompt beyond q, k and v"
    call = {"num_inference_steps": 1, "max_sequence_length": 0, "output_type": "pt"}
    image = pipe("a photo of sks toy", generator=torch.Generator().manual_seed(0), **call).images
    assert image.shape == (1, 3, 64, 64)
    assert image.isfinite().all()
