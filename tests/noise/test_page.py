"""docs/noise.md: its program runs, and its sizes are those of the published F."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from nara_diffusion.runtime import batch_rows as samples
from torch import nn

from nara_diffusion import NaraConfig
from nara_diffusion.cores.registry import build_core
from tests.helpers.adapted import TwoLayers, adapted

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "noise.md").read_text(encoding="utf-8")


def test_program_of_the_page_runs() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    found = {"model": adapted(TwoLayers(), target_modules=["first", "second"]), "x": torch.randn(3, 7)}
    exec(compile(program, "docs/noise.md", "exec"), found)
    assert found["level"].grad.abs().max() > 0


def test_multiplications_of_a_part_are_those_of_the_published_core() -> None:
    told = re.findall(r"([\d ]+) for r = (\d+)", PAGE.replace("\n", " "))
    assert len(told) == 2
    for number, rank in told:
        core = build_core(NaraConfig(r=int(rank)), int(rank))
        products = sum(layer.weight.numel() for layer in core.layers)  # type: ignore[union-attr]
        assert abs(products - int(number.replace(" ", ""))) < 500


def test_classes_that_the_page_names_are_those_that_are_known() -> None:
    for kind in samples._LENGTH_FIRST:
        model = next(
            name
            for name in ("Longformer", "LED", "XLNet", "FSMT", "MLCD", "Mask2Former", "OneFormer")
            if kind.startswith(name)
        )
        assert model in PAGE
    assert samples.rows_of(nn.Sequential(nn.Linear(2, 2)), "0") == "samples"
