"""`from_lora` on Diffusers' files: the same denoiser as `load_lora_weights` makes, and nothing of the file lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from nara_diffusion import from_lora
from nara_diffusion.loaders.insertion import nara_adapters_of
from tests.helpers.adapted import lora_config, relative_error
from tests.helpers.rounding import rounding_of
from tests.helpers.small_pipelines import small_flux, small_sd3, small_sdxl
from tests.loaders.adapters import State, alone, predict, save_lora, shake

FILE = "pytorch_lora_weights.safetensors"
CONVOLUTIONS = ["to_q", "to_out.0", "proj_in", "conv1", "time_emb_proj", "ff.net.0.proj", "conv_in"]


def assert_same_denoiser(pipe: Any, folder: Path) -> None:
    expected, base = predict(alone(folder, lora=True)), predict(small_sdxl())
    assert relative_error(expected, base) > 1e-3
    assert relative_error(predict(pipe), expected) < 20 * rounding_of(pipe.unet)


@pytest.mark.parametrize("options", [{}, {"target_modules": CONVOLUTIONS}, {"use_dora": True}, {"use_rslora": True},
                                     {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_v": 7}}], ids=str)  # fmt: skip
def test_a_pipeline_gets_the_denoiser_of_load_lora_weights(tmp_path, options):
    save_lora(tmp_path, **options)
    pipe = small_sdxl()
    assert from_lora(tmp_path, pipe, core_sharing="layer") is pipe
    config = nara_adapters_of(pipe.unet)["default"]
    assert config.core_sharing == "layer"
    assert_same_denoiser(pipe, tmp_path)
    held, given = get_peft_model_state_dict(pipe.unet), load_file(tmp_path / FILE)
    assert {f"unet.{key}" for key in held if "nara_core" not in key} == given.keys()
    assert all(torch.equal(held[key.removeprefix("unet.")], tensor) for key, tensor in given.items())


def test_it_is_saved_and_loaded_as_a_nara(tmp_path):
    save_lora(tmp_path)
    pipe = from_lora(tmp_path, small_sdxl(), noise_convention=None)
    pipe.save_nara_weights(tmp_path / "nara")
    again = small_sdxl()
    again.load_nara_weights(tmp_path / "nara")
    assert torch.equal(predict(again), predict(pipe))


def test_a_component_alone_takes_its_part(tmp_path):
    save_lora(tmp_path)
    pipe = small_sdxl()
    assert from_lora(tmp_path / FILE, pipe.unet) is pipe.unet
    assert_same_denoiser(pipe, tmp_path)


def test_a_file_of_the_unet_alone_is_read(tmp_path):
    pipe = small_sdxl()
    pipe.unet.add_adapter(lora_config(target_modules=["to_q"], lora_alpha=3))
    shake(pipe.unet, 4)
    pipe.unet.save_lora_adapter(tmp_path)
    other = small_sdxl()
    from_lora(tmp_path, other.unet)
    assert relative_error(predict(other), predict(pipe)) < 20 * rounding_of(pipe.unet)


def test_a_file_without_configuration_has_the_scale_one(tmp_path):
    save_lora(tmp_path)
    save_file(load_file(tmp_path / FILE), tmp_path / FILE)
    pipe = from_lora(tmp_path, small_sdxl())
    assert_same_denoiser(pipe, tmp_path)
    assert nara_adapters_of(pipe.unet)["default"].lora_alpha == 4


def test_a_file_of_old_and_new_names_is_read_whole(tmp_path):
    """Diffusers' own converter makes one; `load_lora_weights` takes half of it."""
    save_lora(tmp_path / "new", target_modules=CONVOLUTIONS, lora_alpha=4)
    tensors = load_file(tmp_path / "new" / FILE)
    mixed = convert_state_dict_to_diffusers(dict(tensors))
    assert {".lora.down" in key for key in mixed} == {True, False}
    (tmp_path / "old").mkdir()
    save_file(mixed, tmp_path / "old" / FILE)
    pipe = from_lora(tmp_path / "old", small_sdxl())
    held = get_peft_model_state_dict(pipe.unet)
    assert {f"unet.{key}" for key in held if "nara_core" not in key} == tensors.keys()
    assert all(torch.equal(held[key.removeprefix("unet.")], tensor) for key, tensor in tensors.items())


