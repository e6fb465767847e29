"""The reports of a run: a table, the loss over λ, the model card and results.json; their upload.

The model card, results.json and the uploaded config.yaml may be published, so paths on this machine
are cut to their last part. The run's own config.yaml keeps the full paths, to resume the run.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from torch import Tensor

from nara_diffusion.config import NaraConfig
from nara_diffusion.cores.registry import BUILT_IN, needs_noise
from nara_diffusion.noise.level import EVERYTHING, NoiseWindow
from nara_diffusion.utils.files import atomic_write
from nara_flags.training import TrainingArguments

from .adapters import adapter_config, module_name, title_of
from .arguments import method_of, schedule_of, window_of
from .run import Run
from .run_folder import CONFIG, LOCK, RESULTS, as_yaml

CURVE = "noise_level_curve.png"
_SIDES = ("before", "after")
_WHAT_IT_IS = {
    "nara": "A noise-aware low-rank adapter",
    "lora": "A low-rank adapter",
    "other": "An adapter",
    "prompt": "Learned virtual tokens",
    "full": "All weights, fine-tuned:",
}
_BESIDE_LORA = (
    "The table doesn't compare this adapter with LoRA or DoRA. In this project's own comparisons, models that read "
    "the noise level themselves, as most do, learned as much with LoRA or DoRA. To compare, train one of them on the "
    "same data (`--adapter lora` or `--adapter dora`)."
)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text, with the first column flush left and all others flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for label, *cells in (header, ["-" * width for width in widths], *rows):
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join(lines)


def write_card(
    run: Run,
    facts: Mapping[str, str],
    before: Any,
    after: Any,
    figures: Sequence[Sequence[str]],
    *,
    measured_on: str,
    unit: str,
    about: str,
    how_good: tuple[str, str],
    loading: str,
    tags: Sequence[str],
    warnings: Sequence[str] = (),
    library: str = "peft",
    **front_matter: Any,
) -> None:
    """Write noise_level_curve.png and the model card, README.md, into the run's folder.

    Args:
        facts: {label: text} about the run, such as the number of trainable parameters.
        before, after: measurements, with the loss `curve` over `noise_levels`.
        figures: rows of (label, before, after).
        measured_on: the data behind the curves, in words.
        unit: the unit of the curves.
        about: the end of the card's first sentence, with the purpose of the adapter and its
            training data.
        how_good: the texts before and after the rows of `figures`.
        loading: the code that loads the adapter.
        warnings: limitations of the figures, printed before them.
        tags, library, front_matter: fields of the front matter that the Hub reads. A field with the
            value None is omitted.
    """
    args = run.args
    method, title = method_of(args), title_of(args)
    name = Path(args.pretrained_model_name_or_path).name
    plot_noise_level_curves(
        run.folder / CURVE,
        after.noise_levels,
        before.curve,
        after.curve,
        f"{name}: loss over the noise level, {measured_on}",
        unit,
        window_of(args),
    )
    tags = ["nara" if method.family == "nara" else args.adapter.replace("_", "-"), *tags]
    if not Path(args.pretrained_model_name_or_path).exists():  # a Hub id, not a path on this disk
        front_matter |= {
            "base_model": args.pretrained_model_name_or_path,
            "base_model_relation": "finetune" if method.family == "full" else "adapter",
        }
    front = ModelCardData(library_name=library, tags=tags, **front_matter).to_yaml().strip()
    rows = "\n".join(f"| {' | '.join(row)} |" for row in figures)
    table = f"| | before | after |\n|---|---|---|\n{rows}"
    training = "\n".join(f"- {label}: {_one_line(text)}" for label, text in facts.items())
    settings = as_yaml(public_values(vars(args), args)).strip()
    longest = max(map(len, re.findall("`{2,}", settings)), default=2)  # a prompt may contain ```
    fence = "`" * (1 + longest)
    parts = [
        f"---\n{front}\n---",
        f"# {name} with {title}",
        f"{_WHAT_IT_IS[method.family]} ({title}, {method.source}) {_one_line(about)}",
        "## How good it is",
        how_good[0],
        " ".join(warnings),
        table,
        f"{how_good[1]} The loss at each noise level:",
        f"![loss over the noise level]({CURVE})",
        _BESIDE_LORA if reads_noise(args) else "",
        "## How to load it",
        loading,
        "## How it was trained",
        training,
        f"All arguments:\n\n{fence}yaml\n{settings}\n{fence}",
    ]
    unchanged = loading if run.hub_id is None else None  # local code must run
    texts = [p if p is unchanged else without_folders(p, args) for p in parts if p]
    write_text(run.folder / "README.md", "\n\n".join(map(str.strip, texts)) + "\n")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def reads_noise(args: TrainingArguments) -> bool:
    """Return True if the adapter that `args` describe depends on λ."""
    config = adapter_config(args, strength=schedule_of(args))
    return isinstance(config, NaraConfig) and needs_noise(config)


def needs_schedule(args: TrainingArguments) -> bool:
    """Return True if the adapter is a LoRA trained in a window, which its file can't store."""
    return method_of(args).family == "lora" and schedule_of(args) is not None


