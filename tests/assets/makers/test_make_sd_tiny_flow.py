"""The maker of sd-tiny-flow: what its transformer is trained on, its loss and optimisers, and a run that stops."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from make_sd_tiny_flow import Arguments, assemble, load_pipeline, main
from safetensors.torch import load_file
from tiny_drawings.scenes import render, scenes, training_caption
from tiny_images.flow_latents import FlowLatents, cached_flow_latents
from tiny_images.transformer import DROPPED_SHARE, LOGIT_DEVIATION, PADDINGS, FlowMatching
from tiny_images.vae import pixels
from tiny_training import Plan, Training
from torch import Tensor, nn


def small_run(folder: Path, **changes: object) -> Arguments:
    sizes = {"layers": 2, "heads": 1, "steps": 4, "decay_steps": 2, "batch_size": 2, "late_batch_size": 3}
    less = {"scenes": 6, "held_out": 3, "save_steps": 3, "evaluation_batches": 1, "inference_steps": 1}
    return Arguments(output_dir=folder, **{**sizes, **less, **changes})


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion3Pipeline:
    return assemble(small_run(tmp_path_factory.mktemp("unused")))


def prompt_by_hand(pipe: StableDiffusion3Pipeline, prompt: str) -> tuple[Tensor, Tensor]:
    hidden, pooled = [], []
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        ids = tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            output = encoder(ids, output_hidden_states=True)
        hidden.append(output.hidden_states[-2][0])
        pooled.append(output.text_embeds[0])
    return torch.cat(hidden, dim=-1), torch.cat(pooled)


def test_latents_and_prompts_are_those_of_the_scenes(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    latents = cached_flow_latents(pipe, "some", 3, 66, tmp_path)
    assert len(latents) == 66
    shift, scale = pipe.vae.config.shift_factor, pipe.vae.config.scaling_factor
    for index, shown in enumerate(scenes("some", 3, 66)):
        if index not in (0, 2, 65):
            continue
        with torch.no_grad():
            posterior = pipe.vae.encode(pixels([render(shown)])).latent_dist
        expected = scale * (posterior.mean[0] - shift)
        torch.testing.assert_close(latents.means[index].float(), expected, rtol=0.05, atol=0.02)
        torch.testing.assert_close(latents.deviations[index].float(), scale * posterior.std[0], rtol=0.05, atol=0.02)
        hidden, pooled = prompt_by_hand(pipe, training_caption(shown))
        torch.testing.assert_close(latents.prompts[index].float(), hidden, rtol=1e-3, atol=2e-3)
        torch.testing.assert_close(latents.pooled[index].float(), pooled, rtol=1e-3, atol=2e-3)
    hidden, pooled = prompt_by_hand(pipe, "")
    torch.testing.assert_close(latents.empty_prompt.float(), hidden, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(latents.empty_pooled.float(), pooled, rtol=1e-3, atol=2e-3)
    assert torch.equal(cached_flow_latents(pipe, "some", 3, 66, tmp_path).means, latents.means)


class Recorder(nn.Module):
    """Stands in for the transformer: keeps what it was given, predicts zeros."""

    def forward(self, sample: Tensor, **inputs: Tensor) -> SimpleNamespace:
        self.sample, self.inputs = sample, inputs
        return SimpleNamespace(sample=torch.zeros_like(sample))


def some_latents(n: int) -> FlowLatents:
    generator = torch.Generator().manual_seed(1)
    return FlowLatents(
        means=torch.randn(n, 4, 16, 16, generator=generator),
        deviations=torch.zeros(n, 4, 16, 16),
        prompts=torch.randn(n, 3, 7, generator=generator) + 4,
        pooled=torch.arange(6.0 * n).reshape(n, 6),
        empty_prompt=torch.full((3, 7), -1.0),
        empty_pooled=torch.full((6,), -1.0),
    )


def training_with(model: nn.Module, batch: int, seed: int) -> SimpleNamespace:
    return SimpleNamespace(
        model=model, batch=batch, device="cpu", generator=lambda: torch.Generator().manual_seed(seed),
        autocast=lambda: torch.autocast("cpu", enabled=False),
    )  # fmt: skip


def test_the_loss_is_the_formula_of_its_docstring() -> None:
    """The Recorder's zeros make it the mean of (ε − z)², ε from the noisy sample and its noise level."""
    batch, latents, model = 400, some_latents(5), Recorder()
    loss = FlowMatching(latents, latents).loss(training_with(model, batch, seed=2))["loss"]
    sigmas = model.inputs["timestep"].double() / 1000
    logits = sigmas.logit()
    assert abs(logits.mean()) < 0.05
    assert logits.std().item() == pytest.approx(LOGIT_DEVIATION, rel=0.05)
    pooled, prompts = model.inputs["pooled_projections"], model.inputs["encoder_hidden_states"]
    dropped = (pooled == -1).all(1)
    assert abs(dropped.float().mean() - DROPPED_SHARE) < 0.05
    assert torch.equal(prompts[dropped, :3], latents.empty_prompt.expand(int(dropped.sum()), 3, 7))
    rows = [int((latents.pooled == own).all(1).nonzero()) for own in pooled[~dropped]]
    assert torch.equal(prompts[~dropped, :3], latents.prompts[rows])

    z = latents.means[rows].double()
    share = sigmas[~dropped, None, None, None]
    noise = (model.sample[~dropped].double() - (1 - share) * z) / share
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    expected = (noise - z).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)  # of the 90 % whose prompt says which z it is