def with_text_encoders(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """A LoRA on all three parts, in Diffusers' file; its tensors by part."""
    pipe, found = small_sdxl(), {}
    for index, name in enumerate(("unet", "text_encoder", "text_encoder_2")):
        model = getattr(pipe, name)
        targets = ["to_k", "conv2"] if name == "unet" else ["q_proj", "out_proj", "fc1"]
        inject_adapter_in_model(lora_config(r=2 + index, lora_alpha=3, target_modules=targets), model)
        shake(model, 20 + index)
        found[name] = get_peft_model_state_dict(model)
        config = model.peft_config["default"].to_dict()
        metadata = {key: value for key, value in config.items() if value is not None}
        found[f"{name} metadata"] = metadata
    pipe.save_lora_weights(
        folder,
        **{f"{name}_lora_layers": found[name] for name in ("unet", "text_encoder", "text_encoder_2")},
        **{f"{name}_lora_adapter_metadata": found[f"{name} metadata"] for name in found if " " not in name},
    )
    return {name: found[name] for name in found if " " not in name}


def test_text_encoders_get_their_part_without_a_core(tmp_path):
    parts = with_text_encoders(tmp_path)
    pipe = from_lora(tmp_path, small_sdxl())
    for name, tensors in parts.items():
        model = getattr(pipe, name)
        held = get_peft_model_state_dict(model)
        assert {key for key in held if "nara_core" not in key} == tensors.keys()
        assert all(torch.equal(held[key], tensor) for key, tensor in tensors.items())
        assert nara_adapters_of(model)["default"].core_type == ("hypernetwork" if name == "unet" else "identity")
    pipe.save_nara_weights(tmp_path / "nara")
    small_sdxl().load_nara_weights(tmp_path / "nara")


def test_a_file_for_several_parts_needs_the_pipeline(tmp_path):
    with_text_encoders(tmp_path)
    with pytest.raises(ValueError, match="is for 'text_encoder', 'text_encoder_2', 'unet': pass the pipeline"):
        from_lora(tmp_path, small_sdxl().unet)


@pytest.mark.parametrize("make", [small_flux, small_sd3])
def test_transformers_are_read(tmp_path, make):
    pipe = make()
    pipe.transformer.add_adapter(lora_config(target_modules=["to_q", "to_out.0"], lora_alpha=3))
    shake(pipe.transformer, 4)
    config = pipe.transformer.peft_config["default"].to_dict()
    metadata = {key: value for key, value in config.items() if value is not None}
    tensors = get_peft_model_state_dict(pipe.transformer)
    type(pipe).save_lora_weights(tmp_path, tensors, transformer_lora_adapter_metadata=metadata)
    for target in (make(), make().transformer):
        from_lora(tmp_path, target)
        held = get_peft_model_state_dict(getattr(target, "transformer", target))
        assert all(torch.equal(held[key], tensor) for key, tensor in tensors.items())


def test_what_has_no_place_is_refused_and_the_pipeline_is_as_it_was(tmp_path):
    with_text_encoders(tmp_path)
    pipe = small_sdxl()
    before = State(pipe)
    tensors = load_file(tmp_path / FILE)
    refused = {
        "another shape": ({**tensors, **_wider(tensors, "text_encoder_2.")}, "it was trained on another base model"),
        "half a layer": (dict(list(tensors.items())[1:]), "A and B are both needed"),
        "another module": (
            {key.replace("layers.1", "layers.7"): tensor for key, tensor in tensors.items()},
            "lacks .*layers.7",
        ),
        "LyCORIS": ({"lora_unet_a.hada_w1_a": torch.zeros(2)}, "LyCORIS"),
        "DoRA of kohya": ({**tensors, "lora_unet_a.dora_scale": torch.zeros(2)}, "which Diffusers doesn't read"),
        "nothing": ({}, "The dict holds no tensors"),
        "no LoRA": ({"a.weight": torch.zeros(2)}, "no"),
        "another pipeline": ({"transformer.a.lora_A.weight": torch.zeros(2, 2)}, "has no such component"),
    }
    for what, (given, message) in refused.items():
        with pytest.raises(ValueError, match=message):
            from_lora(given, pipe)
        assert State(pipe) == before, what


def _wider(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {
        key: torch.zeros(len(tensor) + 1, *tensor.shape[1:])
        for key, tensor in tensors.items()
        if key.startswith(prefix) and "lora_B" in key
    }
