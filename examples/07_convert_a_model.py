"""A model that predicts noise becomes a rectified flow: train the adapter, load it, sample, and take it out again.

    python examples/07_convert_a_model.py

The shipped sdxl-tiny predicts ε. Here a NaRA adapter teaches it the velocity ε − x of the straight path (1 − σ) x + σ ε
instead, on scenes with captions. What has to change differs from one noise level to the next, which is what NaRA is
for. The adapter's file carries the scheduler: `load_nara_weights` sets it, and `unload_nara_weights` brings the old one
back. `train_scripts/dreambooth_sdxl.py --prediction_type flow_prediction` does the same on your pictures, with all that
a long run needs. The picture shows each prompt by the base, by the base read as if it were a flow, and after. Takes
a few minutes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from shipped_images import ASSETS, LAYERS, load_pipeline, optimizer_of, sample
from tqdm.auto import tqdm

from nara_diffusion import NaraConfig
from nara_diffusion.dreambooth.conversion import converted_scheduler
from nara_diffusion.dreambooth.objectives import Objective, build_objective, squared_errors
from nara_diffusion.dreambooth.samples import write_grid
from nara_diffusion.loaders.schedulers import scheduler_fields

sys.path.insert(0, str(ASSETS / "makers"))
from tiny_images.unet import Latents, encode_scenes

PROMPTS = [
    "a photo of a red car on the beach",
    "a photo of a blue cup in the snow",
    "a photo of a yellow star at night",
]
BATCH = 8


def loss_of(pipe: Any, objective: Objective, scenes: Latents, rows: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The mean squared error on some scenes, each at a noise level of its own; the UNet's timestep is 1000 σ."""
    latents, prompts, conditions = scenes.batch(rows, torch.Generator().manual_seed(int(rows.sum())))
    batch = objective.corrupt(latents, torch.randn(latents.shape), levels)
    prediction = pipe.unet(batch.model_input, batch.timestep, prompts, added_cond_kwargs=conditions).sample
    return squared_errors(prediction, batch).mean()


def validation_loss(pipe: Any, objective: Objective, scenes: Latents) -> float:
    """Over scenes that training doesn't see, at levels spread evenly, on the same noise each time."""
    rows = torch.arange(len(scenes))
    levels = torch.linspace(0, objective.levels - 1, len(scenes)).long()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return loss_of(pipe, objective, scenes, rows, levels).item()


def train(pipe: Any, objective: Objective, config: NaraConfig, scenes: Latents, steps: int) -> None:
    """A plain loop: scenes at random noise levels, the UNet's error, AdamW."""
    pipe.unet.requires_grad_(False)
    pipe.unet.add_adapter(config, adapter_name="default")
    optimizer, schedule = optimizer_of(pipe.unet, 5e-3, 2.5e-3, steps)
    pipe.unet.train()
    for _ in (bar := tqdm(range(steps), desc="train")):
        spread = (torch.randperm(BATCH) + torch.rand(BATCH)) / BATCH  # λ over the whole path in each batch
        loss = loss_of(
            pipe, objective, scenes, torch.randint(len(scenes), (BATCH,)), (spread * objective.levels).long()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    pipe.unet.eval()


def main(
    model: str | Path = ASSETS / "sdxl-tiny",
    steps: int = 200,
    n: int = 192,
    sample_steps: int = 20,
    output_dir: str | Path = "outputs/examples",
) -> dict[str, float]:
    """Returns the loss of the new target before and after; the picture lies in `output_dir`."""
    torch.manual_seed(0)
    folder = Path(output_dir) / "07_convert_a_model"
    pipe = load_pipeline(model)
    flow = converted_scheduler(pipe.scheduler, "flow_prediction", rescale_betas_zero_snr=False)
    objective = build_objective(flow)
    scenes, held_out = encode_scenes(pipe, "convert", 0, n), encode_scenes(pipe, "convert held out", 0, min(n, 64))

    columns = {"base, as it is": sample(pipe, PROMPTS, sample_steps, guidance=2.5)}
    own, pipe.scheduler = pipe.scheduler, flow
    columns["base, read as a flow"] = sample(pipe, PROMPTS, sample_steps, guidance=2.5)
    pipe.scheduler = own

    config = NaraConfig(
        r=8,
        lora_alpha=8,
        target_modules=LAYERS,
        core_hidden_dims=(64, 64),
        noise_convention="flow",  # λ = σ = t / 1000
        scheduler=scheduler_fields(flow),
    )
    losses = {"before": validation_loss(pipe, objective, held_out)}
    train(pipe, objective, config, scenes, steps)
    losses["after"] = validation_loss(pipe, objective, held_out)
    print(f"loss of the velocity: {losses['before']:.3f} before, {losses['after']:.3f} after")
    pipe.save_nara_weights(folder)

    pipe = load_pipeline(model)  # as somebody else would use it
    pipe.load_nara_weights(folder)
    print(f"loaded, it samples by {type(pipe.scheduler).__name__}, prediction: {pipe.scheduler.config.prediction_type}")
    columns["converted"] = sample(pipe, PROMPTS, sample_steps, guidance=2.5)
    pipe.unload_nara_weights()
    unloaded = sample(pipe, PROMPTS, sample_steps, guidance=2.5)
    same = all(a.tobytes() == b.tobytes() for a, b in zip(columns["base, as it is"], unloaded, strict=True))
    print(f"unloaded, it samples by {type(pipe.scheduler).__name__} and gives the base's pixels again: {same}")

    write_grid(folder.with_suffix(".png"), PROMPTS, columns)
    print(f"drawn in {folder.with_suffix('.png')}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Convert Stable Diffusion XL to a rectified flow by a NaRA adapter.")
    parser.add_argument("--model", default=ASSETS / "sdxl-tiny", help="folder of SDXL (default: the shipped sdxl-tiny)")
    parser.add_argument("--steps", type=int, default=200, help="train steps of the adapter (default: 200)")
    parser.add_argument("--n", type=int, default=192, help="scenes to train on (default: 192)")
    parser.add_argument("--sample_steps", type=int, default=20, help="steps of sampling an image (default: 20)")
    parser.add_argument("--output_dir", default="outputs/examples", help="where adapter and picture go")
    main(**vars(parser.parse_args()))
