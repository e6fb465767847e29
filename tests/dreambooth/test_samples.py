"""Samples and their sheet; class images: reproducible, completed after an interruption, by one process or several."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nara_diffusion.dreambooth.samples import (
    CELL,
    SampleSettings,
    generate_class_images,
    sample_images,
    write_grid,
    write_images,
)
from tests.dreambooth.pictures import folder_of
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


def test_an_interrupted_set_is_completed_to_the_same_files_at_any_batch_size(tmp_path) -> None:
    painter = Painter()
    assert generate(tmp_path / "whole", painter=painter, height=8) == 5
    assert painter.batches == [2, 2, 1]
    assert painter.call == {"height": 8}
    whole = contents(tmp_path / "whole")
    assert list(whole) == [f"class-3-{number:05d}.png" for number in range(5)]
    assert len(set(whole.values())) == 5
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "class", painter=Painter(fail_after=1))
    assert len(contents(tmp_path / "class")) == 2
    assert generate(tmp_path / "class", batch_size=5) == 3
    assert contents(tmp_path / "class") == whole
    generate(tmp_path / "other", seed=4)
    assert not set(contents(tmp_path / "other").values()) & set(whole.values())
    with pytest.raises(ValueError, match=r"class-3-00000\.png shows 'ein Spielzeug, größer ✓', but .* is 'a cube'"):
        generate(tmp_path / "whole", prompt="a cube")


def test_enough_images_of_the_user_s_own_need_no_pipeline(tmp_path) -> None:
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


def test_samples_are_those_of_the_pipeline_s_own_call(tmp_path) -> None:
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


def test_each_image_is_on_the_sheet_where_its_prompt_and_seed_say(tmp_path) -> None:
    def colours(count: int, blue: int) -> list[Image.Image]:
        return [Image.new("RGB", (32, 32), (10 + 20 * i, 200 - 20 * i, blue)) for i in range(count)]

    columns = {"before": colours(6, 40), "after": colours(6, 90), "references": colours(3, 250)}
    shown = {title: columns[title] for title in ("before", "after")}
    write_grid(tmp_path / "sheet.png", ["one", "two", "three"], shown, columns["references"])
    sheet, seen = np.asarray(Image.open(tmp_path / "sheet.png")), {}
    for title, images in columns.items():
        for i, image in enumerate(images):
            found = np.argwhere((sheet == image.getpixel((0, 0))).all(-1))[:, ::-1]
            assert len(found) == CELL * CELL
            seen[title, i] = found.min(0)
    rows = [[("references", i) for i in range(3)]]
    rows += [[(title, 2 * prompt + j) for title in shown for j in (0, 1)] for prompt in range(3)]
    assert sorted(seen, key=lambda image: (*seen[image][::-1],)) == [image for row in rows for image in row]
    assert all(len({seen[image][1] for image in row}) == 1 for row in rows)
    assert (sheet.astype(int).sum(-1)[: seen["before", 0][1]] < 300).sum() > 20  # letters above the images
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
