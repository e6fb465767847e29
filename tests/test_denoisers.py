"""λ from the timestep of Diffusers' denoisers: every declared class, as its own pipeline and scheduler call it."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import (
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SCMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from nara_diffusion import TimestepNoise, noise_level, register_denoiser, set_noise_source
from nara_diffusion.denoisers import _DENOISERS, denoiser_of
from tests.adapted import disturb, nara_config, relative_error
from tests.denoiser_models import DENOISERS, denoiser, inputs_of, sample_of, tensor_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),  # PEFT, at a second adapter
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # Diffusers' Chroma
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype:UserWarning"),  # Diffusers' Mochi
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # Diffusers' Karras sigmas
]

TARGETS = ["to_q", "to_v", "to_out.0"]
DISCRETE = {0: 0.0, 250: 0.25, 500: 0.5, 999: 0.999, 1000: 1.0}
SIGMA_1000 = {0.0: 0.0, 250.0: 0.25, 500.0: 0.5, 1000.0: 1.0}
SIGMA = {0.0: 0.0, 0.25: 0.25, 0.5: 0.5, 1.0: 1.0}
DATA = {1.0: 0.0, 0.75: 0.25, 0.5: 0.5, 0.0: 1.0}
DATA_1000 = {1000.0: 0.0, 750.0: 0.25, 500.0: 0.5, 0.0: 1.0}
EXPECTED: dict[str, dict[Any, float]] = {
    "UNet2DConditionModel": DISCRETE,
    "UNetMotionModel": DISCRETE,
    "UNet3DConditionModel": DISCRETE,
    "PixArtTransformer2DModel": DISCRETE,
    "HunyuanDiT2DModel": DISCRETE,
    "CogVideoXTransformer3DModel": DISCRETE,
    "CogView4Transformer2DModel": DISCRETE,
    "SD3Transformer2DModel": SIGMA_1000,
    "SanaTransformer2DModel": SIGMA_1000,
    "HunyuanVideoTransformer3DModel": SIGMA_1000,
    "WanTransformer3DModel": SIGMA_1000,
    "LTXVideoTransformer3DModel": SIGMA_1000,
    "HiDreamImageTransformer2DModel": SIGMA_1000,
    "FluxTransformer2DModel": SIGMA,
    "Flux2Transformer2DModel": SIGMA,
    "ChromaTransformer2DModel": SIGMA,
    "QwenImageTransformer2DModel": SIGMA,
    "Krea2Transformer2DModel": SIGMA,
    "AuraFlowTransformer2DModel": SIGMA,
    "CosmosTransformer3DModel": SIGMA,
    "LuminaNextDiT2DModel": DATA,
    "Lumina2Transformer2DModel": DATA,
    "ZImageTransformer2DModel": DATA,
    "MochiTransformer3DModel": DATA_1000,
}
"""What the pipelines' arguments mean: timestep → λ, both ends among them."""

CONVENTIONS = {id(DISCRETE): "timestep", **dict.fromkeys(map(id, (SIGMA_1000, SIGMA, DATA, DATA_1000)), "flow")}
ARGUMENTS = {"HiDreamImageTransformer2DModel": "timesteps", "ZImageTransformer2DModel": "t"}


def adapted_denoiser(name: str, config: Any = None, **changes: Any) -> nn.Module:
    """A tiny denoiser with a NaRA adapter on its attention projections, far from C = I."""
    model = denoiser(name, **changes)
    inject_adapter_in_model(nara_config(target_modules=TARGETS) if config is None else config, model)
    disturb(model)
    return model


def run(model: nn.Module, inputs: dict[str, Any], timestep: Any, argument: str = "timestep") -> Tensor:
    with torch.no_grad():
        return tensor_of(model(**inputs, **{argument: timestep}))


def told(model: nn.Module, call: Callable[[], Any]) -> list[float]:
    """λ as the model's core gets it while `call` runs."""
    levels: list[Tensor] = []
    core = model.get_submodule("nara_core.cores.default.global")
    handle = core.register_forward_pre_hook(lambda _, args: levels.append(args[0]))
    try:
        call()
    finally:
        handle.remove()
    assert len(levels) == 1  # once a forward
    return levels[0].tolist()


