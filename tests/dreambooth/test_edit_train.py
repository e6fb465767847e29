"""A run on pairs of images: its files and card, a run that continues, and what it refuses."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from nara_diffusion.dreambooth import flow_families, train
from nara_diffusion.dreambooth.dataset import DreamBoothDataset
from nara_diffusion.dreambooth.pipelines import family_of
from nara_diffusion.dreambooth.source_images import records_from_folder
from nara_diffusion.dreambooth.subject import load_subject, place_models
from nara_diffusion.training.run import start_run
from tests.acceptance._commands import ROOT, results, run, tensors
from tests.acceptance._runs import ASSETS, image_arguments, image_flags
from tests.dreambooth.pictures import folder_of, noise
from tests.helpers.pipelines.edits import small_kontext, small_qwen_edit
from tests.helpers.plans import counted_run

PROMPT = "make it red"


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """FLUX.1 Kontext on three pairs of 20 × 24 pixels, with one held out."""
    folder = tmp_path_factory.mktemp("kontext")
    changes = {
        "source_data_dir": folder_of(folder / "sources", [(20, 24)]),
        "validation_data_dir": folder_of(folder / "held", [(20, 24)]),
        "validation_source_dir": folder_of(folder / "held sources", [(40, 48)]),
        "instance_prompt": PROMPT,
        "max_sequence_length": 12,
        "max_train_steps": 2,
        "validation_steps": 2,
        "lr_scheduler": "constant",  # so that a longer schedule changes nothing
        "num_validation_images": 2,
        "similarity_model": ASSETS / "clip-tiny",
    }
    for number, name in enumerate(("0", "1", "2")):
        noise(20, 24, seed=7 + number).save(folder / "sources" / f"{name}.png")
    (folder / "sources" / "00.png").unlink()
    return image_flags(folder, small_kontext()) | changes


@pytest.fixture(scope="module")
def sheets() -> list[dict[str, int]]:
    """The columns of the sheets that the run of `ended` writes, with their numbers of images."""
    return []


@pytest.fixture(scope="module")
def ended(flags: dict[str, Any], sheets: list[dict[str, int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ended") / "out"

    def keep(path: Path, prompts: Any, columns: Any, references: Any = ()) -> None:
        sheets.append({title: len(images) for title, images in columns.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nara_diffusion.dreambooth.fidelity.write_grid", keep)
        run("dreambooth.py", **flags, output_dir=folder)
    return folder


def test_run_measures_and_shows_held_out_pair(flags: dict[str, Any], ended: Path) -> None:
    figures = results(ended)
    assert {"similarity_before", "similarity_after", "validation_loss_before"} <= figures.keys()
    assert "text_alignment_before" not in figures
    assert len(list((ended / "samples-after").glob("*.png"))) == 2
    card = (ended / "README.md").read_text()
    assert "on 3 images of “make it red”, each made from its source." in card
    assert "- validation loss: on 1 pair held out\n" in card
    assert "image-to-image" in card
    assert 'image=load_image("source.png"),\n    prompt=' in card
    assert "from diffusers.utils import load_image" in card
    assert "max_area=256,\n    _auto_resize=False" in card
    held_out = records_from_folder(
        flags["validation_data_dir"],
        source_folder=flags["validation_source_dir"],
        most=1,
        prompt=PROMPT,
        progress=False,
    )
    (sample,) = DreamBoothDataset(held_out, [(16, 16)], batch_size=1, seed=0).plain_samples()
    pipe: Any = small_kontext()
    call = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 3.5, "max_sequence_length": 12}
    (source,) = sample.source_images()
    options = family_of(pipe).sampling(call, 1)
    generator = torch.Generator().manual_seed(1)
    (image,) = pipe(image=source, prompt=PROMPT, generator=generator, **options).images
    before = np.asarray(Image.open(ended / "samples-before" / "00-seed-1.png"))
    np.testing.assert_array_equal(before, np.asarray(image))


@pytest.mark.usefixtures("ended")
def test_sheet_has_source_samples_and_target(sheets: list[dict[str, int]]) -> None:
    assert sheets == [
        {"source": 1, "step 0": 1, "target": 1},
        {"source": 1, "step 0": 1, "step 2": 1, "target": 1},
        {"source": 1, "before": 2, "after": 2, "target": 1},
    ]


@pytest.mark.slow
def test_run_on_pairs_continues_with_same_bits(flags: dict[str, Any], ended: Path, tmp_path: Path) -> None:
    shutil.copytree(ended, tmp_path / "longer")
    constant = flags | {"max_train_steps": 3, "validation_steps": None}
    run("dreambooth.py", **constant, output_dir=tmp_path / "longer", resume_from_checkpoint="latest")
    run("dreambooth.py", **constant, output_dir=tmp_path / "whole")
    torch.testing.assert_close(tensors(tmp_path / "longer"), tensors(tmp_path / "whole"), rtol=0, atol=0)


@pytest.mark.slow
def test_shipped_edit_model_learns_to_remove_things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a third of its steps, from twelve pairs of an edit that it wasn't trained on."""
    monkeypatch.chdir(ROOT)
    config = "train_scripts/configs/kontext_tiny.yaml"
    changes = {"max_train_steps": 100, "validation_steps": None, "num_validation_images": 1}
    run("dreambooth.py", config=config, output_dir=tmp_path / "out", **changes)
    figures = results(tmp_path / "out")
    assert figures["similarity_after"] > figures["similarity_before"] + 0.2


