"""Samples, their sheet and what is measured; class images: completed after an interruption, by processes too."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from PIL import Image

from nara_diffusion.dreambooth import DreamBoothDataset, LatentCache, records_from_folder
from nara_diffusion.dreambooth.draws import draw_noise
from nara_diffusion.dreambooth.encoders import Encoder, image_similarity, text_alignment
from nara_diffusion.dreambooth.families import SDXL
from nara_diffusion.dreambooth.fidelity import STRIP, Evaluation
from nara_diffusion.dreambooth.objectives import build_objective
from nara_diffusion.dreambooth.samples import (
    SampleSettings,
    generate_class_images,
    sample_images,
    write_grid,
    write_images,
)
from nara_diffusion.dreambooth.training_step import TrainingStep, ValidationLoss
from tests.acceptance._commands import fresh_accelerate
from tests.dreambooth.pictures import folder_of, noise
from tests.helpers.small_pipelines import small_sdxl

PROMPT = "ein Spielzeug, größer ✓"


class Painter:
    """Stands for a pipeline: each image is noise of its generator. Remembers the sizes of its batches."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.batches: list[int] = []
        self.fail_after = fail_after

    def __call__(self, prompt: list[str], generator: list[torch.Generator], **call: Any) -> Any:
        if len(self.batches) == self.fail_after:
            raise KeyboardInterrupt
        self.batches.append(len(prompt))
        self.call = call
        pixels = [torch.randint(0, 256, (8, 8, 3), generator=one, dtype=torch.uint8) for one in generator]
        return SimpleNamespace(images=[Image.fromarray(one.numpy()) for one in pixels])


def generate(folder: Path, count: int = 5, painter: Painter | None = None, **options: Any) -> int:
    painter = painter or Painter()
    options = {"seed": 3, "batch_size": 2, "progress": False, "prompt": PROMPT, **options}
    return generate_class_images(lambda: painter, folder, options.pop("prompt"), count, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_interrupted_set_is_completed_to_the_same_files(tmp_path) -> None:
    painter = Painter()
    assert generate(tmp_path / "whole", painter=painter, height=8) == 5
    assert painter.batches == [2, 2, 1]
    assert painter.call == {"height": 8}
    uninterrupted = contents(tmp_path / "whole")
    assert list(uninterrupted) == [f"class-3-{number:05d}.png" for number in range(5)]
    assert len(set(uninterrupted.values())) == 5
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "class", painter=Painter(fail_after=1))
    assert len(contents(tmp_path / "class")) == 2
    assert generate(tmp_path / "class", batch_size=5) == 3
    assert contents(tmp_path / "class") == uninterrupted
    generate(tmp_path / "other", seed=4)
    assert not set(contents(tmp_path / "other").values()) & set(uninterrupted.values())
    with pytest.raises(ValueError, match=r"class-3-00000\.png shows 'ein Spielzeug, größer ✓', but .* is 'a cube'"):
        generate(tmp_path / "whole", prompt="a cube")


def test_enough_user_images_need_no_pipeline(tmp_path) -> None:
    folder = folder_of(tmp_path / "class", [(8, 8)] * 3)
    assert generate_class_images(lambda: pytest.fail("loaded"), folder, PROMPT, 3, seed=0) == 0
    assert generate(folder, count=5) == 2
    assert list(contents(folder)) == ["00.png", "01.png", "02.png", "class-3-00000.png", "class-3-00001.png"]


def test_processes_share_the_work(tmp_path) -> None:
    generate(tmp_path / "alone", count=7)
    barrier, painters = threading.Barrier(3, timeout=60), [Painter() for _ in range(3)]

    def run(rank: int) -> None:
        accelerator = SimpleNamespace(process_index=rank, num_processes=3, wait_for_everyone=barrier.wait)
        generate(tmp_path / "shared", count=7, painter=painters[rank], accelerator=accelerator)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, range(3)))
    assert [sum(painter.batches) for painter in painters] == [3, 2, 2]
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


# ---------------------------------------------------------------------- samples

