"""After `fuse_lora` every step runs at the C of one λ, and the user is told so, once."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from nara_diffusion.tuner.activation import tuner_layers

from nara_diffusion import noise_level
from tests.helpers.adapted import relative_error
from tests.loaders.adapters import predict, save_lora, trained

# PEFT says so of a second adapter
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
LOGGER = "nara_diffusion.loaders.patches"


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


def test_fuse_lora_at_one_level_says_that_all_steps_run_at_it(caplog) -> None:
    pipe = trained(text=False)
    free = predict(pipe)
    with noise_level(pipe.unet, 0.3):
        expected = predict(pipe)
    assert relative_error(free, expected) > 1e-2
    with caplog.at_level(logging.WARNING, LOGGER):
        with noise_level(pipe.unet, 0.3):
            pipe.fuse_lora(components=["unet"])
        fused = predict(pipe)
        predict(pipe)
    (message,) = said(caplog)
    assert "UNet2DConditionModel: 'default' is fused at noise_level 0.3" in message
    assert "unfuse_lora()" in message
    assert relative_error(fused, expected) < 1e-5
    pipe.unfuse_lora(components=["unet"])
    assert relative_error(predict(pipe), free) < 1e-5


def test_fuse_lora_of_a_component_says_it_too(caplog) -> None:
    pipe = trained(text=False)
    with caplog.at_level(logging.WARNING, LOGGER), noise_level(pipe.unet, torch.tensor(0.3)):
        pipe.unet.fuse_lora()
    (message,) = said(caplog)
    assert "'default' is fused at noise_level 0.3" in message


def test_fuse_lora_names_the_adapters_that_depend_on_the_level_alone(caplog, tmp_path: Path) -> None:
    pipe = trained(name="first", text=False)
    trained(pipe, name="second", text=False, seed=3)
    trained(pipe, name="fixed", text=False, seed=4, core_type="constant")
    save_lora(tmp_path)
    pipe.load_lora_weights(tmp_path, adapter_name="plain")
    pipe.set_adapters(["fixed", "plain", "second"])
    with caplog.at_level(logging.WARNING, LOGGER), noise_level(pipe.unet, 0.25):
        pipe.fuse_lora(components=["unet"], adapter_names=["fixed", "plain", "second"])
    (message,) = said(caplog)
    assert "'second' is fused at noise_level 0.25" in message
    assert "first" not in message


def lora_and_nara(folder: Path) -> Any:
    """A LoRA on to_q, and a NaRA on to_q and to_v, of which both are active."""
    save_lora(folder, seed=5, target_modules=["to_q"])
    pipe = trained(name="nara", text=False, target_modules=["to_q", "to_v"])
    pipe.load_lora_weights(folder, adapter_name="lora")
    pipe.set_adapters(["lora", "nara"])
    return pipe


@pytest.mark.parametrize("names", [["lora"], ["nara"]])
@pytest.mark.parametrize("of_pipeline", [True, False], ids=["pipeline", "component"])
def test_fuse_lora_of_one_of_two_that_share_layers_is_refused(tmp_path: Path, names, of_pipeline: bool) -> None:
    """PEFT's layers would run the fused one alone."""
    pipe = lora_and_nara(tmp_path)
    before = predict(pipe)
    left = "nara" if names == ["lora"] else "lora"
    message = f"adapter '{left}' would have no effect beside the fused '{names[0]}'.*fuse both, or call unfuse_lora"
    fuse = partial(pipe.fuse_lora, components=["unet"]) if of_pipeline else pipe.unet.fuse_lora
    with noise_level(pipe.unet, 0.3), pytest.raises(ValueError, match=message):
        fuse(adapter_names=names)
    assert torch.equal(predict(pipe), before)
    with noise_level(pipe.unet, 0.3):
        expected = predict(pipe)
        pipe.fuse_lora(components=["unet"], adapter_names=["lora", "nara"])
    assert relative_error(predict(pipe), expected) < 1e-5


@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")  # PEFT, of to_v, which the LoRA doesn't adapt
def test_an_adapter_is_not_activated_in_layers_into_which_another_is_fused(tmp_path: Path) -> None:
    pipe = lora_and_nara(tmp_path)
    both = predict(pipe)
    pipe.set_adapters("lora")
    alone = predict(pipe)
    assert relative_error(both, alone) > 1e-2
    pipe.fuse_lora(components=["unet"], adapter_names=["lora"])
    for set_adapters in (pipe.set_adapters, pipe.unet.set_adapters):
        for names in (["lora", "nara"], "nara"):
            with pytest.raises(ValueError, match="adapter 'nara' would have no effect beside the fused 'lora'"):
                set_adapters(names)
    assert relative_error(predict(pipe), alone) < 1e-5
    pipe.unfuse_lora(components=["unet"])
    pipe.set_adapters(["lora", "nara"])
    assert relative_error(predict(pipe), both) < 1e-5


def test_deleting_a_fused_adapter_activates_no_other_one_beside_it(tmp_path: Path) -> None:
    """Of the NaRA only the layers that the LoRA hasn't would run."""
    pipe = lora_and_nara(tmp_path)
    pipe.set_adapters("lora")
    alone = predict(pipe)
    pipe.fuse_lora(components=["unet"], adapter_names=["lora"])
    pipe.delete_adapters("lora")
    assert pipe.get_active_adapters() == []
    assert {tuple(layer.active_adapters) for layer in tuner_layers(pipe.unet)} == {()}
    assert relative_error(predict(pipe), alone) < 1e-5
    with pytest.raises(ValueError, match="adapter 'nara' would have no effect beside the fused 'lora'"):
        pipe.set_adapters("nara")


def test_a_nara_runs_on_a_lora_that_is_fused_and_unloaded(tmp_path: Path) -> None:
    pipe = lora_and_nara(tmp_path)
    both = predict(pipe)
    pipe.save_nara_weights(tmp_path / "nara", adapter_name="nara")
    pipe.set_adapters("lora")
    pipe.fuse_lora(components=["unet"], adapter_names=["lora"])
    pipe.unload_lora_weights()
    pipe.load_nara_weights(tmp_path / "nara")
    assert relative_error(predict(pipe), both) < 1e-5


@pytest.mark.parametrize("core_type", ["constant", "identity"])
def test_fuse_lora_of_an_adapter_without_a_level_says_nothing(caplog, core_type: str) -> None:
    pipe = trained(text=False, core_type=core_type)
    with caplog.at_level(logging.WARNING, LOGGER):
        pipe.fuse_lora(components=["unet"])
    assert not said(caplog)


def test_fuse_lora_that_fails_says_nothing(caplog) -> None:
    pipe = trained(text=False)
    with caplog.at_level(logging.WARNING, LOGGER), pytest.raises(ValueError, match="λ is not known"):
        pipe.fuse_lora(components=["unet"])
    assert not said(caplog)
    assert predict(pipe).isfinite().all()