# ---------------------------------------------------------------------- every class of the table


def test_every_declared_class_is_tested():
    assert set(EXPECTED) == set(DENOISERS) == set(_DENOISERS)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_argument_of_each_class_tells_its_level(name):
    expected, argument = EXPECTED[name], ARGUMENTS.get(name, "timestep")
    model = adapted_denoiser(name)
    assert model.peft_config["default"].noise_convention == CONVENTIONS[id(expected)]
    timesteps, levels = torch.tensor(list(expected)).float(), torch.tensor(list(expected.values()))
    inputs = inputs_of(name, len(levels))
    output = run(model, inputs, timesteps, argument)
    assert told(model, lambda: run(model, inputs, timesteps, argument)) == pytest.approx(levels.tolist(), abs=1e-7)
    with noise_level(model, levels):
        assert torch.equal(run(model, inputs, timesteps, argument), output)
    for static in (0.0, 0.5, 1.0):  # C changes, not just the base model's own use of the timestep
        with noise_level(model, static):
            fixed = run(model, inputs, timesteps, argument)
        others = (levels - static).abs() > 0.1
        difference = (output - fixed).flatten(1).abs().amax(1)
        assert (difference[others] > 1e-3 * output.abs().max()).all()
        assert (difference[levels == static] <= 1e-4 * output.abs().max()).all()


@pytest.mark.parametrize("name", EXPECTED)
def test_the_argument_may_come_by_position(name):
    argument = ARGUMENTS.get(name, "timestep")
    timestep = torch.tensor([list(EXPECTED[name])[1]] * 2).float()
    model, inputs = adapted_denoiser(name), inputs_of(name)
    expected = run(model, inputs, timestep, argument)
    parameters = list(inspect.signature(type(model).forward).parameters)[1:]
    before = parameters[: parameters.index(argument)]
    rest = {key: value for key, value in inputs.items() if key not in before}
    with torch.no_grad():
        output = model(*(inputs.get(key) for key in before), timestep, **rest)
    assert torch.equal(tensor_of(output), expected)


NOT_ADAPTABLE = {
    "UNetMotionModel": r"motion_modules\.\d\.proj_",  # Diffusers calls them by keyword, which PEFT's layers don't take
    "HiDreamImageTransformer2DModel": r"\.experts\.",  # they see the tokens that are routed to them, of any sample
    "ZImageTransformer2DModel": r"all_x_embedder|cap_embedder",  # they see the tokens of all samples, of any lengths
}
TOKENS = {  # a variant of the timestep with one value a token or frame
    "WanTransformer3DModel": lambda t: t[:, None].expand(-1, 8).clone(),
    "LTXVideoTransformer3DModel": lambda t: t[:, None].expand(-1, 8).clone(),
    "CosmosTransformer3DModel": lambda t: t.view(-1, 1, 1, 1, 1).expand(-1, 1, 2, 1, 1).clone(),
}


def layers_of(model: nn.Module) -> list[str]:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [
        name for name, layer in model.named_modules() if isinstance(layer, kinds) and getattr(layer, "groups", 1) == 1
    ]


@pytest.mark.parametrize(
    ("name", "per_token"), [(name, False) for name in EXPECTED] + [(name, True) for name in TOKENS]
)
def test_each_sample_of_a_batch_has_its_own_core_in_every_layer(name, per_token):
    argument, model = ARGUMENTS.get(name, "timestep"), denoiser(name)
    names = [layer for layer in layers_of(model) if not re.search(NOT_ADAPTABLE.get(name, "^$"), layer)]
    assert len(names) > 10
    inject_adapter_in_model(nara_config(target_modules=names, r=2), model)
    disturb(model)
    inputs, timesteps = inputs_of(name, 3), torch.tensor(list(EXPECTED[name])[:3]).float()
    timesteps = TOKENS[name](timesteps) if per_token else timesteps
    batch = run(model, inputs, timesteps, argument)
    alone = torch.cat([run(model, sample_of(inputs, i, 3), timesteps[i : i + 1], argument) for i in range(3)])
    assert relative_error(batch, alone) < 1e-4
    with noise_level(model, torch.tensor([0.5, 0.25, 0.0])):
        assert relative_error(run(model, inputs, timesteps, argument), alone) > 1e-2


