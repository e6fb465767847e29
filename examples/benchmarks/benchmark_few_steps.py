"""Does a core that reads λ pay in four steps, each with its own job? Distils a small model by arms of few_steps.yaml.

    python examples/benchmarks/benchmark_few_steps.py --stage dev --output few.jsonl       # rates, development seed
    python examples/benchmarks/benchmark_few_steps.py --stage confirm --output few.jsonl   # the best ones, fresh seeds
    python examples/benchmarks/benchmark_few_steps.py --stage samplers --output few.jsonl  # the base untrained
    python examples/benchmarks/benchmark_few_steps.py --stage costs --output few.jsonl     # time and memory of a step
    python examples/benchmarks/benchmark_few_steps.py --report --output few.jsonl

A run is one of `dreambooth_sdxl.py --distill_to 4` (with `--base sd-tiny-flow`, of `dreambooth.py`), without its card.
All arms of a seed meet the same trajectories of the teacher in the same order. `score` is the teacher-forced error, as
a share of the base's, mean over the steps; `end` the distance of the sampled end from the teacher's; similarity is that
of the samples to the teacher's, alignment that with the prompt. Each run becomes a line of --output: stop whenever you
like, and give the same command again; several processes may share the file. A run takes about 40 s of one core.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any
from unittest.mock import patch

import diffusers
import torch
import yaml
from benchmark_record import ROOT, for_terminal, made_in, median_ratio, one_thread, times_in_turn
from PIL import Image
from quality import results
from quality.report.data import change, interval, table
from quality.step_table import StepTable
from torch import Tensor

from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser, adapter_loaded, write_adapter, write_checkpoint
from nara_diffusion.dreambooth.distill import student_task
from nara_diffusion.dreambooth.families import Family
from nara_diffusion.dreambooth.few_steps import sample_latents
from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments
from nara_diffusion.dreambooth.samples import write_grid
from nara_diffusion.training import loop
from nara_diffusion.training.checkpoints import save_adapter
from nara_diffusion.training.planned_step import StepCounter, tensors_of
from nara_diffusion.training.run import Run, start_run

PLAN = yaml.safe_load((Path(__file__).parent / "few_steps.yaml").read_text(encoding="utf-8"))
CONFIGS = ROOT / "train_scripts" / "configs"
MEASURES = ("score", "end", "similarity", "alignment")
NO_FLAGS = ("grid", "rates_of", "targets", "all_weights", "step_table")
COMPARED = ("score", "similarity")
COLUMNS = ("arm", "parameters", *MEASURES)
CORES = ("DoRA", "Knots-DoRA", "Knots-DoRA without λ")
TEACHER = "teacher"
WIDTHS = ("narrow", "wide")
MARKS = {"b_learning_rate": "lora_B", "magnitude_learning_rate": "lora_magnitude_vector"}
"""{a rate that no flag has: the parameters that it holds for}."""
Kind = Callable[..., "Trial"]


# ---------------------------------------------------------------- rates


def trials(arm: Mapping[str, Any]) -> list[dict[str, float]]:
    """The combinations of an arm's grid of rates."""
    grid = PLAN["grids"][arm["grid"]]
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def best_rates(title: str, base: str, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The rates with the lowest mean score on the development seeds, of the arm itself or of the one that it names.

    The scores are those of `base`. Of scores that agree in four digits, the first of the grid wins.

    Raises:
        ValueError: a trial is missing.
    """
    title = PLAN["arms"][title].get("rates_of", title)
    scores = defaultdict(list)
    for record in records:
        if (record["stage"], record["base"], record["arm"]) == ("dev", base, title):
            scores[tuple(record["rates"].items())].append(record["score"])
    candidates = [tuple(rates.items()) for rates in trials(PLAN["arms"][title])]
    missing = [rates for rates in candidates if len(scores[rates]) < len(PLAN["stages"]["dev"])]
    if missing:
        raise ValueError(f"{title} lacks trials at {dict(missing[0])}: run --stage dev first.")
    return dict(min(candidates, key=lambda rates: round(fmean(scores[rates]), 4)))


@contextmanager
def own_rates(rates: Mapping[str, float]) -> Iterator[None]:
    """Inside, optimizers have a group for the parameters of each rate in `MARKS`."""
    build = loop.build_optimizer

    def built(model: torch.nn.Module, args: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer = build(model, args, **options)
        named = dict(model.named_parameters())
        for name, rate in rates.items():
            chosen = [parameter for key, parameter in named.items() if MARKS[name] in key and parameter.requires_grad]
            numbers = {id(parameter) for parameter in chosen}
            for group in optimizer.param_groups:
                group["params"] = [weight for weight in group["params"] if id(weight) not in numbers]
            optimizer.add_param_group({"name": name, "params": chosen, "lr": rate})
        return optimizer

    with patch.object(loop, "build_optimizer", built):
        yield


# ---------------------------------------------------------------- runs


class Trial:
    """A run that measures its student only."""

    def __init__(self, args: DreamBoothArguments, run: Run) -> None:
        self.args, self.run = args, run
        self.task = student_task(args, run)
        self.evaluation = self.task.evaluation
        self.losses: tuple[Any, Any] = (self.task.loss, self.evaluation.loss)  # in training, and held out
        self.samples: Sequence[Image.Image] = ()
        self.trainable = 0

    def model(self) -> torch.nn.Module:
        """The model to train."""
        return AdaptedDenoiser(self.task.pipe, self.task.config, family=self.task.family)

    def train(self) -> None:
        """Train from the start to the last step, and write the adapter."""
        save_adapter(self.run.accelerator, self.fit(), self.run.folder, write_adapter)

    def fit(self) -> torch.nn.Module:
        """Train from the start to the last step, and return the model."""
        loss, run = self.losses[0], self.run
        run.plan(self.task.count)
        evaluation, model = self.evaluation, self.model()
        self.trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        parts = loop.prepare_training(run, model, self.task.samples, list)
        run.open({})
        loop.train(run, parts, replace(loss, model=parts.model), partial(evaluation.validate, parts.model))
        return parts.model

    def report(self) -> dict[str, Any]:
        """The student's figures."""
        return self.figures(self.run.folder)

    def figures(self, folder: Path | None) -> dict[str, Any]:
        """The figures with the adapter in `folder`, or of the pipeline as it is."""
        measurement = self.evaluation.measure(folder, "after")
        with adapter_loaded(self.evaluation.pipe, folder):
            end = self.end(self.evaluation.settings.call)
        self.samples = measurement.images
        figures = {"score": measurement.validation_loss, "by_step": measurement.curve, "end": end}
        return figures | {"similarity": measurement.similarity, "alignment": measurement.text_alignment}

    def end(self, call: Mapping[str, Any]) -> float:
        """The mean squared distance of the pipeline's final latents from the teacher's held-out ones."""
        held_out, pipe = self.losses[1], self.evaluation.pipe
        paths = sample_latents(pipe, held_out.prompts, held_out.trajectories[:, 0], call)
        return (paths[:, -1] - held_out.trajectories[:, -1]).square().mean().item()

    def untrained(self, pictures: Path | None) -> Iterator[dict[str, Any]]:
        """The base's figures with each sampler, number of calls and guidance."""
        evaluation = self.evaluation
        pipe: Any = evaluation.pipe
        sampler = pipe.scheduler
        keep(pictures, TEACHER, evaluation.references)
        for name, (calls, choices) in itertools.product(PLAN["samplers"], PLAN["calls"].items()):
            kind = getattr(diffusers, PLAN["samplers"][name])
            for steps, guidance in choices:
                options = {"timestep_spacing": "trailing"} | ({"clip_sample": False} if name == "DDIM" else {})
                pipe.scheduler = kind.from_config(sampler.config, **options)
                how = {"num_inference_steps": steps, "guidance_scale": guidance}
                settings = replace(evaluation.settings, call=evaluation.settings.call | how)
                measurement = replace(evaluation, settings=settings).measure(None, "base")
                guided = ", guidance" if guidance > 1 else ""
                keep(pictures, f"{name}, {steps} steps{guided}", measurement.images)
                figures = {"end": self.end(settings.call)}
                figures |= {"similarity": measurement.similarity, "alignment": measurement.text_alignment}
                yield {"arm": name, "calls": calls, "guidance": guidance, **figures}
        pipe.scheduler = sampler


class AllWeights(Trial):
    """A run that trains the denoiser itself, without an adapter."""

    def model(self) -> torch.nn.Module:
        """The base's denoiser."""
        return Whole(self.losses[0].model.requires_grad_(True), self.task.family)

    def train(self) -> None:
        """Train from the start to the last step."""
        self.fit()

    def report(self) -> dict[str, Any]:
        """The student's figures; its weights are those of the pipeline, which shares them."""
        return self.figures(None)


class WithTable(Trial):
    """A run that also trains a bias for each step on `layers`."""

    def __init__(self, layers: Sequence[str], rate: float, *of_trial: Any) -> None:
        super().__init__(*of_trial)
        loss, _ = self.losses
        self.rate = rate
        self.table = StepTable(loss.model, layers, loss.timesteps)
        self.table.join(loss.model)
        self.table.join(getattr(self.evaluation.pipe, self.task.family.denoiser))

    def train(self) -> None:
        with self.table.trained(self.rate):
            super().train()
        self.trainable += sum(bias.numel() for bias in self.table.biases)


class Whole(torch.nn.Module):
    """A denoiser as `StudentLoss` calls it."""

    def __init__(self, denoiser: torch.nn.Module, family: Family) -> None:
        super().__init__()
        self.denoiser, self.family = denoiser, family

    def forward(self, *inputs: Any, **embeddings: Any) -> Tensor:
        return self.family.predict(self.denoiser, *inputs, **embeddings)


@contextmanager
def started(base: str, seed: int, arm: Mapping[str, Any], steps: int, kind: Kind) -> Iterator[Trial]:
    """A run of `arm`, flags of the train script, in a folder that goes with the context."""
    settings = yaml.safe_load((CONFIGS / PLAN["bases"][base]).read_text(encoding="utf-8"))
    for name, value in settings.items():
        if str(value).startswith("examples/"):
            settings[name] = str(ROOT / value)
    trajectories_dir = Path(tempfile.gettempdir()) / "nara-few-steps"  # trajectories serve all arms of a seed
    settings |= {**PLAN["shared"], **arm, "seed": seed, "max_train_steps": steps}
    settings |= {"validation_steps": None, "checkpointing_steps": None}
    settings["trajectories_dir"] = str(trajectories_dir)
    with tempfile.TemporaryDirectory() as folder:
        settings["output_dir"] = f"{folder}/out"
        args = DreamBoothArguments(**settings)
        with start_run(args, "dreambooth", write_checkpoint) as run:
            yield kind(args, run)


def flags(title: str, width: str) -> dict[str, Any]:
    """An arm's flags of the train script, without its rates."""
    arm = {name: value for name, value in PLAN["arms"][title].items() if name not in NO_FLAGS}
    arm["rank"] = arm["rank"][WIDTHS.index(width)]
    if "targets" in PLAN["arms"][title]:
        arm["target_modules"] = PLAN["targets"][PLAN["arms"][title]["targets"]]
    return arm


def run(
    base: str, title: str, width: str, seed: int, rates: Mapping[str, float], steps: int, pictures: Path | None = None
) -> dict[str, Any]:
    """Distil by one arm, and return its figures. The time has that of the teacher, if the run made its samples."""
    flag_rates = {name: rate for name, rate in rates.items() if name not in MARKS}
    marked_rates = {name: rate for name, rate in rates.items() if name in MARKS}
    arm = PLAN["arms"][title]
    kind: Kind = AllWeights if "all_weights" in arm else Trial
    if "step_table" in arm:
        kind = partial(WithTable, arm["step_table"]["layers"], arm["step_table"]["learning_rate"])
    with started(base, seed, flags(title, width) | flag_rates, steps, kind) as trial, own_rates(marked_rates):
        start = time.process_time()
        trial.train()
        seconds = time.process_time() - start
        figures = trial.report()
        keep(pictures, title, trial.samples)
        return {**figures, "trainable_parameters": trial.trainable, "processor_seconds": round(seconds, 1)}


# ---------------------------------------------------------------- costs


def measure_costs(base: str, titles: Sequence[str], width: str, rounds: int = 40) -> list[dict[str, Any]]:
    """Seconds of processor time of an optimizer step of each arm, taking turns, and the bytes that it needs.

    A ratio is the median of the rounds' ratios to the first arm. Memory is that of all tensors alive at once in a step,
    but for the model's own and the optimizer's.
    """
    steps: dict[str, Callable[[], None]] = {}
    tensors: dict[str, list[Tensor]] = {}
    with ExitStack() as runs:
        for title in titles:
            trial = runs.enter_context(started(base, PLAN["stages"]["dev"][0], flags(title, width), 1, Trial))
            steps[title], tensors[title] = step_of(trial)
        with one_thread():
            times = times_in_turn(steps, rounds, time.process_time)
        peaks = {}
        for title, step in steps.items():
            counter = StepCounter(tensors[title])
            with counter:
                step()
            peaks[title] = counter.peak
    first = times[titles[0]]
    return [
        {"arm": title, "step_seconds": median(times[title]), "ratio": median_ratio(times[title], first), "peak": peak}
        for title, peak in peaks.items()
    ]


def step_of(trial: Trial) -> tuple[Callable[[], None], list[Tensor]]:
    """An optimizer step of a run's model, on its first batch; the tensors of the model and the optimizer."""
    loss, _ = trial.losses
    model = trial.model().train()
    batch = [trial.task.samples[position] for position in range(trial.args.train_batch_size)]
    optimizer, loss = loop.build_optimizer(model, trial.args), replace(loss, model=model)

    def step() -> None:
        loss(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's tensors
    states = [value for state in optimizer.state.values() for value in state.values()]
    return step, [*tensors_of(model), *states]


# ---------------------------------------------------------------- pictures


def keep(folder: Path | None, title: str, images: Sequence[Image.Image]) -> None:
    """Write a column of the grid into `folder`, unless it is None."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            image.save(folder / f"{title}-{number}.png")


def draw(folder: Path) -> None:
    """Write `folder`.png, with the columns in `folder` in the order of their making, the teacher first."""
    first = sorted(folder.glob("*-0.png"), key=lambda file: file.stat().st_mtime)
    titles = sorted((file.stem.removesuffix("-0") for file in first), key=lambda title: title != TEACHER)
    settings = yaml.safe_load((CONFIGS / "sdxl_tiny_4_steps.yaml").read_text(encoding="utf-8"))
    columns = {}
    for title in titles:
        count = len(list(folder.glob(f"{title}-*.png")))
        numbers = range(0, count, count // len(settings["validation_prompts"]))  # the first one of each prompt
        columns[title] = [Image.open(folder / f"{title}-{number}.png").convert("RGB") for number in numbers]
    write_grid(folder.with_suffix(".png"), settings["validation_prompts"], columns)


def sample_untrained(base: str, seeds: Sequence[int], output: Path, pictures: Path | None) -> None:
    """Add the base's figures with Diffusers' samplers to `output`, unless it has them."""
    for seed in seeds:
        key = {"stage": "samplers", "base": base, "seed": seed}
        if not any(key.items() <= record.items() for record in results.read(output)):
            with started(base, seed, {}, 1, Trial) as trial:
                measurements = list(trial.untrained(pictures))
            results.append(output, [{**made_in("samplers"), **key, **figures} for figures in measurements])


def main(argv: list[str] | None = None) -> int:
    """Does what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(*PLAN["stages"], "samplers", "costs"), default="dev")
    parser.add_argument("--base", choices=tuple(PLAN["bases"]), default="sdxl-tiny")
    parser.add_argument("--arms", nargs="+", choices=tuple(PLAN["arms"]), default=tuple(PLAN["arms"]))
    parser.add_argument("--width", choices=WIDTHS, default="narrow", help="which of an arm's ranks")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the stage")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--output", type=Path, default=Path("outputs/few_steps.jsonl"))
    parser.add_argument(
        "--pictures", type=Path, help="keep the samples in this folder; with --report, draw them as a grid"
    )
    parser.add_argument("--report", action="store_true", help="print what the records say, and end")
    args = parser.parse_args(argv)
    if args.report:
        records = results.read(args.output)
        parts = [base_report, report, cells_table, seconds_table, costs_report]
        print(*(part(records) for part in parts), sep="\n\n")
        if args.pictures:
            draw(args.pictures)
        return 0
    if args.stage == "samplers":
        sample_untrained(args.base, args.seeds or PLAN["stages"]["confirm"], args.output, args.pictures)
        return 0
    if args.stage == "costs":
        key = {"stage": "costs", "base": args.base, "width": args.width}
        for figures in measure_costs(args.base, args.arms, args.width):
            results.append(args.output, [{**made_in(args.stage), **key, **figures}])
        return 0
    made_in(args.stage)  # refuses changes before anything runs
    arms = [title for title in args.arms if args.stage == "confirm" or "grid" in PLAN["arms"][title]]
    for seed, title in itertools.product(args.seeds or PLAN["stages"][args.stage], arms):
        cell = {"stage": args.stage, "base": args.base, "width": args.width, "steps": args.steps}
        development = results.read(args.output)
        for rates in (
            trials(PLAN["arms"][title]) if args.stage == "dev" else [best_rates(title, args.base, development)]
        ):
            key = {**cell, "arm": title, "seed": seed, "rates": rates}
            if not any(key.items() <= record.items() for record in results.read(args.output)):
                record = made_in(args.stage)
                figures = run(args.base, title, args.width, seed, rates, args.steps, args.pictures)
                results.append(args.output, [{**record, **key, **figures}])
    return 0


