"""Masks: how they are read, that they follow their image, and the loss that they weight."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torch.nn.functional import pixel_unshuffle

from nara_diffusion.dreambooth import train
from nara_diffusion.dreambooth.caches import LatentCache
from nara_diffusion.dreambooth.dataset import DreamBoothDataset, TrainingSample, collate_samples
from nara_diffusion.dreambooth.families import SD3, SDXL, Call
from nara_diffusion.dreambooth.flow_families import FLUX, FLUX2, QWEN_IMAGE
from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments
from nara_diffusion.dreambooth.image_records import ImageRecord, class_records, with_masks
from nara_diffusion.dreambooth.objectives import Corrupted, build_objective, squared_errors
from nara_diffusion.dreambooth.source_images import records_from_folder
from nara_diffusion.dreambooth.subject import digested, load_subject, read_images
from nara_diffusion.dreambooth.training_step import TrainingStep, ValidationLoss, training_step
from tests.acceptance._commands import fresh_accelerate, metrics
from tests.acceptance._runs import ASSETS, image_arguments, image_flags
from tests.dreambooth.pictures import folder_of, noise
from tests.helpers.small_pipelines import small_sd3, small_sdxl, small_vae

SIZES = [(40, 26), (26, 36), (44, 44)]  # (width, height)


def grey(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Independent grey pixels of (width, height), half of them black."""
    values = np.random.default_rng(seed).integers(0, 256, size[::-1])
    return Image.fromarray((values * (values % 2)).astype(np.uint8))


def masked_folder(folder: Path, sizes: list[tuple[int, int]] = SIZES) -> Path:
    """Images whose first channel is their mask."""
    folder_of(folder, sizes)
    (folder / "mask").mkdir()
    for number, size in enumerate(sizes):
        mask, colour = grey(size, number), noise(*size, seed=number)
        mask.save(folder / "mask" / f"{number:02d}.png")
        Image.merge("RGB", [mask, *colour.split()[1:]]).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return masked_folder(tmp_path_factory.mktemp("masked"))


def masked(folder: Path, **options: Any) -> list[ImageRecord]:
    return with_masks(records_from_folder(folder, prompt="a toy", progress=False), folder, **options)


def plain(folder: Path, sizes: list[tuple[int, int]], **options: Any) -> list[TrainingSample]:
    return DreamBoothDataset(masked(folder), sizes, batch_size=2, seed=4, **options).plain_samples()


def mask_of(record: ImageRecord) -> np.ndarray:
    assert record.mask is not None
    return np.asarray(record.mask.load())[..., 0]


# ---------------------------------------------------------------------- files


