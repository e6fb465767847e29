"""--adapter in train_scripts/dreambooth_sdxl.py: what each method leaves is what a pipeline loads; resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from nara_diffusion.training.adapters.methods import METHODS
from nara_diffusion.training.arguments.cli import parse_arguments
from tests.train_scripts.dreambooth_runs import by_the_card, run_pixels, tiny_arguments, written
from train_scripts.dreambooth_sdxl import SHIPPED_RUN, main, shipped_run

FEW = {"checkpointing_steps": 2, "num_validation_images": 1, "curve_points": 1, "max_train_steps": 3}
# directions are dropped at steps 2 and 3 of 3, the second after a resume
SHIPPED: list[str] = SHIPPED_RUN["target_modules"]
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": SHIPPED},
    "dora": {"target_modules": SHIPPED},
    "adalora": {"adapter_options": ["tinit=1", "tfinal=1", "deltaT=1", "init_r=5"]},
    "oft": {"adapter_options": ["oft_block_size=4"], "lora_alpha": None},
    "hira": {"lora_alpha": None},
    "vera": {"lora_alpha": None, "learning_rate": 0.1},
    "full": {"lora_alpha": None, "learning_rate": 1e-3, "mixed_precision": "bf16"},
    "multi_lora": {"core_bins": 2},
    "pissa": {"use_rslora": True},
}
RESUMED = ("vera", "full", "tlora")
ELSEWHERE = ("pissa", "adalora", "nara", "nara_dora", "nara_c", "nara_knots", "rslora", "prompt_tuning", "p_tuning")
WITH_ENCODERS = ("multi_lora", "dora", "adalora", "full")


@pytest.fixture
def arguments(sdxl_folder: Path, pictures: Path, tmp_path: Path) -> Callable[..., DreamBoothArguments]:
    def make(adapter: str, **changes: Any) -> DreamBoothArguments:
        core = {} if METHODS[adapter].family == "nara" else {"core_hidden_dims": [256, 512]}
        values = {**FEW, "adapter": adapter, "train_text_encoder": adapter in WITH_ENCODERS, **core}
        return tiny_arguments(
            sdxl_folder, pictures, tmp_path / "run", **{**values, **OPTIONS.get(adapter, {}), **changes}
        )

    return make


def files(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The weights in `folder`, without those of checkpoints."""
    found = (path for path in folder.rglob("*.safetensors") if "checkpoint" not in str(path.relative_to(folder)))
    return {str(path.relative_to(folder)): load_file(path) for path in found}


# PEFT 0.21 takes the names in AdaLoRA's own rank_pattern for those of modules
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("adapter", [name for name in METHODS if name not in ELSEWHERE])
def test_what_is_saved_gives_the_run_s_pixels_and_a_resumed_run_ends_alike(arguments, adapter: str) -> None:
    args = arguments(adapter)
    results = main(args)
    folder = Path(args.output_dir)
    assert results["validation_loss_after"] != results["validation_loss_before"]
    base = StableDiffusionXLPipeline.from_pretrained(
        args.pretrained_model_name_or_path, dtype=torch.bfloat16 if args.mixed_precision else torch.float32
    )
    base.set_progress_bar_config(disable=True)
    before, after = (written(folder / f"samples-{when}") for when in ("before", "after"))
    np.testing.assert_array_equal(run_pixels(base, args), before)
    np.testing.assert_array_equal(run_pixels(by_the_card(folder), args), after)
    assert any((old != new).any() for old, new in zip(before, after, strict=True))
    if adapter not in RESUMED:
        return
    whole = files(folder)
    main(arguments(adapter, resume_from_checkpoint=str(folder / "checkpoint-2")))
    resumed = files(folder)
    assert whole.keys() == resumed.keys() != set()
    for name, tensors in whole.items():
        assert tensors.keys() == resumed[name].keys()
        for key, value in tensors.items():
            torch.testing.assert_close(resumed[name][key], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("adapter", "convolutions"), [("vera", False), ("pissa", False), ("lora", True), ("nara", True)]
)
def test_the_shipped_run_adapts_convolutions_where_the_method_can(adapter: str, convolutions: bool) -> None:
    args = parse_arguments(DreamBoothArguments, ["--adapter", adapter], stand_in=shipped_run)
    assert ("conv1" in args.target_modules) is convolutions
    assert {"to_q", "ff.net.2", "proj_out"} < set(args.target_modules)
