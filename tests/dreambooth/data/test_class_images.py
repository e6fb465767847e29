"""Class images: the right number, reproducible, completed after an interruption, by one process or several."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nara_diffusion.dreambooth.data.class_images import generate_class_images, missing_class_images
from nara_diffusion.dreambooth.data.records import class_records
from tests.dreambooth.data.pictures import folder_of
from tests.helpers.patience import LAST_RESORT, all_at_once
from tests.helpers.small_pipelines import small_sdxl

PROMPT = "a photo of toy"


class Painter:
    """Stands for a pipeline: each image is noise of its generator. Remembers the sizes of its batches."""

    def __init__(self, fail_after: int | None = None, value: float = 1.0) -> None:
        self.batches: list[int] = []
        self.fail_after, self.value = fail_after, value

    def __call__(self, prompt: list[str], generator: list[torch.Generator], output_type: str, **call: Any) -> Any:
        assert output_type == "np"
        if len(self.batches) == self.fail_after:
            raise KeyboardInterrupt
        self.batches.append(len(prompt))
        self.prompts, self.call = prompt, call
        return SimpleNamespace(
            images=np.stack([torch.rand(8, 8, 3, generator=g).numpy() for g in generator]) * self.value
        )


def generate(folder: Path, count: int = 5, painter: Painter | None = None, **options: Any) -> int:
    painter = painter or Painter()
    options = {"seed": 3, "batch_size": 2, "progress": False, "prompt": PROMPT, **options}
    return generate_class_images(lambda: painter, folder, options.pop("prompt"), count, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_as_many_as_asked_for_each_another(tmp_path) -> None:
    painter = Painter()
    assert generate(tmp_path / "class", painter=painter, height=8, num_inference_steps=3) == 5
    assert painter.batches == [2, 2, 1]
    assert painter.prompts == [PROMPT]
    assert painter.call == {"height": 8, "num_inference_steps": 3}
    files = contents(tmp_path / "class")
    assert list(files) == [f"class-3-{number:05d}.png" for number in range(5)]
    assert len(set(files.values())) == 5
    assert len(class_records(tmp_path / "class", prompt=PROMPT, minimum=5)) == 5


def test_the_same_seed_gives_the_same_files_at_any_batch_size(tmp_path) -> None:
    for name, options in {"a": {}, "b": {"batch_size": 5}, "c": {"seed": 4}}.items():
        generate(tmp_path / name, **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert not set(contents(tmp_path / "a").values()) & set(contents(tmp_path / "c").values())


def test_an_interrupted_set_is_completed_to_the_same_files(tmp_path) -> None:
    generate(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "class", painter=Painter(fail_after=1))
    assert list(contents(tmp_path / "class")) == ["class-3-00000.png", "class-3-00001.png"]
    painter = Painter()
    assert generate(tmp_path / "class", painter=painter) == 3
    assert painter.batches == [2, 1]
    (tmp_path / "class" / "class-3-00002.png").unlink()
    assert generate(tmp_path / "class") == 1
    assert contents(tmp_path / "class") == contents(tmp_path / "whole")


def test_an_interruption_while_writing_leaves_no_half_file(tmp_path, monkeypatch) -> None:
    def half(self: Image.Image, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"\x89PNG")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", half)
        with pytest.raises(KeyboardInterrupt):
            generate(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert generate(tmp_path) == 5


def test_enough_images_of_the_user_s_own_need_no_pipeline(tmp_path) -> None:
    folder = folder_of(tmp_path / "class", [(8, 8)] * 3)

    def never() -> None:
        raise AssertionError

    assert generate_class_images(never, folder, PROMPT, 3, seed=0) == 0
    assert generate(folder, count=5) == 2
    assert list(contents(folder)) == ["00.png", "01.png", "02.png", "class-3-00000.png", "class-3-00001.png"]


def test_processes_share_the_work(tmp_path) -> None:
    generate(tmp_path / "alone", count=7)
    barrier = threading.Barrier(3, timeout=LAST_RESORT)
    painters = [Painter() for _ in range(3)]

    def run(rank: int) -> None:
        accelerator = SimpleNamespace(process_index=rank, num_processes=3, wait_for_everyone=barrier.wait)
        assert generate(tmp_path / "shared", count=7, painter=painters[rank], accelerator=accelerator) == 7

    all_at_once(run, range(3), barrier)
    assert [sum(painter.batches) for painter in painters] == [3, 2, 2]
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_images_of_another_prompt_are_not_taken(tmp_path) -> None:
    generate(tmp_path)
    with pytest.raises(
        ValueError, match=r"class-3-00000\.png shows 'a photo of toy', but class_prompt is 'a cube'\. Name"
    ):
        generate(tmp_path, prompt="a cube")


def test_a_prompt_beyond_latin_letters_is_remembered(tmp_path) -> None:
    generate(tmp_path, prompt="ein Spielzeug, größer ✓")
    assert generate(tmp_path, prompt="ein Spielzeug, größer ✓") == 0
    with pytest.raises(ValueError, match="shows 'ein Spielzeug, größer ✓'"):
        generate(tmp_path)


def test_wrong_wishes_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="class_prompt is empty"):
        generate(tmp_path, prompt=" ")
    with pytest.raises(ValueError, match="num_class_images is 0, expected 1 or more"):
        generate(tmp_path, count=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"the image folder .*file is a file"):
        missing_class_images(tmp_path / "file", PROMPT, 3, seed=0)
    with pytest.raises(ValueError, match=r"class_data_dir .*class can't be written: Not a directory\. Name another"):
        missing_class_images(tmp_path / "file" / "class", PROMPT, 3, seed=0)


def test_nan_images_are_refused_and_not_saved(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"gives NaN in place of class images: .* --prior_generation_precision bf16"):
        generate(tmp_path, painter=Painter(value=np.nan))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_before_a_pipeline_is_loaded(tmp_path, monkeypatch) -> None:
    """Unless nothing has to be written."""
    folder = folder_of(tmp_path / "class", [(8, 8)] * 3)

    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    def never() -> None:
        raise AssertionError

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert generate_class_images(never, folder, PROMPT, 3, seed=0) == 0
    with pytest.raises(ValueError, match=r"class_data_dir .*class can't be written: Permission denied\. Name another"):
        generate_class_images(never, folder, PROMPT, 4, seed=0)


def test_a_full_disk_is_told(tmp_path, monkeypatch) -> None:
    def full(self: Image.Image, path: Path, **_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ValueError, match=r"class image .*class-3-00000\.png can't be written: No space left on device"):
        generate(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_true_pipeline_makes_them(tmp_path) -> None:
    """Files hold the pipeline's own pixels for the image's generator."""
    from nara_diffusion.dreambooth.seeding import torch_generator

    call = {"num_inference_steps": 2, "guidance_scale": 3.0}
    assert generate_class_images(small_sdxl, tmp_path, PROMPT, 2, seed=1, batch_size=1, progress=False, **call) == 2
    for number in range(2):
        generator = torch_generator(1, "class image", number)
        expected = small_sdxl()(prompt=[PROMPT], generator=[generator], **call).images[0]
        with Image.open(tmp_path / f"class-1-{number:05d}.png") as image:
            assert image.size == (16, 16)
            assert np.array_equal(np.asarray(image), np.asarray(expected))
