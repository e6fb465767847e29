"""docs/strength.md says what the code does: its programs run, in the order in which they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from nara_diffusion import StrengthSchedule
from tests.helpers.adapted import TwoLayers
from tests.loaders.adapters import trained
from tests.strength.models import adapted_by

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "strength.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # PEFT, at the second adapter
def test_the_programs_of_the_page_run():
    schedules, diffusers, peft = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {"torch": torch}
    exec(schedules, names)
    assert torch.equal(names["window"]([0.19, 0.2, 0.59, 0.6]), torch.tensor([0.0, 1.0, 1.0, 0.0]))
    assert isinstance(names["falling"], StrengthSchedule)
    pipe = trained(name="toy", text=False, core_type="identity")
    names["pipe"] = trained(pipe, name="style", text=False)
    exec(diffusers, names)
    assert pipe.unet.nara_core.strengths == {}
    names |= {"model": adapted_by("LoRA", TwoLayers(), target_modules=["first"]), "x": torch.randn(2, 7)}
    exec(peft, names)
    assert not hasattr(names["model"].base_model.model, "nara_core")
