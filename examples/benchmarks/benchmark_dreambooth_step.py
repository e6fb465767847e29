"""How long a DreamBooth step of SDXL takes with NaRA and cached latents, beside the step of diffusers' own script.

    python examples/benchmarks/benchmark_dreambooth_step.py

Both train the same model on the same images at the same size and batch, with AdamW (ours fused, as train_scripts/ have
it) and clipped gradients, adapters of one rank on the same projections. The other step is written down here from what
diffusers' train_dreambooth_lora_sdxl.py does at each step with its default flags: images that were cropped beforehand
go through the autoencoder, noise and timesteps are drawn for the batch, the embedding of the one instance prompt and
the time_ids are repeated, and the UNet has PEFT's LoRA. Ours takes latents and prompts from its caches, draws crop,
noise and timestep for each sample by its seed and position, and the UNet has NaRA. The two take turns within each
round, so that whatever else the machine does meets both; the ratio is the median of the rounds' ratios. One thread. In
a small batch the Python around this tiny model's layers takes much of the time, of both; so two batches are measured.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_record import median_ratio, one_thread, run_command, save_record, summarize, times_in_turn
from diffusers import DDPMScheduler
from peft import LoraConfig

from nara_diffusion import NaraConfig
from nara_diffusion.dreambooth import DreamBoothDataset, LatentCache, PromptCache, collate_samples, records_from_folder
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser
from nara_diffusion.dreambooth.image_arguments import UNET_TARGETS
from nara_diffusion.dreambooth.objectives import build_objective
from nara_diffusion.dreambooth.pipelines import load_pipeline
from nara_diffusion.dreambooth.training_step import TrainingStep
from nara_diffusion.training.stream import stream_loader

ASSETS = Path(__file__).parents[1] / "assets"
PROMPT = "a photo of sks toy"


class DiffusersStep:
    """One optimizer step as diffusers' script takes it, without prior preservation and with frozen text encoders."""

    def __init__(self, pipe: Any, dataset: DreamBoothDataset, batch: int, rank: int) -> None:
        self.pipe, self.batch = pipe, batch
        self.pixels = [
            sample.pixel_values() for sample in dataset.plain_samples()
        ]  # cropped once, when training starts
        self.order = random.Random(0)
        self.schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        pipe.unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=UNET_TARGETS)
        )
        pipe.unet.train()
        with torch.no_grad():
            self.embeds, _, self.pooled, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
        self.finish = Finish(pipe.unet)

    def __call__(self) -> None:
        pixels = torch.stack(self.order.choices(self.pixels, k=self.batch))  # (b, 3, h, w)
        latents = self.pipe.vae.encode(pixels).latent_dist.sample() * self.pipe.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, self.schedule.config["num_train_timesteps"], (self.batch,))
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        height, width = pixels.shape[-2:]
        time_ids = torch.tensor([[height, width, 0, 0, height, width]] * self.batch)
        conditions = {"time_ids": time_ids, "text_embeds": self.pooled.repeat(self.batch, 1)}
        prediction = self.pipe.unet(
            noisy, timesteps, self.embeds.repeat(self.batch, 1, 1), added_cond_kwargs=conditions, return_dict=False
        )[0]
        target = noise
        if self.schedule.config["prediction_type"] == "v_prediction":
            target = self.schedule.get_velocity(latents, noise, timesteps)
        self.finish(F.mse_loss(prediction.float(), target.float()))


class CachedStep:
    """One optimizer step of train_scripts/dreambooth_sdxl.py."""

    def __init__(self, pipe: Any, dataset: DreamBoothDataset, batch: int, rank: int) -> None:
        latents = LatentCache(pipe.vae)
        latents.fill(dataset.distinct_samples(range(200)), progress=False)
        config = NaraConfig(r=rank, lora_alpha=rank, target_modules=UNET_TARGETS, noise_convention="timestep")
        model = AdaptedDenoiser(pipe, config).train()
        self.step = TrainingStep(
            model=model,
            objective=build_objective(pipe.scheduler),
            latents=latents,
            prompts=PromptCache(pipe),
            device=torch.device("cpu"),
            seed=0,
            group_size=batch,
            stratified=True,
        )
        self.batches: Iterator[Any] = iter(
            stream_loader(dataset, collate_samples, batch_size=batch, first=0, stop=10**9)  # type: ignore[arg-type]
        )
        self.finish = Finish(model, fused=True)

    def __call__(self) -> None:
        self.finish(self.step(next(self.batches)).loss)


class Finish:
    """The end of both steps: backward, clip, AdamW."""

    def __init__(self, model: torch.nn.Module, fused: bool | None = None) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=fused)

    def __call__(self, loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


STEPS: dict[str, Callable[..., Any]] = {"diffusers' script": DiffusersStep, "ours": CachedStep}


def main(
    rounds: int = 30, batches: Sequence[int] = (4, 8), rank: int = 8, output_dir: str = "outputs/benchmarks"
) -> dict[str, Any]:
    """Time both steps `rounds` times at each batch; print a table, save it as JSON, return the figures."""
    torch.manual_seed(0)
    records = records_from_folder(ASSETS / "subject", prompt=PROMPT, progress=False)
    seconds, ratios = {}, {}
    for batch in batches:
        arms = {}
        for name, make in STEPS.items():
            dataset = DreamBoothDataset(records, [(64, 64)], batch_size=batch, seed=0, crop="random")
            arms[name] = make(load_pipeline(str(ASSETS / "sdxl-tiny"), dtype=torch.float32), dataset, batch, rank)
        with one_thread():
            times = times_in_turn(arms, rounds)
        seconds[str(batch)] = {name: summarize(values) for name, values in times.items()}
        ratios[str(batch)] = median_ratio(times["ours"], times["diffusers' script"])
        print(f"batch {batch}: ours / diffusers' script {ratios[str(batch)]:.3f}")
    figures = {"rank": rank, "rounds": rounds, "seconds_by_batch": seconds, "ratio_by_batch": ratios}
    print(f"saved to {save_record('benchmark_dreambooth_step', figures, output_dir)}")
    return figures


if __name__ == "__main__":
    run_command(main)
