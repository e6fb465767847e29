"""train_scripts/dreambooth_sdxl.py: what a run writes, and that it means what it says."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker, on_main_process
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from nara_diffusion import core_matrix
from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from nara_diffusion.dreambooth.metrics import ImageSimilarity, TextAlignment
from nara_diffusion.dreambooth.sampling import sample_batch
from nara_diffusion.loaders.source import read_file
from nara_diffusion.training.cli import parse_arguments
from nara_diffusion.training.run import Run
from tests.dreambooth.small_encoders import save_clip, save_dino
from train_scripts.dreambooth_sdxl import main

from .dreambooth_runs import WEIGHTS, fresh_accelerate, tiny_arguments, write_pictures

ROOT = Path(__file__).parents[2]


@pytest.fixture
def arguments(sdxl_folder: Path, pictures: Path, tmp_path: Path) -> Callable[..., DreamBoothArguments]:
    """Arguments of a run of a few seconds; keyword arguments change them."""
    return lambda **changes: tiny_arguments(
        sdxl_folder, pictures, Path(changes.pop("output_dir", tmp_path / "run")), **changes
    )


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


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


def assert_same_adapter(one: Path, other: Path) -> None:
    """Bit for bit; safetensors writes the entries of its metadata in any order."""
    mine, theirs = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert read_file(one / WEIGHTS)[1] == read_file(other / WEIGHTS)[1]


SHORT: dict[str, Any] = {"num_validation_images": 1, "max_train_steps": 3}


@pytest.fixture(scope="module")
def plain(sdxl_folder, pictures, tmp_path_factory) -> SimpleNamespace:
    """A short run, for others to be compared with."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    results = main(tiny_arguments(sdxl_folder, pictures, folder, **SHORT))
    fresh_accelerate()
    return SimpleNamespace(folder=folder, results=results)


def loaded_pipeline(args: DreamBoothArguments, dtype: torch.dtype = torch.float32) -> Any:
    """What a user does."""
    pipe = StableDiffusionXLPipeline.from_pretrained(args.pretrained_model_name_or_path, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_nara_weights(args.output_dir)
    return pipe


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
        similarity = ImageSimilarity(encoders["similarity_model"]).similarity(files, references)
        assert finished.results[f"similarity_{when}"] == pytest.approx(similarity, abs=1e-5)
        prompts = ["a photo of a toy"] * 2 + ["a toy, on grass"] * 2
        alignment = TextAlignment(encoders["alignment_model"]).alignment(files, prompts)
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
        "nara_diffusion.dreambooth.validation.write_grid",
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


@pytest.mark.parametrize(
    "common",
    [
        {"lora_dropout": 0.1, "dataloader_num_workers": 2, "cache_latents": False},
        {"gradient_accumulation_steps": 2, "train_text_encoder": True, "lora_dropout": 0.1, "validation_steps": 3},
    ],
    ids=["workers", "text-encoders"],
)
def test_a_resumed_run_ends_with_the_same_bits(arguments, tmp_path, common: dict) -> None:
    prior = {
        "with_prior_preservation": True,
        "class_data_dir": str(write_pictures(tmp_path / "class", 5, (16, 16), seed=8)),
        "class_prompt": "a toy",
        "num_class_images": 5,
    }
    common = {**common, **prior, "snr_gamma": 5.0, "noise_offset": 0.1, "num_validation_images": 1}
    whole = arguments(output_dir=str(tmp_path / "whole"), **common)
    main(whole)
    stopped = arguments(checkpointing_steps=2, **common)
    main(stopped)
    folder = Path(stopped.output_dir)
    assert_same_adapter(folder, tmp_path / "whole")
    (folder / WEIGHTS).unlink()
    argv = ["--config", str(folder / "config.yaml"), "--resume_from_checkpoint", str(folder / "checkpoint-2")]
    main(parse_arguments(DreamBoothArguments, argv))
    assert_same_adapter(folder, tmp_path / "whole")
    assert losses(folder) == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"cache_latents": False},
        {"cache_memory": 0.0},
        {"dataloader_num_workers": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_nothing(arguments, tmp_path, plain, changes: dict) -> None:
    main(arguments(**SHORT, **changes))
    torch.testing.assert_close(losses(tmp_path / "run"), losses(plain.folder), rtol=1e-5, atol=1e-6)
    one, other = load_file(tmp_path / "run" / WEIGHTS), load_file(plain.folder / WEIGHTS)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-5)


def test_accumulated_forwards_make_the_step_of_a_large_batch(arguments, tmp_path, pictures) -> None:
    """Stratified timesteps and noise are those of the samples, however they are grouped."""
    common = {"num_validation_images": 1, "max_train_steps": 3, "center_crop": True, "random_flip": False}
    main(arguments(output_dir=str(tmp_path / "one"), train_batch_size=4, **common))
    main(arguments(train_batch_size=2, gradient_accumulation_steps=2, **common))
    torch.testing.assert_close(losses(tmp_path / "run"), losses(tmp_path / "one"), rtol=1e-5, atol=1e-6)