@pytest.mark.parametrize("name", ["HiDreamImageTransformer2DModel", "ZImageTransformer2DModel"])
def test_rows_that_are_no_samples_raise(name):
    model = denoiser(name)
    layers = [layer for layer in layers_of(model) if re.search(NOT_ADAPTABLE[name], layer)]
    inject_adapter_in_model(nara_config(target_modules=layers), model)
    timesteps = torch.tensor(list(EXPECTED[name])[:3])
    with pytest.raises(ValueError, match="noise_level has 3 values, but the batch inside layer"):
        run(model, inputs_of(name, 3), timesteps, ARGUMENTS[name])


FLOW_ARGUMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "SD3Transformer2DModel": lambda t: t,
    "SanaTransformer2DModel": lambda t: t * 1.0,
    "HunyuanVideoTransformer3DModel": lambda t: t,
    "WanTransformer3DModel": lambda t: t,
    "LTXVideoTransformer3DModel": lambda t: t,
    "HiDreamImageTransformer2DModel": lambda t: t,
    "FluxTransformer2DModel": lambda t: t / 1000,
    "Flux2Transformer2DModel": lambda t: t / 1000,
    "ChromaTransformer2DModel": lambda t: t / 1000,
    "QwenImageTransformer2DModel": lambda t: t / 1000,
    "Krea2Transformer2DModel": lambda t: t / 1000,
    "AuraFlowTransformer2DModel": lambda t: t / 1000,
    "LuminaNextDiT2DModel": lambda t: 1 - t / 1000,
    "Lumina2Transformer2DModel": lambda t: 1 - t / 1000,
    "ZImageTransformer2DModel": lambda t: (1000 - t) / 1000,
    "MochiTransformer3DModel": lambda t: t,
}
"""What each pipeline passes, from its scheduler's timesteps."""


@pytest.mark.parametrize("name", FLOW_ARGUMENTS)
def test_the_level_of_a_flow_is_the_noise_that_its_scheduler_adds(name):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=name.startswith("Mochi"))
    scheduler.set_timesteps(7)
    source = _DENOISERS[name].source()
    levels = source.noise_level(FLOW_ARGUMENTS[name](scheduler.timesteps))
    data, noise = torch.zeros(1), torch.ones(1)  # so that a noisy sample is the share of noise in it
    if name.startswith("Mochi"):
        data, noise = noise, data  # the scheduler's σ is the share of data
    share = torch.cat([scheduler.scale_noise(data, t[None], noise) for t in scheduler.timesteps])
    torch.testing.assert_close(levels, share, rtol=0, atol=1e-5)
    assert levels[0] > levels[-1]


# ---------------------------------------------------------------------- classes with peculiarities


def test_the_timestep_of_cogview4_is_not_its_sigma():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    timesteps = torch.linspace(1000, 1, 5).long().float()
    scheduler.set_timesteps(timesteps=timesteps.tolist(), sigmas=(timesteps / 1000).tolist(), mu=0.5)  # its pipeline
    levels = _DENOISERS["CogView4Transformer2DModel"].source().noise_level(scheduler.timesteps)
    torch.testing.assert_close(levels, timesteps / 1000)
    assert (scheduler.sigmas[1:-1] - levels[1:]).abs().max() > 0.05  # so λ is the timestep's, not the flow's


@pytest.mark.parametrize("timestep_scale", [1.0, 0.001, 0.3])
def test_sana_scales_its_timestep(timestep_scale):
    model = adapted_denoiser("SanaTransformer2DModel", timestep_scale=timestep_scale)
    timesteps, inputs = torch.tensor([0.0, 250.0, 1000.0]) * timestep_scale, inputs_of("SanaTransformer2DModel", 3)
    assert told(model, lambda: run(model, inputs, timesteps)) == pytest.approx([0.0, 0.25, 1.0], abs=1e-6)
    if timestep_scale < 1:
        with pytest.raises(ValueError, match="is no λ"):
            run(model, inputs, timesteps / timestep_scale)


