"""Adapters of a UNet and its text encoders: what is trained, in which precision, what is refused."""

from typing import Any

import pytest
import torch
from peft import HiraConfig, LoraConfig, PeftModel

from nara_diffusion import NaraConfig
from nara_diffusion.dreambooth.denoiser import TEXT_TARGETS, AdaptedDenoiser, text_config
from tests.helpers.small_pipelines import small_sdxl

TARGETS = ["to_q", "to_v"]
NARA: dict[str, Any] = {"r": 2, "target_modules": TARGETS, "core_hidden_dims": (4, 4), "noise_convention": "timestep"}
CONFIGS: dict[str, Any] = {
    "nara": lambda: NaraConfig(**NARA),
    "dora": lambda: LoraConfig(r=2, target_modules=TARGETS, use_dora=True),
    "hira": lambda: HiraConfig(r=2, target_modules=TARGETS),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_everything_that_is_trained_gets_a_gradient_in_float32(kind: str) -> None:
    pipe = small_sdxl()
    pipe.to(dtype=torch.bfloat16)
    for part in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        part.requires_grad_(False)
    base = set(map(id, [*pipe.unet.parameters(), *pipe.text_encoder.parameters(), *pipe.text_encoder_2.parameters()]))
    model = AdaptedDenoiser(pipe, CONFIGS[kind](), train_text_encoder=True)
    generator = torch.Generator().manual_seed(4)
    ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(2, -1)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    prediction = model(sample, torch.tensor([100, 700]), ids, prompts=["a photo of a toy", "a toy"])
    prediction.float().square().mean().backward()
    assert {p.dtype for p in model.trained.values()} == {torch.float32}
    # DistributedDataParallel waits for ever for one that never gets a gradient
    assert {name for name, p in model.named_parameters() if p.grad is not None} == model.trained.keys()
    assert {name.partition(".")[0] for name in model.trained} == {"unet", "text_encoder", "text_encoder_2"}
    assert not any(id(p) in base for p in model.trained.values())
    assert isinstance(model.unet, PeftModel) is (kind == "hira")


OPTIONS: dict[str, Any] = {
    "lora_alpha": 6.0,
    "lora_dropout": 0.1,
    "init_lora_weights": "gaussian",
    "rank_pattern": {"v_proj": 4},
    "alpha_pattern": {"v_proj": 8},
}


def test_text_encoders_have_the_options_of_the_unet_but_those_of_a_core() -> None:
    core: dict[str, Any] = {"core_sharing": "layer", "noise_embedding": "raw"}
    shared: dict[str, Any] = OPTIONS | {"use_dora": True, "use_rslora": True}
    expected = {"r": 2, "target_modules": TEXT_TARGETS, **shared}
    assert text_config(LoraConfig(r=2, target_modules=TARGETS, **shared)) == LoraConfig(**expected)
    assert text_config(NaraConfig(**NARA, **shared, **core)) == NaraConfig(**expected, core_type="identity")


@pytest.mark.parametrize("option", [{"init_lora_weights": "pissa"}, {"bias": "all"}], ids=str)
def test_adapter_that_no_other_copy_of_the_base_could_load_is_refused(option: dict[str, Any]) -> None:
    pipe = small_sdxl()
    names = {name for name, _ in pipe.unet.named_modules()}
    with pytest.raises(ValueError, match="changes the base model"):
        AdaptedDenoiser(pipe, NaraConfig(**NARA, **option))
    assert {name for name, _ in pipe.unet.named_modules()} == names