CALL = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 3.0}


def test_samples_match_the_pipelines_own_call(tmp_path) -> None:
    pipe = small_sdxl()
    settings = SampleSettings(["a red toy", "a cube"], 3, seed=7, batch_size=3, call=CALL)
    images = sample_images(pipe, settings)
    for i, prompt in enumerate(settings.prompts):
        generators = [torch.Generator().manual_seed(7 + j) for j in range(3)]
        theirs = pipe([prompt] * 3, generator=generators, **CALL).images
        assert images[3 * i : 3 * i + 3] == theirs
    write_images(tmp_path / "samples", images, settings)
    lines = [json.loads(line) for line in (tmp_path / "samples" / "metadata.jsonl").read_text().splitlines()]
    assert lines[4] == {"file_name": "01-seed-8.png", "text": "a cube", "seed": 8}
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "samples" / "01-seed-8.png")), np.asarray(images[4]))


def test_each_image_is_at_its_place_on_sheet(tmp_path) -> None:
    def colours(count: int, blue: int) -> list[Image.Image]:
        return [Image.new("RGB", (32, 32), (10 + 20 * i, 200 - 20 * i, blue)) for i in range(count)]

    columns = {"before": colours(6, 40), "after": colours(6, 90), "references": colours(3, 250)}
    groups = {title: columns[title] for title in ("before", "after")}
    write_grid(tmp_path / "sheet.png", ["one", "two", "three"], groups, {"references": columns["references"]})
    sheet, seen = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")), {}
    for title, images in columns.items():
        for i, image in enumerate(images):
            places = np.argwhere((sheet == image.getpixel((0, 0))).all(-1))[:, ::-1]
            assert len(places) > 100**2
            seen[title, i] = places.min(0)
    rows = [[("references", i) for i in range(3)]]
    rows += [[(title, 2 * prompt + j) for title in groups for j in (0, 1)] for prompt in range(3)]
    assert sorted(seen, key=lambda image: (*seen[image][::-1],)) == [image for row in rows for image in row]
    assert all(len({seen[image][1] for image in row}) == 1 for row in rows)
    assert (sheet.astype(int).sum(-1)[: seen["before", 0][1]] < 300).sum() > 20  # letters above the images
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


# ---------------------------------------------------------------------- measurement


@pytest.fixture
def accelerator():
    yield Accelerator()
    fresh_accelerate()


@pytest.fixture(scope="module")
def pipe() -> Any:
    return small_sdxl()


@pytest.fixture
def loss(pipe, tmp_path: Path) -> ValidationLoss:
    """Of images of two sizes, so that they make two batches."""
    folder = folder_of(tmp_path / "images", [(20, 20), (18, 30), (22, 22)])
    records = records_from_folder(folder, prompt="a photo of a toy", progress=False)
    samples = DreamBoothDataset(records, [(16, 16), (24, 12)], batch_size=1, seed=0).plain_samples()
    objective, cpu = build_objective(pipe.scheduler), torch.device("cpu")
    step = TrainingStep(pipe.unet, objective, LatentCache(pipe.vae), None, cpu, seed=4)
    return ValidationLoss(step, samples, SDXL, points=3, batch_size=2)


def test_the_curve_is_the_error_at_each_level(pipe, loss, accelerator) -> None:
    assert loss.indices == [166, 500, 833]
    curve = loss.curve(pipe, accelerator)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    expected = torch.zeros(3, 3)
    by_size = sorted(loss.samples, key=lambda sample: sample.target)  # the order of the columns
    for column, sample in enumerate(by_size):
        latents = loss.step.latents.mode([sample])
        noise = draw_noise([sample.position], latents.shape[1:], seed=4, role="validation")
        embeds, _, pooled, _ = pipe.encode_prompt(sample.prompt, do_classifier_free_guidance=False)
        conditions = {"text_embeds": pooled, "time_ids": torch.tensor([sample.time_ids])}
        for row, t in enumerate(loss.indices):
            noisy = scheduler.add_noise(latents, noise, torch.tensor([t]))
            with torch.no_grad():
                prediction = pipe.unet(noisy, t, embeds, added_cond_kwargs=conditions).sample
            expected[row, column] = (prediction - noise).square().mean()
    torch.testing.assert_close(curve, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.noise_levels, torch.tensor([0.166, 0.5, 0.833]))
    torch.testing.assert_close(loss.curve(pipe, accelerator), curve, rtol=0, atol=0)


