"""What a step of a regime is: the same batches for every arm, and the loss by hand in float64."""

import math

import pytest
import torch
from quality.images.subjects import SIZE
from quality.images.training import ControlledDenoiser
from quality.regimes.images.batches import batches
from quality.regimes.images.conversion import Conversion
from quality.regimes.images.objectives import build_conversion
from quality.regimes.images.windowed import HIGH, LOW, Windowed
from quality.regimes.methods import ARMS, arm_arguments, build

from nara_diffusion import core_matrix
from nara_diffusion.dreambooth.data.dataset import DreamBoothDataset
from nara_diffusion.dreambooth.objectives.timesteps import draw_noise
from tests.helpers.adapted import disturb

CELL = {"targets": "attention", "rank": 2, "steps": 2}


def args_of(arm: str, seed: int = 3):
    return arm_arguments(arm, **CELL, seed=seed)


def adapted_unet(arm: str):
    unet = build(arm, args_of(arm))
    disturb(unet)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.1
    return unet.eval()


def watched(unet):
    """Its calls, (input, timestep, output) each."""
    calls = []
    unet.register_forward_hook(lambda module, given, output: calls.append((given[0], given[1], output[0].detach())))
    return calls


@torch.no_grad()
def predicted(unet, held_out):
    """By Diffusers' own call, in float64."""
    given = {"text_embeds": held_out.embeddings[1], "time_ids": held_out.time_ids}
    batch = held_out.batch
    said = unet(
        batch.model_input, batch.timestep, encoder_hidden_states=held_out.embeddings[0], added_cond_kwargs=given
    )
    return said.sample.double()


def clean_and_noise(data, number: int, size: int = 5, seed: int = 3):
    """x and ε of a step, from its draws, in float64."""
    positions = range(number * size, (number + 1) * size)
    dataset = DreamBoothDataset(data.instances, [SIZE], batch_size=size, seed=seed)
    x = data.latents.sample([dataset[position]["samples"][0] for position in positions], seed=seed)
    return x.double(), draw_noise(positions, x.shape[1:], seed=seed).double()


@pytest.mark.parametrize(
    ("first", "second"), [("lora", "nara_dora"), ("full", "nara_shuffled"), ("lora_params", "tlora")]
)
def test_arms_of_a_seed_meet_the_same_inputs(data, first, second):
    seen = {}
    for arm, seed in ((first, 3), (second, 3), (first, 4)):
        args = args_of(arm, seed)
        model = build(arm, args)
        calls = watched(model)
        loss = Conversion("eps_to_v", lambda: data).loss(ControlledDenoiser(model, ARMS[arm].control), args)
        with torch.no_grad():
            [loss(number) for number in range(2)]
        seen[arm, seed] = [tensor for x, t, _ in calls for tensor in (x, t)]
    assert len(seen[first, 3]) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen[first, 3], seen[second, 3], strict=True))
    assert not torch.equal(seen[first, 3][0], seen[first, 4][0])
    assert not torch.equal(seen[first, 3][0], seen[first, 3][2])


