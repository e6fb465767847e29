"""λ from the timestep of Diffusers' denoisers: every declared class, as its own pipeline and scheduler call it."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import inject_adapter_in_model
from torch import Tensor, nn

from nara_diffusion import noise_level
from nara_diffusion.noise.denoisers.lookup import _DENOISERS
from tests.helpers.adapted import disturb, nara_config, relative_error
from tests.helpers.denoisers.adapted import WARNINGS_OF_DIFFUSERS, adapted_denoiser, run, told
from tests.helpers.denoisers.levels import ARGUMENTS, BATCHED, CONVENTIONS, EXPECTED, ONE_LEVEL
from tests.helpers.denoisers.models import DENOISERS, denoiser, inputs_of, sample_of, tensor_of, timestep_for

pytestmark = WARNINGS_OF_DIFFUSERS


def test_every_declared_class_is_tested():
    assert set(EXPECTED) == set(DENOISERS) == set(_DENOISERS)


@pytest.mark.parametrize("name", BATCHED)
def test_the_argument_of_each_class_tells_its_level(name):
    expected, argument = EXPECTED[name], ARGUMENTS.get(name, "timestep")
    model = adapted_denoiser(name)
    assert model.peft_config["default"].noise_convention == CONVENTIONS[id(expected)]
    timesteps, levels = torch.tensor(list(expected)).float(), torch.tensor(list(expected.values()))
    inputs = inputs_of(name, len(levels))
    output = run(model, inputs, timesteps, argument)
    assert told(model, lambda: run(model, inputs, timesteps, argument)) == pytest.approx(levels.tolist(), abs=1e-7)
    with noise_level(model, levels):
        assert relative_error(run(model, inputs, timesteps, argument), output) < 1e-5
    for static in (0.0, 0.5, 1.0):  # C changes, not just the base model's own use of the timestep
        with noise_level(model, static):
            fixed = run(model, inputs, timesteps, argument)
        others = (levels - static).abs() > 0.1
        difference = (output - fixed).flatten(1).abs().amax(1)
        assert (difference[others] > 1e-3 * output.abs().max()).all()
        assert (difference[levels == static] <= 1e-4 * output.abs().max()).all()


@pytest.mark.parametrize("name", ONE_LEVEL)
def test_a_class_whose_layers_see_tokens_first_has_one_level_a_batch(name):
    argument, model, inputs = ARGUMENTS.get(name, "timestep"), adapted_denoiser(name), inputs_of(name)
    for timestep, level in EXPECTED[name].items():
        timesteps = torch.tensor([timestep] * (1 if name.startswith("MiniMax") else 2))
        outputs: list[Tensor] = []
        call = functools.partial(run, model, inputs, timesteps, argument)
        assert told(model, lambda call=call, outputs=outputs: outputs.append(call())) == pytest.approx([level])
        for value, same in ((level, True), (1 - level if level != 0.5 else 0.0, False)):
            with noise_level(model, value):
                assert (relative_error(call(), outputs[0]) < 1e-5) == same
    with noise_level(model, torch.tensor([0.2, 0.7])), pytest.raises(ValueError, match="noise_level has 2 values, but"):
        run(model, inputs, timesteps, argument)


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
        output = model(*(inputs.get(key) for key in before), timestep_for(model, timestep), **rest)
    assert torch.equal(tensor_of(output), expected)


NOT_ADAPTABLE = {  # while the samples of a batch have unequal λ
    "HeliosTransformer3DModel": r"condition_embedder\.time",  # one row for all histories, at t = 0
    "QwenImage21Transformer2DModel": r"time_text_embed|^modulation|^norm_out",  # one more row, at t = 0
    "SanaWMTransformer3DModel": r"inverted_conv",  # Diffusers reads its channels, which PEFT's layers don't have
    "WanAnimate2Transformer3DModel": r"^patch_embedding",  # it sees the samples one by one
    "UNetMotionModel": r"motion_modules\.\d\.proj_",  # Diffusers calls them by keyword, which PEFT's layers don't take
    "HiDreamImageTransformer2DModel": r"\.experts\.",  # they see the tokens that are routed to them, of any sample
    "ZImageTransformer2DModel": r"all_x_embedder|cap_embedder",  # they see the tokens of all samples, of any lengths
}
TOKENS = {  # a variant of the timestep with one value a token or frame
    "WanTransformer3DModel": lambda t: t[:, None].expand(-1, 8).clone(),
    "LTXVideoTransformer3DModel": lambda t: t[:, None].expand(-1, 8).clone(),
    "CosmosTransformer3DModel": lambda t: t.view(-1, 1, 1, 1, 1).expand(-1, 1, 2, 1, 1).clone(),
    "LTX2VideoTransformer3DModel": lambda t: t[:, None].expand(-1, 8).clone(),
    "SanaVideoTransformer3DModel": lambda t: t.view(-1, 1, 1, 1, 1).expand(-1, 1, 2, 2, 2).clone(),
    "SkyReelsV2Transformer3DModel": lambda t: t[:, None].expand(-1, 2).clone(),
}


def layers_of(model: nn.Module) -> list[str]:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [
        name for name, layer in model.named_modules() if isinstance(layer, kinds) and getattr(layer, "groups", 1) == 1
    ]


@pytest.mark.parametrize(("name", "per_token"), [(name, False) for name in BATCHED] + [(name, True) for name in TOKENS])
def test_each_sample_of_a_batch_has_its_own_core_in_every_layer(name, per_token):
    argument, model = ARGUMENTS.get(name, "timestep"), denoiser(name)
    names = [layer for layer in layers_of(model) if not re.search(NOT_ADAPTABLE.get(name, "^$"), layer)]
    assert len(names) > 10
    inject_adapter_in_model(nara_config(target_modules=names, r=2), model)
    disturb(model)
    inputs, timesteps = inputs_of(name, 3), torch.tensor(list(EXPECTED[name])[:3]).float()
    if per_token:
        inputs |= {"SkyReelsV2Transformer3DModel": {"enable_diffusion_forcing": True}}.get(name, {})
        inputs |= {"LTX2VideoTransformer3DModel": {"audio_timestep": timesteps}}.get(name, {})
        timesteps = TOKENS[name](timesteps)
    batch = run(model, inputs, timesteps, argument)
    alone = torch.cat([run(model, sample_of(inputs, i, 3), timesteps[i : i + 1], argument) for i in range(3)])
    assert relative_error(batch, alone) < 2e-4
    with noise_level(model, torch.tensor([0.5, 0.25, 0.0])):
        assert relative_error(run(model, inputs, timesteps, argument), alone) > 1e-2


@pytest.mark.parametrize("name", ["HiDreamImageTransformer2DModel", "ZImageTransformer2DModel"])
def test_rows_that_are_no_samples_raise(name):
    model = denoiser(name)
    layers = [layer for layer in layers_of(model) if re.search(NOT_ADAPTABLE[name], layer)]
    inject_adapter_in_model(nara_config(target_modules=layers), model)
    timesteps = torch.tensor(list(EXPECTED[name])[:3])
    with pytest.raises(ValueError, match=r"noise_level has 3 values, but the (batch inside|rows that) layer"):
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
