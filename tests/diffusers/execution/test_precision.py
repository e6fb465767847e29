"""Denoisers in half precision, stored in float8 (layerwise casting), and quantised by bitsandbytes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from diffusers.training_utils import cast_training_params
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from nara_diffusion import noise_level
from tests.diffusers.reference import ATTENTION, UNET_TARGETS, adapt
from tests.helpers.adapted import core_by_hand, disturb, nara_config, relative_error
from tests.helpers.rounding import rounding
from tests.helpers.small_pipelines import pixels, small_sd, small_sdxl, small_unet

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast"),
    pytest.mark.filterwarnings("ignore:.*should be kept in float32"),
]
ROUNDING = {torch.float16: 0.03, torch.bfloat16: 0.2}
FLOAT8 = torch.float8_e4m3fn
TIMESTEPS = torch.tensor([20, 500, 900])


def adapted_unet(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(1)
    model = small_unet(16).to(dtype)
    model.add_adapter(nara_config(**{"target_modules": UNET_TARGETS, **changes}))
    disturb_gently(model)
    return model


def disturb_gently(model: nn.Module) -> None:
    """An update so small that rounding is not multiplied on its way through the network."""
    disturb(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.3


def run(model: Any, timestep: Any = TIMESTEPS, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    sample, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 5, 16, generator=generator)
    with torch.no_grad():
        return model(sample.to(dtype), timestep, text.to(dtype)).sample


def sdxl_prediction(pipe: Any) -> Tensor:
    generator, dtype = torch.Generator().manual_seed(2), pipe.text_encoder.dtype
    sample, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 5, 40, generator=generator)
    added = {"text_embeds": torch.randn(3, 24, generator=generator).to(dtype), "time_ids": torch.ones(3, 6)}
    with torch.no_grad():
        return pipe.unet(sample.to(dtype), TIMESTEPS, text.to(dtype), added_cond_kwargs=added).sample


# ---------------------------------------------------------------------- bf16 and fp16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
def test_half_precision_is_float32_within_its_rounding(dtype, use_dora):
    model = adapted_unet(dtype, use_dora=use_dora)
    assert {p.dtype for n, p in model.named_parameters() if "nara_core" in n} == {torch.float32}
    exact = copy.deepcopy(model).float()
    expected = run(exact)
    with noise_level(exact, 0.5):
        effect = relative_error(run(exact), expected)
    error = relative_error(run(model, dtype=dtype), expected)
    assert error < ROUNDING[dtype]
    assert effect > 3 * error
    for i in range(3):  # each sample has its own C
        alone = run(model, TIMESTEPS[i], dtype=dtype)[i]
        assert relative_error(run(model, dtype=dtype)[i], alone) < ROUNDING[dtype]


def test_timesteps_are_exact_in_half_precision_pipelines():
    """A pipeline in bf16 hands its UNet the scheduler's timestep, not one rounded to bf16."""
    pipe = small_sd().to(torch.bfloat16)
    model, plain = adapt(pipe.unet, ATTENTION)
    levels: list[float] = []
    core = model.get_submodule("nara_core.cores.default.shared")
    core.register_forward_pre_hook(lambda _, args: levels.extend(args[0].tolist()))
    image = pixels(pipe)
    assert image.isfinite().all()
    pipe.scheduler.set_timesteps(3)
    assert levels == pytest.approx([float(t) / 1000 for t in pipe.scheduler.timesteps], abs=1e-7)
    assert plain.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_trainables_in_a_half_precision_denoiser(dtype):
    model = adapted_unet(dtype)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "nara_core" in name)
    before = run(model, dtype=dtype)
    cast_training_params(model, dtype=torch.float32)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert relative_error(run(model, dtype=dtype), before) < ROUNDING[dtype]


