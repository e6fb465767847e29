"""Crops against Pillow's own resize, crop and mirror; time_ids against the pixels themselves."""

import numpy as np
import pytest
import torch
from PIL import Image

from nara_diffusion.dreambooth.data.crops import Crop, center_crop, crop_image, random_crop, scaled_size, to_pixels
from tests.dreambooth.data.pictures import gradient, noise

SIZES = [((97, 61), (48, 32)), ((61, 97), (48, 32)), ((20, 33), (64, 64)), ((64, 64), (64, 64)), ((130, 40), (16, 24))]


def reference(image: Image.Image, crop: Crop) -> np.ndarray:
    """Scale the whole image, mirror it, cut: three steps, as they are told."""
    height, width = scaled_size(crop.original, crop.target)
    whole = image.resize((width, height), Image.Resampling.LANCZOS)
    if crop.flip:
        whole = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    h, w = crop.target
    return np.asarray(whole.crop((crop.left, crop.top, crop.left + w, crop.top + h))).astype(int)


@pytest.mark.parametrize(("original", "target"), SIZES)
@pytest.mark.parametrize("flip", [False, True])
def test_one_resampling_gives_the_pixels_of_three_steps(original, target, flip: bool) -> None:
    image = noise(original[1], original[0])
    generator = np.random.default_rng(0)
    for crop in [
        center_crop(original, target, flip),
        *(random_crop(original, target, generator, flip) for _ in range(5)),
    ]:
        cut = crop_image(image, crop)
        assert cut.size == (target[1], target[0])
        assert np.abs(np.asarray(cut).astype(int) - reference(image, crop)).max() <= 1


def test_scaled_to_cover_and_no_more() -> None:
    for original, target in SIZES:
        height, width = scaled_size(original, target)
        assert height >= target[0]
        assert width >= target[1]
        assert height == target[0] or width == target[1]
        assert abs(height / width - original[0] / original[1]) < 0.06


def test_random_crops_reach_every_position_and_no_other() -> None:
    original, target = (40, 20), (10, 10)
    generator = np.random.default_rng(1)
    crops = [random_crop(original, target, generator) for _ in range(400)]
    assert {crop.top for crop in crops} == set(range(11))
    assert {crop.left for crop in crops} == {0}
    assert center_crop(original, target).top == 5


@pytest.mark.parametrize("flip", [False, True])
def test_time_ids_tell_where_the_cut_lies(flip: bool) -> None:
    """In a gradient, a pixel's colour is its place: the cut's first pixel has to be the one that top and left name."""
    original, target = (100, 200), (40, 50)  # scaled to 40 × 80
    crop = Crop(original, target, top=0, left=21, flip=flip)
    assert crop.time_ids == (100, 200, 0, 21, 40, 50)
    red = np.asarray(crop_image(gradient(200, 100), crop)).astype(float)[..., 0]
    whole = _scaled_red(80)
    expected = whole[::-1][21:71] if flip else whole[21:71]
    assert np.abs(red - expected).max() < 4


def _scaled_red(width: int) -> np.ndarray:
    """Red of a 200 wide gradient that was scaled to `width` columns, at the middle of each."""
    centres = (np.arange(width) + 0.5) / width * 200 - 0.5
    return centres / 199 * 255


def test_a_very_long_image_needs_no_giant_on_the_way() -> None:
    """Scaled as a whole, it would have 64 × 1 280 000 pixels."""
    image = noise(20_000, 1)
    crop = center_crop((1, 20_000), (64, 64))
    assert crop.time_ids == (1, 20_000, 0, (64 * 20_000 - 64) // 2, 64, 64)
    cut = np.asarray(crop_image(image, crop)).astype(int)
    assert (cut == cut[:1]).all()  # a row of the image, enlarged
    left = crop.left / 64
    near = np.asarray(image)[0, int(left) - 3 : int(left) + 5].astype(int)
    assert cut.min() >= near.min() - 40
    assert cut.max() <= near.max() + 40


def test_pixels_lie_between_minus_one_and_one() -> None:
    image = noise(7, 5)
    pixels = to_pixels(image)
    assert pixels.shape == (3, 5, 7)
    assert pixels.dtype == torch.float32
    expected = torch.from_numpy(np.asarray(image).astype(np.float32)).permute(2, 0, 1) / 255 * 2 - 1
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
    assert to_pixels(Image.new("RGB", (2, 2), "white")).eq(1).all()
    assert to_pixels(Image.new("RGB", (2, 2), "black")).eq(-1).all()