def core_import(args: TrainingArguments) -> str:
    """Return the line of code in the model card that registers a custom core; else ""."""
    if method_of(args).family != "nara" or args.core_type in BUILT_IN:
        return ""
    if args.core_module is None:
        return f"# first import the module that registers core_type {args.core_type!r}\n"
    return f"import {module_name(args.core_module)}  # registers core_type {args.core_type!r}\n"


_ADVICE = {
    "validation_loss": "The validation loss didn't fall: by it the model was as good or better before. Try a lower "
    "--learning_rate, fewer steps, or more and more varied data.",
    "exact_match": "Exact match didn't rise; samples.jsonl has what was generated. A small file needs more "
    "--num_train_epochs or a higher --learning_rate. Long answers are seldom equal word for word: --extract compares a "
    "part.",
    "similarity": "The samples came no nearer to the subject: try more --max_train_steps or a higher --learning_rate.",
}


def advice(results: Mapping[str, Any]) -> list[str]:
    """Return advice about losses and shares that training didn't improve."""
    lines = []
    for name, line in _ADVICE.items():
        start, end = results.get(f"{name}_before"), results.get(f"{name}_after")
        if start is not None and end is not None:
            improved = end < start if name == "validation_loss" else end > min(start, 0.99)
            lines += [] if improved else [line]
    return lines


def finish(
    run: Run,
    before: Any,
    after: Any,
    *,
    names: Sequence[str],
    figures: Sequence[Sequence[str]],
    facts: Mapping[str, str],
    schedule_line: str,
    warnings: Sequence[str] = (),
    describe: Callable[[], Mapping[str, Any]],
    **further: object,
) -> dict[str, Any]:
    """Write the model card and results.json, upload them if asked to, and return the results.

    The table of figures is also printed.

    Args:
        before, after: the two measurements.
        names: the attributes of the measurements that results.json contains.
        figures: rows of the table, (label, before, after).
        facts: see `write_card`.
        schedule_line: the code that sets the adapter's strength over λ, printed if the adapter's
            file can't store the strength.
        warnings: limitations of the figures, which are printed and stored in both files.
        describe: a function that returns the other arguments of `write_card`; only the main process
            calls it.
        **further: further results.
    """
    if run.args.init_adapter is not None:
        further["starts_from"] = run.args.init_adapter
    seconds = round(time.perf_counter() - run.started, 1)
    results = {
        "seconds": seconds,
        "adapter": run.args.adapter,
        **public_values(further, run.args),
        "noise_levels": after.noise_levels,
    }
    for side, measured in zip(_SIDES, (before, after), strict=True):
        results |= {f"{name}_{side}": getattr(measured, name) for name in names}
    results |= {"warnings": list(warnings)} if warnings else {}
    if run.is_main:
        since = "" if run.checkpoint is None else " since it was resumed"
        facts = {**facts, "time": f"{seconds:.0f} s{since}, evaluation included"}
        write_card(run, facts, before, after, figures, warnings=warnings, **describe())
        write_json(run.folder / RESULTS, results)
        upload(run)
        lines = [
            f"\n{format_table(['', *_SIDES], figures)}\n",
            f"{seconds:.0f} s; everything is in {run.folder}",
        ]
        lines += [] if run.hub_id is None else [f"pushed to https://huggingface.co/{run.hub_id}"]
        lines += [*warnings, *advice(results)]
        if needs_schedule(run.args):
            lines.append(
                "This adapter was trained in a window of noise levels, which its file can't store. Whenever you load "
                f"it, switch it off outside: {schedule_line}"
            )
        sys.stdout.write("\n".join(lines) + "\n")
    return results


