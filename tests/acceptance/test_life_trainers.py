"""NaRA in other people's training programs, as docs/other_trainers.md has it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from nara_diffusion import checkpoint_nara_weights
from tests.helpers.adapted import disturb, nara_config
from tests.helpers.small_pipelines import small_sdxl

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def adapted_unet(seed: int = 0, **changes: Any) -> Any:
    """Of a small SDXL, as Diffusers' script adds an adapter."""
    unet = small_sdxl().unet.requires_grad_(False)
    torch.manual_seed(seed)
    unet.add_adapter(nara_config(target_modules=["to_q", "to_v"], **changes))
    return unet


def predict(unet: Any) -> Tensor:
    text = {"text_embeds": torch.ones(2, 24), "time_ids": torch.ones(2, 6)}
    return unet(X, torch.tensor([100, 800]), torch.ones(2, 5, 40), added_cond_kwargs=text).sample


# ---------------------------------------------------------------------- scripts of Diffusers


def save_as_scripts_do(unet: Any, folder: Path) -> None:
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=layers)


@pytest.mark.parametrize("core_type", ["hypernetwork", "rank_mask"])
def test_saving_by_diffusers_scripts_is_refused_before_writing(core_type: str, tmp_path: Path) -> None:
    unet = adapted_unet(core_type=core_type)
    with pytest.raises(ValueError, match=r"'default' is a NaRA.*save_nara_weights.*checkpoint_nara_weights"):
        save_as_scripts_do(unet, tmp_path)
    with pytest.raises(ValueError, match="checkpoint_nara_weights"):
        unet.save_lora_adapter(tmp_path)
    assert not list(tmp_path.iterdir())


def test_adapter_with_identity_core_is_saved_as_lora(tmp_path: Path) -> None:
    unet = adapted_unet(core_type="identity")
    disturb(unet)
    save_as_scripts_do(unet, tmp_path)
    assert list(tmp_path.iterdir())


def test_peft_model_saves_configuration_also_around_compiled_model(tmp_path: Path) -> None:
    for unet in (small_sdxl().unet, torch.compile(small_sdxl().unet)):
        adapted: Any = get_peft_model(unet, nara_config(target_modules=["to_q"]))  # type: ignore[arg-type]
        adapted.save_pretrained(tmp_path)
        assert (tmp_path / "adapter_config.json").is_file()


class Script:
    """What a script of Diffusers has: an accelerator, a model without its pipeline, an optimizer."""

    def __init__(self, seed: int) -> None:
        self.accelerator = Accelerator(cpu=True)
        self.unet = adapted_unet(seed)
        self.nara = checkpoint_nara_weights(self.accelerator, unet=self.unet)
        self.other = self.accelerator.prepare(nn.Linear(2, 3))  # which accelerate saves
        self.parameters = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(self.parameters, lr=1e-2)
        self.model, self.optimizer = self.accelerator.prepare(self.unet, optimizer)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.accelerator.backward(predict(self.model).square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()


def test_diffusers_script_checkpoints_resume_and_load(tmp_path: Path) -> None:
    first, again = Script(0), Script(1)
    disturb(first.unet)
    first.train(2)
    first.accelerator.save_state(str(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "model.safetensors",  # of the other model
        "pytorch_nara_weights.safetensors",
    ]
    again.accelerator.load_state(str(tmp_path))
    assert torch.equal(again.other.weight, first.other.weight)
    for script in (first, again):
        script.train(2)
    for expected, actual in zip(first.parameters, again.parameters, strict=True):
        torch.testing.assert_close(actual, expected)
    pipe: Any = small_sdxl()
    first.nara.save_nara_weights(tmp_path / "end")
    pipe.load_nara_weights(tmp_path / "end")
    with torch.no_grad():
        torch.testing.assert_close(predict(pipe.unet), predict(first.unet))


def test_checkpoints_under_an_engine_that_shards_are_refused() -> None:
    engine: Any = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(ValueError, match=r"FSDP.*one process or DDP"):
        checkpoint_nara_weights(engine, unet=adapted_unet())