def test_bf16_trains_float32_weights(arguments, tmp_path) -> None:
    main(arguments(output_dir=str(tmp_path / "plain"), train_text_encoder=True))
    AcceleratorState._reset_state(True)  # a process has one precision
    main(arguments(mixed_precision="bf16", train_text_encoder=True))
    torch.testing.assert_close(losses(tmp_path / "run"), losses(tmp_path / "plain"), rtol=0.05, atol=0)
    weights = load_file(tmp_path / "run" / WEIGHTS)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    # a weight that were rounded to bf16 at each step would have the lower half of its bits empty
    assert any((value != value.bfloat16().float()).any() for name, value in weights.items() if "lora_B" in name)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True, "train_text_encoder": True, "gradient_checkpointing": True},
        {"core_type": "constant", "center_crop": True},
        {"core_type": "identity", "do_edm_style_training": True},
        {"core_sharing": "layer", "noise_embedding": "mlp", "target_modules": ["to_k", "to_v", "ff.net.2"]},
        {"core_start_step": 2, "aspect_ratio_buckets": "16,16;24,12", "crops_per_image": None},
        {"optimizer": "prodigy", "learning_rate": 1.0, "core_learning_rate": None},
        {"use_8bit_adam": True, "weight_decay": 0.01},
    ],
    ids=lambda changes: ",".join(f"{name}={value}" for name, value in list(changes.items())[:2]),
)
def test_variants_train(arguments, changes: dict) -> None:
    if changes.get("optimizer") == "prodigy":
        pytest.importorskip("prodigyopt")
    if "use_8bit_adam" in changes:
        pytest.importorskip("bitsandbytes")
    args = arguments(num_validation_images=1, **changes)
    results = main(args)
    assert results["validation_loss_after"] < results["validation_loss_before"]
    assert any("magnitude" in name for name in load_file(Path(args.output_dir) / WEIGHTS)) is args.use_dora


@pytest.mark.parametrize(
    ("scheduler", "convention", "levels"),
    [
        (
            EulerDiscreteScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear"),
            "timestep",
            (0.166, 0.833),
        ),
        # 0.002 to 80 in Karras' 1001 steps: λ = σ / (1 + σ) of the 167th and the 834th from below
        (EDMEulerScheduler(), "edm", None),
    ],
    ids=["v_prediction", "edm"],
)
def test_other_schedules(arguments, sdxl_folder, tmp_path, scheduler, convention: str, levels) -> None:
    folder = tmp_path / "model"
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    pipe.scheduler = scheduler
    pipe.save_pretrained(folder)
    args = arguments(pretrained_model_name_or_path=str(folder), num_validation_images=1)
    results = main(args)
    loaded = loaded_pipeline(args)
    assert loaded.unet.peft_config["default_0"].noise_convention == convention
    if levels is None:
        sigma = EDMEulerScheduler().sigmas.flip(0)[1:][[166, 834]]
        levels = (sigma / (1 + sigma)).tolist()
    assert [results["noise_levels"][i] for i in (0, 2)] == pytest.approx(levels, abs=2e-3)
    assert results["validation_loss_after"] < results["validation_loss_before"]


def test_class_images_are_made_and_trained_on(arguments, tmp_path, plain) -> None:
    folder = tmp_path / "class"
    prior = {"with_prior_preservation": True, "class_data_dir": str(folder), "class_prompt": "a red toy"}
    main(arguments(**prior, num_class_images=3, **SHORT))
    assert len(list(folder.glob("*.png"))) == 3
    assert losses(tmp_path / "run")[0] > 1.5 * losses(plain.folder)[0]  # ℓ + ℓ'


def test_held_out_images_give_the_validation_loss(arguments, tmp_path, plain) -> None:
    """The training is the same, and what is measured differs."""
    held_out = str(write_pictures(tmp_path / "held-out", 2, seed=20))
    results = main(arguments(validation_data_dir=held_out, **SHORT))
    assert losses(tmp_path / "run") == losses(plain.folder)
    assert results["curve_before"] != plain.results["curve_before"]


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


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(arguments, tmp_path) -> None:
    """On the same global batch, with accelerate's own launcher, class images and text encoders included."""
    prior = {
        "with_prior_preservation": True,
        "class_data_dir": str(write_pictures(tmp_path / "class", 5, (16, 16), seed=8)),
        "class_prompt": "a toy",
        "num_class_images": 5,
    }
    common = {**prior, "train_text_encoder": True, "center_crop": True, "validation_steps": 2}
    main(arguments(output_dir=str(tmp_path / "one"), train_batch_size=4, **common))
    config = tmp_path / "two.yaml"
    two = arguments(output_dir=str(tmp_path / "two"), train_batch_size=2, **common)
    config.write_text(yaml.safe_dump(asdict(two)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", str(ROOT / "train_scripts" / "dreambooth_sdxl.py"), "--config", str(config)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4, atol=1e-5)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert results[1]["curve_before"] == pytest.approx(results[0]["curve_before"], rel=1e-4)
    assert results[1]["curve_after"] == pytest.approx(results[0]["curve_after"], rel=1e-3)
    assert len(list((tmp_path / "two" / "samples-after").glob("*.png"))) == 4
