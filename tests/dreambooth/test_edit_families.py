"""Families that edit images, against their own pipelines: tokens, positions, prompts and λ; the loss; loading."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

import nara_command
from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.dreambooth.caches import LatentCache, PromptCache
from nara_diffusion.dreambooth.dataset import DreamBoothDataset, TrainingSample, collate_samples
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser, write_adapter
from nara_diffusion.dreambooth.draws import draw_noise
from nara_diffusion.dreambooth.families import Family, placed
from nara_diffusion.dreambooth.objectives import build_objective
from nara_diffusion.dreambooth.pipelines import family_of
from nara_diffusion.dreambooth.source_images import records_from_folder
from nara_diffusion.dreambooth.training_step import TrainingStep, ValidationLoss
from tests.dreambooth.pictures import folder_of
from tests.helpers.adapted import disturb
from tests.helpers.denoisers import levels_of_core, recorded
from tests.helpers.pipelines.edits import EDIT_PIPELINES

pytestmark = pytest.mark.filterwarnings("ignore:.*(guidance|max_sequence_length|cfg).*")

SEVERAL = ("qwen plus", "flux2", "flux2 klein")
LENGTHS = {"kontext": 12, "flux2": 64, "flux2 klein": 64}
CALLS: dict[str, dict[str, Any]] = {
    "kontext": {"guidance_scale": 3.5},
    "qwen edit": {"true_cfg_scale": 1.0},
    "qwen plus": {"true_cfg_scale": 1.0},
    "flux2": {"guidance_scale": 4.0},
    "flux2 klein": {"guidance_scale": 1.0},
}
SIZE = (96, 64)
CORE: dict[str, Any] = {"core_hidden_dims": (4, 4), "core_init": "kaiming", "noise_convention": "flow"}


@pytest.fixture(autouse=True)
def small_areas(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipelines of Qwen scale to 64² instead of 1024², and text encoders see even less."""
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        dimensions = module.calculate_dimensions
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio, of=dimensions: of(area / 256, ratio))


def configured(name: str, pipe: Any) -> Family:
    return replace(family_of(pipe), max_sequence_length=LENGTHS.get(name))


def pairs(folder: Path, name: str) -> list[TrainingSample]:
    """Two pairs of unlike prompts, with a whole source in landscape and for some models one that is cut."""
    folder_of(folder / "source", [(72, 66), (72, 66), (70, 105), (70, 105)])
    folder_of(folder, [(70, 105)] * 2)
    rows = []
    for number, prompt in enumerate(("a toy", "make it red")):
        sources = [f"source/0{number}.png", f"source/0{number + 2}.png"]
        sources = sources if name in SEVERAL else sources[:1]
        rows.append({"file_name": f"0{number}.png", "source": sources, "text": prompt})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = records_from_folder(folder, most=2, progress=False)
    return DreamBoothDataset(records, [SIZE], batch_size=2, seed=5).plain_samples()


def caches(pipe: Any, family: Family) -> tuple[LatentCache, PromptCache]:
    return LatentCache(pipe.vae, source_pixels=partial(family.source_pixels, pipe)), PromptCache(pipe, family)


