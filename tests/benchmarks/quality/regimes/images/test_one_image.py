"""One image: looks in training, and prompt fidelity at equal subject fidelity, by hand."""

from statistics import fmean

import pytest
import torch
from quality.assets import ASSETS
from quality.images.training import ControlledDenoiser
from quality.regimes import runs
from quality.regimes.images.data import subject_data
from quality.regimes.images.one_image import LEVELS_OF_SIMILARITY, OneImage, alignment_at, score_of
from quality.regimes.images.samples import drawn, prompts_of
from quality.regimes.methods import arm_arguments, build
from quality.regimes.runs import Cell, Run, record_of

from nara_diffusion.dreambooth.evaluation.encoders import Encoder
from tests.helpers.adapted import disturb

LOOKS = [
    {"step": 1, "similarity": 0.2, "alignment": 0.8},
    {"step": 2, "similarity": 0.1, "alignment": 0.9},
    {"step": 3, "similarity": 0.5, "alignment": 0.5},
    {"step": 4, "similarity": 0.4, "alignment": 0.7},
    {"step": 5, "similarity": 0.7, "alignment": 0.1},
]


@pytest.mark.parametrize(
    ("level", "alignment"),
    [(0.2, 0.8), (0.15, 0.8), (0.3, 0.7), (0.45, 0.5), (0.5, 0.5), (0.51, 0.1), (0.71, None)],
)
def test_alignment_is_the_best_of_those_that_are_as_similar(level, alignment):
    assert alignment_at(level, LOOKS) == (None if alignment is None else pytest.approx(alignment))


def test_score_is_the_mean_over_levels_and_none_where_one_is_not_reached():
    assert score_of(LOOKS, (0.3, 0.55)) == pytest.approx(1 - (0.7 + 0.1) / 2)
    assert score_of(LOOKS, (0.3, 0.8)) is None


def args_of(arm, seed=3):
    return arm_arguments(arm, targets="attention", rank=2, steps=3, seed=seed)


@pytest.fixture
def regime(data):
    return OneImage(lambda: data, every=2)


def timesteps_of(regime, arm, count=40):
    seen = []

    class Denoiser(ControlledDenoiser):
        def forward(self, sample, timestep, *rest):
            seen.append(timestep)
            return torch.zeros_like(sample)

    loss = regime.loss(Denoiser(None, None), args_of(arm))
    for number in range(count):
        loss(number)
    return torch.cat(seen)


def test_less_noisy_lora_meets_low_noise_four_times_as_often(regime):
    plain, less = timesteps_of(regime, "lora"), timesteps_of(regime, "lora_less_noisy")
    assert (plain < 500).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert (less < 500).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert less.max() > 900  # fewer of them, not none


def test_the_default_learns_from_the_first_picture_alone():
    (record,) = OneImage().load().instances
    assert record.load().tobytes() == subject_data("toy").instances[0].load().tobytes()


def test_a_run_looks_every_so_many_steps_and_keeps_what_it_saw(regime, monkeypatch):
    seen = []

    def look(self, unet, seed):
        seen.append((unet.training, seed))
        return {"similarity": 0.3 * len(seen), "alignment": 1 - 0.2 * len(seen)}

    monkeypatch.setattr(OneImage, "look", look)
    monkeypatch.setitem(runs.REGIMES, "one_image", regime)
    record = record_of(Run(Cell("one_image", "attention", 2, 5), "nara", 3, {"learning_rate": 1e-3}), "dev")
    assert seen == [(False, 3)] * 2
    assert record["looks"] == [
        {"step": 2, "similarity": 0.3, "alignment": 0.8},
        {"step": 4, "similarity": 0.6, "alignment": 0.6},
    ]
    assert record["score"] == pytest.approx(1 - fmean(0.8 if level <= 0.3 else 0.6 for level in LEVELS_OF_SIMILARITY))
    assert len(record["losses"]) == 10


def test_a_look_is_the_cosines_of_what_the_model_draws(regime, data):
    unet = build("nara", args_of("nara")).eval()
    disturb(unet)
    found = regime.look(unet, seed=3)
    encoder = Encoder(ASSETS / "clip-tiny", device="cpu", progress=False)
    images = encoder.images(drawn(data.pipe, unet, "eps", "toy", 3)).double()
    texts = encoder.texts([prompt.replace("sks ", "") for prompt in prompts_of("toy")]).double()
    pictures = encoder.images([record.load() for record in subject_data("toy").instances]).double()
    assert found["similarity"] == pytest.approx((images @ pictures.T).mean().item(), abs=1e-5)
    assert found["alignment"] == pytest.approx((images * texts).sum(1).mean().item(), abs=1e-5)
