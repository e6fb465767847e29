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
from tests.acceptance import _bases, _files
from tests.helpers.adapted import TwoLayers, adapted, disturb, lora_config, nara_config, relative_error
from tests.helpers.rounding import rounding_of
from tests.helpers.small_pipelines import MORE_ATTENTION, small_sdxl

TARGETS = ["first", "second"]


def base() -> TwoLayers:
    torch.manual_seed(3)
    return TwoLayers()


def trained_lora(folder: Path, **options: Any) -> PeftModel:
    """A LoRA that is saved in `folder`."""
    patterns: dict[str, Any] = {"rank_pattern": {"second": 2}, "alpha_pattern": {"second": 5}}
    model = get_peft_model(base(), lora_config(**{"target_modules": TARGETS, **patterns, **options}))
    disturb(model)
    model.save_pretrained(folder)
    return model.eval()


def assert_same_tensors(nara: Any, lora: Any, adapter_name: str = "default") -> None:
    of_nara = get_peft_model_state_dict(nara, adapter_name=adapter_name)
    of_lora = get_peft_model_state_dict(lora)
    assert {key for key in of_nara if "core" not in key} == of_lora.keys()
    for key, tensor in of_lora.items():
        assert torch.equal(of_nara[key], tensor), key


@pytest.mark.parametrize(
    ("options", "core"),
    [
        ({"use_dora": True}, {"core_type": "constant"}),
        ({"use_rslora": True}, {"core_type": "knots", "core_sharing": "layer"}),
        ({}, {"noise_embedding": "mlp"}),
        ({"init_lora_weights": "pissa"}, {}),
    ],
    ids=str,
)
def test_peft_folder_becomes_nara_with_tensors_and_forward(tmp_path, options, core):
    lora = trained_lora(tmp_path, **options)
    model = from_lora(tmp_path, base(), **core).eval()
    assert isinstance(model.peft_config["default"], NaraConfig)
    assert_same_tensors(model, lora)
    x = torch.randn(3, 7)
    for level in (0.0, 0.4, 1.0):
        with torch.no_grad(), noise_level(model, level):
            assert relative_error(model(x), lora(x)) < 4 * rounding_of(lora)


def test_second_adapter_in_half_precision_changes_no_bit(tmp_path):
    lora, model = trained_lora(tmp_path / "whole"), adapted(base().to(torch.bfloat16), target_modules=["first"])
    original = copy.deepcopy(get_peft_model_state_dict(model))
    assert from_lora(tmp_path / "whole", model, "other") is model
    assert model.active_adapters == ["other"]
    assert_same_tensors(model, lora, "other")
    assert all(torch.equal(t, original[key]) for key, t in get_peft_model_state_dict(model).items())
    half = copy.deepcopy(lora).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    assert_same_tensors(from_lora(tmp_path, base()), half.float())


@pytest.mark.parametrize(
    ("options", "arguments", "make", "message"),
    [
        ({}, {"r": 4}, base, "can't be given, since the LoRA"),
        ({}, {"core_init": "kaiming"}, base, "doesn't start at C = I"),
        ({}, {"core_type": "bins", "core_bins": 2}, base, "doesn't start at C = I"),
        ({"bias": "lora_only"}, {}, base, "in addition to a LoRA's factors"),
        ({}, {}, lambda: nn.ModuleDict({"first": nn.Linear(7, 11)}), r"has 2 layers .* has 1\. .* has 'second'"),
        ({}, {"lora": "nowhere"}, base, "There is no file or folder"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
def test_different_start_is_refused_without_change(options, arguments, make, message, tmp_path):
    trained_lora(tmp_path, **options)
    model = make()
    original = dict(model.state_dict())
    with pytest.raises(ValueError, match=message):
        from_lora(**{"lora": tmp_path, **arguments}, model=model)
    assert model.state_dict().keys() == original.keys()
    assert not hasattr(model, "peft_config")


# ---------------------------------------------------------------------- hosts' files into pipelines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, key: t.update({f"{key}.dora_scale": torch.zeros(3)}), "dora_scale"),
        (lambda t, key: t.pop(f"{key}.lora_up.weight"), "."),
        (lambda t, key: t.update({f"lora_vae_{key}.lora_down.weight": torch.zeros(3, 3)}), "."),
    ],
    ids=["DoRA", "half a layer", "another model"],
)
def test_host_file_that_diffusers_would_cut_is_refused(change, message, tmp_path):
    file = _files.FILES / "exports" / "sdxl_kohya.safetensors"
    tensors = load_file(file)
    change(tensors, next(key for key in tensors if "unet" in key and "lora_down" in key).split(".")[0])
    save_file(tensors, tmp_path / "damaged.safetensors")
    pipe = _bases.sdxl()
    with pytest.raises(ValueError, match=message):
        from_lora(tmp_path / "damaged.safetensors", pipe)
    assert not hasattr(pipe.unet, "peft_config")
    with pytest.raises(ValueError, match="Pass such a folder, or the pipeline"):
        from_lora(file, pipe.unet)


def test_lora_folded_by_0_2_otherwise_is_refused(tmp_path: Path) -> None:
    pipe, file = small_sdxl(**MORE_ATTENTION), tmp_path / "lora.safetensors"
    pipe.unet.add_adapter(nara_config(target_modules=["to_q", "to_v"]), "toy")
    lora = to_lora(pipe.unet, 0.4, "toy")
    save_host_file({"unet": lora}, file, "kohya", "sdxl")
    save_file(load_file(file), file, {"format": "pt", "nara_scheduler": "{}"})
    lora.save_pretrained(tmp_path / "peft")
    (tmp_path / "peft" / "scheduler").mkdir()
    (tmp_path / "peft" / "scheduler" / "scheduler_config.json").write_text("{}")
    other: Any = small_sdxl(**MORE_ATTENTION)
    for source, name in ((file, "nara_scheduler"), (tmp_path / "peft", "scheduler_config.json")):
        with pytest.raises(ValueError, match=rf"{name}.*predicts something other than its base"):
            from_lora(source, other)
        assert not hasattr(other.unet, "peft_config")