def test_sana_sprint_is_given_sigma_itself():
    model = adapted_denoiser("SanaTransformer2DModel", guidance_embeds=True)
    scheduler = SCMScheduler()
    scheduler.set_timesteps(2)
    timesteps = scheduler.timesteps[:-1]
    sigma = torch.sin(timesteps) / (torch.cos(timesteps) + torch.sin(timesteps))  # its pipeline
    assert sigma[0] > 1  # by rounding: the scheduler starts a little beyond π / 2
    inputs = {**inputs_of("SanaTransformer2DModel"), "guidance": torch.full((2,), 0.45)}
    levels = told(model, lambda: run(model, inputs, sigma))
    assert levels[0] == 1
    assert levels == pytest.approx(sigma.tolist(), abs=1e-5)
    assert 0.7 < levels[1] < 0.9


def test_cosmos_1_is_given_the_edm_noise_and_cosmos_2_the_sigma_of_a_flow():
    first = adapted_denoiser("CosmosTransformer3DModel", extra_pos_embed_type="learnable")
    second = adapted_denoiser("CosmosTransformer3DModel")
    assert first.peft_config["default"].noise_convention == "edm"
    assert second.peft_config["default"].noise_convention == "flow"
    sigma = torch.tensor([0.002, 1.0, 80.0])
    inputs = inputs_of("CosmosTransformer3DModel", 3)
    expected = pytest.approx((sigma / (1 + sigma)).tolist(), abs=1e-6)
    assert told(first, lambda: run(first, {**inputs, "fps": 24}, 0.25 * sigma.log())) == expected
    assert told(second, lambda: run(second, inputs, sigma / (sigma + 1))) == expected
    with pytest.raises(ValueError, match="is no λ"):
        run(second, inputs, 0.25 * sigma.log())


def test_frames_given_to_cosmos_2_have_no_say():
    model, inputs = adapted_denoiser("CosmosTransformer3DModel"), inputs_of("CosmosTransformer3DModel")
    given = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1, 1)  # the first frame
    sigma = torch.tensor([0.3, 0.8]).view(2, 1, 1, 1, 1)
    timestep = given * 0.0001 + (1 - given) * sigma  # (b, 1, frames, 1, 1), as its pipeline makes it
    mask = torch.zeros(2, 1, 2, 4, 4)
    inputs = {**inputs, "hidden_states": inputs["hidden_states"][:, :3], "condition_mask": mask}
    assert told(model, lambda: run(model, inputs, timestep)) == pytest.approx([0.3, 0.8])


def test_tokens_given_to_wan_and_ltx_have_no_say():
    wan, ltx = adapted_denoiser("WanTransformer3DModel"), adapted_denoiser("LTXVideoTransformer3DModel")
    timestep = torch.tensor([[0.0] * 4 + [250.0] * 4, [0.0] * 4 + [750.0] * 4])  # (b, seq); the first frame is given
    for model, name in ((wan, "WanTransformer3DModel"), (ltx, "LTXVideoTransformer3DModel")):
        inputs = inputs_of(name)
        assert told(model, lambda m=model, x=inputs: run(m, x, timestep)) == [0.25, 0.75]
        output = run(model, inputs, timestep)
        with noise_level(model, torch.tensor([0.25, 0.75])):
            assert torch.equal(run(model, inputs, timestep), output)


# ---------------------------------------------------------------------- UNet2DConditionModel in depth

UNET = "UNet2DConditionModel"


@pytest.fixture(scope="module")
def _shared_unet() -> nn.Module:
    return adapted_denoiser(UNET)


@pytest.fixture
def unet(_shared_unet: nn.Module) -> nn.Module:
    return copy.deepcopy(_shared_unet)


