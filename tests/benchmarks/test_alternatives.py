"""The arms of the second plan are what it says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from quality.images.held_out import SIZE, base, clean_bins
from quality.regimes import runs
from quality.regimes.alternatives import GROUPS, Arm, Group, confirmed
from quality.regimes.image_regimes import Conversion, conversion_pictures
from quality.regimes.noise_offset import GainedOffset, Offset, ShiftedOffset, expected_shift
from quality.regimes.runs import ARMS, Cell, build, trainable_parameters
from quality.regimes.text.models import Biased, logits_of
from quality.text.runs import load

from nara_diffusion.dreambooth.dataset import DreamBoothDataset, draw_noise, seeded_normal

REGIMES = runs.REGIMES | runs.FURTHER


def counted(regime, targets, rank, arm):
    backbone = REGIMES[regime].backbone
    options = {"rank": rank, "target_modules": list(backbone.targets[targets])}
    return trainable_parameters(build(arm, backbone.arguments(ARMS[arm].method, 0, options), backbone))


@pytest.mark.parametrize(
    ("regime", "targets", "static", "rank", "knots"),
    [
        ("eps_to_v", "attention_time", "lora", 14, 11),
        ("noise_offset", "attention_time", "dora", 14, 11),
        ("blind_open", "attention", "lora", 43, 27),
    ],
)
def test_ranks_at_equal_parameters_are_the_smallest(regime, targets, static, rank, knots):
    nara = counted(regime, targets, 4, "nara")
    assert counted(regime, targets, rank - 1, static) < nara <= counted(regime, targets, rank, static)
    assert counted(regime, targets, knots, "nara_knots") <= counted(regime, targets, rank, static)
    arms = {(arm.cell.rank, arm.arm) for group in GROUPS if group.regime == regime for arm in group.arms.values()}
    assert {(rank, static), (knots, "nara_knots"), (4, "nara")} <= arms


def test_bias_enters_at_the_token_that_is_seen_in_its_bin():
    batch = list(REGIMES["blind_open"].held_out())[3]  # λ from 0.3 to 0.4
    biased = Biased(load("uniform-tiny")[0])
    plain = logits_of(biased.model, batch)
    with torch.no_grad():
        biased.bias.copy_(torch.arange(10.0) / 10)
    difference = (logits_of(biased, batch) - plain).detach()  # (b, l, v)
    seen = difference.gather(2, batch.input_ids[..., None])
    torch.testing.assert_close(seen, torch.full_like(seen, 3.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(difference.scatter(2, batch.input_ids[..., None], 0.0).abs().max(), torch.tensor(0.0))
    assert REGIMES["blind_open_bias"].backbone.adapted("base", None).bias.shape == (10,)


def test_token_says_the_bin_in_place_of_the_first_digit():
    plain, told = (list(REGIMES[name].held_out())[7] for name in ("blind_open", "blind_open_told"))
    changed = plain.input_ids != told.input_ids
    assert not (changed & plain.answer).any()
    assert changed.sum(1).max() == 1
    tokenizer = load("uniform-tiny")[1]
    prompts = tokenizer.batch_decode(told.input_ids.where(~told.answer, tokenizer.pad_token_id))
    assert all("code7" in prompt.replace(" ", "") for prompt in prompts)
    plain, told = (list(REGIMES[name].held_out())[7] for name in ("blind_determined", "blind_determined_told"))
    assert tokenizer.batch_decode(told.input_ids[:, :1]) == ["7"] * len(told.input_ids)  # sums keep their digits
    torch.testing.assert_close(told.input_ids[:, 1:], plain.input_ids[:, 1:])


class Zero(torch.nn.Module):
    """A denoiser that says 0, and keeps what it was shown."""

    def forward(self, sample, *_):
        self.seen = sample
        return torch.zeros_like(sample)


def test_offset_objective_is_that_of_noise_with_a_number_of_each_channel_and_sample():
    args, denoiser = SimpleNamespace(seed=5, train_batch_size=3), Zero()
    loss = Offset().loss(denoiser, args)(2)
    noise = draw_noise(range(6, 9), denoiser.seen.shape[1:], seed=5)
    shift = seeded_normal((4, 1, 1), seed=5, stream="offset noise instance", indices=range(6, 9))
    noise = noise + 0.3 * shift
    assert loss.item() == pytest.approx(noise.square().mean().item(), rel=1e-6)
    plain = Conversion("eps").batches(args)(2).batch
    q = (1 - base().pipe.scheduler.alphas_cumprod[plain.timestep]).sqrt()[:, None, None, None]
    torch.testing.assert_close(denoiser.seen - plain.model_input, (q * 0.3 * shift).expand_as(denoiser.seen))
    shown = (Offset().held_out()[4].batch.target - clean_bins("toy")[4].noise) / 0.3  # (b, c, h, w)
    torch.testing.assert_close(shown, shown[..., :1, :1].expand_as(shown), atol=1e-5, rtol=0)
    assert shown.std() == pytest.approx(1, abs=0.2)


def test_gain_changes_the_mean_of_a_channel_of_its_bin_alone():
    unet = GainedOffset().backbone.adapted("full", None)
    assert trainable_parameters(unet) == 40
    inputs = Offset().held_out()[6].rows(slice(0, 2)).inputs
    denoiser = GainedOffset().backbone.controlled(unet, None, 0)
    before = denoiser(*inputs)
    with torch.no_grad():
        unet.gain[6, 2] = 0.5
        unet.gain[5] = 9
    expected = before.clone()
    expected[:, 2] += 0.5 * before[:, 2].mean((1, 2), keepdim=True)
    torch.testing.assert_close(denoiser(*inputs), expected)


def test_a_group_is_whole_with_ten_seeds_and_its_differences_are_paired():
    arms = {name: Arm(Cell("eps_to_v", name, 4, 200), "lora") for name in ("attention", "all")}
    group, records = Group("new", "", "eps_to_v", arms, []), []
    for seed in range(300, 310):
        one = {"regime": "eps_to_v", "rank": 4, "steps": 200, "arm": "lora", "stage": "confirm", "seed": seed}
        records += [
            one | {"targets": "attention", "score": seed},
            one | {"targets": "all", "score": seed + 1 + seed % 2},
        ]
    assert not confirmed(group, records[:-1]).is_whole
    assert confirmed(group, records).is_whole
    found = confirmed(group, records).difference("attention", "all")
    assert found.mean == pytest.approx(-1.5)
    assert found.high - found.mean == pytest.approx(2.262157 * (10 / 9) ** 0.5 * 0.5 / 10**0.5)


def test_shift_is_the_regression_of_the_offset_on_the_mean_and_goes_around_the_unet():
    index, number = 700, torch.Generator().manual_seed(0)
    samples = DreamBoothDataset(conversion_pictures(), [SIZE], batch_size=1, seed=0).plain_samples()
    latents = base().latents.mode(samples).double()
    means, pixels = latents.mean((2, 3)), latents[0, 0].numel()
    alpha = base().pipe.scheduler.alphas_cumprod[index].double()
    p, q = alpha.sqrt(), (1 - alpha).sqrt()
    drawn = means[torch.randint(len(means), (400_000,), generator=number)]
    offset, noise = (torch.randn(drawn.shape, generator=number, dtype=torch.float64) for _ in range(2))
    seen = p * drawn + q * (0.3 * offset + noise / pixels**0.5)
    wanted = torch.linalg.lstsq(torch.cat([seen, torch.ones(len(seen), 1)], 1), 0.3 * offset).solution  # (c + 1, c)
    x = torch.randn(3, 4, *latents.shape[2:], generator=number) + 0.3
    m, own_q = expected_shift(x, torch.tensor([index]))
    expected = torch.cat([x.double().mean((2, 3)), torch.ones(3, 1)], 1) @ wanted
    torch.testing.assert_close(m[..., 0, 0].double(), expected, atol=0.02 * float(expected.abs().max()), rtol=0)
    assert own_q.flatten().tolist() == pytest.approx([q.item()] * 3)
    inputs = Offset().held_out()[7].rows(slice(0, 2)).inputs
    backbones = (ShiftedOffset().backbone, REGIMES["eps_to_v"].backbone)
    shifted, plain = (each.controlled(each.adapted("base", None), None, 0) for each in backbones)
    m, q = expected_shift(*inputs[:2])
    torch.testing.assert_close(shifted(*inputs), plain(inputs[0] - q * m, *inputs[1:]) + m)
