"""What is sampled: the prompts that are named, or the first captions, with the arguments that the call takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from nara_diffusion.dreambooth.evaluation.setup import sample_settings
from nara_diffusion.dreambooth.families.table import family_named
from nara_diffusion.dreambooth.setup import load_instances
from tests.train_scripts.dreambooth_runs import tiny_arguments, write_pictures

CAPTIONS = ["a red toy", "a red toy", "a blue toy", "a toy", "two toys", "a toy car"]


@pytest.mark.parametrize(("prompts", "expected"), [(None, CAPTIONS[1:5]), (["a toy"], ["a toy"])])
def test_samples_are_of_named_prompts_or_of_the_first_four_captions(tmp_path: Path, prompts, expected) -> None:
    pictures = write_pictures(tmp_path / "toy", len(CAPTIONS))
    for number, caption in enumerate(CAPTIONS):
        (pictures / f"{number}.txt").write_text(caption)
    texts = {"caption_source": "text_files", "instance_prompt": None, "validation_prompts": prompts}
    counts = {"num_validation_images": 2, "seed": 3, "sample_batch_size": 5}
    call = {"num_inference_steps": 7, "guidance_scale": 2.5}
    args = tiny_arguments(tmp_path / "model", pictures, tmp_path / "out", **texts, **counts, **call)
    family = family_named("WanPipeline").with_conditions(max_sequence_length=19)
    settings = sample_settings(args, load_instances(args, False), family)
    assert settings.prompts == expected
    assert settings.pairs == [(prompt, seed) for prompt in expected for seed in (3, 4)]
    assert settings.batch_size == 5
    assert settings.call == {"height": 16, "width": 16, **call, "max_sequence_length": 19}
