"""One run: a base, a task, an arm, a seed → what it learned, measured.

The loss is that of training, nats a position of the canvas, and its mean over ten bins of λ. Half of it is that of a
first pass, half that of a second one, which sees the logits of the first (self-conditioning).
"""

from __future__ import annotations

import copy
import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from nara_diffusion.dllm import load_backbone
from nara_diffusion.dllm.canvas_loss import CanvasBatch, block_model, canvas_loss, corrupt_canvases, decoder_inputs
from nara_diffusion.dllm.exact_match import exact_match
from nara_diffusion.dllm.loss import token_cross_entropy
from nara_diffusion.dllm.models.forward_rows import conditioned
from nara_diffusion.noise.sources import CORRUPTED_SHARE
from nara_diffusion.training.adapters import build_adapter
from quality.blocks.bayes import Seen, bayes_losses
from quality.blocks.controls import Control, Controlled
from quality.blocks.tasks import SAMPLED, CanvasRows, Task, load_task
from quality.blocks.truth import true_levels
from quality.images.held_out import BINS
from quality.regimes.text.data import CHARACTERS
from quality.running import ASSETS, BASE, optimize
from quality.text.runs import text_arguments

LAYERS = r"layers\.\d+\.(self_attn|mlp)\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
DECODER, BOTH = rf".*\.decoder\.{LAYERS}", rf".*\.(encoder\.language_model|decoder)\.{LAYERS}"
HELD_OUT_SEED = 11  # of corruption
SAMPLING_STEPS = (4, 8, 16)
DIGITS = 6


@dataclass(frozen=True)
class Arm:
    """Attributes:
    adapter: of --adapter; "base" trains nothing.
    rank: of it.
    core_type: "identity" is LoRA with one A and B in both twins.
    on_encoder: whether the encoder is adapted too, and trained by its own loss.
    control: of `controls`, or None.
    self_conditioned: whether half of the steps have a second pass.
    """

    adapter: str = "nara"
    rank: int = 4
    core_type: str = "hypernetwork"
    on_encoder: bool = False
    control: str | None = None
    self_conditioned: bool = True

    @property
    def reads_level(self) -> bool:
        """Whether λ changes what it does."""
        return self.adapter != BASE and (self.core_type != "identity" or self.control in ("bias", "embedding", "token"))


@dataclass(frozen=True)
class Run:
    """Attributes:
    base: a folder, by its name in examples/assets or its path.
    task: of `tasks`.
    """

    base: str
    task: str
    arm: Arm
    seed: int
    rates: Mapping[str, float]
    steps: int
    batch_size: int


# ---------------------------------------------------------------------- bases and their prefixes


@cache
def base_of(name: str) -> tuple[Any, Any]:
    """Model and tokenizer of a base; never changed."""
    return load_backbone(str(ASSETS / name if (ASSETS / name).exists() else Path(name)))


@cache
def task_of(base: str, name: str) -> Task:
    model, tokenizer = base_of(base)
    return load_task(name, tokenizer, model.config.canvas_length)


class Prefixes:
    """Keys and values of a frozen encoder for all prompts of some rows, computed once."""

    def __init__(self, base: str, rows: CanvasRows) -> None:
        encoder, self.length = base_of(base)[0].model.encoder, int(rows.prompt_lengths.max())
        parts = []
        with torch.no_grad():
            for ids in rows.input_ids[:, : self.length].split(256):
                cache = encoder(input_ids=ids, cache=DynamicCache()).cache
                parts.append([(layer.keys, layer.values) for layer in cache.layers])
        self.layers = [tuple(map(torch.cat, zip(*layer, strict=True))) for layer in zip(*parts, strict=True)]

    def cache(self, chosen: Tensor) -> DynamicCache:
        """The cache of rows `chosen` (b,)."""
        of_prefix = DynamicCache()
        for index, (keys, values) in enumerate(self.layers):
            of_prefix.update(keys[chosen], values[chosen], index)
        return of_prefix


