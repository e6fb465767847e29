"""What a run works with: said once, before it starts, if a prompt is longer than the text encoders read."""

from __future__ import annotations

from pathlib import Path

import pytest

from nara_diffusion.dreambooth.data.image_records import class_records
from nara_diffusion.dreambooth.setup import load_instances, prompt_cache, training_data
from tests.helpers.small_pipelines import small_sdxl
from tests.train_scripts.dreambooth_runs import tiny_arguments, write_pictures

SAID = "has 22 tokens; the text encoders read 12"


@pytest.mark.parametrize("trained", [True, False])
def test_a_prompt_that_is_cut_is_told_once_whether_text_encoders_are_trained(tmp_path: Path, caplog, trained) -> None:
    long = " ".join(["toy"] * 20)
    pictures, classes = write_pictures(tmp_path / "toy", 3), write_pictures(tmp_path / "class", 2, seed=1)
    args = tiny_arguments(
        tmp_path / "model",
        pictures,
        tmp_path / "out",
        instance_prompt=long,
        with_prior_preservation=True,
        class_data_dir=str(classes),
        class_prompt=f"a {long}",
        num_class_images=2,
        train_text_encoder=trained,
    )
    pipe = small_sdxl()
    dataset = training_data(
        args, load_instances(args, False), class_records(classes, prompt=str(args.class_prompt)), pipe
    )
    cache = prompt_cache(args, pipe)
    assert (cache is None) is trained
    for position in range(4):
        prompts = [sample.prompt for sample in dataset.samples_at(position)]
        if cache is not None:
            cache.get(prompts)
    assert caplog.text.count(f"'{long}' {SAID}") == caplog.text.count(f"'a {long}' {SAID[:4]}") == 1
    assert caplog.text.count("tokens; the text encoders read") == 2
