"""Adapters, optimizers, options and schedules of train_scripts/dreambooth_sdxl.py: each lowers the validation loss."""

from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file

from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from tests.train_scripts.dreambooth_runs import WEIGHTS, loaded_pipeline, tiny_arguments
from train_scripts.dreambooth_sdxl import main


@pytest.fixture
def arguments(sdxl_folder: Path, pictures: Path, tmp_path: Path) -> Callable[..., DreamBoothArguments]:
    """Arguments of a run of a few seconds; keyword arguments change them."""
    return lambda **changes: tiny_arguments(
        sdxl_folder, pictures, Path(changes.pop("output_dir", tmp_path / "run")), **changes
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True, "train_text_encoder": True, "gradient_checkpointing": True},
        {"core_type": "constant", "center_crop": True},
        {"core_type": "identity"},
        {"core_sharing": "layer", "noise_embedding": "mlp", "target_modules": ["to_k", "to_v", "ff.net.2"]},
        {"core_start_step": 2, "aspect_ratio_buckets": "16,16;24,16", "crops_per_image": None},
        {"optimizer": "prodigy", "learning_rate": 1.0, "core_learning_rate": None},
        {"use_8bit_adam": True, "weight_decay": 0.01},
        {"optimizer": "adafactor", "weight_decay": 0.01, "train_text_encoder": True},
    ],
    ids=lambda changes: ",".join(f"{name}={value}" for name, value in list(changes.items())[:2]),
)
def test_variants_train(arguments, changes: dict) -> None:
    if changes.get("optimizer") == "prodigy":
        pytest.importorskip("prodigyopt")
    if "use_8bit_adam" in changes:
        pytest.importorskip("bitsandbytes")
    args = arguments(num_validation_images=1, **changes)
    results = main(args)
    assert results["validation_loss_after"] < results["validation_loss_before"]
    assert any("magnitude" in name for name in load_file(Path(args.output_dir) / WEIGHTS)) is args.use_dora


@pytest.mark.parametrize(
    ("scheduler", "convention", "levels"),
    [
        (
            EulerDiscreteScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear"),
            "timestep",
            (0.166, 0.833),
        ),
        # 0.002 to 80 in Karras' 1001 steps: λ = σ / (1 + σ) of the 167th and the 834th from below
        (EDMEulerScheduler(), "edm", None),
    ],
    ids=["v_prediction", "edm"],
)
def test_other_schedules(arguments, sdxl_folder, tmp_path, scheduler, convention: str, levels) -> None:
    folder = tmp_path / "model"
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    pipe.scheduler = scheduler
    pipe.save_pretrained(folder)
    args = arguments(pretrained_model_name_or_path=str(folder), num_validation_images=1)
    results = main(args)
    loaded = loaded_pipeline(args)
    assert loaded.unet.peft_config["default_0"].noise_convention == convention
    if levels is None:
        sigma = EDMEulerScheduler().sigmas.flip(0)[1:][[166, 834]]
        levels = (sigma / (1 + sigma)).tolist()
    assert [results["noise_levels"][i] for i in (0, 2)] == pytest.approx(levels, abs=2e-3)
    assert results["validation_loss_after"] < results["validation_loss_before"]
