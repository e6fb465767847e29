"""--plan of images: quantised bases, swapped blocks, models that take turns, and the files for cards."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import plan_runs
import pytest
import torch
from diffusers.quantizers.bitsandbytes import bnb_quantizer

from nara_diffusion.dreambooth import train as images
from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments
from nara_diffusion.dreambooth.image_plan import pipeline_on_meta, planned_image_step, rounded_weights
from nara_diffusion.dreambooth.pipelines import load_pipeline, modules_of
from nara_diffusion.training.plan import cheaper
from nara_diffusion.training.planned_step import nbytes, tensors_of
from tests.acceptance._runs import image_arguments, image_flags
from tests.helpers.pipelines.families import FAMILY_PIPELINES
from tests.helpers.plans import counted_run, save_configurations
from tests.helpers.small_pipelines import wide_flux

ROOT = Path(__file__).parents[2]
TRUE_SIZE = ROOT / "examples" / "assets" / "true_size"


@pytest.fixture
def _rounds_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bnb_quantizer.BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)


@pytest.mark.usefixtures("_rounds_without_a_gpu")
@pytest.mark.parametrize("name", ["flux", "qwen_image", "wan", "z_image"])
def test_plan_rounds_the_weights_that_a_run_rounds(name: str, tmp_path: Path) -> None:
    pipe = wide_flux() if name == "flux" else FAMILY_PIPELINES[name]()
    pipe.save_pretrained(tmp_path)
    args = DreamBoothArguments(pretrained_model_name_or_path=str(tmp_path), plan=1.0)
    planned = modules_of(pipeline_on_meta(args))
    real = modules_of(load_pipeline(str(tmp_path), dtype=torch.float32, bits=4, device=torch.device("cpu")))
    for part in real.keys() - {"vae", "text_encoder" if name == "flux" else ""}:
        weights = {id(weight) for weight in rounded_weights(planned[part])}
        names = {key for key, weight in planned[part].named_parameters() if id(weight) in weights}
        expected = {key for key, weight in real[part].named_parameters() if type(weight).__name__ == "Params4bit"}
        assert names == expected
        assert names


@pytest.mark.slow
@pytest.mark.usefixtures("_rounds_without_a_gpu")
def test_plan_agrees_with_a_quantised_swapped_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 5 %, with the weights that stay on the device, which the counter of the run leaves out.

    The plan adds what doesn't exist at one moment, so a run needs less.
    """
    flags = image_flags(tmp_path, wide_flux()) | {"max_train_steps": 1, "curve_points": 1, "checkpointing_steps": None}
    flags |= {"max_sequence_length": 12, "resolution": 96, "train_batch_size": 1, "gradient_checkpointing": True}
    args = image_arguments(flags, tmp_path / "out", load_in_4bit=True, block_swap=3)
    peak, states = counted_run(images, args, monkeypatch)
    step = planned_image_step(args)
    blocks = [
        sum(weight.numel() * step.packed.get(weight, weight.element_size()) for weight in block)
        for block in step.swapped
    ]
    at_once = max(one + other for one, other in itertools.pairwise(blocks))
    figures = images.main(replace(args, plan=math.inf))
    staying = figures["weights"] - at_once + figures["adapter"] + states
    assert figures["weights"] < figures["parts"]["transformer"]
    assert figures["peak"] == pytest.approx(staying + peak, rel=0.05)


@pytest.mark.slow
def test_plan_of_caching_counts_encoders_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without weights and data, in a folder that stays empty."""
    pipe = FAMILY_PIPELINES["sdxl"]()
    save_configurations(pipe, tmp_path / "model")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    args = DreamBoothArguments(pretrained_model_name_or_path=str(tmp_path / "model"), plan=math.inf, resolution=16)
    figures = images.main(args)
    assert list(Path().iterdir()) == []
    printed = capsys.readouterr().out
    assert f"{figures['trainable']:,} trainable parameters" in printed
    assert f"{figures['peak'] / 1e9:.2f} GB" in printed
    models = modules_of(pipe)
    for name, size in figures["parts"].items():
        assert size == pytest.approx(nbytes(tensors_of(models[name])), rel=1e-3)  # a NaRA has a buffer
    assert figures["weights"] == figures["parts"]["unet"]
    resident = figures["weights"] + figures["adapter"] + figures["optimizer"]
    assert figures["caching"] > resident + figures["parts"]["vae"]
    assert figures["peak"] == max(figures["caching"], resident + figures["activations"])


def test_cheaper_flags_of_images_end_with_swapped_blocks() -> None:
    args = DreamBoothArguments(pretrained_model_name_or_path="none", plan=8.0, train_batch_size=1)
    flags = [words for words, _ in cheaper(args, 57)]
    assert flags[:3] == ["--gradient_checkpointing", "--load_in_4bit", "--gradient_checkpointing --load_in_4bit"]
    assert "--gradient_checkpointing --load_in_4bit --block_swap 28" in flags
    assert flags[-1] == "--gradient_checkpointing --load_in_4bit --block_swap 57"
    assert not any(words.count("block_swap") > 1 for words in flags)


@pytest.mark.slow
@pytest.mark.parametrize("name", plan_runs.CARDS)
def test_file_fits_its_card_as_the_page_says(name: str) -> None:
    row = plan_runs.card_row(name)
    card = int(name.rpartition("_")[2].removesuffix("gb"))
    assert float(row.split("|")[-2]) < card - 1  # for the driver and gaps
    assert row in (ROOT / "docs" / "dreambooth.md").read_text().splitlines()


AIMS: list[tuple[str, dict[str, Any], float]] = [
    ("flux.1-dev", {}, 11),
    ("flux.1-dev", {"block_swap": 28}, 8),
    ("qwen-image", {}, 16),
    ("qwen-image", {"block_swap": 30}, 12),
    ("sdxl", {}, 6),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "changes", "limit"), AIMS)
def test_large_models_fit_into_consumer_cards(model: str, changes: dict[str, Any], limit: float) -> None:
    flags = images.shipped_run({"pretrained_model_name_or_path": str(TRUE_SIZE / model)})
    common = {"rank": 16, "train_batch_size": 1, "mixed_precision": "bf16", "resolution": 1024, "plan": math.inf}
    same = {"pretrained_model_name_or_path": str(TRUE_SIZE / model), "load_in_4bit": True}
    args = DreamBoothArguments(**{**flags, **common, **same, "gradient_checkpointing": True, **changes})
    assert images.main(args)["peak"] / 1e9 <= limit
