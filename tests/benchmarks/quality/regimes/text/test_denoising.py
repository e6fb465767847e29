"""What a step of a text regime is: the same batches for every arm, the losses by hand, and the λ that arms are told."""

from dataclasses import replace

import pytest
import torch
from quality.images.held_out import BINS
from quality.regimes import runs
from quality.regimes.methods import ARMS, arm_arguments, build, trainable_parameters
from quality.regimes.runs import Cell, Run, record_of
from quality.regimes.text.corruption import MASKED, REPLACED
from quality.regimes.text.denoising import Denoising

from nara_diffusion import noise_level
from nara_diffusion.dllm import masked_diffusion_loss
from tests.helpers.adapted import disturb

SIZES = {"targets": "attention", "rank": 2, "steps": 2}
BLIND, SEEN = "blind", "seen"


@pytest.fixture
def regime(request, text_data):
    return Denoising({BLIND: REPLACED, SEEN: MASKED}[request.param], lambda: text_data)


def args_of(regime, arm, seed=3):
    return replace(arm_arguments(arm, **SIZES, seed=seed, backbone=regime.backbone), train_batch_size=6)


def adapted(regime, arm):
    model = build(arm, args_of(regime, arm), regime.backbone)
    disturb(model)
    return model.eval()


def controlled(regime, model, arm, seed=3):
    return regime.backbone.controlled(model, ARMS[arm].control, seed)


def watched(model):
    """The input_ids of its forwards."""
    calls = []
    model.register_forward_pre_hook(lambda _, args, given: calls.append(given["input_ids"]), with_kwargs=True)
    return calls


def log_probabilities(model, batch, level):
    """log p of the clean tokens (b, l), in float64, of a model that is told `level`."""
    with torch.no_grad(), noise_level(model, level):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.double()
    return logits.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]


@pytest.mark.parametrize("regime", [BLIND, SEEN], indirect=True)
def test_arms_of_a_seed_meet_the_same_tokens_and_another_seed_other_ones(regime):
    seen = {}
    for arm, seed in (("lora", 3), ("nara_shuffled", 3), ("lora", 4)):
        model, calls = build(arm, args_of(regime, arm, seed), regime.backbone), []
        model.register_forward_pre_hook(
            lambda _, args, given, to=calls: to.append(given["input_ids"]), with_kwargs=True
        )
        loss = regime.loss(controlled(regime, model, arm, seed), args_of(regime, arm, seed))
        with torch.no_grad():
            [loss(number) for number in range(4)]  # more questions than there are
        seen[arm, seed] = calls
    assert len(seen["lora", 3]) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen["lora", 3], seen["nara_shuffled", 3], strict=True))
    assert not torch.equal(seen["lora", 3][0], seen["lora", 4][0])
    assert not torch.equal(seen["lora", 3][0], seen["lora", 3][1])


@pytest.mark.parametrize("regime", [BLIND], indirect=True)
def test_blind_loss_is_the_mean_over_all_tokens_of_the_answers(regime):
    model, args = adapted(regime, "nara"), args_of(regime, "nara")
    with torch.no_grad():
        found = regime.loss(controlled(regime, model, "nara"), args)(1).item()
    batch = regime.batches(args)(1)
    said = log_probabilities(model, batch, batch.noise_level)
    expected = [-said[row, batch.answer[row]].mean().item() for row in range(6)]
    assert (batch.input_ids != batch.targets).any()
    assert found == pytest.approx(sum(expected) / 6, rel=1e-5)


@pytest.mark.parametrize("regime", [SEEN], indirect=True)
def test_seen_loss_is_lladas(regime, text_data):
    model, args = adapted(regime, "nara"), args_of(regime, "nara")
    with torch.no_grad():
        found = regime.loss(controlled(regime, model, "nara"), args)(0).item()
        order = torch.randperm(len(text_data.train), generator=torch.Generator().manual_seed(3))[:6]
        rows = text_data.train.batch(order)
        ids, starts = rows["input_ids"], rows["prompt_lengths"]
        mask = (torch.arange(ids.shape[1]) < (starts + rows["answer_lengths"])[:, None]).long()
        expected = masked_diffusion_loss(model, ids, starts, attention_mask=mask, seed=3, sample_indices=range(6)).loss
    assert found == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("regime", [BLIND, SEEN], indirect=True)
