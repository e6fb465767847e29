"""--init_adapter from a NaRA of this script's own: the second run begins where the first one ended, core included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.small_pipelines import small_sdxl
from tests.train_scripts.dreambooth_runs import tiny_arguments, write_pictures
from train_scripts import dreambooth_sdxl

FILE = "pytorch_nara_weights.safetensors"
STILL = {"learning_rate": 1e-30, "core_learning_rate": 1e-30, "weight_decay": 0.0, "max_train_steps": 1}
"""A step by which no float32 changes."""


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of two large steps, its folder of pictures and its model."""
    folder = tmp_path_factory.mktemp("first")
    small_sdxl().save_pretrained(folder / "model")
    pictures = write_pictures(folder / "toy", 2)
    args = arguments(folder, "run", pictures, learning_rate=0.05, core_learning_rate=0.05, max_train_steps=2)
    dreambooth_sdxl.main(args)
    return folder, pictures


def arguments(folder: Path, name: str, pictures: Path, **changes: Any) -> Any:
    options = {"target_modules": ["to_q", "conv1"], "train_text_encoder": True, "curve_points": 1,
               "num_validation_images": 1, "seed": 3}  # fmt: skip
    return tiny_arguments(folder / "model", pictures, folder / name, **{**options, **changes})


@pytest.mark.parametrize("as_file", [False, True], ids=["folder", "file"])
def test_a_run_goes_on_from_its_own_nara_with_text_encoders(first, as_file):
    folder, pictures = first
    path = folder / "run" / FILE if as_file else folder / "run"
    name = f"again-{as_file}"
    dreambooth_sdxl.main(arguments(folder, name, pictures, init_adapter=str(path), seed=8, **STILL))
    given, held = (load_file(folder / each / FILE) for each in ("run", name))
    assert held.keys() == given.keys()
    assert {key.partition(".")[0] for key in given} == {"unet", "text_encoder", "text_encoder_2"}
    for key, tensor in given.items():
        torch.testing.assert_close(held[key], tensor, rtol=0, atol=1e-12)
    dreambooth_sdxl.main(arguments(folder, f"fresh-{as_file}", pictures, seed=8, **STILL))
    fresh = load_file(folder / f"fresh-{as_file}" / FILE)
    changed = [key for key, tensor in given.items() if not torch.allclose(fresh[key], tensor, atol=1e-6)]
    assert {key.split(".")[1] == "nara_core" for key in changed} == {True, False}
    assert "unet.nara_core.shared.embeddings.noise_level.frequencies" in changed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"core_sharing": "layer"}, "has core_sharing 'global', this run 'layer': give --core_sharing"),
        ({"rank": 2}, "has rank 3 and scale"),
        ({"train_text_encoder": False}, "but this run trains unet"),
        ({"adapter": "lora", "core_hidden_dims": [256, 512]}, "is a NaRA with core_type 'hypernetwork'"),
    ],
)
def test_flags_that_disagree_with_the_file_are_refused(first, flags, message):
    folder, pictures = first
    with pytest.raises(ValueError, match=message):
        dreambooth_sdxl.main(arguments(folder, "refused", pictures, init_adapter=str(folder / "run"), **STILL | flags))


@pytest.fixture(scope="module")
def to_v(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Arguments of conversions to v, of NaRAs and LoRAs; a run of each is done."""
    folder = tmp_path_factory.mktemp("to_v")
    small_sdxl().save_pretrained(folder / "model")
    pictures = write_pictures(folder / "toy", 2)
    plain = {"train_text_encoder": False, "lora_alpha": 5.0, **STILL}

    def to_v(name: str, adapter: str, **changes: Any) -> Any:
        own = {} if adapter == "nara" else {"core_hidden_dims": [256, 512], "core_learning_rate": None}
        given = {"adapter": adapter, "prediction_type": "v_prediction", **plain, **own, **changes}
        return arguments(folder, name, pictures, **given)

    for adapter in ("nara", "lora"):
        dreambooth_sdxl.main(to_v(adapter, adapter))
    return to_v


@pytest.mark.parametrize("adapter", ["nara", "lora"])
def test_conversions_start_from_a_conversion_to_the_same(to_v, adapter):
    start = to_v("lora", "lora").output_dir
    dreambooth_sdxl.main(to_v(f"{adapter}-again", adapter, init_adapter=start))


@pytest.mark.parametrize("start", ["nara", "lora"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"prediction_type": None},
            "was trained for v_prediction, this run is for what the base predicts: give",
        ),
        ({"prediction_type": "flow_prediction"}, "was trained for v_prediction, this run is for flow_prediction"),
        (
            {"rescale_betas_zero_snr": True},
            "was trained for v_prediction, this run is for v_prediction on zero terminal SNR",
        ),
    ],
)
def test_conversions_to_another_prediction_than_the_files_are_refused(to_v, start, flags, message):
    given = to_v(start, start).output_dir
    with pytest.raises(ValueError, match=message):
        dreambooth_sdxl.main(to_v("refused", start, init_adapter=given, **flags))
