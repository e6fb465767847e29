"""Image runs: the same noise for every method, true losses, controls that do what they say, records that are whole."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from quality.images.controls import shuffled_noise_levels, while_evaluating
from quality.images.held_out import BINS, EACH_PLACE, HeldOut, bin_timesteps, held_out_losses
from quality.images.measurement import binned_losses, sample_settings, stratified_error
from quality.images.methods import NAMES, adapted
from quality.images.runs import image_records, run_one_image
from quality.images.settings import arguments
from quality.images.task import load_task
from quality.images.training import ControlledDenoiser, train

from nara_diffusion import noise_level
from tests.helpers.adapted import disturb, relative_error

SHORT: dict[str, Any] = {"progress": False, "max_train_steps": 2, "lr_warmup_steps": 0}


@pytest.fixture(scope="module")
def task():
    return load_task("toy")


def shortened(held_out: HeldOut, rows: int = 4) -> HeldOut:
    return held_out.rows(slice(rows))


@pytest.fixture
def small(task, monkeypatch):
    """Runs on two held-out pictures."""
    held_out = [shortened(each, 2) for each in task.held_out]
    small = replace(task, held_out=held_out, base_losses=[losses[:2] for losses in task.base_losses])
    monkeypatch.setattr("quality.images.runs.load_task", lambda subject: small)
    return small


def disturbed_nara(task):
    unet = adapted(task.pipe, "nara", arguments("toy", "nara", 0, {})).unet
    disturb(unet)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.1  # 56 layers that double what they see would double rounding errors too
    return unet


def test_timesteps_of_a_bin_are_spread_over_it_and_over_nothing_else():
    for index in range(BINS):
        steps = bin_timesteps(index, 20, 1000)
        assert sorted(steps) == [100 * index + 5 * place + 2 for place in range(20)]
        assert steps != sorted(steps)
    assert bin_timesteps(3, 20, 1000) == bin_timesteps(3, 20, 1000)


def test_each_bin_has_pictures_and_noise_of_its_own(task):
    alphas = DDPMScheduler.from_config(task.pipe.scheduler.config).alphas_cumprod
    clean, noise = [], []
    for index, held_out in enumerate(task.held_out):
        batch = held_out.batch
        half = 10 * EACH_PLACE[index]
        assert sorted(batch.timestep.tolist()) == sorted(bin_timesteps(index, 2 * half, 1000))
        sigma = (1 - alphas[batch.timestep]).sqrt()[:, None, None, None]
        clean += list((batch.model_input - sigma * batch.target) / alphas[batch.timestep].sqrt()[:, None, None, None])
        noise += list(batch.target)
        assert held_out.kinds == ["pose"] * half + ["place"] * half
    pictures = torch.stack(clean).flatten(1)
    distances = torch.cdist(pictures, pictures) + torch.eye(len(pictures)).mul(1e9)
    assert distances.min() > 1e-2 * pictures.norm(dim=1).mean()
    values = torch.stack(noise)
    cosines = torch.corrcoef(values.flatten(1)) - torch.eye(len(values))
    assert cosines.abs().max() < 0.4  # 256 numbers each: 6 standard deviations
    page = (Path(__file__).parents[4] / "docs" / "results" / "images.md").read_text(encoding="utf-8")
    assert f"on {len(values)} further pictures" in page.replace("\n", " ")
    assert values.std().item() == pytest.approx(1, abs=0.02)


def test_the_loss_of_a_bin_is_the_unets_own_error(task):
    """Against diffusers' scheduler, pipeline and UNet called by themselves, picture by picture."""
    pipe, held_out = task.pipe, shortened(task.held_out[5], 34)
    prompts = [task.instance_prompt] * 20 + list(task.in_places) * 2
    found = held_out_losses(pipe.unet, held_out)
    for index in (0, 19, 20, 33):
        embeds, _, pooled, _ = pipe.encode_prompt(prompts[index], do_classifier_free_guidance=False)
        time_ids = torch.tensor([[128.0, 128.0, 0.0, 0.0, 64.0, 64.0]])
        with torch.no_grad():
            predicted = pipe.unet(
                held_out.batch.model_input[index : index + 1],
                int(held_out.batch.timestep[index]),
                encoder_hidden_states=embeds,
                added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
            ).sample
        error = (predicted - held_out.batch.target[index]).square().mean()
        assert found[index] == pytest.approx(error.item(), rel=1e-4)