def test_steps_have_as_many_zero_vectors_as_the_shares_say() -> None:
    latents, model, seen = some_latents(2), Recorder(), []
    objective = FlowMatching(latents, latents)
    for seed in range(300):
        objective.loss(training_with(model, 2, seed))
        prompts = model.inputs["encoder_hidden_states"]
        assert (prompts[:, 3:] == 0).all()
        seen.append(prompts.shape[1] - 3)
    assert {length: seen.count(length) / 300 for length in PADDINGS} == pytest.approx(PADDINGS, abs=0.06)


def test_muon_trains_the_matrices_of_blocks_and_adamw_the_rest(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    plan = Plan(10, 2, 1e-3, muon=2e-3)
    training = Training(pipe.transformer, plan, tmp_path / "state.pt", seed=0, device="cpu", resume=False)
    adamw, muon = training.optimizers
    names = {id(weight): name for name, weight in pipe.transformer.named_parameters()}
    by_muon = {names[id(weight)] for group in muon.param_groups for weight in group["params"]}
    by_adamw = {names[id(weight)] for group in adamw.param_groups for weight in group["params"]}
    assert by_muon | by_adamw == set(names.values())
    assert not by_muon & by_adamw
    assert by_muon == {
        name
        for name, weight in pipe.transformer.named_parameters()
        if name.startswith("transformer_blocks.") and weight.dim() == 2
    }
    assert (adamw.defaults["lr"], muon.defaults["lr"]) == (1e-3, 2e-3)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("make_sd_tiny_flow", "tiny_images.evaluation"):
        monkeypatch.setattr(f"{module}.SHEET_PROMPTS", ("a photo of a red car",))
    monkeypatch.setattr("tiny_images.evaluation.BATCH", 2)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    results = main(small_run(whole))
    update = Training._update

    def stop(training: Training, loss: Tensor) -> None:
        if training.step == 3:
            raise KeyboardInterrupt
        update(training, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_update", stop)
        with pytest.raises(KeyboardInterrupt):
            main(small_run(stopped))
    with pytest.raises(ValueError, match="add --resume"):
        main(small_run(stopped))
    assert main(small_run(stopped, resume=True))["validation_loss"] == results["validation_loss"]

    file = "transformer/diffusion_pytorch_model.safetensors"
    expected, resumed = load_file(whole / file), load_file(stopped / file)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    card = (whole / "README.md").read_text()
    assert "| transformer, 2 blocks of width 32" in card
    assert "$" not in card
    assert load_pipeline(whole).transformer.config.num_layers == 2
