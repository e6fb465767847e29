"""Files that are whole or absent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nara_diffusion.utils.files import atomic_write, atomic_write_files


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_atomic_write_files_replaces_only_equal_names(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").write_text("stays")
    with atomic_write_files(tmp_path) as partial:
        (partial / "a").write_text("new")
        (partial / "inner").mkdir()
        (partial / "inner" / "c").write_text("too")
        assert (tmp_path / "a").read_text() == "old"
    assert content(tmp_path) == {"a": "new", "b": "stays", "inner/c": "too"}


def fill_folder(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "a").write_text(text)


@pytest.mark.parametrize(
    ("write", "fill"),
    [(atomic_write, Path.write_text), (atomic_write, fill_folder), (atomic_write_files, fill_folder)],
    ids=["file", "folder", "files"],
)
@pytest.mark.parametrize("is_there", [True, False])
def test_atomic_write_that_fails_leaves_what_was_there(
    write: Callable, fill: Callable, is_there: bool, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    if is_there:
        fill(place, "old")
    original = content(tmp_path)

    def write_half() -> None:
        with write(place) as partial:
            fill(partial, "half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left on device"):
        write_half()
    assert content(tmp_path) == original
    assert place.exists() == is_there


def test_atomic_write_replaces_a_whole_folder(tmp_path):
    fill_folder(tmp_path / "place", "old")
    with atomic_write(tmp_path / "place") as partial:
        partial.mkdir()
        (partial / "new").write_text("new")
    assert content(tmp_path) == {"place/new": "new"}