def test_standard_errors_are_within_poses_and_places(task):
    kinds = ["pose"] * 10 + ["place"] * 10
    generator = torch.Generator().manual_seed(0)
    means, spreads = torch.tensor([5.0, 0.0]), torch.tensor([0.3, 0.6])
    draws = means[:, None] + spreads[:, None] * torch.randn(4000, 2, 10, generator=generator)
    stated = [stratified_error(each.flatten().tolist(), kinds) for each in draws]
    true = draws.mean((1, 2)).std().item()  # of the mean of ten poses and ten places
    assert sum(stated) / len(stated) == pytest.approx(true, rel=0.05)
    assert stratified_error([1.0, 3.0, 10.0, 16.0], ["a", "a", "b", "b"]) == pytest.approx((2 * 2 + 2 * 18) ** 0.5 / 4)


def test_the_error_of_a_run_is_that_of_its_gain_over_the_base_model(task):
    unet = disturbed_nara(task)
    found = binned_losses(task, unet)
    total = 0.0
    for held_out, before in zip(task.held_out, task.base_losses, strict=True):
        gains = torch.tensor(before).double() - torch.tensor(held_out_losses(unet, held_out)).double()
        half = len(gains) // 2
        total += (gains[:half].var().item() + gains[half:].var().item()) / half / 4  # of the mean of both kinds
    assert found.gain_error == pytest.approx(total**0.5 / 10, rel=1e-6)


def test_every_method_of_a_seed_meets_the_same_batches(task):
    seen: dict[str, list[torch.Tensor]] = {}

    def run(method: str, seed: int) -> list[torch.Tensor]:
        args = arguments("toy", method, seed, {"max_train_steps": 2})
        torch.manual_seed(seed)
        model = adapted(task.pipe, method, args)
        calls = seen.setdefault(f"{method} {seed}", [])
        hook = lambda module, given: calls.extend(given[:2])  # noqa: E731
        model.unet.register_forward_pre_hook(hook)
        train(task, model, args, None, progress=False)
        return calls

    lora, nara, other = run("lora", 1), run("nara_dora", 1), run("lora", 2)
    assert len(lora) == 2 * 3  # input and timestep, of two steps and the forward that counts memory
    assert all(torch.equal(a, b) for a, b in zip(lora, nara, strict=True))
    assert not torch.equal(lora[0], other[0])
    assert not torch.equal(lora[2], lora[4])


def test_samples_of_all_methods_start_from_the_same_noise_and_seeds_share_none(task):
    settings = [sample_settings(task, arguments("toy", name, seed, {})) for name, seed in (("lora", 0), ("nara", 0))]
    assert settings[0].pairs == settings[1].pairs
    seeds = [{s for _, s in sample_settings(task, arguments("toy", "lora", seed, {})).pairs} for seed in range(6)]
    assert len(set().union(*seeds)) == sum(map(len, seeds))


