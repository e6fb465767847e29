"""`from_lora`: a NaRA that is the LoRA at step 0, tensor by tensor and in its forward; what is no LoRA is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from nara_diffusion import NaraConfig, from_lora, noise_level, to_lora
from nara_diffusion.export import save_host_file
from tests.helpers.adapted import TwoLayers, adapted, disturb, lora_config, relative_error
from tests.helpers.rounding import rounding_of
from tests.helpers.small_pipelines import small_sdxl
from tests.loaders.adapters import trained

TARGETS = ["first", "second"]
PATTERNS: dict[str, Any] = {"rank_pattern": {"second": 2}, "alpha_pattern": {"second": 5}}


def base() -> TwoLayers:
    torch.manual_seed(3)
    return TwoLayers()


def trained_lora(**options: Any) -> PeftModel:
    model = get_peft_model(base(), lora_config(**{"target_modules": TARGETS, **PATTERNS, **options}))
    disturb(model)
    return model.eval()


def assert_same_tensors(nara: Any, lora: Any, adapter_name: str = "default") -> None:
    held = get_peft_model_state_dict(nara, adapter_name=adapter_name)
    given = get_peft_model_state_dict(lora)
    assert {key for key in held if "core" not in key} == given.keys()
    for key, tensor in given.items():
        assert torch.equal(held[key], tensor), key


def run(model: nn.Module, x: torch.Tensor, level: float | None = None) -> torch.Tensor:
    with torch.no_grad():
        if level is None:
            return model(x)
        with noise_level(model, level, mask_density=0.6):
            return model(x)


@pytest.mark.parametrize(
    ("options", "core"),
    [
        ({"use_dora": True}, {"core_type": "constant"}),
        ({"use_rslora": True}, {"core_type": "knots", "core_sharing": "layer"}),
        ({}, {"core_input": "both"}),
        ({"init_lora_weights": "pissa"}, {}),
    ],
    ids=str,
)
def test_a_folder_of_peft_becomes_a_nara_with_its_tensors_and_forward(tmp_path, options, core):
    lora = trained_lora(**options)
    lora.save_pretrained(tmp_path)
    model = from_lora(tmp_path, base(), **core).eval()
    assert isinstance(model.peft_config["default"], NaraConfig)
    assert_same_tensors(model, lora)
    x = torch.randn(3, 7)
    for level in (0.0, 0.4, 1.0):
        assert relative_error(run(model, x, level), run(lora, x)) < 4 * rounding_of(lora)


@pytest.mark.parametrize("kind", ["model", "plain", "dict", "bin"])
def test_models_and_dicts_are_read_too(kind, tmp_path):
    lora = trained_lora()
    state = get_peft_model_state_dict(lora)
    if kind == "bin":
        lora.save_pretrained(tmp_path, safe_serialization=False)
    source, options = {
        "model": (lora, {}),
        "plain": (to_lora(lora), {}),
        "dict": (state, {"config": lora.peft_config["default"]}),
        "bin": (tmp_path, {}),
    }[kind]
    model = from_lora(source, base(), **options)
    assert_same_tensors(model, lora)
    disturb(model)  # nothing is shared
    assert all(torch.equal(tensor, state[key]) for key, tensor in get_peft_model_state_dict(lora).items())


def test_a_second_adapter_joins_a_peft_model():
    lora, model = trained_lora(), adapted(base(), target_modules=["first"])
    before = copy.deepcopy(get_peft_model_state_dict(model))
    assert from_lora(lora, model, "other") is model
    assert model.active_adapters == ["other"]
    assert_same_tensors(model, lora, "other")
    assert all(torch.equal(t, before[key]) for key, t in get_peft_model_state_dict(model).items())


def test_half_precision_of_the_file_or_the_base_changes_no_bit(tmp_path):
    lora = trained_lora()
    assert_same_tensors(from_lora(lora, base().to(torch.bfloat16)), lora)
    half = copy.deepcopy(lora).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    assert_same_tensors(from_lora(tmp_path, base()), half.float())


class Other(nn.Module):
    """Of other modules."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Linear(7, 11)


@pytest.mark.parametrize(
    ("arguments", "make", "message"),
    [
        ({"r": 4}, base, "can't be given, but come from the LoRA"),
        ({"core_init": "kaiming"}, base, "has a C that is not I"),
        ({"core_type": "bins", "core_bins": 2}, base, "has a C that is not I"),
        ({"lora": trained_lora(bias="lora_only")}, base, "beside a LoRA's factors"),
        ({}, Other, "lacks 2: 'first', 'second'"),
        ({"lora": "nowhere"}, base, "There is no LoRA file"),
        ({"lora": {"first.lora_A.weight": torch.zeros(4, 7)}, "config": lora_config()}, base, "B is missing"),
    ],
    ids=str,
)
def test_what_would_not_start_as_the_lora_is_refused_and_changes_nothing(arguments, make, message):
    model = make()
    before = dict(model.state_dict())
    with pytest.raises(ValueError, match=message):
        from_lora(arguments.pop("lora", None) or trained_lora(), model, **arguments)
    assert model.state_dict().keys() == before.keys()
    assert not hasattr(model, "peft_config")


# ---------------------------------------------------------------------- hosts' files into pipelines


@pytest.fixture(scope="module")
def host_file(tmp_path_factory) -> Path:
    """kohya's file of a UNet and its text encoders."""
    path = tmp_path_factory.mktemp("host") / "toy.safetensors"
    pipe = trained(name="toy", rank_pattern={"conv1": 3})
    loras = {name: to_lora(getattr(pipe, name), 0.4, "toy") for name in ("unet", "text_encoder", "text_encoder_2")}
    save_host_file(loras, path, "kohya", "sdxl", 1)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, key: t.update({f"{key}.dora_scale": torch.zeros(3)}), "dora_scale"),
        (lambda t, key: t.pop(f"{key}.lora_up.weight"), "."),
        (lambda t, key: t.update({f"lora_vae_{key}.lora_down.weight": torch.zeros(3, 3)}), "."),
    ],
    ids=["DoRA", "half a layer", "another model"],
)
def test_a_hosts_file_of_which_diffusers_would_drop_a_part_is_refused(change, message, host_file, tmp_path):
    tensors = load_file(host_file)
    change(tensors, next(key for key in tensors if "unet" in key and "lora_down" in key).split(".")[0])
    save_file(tensors, tmp_path / "damaged.safetensors")
    pipe = small_sdxl()
    with pytest.raises(ValueError, match=message):
        from_lora(tmp_path / "damaged.safetensors", pipe)
    assert not hasattr(pipe.unet, "peft_config")


def test_a_hosts_file_for_a_pipeline_is_refused_for_its_unet_alone(host_file):
    with pytest.raises(ValueError, match="pass the pipeline"):
        from_lora(host_file, small_sdxl().unet)