def grid(pipe: Any, tokens: Tensor) -> Tensor:
    """(b, c, h, w) of the latents that a pipeline keeps, by its own means."""
    height, width = SIZE
    if hasattr(pipe, "_unpack_latents_with_ids"):
        factor = pipe.vae_scale_factor * 2
        ids = pipe._prepare_latent_ids(torch.zeros(len(tokens), 1, height // factor, width // factor))
        return pipe._unpack_latents_with_ids(tokens, ids)
    latents = pipe._unpack_latents(tokens, height, width, pipe.vae_scale_factor)
    return latents[:, :, 0] if latents.dim() == 5 else latents


@pytest.mark.parametrize("name", EDIT_PIPELINES)
@torch.no_grad()
def test_denoiser_gets_what_its_edit_pipeline_passes(name: str, tmp_path: Path) -> None:
    pipe, kept = EDIT_PIPELINES[name](), []
    family, sample = configured(name, pipe), pairs(tmp_path, name)[1]
    assert family.most_sources >= len(sample.image.sources)

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept.append(tensors["latents"])
        return {}

    images = sample.source_images()
    call = family.sampling({"height": SIZE[0], "width": SIZE[1], **family.sample_call}, 1) | CALLS[name]
    with recorded(pipe.transformer) as calls:
        pipe(
            image=images if len(images) > 1 else images[0],
            prompt=sample.prompt,
            num_inference_steps=3,
            callback_on_step_end=keep,
            **call,
        )
    latents, prompts = caches(pipe, family)
    sources = latents.sources([sample])
    embeddings = placed(prompts.get([sample.prompt], [sample]), torch.device("cpu"))
    timestep, ids = pipe.scheduler.timesteps[2][None], torch.tensor([sample.time_ids])
    with recorded(pipe.transformer) as ours:
        x = grid(pipe, kept[1])
        prediction = family.predict(pipe.transformer, x, timestep, ids, embeddings, sources)
    theirs = calls[2]
    assert theirs["hidden_states"].shape[1] > kept[1].shape[1]
    assert ours[0].keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[0][key], value, rtol=1e-5, atol=1e-5, check_dtype=False)
    moved = (pipe.scheduler.sigmas[3] - pipe.scheduler.sigmas[2]) * prediction
    torch.testing.assert_close(x + moved, grid(pipe, kept[2]), rtol=1e-5, atol=1e-5)


def trained(name: str, config: Any = None) -> AdaptedDenoiser:
    """With an adapter whose weights all differ from those of their start."""
    pipe = EDIT_PIPELINES[name]()
    nara: Any = NaraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_v"], **CORE)
    model = AdaptedDenoiser(pipe, config or nara, family=configured(name, pipe))
    disturb(model, scale=0.2)
    return model.eval()


def step_of(model: AdaptedDenoiser) -> TrainingStep:
    latents, prompts = caches(model.pipe, model.family)
    objective = build_objective(model.pipe.scheduler)
    return TrainingStep(model, objective, latents, prompts, torch.device("cpu"), seed=11)


@pytest.mark.parametrize("name", ["kontext", "qwen plus", "flux2"])
def test_loss_reads_target_tokens_at_sample_level(name: str, tmp_path: Path) -> None:
    """All tokens of a sample, its sources' too, have the C of its λ; only the target's outputs have a gradient."""
    model, samples = trained(name), pairs(tmp_path, name)
    step, seen = step_of(model), {}
    batch = collate_samples([{"samples": [sample]} for sample in samples])
    layer = model.denoiser.get_submodule("transformer_blocks.0.attn.to_q")
    layer.register_forward_hook(lambda _, args, output: seen.update(x=args[0], y=output))
    model.denoiser.proj_out.register_full_backward_hook(lambda _, inputs, outputs: seen.update(gradient=outputs[0]))
    results: list[Any] = []
    levels = levels_of_core(model.denoiser, lambda: results.append(step(batch)))
    (result,) = results
    result.loss.backward()

    assert len(set(levels)) == 2
    assert levels == pytest.approx(result.noise_level.tolist(), abs=1e-6)
    (core,) = model.denoiser.lora_core.cores["default"].children()
    C = torch.eye(2) + core.at(torch.tensor(levels))  # (b, r, r)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    update = torch.einsum("or,brs,sd,bld->blo", B, C, A, seen["x"]) * 3 / 2
    torch.testing.assert_close(seen["y"], layer.base_layer(seen["x"]) + update, rtol=1e-4, atol=1e-5)

    tokens = SIZE[0] * SIZE[1] // (model.pipe.vae_scale_factor * 2) ** 2
    gradient = seen["gradient"]
    assert gradient.shape[1] > tokens
    assert (gradient[:, :tokens].abs().amax(-1) > 0).all()
    assert not gradient[:, tokens:].any()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.trained.values())


def test_step_and_curve_are_pairs_one_by_one(tmp_path: Path) -> None:
    """The loss of a batch is that of its pairs; a curve measures each pair with its own sources.

    All layers are adapted, also those that see each sample at its timestep and at t = 0, in a batch of 2 b.
    """
    samples = pairs(tmp_path, "qwen plus")
    model = trained("qwen plus", NaraConfig(r=2, lora_alpha=3, target_modules="all-linear", **CORE))
    step = step_of(model)
    assert step.prompts is not None
    with torch.no_grad():
        whole = step(collate_samples([{"samples": [sample]} for sample in samples])).per_sample
        single = [step(collate_samples([{"samples": [sample]}])).per_sample for sample in samples]
        swapped = replace(samples[0], image=replace(samples[0].image, sources=samples[1].image.sources))
        other = step(collate_samples([{"samples": [swapped]}])).per_sample
    torch.testing.assert_close(whole, torch.cat(single), rtol=1e-4, atol=1e-5)
    assert abs(other - single[0]) > 2e-4

    objective = step.objective
    loss = ValidationLoss(replace(step, seed=4), samples, model.family, 2, 2)
    curve = loss._at(model.pipe, step.prompts, 700)
    for sample, measured in zip(samples, curve, strict=True):
        latents, ids = step.latents.mode([sample]), torch.tensor([sample.time_ids])
        noise = draw_noise([sample.position], latents.shape[1:], seed=4, role="validation")
        corrupted = objective.corrupt(latents, noise, torch.tensor([700]))
        states = placed(step.prompts.get([sample.prompt], [sample]), torch.device("cpu"))
        with torch.no_grad():
            inputs = (corrupted.model_input, corrupted.timestep, ids)
            prediction = model(*inputs, embeddings=states, sources=step.latents.sources([sample]))
        assert measured == pytest.approx((prediction - corrupted.target).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["kontext", "qwen edit", "qwen plus", "flux2 klein"])