# ---------------------------------------------------------------- the report


def report(records: list[dict[str, Any]]) -> str:
    """Two tables a cell: means over the seeds that its arms share, and paired differences.

    Arms with fewer than three seeds and bases of earlier versions are left out.
    """
    parts = []
    cells: dict[tuple, dict[str, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if record["stage"] == "confirm" and record["base"] in PLAN["bases"]:
            cell = (record["base"], record["width"], record["steps"])
            cells[cell][record["arm"]][record["seed"]] = record
    for (base, width, steps), of_cell in cells.items():
        arms = {title: by_seed for title, by_seed in of_cell.items() if len(by_seed) > 2}
        if not arms:
            continue
        seeds = sorted(set.intersection(*(set(by_seed) for by_seed in arms.values())))
        rows = [row_of(title, [by_seed[seed] for seed in seeds]) for title, by_seed in arms.items()]
        pairs = [pair for pair in PLAN["pairs"] if {*pair} <= arms.keys()]
        differences = [[*pair, *differences_of(arms, pair, seeds)] for pair in pairs]
        parts += [f"{base}, {width}, {steps} steps, {len(seeds)} seeds", table(COLUMNS, rows)]
        parts += [table(["arm", "−", *COMPARED], differences)] if differences else []
    return "\n\n".join(parts)


def base_report(records: Sequence[Mapping[str, Any]]) -> str:
    """The untrained base's table: means over all seeds."""
    by_setting = defaultdict(list)
    for record in records:
        if record["stage"] == "samplers":
            by_setting[record["base"], record["arm"], record["calls"], record["guidance"]].append(record)
    rows = []
    for key, measured in by_setting.items():
        rows.append([*map(str, key), str(len(measured)), *(mean_of(measured, name) for name in MEASURES[1:])])
    return table(["base", "sampler", "calls", "guidance", "seeds", *MEASURES[1:]], rows)


def cells_table(records: Sequence[Mapping[str, Any]]) -> str:
    """A row a cell: the score of DoRA, Knots-DoRA and the latter without λ, over the seeds that these have.

    A cell is a base, the layers that are adapted, ranks and steps. An arm that has fewer than two seeds is left out.
    """
    rows = []
    for base, layers, width, steps in itertools.product(PLAN["bases"], PLAN["layers"], WIDTHS, (200, 600)):
        suffix = PLAN["layers"][layers]
        titles = [f"{name}, {suffix}" for name in CORES]
        runs = [runs_of(records, base, title, width, steps) for title in titles]
        by_title = {title: by_seed for title, by_seed in zip(titles, runs, strict=True) if len(by_seed) > 1}
        if {*titles[:2]} <= by_title.keys():
            seeds = sorted(set.intersection(*map(set, by_title.values())))
            scores = [mean_of([by_title[t][s] for s in seeds], "score") if t in by_title else "–" for t in titles]
            changes = [
                differences_of(by_title, [titles[1], t], seeds)[0] if t in by_title else "–" for t in titles[::2]
            ]
            ranks = "/".join(str(PLAN["arms"][title]["rank"][WIDTHS.index(width)]) for title in titles[:2])
            rows.append([f"{base}, {layers}", ranks, str(steps), str(len(seeds)), *scores, *changes])
    header = ["base, layers", "ranks", "steps", "seeds", *CORES, "Knots-DoRA − DoRA", "− without λ"]
    return table(header, rows)


def seconds_table(records: Sequence[Mapping[str, Any]]) -> str:
    """A row of `seconds` in few_steps.yaml: a simpler arm that took as long, and an arm's difference to it."""
    rows = []
    for base, simple, more, arm, steps, *other in PLAN["seconds"]:
        width = other[0] if other else "narrow"
        by_title = {title: runs_of(records, base, title, width, n) for title, n in ((simple, more), (arm, steps))}
        seeds = sorted(set.intersection(*map(set, by_title.values())))
        if len(seeds) > 1:
            score = mean_of([by_title[simple][seed] for seed in seeds], "score")
            row = [f"{base}, {simple}, {more} steps", score, f"{arm}, {steps} steps"]
            rows.append([*row, differences_of(by_title, [arm, simple], seeds)[0], str(len(seeds))])
    return table(["simpler", "score", "arm", "arm − simpler", "seeds"], rows)


def runs_of(
    records: Sequence[Mapping[str, Any]], base: str, title: str, width: str, steps: int
) -> dict[int, Mapping[str, Any]]:
    """{fresh seed: the record of an arm}."""
    fields = {"stage": "confirm", "base": base, "arm": title, "width": width, "steps": steps}.items()
    return {record["seed"]: record for record in records if fields <= record.items()}


def costs_report(records: Sequence[Mapping[str, Any]]) -> str:
    """The table of time and memory."""
    rows = []
    for record in records:
        if record["stage"] == "costs":
            figures = (f"{1000 * record['step_seconds']:.0f}", f"{record['ratio']:.2f}", f"{record['peak'] / 1e6:.1f}")
            rows.append([record["base"], record["width"], record["arm"], *figures])
    return table(["base", "width", "arm", "ms a step", "ratio", "MB"], rows)


def row_of(title: str, own: Sequence[Mapping[str, Any]]) -> list[str]:
    """An arm's row."""
    rank = PLAN["arms"][title]["rank"][WIDTHS.index(own[0]["width"])]
    means = [mean_of(own, name) for name in MEASURES]
    return [f"{title}, r {rank}", f"{own[0]['trainable_parameters']:,}", *means]


def mean_of(records: Sequence[Mapping[str, Any]], name: str) -> str:
    """A figure's mean."""
    return f"{fmean(record[name] for record in records):.4f}"


def differences_of(
    arms: Mapping[str, Mapping[int, Mapping[str, Any]]], pair: Sequence[str], seeds: Sequence[int]
) -> list[str]:
    """The paired differences of two arms' figures, with half of their 95 % intervals."""
    one, other = (arms[title] for title in pair)
    return [change(interval([one[seed][name] - other[seed][name] for seed in seeds]), 4) for name in COMPARED]


if __name__ == "__main__":
    sys.exit(for_terminal(main))
