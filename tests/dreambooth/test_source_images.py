"""Pairs of images: from metadata.jsonl or a second folder, those that don't match, and how sources are cut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from nara_diffusion.dreambooth.dataset import DreamBoothDataset, source_sizes
from nara_diffusion.dreambooth.flow_families import FLUX, FLUX2, FLUX_KONTEXT
from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments, folder_arguments
from nara_diffusion.dreambooth.image_plan import planned_sources
from nara_diffusion.dreambooth.source_images import records_from_folder
from tests.dreambooth.pictures import folder_of, noise


def lines(folder: Path, *rows: dict[str, Any]) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def pairs_of(folder: Path, source_folder: Path | None = None, most: int = 2) -> dict[str, list[str]]:
    records = records_from_folder(folder, source_folder=source_folder, most=most, prompt="make it red", progress=False)
    return {Path(record.name).name: [Path(source.name).name for source in record.sources] for record in records}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, and two sources in a folder below."""
    folder_of(tmp_path / "images" / "source", [(10, 12), (14, 8)])
    return folder_of(tmp_path / "images", [(20, 24), (28, 16), (20, 24)])


def test_metadata_names_one_or_several_sources(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A source in the folder itself isn't an image to learn."""
    several = ["source/01.png", "02.png"]
    lines(
        folder,
        {"file_name": "01.png", "text": "a cube", "source": several},
        {"file_name": "00.png", "source": "source/00.png", "text": None},
    )
    assert pairs_of(folder) == {"00.png": ["00.png"], "01.png": ["01.png", "02.png"]}
    records = records_from_folder(folder, most=2, prompt="make it red", progress=False)
    assert [record.prompt for record in records] == ["make it red", "a cube"]
    assert [source.size for source in records[1].sources] == [(8, 14), (24, 20)]
    assert len({source.key for record in records for source in record.sources}) == 3
    assert "ignored" not in caplog.text


def test_folders_are_paired_by_equal_names(folder: Path, tmp_path: Path) -> None:
    sources = folder_of(tmp_path / "before", [(9, 9)] * 2)
    noise(9, 9).save(sources / "02.bmp")
    assert pairs_of(folder, sources) == {"00.png": ["00.png"], "01.png": ["01.png"], "02.png": ["02.bmp"]}


def test_folder_without_sources_has_images_only(folder: Path) -> None:
    assert pairs_of(folder) == {"00.png": [], "01.png": [], "02.png": []}


def test_pairs_that_do_not_match_are_refused(folder: Path, tmp_path: Path) -> None:
    sources = folder_of(tmp_path / "before", [(9, 9)] * 2)

    def refused(message: str, source_folder: Path | None = None, most: int = 1) -> None:
        with pytest.raises(ValueError, match=message) as error:
            pairs_of(folder, source_folder, most)
        assert "\n" not in str(error.value)

    refused(r"1 of 3 images in .* have no source \('02.png'\): add their sources", sources)
    noise(9, 9).save(sources / "02.bmp")
    noise(9, 9).save(sources / "07.png")
    refused(r"files without an image of the same name \('07.png'\): remove them", sources)
    noise(9, 9).save(sources / "01.bmp")
    refused(r"two images named '01' \(01.bmp, 01.png\)", sources)
    row = {"file_name": "00.png", "text": "a"}
    for wrong in ("source/07.png", 3, ["source/00.png", None]):
        lines(folder, row | {"source": wrong})
        refused("metadata.jsonl, line 1: there is no source")
    lines(folder, row | {"source": "source/00.png"})
    refused(r"2 of 3 images in .* have no source \('01.png', '02.png'\)")
    lines(folder, row | {"source": ["source/00.png", "01.png", "02.png"]})
    refused("00.png has 3 sources, but the model takes 2: name fewer", most=2)
    (sources / "01.bmp").unlink()
    (sources / "07.png").unlink()
    refused("00.png has 1 sources, but the model takes 0: name fewer", sources, most=0)


def test_broken_source_is_named(folder: Path) -> None:
    (folder / "source" / "00.png").write_bytes(b"x")
    lines(folder, {"file_name": "00.png", "text": "a", "source": ["source/00.png", "01.png", "02.png"]})
    with pytest.raises(ValueError, match=r"1 of 3 images can't be used:\n.*source/00.png can't be decoded"):
        pairs_of(folder, most=3)


def test_plan_has_the_most_sources_of_an_image(folder: Path, tmp_path: Path) -> None:
    """Those in metadata.jsonl or one of a second folder, which may be missing, since a plan needs no data."""
    row = {"file_name": "00.png", "text": "a", "source": ["01.png", "02.png"]}
    lines(folder, row, row | {"file_name": "01.png", "source": "02.png"})
    (tmp_path / "data.yaml").write_text("- instance_data_dir: missing\n  source_data_dir: before\n")
    choices: list[dict[str, Any]] = [
        {"instance_data_dir": "missing"},
        {"dataset_config": str(tmp_path / "data.yaml")},
        {"instance_data_dir": str(folder)},
    ]
    numbers = []
    for family in (FLUX, FLUX2, FLUX_KONTEXT):
        for flags in choices:
            args = DreamBoothArguments(pretrained_model_name_or_path="none", **flags)
            numbers.append(planned_sources(folder_arguments(args), family))
    assert numbers == [0, 0, 0, 0, 1, 2, 1, 1, 2]


# ---------------------------------------------------------------------- samples


def paired(tmp_path: Path, sources: list[tuple[int, int]], **options: Any) -> DreamBoothDataset:
    """Images of 20 × 30 (w × h), the i-th with a source of this (width, height)."""
    folder = folder_of(tmp_path / "images", [(20, 30)] * len(sources))
    source_folder = folder_of(tmp_path / "sources", sources)
    records = records_from_folder(folder, source_folder=source_folder, most=1, prompt="red", progress=False)
    return DreamBoothDataset(records, [(16, 16)], batch_size=2, seed=3, crop="random", **options)


def test_source_of_same_proportions_is_cut_alike(tmp_path: Path) -> None:
    data = paired(tmp_path, [(20, 30), (40, 60)], flip=True)
    samples = [data.samples_at(position)[0] for position in range(12)]
    assert {sample.flip for sample in samples} == {True, False}
    for sample in samples:
        assert (sample.top, sample.left) == (4, 0)
        (source,) = sample.image.sources
        assert sample.source_sizes == ((16, 16),)
        (image,) = sample.source_images()
        expected = replace(sample, image=source).pixel_values()  # of an image of its own, cut at the same place
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(pixels, expected)


def test_source_of_other_proportions_stays_whole(tmp_path: Path) -> None:
    """It is mirrored with its image, and all sources of a batch have one size."""
    data = paired(tmp_path, [(20, 30), (64, 16), (30, 20), (32, 8)], flip=True)
    sizes = [source_sizes(image, (16, 16)) for image in data.instances]
    assert sizes == [((16, 16),), ((8, 32),), ((13, 20),), ((8, 32),)]
    for position in range(0, 16, 2):
        pair = [data.samples_at(place)[0] for place in (position, position + 1)]
        assert pair[0].source_sizes == pair[1].source_sizes
        for sample in pair:
            if sample.source_sizes == ((13, 20),):
                whole = sample.image.sources[0].load().resize((20, 13), Image.Resampling.LANCZOS)
                assert sample.source_images() == [ImageOps.mirror(whole) if sample.flip else whole]


def test_equal_images_have_own_sources_in_caches(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "images", [(16, 16)])
    (folder / "copy.png").write_bytes((folder / "00.png").read_bytes())
    sources = folder_of(tmp_path / "sources", [(16, 16)] * 2)
    (sources / "01.png").rename(sources / "copy.png")
    records = records_from_folder(folder, source_folder=sources, most=1, prompt="red", progress=False)
    first, second = DreamBoothDataset(records, [(16, 16)], batch_size=1, seed=0).plain_samples()
    assert first.key == second.key
    assert first.source_keys != second.source_keys


def test_captions_of_pairs_get_the_trigger(folder: Path) -> None:
    lines(folder, {"file_name": "00.png", "text": "make it [trigger]", "source": ["01.png", "02.png"]})
    (record,) = records_from_folder(folder, most=2, trigger="sks", progress=False)
    assert record.prompt == "make it sks"
