"""An adapter's file says whether samples or parts of samples had a λ each in training; the other use warns.

b, k, l, d_in and d_out are 3, 4, 20, 7 and 5.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from nara_diffusion import noise_level
from tests.helpers.adapted import OneLayer, adapted

SAMPLES, LENGTH = 3, 20
LEVELS = torch.tensor([[0.9, 0.1, 0.4, 0.7], [0.2, 0.6, 0.0, 1.0], [0.3, 0.8, 0.5, 0.15]])


@pytest.mark.parametrize(("trained", "level"), [("sample", LEVELS[:, 0]), ("part", LEVELS), ("part", LEVELS[:, :1])])
def test_file_says_whether_samples_or_parts_had_a_level_in_training_and_the_other_use_warns_once(
    tmp_path: Path, trained: str, level: Tensor
) -> None:
    model, x = adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"]), torch.randn(SAMPLES, LENGTH, 7)
    with noise_level(model, level):
        model(x)
    assert model.peft_config["default"].noise_level_per is None  # no training
    model.train()
    with noise_level(model, level):
        model(x)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(OneLayer(nn.Linear(7, 5)), str(tmp_path))
    assert loaded.peft_config["default"].noise_level_per == trained
    for same in (level, 0.5):  # one number for all is no other use
        with noise_level(loaded, same):
            loaded(x)
    other = LEVELS if trained == "sample" else LEVELS[:, 0]
    with noise_level(loaded, other):
        with pytest.warns(UserWarning, match="trained with λ for each " + trained) as warned:
            loaded(x)
        loaded(x)
    assert len(warned) == 1
    assert loaded.peft_config["default"].noise_level_per == trained


def test_training_with_both_counts_as_training_with_parts() -> None:
    model, x = adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"]).train(), torch.randn(SAMPLES, LENGTH, 7)
    with noise_level(model, LEVELS[:, 0]):
        model(x)
    with noise_level(model, LEVELS), pytest.warns(UserWarning, match="for each sample, and this forward"):
        model(x)
    with noise_level(model, LEVELS[:, 0]):
        model(x)
    assert model.peft_config["default"].noise_level_per == "part"
