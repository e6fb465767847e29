"""One adapter, two subjects: which of them a training step and a bin of the loss is of, by hand."""

from dataclasses import replace

import pytest
import torch
from quality.assets import ASSETS
from quality.images.subjects import SUBJECTS, instance_prompt
from quality.images.training import ControlledDenoiser
from quality.regimes.images.batches import batches
from quality.regimes.images.objectives import build_conversion
from quality.regimes.images.two_conditions import TwoConditions, joined
from quality.regimes.methods import arm_arguments, build

from nara_diffusion.dreambooth.data.image_records import records_from_folder
from tests.helpers.adapted import disturb

CELL = {"targets": "attention", "rank": 2, "steps": 2}


@pytest.fixture(scope="module")
def second(data):
    """Another subject's pictures to learn from, other latents to measure on, both with prompts of their own."""
    records = records_from_folder(ASSETS / SUBJECTS["house"], prompt=instance_prompt("house"), progress=False)
    generator = torch.Generator().manual_seed(8)
    prompts = data.prompts.get([instance_prompt("house")] * 3)
    bins = [
        replace(each, clean=torch.randn(each.clean.shape, generator=generator), embeddings=prompts)
        for each in data.held_out
    ]
    return replace(data, instances=records, held_out=bins)


def test_step_shows_the_first_subject_below_the_switch_and_the_second_above(data, second):
    args = arm_arguments("nara", **CELL, seed=3)
    objective = build_conversion("eps", data.pipe.scheduler)
    below, above = (batches(each, objective, args)(0) for each in (data, second))
    batch = joined(below, above)
    levels = batch.corrupted.timestep / 1000
    assert torch.equal(below.corrupted.timestep, above.corrupted.timestep)
    assert {bool(level < 0.5) for level in levels} == {True, False}
    for row, level in enumerate(levels):
        own, other = (below, above) if level < 0.5 else (above, below)
        assert torch.equal(batch.corrupted.model_input[row], own.corrupted.model_input[row])
        assert torch.equal(batch.time_ids[row], own.time_ids[row])
        assert not torch.equal(batch.corrupted.model_input[row], other.corrupted.model_input[row])
    assert all(torch.equal(a, b) for a, b in zip(batch.embeddings, below.embeddings, strict=True))
    assert not torch.equal(batch.embeddings[0], above.embeddings[0])


def test_loss_is_the_squared_error_of_the_joined_batch(data, second):
    args = arm_arguments("nara", **CELL, seed=3)
    unet = build("nara", args)
    disturb(unet)
    said = []
    unet.eval().register_forward_hook(lambda module, given, output: said.append(output[0].detach().double()))
    regime = TwoConditions(lambda: data, lambda: second)
    with torch.no_grad():
        found = regime.loss(ControlledDenoiser(unet, None), args)(1).item()
    objective = build_conversion("eps", data.pipe.scheduler)
    noise = batches(data, objective, args)(1).corrupted.target.double()
    assert found == pytest.approx((said[0] - noise).square().mean().item(), rel=1e-5)


def test_figures_are_shares_of_the_bases_error_on_the_subject_that_is_meant(data, second):
    unet = build("lora", arm_arguments("lora", **CELL, seed=3))
    disturb(unet)
    figures = TwoConditions(lambda: data, lambda: second).figures(unet.eval())
    objective = build_conversion("eps", data.pipe.scheduler)
    for index, (own, other) in enumerate(zip(data.held_out, second.held_out, strict=True)):
        batch = (own if index < 5 else other).corrupted(objective).batch
        hidden, pooled = own.embeddings  # the first one's prompt everywhere
        given = {"text_embeds": pooled, "time_ids": own.time_ids}
        errors = []
        for model in (unet, data.pipe.unet):
            with torch.no_grad():
                said = model(batch.model_input, batch.timestep, hidden, added_cond_kwargs=given).sample
            errors.append((said.double() - batch.target.double()).square().mean().item())
        assert figures["losses"][index] == pytest.approx(errors[0] / errors[1], rel=1e-4)
    assert figures["score"] == pytest.approx(sum(figures["losses"]) / 10)


def test_gated_arm_raises(data):
    with pytest.raises(ValueError, match="a gated arm needs a window"):
        TwoConditions(lambda: data, lambda: data).figures(data.pipe.unet, gated=True)


def test_switched_arm_is_two_loras_of_the_cells_rank():
    unet = build("lora_switched", arm_arguments("lora_switched", **CELL, seed=0))
    lora = build("lora", arm_arguments("lora", **CELL, seed=0))
    assert {config.core_bins for config in unet.peft_config.values()} == {2}
    sizes = [sum(p.numel() for p in each.parameters() if p.requires_grad) for each in (unet, lora)]
    assert sizes[0] == 2 * sizes[1]
