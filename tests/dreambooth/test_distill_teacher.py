"""The teacher of --distill_to: its prompts, and what makes other trajectories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nara_diffusion.dreambooth import distill, train
from nara_diffusion.dreambooth.few_steps import sample_latents, student_sampler
from tests.acceptance._commands import run
from tests.acceptance._runs import COMMON
from tests.helpers.small_pipelines import small_sdxl

NO_CORE: dict[str, Any] = {"adapter": "dora", "core_learning_rate": None, "adapter_options": {}}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("model")
    small_sdxl().save_pretrained(folder)
    return COMMON | {
        "pretrained_model_name_or_path": folder,
        "distill_to": 2,
        "instance_prompt": "a photo of toy",
        "class_prompt": "red cube on grass",
        "trajectories": 12,
        "resolution": 16,
        "num_validation_images": 1,
        "num_inference_steps": 6,
        "guidance_scale": 3.0,
        "curve_points": 10,
        "max_train_steps": 1,
        **NO_CORE,
    }


def test_trajectories_are_the_teachers_for_their_prompts(
    flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, losses = small_sdxl(), []
    monkeypatch.setattr(
        train, "train", lambda run, parts, loss, validate: losses.extend([loss, validate.func.__self__.loss])
    )
    options = {"trajectories": 12, "trajectories_dir": str(tmp_path / "kept")}
    run("dreambooth_sdxl.py", **flags | options, output_dir=tmp_path / "out")
    (path,) = (tmp_path / "kept").iterdir()
    trajectories = load_file(path)["trajectories"]
    pipe.scheduler, _ = student_sampler(pipe.scheduler, 2, False)
    pipe.set_progress_bar_config(disable=True)
    prompts = [flags["instance_prompt"], flags["class_prompt"]] * 6
    call = {"num_inference_steps": 6, "guidance_scale": 3.0, "height": 16, "width": 16}
    expected = sample_latents(pipe, prompts, trajectories[:, 0], call)[:, ::3]
    torch.testing.assert_close(trajectories, expected, rtol=1e-3, atol=1e-3)
    training, held_out = losses
    assert torch.equal(torch.cat([training.trajectories, held_out.trajectories]), trajectories)
    assert [*training.prompts, *held_out.prompts] == prompts
    assert len(held_out.prompts) == 1
    card = (tmp_path / "out" / "README.md").read_text()
    lines = ["num_inference_steps=2", "guidance_scale=1.0", "pipe.scheduler = DDIMScheduler"]
    lines.append(f"pipe.load_lora_weights('{tmp_path / 'out'}')")
    for line in lines:
        assert line in card


@pytest.mark.slow
def test_card_of_another_adapter_kind_has_working_code(
    flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("dreambooth_sdxl.py", **flags | {"adapter": "loha", "output_dir": tmp_path})
    monkeypatch.chdir(tmp_path)
    card: dict[str, Any] = {}
    exec((tmp_path / "README.md").read_text().split("```python")[1].split("```")[0], card)
    assert type(card["pipe"].scheduler).__name__ == "DDIMScheduler"


class Named(Exception):
    """Carries the file of the trajectories."""


def test_every_setting_of_the_teacher_names_other_trajectories(
    flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def named(sample: Any, count: int, batch_size: int, path: Path, accelerator: Any) -> None:
        raise Named(path.name)

    monkeypatch.setattr(distill, "make_trajectories", named)
    changes: list[dict[str, Any]] = [
        {},
        {"rank": 2},
        {"guidance_scale": 2.0},
        {"seed": 1},
        {"resolution": 32},
        {"class_prompt": "a toy"},
    ]
    names = []
    for number, change in enumerate(changes):
        with pytest.raises(Named) as caught:
            run("dreambooth_sdxl.py", **flags | change, output_dir=tmp_path / str(number))
        names.append(str(caught.value))
    assert names[0] == names[1]  # the student's rank
    assert len(set(names[1:])) == len(names) - 1