DTYPES = [torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
FORMS = {
    "int": 250,
    "float": 250.0,
    **{f"0-d {dtype}": torch.tensor(250, dtype=dtype) for dtype in DTYPES},
    **{f"(1,) {dtype}": torch.tensor([250], dtype=dtype) for dtype in DTYPES},
    **{f"(b,) {dtype}": torch.tensor([250, 250], dtype=dtype) for dtype in DTYPES},
}


@pytest.mark.parametrize("timestep", FORMS.values(), ids=FORMS)
def test_a_timestep_may_have_any_form(unet, timestep):
    inputs = inputs_of(UNET)
    sample, text = inputs["sample"], inputs["encoder_hidden_states"]
    output = run(unet, inputs, timestep)
    with noise_level(unet, 0.25):
        torch.testing.assert_close(output, run(unet, inputs, torch.tensor([250, 250])), rtol=1e-5, atol=1e-5)
    levels = told(unet, lambda: unet(sample, timestep, text))
    assert levels == [0.25]  # one C for all, though a timestep may come for each
    with torch.no_grad():
        assert torch.equal(unet(sample, timestep, encoder_hidden_states=text).sample, output)
        assert torch.equal(unet(timestep=timestep, encoder_hidden_states=text, sample=sample).sample, output)


def test_mixed_timesteps_equal_one_by_one(unet):
    inputs, timesteps = inputs_of(UNET, 4), torch.tensor([0, 333, 640, 999])
    batch = run(unet, inputs, timesteps)
    for i in range(4):
        alone = run(unet, sample_of(inputs, i, 4), timesteps[i])
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(batch, run(unet, inputs, timesteps.flip(0)), atol=1e-2)


def test_the_doubled_batch_of_cfg_equals_two_runs(unet):
    inputs, timesteps = inputs_of(UNET, 4), torch.tensor([100, 800])
    halves = [{key: value[part] for key, value in inputs.items()} for part in (slice(0, 2), slice(2, 4))]
    for timestep in (torch.tensor(640), timesteps):
        both = run(unet, inputs, torch.cat([timestep, timestep]) if timestep.dim() else timestep)
        apart = torch.cat([run(unet, half, timestep) for half in halves])
        torch.testing.assert_close(both, apart, rtol=1e-4, atol=1e-5)


def test_fractional_timesteps_and_few_steps_have_their_level(unet):
    karras = EulerDiscreteScheduler(use_karras_sigmas=True)
    karras.set_timesteps(9)
    assert (karras.timesteps != karras.timesteps.round()).any()
    lcm = LCMScheduler()
    lcm.set_timesteps(4)
    turbo = EulerDiscreteScheduler(timestep_spacing="trailing")
    turbo.set_timesteps(1)
    assert turbo.timesteps.tolist() == [999]
    for scheduler, start in ((karras, 0), (karras, 5), (lcm, 0), (turbo, 0)):  # 5: as img2img starts midway
        for t in scheduler.timesteps[start:]:
            assert told(unet, lambda t=t: run(unet, inputs_of(UNET), t)) == pytest.approx([float(t) / 1000], abs=1e-7)


def _edm(scheduler: Any) -> tuple[Tensor, Tensor]:
    scheduler.set_timesteps(8)
    return scheduler.timesteps, scheduler.sigmas[:-1]


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMEulerScheduler(),
        EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True),
    ],
    ids=["EDM", "continuous"],
)
def test_edm_timesteps_are_refused_until_declared(unet, scheduler):
    timesteps, sigmas = _edm(scheduler)
    assert timesteps.min() < 0
    inputs = inputs_of(UNET)
    with pytest.raises(ValueError, match=r'is no λ in \[0, 1\].*TimestepNoise\("edm"\)'):
        run(unet, inputs, timesteps.min())
    set_noise_source(unet, TimestepNoise("edm"))
    assert unet.peft_config["default"].noise_convention == "edm"  # a new adapter follows
    for timestep, sigma in zip(timesteps, sigmas, strict=True):
        level = float(sigma / (1 + sigma))
        assert told(unet, lambda t=timestep: run(unet, inputs, t)) == pytest.approx([level], abs=1e-5)
    with pytest.raises(ValueError, match=r"999.* as 'edm' is no λ"):
        run(unet, inputs, 999)


@pytest.mark.parametrize("timestep", [1001, -1, float("nan"), torch.tensor([3.0, -0.5]), torch.tensor([])])
def test_timesteps_out_of_range_raise(unet, timestep):
    with pytest.raises(ValueError, match=r"timestep (is|has shape)"):
        run(unet, inputs_of(UNET), timestep)