def test_a_measurement_holds_samples_losses_and_figures(pipe, loss, accelerator) -> None:
    encoder = Encoder(Path(__file__).parents[2] / "examples" / "assets" / "clip-tiny", device="cpu")
    references = [sample.image.load() for sample in loss.samples]
    settings = SampleSettings(["a sks cube"], 2, seed=7, batch_size=2, call=CALL)
    run: Any = SimpleNamespace(accelerator=accelerator, args=SimpleNamespace(identifier=["sks"]))
    blind = Evaluation(run, pipe, settings, loss, references).measure(None, "before")
    assert (blind.similarity, blind.text_alignment) == (None, None)
    measured = Evaluation(run, pipe, settings, loss, references, encoder, encoder).measure(None, "after")
    assert measured.similarity == pytest.approx(image_similarity(encoder, measured.images, references))
    assert measured.text_alignment == pytest.approx(text_alignment(encoder, measured.images, ["a cube"] * 2))
    assert measured.curve == blind.curve
    assert measured.validation_loss == pytest.approx(sum(measured.curve) / 3)


def test_strip_has_the_first_samples_of_each_step(
    loss: ValidationLoss, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sheets, logged, asked = [], [], []
    monkeypatch.setattr("nara_diffusion.dreambooth.fidelity.write_grid", lambda *sheet: sheets.append(sheet))
    encoder = Encoder(Path(__file__).parents[2] / "examples" / "assets" / "clip-tiny", device="cpu")
    tracker = SimpleNamespace(name="tensorboard", log_images=lambda images, **options: logged.append((images, options)))
    run: Any = SimpleNamespace(is_main=True, folder=tmp_path, step=5, total_steps=9)
    run.accelerator = SimpleNamespace(trackers=[tracker])
    run.args = SimpleNamespace(identifier=None, min_noise_level=None, max_noise_level=None)
    settings = SampleSettings(["a cube", "a red ball"], 2, seed=7, batch_size=2, call=CALL)
    pictures = [noise(16, 24, seed=seed) for seed in range(6)]
    base: Any = SimpleNamespace(images=pictures[:4])

    def measure(_: Any, __: str, asked_for: SampleSettings) -> Any:
        asked.append(asked_for.images_per_prompt)
        figures = {"curve": [0.5, 0.25, 0.3], "similarity": 0.5, "text_alignment": 0.75}
        return SimpleNamespace(images=pictures[4:], **figures)

    pipe: Any = None
    evaluation = Evaluation(run, pipe, settings, loss, pictures[:1], encoder, encoder)
    object.__setattr__(evaluation, "measure_model", measure)
    evaluation.record(0, base)
    values = evaluation.validate(torch.nn.Identity())
    assert (values["similarity"], values["text_alignment"], asked) == (0.5, 0.75, [1])
    assert sheets[1][0] == tmp_path / STRIP
    assert sheets[1][2] == {"step 0": [pictures[0], pictures[2]], "step 5": pictures[4:]}
    strips, options = logged[1]
    assert options == {"step": 5, "dataformats": "NHWC"}
    expected = np.stack([np.asarray(pictures[2]), np.asarray(pictures[5])])
    np.testing.assert_array_equal(strips["validation: a red ball"], expected)
    start, end = evaluation.trend()
    assert (start[0], end[0]) == (0, 5)
    assert start[1] == pytest.approx(image_similarity(encoder, [pictures[0], pictures[2]], pictures[:1]))
    assert end[2] == pytest.approx(text_alignment(encoder, pictures[4:], settings.prompts))
    run.step = 9
    evaluation.validate(torch.nn.Identity())
    assert asked == [1, 2]
