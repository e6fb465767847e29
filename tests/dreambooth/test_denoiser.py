"""Every method of --adapter on a UNet and its text encoders: what is trained, in which precision, what is refused."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel

from nara_diffusion import NaraConfig
from nara_diffusion.cores import registry as custom_cores
from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from nara_diffusion.dreambooth.denoiser import TEXT_TARGETS, AdaptedDenoiser, text_config
from nara_diffusion.training.adapters.configs import adapter_config
from nara_diffusion.training.adapters.methods import CORE_FIELDS, METHODS
from tests.helpers.small_pipelines import small_sdxl

IMAGE_METHODS = [name for name, method in METHODS.items() if method.family != "prompt"]


def arguments(adapter: str, **changes: Any) -> DreamBoothArguments:
    options = ["oft_block_size=4"] if adapter == "oft" else None
    values = {"rank": 2, "target_modules": ["to_q", "to_v"], "core_hidden_dims": [4, 4], "adapter_options": options}
    values |= {"pretrained_model_name_or_path": "x", "instance_data_dir": "x", "instance_prompt": "x", **changes}
    return DreamBoothArguments(adapter=adapter, **values)


def config_of(adapter: str, **changes: Any) -> Any:
    return adapter_config(arguments(adapter, **changes), noise_convention="timestep", total_steps=9)


def predicted(model: AdaptedDenoiser) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(2, -1)
    return model(sample, torch.tensor([100, 700]), ids, prompts=["a photo of a toy", "a toy"])


@pytest.mark.parametrize("adapter", IMAGE_METHODS)
def test_everything_that_is_trained_gets_a_gradient_in_float32(adapter: str) -> None:
    pipe = small_sdxl()
    if adapter != "full":  # all weights are loaded in float32
        pipe.to(dtype=torch.bfloat16)
    components = [pipe.unet, pipe.text_encoder, pipe.text_encoder_2]
    base = {id(p) for component in components for p in component.requires_grad_(False).parameters()}
    model = AdaptedDenoiser(pipe, config_of(adapter), train_text_encoder=True)
    assert set(model.components) == {"unet", "text_encoder", "text_encoder_2"}
    predicted(model).float().square().mean().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    # DistributedDataParallel waits for ever for one that never gets a gradient
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    assert {name.partition(".")[0] for name in trained} == set(model.components)
    assert any(id(p) in base for p in trained.values()) is (adapter == "full")


def test_peft_keeps_state_of_its_own_for_what_it_alone_saves() -> None:
    wrapped = {
        name: isinstance(AdaptedDenoiser(small_sdxl(), config_of(name)).unet, PeftModel) for name in IMAGE_METHODS
    }
    assert {name for name, is_wrapped in wrapped.items() if is_wrapped} == {"hira", "vera", "adalora", "oft"}


def test_text_encoders_have_adapters_that_know_no_noise() -> None:
    nara = text_config(config_of("nara", lora_alpha=6.0, lora_dropout=0.1))
    assert isinstance(nara, NaraConfig)
    assert (nara.core_type, nara.r, nara.lora_alpha, nara.lora_dropout) == ("identity", 2, 6.0, 0.1)
    bins = text_config(config_of("multi_lora", lora_alpha=6.0))
    assert isinstance(bins, NaraConfig)
    assert (bins.core_type, bins.r, bins.lora_alpha) == ("identity", 2, 6.0)
    dora = text_config(config_of("dora"))
    assert type(dora) is LoraConfig
    assert dora.use_dora
    assert dora.target_modules == set(TEXT_TARGETS)
    assert text_config(None) is None


OPTIONS = ["init_lora_weights=gaussian", "rank_pattern={v_proj: 4}", "alpha_pattern={v_proj: 8}", "bias=lora_only"]


@pytest.mark.parametrize(
    "changes",
    [
        {"core_input": "noise_level", "core_init": "kaiming"},
        {"core_sharing": "layer", "noise_embedding": "raw"},
        {"adapter": "nara_knots", "core_knots": 3},
        {"adapter": "nara_dora", "use_rslora": True},
        {"core_type": "identity"},
        {"adapter": "tlora", "rank_mask_min": 1},
        {"core_type": "mine"},
    ],
    ids=str,
)
def test_text_encoders_have_the_options_of_the_unet(changes: dict, monkeypatch) -> None:
    """As a LoRA's do, whose configuration is copied: all but what a core reads."""
    monkeypatch.setattr(custom_cores, "_custom", {"mine": lambda config, rank: None})
    changes = {"adapter": "nara", "adapter_options": OPTIONS, "lora_alpha": 6.0, "lora_dropout": 0.1, **changes}
    shared = {name: changes[name] for name in ("adapter_options", "lora_alpha", "lora_dropout")}
    lora = text_config(config_of("lora", **shared))
    nara = text_config(config_of(**changes))
    assert type(lora) is LoraConfig
    assert type(nara) is NaraConfig
    fields = {field.name for field in dataclasses.fields(LoraConfig)} - {"peft_type", "use_dora", "use_rslora"}
    assert {name: getattr(nara, name) for name in fields} == {name: getattr(lora, name) for name in fields}
    assert nara.use_dora is (changes["adapter"] == "nara_dora")
    assert nara.use_rslora is changes.get("use_rslora", False)
    plain = NaraConfig(core_type="identity")
    assert {name: getattr(nara, name) for name in CORE_FIELDS} == {name: getattr(plain, name) for name in CORE_FIELDS}


