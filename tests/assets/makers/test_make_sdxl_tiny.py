"""The maker of sdxl-tiny: what its UNet is trained on, with which loss, and runs that stop and go on."""

from pathlib import Path
from types import SimpleNamespace

import make_clip_tiny
import make_sdxl_tiny
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from make_sdxl_tiny import Arguments, assemble, main
from safetensors.torch import load_file
from tiny_drawings.scenes import crop_of, scenes, training_caption
from tiny_images.latents import CROPPED_SHARE, Latents, cached_latents
from tiny_images.unet import DROPPED_SHARE, SNR_BOUND, NoisePrediction
from tiny_images.vae import build_vae, pixels, vae_loss
from tiny_training import Plan, Training
from torch import Tensor, nn


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two untrained CLIPs of unequal widths."""
    folders = {}
    for name, width in (("clip", 48), ("clip_smaller", 32)):
        folders[name] = tmp_path_factory.mktemp(name)
        args = make_clip_tiny.Arguments(text_width=width, text_layers=2, vision_width=32, vision_layers=1)
        processor = make_clip_tiny.build_processor()
        torch.manual_seed(width)
        make_clip_tiny.save_clip(make_clip_tiny.build_clip(args, processor), processor, folders[name])
    return folders


def small_run(folder: Path, clips: dict[str, Path], **changes: object) -> Arguments:
    sizes = {
        "vae_steps": 2,
        "decoder_steps": 2,
        "vae_batch_size": 2,
        "unet_steps": 4,
        "unet_batch_size": 4,
        "unet_late_batch_size": 6,
        "unet_decay_steps": 2,
    }
    less = {"scenes": 8, "held_out": 4, "save_steps": 3, "evaluation_batches": 1, "inference_steps": 1}
    return Arguments(output_dir=folder, **clips, **{**sizes, **less, **changes})


@pytest.fixture(scope="module")
def pipe(clips: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    return assemble(small_run(tmp_path_factory.mktemp("unused"), clips), build_vae().eval())


def test_latents_prompts_and_time_ids_are_those_of_the_scenes(pipe: StableDiffusionXLPipeline, tmp_path: Path) -> None:
    pipe.vae.register_to_config(scaling_factor=0.7)
    latents = cached_latents(pipe, "some", 3, 70, tmp_path)
    assert len(latents) == 70
    cropped = latents.time_ids[:, 0] > 64
    assert abs(cropped.float().mean() - CROPPED_SHARE) < 0.2
    assert (latents.time_ids[:, 4:] == 64).all()
    assert (latents.time_ids[~cropped, 2:4] == 0).all()
    for index, shown in enumerate(scenes("some", 3, 70)):
        if index not in (0, 1, 2, 65, int(cropped.nonzero()[0])):
            continue
        size, _, top, left = latents.time_ids[index, :4].tolist()
        posterior = pipe.vae.encode(pixels([crop_of(shown, size, top, left)])).latent_dist
        torch.testing.assert_close(latents.means[index].float(), 0.7 * posterior.mean[0], rtol=0.05, atol=0.02)
        torch.testing.assert_close(latents.deviations[index].float(), 0.7 * posterior.std[0], rtol=0.05, atol=0.02)
        hidden, pooled = prompt_by_hand(pipe, training_caption(shown))
        torch.testing.assert_close(latents.prompts[index].float(), hidden, rtol=0, atol=2e-3)
        torch.testing.assert_close(latents.pooled[index].float(), pooled, rtol=0, atol=2e-3)
    again = cached_latents(pipe, "some", 3, 70, tmp_path)
    assert torch.equal(again.means, latents.means)


def prompt_by_hand(pipe: StableDiffusionXLPipeline, prompt: str) -> tuple[Tensor, Tensor]:
    hidden = []
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        ids = tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            output = encoder(ids, output_hidden_states=True)
        hidden.append(output.hidden_states[-2][0])
    return torch.cat(hidden, dim=-1), output.text_embeds[0]


class Recorder(nn.Module):
    """Stands in for the UNet: keeps what it was given, predicts zeros."""

    def forward(self, sample: Tensor, timesteps: Tensor, prompts: Tensor, added_cond_kwargs: dict) -> SimpleNamespace:
        self.sample, self.timesteps, self.prompts, self.added = sample, timesteps, prompts, added_cond_kwargs
        return SimpleNamespace(sample=torch.zeros_like(sample))


def test_the_loss_is_the_formula_of_its_docstring() -> None:
    n, batch = 5, 400
    generator = torch.Generator().manual_seed(1)
    latents = Latents(
        means=torch.randn(n, 4, 16, 16, generator=generator),
        deviations=torch.zeros(n, 4, 16, 16),
        prompts=torch.randn(n, 3, 7, generator=generator) + 4,
        pooled=torch.randn(n, 6, generator=generator) + 4,
        time_ids=torch.arange(6 * n).reshape(n, 6),
    )
    objective, model = NoisePrediction(latents, latents), Recorder()
    training = SimpleNamespace(
        model=model, batch=batch, device="cpu", generator=lambda: torch.Generator().manual_seed(2),
        autocast=lambda: torch.autocast("cpu", enabled=False),
    )  # fmt: skip
    loss = objective.loss(training)["loss"]

    rows = [int((latents.time_ids == ids).all(1).nonzero()) for ids in model.added["time_ids"]]
    alpha = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)[model.timesteps]
    mean = latents.means[rows].double() * alpha.sqrt()[:, None, None, None]
    noise = (model.sample.double() - mean) / (1 - alpha).sqrt()[:, None, None, None]
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    snr = alpha / (1 - alpha)
    expected = (snr.clamp(max=SNR_BOUND) / snr * noise.square().mean((1, 2, 3))).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)

    assert torch.equal(model.timesteps.sort().values // 100, torch.arange(10).repeat_interleave(40)), "stratified"
    dropped = model.prompts.flatten(1).abs().sum(1) == 0
    assert abs(dropped.float().mean() - DROPPED_SHARE) < 0.05
    assert (model.added["text_embeds"][dropped] == 0).all()
    kept = torch.tensor(rows)[~dropped]
    assert torch.equal(model.prompts[~dropped], latents.prompts[kept])
    assert torch.equal(model.added["text_embeds"][~dropped], latents.pooled[kept])


def test_the_batch_grows_when_the_learning_rate_begins_to_fall(tmp_path: Path) -> None:
    plan = Plan(10, 3, 1e-2, warmup=1, decay=0.4, late_batch=5, bf16=False)
    training = Training(nn.Linear(2, 1), plan, tmp_path / "state.pt", seed=0, device="cpu", resume=False)
    seen = []

    def loss_of(now: Training) -> dict[str, Tensor]:
        seen.append((now.batch, now.schedules[0].get_last_lr()[0]))
        return {"loss": now.model(torch.ones(now.batch, 2)).square().mean()}

    training.run("both", loss_of, lambda: {})
    assert [batch for batch, _ in seen] == [3] * 6 + [5] * 4
    assert [rate for _, rate in seen] == pytest.approx([0] + [1e-2] * 6 + [0.75e-2, 0.5e-2, 0.25e-2])


def test_training_the_decoder_leaves_the_encoder_as_it_was(tmp_path: Path, clips: dict[str, Path]) -> None:
    torch.manual_seed(3)
    vae = build_vae()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    (tmp_path / "training").mkdir()
    make_sdxl_tiny.train_decoder(small_run(tmp_path, clips), vae)
    same = {name for name, value in vae.state_dict().items() if torch.equal(value, before[name])}
    assert same == {name for name in before if name.startswith(("encoder.", "quant_conv."))}


def test_the_autoencoders_loss_falls_with_its_parts(tmp_path: Path) -> None:
    torch.manual_seed(4)
    plan = Plan(1, 2, 1e-3, bf16=False)
    training = Training(build_vae(), plan, tmp_path / "state.pt", seed=0, device="cpu", resume=False)
    parts = vae_loss(training)
    expected = parts["absolute"] + 4 * parts["squares"] + parts["edges"] + 2e-5 * parts["kl"]
    torch.testing.assert_close(parts["loss"], expected)
    assert vae_loss(training)["loss"].item() == parts["loss"].item(), "a step's data follow from its number"


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_weights(
    tmp_path: Path, clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    results = main(small_run(whole, clips))
    update = Training._update

    def stop_in_the_unet(training: Training, loss: Tensor) -> None:
        if training.state_file.name == "unet.pt" and training.step == 3:
            raise KeyboardInterrupt
        update(training, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_update", stop_in_the_unet)
        with pytest.raises(KeyboardInterrupt):
            main(small_run(stopped, clips))
    with pytest.raises(ValueError, match="add --resume"):
        main(small_run(stopped, clips))
    assert main(small_run(stopped, clips, resume=True))["validation_loss"] == results["validation_loss"]

    for part in ("unet", "vae"):
        file = f"{part}/diffusion_pytorch_model.safetensors"
        expected, resumed = load_file(whole / file), load_file(stopped / file)
        assert expected.keys() == resumed.keys()
        assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert "| UNet, text_time conditioning" in (whole / "README.md").read_text()
    assert StableDiffusionXLPipeline.from_pretrained(whole).text_encoder_2.config.hidden_size == 48


@pytest.mark.slow
def test_parts_trained_apart_are_those_of_one_run(tmp_path: Path, clips: dict[str, Path]) -> None:
    together, apart = tmp_path / "together", tmp_path / "apart"
    main(small_run(together, clips))
    for part in ("vae", "unet", "decoder"):
        assert main(small_run(apart, clips, only=part, resume=True)) is None
    main(small_run(apart, clips, resume=True))
    for part in ("unet", "vae"):
        file = f"{part}/diffusion_pytorch_model.safetensors"
        expected, found = load_file(together / file), load_file(apart / file)
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_unknown_part_is_refused(tmp_path: Path, clips: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="--only is 'clip': give vae, decoder or unet"):
        main(small_run(tmp_path, clips, only="clip"))