def test_images_without_mask_are_counted(folder: Path, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    shutil.copytree(folder, tmp_path / "some")
    (tmp_path / "some" / "mask" / "01.png").unlink()
    (tmp_path / "some" / "mask" / "00.png").rename(tmp_path / "some" / "mask" / "00.PNG")
    records = masked(tmp_path / "some")
    assert [record.mask is None for record in records] == [False, True, False]
    assert np.array_equal(mask_of(records[2]), np.asarray(grey(SIZES[2], 2)))
    assert "2 of 3 images have a mask; the others weigh 1" in caplog.text
    assert "ignored" not in caplog.text
    caplog.clear()
    bare = records_from_folder(folder_of(tmp_path / "bare", SIZES), prompt="a toy")
    assert with_masks(bare, tmp_path / "bare") == bare
    assert not caplog.text


def test_alpha_is_a_mask_where_no_file_is(tmp_path: Path) -> None:
    folder_of(tmp_path, [(12, 9)] * 3)
    alpha, exif = grey((12, 9), 7), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    for name in ("01.png", "02.png"):
        picture = noise(12, 9)
        picture.putalpha(alpha)
        picture.save(tmp_path / name, exif=exif)
    (tmp_path / "mask").mkdir()
    grey((9, 12), 3).save(tmp_path / "mask" / "02.png")
    assert [record.mask is None for record in masked(tmp_path)] == [True, True, False]
    records = masked(tmp_path, from_alpha=True)
    assert records[0].mask is None
    turned = np.asarray(alpha.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(mask_of(records[1]), turned)
    assert np.array_equal(mask_of(records[2]), np.asarray(grey((9, 12), 3)))


def test_unusable_masks_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    def refused(message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message) as error:
            masked(images, **options)
        assert "\n" not in str(error.value)

    images = folder_of(tmp_path, [(30, 20)] * 2)
    refused("--alpha_mask is set, but no image in .* has an alpha channel", from_alpha=True)
    (images / "mask").mkdir()
    refused("mask contains no images: add")
    grey((30, 21)).save(images / "mask" / "01.png")
    refused(r"mask/01.png is 30 x 21 pixels, but its image 30 x 20: save both in one size")
    grey((30, 20)).save(images / "mask" / "1.png")
    refused(r"mask has files without an image of the same name \('1.png'\): remove them")


def test_options_reach_masks_and_weights(tmp_path: Path) -> None:
    folder_of(tmp_path, [(9, 9)])
    picture = noise(9, 9)
    picture.putalpha(grey((9, 9)))
    picture.save(tmp_path / "00.png")
    common: dict[str, Any] = {
        "pretrained_model_name_or_path": "none",
        "instance_data_dir": "none",
        "instance_prompt": "a toy",
    }
    for alpha in (True, False):
        args = DreamBoothArguments(**common, alpha_mask=alpha, mask_floor=0.3, train_text_encoder=True)
        (record,) = read_images(args, SD3, str(tmp_path), None, progress=False)
        assert (record.mask is not None) == alpha
    pipe: Any = SimpleNamespace(transformer=None, vae=None, scheduler=small_sd3().scheduler)
    assert training_step(args, pipe, SD3, torch.device("cpu"), 2, 2).latents.mask_floor == 0.3


def test_floor_without_masks_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, [(9, 9)])
    args = DreamBoothArguments(
        pretrained_model_name_or_path=str(ASSETS / "sdxl-tiny"),
        instance_data_dir=str(tmp_path),
        instance_prompt="a toy",
        mask_floor=0.3,
    )
    run: Any = SimpleNamespace(is_main=False)
    with pytest.raises(ValueError, match="mask_floor is the weight outside of masks, but no image has one"):
        load_subject(args, run)


def test_digest_of_data_notices_another_mask(folder: Path) -> None:
    records = masked(folder)
    other = replace(records[0], mask=records[1].mask)
    assert digested([other]) != digested(records[:1]) != digested([replace(other, mask=None)])


# ---------------------------------------------------------------------- cuts


def test_mask_is_cut_and_mirrored_with_its_image(folder: Path) -> None:
    """At the images' own scale, where the first channel is the mask."""
    options: dict[str, Any] = {"batch_size": 1, "seed": 4, "crop": "random", "flip": True}
    for record, target in zip(masked(folder), [(26, 18), (20, 26), (44, 30)], strict=True):
        data = DreamBoothDataset([record], [target], **options)
        samples = {data.samples_at(p)[0].key: data.samples_at(p)[0] for p in range(60)}
        assert len({(sample.top, sample.left) for sample in samples.values()}) > 2
        assert len({sample.flip for sample in samples.values()}) == 2
        for sample in samples.values():
            (mask,) = sample.mask_values(target)
            torch.testing.assert_close(mask, (sample.pixel_values()[:1] + 1) / 2, rtol=0, atol=1e-6)


def test_scaled_mask_is_the_mean_over_areas(tmp_path: Path) -> None:
    (sample,) = plain(masked_folder(tmp_path, [(84, 52)]), [(26, 30)])
    (mask,) = sample.mask_values((13, 5))
    values = np.asarray(grey((84, 52)), dtype=np.float64)[:, 12:72] / 255  # a centre crop at half the scale
    expected = values.reshape(13, 4, 5, 12).mean((1, 3))
    np.testing.assert_allclose(mask[0].numpy(), expected, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- loss


class Recorded(nn.Module):
    """Predicts fixed numbers, whose gradients can be read."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.prediction = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(5)))

    def forward(self, *inputs: Any, **embeddings: Any) -> torch.Tensor:
        return self.prediction


@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_step_weights_errors_inside_the_mask(folder: Path, tmp_path: Path, floor: float) -> None:
    prior = class_records(folder_of(tmp_path, [(40, 26)] * 2), prompt="a toy", progress=False)
    options: dict[str, Any] = {"batch_size": 2, "seed": 4, "crop": "random", "flip": True}
    data = DreamBoothDataset(masked(folder)[:1], [(26, 18)], class_images=prior, **options)
    batch = collate_samples([data[0], data[1]])
    model = Recorded((4, 4, 13, 9))
    prompts: Any = SimpleNamespace(get=lambda *_: ())
    latents = LatentCache(small_vae(), mask_floor=floor)
    objective = build_objective(small_sdxl().scheduler, snr_gamma=5.0)
    step = TrainingStep(model, objective, latents, prompts, torch.device("cpu"), seed=11, prior_loss_weight=0.4)
    result = step(batch)
    result.loss.backward()

    targets = step._corrupt(batch["samples"], step.drawable, 1)
    errors = (model.prediction.detach().double() - targets.target.double()).square()
    weights = np.ones((4, 13, 9))
    for row, sample in enumerate(batch["samples"][:2]):
        values = mask_of(sample.image).astype(np.float64) / 255
        values = values[:, ::-1] if sample.flip else values
        values = values[:, sample.left : sample.left + 18]
        weights[row] = np.maximum(values.reshape(13, 2, 9, 2).mean((1, 3)), floor)
    parts = targets.weight.double() * (errors * torch.from_numpy(weights)[:, None]).flatten(1).mean(1)
    torch.testing.assert_close(result.per_sample.double(), parts[:2] + 0.4 * parts[2:], rtol=1e-5, atol=0)
    gradient = model.prediction.grad
    assert gradient is not None
    outside = torch.from_numpy(weights == 0)[:, None].expand_as(gradient)
    assert outside[:2].any() == (floor == 0)
    assert (gradient[outside] == 0).all()
    assert (gradient[~outside] != 0).all()


def test_batch_without_masks_has_no_weights(tmp_path: Path) -> None:
    samples = plain(folder_of(tmp_path, [(20, 20)]), [(16, 16)])
    assert LatentCache(small_vae()).weights(samples, torch.zeros(1, 4, 8, 8)) is None


def test_weights_are_kept_and_hardly_take_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, samples = LatentCache(small_vae()), plain(folder, [(24, 16)])
    free = cache.cache.free
    weights = cache.weights(samples, torch.zeros(3, 4, 12, 8))
    assert free - cache.cache.free == 3 * 12 * 8 * 4
    monkeypatch.setattr(TrainingSample, "mask_values", lambda *_: pytest.fail("computed again"))
    again = cache.weights(samples, torch.zeros(3, 4, 12, 8))
    torch.testing.assert_close(again, weights, rtol=0, atol=0)
    monkeypatch.undo()
    white = cache.weights(with_colour(samples, 255), torch.zeros(3, 4, 12, 8))  # of the same images
    torch.testing.assert_close(white, torch.ones(3, 1, 12, 8))


@pytest.mark.parametrize("family", [FLUX, QWEN_IMAGE, FLUX2], ids=lambda family: family.name)
def test_tokens_outside_the_mask_get_no_gradient(folder: Path, family: Any) -> None:
    """Token i of a row of w / 4 stands for 2 × 2 latents; its number 4 c + 2 y + x is channel c there."""
    (sample,) = plain(folder, [(24, 16)])[:1]
    (mask,) = sample.mask_values((12, 8))
    vae: Any = SimpleNamespace(bn=None) if family is FLUX2 else SimpleNamespace()
    shape = (1, 12, 6, 4) if family is FLUX2 else (1, 3, 12, 8)
    tokens = torch.randn(1, 24, 12, generator=torch.Generator().manual_seed(1), requires_grad=True)
    call = Call(torch.zeros(shape), torch.zeros(1), (), torch.zeros(1, 6), family)
    prediction = family.output(tokens, call)
    target = torch.zeros(shape)
    weights = LatentCache(vae).weights([sample], target)
    squared_errors(prediction, Corrupted(target, torch.zeros(1), target, torch.ones(1)), weights).sum().backward()
    patches = pixel_unshuffle(mask[None].expand(1, 3, 12, 8), 2)  # (1, 12, 6, 4)
    expected = patches.flatten(2).transpose(1, 2) * 2 * tokens.detach() / (3 * 12 * 8)
    assert (expected == 0).any()
    torch.testing.assert_close(tokens.grad, expected)


def test_validation_loss_has_the_weights_too(folder: Path) -> None:
    pipe: Any = small_sdxl()
    samples = plain(folder, [(24, 16)])
    black = with_colour(samples, 0)
    curves = []
    for floor, images in ((0.0, samples), (0.25, black), (0.25, with_colour(samples, None))):
        cache = LatentCache(pipe.vae, mask_floor=floor)
        step = TrainingStep(pipe.unet, build_objective(pipe.scheduler), cache, None, torch.device("cpu"), seed=4)
        loss = ValidationLoss(step, images, SDXL, points=2, batch_size=2)
        curves.append(loss.curve(pipe, Accelerator()))
    fresh_accelerate()
    torch.testing.assert_close(curves[1], 0.25 * curves[2])
    assert (curves[0] < curves[2]).all()


def with_colour(samples: list[TrainingSample], colour: int | None) -> list[TrainingSample]:
    """The samples with a mask of one grey, or without any."""
    changed = []
    for sample in samples:
        mask = None
        if colour is not None:
            (height, width) = size = sample.image.size
            read = partial(png_of, Image.new("L", (width, height), colour))
            mask = ImageRecord("mask", read, size, "", str(colour))
        changed.append(replace(sample, image=replace(sample.image, mask=mask)))
    return changed


def png_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def test_run_on_black_masks_has_no_loss(tmp_path: Path) -> None:
    flags = image_flags(tmp_path, small_sdxl()) | {"max_train_steps": 1, "curve_points": 1, "checkpointing_steps": None}
    place = tmp_path / "pictures" / "mask"
    place.mkdir()
    for number in range(3):
        Image.new("L", (20, 24), 0).save(place / f"{number}.png")
    train.main(image_arguments(flags, tmp_path / "run"))
    assert metrics(tmp_path / "run")[0]["loss"] == 0