@pytest.mark.parametrize("rslora", [False, True])
def test_a_text_encoder_s_one_block_of_multi_lora_has_its_share_of_the_patterns(rslora: bool) -> None:
    options = ["rank_pattern={v_proj: 20}", "alpha_pattern={v_proj: 60.0}", "init_lora_weights=gaussian"]
    unet = config_of("multi_lora", lora_alpha=6.0, use_rslora=rslora, adapter_options=options)
    config = text_config(unet)
    assert (config.r, config.lora_alpha) == (2, pytest.approx(6.0))
    assert config.rank_pattern == {"v_proj": 4}
    assert config.alpha_pattern == {"v_proj": pytest.approx(60.0 / (math.sqrt(5) if rslora else 5))}
    assert config.init_lora_weights == "gaussian"


def test_a_start_of_a_that_belongs_to_a_core_is_said_to_stay_with_the_unet(caplog) -> None:
    config = config_of("tlora", lora_a_init="orthogonal")
    caplog.clear()
    assert config.lora_a_init == "orthogonal"
    assert text_config(config).lora_a_init == "peft"
    assert caplog.messages == [
        "lora_a_init 'orthogonal' is for layers with a core: in the text encoders, A starts by init_lora_weights True"
    ]


def test_a_pipeline_loads_text_encoders_that_started_otherwise(tmp_path) -> None:
    pipe = small_sdxl()
    for component in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        component.requires_grad_(False)
    model = AdaptedDenoiser(pipe, config_of("nara", adapter_options=OPTIONS[:1]), train_text_encoder=True)
    A = dict(model.text_encoder.named_parameters())
    first = torch.cat([value.flatten() for name, value in A.items() if "lora_A" in name and value.requires_grad])
    assert first.abs().max() > 16**-0.5  # what PEFT's own start stays below
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    expected = predicted(model).detach()
    pipe.save_nara_weights(tmp_path)
    other = small_sdxl()
    other.load_nara_weights(tmp_path)
    for name in ("unet", "text_encoder", "text_encoder_2"):
        setattr(model, name, getattr(other, name))
    assert torch.equal(predicted(model).detach(), expected)


@pytest.mark.parametrize("option", ["init_lora_weights=pissa", "bias=all", "modules_to_save=[conv_out]"])
def test_an_adapter_that_could_not_be_saved_is_refused_before_it_is_trained(option: str) -> None:
    pipe = small_sdxl()
    names = {name for name, _ in pipe.unet.named_modules()}
    with pytest.raises(ValueError, match=r"The adapter of unet has .*, which changes the base model itself"):
        AdaptedDenoiser(pipe, config_of("nara", adapter_options=[option]))
    assert {name for name, _ in pipe.unet.named_modules()} == names


@pytest.mark.parametrize(("adapter", "kind"), [("vera", "VeRA"), ("pissa", "init_lora_weights='pissa'")])
def test_convolutions_are_refused_by_name_where_peft_has_linear_layers_alone(adapter: str, kind: str) -> None:
    config = config_of(adapter, target_modules=["to_q", "conv1", "conv2"])
    with pytest.raises(
        ValueError, match=rf"target_modules conv1, conv2 are convolutions of UNet2D.*PEFT has {kind} for"
    ):
        AdaptedDenoiser(small_sdxl(), config)


@pytest.mark.parametrize("adapter", ["lora", "dora", "hira", "adalora", "oft"])
def test_convolutions_are_adapted_where_peft_can(adapter: str) -> None:
    model = AdaptedDenoiser(small_sdxl(), config_of(adapter, target_modules=["conv1"]))
    before = predicted_frozen(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    assert (predicted_frozen(model) - before).abs().max() > 1e-4


def predicted_frozen(model: AdaptedDenoiser) -> torch.Tensor:
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    embeddings = (torch.ones(1, 12, 40), torch.ones(1, 24))
    ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]])
    with torch.no_grad():
        return model(sample, torch.tensor([500]), ids, embeddings=embeddings)


@pytest.mark.parametrize("adapter", ["prompt_tuning", "p_tuning"])
def test_virtual_tokens_are_refused_by_name(adapter: str) -> None:
    with pytest.raises(
        ValueError, match=rf"adapter is '{adapter}', whose virtual tokens .* expected one of nara, .*full"
    ):
        arguments(adapter)
