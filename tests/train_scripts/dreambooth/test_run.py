"""train_scripts/dreambooth_sdxl.py: what a run writes, and that it means what it says."""

import io
import json
import re
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.tracking import GeneralTracker, on_main_process
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from nara_diffusion import core_matrix
from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from nara_diffusion.dreambooth.evaluation.fidelity import Encoder, image_similarity, text_alignment
from nara_diffusion.dreambooth.evaluation.samples import sample_batch
from nara_diffusion.training.run import Run
from tests.dreambooth.evaluation.small_encoders import save_clip, save_dino
from tests.train_scripts.dreambooth_runs import WEIGHTS, fresh_accelerate, loaded_pipeline, tiny_arguments
from train_scripts.dreambooth_sdxl import main


@pytest.fixture
def arguments(sdxl_folder: Path, pictures: Path, tmp_path: Path) -> Callable[..., DreamBoothArguments]:
    """Arguments of a run of a few seconds; keyword arguments change them."""
    return lambda **changes: tiny_arguments(
        sdxl_folder, pictures, Path(changes.pop("output_dir", tmp_path / "run")), **changes
    )


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("encoders")
    return {
        "similarity_model": str(save_dino(folder / "dino")),
        "alignment_model": str(save_clip(folder / "clip")),
    }


@pytest.fixture(scope="module")
def finished(sdxl_folder, pictures, encoders, tmp_path_factory) -> SimpleNamespace:
    output = tmp_path_factory.mktemp("finished") / "run"
    args = tiny_arguments(sdxl_folder, pictures, output, validation_steps=2, identifier=["red"], **encoders)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        results = main(args)
    fresh_accelerate()
    return SimpleNamespace(args=args, folder=output, results=results, out=out.getvalue(), err=err.getvalue())


def sampled(pipe: Any, args: DreamBoothArguments) -> list[np.ndarray]:
    """The prompts and seeds of the run, by the pipeline's own call."""
    images = []
    for prompt in args.prompts:
        generators = [torch.Generator().manual_seed(args.seed + j) for j in range(args.num_validation_images)]
        call = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 5.0}
        images += pipe([prompt] * len(generators), generator=generators, **call).images
    return [np.asarray(image) for image in images]