@cache
def prefixes_of(base: str, task: str, part: str) -> Prefixes:
    return Prefixes(base, getattr(task_of(base, task), part))


# ---------------------------------------------------------------------- one model


class Tuning:
    """A base, adapted by an arm, and its losses on a task."""

    def __init__(self, run: Run) -> None:
        self.run, self.arm, self.task = run, run.arm, task_of(run.base, run.task)
        settings = {"train_batch_size": run.batch_size, "max_train_steps": run.steps, **run.rates}
        method = run.arm.adapter
        if method != BASE:
            settings |= {"rank": run.arm.rank, "core_type": run.arm.core_type}
        self.args = text_arguments(method, run.seed, {"lr_scheduler": "cosine", "lr_warmup_steps": 0.05} | settings)
        model = copy.deepcopy(base_of(run.base)[0])
        torch.manual_seed(run.seed)
        if method == BASE:
            adapted = model.requires_grad_(False)
        else:
            targets = BOTH if run.arm.on_encoder else DECODER
            adapted = build_adapter(model, self.args, noise_convention=CORRUPTED_SHARE, target_modules=targets)
        control = None if run.arm.control is None else Control(run.arm.control, block_model(adapted))
        self.model = Controlled(adapted, control)

    def token_loss(self, part: str, chosen: Tensor, passes: int, **corruption: Any) -> tuple[Tensor, ...]:
        """Losses (b, c) of each pass, and the encoder's (b,), of rows `chosen` (b,)."""
        rows: CanvasRows = getattr(self.task, part)
        batch = corrupted(self.run.base, rows, chosen, **corruption)
        self.model.at(batch.noise_level)
        if self.arm.on_encoder:
            seen = torch.ones(len(chosen), dtype=torch.bool)
            of_passes = []
            for number in range(passes):
                last = number + 1 == passes
                of_pass = replace(batch, self_conditioned=seen if number else None)
                if last or not self.training:
                    of_passes.append(canvas_loss(self.model.model, of_pass, float(self.training)))
            return (*(one.token_loss for one in of_passes), of_passes[-1].encoder_loss)
        losses, logits = [], None
        prefixes = prefixes_of(self.run.base, self.run.task, part)
        inner = block_model(self.model.model)
        inputs = decoder_inputs(inner, replace(batch, input_ids=batch.input_ids[:, : prefixes.length]))
        del inputs["input_ids"]  # the cache has them
        with conditioned(self.model.model, batch.noise_level):
            for number in range(passes):
                needs_graph = self.training and number + 1 == passes
                with torch.set_grad_enabled(needs_graph):
                    extra = {} if logits is None else {"self_conditioning_logits": logits}
                    logits = self.model.model(**inputs, **extra, cache=prefixes.cache(chosen)).logits
                    losses.append(token_cross_entropy(logits, batch.targets))
        return (*losses, torch.zeros(len(chosen)))

    @property
    def training(self) -> bool:
        return torch.is_grad_enabled()

    def loss(self) -> Callable[[int], Tensor]:
        """The loss of step number n: its rows and their corruption follow from seed and number."""
        size, seed = self.run.batch_size, self.run.seed
        count = len(self.task.train)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))

        def loss(number: int) -> Tensor:
            indices = torch.arange(number * size, (number + 1) * size)
            coin = random.Random(f"{seed} {number}").random() < 0.5
            passes = 2 if coin and self.arm.self_conditioned else 1
            key = {"seed": seed, "sample_indices": indices.tolist()}
            *_, last, encoder = self.token_loss("train", order[indices % count], passes, **key)
            return last.mean() + encoder.mean()

        return loss

    @torch.no_grad()
    def figures(self, samples: bool = True) -> dict[str, Any]:
        """Losses by bin of λ of both passes, their mean, and exact match of generated `samples`."""
        first, second = [], []
        for chosen, key in held_out_bins(self.task.held_out):
            one, two, _ = self.token_loss("held_out", chosen, 2, **key)
            first.append(one.mean().item())
            second.append(two.mean().item())
        figures: dict[str, Any] = {"first": first, "second": second, "score": (fmean(first) + fmean(second)) / 2}
        return figures | {"exact": self.exact() if samples else {}}

    def exact(self) -> dict[str, float]:
        """The share of answers that are right but for the case of letters, by the sampler's steps."""
        self.model.at(None)
        scores: dict[str, float] = {}
        if self.task.sampled is None:
            return scores
        _, tokenizer = base_of(self.run.base)
        length = self.task.sampled.canvas
        for is_true, steps in itertools.product((False, True)[: 1 + self.arm.reads_level], SAMPLING_STEPS):
            generator = torch.Generator().manual_seed(HELD_OUT_SEED)
            options = {"gen_length": length, "steps": steps, "generator": generator, "extract": str.casefold}
            rows, model = self.task.sampled, self.model.model
            with true_levels(self.model, block_model(model), rows, tokenizer) if is_true else nullcontext():
                result = exact_match(model, tokenizer, rows.rows, batch_size=SAMPLED, progress=False, **options)
            scores[f"{steps}, true λ" if is_true else str(steps)] = result.score
        return scores