def test_another_number_of_training_timesteps(unet):
    set_noise_source(unet, TimestepNoise(num_train_timesteps=500))
    assert told(unet, lambda: run(unet, inputs_of(UNET), 250)) == [0.5]
    with pytest.raises(ValueError, match="is no λ"):
        run(unet, inputs_of(UNET), 999)


def test_noise_level_beats_the_timestep(unet):
    inputs = inputs_of(UNET)
    with noise_level(unet, 0.75):
        assert told(unet, lambda: run(unet, inputs, 250)) == [0.75]
        assert told(unet, lambda: run(unet, inputs, -3)) == [0.75]  # nobody reads it then
    assert told(unet, lambda: run(unet, inputs, 250)) == [0.25]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"meaning": "snr"}, "meaning is 'snr': choose one of 'discrete'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        ({"scale": 0.0}, "scale is 0.0"),
    ],
)
def test_a_source_refuses_what_it_does_not_know(options, said):
    with pytest.raises(ValueError, match=said):
        TimestepNoise(**options)


# ---------------------------------------------------------------------- the convention in a checkpoint


@pytest.fixture
def _registry() -> Iterator[None]:
    before = dict(_DENOISERS)
    yield
    _DENOISERS.clear()
    _DENOISERS.update(before)


class FlowUNet(UNet2DConditionModel):
    """A UNet whose timestep is the σ of a flow."""


def saved_adapter(folder: Any, config: Any) -> PeftModel:
    model = get_peft_model(denoiser(UNET), config)
    disturb(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.usefixtures("_registry")
def test_the_convention_is_saved_and_checked_on_load(tmp_path):
    model = saved_adapter(tmp_path, nara_config(target_modules=TARGETS))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["noise_convention"] == "timestep"
    loaded = PeftModel.from_pretrained(denoiser(UNET), tmp_path)
    inputs = inputs_of(UNET)
    assert torch.equal(run(loaded, inputs, 640), run(model, inputs, 640))
    register_denoiser("FlowUNet", "sigma")
    other = FlowUNet(**DENOISERS[UNET][0])
    with pytest.raises(ValueError, match="trained with λ defined as 'timestep', but the source of λ tells 'flow'"):
        PeftModel.from_pretrained(other, tmp_path)
    with pytest.raises(ValueError, match="trained with λ defined as 'timestep', but the source of λ tells 'edm'"):
        set_noise_source(loaded, TimestepNoise("edm"))  # it says what it was trained with


def test_an_adapter_that_was_trained_in_edm_terms_reads_them(tmp_path):
    model = saved_adapter(tmp_path, nara_config(target_modules=TARGETS, noise_convention="edm"))
    inputs = inputs_of(UNET)
    loaded = PeftModel.from_pretrained(denoiser(UNET), tmp_path)
    assert told(loaded.base_model.model, lambda: run(loaded, inputs, 0.0)) == [0.5]
    assert torch.equal(run(loaded, inputs, -0.3), run(model, inputs, -0.3))
    discrete = get_peft_model(denoiser(UNET), nara_config(target_modules=TARGETS))
    with pytest.raises(ValueError, match="trained with λ defined as 'edm', but the source of λ tells 'timestep'"):
        discrete.load_adapter(str(tmp_path), "other")
    with pytest.raises(ValueError, match="'masked_share'"):
        adapted_denoiser(UNET, nara_config(target_modules=TARGETS, noise_convention="masked_share"))


def test_one_config_serves_models_of_different_conventions():
    config = nara_config(target_modules=TARGETS)
    unet, flux = adapted_denoiser(UNET, config), adapted_denoiser("FluxTransformer2DModel", config)
    assert config.noise_convention is None
    assert unet.peft_config["default"].noise_convention == "timestep"
    assert flux.peft_config["default"].noise_convention == "flow"


def test_diffusers_own_call_reads_the_timestep_too():
    model = denoiser(UNET)
    model.add_adapter(nara_config(target_modules=TARGETS))
    disturb(model)
    assert torch.equal(run(model, inputs_of(UNET), 640), run(adapted_denoiser(UNET), inputs_of(UNET), 640))


# ---------------------------------------------------------------------- videos in a UNet

VIDEO_TARGETS = [*TARGETS, "attentions.0.proj_in", "time_emb_proj", "resnets.0.conv1", "linear_2", "conv4.3"]


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
@pytest.mark.parametrize("name", ["UNetMotionModel", "UNet3DConditionModel"])
def test_each_video_of_a_batch_has_its_level_in_spatial_and_temporal_layers(name, use_dora):
    config = nara_config(target_modules=VIDEO_TARGETS, use_dora=use_dora)
    model, inputs, timesteps = adapted_denoiser(name, config), inputs_of(name, 3), torch.tensor([50, 500, 950])
    adapted_names = {key for key, _ in model.named_modules() if key.endswith(".lora_A")}
    temporal = {key for key in adapted_names if "motion" in key or "temp_" in key}
    assert temporal
    assert adapted_names - temporal
    batch = run(model, inputs, timesteps)
    for i in range(3):
        expected = run(model, sample_of(inputs, i, 3), timesteps[i])
        torch.testing.assert_close(batch[i : i + 1], expected, rtol=1e-4, atol=1e-4)
    with noise_level(model, 0.5):
        assert not torch.allclose(batch, run(model, inputs, timesteps), atol=1e-2)
    for length in (2, 6, 12):  # of which some divide or equal the rows inside
        with (
            noise_level(model, torch.rand(length)),
            pytest.raises(ValueError, match=rf"{length} values, .* batch is 3"),
        ):
            run(model, inputs, timesteps)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, inputs, timesteps), batch)
    with noise_level(twin, torch.rand(2)), pytest.raises(ValueError, match="batch is 3"):
        run(twin, inputs, timesteps)


