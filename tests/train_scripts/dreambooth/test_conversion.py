"""--prediction_type and --rescale_betas_zero_snr: the model learns it, and its file brings what samples it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from tests.train_scripts.dreambooth_runs import WEIGHTS, by_the_card, run_pixels, tiny_arguments, written
from train_scripts.dreambooth_sdxl import main

KINDS: dict[str, dict[str, Any]] = {
    "v": {"prediction_type": "v_prediction"},
    "zero_snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_gamma": 5.0},
    "flow": {"prediction_type": "flow_prediction", "train_text_encoder": True},
}


@pytest.fixture
def captioned(pictures: Path, tmp_path: Path) -> Path:
    """The pictures with a caption each, in metadata.jsonl."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    lines = []
    for path in sorted(pictures.glob("*.png")):
        (folder / path.name).write_bytes(path.read_bytes())
        lines.append(json.dumps({"file_name": path.name, "text": f"a red toy {path.stem}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def arguments(sdxl_folder: Path, captioned: Path, tmp_path: Path) -> Callable[..., DreamBoothArguments]:
    few = {"num_validation_images": 1, "instance_prompt": None, "max_train_steps": 6, "validation_steps": 3}
    return lambda **changes: tiny_arguments(sdxl_folder, captioned, tmp_path / "run", **{**few, **changes})


def check_pixels(args: DreamBoothArguments) -> Any:
    """The written samples are the base's with its own scheduler, and those of a pipeline loaded as the card says."""
    folder = Path(args.output_dir)
    base = StableDiffusionXLPipeline.from_pretrained(args.pretrained_model_name_or_path, dtype=torch.float32)
    base.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(run_pixels(base, args), written(folder / "samples-before"))
    loaded = by_the_card(folder)
    np.testing.assert_array_equal(run_pixels(loaded, args), written(folder / "samples-after"))
    return loaded


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversion_lowers_its_loss_and_loads_with_its_scheduler(arguments, kind: str) -> None:
    args = arguments(**KINDS[kind])
    results = main(args)
    assert results["validation_loss_after"] < results["validation_loss_before"]
    pipe = check_pixels(args)
    assert pipe.scheduler.config.prediction_type == args.prediction_type
    convention = "flow" if kind == "flow" else "timestep"
    assert pipe.unet.peft_config["default_0"].noise_convention == convention
    pipe.unload_nara_weights()
    np.testing.assert_array_equal(run_pixels(pipe, args), written(Path(args.output_dir) / "samples-before"))
    if kind == "flow":  # λ = σ = (i + 1) / 1000 in the middle of each third of the schedule
        assert results["noise_levels"] == pytest.approx([0.167, 0.501, 0.834])
    assert "brings the old one back" in (Path(args.output_dir) / "README.md").read_text()


def test_a_resumed_conversion_ends_alike(arguments) -> None:
    args = arguments(**KINDS["flow"], checkpointing_steps=4, validation_steps=None)
    main(args)
    folder = Path(args.output_dir)
    whole = load_file(folder / WEIGHTS)
    changes = {"checkpointing_steps": 4, "validation_steps": None}
    main(arguments(**KINDS["flow"], **changes, resume_from_checkpoint=str(folder / "checkpoint-4")))
    resumed = load_file(folder / WEIGHTS)
    assert whole.keys() == resumed.keys()
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, rtol=0, atol=0)
    with pytest.raises(ValueError, match="prediction_type"):
        main(arguments(**changes, resume_from_checkpoint=str(folder / "checkpoint-4")))


@pytest.mark.parametrize("adapter", ["lora", "full", "hira"])
def test_other_methods_leave_their_scheduler_beside_the_weights(arguments, adapter: str) -> None:
    changes = {"core_hidden_dims": [256, 512], **({} if adapter == "lora" else {"lora_alpha": None})}
    args = arguments(adapter=adapter, prediction_type="flow_prediction", **changes)
    main(args)
    check_pixels(args)
    assert (Path(args.output_dir) / "scheduler" / "scheduler_config.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rescale_betas_zero_snr": True}, "predict ε: .* add --prediction_type v_pred"),
        ({"prediction_type": "flow_prediction", "rescale_betas_zero_snr": True}, "leave it out"),
        ({"prediction_type": "flow_prediction", "do_edm_style_training": True}, "leave one of them out"),
        ({"prediction_type": "v_prediction", "max_noise_level": 0.5}, "converted at some noise levels alone"),
        ({"prediction_type": "sample"}, "prediction_type is 'sample', expected one of"),
    ],
)
def test_what_makes_no_sense_is_refused_before_training(arguments, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(arguments(**changes))
