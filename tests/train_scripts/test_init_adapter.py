"""--init_adapter of both train scripts: the run starts as the adapter in the file, and refuses what disagrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from nara_diffusion.dllm import load_backbone
from tests.helpers.adapted import disturb
from tests.loaders.adapters import save_lora
from train_scripts import dllm, dreambooth_sdxl

from .dreambooth_runs import tiny_arguments

FEW = {"max_train_steps": 1, "validation_steps": None, "curve_points": 1, "gen_length": 2, "test_samples": 2}
FIXED = {"learning_rate": 1e-30, "core_learning_rate": 1e-30, "weight_decay": 0.0}
"""A step by which no float32 changes."""


def saved_lora(model: str, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    backbone, _ = load_backbone(model)
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **options})
    lora = get_peft_model(backbone, config)
    disturb(lora)
    lora.save_pretrained(folder)
    return get_peft_model_state_dict(lora)


@pytest.mark.parametrize("adapter", ["nara", "nara_dora", "lora"])
def test_a_language_model_starts_as_the_lora(arguments, tmp_path, adapter):
    dora = adapter == "nara_dora"
    (tmp_path / "lora").mkdir()
    args = arguments(**FEW, **FIXED, adapter=adapter, lora_alpha=5.0, init_adapter=str(tmp_path / "lora"),
                     **({} if adapter != "lora" else {"core_hidden_dims": [256, 512]}))  # fmt: skip
    given = saved_lora(args.pretrained_model_name_or_path, tmp_path / "lora", use_dora=dora)
    dllm.main(args)
    held = load_file(Path(args.output_dir) / "adapter_model.safetensors")
    assert {key for key in held if "nara_core" not in key} == given.keys()
    for key, tensor in given.items():
        torch.testing.assert_close(held[key], tensor, rtol=0, atol=1e-12)


def test_a_training_goes_on_from_its_own_nara(arguments, tmp_path):
    first = arguments(**{**FEW, "max_train_steps": 2}, output_dir=str(tmp_path / "first"), core_init="kaiming")
    dllm.main(first)
    again = arguments(**FEW, **FIXED, init_adapter=first.output_dir, core_init="kaiming")
    dllm.main(again)
    held, given = (load_file(Path(args.output_dir) / "adapter_model.safetensors") for args in (again, first))
    assert held.keys() == given.keys()
    for key, tensor in given.items():
        torch.testing.assert_close(held[key], tensor, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "flags", "message"),
    [
        ({"r": 2}, {}, r"has rank 2 and scale .* in 'model.*the adapter 3 and"),
        ({"lora_alpha": 3}, {}, r"has rank 3 and scale 1 in .*: set .*lora_alpha to 3"),
        ({"target_modules": ["q_proj"]}, {}, "has 2 layers, the adapter 'default' 14: the LoRA lacks"),
        ({}, {"target_modules": ["q_proj"]}, "has 14 layers, the adapter 'default' 2: the adapter lacks"),
        ({"use_dora": True}, {}, "alone has '.*lora_magnitude_vector': set use_dora"),
        ({}, {"core_init": "kaiming"}, "has a C that is not I at first"),
        ({}, {"core_type": "bins", "core_bins": 3}, "has a C that is not I at first"),
        ({"init_lora_weights": "pissa"}, {}, "takes the start of A and B out of the base"),
        ({"modules_to_save": ["norm"]}, {}, "has trained .* beside a LoRA"),
    ],
)
def test_what_disagrees_with_the_flags_is_refused(arguments, tmp_path, options, flags, message):
    args = arguments(**{**FEW, "lora_alpha": 5.0, "init_adapter": str(tmp_path), **flags})
    saved_lora(args.pretrained_model_name_or_path, tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        dllm.main(args)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"core_sharing": "layer"}, "has core_sharing 'global', this run 'layer': give --core_sharing"),
        ({"core_hidden_dims": [8, 9]}, r"has core_hidden_dims"),
        ({"adapter": "lora", "core_hidden_dims": [256, 512]}, "is a NaRA with core_type 'hypernetwork'"),
        ({"rank": 2}, "has rank 3 and scale"),
    ],
)
def test_a_nara_that_disagrees_with_the_flags_is_refused(arguments, tmp_path, flags, message):
    first = arguments(**FEW, output_dir=str(tmp_path / "first"))
    dllm.main(first)
    with pytest.raises(ValueError, match=message):
        dllm.main(arguments(**{**FEW, "init_adapter": first.output_dir, **flags}))


def test_paths_and_methods_that_give_no_start_are_refused(arguments, tmp_path):
    with pytest.raises(ValueError, match="init_adapter is 'nowhere': there is no such file"):
        arguments(init_adapter="nowhere")
    for adapter in ("vera", "full", "pissa"):
        with pytest.raises(ValueError, match=f"which adapter {adapter} is not: choose one of nara, "):
            arguments(init_adapter=str(tmp_path), adapter=adapter, core_hidden_dims=[256, 512])
    with pytest.raises(ValueError, match=r"init_adapter is .*: leave it out"):
        arguments(init_adapter=str(tmp_path), check=True)


def test_an_image_model_starts_as_a_lora_and_goes_on_from_its_nara(sdxl_folder, pictures, tmp_path):
    save_lora(tmp_path / "lora", r=3, lora_alpha=5)
    flags: dict[str, Any] = {"target_modules": ["to_q", "to_v", "proj_in"], "max_train_steps": 1, "curve_points": 1,
                             "num_validation_images": 1, **FIXED}  # fmt: skip
    first = tiny_arguments(sdxl_folder, pictures, tmp_path / "first", init_adapter=str(tmp_path / "lora"), **flags)
    dreambooth_sdxl.main(first)
    given = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    held = load_file(tmp_path / "first" / "pytorch_nara_weights.safetensors")
    assert {key for key in held if "nara_core" not in key} == given.keys()
    for key, tensor in given.items():
        torch.testing.assert_close(held[key], tensor, rtol=0, atol=1e-12)


def test_an_image_model_refuses_parts_that_it_does_not_train(sdxl_folder, pictures, tmp_path):
    save_lora(tmp_path / "lora", r=3, lora_alpha=5)
    args = tiny_arguments(
        sdxl_folder, pictures, tmp_path / "run", init_adapter=str(tmp_path / "lora"), train_text_encoder=True,
        target_modules=["to_q", "to_v", "proj_in"],
    )  # fmt: skip
    with pytest.raises(ValueError, match="is for unet, but this run trains unet, text_encoder, text_encoder_2"):
        dreambooth_sdxl.main(args)
