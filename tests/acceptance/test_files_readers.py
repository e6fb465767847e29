"""Readers that have no base model refuse a damaged file, by its name, and write nothing.

`inspect` meets each damage; of the others, which read by the same check, each meets every third.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.acceptance import test_files_refused as broken
from tests.acceptance._comfyui import comfyui
from tests.acceptance._files import nara
from tests.acceptance.test_files_refused import GOOD, WEIGHTS, Break, alter, fields

Reader = Callable[[Path, Path], Any]
"""Reads the adapter in the first folder, and writes to the second path."""


def by_comfyui(folder: Path, out: Path) -> None:
    with comfyui(folder):
        from comfyui.adapter import LiveAdapter

        LiveAdapter(str(folder / WEIGHTS["pipeline"]), "sdxl")


OF_PIPELINES: dict[str, Reader] = {
    "inspect": lambda folder, out: nara("inspect", folder),
    "plot": lambda folder, out: nara("plot", folder, "--output", out / "core.png", "--points", 3),
    "fold": lambda folder, out: nara("fold", folder, out / "l.safetensors", "--noise_level", 0.5),
    "convert": lambda folder, out: nara("convert", folder, out, "--to", "peft", "--component", "unet"),
    "ComfyUI": by_comfyui,
}
OF_PEFT: dict[str, Reader] = {
    "inspect": OF_PIPELINES["inspect"],
    "fold": lambda folder, out: nara("fold", folder, out, "--noise_level", 0.5, "--form", "peft"),
    "convert": lambda folder, out: nara("convert", folder, out, "--to", "pipeline", "--component", "transformer"),
}
READERS = [("pipeline", name) for name in OF_PIPELINES] + [("peft", name) for name in OF_PEFT]


def without_tensors(form: str, path: Path) -> tuple[str, ...]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({}, path, metadata=metadata)
    return ("no A and B",)


TOLD_BY_BASE = {"A of another width", "B of another height", "layer missing", "layer too many", "another noise level"}
DAMAGES: dict[str, Break] = {
    **{row: damage for row, damage in broken.ROWS.items() if row not in TOLD_BY_BASE},
    "core of int8": alter("layers.1.weight", lambda W: W.to(torch.int8)),
    "core with infinity": alter("layers.1.weight", lambda W: W / 0),
    "B of another rank": alter("_proj.lora_B", lambda B: B[:, :1]),
    "complex factor": alter("lora_A", lambda A: A.to(torch.complex64)),
    "alpha that is no number": fields({"lora_alpha": float("nan")}, "lora_alpha"),
    "rank that is a text": fields({"r": "3"}, "r is '3'"),
    "no tensors": without_tensors,
}


def damages_of(form: str) -> dict[str, Break]:
    return {row: damage for row, damage in DAMAGES.items() if form == "pipeline" or row not in broken.OF_PIPELINES}


@pytest.mark.parametrize(("form", "reader"), READERS)
def test_every_damage_is_refused_without_a_base(form: str, reader: str, tmp_path: Path) -> None:
    read, out = (OF_PIPELINES if form == "pipeline" else OF_PEFT)[reader], tmp_path / "out"
    first, step = (0, 1) if reader == "inspect" else (READERS.index((form, reader)) % 3, 3)
    for number, (row, damage) in list(enumerate(damages_of(form).items()))[first::step]:
        folder = Path(shutil.copytree(GOOD[form], tmp_path / str(number)))
        parts = damage(form, folder / WEIGHTS[form])
        with pytest.raises((ValueError, SystemExit)) as caught:
            read(folder, out)
        assert all(part in str(caught.value) for part in (str(folder), *parts)), (row, parts, str(caught.value))
        assert not out.exists(), row
    read(GOOD[form], out)