# ---------------------------------------------------------------------- layerwise casting


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
@pytest.mark.parametrize("everything", [False, True], ids=["base alone", "A and B too"])
def test_layerwise_casting_after_adding_changes_weights_by_their_storage_alone(everything, use_dora):
    model = adapted_unet(use_dora=use_dora)
    reference = copy.deepcopy(model)
    if everything:
        apply_layerwise_casting(model, FLOAT8, torch.float32)
    else:
        model.enable_layerwise_casting(FLOAT8, torch.float32)
    stored = {name for name, parameter in model.named_parameters() if parameter.dtype == FLOAT8}
    assert any("lora_B" in name for name in stored) == everything
    assert any("base_layer" in name for name in stored)
    assert not any("nara_core" in name for name in stored)
    for name, parameter in reference.named_parameters():
        if name in stored:
            parameter.data = parameter.data.to(FLOAT8).float()
    for _ in range(2):
        assert torch.equal(run(model), run(reference))
        assert {name for name, parameter in model.named_parameters() if parameter.dtype == FLOAT8} == stored


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_an_adapter_added_to_a_denoiser_that_is_stored_in_float8(compute):
    model = small_unet(16).to(compute)
    model.enable_layerwise_casting(FLOAT8, compute)
    torch.manual_seed(1)
    model.add_adapter(nara_config(target_modules=UNET_TARGETS))
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n or "nara_core" in n} == {torch.float32}
    disturb(model)
    reference = small_unet(16).to(compute)
    torch.manual_seed(1)
    reference.add_adapter(nara_config(target_modules=UNET_TARGETS))
    disturb(reference)
    stored = {name for name, parameter in model.named_parameters() if parameter.dtype == FLOAT8}
    assert len(stored) > 20
    for name, parameter in reference.named_parameters():
        parameter.data = parameter.data.to(FLOAT8).to(compute) if name in stored else parameter.data
        if "lora_" in name:
            parameter.data = model.get_parameter(name).data
    assert relative_error(run(model, dtype=compute), run(reference, dtype=compute)) < 1e-6
    with noise_level(model, 0.5):
        assert relative_error(run(model, dtype=compute), run(reference, dtype=compute)) > 1e-2


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_load_nara_weights_before_and_after_layerwise_casting_keeps_a_and_b_out_of_float8(compute, tmp_path):
    trained = small_sdxl()
    trained.unet.add_adapter(nara_config(target_modules=UNET_TARGETS))
    disturb_gently(trained.unet)
    trained.save_nara_weights(tmp_path)  # type: ignore[attr-defined]
    expected = {f"unet.{name}": value for name, value in get_peft_model_state_dict(trained.unet).items()}
    pipes: dict[str, Any] = {order: small_sdxl().to(compute) for order in ("load, cast", "cast, load", "reference")}
    pipes["load, cast"].load_nara_weights(tmp_path)
    for order in ("load, cast", "cast, load"):
        pipes[order].unet.enable_layerwise_casting(FLOAT8, compute)
    pipes["cast, load"].load_nara_weights(tmp_path)
    pipes["reference"].load_nara_weights(tmp_path)
    stored = {name for name, value in pipes["cast, load"].unet.named_parameters() if value.dtype == FLOAT8}
    assert any("base_layer" in name for name in stored)
    for name, value in pipes["reference"].unet.named_parameters():
        value.data = value.data.to(FLOAT8).to(compute) if name in stored else value.data
    for order in ("load, cast", "cast, load"):
        unet = pipes[order].unet
        assert {name for name, value in unet.named_parameters() if value.dtype == FLOAT8} == stored
        assert not any("lora_" in name or "nara_core" in name for name in stored)
        dtype = torch.float32 if order == "cast, load" else compute
        for name, value in get_peft_model_state_dict(unet, adapter_name="default_0").items():
            given = expected[f"unet.{name}"]
            torch.testing.assert_close(value, given.to(given.dtype if "nara_core" in name else dtype), rtol=0, atol=0)
        error = relative_error(sdxl_prediction(pipes[order]), sdxl_prediction(pipes["reference"]))
        assert error < (1e-6 if compute == torch.float32 else ROUNDING[compute])


