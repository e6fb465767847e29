"""Flags of dreambooth.py that no other test would miss."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from nara_diffusion.dreambooth import pipelines, subject, train
from nara_diffusion.dreambooth.draws import drawable_levels
from nara_diffusion.dreambooth.families import SD3
from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments, run_family
from nara_diffusion.dreambooth.pipelines import load_base
from nara_diffusion.dreambooth.training_step import TrainingStep, training_step
from nara_diffusion.training.optimization import build_optimizer
from tests.acceptance._runs import ASSETS, image_arguments, image_flags
from tests.helpers.small_pipelines import small_flux, small_sd3, small_sdxl


def arguments(**flags: Any) -> DreamBoothArguments:
    return DreamBoothArguments(**{"pretrained_model_name_or_path": "none", "instance_data_dir": "none"} | flags)


def test_family_uses_lengths_and_guidance_of_flags() -> None:
    pipe = small_flux()
    family = run_family(arguments(max_sequence_length=7, training_guidance_scale=2.5), pipe)
    assert (family.max_sequence_length, family.guidance) == (7, 2.5)
    default = run_family(arguments(), pipe)
    assert default.guidance != 2.5
    with pytest.raises(ValueError, match=r"training_guidance_scale is 2\.5, but Stable Diffusion 3"):
        run_family(arguments(training_guidance_scale=2.5), small_sd3())


def step_of(**flags: Any) -> TrainingStep:
    pipe: Any = SimpleNamespace(transformer=None, unet=None, vae=None, scheduler=small_sd3().scheduler)
    return training_step(arguments(train_text_encoder=True, **flags), pipe, SD3, torch.device("cpu"), 2, 2)


def test_training_step_has_each_flag() -> None:
    flags = {"stratified_timesteps": True, "noise_offset": 0.1, "prior_loss_weight": 0.4, "seed": 3}
    step = step_of(**flags)
    assert [step.stratified, step.noise_offset, step.prior_loss_weight, step.seed] == list(flags.values())
    assert step_of(flow_shift=5.0).objective.q[499].item() == pytest.approx(5 * 0.5 / (1 + 4 * 0.5))
    weighted = step_of(weighting_scheme="sigma_sqrt").objective
    torch.testing.assert_close(weighted.weight, weighted.q.float() ** -2)


@pytest.mark.parametrize(
    ("scheme", "flags"),
    [("logit_normal", {"logit_mean": 1.0}), ("logit_normal", {"logit_std": 0.3}), ("mode", {"mode_scale": 0.5})],
)
def test_levels_are_drawn_as_flags_say(scheme: str, flags: dict[str, Any]) -> None:
    step = step_of(weighting_scheme=scheme, **flags)
    expected = drawable_levels(step.objective.noise_levels, scheme=scheme, **flags)
    default = drawable_levels(step.objective.noise_levels, scheme=scheme)
    assert torch.equal(step.drawable, expected)
    assert not torch.equal(expected, default)


def test_text_encoders_have_their_own_rate() -> None:
    model = nn.ModuleDict({"unet": nn.Linear(2, 3), "text_encoder": nn.Linear(3, 2)})
    flags: dict[str, Any] = {"train_text_encoder": True, "learning_rate": 0.02, "text_encoder_lr": 0.01}
    rates = {group["name"]: group["lr"] for group in build_optimizer(model, arguments(**flags)).param_groups}
    assert rates == {"adapter": 0.02, "text_encoder": 0.01}
    del flags["text_encoder_lr"]
    rates = {group["name"]: group["lr"] for group in build_optimizer(model, arguments(**flags)).param_groups}
    assert rates == {"adapter": 0.02, "text_encoder": 0.02}


def test_class_images_are_made_as_flags_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def make(pipe: Any, folder: str, prompt: str, count: int, **options: Any) -> None:
        calls.extend([folder, prompt, count, options["batch_size"]])
        raise ArithmeticError

    monkeypatch.setattr(subject, "generate_class_images", make)
    values = {"class_data_dir": "toys", "class_prompt": "a toy", "num_class_images": 7, "sample_batch_size": 3}
    flags = image_flags(tmp_path, small_sdxl())
    with pytest.raises(ArithmeticError):
        train.main(image_arguments(flags, tmp_path / "run", **values))
    assert calls == list(values.values())


def test_captions_are_read_from_the_flags_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def read(folder: str, **options: Any) -> None:
        calls.append((folder, options["prompt"], options["caption_column"]))
        raise ArithmeticError

    monkeypatch.setattr(subject, "records_from_folder", read)
    flags = {"pretrained_model_name_or_path": str(ASSETS / "sd-tiny-flow"), "output_dir": str(tmp_path / "out")}
    with pytest.raises(ArithmeticError):
        train.main(arguments(**flags, instance_data_dir="toys", instance_prompt="a toy", caption_column="said"))
    assert calls == [("toys", "a toy", "said")]


def test_base_is_loaded_by_its_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def load(name: str, **options: Any) -> None:
        calls.append(options)
        raise ArithmeticError

    monkeypatch.setattr(pipelines, "load_pipeline", load)
    args = arguments(revision="v2", variant="fp16", pretrained_vae_model_name_or_path="vae", load_in_8bit=True)
    device = torch.device("cpu")
    run: Any = SimpleNamespace(dtype=torch.float32, accelerator=SimpleNamespace(device=device))
    with pytest.raises(ArithmeticError):
        load_base(args, run)
    files = {"vae_name": "vae", "revision": "v2", "variant": "fp16"}
    assert calls == [{"dtype": torch.float32, "bits": 8, "device": device, **files}]


@pytest.mark.parametrize(
    "steps", [{}, {"distill_to": 2, "instance_data_dir": None, "instance_prompt": "a toy"}], ids=str
)
def test_engines_that_shard_are_refused_before_loading(steps: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = SimpleNamespace(accelerator=SimpleNamespace(distributed_type=DistributedType.FSDP))
    monkeypatch.setattr(train, "start_run", lambda *_: nullcontext(run))
    with pytest.raises(ValueError, match=r"FSDP splits the model .* Launch with --multi_gpu"):
        train.main(arguments(**steps))
