"""Options of train_scripts/dreambooth_sdxl.py: what is refused, and that a resumed run ends with the same bits."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from tests.train_scripts.dreambooth_runs import WEIGHTS, tiny_arguments, write_pictures
from train_scripts.dreambooth_sdxl import main

RANGE = {"timestep_bias_strategy": "range", "timestep_bias_multiplier": 3.0}
LATER = {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 3.0}


@pytest.fixture
def arguments(sdxl_folder: Path, pictures: Path, tmp_path: Path) -> Callable[..., DreamBoothArguments]:
    """Arguments of a run of a few seconds, with one sample; keyword arguments change them."""
    defaults = {"validation_prompts": ["a toy"], "num_validation_images": 1, "curve_points": 1}
    return lambda **changes: tiny_arguments(
        sdxl_folder,
        Path(changes.pop("instance_data_dir", pictures)),
        Path(changes.pop("output_dir", tmp_path / "run")),
        **{**defaults, **changes},
    )


@pytest.fixture
def tagged(tmp_path: Path) -> Path:
    """Three pictures with tags."""
    folder = write_pictures(tmp_path / "tagged", 3)
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"toy, red, on grass, {number}")
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_dropout": 1.5}, r"caption_dropout must be in \[0, 1\], a probability, got 1.5"),
        ({"loss_type": "l1"}, "loss_type must be one of l2, huber, smooth_l1, got l1"),
        ({"loss_type": "huber", "huber_c": 0.0}, "huber_c must be above 0, or none, got 0.0"),
        ({"huber_c": 0.2}, "huber_c is 0.2, but loss_type l2 has no c: give loss_type huber"),
        ({"timestep_bias_strategy": "late"}, "strategy must be one of none, earlier, later, range, got late"),
        ({"timestep_bias_strategy": "later"}, "timestep_bias_multiplier is 1, by which nothing changes"),
        ({"timestep_bias_multiplier": 2.0}, "multiplier is 2.0, which timestep_bias_strategy none doesn't read"),
        ({"timestep_bias_multiplier": 0.0}, "timestep_bias_multiplier must be above 0"),
        ({"timestep_bias_portion": 1.0}, "timestep_bias_portion must be between 0 and 1, or none, got 1.0"),
        ({**RANGE, "timestep_bias_portion": 0.5}, "timestep_bias_strategy range doesn't read: give earlier or later"),
        ({"timestep_bias_begin": 1}, "begin is 1, which timestep_bias_strategy none doesn't read: give range"),
        ({**RANGE, "timestep_bias_begin": -1}, "timestep_bias_begin must be at least 0, or none, got -1"),
        ({"optimizer": "adafactor", "adam_beta1": 0.5}, "adam_beta1 is 0.5, which optimizer adafactor doesn't read"),
        ({"optimizer": "adafactor", "use_8bit_adam": True}, "a form of AdamW, but the optimizer is adafactor"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_values_are_refused(arguments, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**RANGE, "timestep_bias_begin": 0, "timestep_bias_end": 1000}, r"before 1000, .* 1000, from 0: choose"),
        ({**RANGE, "timestep_bias_end": 1001}, "from 0 to before 1001, and the schedule has 1000"),
        ({**RANGE, "timestep_bias_begin": 700, "timestep_bias_end": 700}, "by timestep_bias_begin and"),
        ({**LATER, "timestep_bias_portion": 1e-4}, r"from 1000 to before 1000, .* by timestep_bias_portion"),
        ({**LATER, "max_noise_level": 0.5}, r"max_noise_level 0.5, and timestep_bias_strategy draws all .* alike"),
    ],
)
def test_a_bias_without_effect_is_refused_before_anything_is_written(arguments, tmp_path, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        main(arguments(**changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"caption_dropout": 0.3, "train_text_encoder": True},
        LATER,
        {"optimizer": "adafactor", "weight_decay": 0.01, "core_start_step": 1, "max_grad_norm": None},
        {"loss_type": "smooth_l1", "snr_gamma": 5.0, "max_noise_level": 0.5, "hold_base_outside": 1.0},
    ],
    ids=lambda options: " ".join(options),
)
def test_a_resumed_run_ends_with_the_same_bits(arguments, tagged, tmp_path, options: dict) -> None:
    common = {"instance_data_dir": tagged, "checkpointing_steps": 2, "validation_steps": 3, **options}
    main(arguments(**common))
    folder = tmp_path / "run"
    expected, losses = load_file(folder / WEIGHTS), metrics(folder)
    (folder / WEIGHTS).unlink()
    main(arguments(**common, resume_from_checkpoint=str(folder / "checkpoint-2")))
    resumed = load_file(folder / WEIGHTS)
    assert resumed.keys() == expected.keys() != set()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items())
    assert metrics(folder) == losses


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