@pytest.mark.parametrize("name", ["eps_to_v", "eps_to_flow"])
def test_conversion_loss_is_the_formula(data, name):
    unet, args = adapted_unet("nara"), args_of("nara")
    calls = watched(unet)
    with torch.no_grad():
        found = Conversion(name, lambda: data).loss(ControlledDenoiser(unet, None), args)(1).item()
    ((model_input, timestep, prediction),) = calls
    x, noise = clean_and_noise(data, 1)
    if name == "eps_to_flow":
        sigma = (timestep.double() / 1000)[:, None, None, None]
        seen, target = (1 - sigma) * x + sigma * noise, noise - x
    else:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        alphas = (1 - betas).cumprod(0)[timestep][:, None, None, None]
        seen, target = alphas.sqrt() * x + (1 - alphas).sqrt() * noise, alphas.sqrt() * noise - (1 - alphas).sqrt() * x
    assert (model_input.double() - seen).abs().max() < 1e-5
    assert found == pytest.approx((prediction.double() - target).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("window", [LOW, HIGH])
def test_windowed_loss_is_the_formula(data, window):
    """ε where λ is in the window, what the base says elsewhere."""
    unet, args = adapted_unet("nara"), args_of("nara")
    calls = watched(unet)
    with torch.no_grad():
        found = Windowed(window, lambda: data).loss(ControlledDenoiser(unet, None), args)(0).item()
    ((model_input, timestep, prediction),) = calls
    _, noise = clean_and_noise(data, 0)
    batch = batches(data, build_conversion("eps", data.pipe.scheduler), args)(0)
    hidden, pooled = batch.embeddings
    with torch.no_grad():
        base = data.pipe.unet(
            model_input, timestep, hidden, added_cond_kwargs={"text_embeds": pooled, "time_ids": batch.time_ids}
        ).sample
    errors = []
    for row, level in enumerate((timestep / 1000).tolist()):
        wanted = noise[row] if (level < 0.5) == (window == LOW) else base[row].double()
        errors.append((prediction[row].double() - wanted).square().mean().item())
    assert {bool(level < 0.5) for level in (timestep / 1000).tolist()} == {True, False}
    assert found == pytest.approx(sum(errors) / 5, rel=1e-5)


@pytest.mark.parametrize(("window", "low", "high"), [(LOW, 0, 499), (HIGH, 500, 999)])
def test_gated_arms_train_inside_the_window_alone(data, window, low, high):
    args = args_of("lora_gated")
    batch_of = batches(data, build_conversion("eps", data.pipe.scheduler), args, window)
    timesteps = torch.cat([batch_of(number).corrupted.timestep for number in range(30)])
    assert low <= timesteps.min() < low + 25
    assert high - 25 < timesteps.max() <= high


@pytest.mark.parametrize("window", [LOW, HIGH])
def test_windowed_figures_are_shares_of_the_bases_error(data, window):
    unet = adapted_unet("lora")
    figures = Windowed(window, lambda: data).figures(unet)
    objective = build_conversion("eps", data.pipe.scheduler)
    losses, drifts = [], []
    for clean in data.held_out:
        held_out = clean.corrupted(objective)
        own, base = (predicted(each, held_out) for each in (unet, data.pipe.unet))
        before = (base - clean.noise.double()).square().mean()
        losses.append(((own - clean.noise.double()).square().mean() / before).item())
        drifts.append(((own - base).square().mean() / before).item())
    inside, outside = (slice(5), slice(5, 10)) if window == LOW else (slice(5, 10), slice(5))
    assert figures["losses"] == pytest.approx(losses, rel=1e-4)
    assert figures["inside"] == pytest.approx(sum(losses[inside]) / 5, rel=1e-4)
    assert figures["drift"] == pytest.approx(sum(drifts[outside]) / 5, rel=1e-4)
    assert figures["score"] == pytest.approx(figures["inside"] + figures["drift"])


def test_gated_arm_is_the_base_outside_of_the_window(data):
    unet, regime = adapted_unet("lora"), Windowed(LOW, lambda: data)
    gated, plain = regime.figures(unet, gated=True), regime.figures(unet)
    assert gated["losses"][5:] == [1.0] * 5
    assert gated["drifts"][5:] == [0.0] * 5
    assert gated["losses"][:5] == plain["losses"][:5]
    assert min(plain["drifts"]) > 1e-3


def test_conversion_of_a_gated_arm_raises(data):
    with pytest.raises(ValueError, match="a gated arm needs a window"):
        Conversion("eps_to_v", lambda: data).loss(ControlledDenoiser(data.pipe.unet, None), None, gated=True)


def test_conversion_figures_are_the_mean_errors_of_the_bins(data):
    figures = Conversion("eps_to_flow", lambda: data).figures(data.pipe.unet)
    for index, clean in enumerate(data.held_out):
        held_out = clean.corrupted(build_conversion("eps_to_flow", data.pipe.scheduler))
        said = predicted(data.pipe.unet, held_out)
        wanted = (clean.noise - clean.clean).double()
        assert figures["losses"][index] == pytest.approx((said - wanted).square().mean().item(), rel=1e-4)
    assert figures["score"] == pytest.approx(sum(figures["losses"]) / 10)


def test_equal_rank_is_the_smallest_with_as_many_parameters_as_nara():
    def count(arm: str, rank: int, targets: str) -> int:
        options = {"targets": targets, "rank": rank, "steps": 2, "seed": 0}
        unet = build(arm, arm_arguments(arm, **options))
        return sum(p.numel() for p in unet.parameters() if p.requires_grad)

    for targets in ("attention", "all"):
        nara = count("nara", 4, targets)
        own = arm_arguments("lora_params", targets=targets, rank=4, steps=2, seed=0).rank
        assert count("lora", own - 1, targets) < nara <= count("lora", own, targets)


def test_target_all_has_every_layer_but_those_of_the_sizes_and_norms():
    unet = build("lora", arm_arguments("lora", targets="all", rank=1, steps=2, seed=0))
    names = {name.partition(".lora_A")[0] for name, _ in unet.named_parameters() if ".lora_A." in name}
    layers = {
        name.removesuffix(".base_layer")
        for name, module in unet.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and ".lora_" not in name
    }
    assert layers - names == {"add_embedding.linear_1", "add_embedding.linear_2"}


def test_gated_arm_at_equal_samples_has_half_of_the_steps():
    options = {"targets": "attention", "rank": 2, "steps": 200, "seed": 0}
    steps = {arm: arm_arguments(arm, **options).max_train_steps for arm in ("lora", "lora_gated", "lora_gated_samples")}
    assert steps == {"lora": 200, "lora_gated": 200, "lora_gated_samples": 100}


def test_diagonal_arm_has_gains_linear_in_the_sinusoid_of_each_layer():
    unet = adapted_unet("nara_diagonal")
    layer = next(name for name, module in unet.named_modules() if name.endswith("attn1.to_q"))
    group = layer.replace(".", "-")
    own = {key: tensor.double() for key, tensor in unet.state_dict().items() if f".{group}." in key}
    (W,), (b,) = ([t for key, t in own.items() if key.endswith(kind)] for kind in ("weight", "bias"))
    angles = [370 * 10000 ** (-i / 128) for i in range(128)]
    e = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)], dtype=torch.float64)
    found = core_matrix(unet, 0.37, module=layer)
    torch.testing.assert_close(found.double().squeeze(0), torch.diag(W @ e + b), rtol=0, atol=1e-3)
