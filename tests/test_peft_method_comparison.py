"""NaRA's entry for PEFT's comparison of methods: PEFT reads it, and a small Flux 2 trains by it as the runner does."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from nara_diffusion import NaraConfig, noise_level
from tests.helpers.denoisers.models import denoiser, inputs_of

EXPERIMENT = Path(__file__).parents[1] / "examples/peft_method_comparison/experiments/nara/flux2-klein-default"
LAYERS = {"to_q", "to_k", "to_v", "to_out.0", "linear_in", "linear_out", "to_qkv_mlp_proj"}
TEXT_LAYERS = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}


def test_the_configuration_is_a_saved_nara_config(tmp_path: Path) -> None:
    config = PeftConfig.from_pretrained(EXPERIMENT)
    assert type(config) is NaraConfig
    assert (config.r, config.lora_alpha, config.core_type) == (32, 32, "hypernetwork")
    assert set(config.target_modules) == LAYERS | TEXT_LAYERS
    config.save_pretrained(tmp_path)
    ours = json.loads((EXPERIMENT / "adapter_config.json").read_text())
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert ours | {"target_modules": None, "peft_version": None} == saved | {
        "target_modules": None,
        "peft_version": None,
    }
    fresh = NaraConfig(r=32, lora_alpha=32, target_modules=config.target_modules)
    assert ours["inference_mode"] is False
    for name, value in fresh.to_dict().items():
        if name not in ("target_modules", "peft_version", "peft_type"):
            assert getattr(config, name) == value, f"{name} is a default"


def test_the_training_parameters_are_names_of_the_runner() -> None:
    parameters = json.loads((EXPERIMENT / "training_params.json").read_text())
    assert parameters == {"optimizer_kwargs": {"lr": 1e-4, "weight_decay": 1e-4}}
    torch.optim.AdamW([nn.Parameter(torch.ones(1))], **parameters["optimizer_kwargs"])


def test_a_small_flux_2_trains_by_it_at_the_levels_of_its_timesteps() -> None:
    """Steps as the runner makes them; λ is its timestep / 1000, so that giving λ by hand changes nothing."""
    config = PeftConfig.from_pretrained(EXPERIMENT)
    torch.manual_seed(0)
    model = get_peft_model(denoiser("Flux2Transformer2DModel"), config, autocast_adapter_dtype=True)
    adapted = [name for name, _ in model.named_modules() if name.endswith(".base_layer")]
    assert len(adapted) == 8 + 4 + 1, "a double block's attention and both feed-forwards; a single block's first layer"
    inputs = {**inputs_of("Flux2Transformer2DModel"), "return_dict": False}
    timesteps = torch.tensor([950.0, 120.0])
    target = torch.randn(inputs["hidden_states"].shape)
    parameters = json.loads((EXPERIMENT / "training_params.json").read_text())
    optimizer = torch.optim.AdamW(model.parameters(), **parameters["optimizer_kwargs"])
    before = {name: value.clone() for name, value in model.named_parameters()}
    model.train()
    for _ in range(3):  # B is zero at first, and the last layer of the core until the second step
        optimizer.zero_grad(set_to_none=True)
        prediction = model(timestep=timesteps / 1000, **inputs)[0]
        loss = (prediction.float() - target).square().mean()
        loss.backward()
        optimizer.step()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert loss.isfinite()
    assert moved == {name for name, value in model.named_parameters() if value.requires_grad}
    assert {"lora_A", "lora_B"} == {part for name in moved for part in name.split(".") if part.startswith("lora_")}
    assert any("nara_core" in name for name in moved)

    for name, value in model.named_parameters():
        if "lora_B" in name or "nara_core" in name:
            value.data += 0.3 * torch.randn(value.shape)
    model.eval()
    with torch.no_grad():
        told = model(timestep=timesteps / 1000, **inputs)[0]
        with noise_level(model, timesteps / 1000):
            by_hand = model(timestep=timesteps / 1000, **inputs)[0]
        with noise_level(model, 0.5):
            elsewhere = model(timestep=timesteps / 1000, **inputs)[0]
        with model.disable_adapter():
            base = model(timestep=timesteps / 1000, **inputs)[0]
    assert torch.equal(told, by_hand)
    assert not torch.allclose(told, elsewhere, rtol=1e-3)
    plain = denoiser("Flux2Transformer2DModel")
    with torch.no_grad():
        assert torch.equal(base, plain(timestep=timesteps / 1000, **inputs)[0])


def test_without_the_import_peft_knows_no_such_type(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft.mapping

    monkeypatch.delitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "NARA")
    with pytest.raises(KeyError, match="NARA"):
        PeftConfig.from_pretrained(EXPERIMENT)