# ---------------------------------------------------------------------- classes that nobody declared


def undeclared() -> UNet2DModel:
    torch.manual_seed(9)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=4,
    ).eval()


@pytest.mark.usefixtures("_registry")
def test_a_class_that_nobody_declared_raises_until_it_is_registered():
    sample = torch.randn(2, 3, 8, 8)
    model = undeclared()
    assert denoiser_of(model) is None
    inject_adapter_in_model(nara_config(target_modules=TARGETS), model)
    with pytest.raises(ValueError, match=r"register_denoiser\('UNet2DModel', meaning\) before adding adapters"):
        model(sample, 250)
    with noise_level(model, 0.3):
        model(sample, 250)
    register_denoiser("UNet2DModel")
    register_denoiser("UNet2DModel", "discrete")  # harmless
    with pytest.raises(ValueError, match=r"UNet2DModel is declared already, as Denoiser.*'discrete'"):
        register_denoiser("UNet2DModel", "sigma")
    with pytest.raises(ValueError, match="meaning is 'snr'"):
        register_denoiser("Another", "snr")
    model = undeclared()
    inject_adapter_in_model(nara_config(target_modules=TARGETS), model)
    disturb(model)
    assert told(model, lambda: model(sample, torch.tensor([250, 500]))) == [0.25, 0.5]


# ---------------------------------------------------------------------- checkpointed blocks


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("name", "timesteps"),
    [
        ("UNetMotionModel", ([100, 300], [900, 700])),
        ("SD3Transformer2DModel", ([100.0, 300.0], [900.0, 700.0])),
        ("FluxTransformer2DModel", ([0.1, 0.3], [0.9, 0.7])),
    ],
)
def test_two_forwards_before_one_backward_have_the_gradients_of_no_checkpointing(name, timesteps, reentrant):
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = adapted_denoiser(name).train()
        if checkpointing:
            function = torch.utils.checkpoint.checkpoint
            model.enable_gradient_checkpointing(lambda *args: function(*args, use_reentrant=reentrant))
        inputs = inputs_of(name)
        first = "sample" if "sample" in inputs else "hidden_states"
        inputs[first].requires_grad_()  # as reentrant checkpointing needs
        losses = [tensor_of(model(**inputs, timestep=torch.tensor(t))).square().mean() for t in timesteps]
        sum(losses[1:], losses[0]).backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    expected, actual = gradients(False), gradients(True)
    assert any("nara_core" in key for key in expected)
    assert expected.keys() == actual.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(actual[key], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=key)
