"""A LoRA of a converted model says which scheduler it needs, and keeps it wherever its file has a place for it."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import save_as_lora
from safetensors import safe_open
from safetensors.torch import save_file

from nara_diffusion import from_lora, noise_level, to_lora, to_lora_bins
from nara_diffusion.dreambooth.conversion import converted_scheduler
from nara_diffusion.export import PlainLora
from nara_diffusion.export.hosts import save_host_file
from nara_diffusion.export.hosts.unet import UNetLayout
from nara_diffusion.export.peft_conversion import truncated
from nara_diffusion.loaders.schedulers import scheduler_fields
from nara_diffusion.noise.schedulers.prediction import how_to_set
from tests.helpers.adapted import TwoLayers, nara_config
from tests.helpers.rounding import rounding_of
from tests.helpers.small_pipelines import pixels, small_sdxl
from tests.loaders.adapters import trained

LEVEL = 0.37
LAYOUT = UNetLayout(1, (0, 1))
KINDS = {
    "v": ("v_prediction", False, "timestep"),
    "zero_snr": ("v_prediction", True, "timestep"),
    "flow": ("flow_prediction", False, "flow"),
}
NODES = {
    "v": "ModelSamplingDiscrete (sampling v_prediction, zsnr False)",
    "zero_snr": "ModelSamplingDiscrete (sampling v_prediction, zsnr True)",
    "flow": "ModelSamplingSD3 (shift 1.0)",
}


def converted(kind: str, **changes: Any) -> Any:
    """A pipeline with a NaRA "toy" that converts it, and with the scheduler that belongs to it."""
    prediction, zero_snr, convention = KINDS[kind]
    pipe = small_sdxl()
    pipe.scheduler = converted_scheduler(pipe.scheduler, prediction, zero_snr)
    options = {"noise_convention": convention, "target_modules": ["to_q", "to_v", "conv1"]}
    return trained(pipe, name="toy", text=False, scheduler=scheduler_fields(pipe.scheduler), **options | changes)


@pytest.fixture(params=KINDS)
def pipe(request: pytest.FixtureRequest) -> Any:
    found = converted(request.param)
    found.kind = request.param
    return found


@pytest.fixture
def wanted(pipe: Any) -> torch.Tensor:
    with noise_level(pipe.unet, LEVEL):
        return pixels(pipe)


def saved(pipe: Any, path: Path, form: str) -> dict[str, str]:
    """The LoRA at λ in a file; its metadata."""
    save_host_file({"unet": to_lora(pipe.unet, LEVEL, "toy")}, path, form, "sdxl", LAYOUT)
    with safe_open(path, "pt") as file:
        return file.metadata()


def assert_same_pixels(pipe: Any, wanted: torch.Tensor) -> None:
    """… up to a forward's rounding, 2e-4 here; by a wrong scheduler they are 0.05 apart and more."""
    torch.testing.assert_close(pixels(pipe), wanted, rtol=0, atol=rounding_of(pipe.unet))


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_host_draws_the_naras_pixels_with_the_scheduler_that_it_is_told(pipe, wanted, form, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        saved(pipe, tmp_path / "lora.safetensors", form)
    (told,) = [record.getMessage() for record in caplog.records if "scheduler" in record.getMessage()]
    assert NODES[pipe.kind] in told
    other = small_sdxl()
    other.load_lora_weights(tmp_path / "lora.safetensors")
    assert (pixels(other) - wanted).abs().max() > 0.05  # by the base's own scheduler
    line = re.search(r"pipe\.scheduler = .*?\)(?=[,;])", told)[0]  # type: ignore[index]
    exec(line, {"pipe": other, **vars(diffusers)})
    assert_same_pixels(other, wanted)


@pytest.mark.parametrize(
    ("base", "architecture"), [("sdxl", "stable-diffusion-xl-v1-base"), ("sd15", "stable-diffusion-v1")]
)
def test_a_header_has_the_words_that_hosts_know_and_the_scheduler(base, architecture, tmp_path):
    """ModelSpec has a word for ε and for v, and none for a rectified flow."""
    found = {}
    for kind in KINDS:
        lora = to_lora(
            converted(kind, target_modules=["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]).unet,
            LEVEL,
            "toy",
        )
        save_host_file({"unet": lora}, tmp_path / f"{kind}.safetensors", "comfyui", base, LAYOUT)
        with safe_open(tmp_path / f"{kind}.safetensors", "pt") as file:
            found[kind] = file.metadata()
        assert json.loads(found[kind].pop("nara_scheduler")) == lora.scheduler
    v = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "v",
        "modelspec.prediction_type": "v",
    }
    assert found["v"] == v
    assert found["zero_snr"] == v | {"modelspec.title": "zero_snr", "ss_zero_terminal_snr": "True"}
    assert found["flow"] == {"format": "pt"}


def test_a_lora_that_predicts_what_its_base_does_says_nothing(tmp_path, caplog):
    pipe = trained(name="toy", text=False)
    with caplog.at_level(logging.WARNING):
        assert saved(pipe, tmp_path / "lora.safetensors", "kohya") == {"format": "pt"}
        to_lora(pipe.unet, LEVEL, "toy").save_pretrained(tmp_path / "folder")
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert caplog.records == []


def test_a_folder_with_the_scheduler_of_another_lora_is_refused_and_stays(pipe, tmp_path):
    """from_lora would take that scheduler for the second LoRA's."""
    to_lora(pipe.unet, LEVEL, "toy").save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    plain = to_lora(trained(small_sdxl(), name="toy", text=False).unet, LEVEL, "toy")
    with pytest.raises(ValueError, match="has a 'scheduler' of something else, which from_lora would take for this"):
        plain.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    to_lora(pipe.unet, LEVEL, "toy").save_pretrained(tmp_path)  # its own is written anew


def test_the_line_that_sets_a_scheduler_names_all_in_which_a_base_may_differ():
    """… so that it is right under a base that has what the adapter hasn't."""
    fields = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    told = how_to_set({**fields, "flow_shift": 3.0, "rescale_betas_zero_snr": False, "timestep_spacing": None})
    assert told == (
        "pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, "
        "prediction_type='flow_prediction', use_flow_sigmas=True, flow_shift=3.0, rescale_betas_zero_snr=False)"
    )
    bare = how_to_set({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    assert bare == "pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)"


def test_a_folder_of_peft_has_the_scheduler_as_diffusers_reads_it(pipe, wanted, tmp_path):
    to_lora(pipe.unet, LEVEL, "toy").save_pretrained(tmp_path)
    other = small_sdxl()
    other.unet = PeftModel.from_pretrained(other.unet, tmp_path)
    kind = type(pipe.scheduler)
    other.scheduler = kind.from_pretrained(tmp_path, subfolder="scheduler")
    assert scheduler_fields(other.scheduler) == scheduler_fields(pipe.scheduler)
    assert_same_pixels(other, wanted)


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft", "memory"])
def test_from_lora_brings_the_scheduler_along_and_a_nara_keeps_it(pipe, wanted, form, tmp_path):
    lora: Any = to_lora(pipe.unet, LEVEL, "toy")
    if form == "peft":
        lora.save_pretrained(lora := tmp_path / "lora")
    elif form != "memory":
        saved(pipe, lora := tmp_path / "lora.safetensors", form)
    other = from_lora(lora, small_sdxl())
    config = other.unet.peft_config["default"]
    assert config.scheduler == scheduler_fields(pipe.scheduler)
    assert config.noise_convention == KINDS[pipe.kind][2]
    assert scheduler_fields(other.scheduler) == scheduler_fields(pipe.scheduler)
    assert_same_pixels(other, wanted)
    other.save_nara_weights(tmp_path / "nara")
    again = small_sdxl()
    again.load_nara_weights(tmp_path / "nara")
    assert torch.equal(pixels(again), pixels(other))
    other.unload_nara_weights()
    assert scheduler_fields(other.scheduler) == scheduler_fields(small_sdxl().scheduler)


def test_from_lora_reads_the_scheduler_beside_a_lora_of_the_train_scripts(tmp_path):
    """OUT/pytorch_lora_weights.safetensors and OUT/scheduler, as `--adapter lora --prediction_type …` writes them."""
    pipe = converted("v")
    lora = to_lora(pipe.unet, LEVEL, "toy")
    save_file(lora.state_dict("unet."), tmp_path / "pytorch_lora_weights.safetensors")
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    other = from_lora(tmp_path, small_sdxl())
    assert other.unet.peft_config["default"].scheduler == scheduler_fields(pipe.scheduler)


def test_from_lora_takes_another_scheduler_if_one_is_given():
    lora = to_lora(converted("v").unet, LEVEL, "toy")
    unet = from_lora(lora, small_sdxl().unet, scheduler=None)
    assert unet.peft_config["default"].scheduler is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prediction_type": "v_prediction"}', "scheduler is .*_class_name"),
    ],
)
def test_from_lora_refuses_a_damaged_scheduler(text, message, tmp_path):
    lora = to_lora(converted("v").unet, LEVEL, "toy")
    path = tmp_path / "lora.safetensors"
    save_file(lora.state_dict("unet."), path, metadata={"format": "pt", "nara_scheduler": text})
    pipe = small_sdxl()
    with pytest.raises(ValueError, match=message):
        from_lora(path, pipe)
    assert not hasattr(pipe.unet, "peft_config")


def test_pefts_own_conversion_says_which_scheduler_is_needed(tmp_path, caplog):
    fields = scheduler_fields(converted("v").scheduler)
    model = get_peft_model(TwoLayers(), nara_config(target_modules=["first"], scheduler=fields, core_type="identity"))
    with caplog.at_level(logging.WARNING):
        save_as_lora(tmp_path, model, rank=1.0)
    assert "predicts v_prediction" in caplog.text


def test_every_lora_that_is_made_of_another_keeps_its_scheduler(caplog):
    pipe = converted("zero_snr", core_type="knots")
    fields = scheduler_fields(pipe.scheduler)
    with caplog.at_level(logging.WARNING):
        parts: list[PlainLora] = to_lora_bins(pipe.unet, adapter_name="toy").loras
    assert len(caplog.records) == 1
    found = [*parts, truncated(parts[0], 1), to_lora(pipe.unet, "best", "toy")]
    assert len(parts) > 1
    assert all(lora.scheduler == fields for lora in found)