def written(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def test_a_run_leaves_all_that_it_promises(finished) -> None:
    assert sorted(entry.name for entry in finished.folder.iterdir()) == [
        "README.md",
        "config.yaml",
        "metrics.jsonl",
        "noise_level_curve.png",
        WEIGHTS,
        "results.json",
        "samples-after",
        "samples-before",
        "samples.png",
        "validation",
    ]
    results = json.loads((finished.folder / "results.json").read_text())
    assert results == finished.results
    assert (results["n"], len(results["curve_before"]), len(results["curve_after"])) == (4, 3, 3)
    assert results["noise_levels"] == pytest.approx([0.166, 0.5, 0.833])
    assert results["validation_loss_after"] < results["validation_loss_before"]
    assert {type(results[f"similarity_{when}"]) for when in ("before", "after")} == {float}
    saved = yaml.safe_load((finished.folder / "config.yaml").read_text())
    assert DreamBoothArguments(**saved) == finished.args
    assert sorted(path.name for path in (finished.folder / "validation").iterdir()) == ["step-2.png", "step-4.png"]
    assert re.search(r"similarity to the subject +-?\d\.\d+ +-?\d\.\d+\n", finished.out)
    assert all(f"{name}=" in finished.err for name in ("loss", "low λ", "high λ", "lr", "core lr"))


def test_the_figures_are_those_of_the_written_samples(finished, pictures, encoders) -> None:
    references = sorted(pictures.glob("*.png"))
    for when in ("before", "after"):
        folder = finished.folder / f"samples-{when}"
        files = sorted(folder.glob("*.png"))
        lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        assert [line["file_name"] for line in lines] == [file.name for file in files]
        assert [line["text"] for line in lines] == ["a photo of a toy"] * 2 + ["a red toy, on grass"] * 2
        similarity = image_similarity(Encoder(encoders["similarity_model"]), files, references)
        assert finished.results[f"similarity_{when}"] == pytest.approx(similarity, abs=1e-5)
        prompts = ["a photo of a toy"] * 2 + ["a toy, on grass"] * 2
        alignment = text_alignment(Encoder(encoders["alignment_model"]), files, prompts)
        assert finished.results[f"text_alignment_{when}"] == pytest.approx(alignment, abs=1e-5)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_samples_are_what_a_user_gets_bit_for_bit(arguments, precision: str) -> None:
    args = arguments(mixed_precision=precision, sample_batch_size=2, train_text_encoder=True, text_encoder_lr=5e-3)
    main(args)
    pipe = loaded_pipeline(args, torch.bfloat16 if precision == "bf16" else torch.float32)
    before, after = (written(Path(args.output_dir) / f"samples-{when}") for when in ("before", "after"))
    for mine, theirs in zip(sampled(pipe, args), after, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    pipe.unload_nara_weights()
    for mine, theirs in zip(sampled(pipe, args), before, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert any((old != new).any() for old, new in zip(before, after, strict=True))


def test_validation_during_training_samples_the_adapter_of_that_step(arguments, monkeypatch) -> None:
    """The sheet of step 2 shows the pixels that checkpoint-2 gives in a fresh pipeline."""
    sheets: list[tuple[str, list[Any]]] = []
    monkeypatch.setattr(
        "nara_diffusion.dreambooth.evaluation.comparison.write_grid",
        lambda path, prompts, columns, references: sheets.extend((path.name, images) for images in columns.values()),
    )
    args = arguments(validation_steps=2, checkpointing_steps=2, sample_batch_size=2)
    main(args)
    assert [name for name, _ in sheets] == ["step-2.png", "step-4.png"]
    for step, (_, images) in zip((2, 4), sheets, strict=True):
        pipe = StableDiffusionXLPipeline.from_pretrained(args.pretrained_model_name_or_path)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_nara_weights(Path(args.output_dir) / f"checkpoint-{step}")
        for mine, theirs in zip(sampled(pipe, args), images, strict=True):
            np.testing.assert_array_equal(mine, np.asarray(theirs))


def test_the_saved_adapter_is_trained_and_knows_its_noise_level(finished) -> None:
    weights = load_file(finished.folder / WEIGHTS)
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert all(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)
    pipe = loaded_pipeline(finished.args)
    config = pipe.unet.peft_config["default_0"]
    assert (config.noise_convention, config.r, config.lora_alpha) == ("timestep", 3, 5.0)
    C = core_matrix(pipe.unet, torch.tensor([0.1, 0.9]), adapter_name="default_0")
    assert (C[0] - C[1]).abs().max() > 1e-6


def test_the_cards_code_loads_the_adapter_and_samples(finished, tmp_path, monkeypatch) -> None:
    card = (finished.folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "diffusers"
    assert front["instance_prompt"] == "a photo of a toy"
    assert "](samples.png)" in card
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
    args = finished.args
    pipe = loaded_pipeline(args)
    call = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 5.0}
    expected = sample_batch(pipe, [(args.prompts[0], args.seed)], call)[0]
    np.testing.assert_array_equal(np.asarray(Image.open("sample.png")), np.asarray(expected))


def test_trackers_get_the_samples(arguments, monkeypatch) -> None:
    class Gallery(GeneralTracker):
        name = "gallery"
        requires_logging_directory = False
        shown: list[tuple[str, tuple, int]] = []  # noqa: RUF012

        @property
        def tracker(self) -> None: ...

        @on_main_process
        def store_init_configuration(self, values: dict) -> None: ...

        @on_main_process
        def log(self, values: dict, step: int | None = None) -> None: ...

        @on_main_process
        def log_images(self, values: dict, step: int, **options: Any) -> None:
            self.shown.extend((name, array.shape, step) for name, array in values.items())

    opened = Run.open

    def open_with_gallery(run: Run, facts: Any = None) -> None:
        opened(run, facts)
        run.accelerator.trackers.append(Gallery(_blank=True))

    monkeypatch.setattr(Run, "open", open_with_gallery)
    main(arguments(validation_steps=4))
    assert Gallery.shown == [
        ("validation: a photo of a toy", (2, 16, 16, 3), 4),
        ("validation: a red toy, on grass", (2, 16, 16, 3), 4),
    ]


def test_a_push_holds_the_card_and_its_picture(arguments, uploads, capsys) -> None:
    args = arguments(push_to_hub=True, hub_model_id="mine", max_train_steps=1, num_validation_images=1)
    main(args)
    assert {"README.md", WEIGHTS, "results.json", "samples.png"} < uploads[0]
    assert "pushed to https://huggingface.co/me/mine" in capsys.readouterr().out
    assert "load_nara_weights('me/mine')" in (Path(args.output_dir) / "README.md").read_text()
