"""The sheet of samples: every image at its place, captions above."""

import numpy as np
import pytest
from PIL import Image

from nara_diffusion.dreambooth.evaluation.grid import CELL, GAP, MARGIN, draw_grid, write_grid


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.new("RGB", size, colour)


def colours(count: int, blue: int) -> list[Image.Image]:
    return [plain((10 + 20 * i, 200 - 20 * i, blue)) for i in range(count)]


def places(sheet: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """(x, y) of the pixels of a colour."""
    found = np.argwhere((np.asarray(sheet) == colour).all(-1))
    return found[:, ::-1]


def test_each_image_is_where_its_prompt_and_seed_say() -> None:
    before, after = colours(6, 40), colours(6, 90)
    references = colours(3, 250)
    sheet = draw_grid(["one", "two", "three"], {"before": before, "after": after}, references)
    seen = {}
    for title, images in {"before": before, "after": after, "references": references}.items():
        for i, image in enumerate(images):
            found = places(sheet, image.getpixel((0, 0)))
            assert len(found) == CELL * CELL
            seen[title, i] = found.min(0)
    for prompt in range(3):
        rows = {seen[title, 2 * prompt + j][1] for title in ("before", "after") for j in (0, 1)}
        assert len(rows) == 1
        assert seen["before", 2 * prompt][0] == MARGIN
        assert seen["before", 2 * prompt + 1][0] == MARGIN + CELL + GAP
        assert seen["after", 2 * prompt][0] > seen["before", 2 * prompt + 1][0] + CELL
    assert seen["before", 0][1] < seen["before", 2][1] < seen["before", 4][1]
    assert seen["references", 0][1] < seen["before", 0][1]


def test_captions_are_drawn_and_wrapped() -> None:
    images = {"after": colours(1, 40)}
    short = draw_grid(["a"], images)
    long = draw_grid(["a photo of a toy " * 12], images)
    assert long.height > short.height
    assert long.width == short.width
    ink = np.asarray(short)[: MARGIN + 40].astype(int)
    assert (ink.sum(-1) < 300).sum() > 20  # letters above the image


@pytest.mark.parametrize(("size", "expected"), [((64, 32), (CELL, CELL // 2)), ((300, 400), (96, CELL))])
def test_other_shapes_fit_their_cell(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = plain((1, 2, 3), size)
    found = places(draw_grid(["a"], {"after": [image]}), (1, 2, 3))
    assert tuple(found.max(0) - found.min(0) + 1) == expected


def test_small_images_keep_their_pixels(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    write_grid(tmp_path / "grid.png", ["a"], {"after": [Image.fromarray(pixels)]})
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    bottom = sheet.shape[0] - MARGIN - GAP
    cell = sheet[bottom - CELL : bottom, MARGIN : MARGIN + CELL]
    np.testing.assert_array_equal(cell[4::8, 4::8], pixels)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