def test_float32_factors_beside_bf16_weights_stored_in_float8():
    model = adapted_unet(torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    cast_training_params(model, dtype=torch.float32)
    reference = copy.deepcopy(model)
    model.enable_layerwise_casting(FLOAT8, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.dtype == FLOAT8:
            other = reference.get_parameter(name)
            other.data = other.data.to(FLOAT8).to(torch.bfloat16)
    assert torch.equal(run(model, dtype=torch.bfloat16), run(reference, dtype=torch.bfloat16))


def test_dora_on_a_weight_stored_in_float8_is_refused_before_anything_is_changed():
    model = small_unet(16)
    model.enable_layerwise_casting(FLOAT8, torch.float32)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(
        ValueError, match=r"whose weight is stored as torch.float8_e4m3fn.*before enable_layerwise_cast"
    ):
        model.add_adapter(nara_config(target_modules=ATTENTION, use_dora=True))
    assert [name for name, _ in model.named_modules()] == names


# ---------------------------------------------------------------------- bitsandbytes


def quantise(model: nn.Module, bits: int) -> None:
    """Every attention projection becomes a bitsandbytes layer, as Diffusers does on a GPU."""
    bnb = pytest.importorskip("bitsandbytes")
    for name, module in list(model.named_modules()):
        for child, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear) and "attentions" in f"{name}.{child}":
                size = layer.in_features, layer.out_features, layer.bias is not None
                if bits == 4:
                    new = bnb.nn.Linear4bit(*size, compute_dtype=torch.float32)
                else:
                    new = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False)
                new.load_state_dict(layer.state_dict())
                setattr(module, child, new.to("cpu"))  # moving quantises
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8  # type: ignore[assignment]
    model.eval()


WIDTHS = {"block_out_channels": (64, 64), "norm_num_groups": 8, "attention_head_dim": (8, 8)}


def layer_errors(model: Any) -> list[float]:
    """From now on, the relative error of each adapted layer against its base layer + s · B · C(λ) · A in float64.

    A layer is compared on the input that it was given: 8-bit layers round theirs to 255 values a row, and which of two
    neighbours a value becomes may hang on its last bit, that is on the order of a sum in float32 some layers before.
    """
    state, config = model.state_dict(), model.peft_config["default"]  # once: it changes how 4-bit layers multiply
    level = torch.empty(0)
    errors: list[float] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal level
        level = torch.as_tensor(kwargs.get("timestep", args[1] if len(args) > 1 else None)).double().reshape(-1) / 1000

    def compare(layer: Any, args: Any, output: Tensor) -> None:
        C = core_by_hand(state, "nara_core.cores.default.shared.", config, level)
        A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        update = 6 / 4 * torch.einsum("or,brq,qi,bli->blo", B, C, A, args[0].double())
        base = layer.get_base_layer()(args[0])  # under the same grad mode: 4-bit layers have a kernel for each
        errors.append(relative_error(output, base.double() + update))

    model.register_forward_pre_hook(before, with_kwargs=True)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.register_forward_hook(compare)
    return errors


LAYER_ROUNDING = rounding(terms=64, sums=8)
"""Of W0, A, C and B, and of the four layers that make C; no sum is longer than the 64 channels."""


@pytest.mark.parametrize("training", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_unet_gives_each_sample_its_own_core(bits, training):
    model = small_unet(64, **WIDTHS)
    quantise(model, bits)
    model.add_adapter(nara_config(target_modules=ATTENTION))
    kinds = {type(m).__name__ for n, m in model.named_modules() if n.endswith("to_q")}
    assert kinds == {"Linear4bit" if bits == 4 else "Linear8bitLt"}
    disturb_gently(model)
    generator = torch.Generator().manual_seed(2)
    sample, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 5, 64, generator=generator)
    sample.requires_grad_(training)
    errors = layer_errors(model)
    with torch.set_grad_enabled(training):
        model(sample, TIMESTEPS, text)
        assert len(errors) == 32
        assert max(errors) < LAYER_ROUNDING
        with noise_level(model, 0.5):  # which the reference does not know of
            model(sample, TIMESTEPS, text)
    assert min(errors[32:]) > 100 * LAYER_ROUNDING


def test_a_quantised_unet_in_a_pipeline_reads_the_level_of_each_step():
    pipe = small_sd(**WIDTHS)
    quantise(pipe.unet, 8)
    pipe.unet.add_adapter(nara_config(target_modules=ATTENTION))
    disturb_gently(pipe.unet)
    errors = layer_errors(pipe.unet)
    pixels(pipe)
    assert len(errors) == 4 * 32
    assert max(errors) < LAYER_ROUNDING
    with noise_level(pipe.unet, 0.5):
        pixels(pipe)
    assert min(errors[4 * 32 :]) > 100 * LAYER_ROUNDING