@pytest.mark.parametrize("method", [name for name in NAMES if name != "base"])
def test_every_method_trains_what_it_adds_and_nothing_else(task, method):
    args = arguments("toy", method, 0, {"max_train_steps": 2, "lr_warmup_steps": 0})
    model = adapted(task.pipe, method, args)
    before = {name: tensor.clone() for name, tensor in model.unet.named_parameters()}
    base = {name: tensor.clone() for name, tensor in task.pipe.unet.named_parameters()}
    train(task, model, args, None, progress=False)
    trained = {name for name, p in model.unet.named_parameters() if p.requires_grad}
    moved = {name for name, p in model.unet.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert moved <= trained
    assert (len(trained) == len(before)) == (method == "full")
    assert all(torch.equal(tensor, base[name]) for name, tensor in task.pipe.unet.named_parameters())


def outputs(unet, held_out, level: float | torch.Tensor | None) -> torch.Tensor:
    """The UNet's predictions, told λ `level`."""
    inputs = {"encoder_hidden_states": held_out.embeddings[0]}
    inputs["added_cond_kwargs"] = {"text_embeds": held_out.embeddings[1], "time_ids": held_out.time_ids}
    with torch.no_grad():
        if level is None:
            return unet(held_out.batch.model_input, held_out.batch.timestep, **inputs).sample
        with noise_level(unet, level):
            return unet(held_out.batch.model_input, held_out.batch.timestep, **inputs).sample


def test_controls_of_an_evaluation_tell_another_noise_level_and_then_the_true_one_again(task):
    unet, held_out = disturbed_nara(task), shortened(task.held_out[1])
    true = held_out.batch.timestep / 1000
    expected = {"constant": outputs(unet, held_out, 0.5), "reversed": outputs(unet, held_out, 1 - true)}
    plain = outputs(unet, held_out, true)
    for control, wanted in expected.items():
        with while_evaluating(unet, control):
            assert relative_error(outputs(unet, held_out, None), wanted) < 1e-4
        assert relative_error(outputs(unet, held_out, None), plain) < 1e-4
        assert relative_error(wanted, plain) > 0.01


def test_shuffled_noise_levels_are_spread_like_true_ones_and_are_others():
    five = torch.stack([shuffled_noise_levels(range(5 * i, 5 * i + 5), 3, 1000, 5) for i in range(40)])  # (40, 5)
    strata = (five * 5).long().sort(1).values
    assert torch.equal(strata, torch.arange(5).expand(40, 5))
    assert torch.equal(five[7], shuffled_noise_levels(range(35, 40), 3, 1000, 5))


def test_a_training_forward_under_a_control_is_told_its_noise_level(task):
    unet, held_out = disturbed_nara(task), shortened(task.held_out[4], 6)
    inputs = (held_out.batch.model_input, held_out.batch.timestep, held_out.time_ids, held_out.embeddings)
    others = torch.linspace(0, 1, len(held_out.time_ids))
    for control, level in (("constant", 0.5), ("shuffled", others), (None, held_out.batch.timestep / 1000)):
        denoiser = ControlledDenoiser(unet, control)
        denoiser.shuffled = others
        with torch.no_grad():
            predicted = denoiser(*inputs)
        assert relative_error(predicted, outputs(unet, held_out, level)) < 1e-4


def test_each_step_is_told_the_shuffled_noise_levels_of_its_positions(task, monkeypatch):
    told = []
    monkeypatch.setattr(
        "quality.images.training.while_training", lambda *given: told.append(given[1:]) or nullcontext()
    )
    args = arguments("toy", "nara", 4, {"max_train_steps": 2})
    train(task, adapted(task.pipe, "nara", args), args, "shuffled", progress=False)
    assert [control for control, _ in told] == ["shuffled"] * 3
    for number, (_, levels) in enumerate(told[1:]):
        assert torch.equal(levels, shuffled_noise_levels(range(5 * number, 5 * number + 5), 4, 1000, 5))


def test_a_run_gives_whole_records_of_itself_and_of_its_controls(small):
    records = image_records(
        "toy", "nara", 0, evaluated=("reversed",), num_validation_images=1, num_inference_steps=2, rank=3, **SHORT
    )
    assert [record["control"] for record in records] == [None, "reversed"]
    for record in records:
        assert json.loads(json.dumps(record)) == record
        assert (record["suite"], record["domain"], record["method"]) == ("images", "toy", "nara")
        assert (record["rank"], record["steps"], record["n"]) == (3, 2, 8)
        assert len(record["losses"]) == len(record["loss_errors"]) == len(record["noise_levels"]) == 10
        assert record["validation_loss"] == pytest.approx(sum(record["losses"]) / 10)
        assert all(-1 <= record[name] <= 1 for name in ("similarity", "text_alignment", "place_similarity"))
    assert records[0]["settings"]["num_inference_steps"] == 2
    assert records[0]["losses"] != records[1]["losses"] or records[0]["similarity"] != records[1]["similarity"]


def test_a_run_can_be_repeated_and_seeds_differ(small):
    run = lambda seed: run_one_image("toy", "lora", seed, stage="tune", **SHORT)  # noqa: E731
    first = run(0)
    assert run(0)["losses"] == first["losses"]
    assert run(1)["losses"] != first["losses"]
    assert first["similarity"] is None


def test_the_base_model_is_measured_without_training(small):
    record = run_one_image("toy", "base", 0, stage="tune")
    assert record["losses"] == binned_losses(small, small.pipe.unet).means
    assert (record["steps"], record["trainable_parameters"]) == (0, 0)
    assert record["validation_error"] < 1e-5  # the base model gains nothing over itself, but for rounding
    assert min(record["loss_errors"]) > 1e-5


def test_what_cant_be_run_is_refused_by_name():
    with pytest.raises(ValueError, match="method is 'prompt_tuning', expected one of base, nara"):
        run_one_image("toy", "prompt_tuning", 0)
    with pytest.raises(ValueError, match="method 'lora' knows no λ that control 'constant' could replace"):
        run_one_image("toy", "lora", 0, control="constant")
    with pytest.raises(ValueError, match="control is 'reversed', expected none or one of constant, shuffled"):
        run_one_image("toy", "nara", 0, control="reversed")
    with pytest.raises(ValueError, match="subject is 'dog', expected one of toy, car, cup, house"):
        run_one_image("dog", "nara", 0)
    with pytest.raises(ValueError, match=r"ranks is no argument of train_scripts/dreambooth_sdxl\.py"):
        run_one_image("toy", "nara", 0, ranks=4)