def held_out_bins(rows: CanvasRows) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """The held-out rows (n,) of each bin of λ, and their corruption, the same for all arms and seeds."""
    for index, chosen in enumerate(torch.arange(len(rows)).chunk(BINS)):
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(index))
        level = (index + (order + 0.5) / len(chosen)) / BINS  # (n,)
        yield chosen, {"seed": HELD_OUT_SEED, "sample_indices": chosen.tolist(), "noise_level": level}


def held_out_bayes(base: str, is_told: bool) -> float:
    """The mean loss of Bayes' rule on the held-out rows of `open`."""
    model, tokenizer = base_of(base)
    rows = task_of(base, "open").held_out
    ids = tokenizer(list(CHARACTERS), add_special_tokens=False)["input_ids"]
    characters, vocabulary = torch.tensor(ids)[:, 0], model.config.text_config.vocab_size
    losses = []
    for chosen, key in held_out_bins(rows):
        batch = corrupted(base, rows, chosen, **key)
        is_known, is_open = (torch.isin(tokens, characters) for tokens in (batch.canvas, batch.targets))
        same = batch.canvas == batch.targets
        seen = Seen(is_known, same, is_open, batch.noise_level, len(characters), vocabulary)
        losses.append(bayes_losses(seen, is_told).mean().item())
    return fmean(losses)


def corrupted(base: str, rows: CanvasRows, chosen: Tensor, **corruption: Any) -> CanvasBatch:
    """Rows `chosen` (b,) with their canvas corrupted."""
    prompt_lengths = rows.prompt_lengths[chosen]
    return corrupt_canvases(
        rows.input_ids[chosen],
        prompt_lengths,
        answer_lengths=torch.full_like(prompt_lengths, rows.canvas),
        canvas_length=rows.canvas,
        vocab_size=base_of(base)[0].config.text_config.vocab_size,
        self_conditioning=0.0,
        **corruption,
    )


def figures_of(run: Run, samples: bool = True) -> dict[str, Any]:
    """What the run learned; figures are None if training diverged."""
    wall = time.perf_counter()
    tuning = Tuning(run)
    trained = sum(p.numel() for p in tuning.model.parameters() if p.requires_grad)
    try:
        if trained:
            optimize(tuning.model, tuning.loss(), tuning.args)
        figures = tuning.figures(samples)
    except ArithmeticError:
        figures = {"first": None, "second": None, "score": None, "exact": {}}
    control = tuning.model.control
    if control is not None and control.numbers.shape[1] == 1:
        figures["bias"] = (10.0 * control.numbers.detach().flatten()).tolist()
    return {**figures, "trainable_parameters": trained, "seconds": round(time.perf_counter() - wall, 1)}