def test_figures_are_the_mean_losses_of_the_tokens_that_count_in_each_bin(regime):
    model = adapted(regime, "nara")
    figures = regime.figures(model)
    batches = list(regime.held_out())
    assert len(batches) == BINS
    for index, batch in enumerate(batches):
        assert ((batch.noise_level > index / BINS) & (batch.noise_level < (index + 1) / BINS)).all()
        counted = batch.answer if regime.corruption is REPLACED else batch.masked
        expected = -log_probabilities(model, batch, batch.noise_level)[counted].mean().item()
        assert figures["losses"][index] == pytest.approx(expected, rel=1e-5)
    assert figures["score"] == pytest.approx(sum(figures["losses"]) / BINS)


@pytest.mark.parametrize("regime", [BLIND], indirect=True)
def test_controls_of_training_change_the_told_level_alone(regime):
    """Constant: λ = 0.5; shuffled: the λ of others."""
    model, batch = adapted(regime, "nara"), next(regime.held_out())
    half = torch.full_like(batch.noise_level, 0.5)
    with torch.no_grad():
        told = controlled(regime, model, "nara")(batch)
        constant = controlled(regime, model, "nara_constant")(batch)
        shuffled = controlled(regime, model, "nara_shuffled")(batch)
        with noise_level(model, half):
            expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert torch.equal(constant, expected)
    assert not any(torch.allclose(shuffled[row], told[row], atol=1e-6) for row in range(len(told)))


@pytest.mark.parametrize("regime", [BLIND, SEEN], indirect=True)
def test_adapters_hold_the_convention_of_their_level(regime):
    model = build("nara", args_of(regime, "nara"), regime.backbone)
    expected = {"uniform-tiny": "replaced_share", "llada-tiny": "masked_share"}
    assert model.peft_config["default"].noise_convention == expected[regime.corruption.backbone]


@pytest.mark.parametrize("regime", [BLIND], indirect=True)
def test_a_blind_adapter_is_refused_the_masked_share(regime, text_data):
    model = build("nara", args_of(regime, "nara"), regime.backbone)
    rows = text_data.train.batch(torch.arange(2))
    with pytest.raises(ValueError, match="was trained with λ defined as 'replaced_share'"):
        masked_diffusion_loss(model, rows["input_ids"], rows["prompt_lengths"], seed=0)


@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize("regime", [BLIND], indirect=True)
def test_equal_rank_of_text_is_the_smallest_with_as_many_parameters_as_nara(regime, targets):
    def count(arm, rank):
        options = {"targets": targets, "rank": rank, "steps": 2, "seed": 0, "backbone": regime.backbone}
        return trainable_parameters(build(arm, arm_arguments(arm, **options), regime.backbone))

    own = arm_arguments("lora_params", targets=targets, rank=4, steps=2, seed=0, backbone=regime.backbone).rank
    assert count("lora", own - 1) < count("nara", 4) <= count("lora", own)


@pytest.mark.parametrize("regime", [BLIND], indirect=True)
def test_gated_arms_of_text_raise(regime):
    with pytest.raises(ValueError, match="a gated arm needs a window"):
        regime.loss(controlled(regime, adapted(regime, "lora_gated"), "lora_gated"), None, gated=True)
    with pytest.raises(ValueError, match="a gated arm needs a window"):
        regime.figures(adapted(regime, "lora_gated"), gated=True)


@pytest.mark.parametrize("regime", [BLIND, SEEN], indirect=True)
def test_record_of_a_text_run_has_the_losses_and_those_of_the_mean_core(regime, monkeypatch):
    monkeypatch.setitem(runs.REGIMES, "small", regime)
    cell, rates = Cell("small", "attention", 2, 4), {"learning_rate": 0.05}
    records = {arm: record_of(Run(cell, arm, 100, rates), "dev", True) for arm in ("base", "lora", "nara")}
    assert all(len(record["losses"]) == BINS for record in records.values())
    assert records["base"]["trainable_parameters"] == 0
    assert records["base"]["score"] != records["lora"]["score"] != records["nara"]["score"]
    assert set(records["nara"]["mean_core"]) == {"losses", "score"}
    assert "mean_core" not in records["lora"]