def without_folders(text: str, args: TrainingArguments) -> str:
    """Return `text` for publication, with the arguments' absolute paths cut to their last part."""
    places = [value for value in map(str, vars(args).values()) if value.startswith(("/", "~"))]
    for place in sorted(places, key=len, reverse=True):
        path = Path(place)
        for form in (place, str(path), os.path.expanduser(path)):
            text = text.replace(form, path.name or place)
    return text


def public_values(values: Mapping[str, Any], args: TrainingArguments) -> dict[str, Any]:
    """Return `values` for publication, after applying `without_folders` to all texts."""
    return {
        name: without_folders(value, args) if isinstance(value, str) else value
        for name, value in values.items()
    }


def upload(run: Run) -> None:
    """Upload the run's folder, without checkpoints and trajectories, to `--hub_model_id` if set."""
    if run.hub_id is None:
        return
    HfApi().upload_folder(
        repo_id=run.hub_id,
        folder_path=str(run.folder),
        commit_message="End of training",
        ignore_patterns=["checkpoint-*/**", "trajectories/**", ".partial-*", LOCK, CONFIG],
    )
    content = as_yaml(public_values(vars(run.args), run.args)).encode()
    HfApi().upload_file(repo_id=run.hub_id, path_in_repo=CONFIG, path_or_fileobj=content)


def validation_means(losses: Tensor, noise_levels: Tensor, window: NoiseWindow) -> dict[str, float]:
    """Return {"validation_loss": mean} of losses (b,) at λ (b,).

    With a window, also return "validation_loss_inside" and "validation_loss_outside", the means
    inside and outside the window.
    """
    parts = {"validation_loss": losses}
    if not window.is_everything:
        inside = window.contains(noise_levels)
        parts |= {
            "validation_loss_inside": losses[inside],
            "validation_loss_outside": losses[~inside],
        }
    return {name: part.double().mean().item() for name, part in parts.items() if len(part)}


def plot_noise_level_curves(
    path: Path,
    noise_levels: Sequence[float],
    base: Sequence[float],
    adapted: Sequence[float],
    title: str,
    unit: str,
    window: NoiseWindow = EVERYTHING,
) -> None:
    """Plot the losses over λ into a PNG file, as in Figure 1 of the paper.

    The left plot shows both losses. The right plot shows the adapter's gain, base − adapted.

    Args:
        noise_levels: λ of each point, in [0, 1].
        base, adapted: the loss of each model at each point, in `unit`.
        window: the trained window, which is shaded.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(noise_levels, base, marker="o", color="tab:gray", label="base model")
    left.plot(noise_levels, adapted, marker="o", color="tab:blue", label="with the adapter")
    left.set(
        xlabel="noise level λ (1 = pure noise)",
        ylabel=f"loss ({unit})",
        xlim=(0, 1.02),
        yscale="log",
    )
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(LogFormatter())
    right.axhline(0, color="tab:gray", linewidth=1)
    gains = [loss - adapted_loss for loss, adapted_loss in zip(base, adapted, strict=True)]
    right.plot(noise_levels, gains, marker="o", color="tab:green")
    right.set(xlabel="noise level λ (1 = pure noise)", ylabel=f"gain ({unit})", xlim=(0, 1.02))
    right.set_title("base model − adapted model", fontsize="medium")
    for axes in () if window.is_everything else (left, right):
        axes.axvspan(window.low, window.high, color="tab:blue", alpha=0.1, label="trained")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    figure.suptitle(title)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=120)