def test_saved_nara_reads_level_of_each_step(name: str, tmp_path: Path) -> None:
    """Of a batch with classifier-free guidance, and of two images in one sample."""
    model, samples = trained(name), pairs(tmp_path / "pairs", name)
    (tmp_path / "out").mkdir()
    write_adapter(model, tmp_path / "out", {})
    pipe, levels = EDIT_PIPELINES[name](), []
    call = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": 3, "output_type": "latent"}
    call = configured(name, pipe).sampling(call | configured(name, pipe).sample_call, 2)
    prompts = ["a toy", "a car"]
    if name == "flux2 klein":
        images = samples[0].source_images()
        call |= {"guidance_scale": 3.0}
    elif name == "qwen plus":  # which takes one prompt
        images, prompts = samples[0].source_images(), prompts[:1]
        call |= {"true_cfg_scale": 3.0, "negative_prompt": ["grey"]}
    else:
        images = [sample.source_images()[0] for sample in samples]
        call |= {"true_cfg_scale": 3.0, "negative_prompt": ["grey", "blue"]}

    def sampled() -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed, _ in enumerate(prompts)]
        return pipe(image=images, prompt=prompts, generator=generators, **call).images

    plain = sampled()
    pipe.load_nara_weights(tmp_path / "out", "default")
    core = pipe.transformer.get_submodule("lora_core.cores.default.shared")
    core.register_forward_pre_hook(lambda _, args: levels.append(args[0].tolist()))
    with torch.no_grad():
        adapted = sampled()
    assert (adapted - plain).abs().max() > 1e-3
    expected = [level for sigma in pipe.scheduler.sigmas[:3].tolist() for level in [sigma] * 2]
    assert len(levels) == 6
    assert [level for row in levels for level in set(row)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["kontext", "qwen plus", "flux2"])
def test_saved_lora_loads_on_the_edit_pipeline(name: str, tmp_path: Path) -> None:
    model = trained(name, LoraConfig(r=2, target_modules=["to_q"]))
    write_adapter(model, tmp_path, {})
    pipe = EDIT_PIPELINES[name]()
    pipe.load_lora_weights(tmp_path)
    for key, value in model.denoiser.state_dict().items():
        torch.testing.assert_close(dict(pipe.transformer.state_dict())[key.replace(".default.", ".default_0.")], value)


@pytest.mark.parametrize("name", ["kontext", "qwen plus", "flux2 klein"])
def test_folded_nara_edits_as_at_its_level(name: str, tmp_path: Path) -> None:
    """In the stock pipeline. ComfyUI reads Qwen-Image's layers by the same names."""
    model, samples = trained(name), pairs(tmp_path / "pairs", name)
    (tmp_path / "out").mkdir()
    write_adapter(model, tmp_path / "out", {})
    file = tmp_path / "lora.safetensors"
    nara_command.main(["fold", str(tmp_path / "out"), str(file), "--noise_level", "0.4"])
    images = samples[0].source_images()
    call = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": 2, "output_type": "latent"}
    call = model.family.sampling(call | model.family.sample_call, 1) | CALLS[name]
    call |= {"image": images if len(images) > 1 else images[0], "prompt": "a toy"}
    pipe: Any = EDIT_PIPELINES[name]()
    plain = pipe(generator=torch.Generator().manual_seed(1), **call).images
    pipe.load_lora_weights(file)
    folded = pipe(generator=torch.Generator().manual_seed(1), **call).images
    with noise_level(model.denoiser, 0.4):
        pipe = model.pipe
        expected = pipe(generator=torch.Generator().manual_seed(1), **call).images
    torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-5)
    assert (folded - plain).abs().max() > 1e-3


def test_kontext_folds_for_comfyui_by_names_of_flux(tmp_path: Path) -> None:
    write_adapter(trained("kontext"), tmp_path, {})
    file = tmp_path / "lora.safetensors"
    words = ["--noise_level", "best", "--form", "comfyui", "--base", "flux"]
    nara_command.main(["fold", str(tmp_path), str(file), *words])
    matrices = {key.rpartition(".lora_")[0] for key in load_file(file)}
    assert matrices == {
        f"diffusion_model.{block}" for block in ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1")
    }


def test_kontext_prefers_its_sizes_for_large_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with the pipeline's own preprocessing, of an image with an area above the smallest one."""
    from nara_diffusion.dreambooth import flow_families

    monkeypatch.setattr(flow_families, "SMALL", 60 * 60)
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(40, 88), (52, 66), (88, 40)])
    pipe = EDIT_PIPELINES["kontext"]()
    family, sample = configured("kontext", pipe), pairs(tmp_path, "kontext")[0]
    call = family.sampling({"height": SIZE[0], "width": SIZE[1], **family.sample_call}, 1)
    assert "_auto_resize" not in call
    (image,), (latents,) = sample.source_images(), caches(pipe, family)[0].sources([sample])
    with recorded(pipe.transformer) as calls:
        pipe(image=image, prompt="a toy", num_inference_steps=1, **call)
    assert latents.shape[2:] == (64 // 2, 52 // 2)
    packed = pipe._pack_latents(latents, *latents.shape)
    torch.testing.assert_close(calls[0]["hidden_states"][:, -packed.shape[1] :], packed, rtol=1e-5, atol=1e-5)
