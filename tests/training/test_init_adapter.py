"""`--init_adapter`: what a run may start from, and which file a refusal names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from nara_diffusion import noise_level
from nara_diffusion.training.adapter_weights import start_from
from tests.helpers.adapted import TwoLayers, disturb, lora_config, nara_config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYERS = ["first", "second"]


def saved(folder: Path, make: Callable[..., Any] = nara_config, **changes: Any) -> Any:
    """The model whose adapter was saved in `folder`."""
    model = get_peft_model(TwoLayers(), make(target_modules=LAYERS, **changes))
    disturb(model)
    model.save_pretrained(folder)
    return model


def started(folder: Path, **changes: Any) -> Any:
    """A model whose new adapter has started from the file."""
    model = get_peft_model(TwoLayers(), nara_config(target_modules=LAYERS, **changes))
    start_from({"": model.get_base_model()}, str(folder), model)
    return model


def test_nara_of_same_scales_starts_as_the_file(tmp_path: Path) -> None:
    pattern = {"alpha_pattern": {"first": 11}, "rank_pattern": {"second": 3}}
    source, model = saved(tmp_path, **pattern), started(tmp_path, **pattern)
    model.load_state_dict({key: source.state_dict()[key] for key in source.state_dict() if "base" in key}, strict=False)
    x, levels = torch.randn(2, 3, 7), torch.tensor([0.1, 0.8])
    with noise_level(source, levels), noise_level(model, levels):
        torch.testing.assert_close(model(x), source(x), rtol=0, atol=0)


@pytest.mark.parametrize("make", [nara_config, lora_config])
def test_file_with_other_scales_of_layers_is_refused(make: Any, tmp_path: Path) -> None:
    saved(tmp_path, make, alpha_pattern={"first": 11})
    with pytest.raises(ValueError, match=r"scale 2\.75 in 'first', but the adapter has 4 and 1\.5") as caught:
        started(tmp_path)
    assert str(tmp_path) in str(caught.value)


def without_b(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({key: tensor for key, tensor in tensors.items() if "second.lora_B" not in key}, folder / WEIGHTS)


def with_wider_a(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    key = next(key for key in tensors if "first.lora_A" in key)
    save_file({**tensors, key: torch.cat([tensors[key]] * 2, 1)}, folder / WEIGHTS)


def with_text_rank(folder: Path) -> None:
    fields = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**fields, "r": "4"}))


def without_config_end(folder: Path) -> None:
    (folder / CONFIG).write_text((folder / CONFIG).read_text()[:-9])


@pytest.mark.parametrize("make", [nara_config, lora_config])
@pytest.mark.parametrize("damage", [without_b, with_wider_a, with_text_rank, without_config_end])
def test_damaged_file_is_refused_by_its_name(damage: Callable[[Path], None], make: Any, tmp_path: Path) -> None:
    saved(tmp_path, make)
    damage(tmp_path)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the name is compared below)
        started(tmp_path)
    assert str(tmp_path) in str(caught.value)
