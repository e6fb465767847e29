"""StrengthSchedule as a weight of Diffusers' set_adapters: whole pipelines, blocks, mixtures, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from nara_diffusion import StrengthSchedule, set_strength
from nara_diffusion.noise.level import find_holders
from tests.helpers.adapted import disturb, lora_config
from tests.helpers.pipelines.wan import small_wan, wan_latents
from tests.helpers.small_pipelines import pixels, small_flux, small_sd3, small_sdxl
from tests.loaders.adapters import State, predict, save_lora, trained
from tests.strength.models import OTHER, SCHEDULE
from tests.strength.pipelines import DROP, KINDS, loaded

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
    pytest.mark.filterwarnings("ignore:Already unmerged"),
]


LEVELS = (0.033, 0.87)
"""Of the two samples of `predict`."""


def scalings(pipe: Any, name: str) -> dict[str, float]:
    return {n: m.scaling[name] for n, m in pipe.unet.named_modules() if name in getattr(m, "scaling", {})}


@KINDS
def test_each_sample_has_the_strength_of_its_timestep(kind, folders):
    pipe, reference = loaded(folders[kind], kind), loaded(folders[kind], kind)
    base = predict(reference)
    pipe.set_adapters("toy", adapter_weights=SCHEDULE)
    found = predict(pipe)
    for i, level in enumerate(LEVELS):
        reference.set_adapters("toy", SCHEDULE(level).item())
        expected = predict(reference)[i]
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-5)
        assert float((base[i] - expected).abs().max()) > 1e-2


@KINDS
def test_each_step_of_a_pipeline_equals_that_with_its_level_s_number(kind, folders):
    """With CFG; the reference gets its number before each call of its UNet."""
    pipe, reference = loaded(folders[kind], kind), loaded(folders[kind], kind)
    pipe.set_adapters("toy", SCHEDULE)
    calls: list[tuple[dict[str, Any], Tensor]] = []
    pipe.unet.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(({"args": args, **kwargs}, output[0].clone())),
        with_kwargs=True,
    )
    image = pixels(pipe, num_inference_steps=6)
    assert len({float(call["args"][1]) for call, _ in calls}) == 6
    strengths = []
    for call, output in calls:
        args = call.pop("args")
        strengths.append(SCHEDULE(float(args[1]) / 1000).item())
        reference.set_adapters("toy", strengths[-1])
        with torch.no_grad():
            expected = reference.unet(*args, **call)[0]
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert max(strengths) - min(strengths) > 1.5

    def set_number(module: Any, args: Any, kwargs: Any) -> None:
        reference.set_adapters("toy", SCHEDULE(float(args[1]) / 1000).item())

    reference.unet.register_forward_pre_hook(set_number, with_kwargs=True)
    torch.testing.assert_close(pixels(reference, num_inference_steps=6), image, rtol=0, atol=2e-3)


def test_a_step_range_is_the_lora_in_its_range_and_the_base_outside(folders):
    pipe, reference = loaded(folders["LoRA"], "LoRA"), loaded(folders["LoRA"], "LoRA")
    pipe.set_adapters("toy", DROP)
    found = predict(pipe)
    reference.set_adapters("toy", 1.3)
    torch.testing.assert_close(found[0], predict(reference)[0], rtol=1e-4, atol=1e-5)
    reference.disable_lora()
    torch.testing.assert_close(found[1], predict(reference)[1], rtol=0, atol=1e-6)


@KINDS
def test_set_strength_none_leaves_no_trace_of_a_schedule(kind, folders):
    pipe = loaded(folders[kind], kind)
    pipe.set_adapters("toy")
    before, expected = State(pipe), predict(pipe)
    pipe.set_adapters("toy", SCHEDULE)
    predict(pipe)
    set_strength(pipe.unet, "toy", None)
    assert State(pipe) == before
    assert kind.startswith("NaRA") or not find_holders(pipe.unet)
    assert torch.equal(predict(pipe), expected)


@pytest.mark.parametrize("schedules", [(SCHEDULE, DROP), (0.4, DROP), (SCHEDULE, 0.4), (SCHEDULE, None)])
def test_a_mixture_takes_a_strength_each(schedules, folders):
    pipe = loaded(folders["LoRA"], "LoRA")
    loaded(folders["NaRA"], "NaRA", pipe, "nara")
    names = ["nara", "toy"]
    pipe.set_adapters(names, adapter_weights=list(schedules))
    assert pipe.get_active_adapters() == names
    found = predict(pipe)
    for name in names:
        set_strength(pipe.unet, name, None)
    for i, level in enumerate(LEVELS):
        numbers = [s(level).item() if isinstance(s, StrengthSchedule) else s for s in schedules]
        pipe.set_adapters(names, numbers)
        torch.testing.assert_close(found[i], predict(pipe)[i], rtol=1e-4, atol=1e-5)


BLOCKS: list[Any] = [
    {"unet": SCHEDULE},
    {"unet": {"down": SCHEDULE}},
    {"unet": {"down": SCHEDULE, "mid": 0.3, "up": DROP}},
    {"unet": {"mid": SCHEDULE, "up": {"block_0": [SCHEDULE, 0.2]}}},
    {"unet": {"up": {"block_0": [DROP, SCHEDULE]}}},
]


@KINDS
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_blocks_have_the_strengths_that_diffusers_gives_them_as_numbers(kind, blocks, folders):
    pipe, reference = loaded(folders[kind], kind), loaded(folders[kind], kind)
    pipe.set_adapters("toy", blocks)
    found = predict(pipe)

    def at(weights: Any, level: float) -> Any:
        if isinstance(weights, dict):
            return {key: at(weight, level) for key, weight in weights.items()}
        if isinstance(weights, list):
            return [at(weight, level) for weight in weights]
        return weights(level).item() if isinstance(weights, StrengthSchedule) else weights

    for i, level in enumerate(LEVELS):
        reference.set_adapters("toy", at(blocks, level))
        torch.testing.assert_close(found[i], predict(reference)[i], rtol=1e-4, atol=1e-5)
    set_strength(pipe.unet, "toy", None)
    reference.set_adapters("toy")
    assert scalings(pipe, "toy") == scalings(reference, "toy")
    assert torch.equal(predict(pipe), predict(reference))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"unet": {"dwn": SCHEDULE}}, r"adapter_weights names 'dwn', .* choose 'down', 'mid', 'up'"),
        ({"unet": {"down": {"block_0": SCHEDULE}}}, r"names 'down.block_0', .* choose 'block_1'"),
        ({"unet": {"mid": {"block_0": SCHEDULE}}}, r"names 'mid.block_0', .* choose one strength"),
        ({"unet": {"up": {"block_0": [SCHEDULE] * 3}}}, "Expected 2 scales for up.block_0, got 3"),
        ({"net": SCHEDULE}, "has 'net', which is no component of StableDiffusionXLPipeline that adapters are for: "),
        ([{"net": SCHEDULE}], "has 'net', which is no component"),
    ],
)
def test_blocks_that_are_not_there_are_refused_and_nothing_is_changed(weights, message, folders):
    pipe = loaded(folders["LoRA"], "LoRA")
    before = State(pipe)
    with pytest.raises(ValueError, match=message):
        pipe.set_adapters(["toy"], weights)
    assert State(pipe) == before


@pytest.mark.parametrize("kind", ["LoRA", "NaRA"])
def test_a_function_is_refused_and_nothing_is_changed(kind, folders):
    pipe = loaded(folders[kind], kind)
    before = State(pipe)
    for weights in (falling, {"unet": {"down": falling}}, [falling]):
        with pytest.raises(ValueError, match=r"adapter_weights holds <function falling .* is a StrengthSchedule\("):
            pipe.set_adapters("toy", weights)
    with pytest.raises(ValueError, match=r"adapter_weights holds <function falling"):
        pipe.unet.set_adapters("toy", falling)
    assert State(pipe) == before


def falling(noise_level: float) -> float:
    return 1 - noise_level


@pytest.mark.parametrize(
    "weights",
    [
        (SCHEDULE, DROP),
        (SCHEDULE, 0.5),
        [(SCHEDULE,), 1.0],
        {"unet": (SCHEDULE, DROP)},
        [{"unet": {"up": {"block_0": (SCHEDULE, 1.0)}}}, 1.0],
    ],
    ids=str,
)
def test_schedules_in_a_tuple_are_refused_by_pipeline_and_model_and_nothing_is_changed(weights, folders):
    """Diffusers takes lists alone: of a tuple of numbers it says that it cannot divide a tuple."""
    pipe = loaded(folders["LoRA"], "LoRA", loaded(folders["LoRA"], "LoRA"), "more")
    before = State(pipe)
    with pytest.raises(ValueError, match=r"is a tuple, which set_adapters takes for one strength: pass a list, \["):
        pipe.set_adapters(("toy", "more"), adapter_weights=weights)
    if not isinstance(weights, dict):
        of_unet = [weight.get("unet") if isinstance(weight, dict) else weight for weight in weights]
        with pytest.raises(ValueError, match=r"is a tuple, which set_adapters takes for one strength: pass a list, \["):
            pipe.unet.set_adapters(("toy", "more"), tuple(of_unet) if isinstance(weights, tuple) else of_unet)
    assert State(pipe) == before


SHARED = {"unet": SCHEDULE}


@pytest.mark.parametrize("weights", [SHARED, [SHARED, SHARED]], ids=["one", "twice"])
def test_a_dict_of_components_for_two_adapters_is_refused_since_diffusers_empties_it_for_the_first(weights, folders):
    pipe = loaded(folders["LoRA"], "LoRA", loaded(folders["LoRA"], "LoRA"), "more")
    before = State(pipe)
    with pytest.raises(ValueError, match=r"one dict for 'toy' and 'more', .* pass each a dict of its own, \[\{…\}, "):
        pipe.set_adapters(["toy", "more"], weights)
    assert State(pipe) == before
    pipe.set_adapters(["toy", "more"], [{"unet": SCHEDULE}, {"unet": SCHEDULE}])
    found = predict(pipe)
    for name in ("toy", "more"):
        set_strength(pipe.unet, name, None)
    for i, level in enumerate(LEVELS):
        pipe.set_adapters(["toy", "more"], SCHEDULE(level).item())
        torch.testing.assert_close(found[i], predict(pipe)[i], rtol=1e-4, atol=1e-5)


def test_layers_of_which_diffusers_knows_no_block_are_refused_with_blocks(tmp_path: Path):
    save_lora(tmp_path, target_modules=["to_q", "time_embedding.linear_1"])
    pipe = loaded(tmp_path, "LoRA")
    with pytest.raises(ValueError, match=r"finds none for layer 'time_embedding.linear_1'"):
        pipe.set_adapters("toy", {"unet": {"down": SCHEDULE}})
    pipe.set_adapters("toy", SCHEDULE)
    predict(pipe)


def test_text_encoders_are_refused_with_a_remedy_that_works():
    pipe = trained()
    before = State(pipe)
    with pytest.raises(ValueError, match=r"'default' has a part in text_encoder, .* 'text_encoder': 1.0\}"):
        pipe.set_adapters("default", SCHEDULE)
    assert State(pipe) == before
    pipe.set_adapters("default", {"unet": SCHEDULE, "text_encoder": 0.5, "text_encoder_2": 1.0})
    pixels(pipe)
    assert {m.scaling["default"] for m in pipe.text_encoder.modules() if hasattr(m, "scaling")} == {0.5 * 3 / 2}


def test_a_unet_that_peft_wraps_is_refused_with_a_remedy_that_works():
    pipe = small_sdxl()
    pipe.unet = get_peft_model(pipe.unet, lora_config(target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"unet is a PeftModel.* pipe.unet = pipe.unet.get_base_model\(\)"):
        pipe.set_adapters("default", SCHEDULE)
    pipe.unet = pipe.unet.get_base_model()
    pipe.set_adapters("default", SCHEDULE)
    pixels(pipe)


def test_two_transformers_have_a_schedule_each_of_their_own_steps():
    """Of Wan 2.2; the reference gets its number before each forward."""
    pipe, reference = (small_wan(transformers=2) for _ in range(2))
    given = {"transformer": OTHER, "transformer_2": SCHEDULE}
    strengths = []
    for each in (pipe, reference):
        for seed, component in enumerate(given):
            model = getattr(each, component)
            model.add_adapter(lora_config(target_modules=["to_q", "to_out.0"]), "toy")
            disturb(model, seed)
    for component, schedule in given.items():

        def set_number(module: Any, args: Any, kwargs: Any, schedule: Any = schedule) -> None:
            strengths.append(schedule(float(kwargs["timestep"].max()) / 1000).item())
            module.set_adapters("toy", strengths[-1])

        getattr(reference, component).register_forward_pre_hook(set_number, with_kwargs=True)
    pipe.set_adapters("toy", given)
    found = wan_latents(pipe, num_inference_steps=6)
    torch.testing.assert_close(found, wan_latents(reference, num_inference_steps=6), rtol=1e-3, atol=1e-4)
    assert len(set(strengths)) == 6
    for component in given:
        set_strength(getattr(pipe, component), "toy", None)
    assert not torch.allclose(wan_latents(pipe, num_inference_steps=6), found, atol=1e-2)


@pytest.mark.parametrize("make", [small_flux, small_sd3])
def test_transformers_of_flow_read_their_own_level(make):
    pipe = trained(make(), text=False, target_modules=["to_q", "to_out.0"], core_type="identity", name="toy")
    block = "single_transformer_blocks" if make is small_flux else "transformer_blocks.0."
    levels: list[float] = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: levels.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    expected = []
    for weights in (SCHEDULE, {"transformer": {block: SCHEDULE}}):
        set_strength(pipe.transformer, "toy", None)
        pipe.set_adapters("toy", weights)
        expected.append(pixels(pipe, num_inference_steps=2))
    assert not torch.allclose(*expected, atol=1e-3)
    set_strength(pipe.transformer, "toy", None)
    scale = 1 if make is small_flux else 1000
    for weights, image in zip((lambda s: s, lambda s: {"transformer": {block: s}}), expected, strict=True):
        handle = pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs, weights=weights: pipe.set_adapters(
                "toy", weights(SCHEDULE(float(kwargs["timestep"][0]) / scale).item())
            ),
            with_kwargs=True,
        )
        torch.testing.assert_close(pixels(pipe, num_inference_steps=2), image, rtol=0, atol=1e-3)
        handle.remove()
    with pytest.raises(ValueError, match=r"names 'single_blocks', which is no block .* a part of the names"):
        pipe.set_adapters("toy", {"transformer": {"single_blocks": SCHEDULE}})