@pytest.mark.slow
def test_plan_counts_the_tokens_of_sources(
    flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 5 % of a run, in which they double the activations."""
    changes = {"resolution": 32, "max_train_steps": 1, "validation_steps": None, "checkpointing_steps": None}
    args = image_arguments({**flags, **changes}, tmp_path / "out", similarity_model=None)
    peak, states = counted_run(train, args, monkeypatch)
    figures = train.main(replace(args, plan=math.inf, source_data_dir=None))
    counted = figures["weights"] + figures["adapter"] + states + peak
    assert figures["peak"] == pytest.approx(counted, rel=0.05)


def test_mirrored_pairs_are_encoded_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen's text encoder reads the sources, and then leaves the device."""
    monkeypatch.setattr(flow_families, "AREA", 64**2)
    flags = image_flags(tmp_path, small_qwen_edit()) | {"random_flip": True, "caption_dropout": 0.5}
    shutil.copytree(flags["instance_data_dir"], tmp_path / "sources")
    args = image_arguments(flags, tmp_path / "out", source_data_dir=tmp_path / "sources")
    AcceleratorState._reset_state(True)
    with start_run(args, "run", train.write_checkpoint) as run:
        subject = load_subject(args, run)
        place_models(subject, subject.pipe)
        prompts = subject.step.prompts
        assert prompts is not None

        def fail(*_: object) -> Any:
            pytest.fail("it is encoded in training")

        prompts.family = replace(prompts.family, encoder=fail, source_encoder=fail)
        flips = set()
        for position in range(24):
            samples = subject.dataset.samples_at(position)
            flips |= {(sample.flip, sample.prompt) for sample in samples}
            prompts.get([sample.prompt for sample in samples], samples)
    assert len(flips) == 4


def test_pairs_that_do_not_fit_are_refused(flags: dict[str, Any], tmp_path: Path) -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(SystemExit, match=message) as error:
            run("dreambooth.py", **{**flags, **changes}, output_dir=tmp_path / "out")
        assert "\n" not in str(error.value)

    refused("FLUX.1 Kontext edits images, and those in .* have no sources: give --source", source_data_dir=None)
    refused("leave --validation_prompts and --class_prompt out", validation_prompts=["a"])
    refused("compared with their targets, not with prompts: leave --alignment_model", alignment_model=ASSETS)
    refused("validation_source_dir has sources for validation_data_dir, which is missing", validation_data_dir=None)
    tiny = str(ASSETS / "sd-tiny-flow")
    refused("--source_data_dir is .*, but .* doesn't edit images", pretrained_model_name_or_path=tiny)
