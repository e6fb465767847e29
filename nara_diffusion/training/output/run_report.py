"""The end of a run in both scripts: the model card, results.json, the upload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from nara_diffusion.cores.registry import BUILT_IN, needs_noise
from nara_diffusion.training.adapters.configs import adapter_config
from nara_diffusion.training.adapters.custom_core import module_name
from nara_diffusion.training.adapters.methods import METHODS, Method, effective, kind_of, method_of, title_of
from nara_diffusion.training.arguments.window import schedule_of, window_of
from nara_diffusion.training.run import Run
from nara_diffusion.utils.hub_metadata import ADAPTER, FINETUNE

from .hub import push_to_hub
from .model_card import write_model_card
from .output_dir import write_json

_WHAT_IT_IS = {
    "nara": "A noise-aware low-rank adapter",
    "lora": "A low-rank adapter",
    "other": "An adapter",
    "prompt": "Learned virtual tokens",
    "full": "All weights, fine-tuned:",
}

_BESIDE_LORA = (
    "The table says nothing of LoRA or DoRA. Models that read the noise level themselves, as most do, learnt as much "
    "by those in this method's own comparisons: train one on the same data (`--adapter lora`, `--adapter dora`) before "
    "you call this adapter better than either."
)


def write_run_card(
    folder: Path,
    args: Any,
    facts: Mapping[str, str],
    *,
    name: str,
    about: str,
    figures: Sequence[Sequence[str]],
    how_good: tuple[str, str],
    loading: str,
    tags: Sequence[str],
    **front_matter: Any,
) -> None:
    """Write README.md into `folder`.

    Args:
        args: the run's arguments.
        facts: {what: value} of the run, such as the number of trainable parameters.
        name: what people call the base model.
        about: the end of the card's first sentence: the purpose of the adapter, and its training data.
        figures: rows of (what, before, after).
        how_good: the texts before and after these rows.
        loading: the code that loads the adapter.
        tags, front_matter: for the Hub.
    """
    kind, title = kind_of(args), title_of(args)
    method: Method = METHODS[kind]
    rows = "\n".join(f"| {' | '.join(row)} |" for row in figures)
    table = f"| | before | after |\n|---|---|---|\n{rows}"
    training = "\n".join(f"- {what}: {value}" for what, value in facts.items())
    beside = _BESIDE_LORA if reads_noise(args) else ""
    settings = yaml.safe_dump(asdict(args), sort_keys=False, allow_unicode=True).strip()
    write_model_card(
        folder,
        title=f"{name} with {title}",
        summary=f"{_WHAT_IT_IS[method.family]} ({title}, {method.source}) {about}",
        base_model=args.pretrained_model_name_or_path,
        relation=FINETUNE if method.family == "full" else ADAPTER,
        tags=["nara" if kind.startswith("nara") else kind.replace("_", "-"), *tags],
        sections={
            "How good it is": "\n\n".join(part for part in (how_good[0], table, how_good[1], beside) if part),
            "How to load it": loading,
            "How it was trained": f"{training}\n\nAll arguments:\n\n```yaml\n{settings}\n```",
        },
        **front_matter,
    )


def reads_noise(args: Any) -> bool:
    """Whether the adapter that `args` describe depends on λ."""
    config: Any = adapter_config(args, strength=schedule_of(args)) if method_of(args).family == "nara" else None
    return config is not None and needs_noise(config)


def needs_schedule(args: Any) -> bool:
    """Whether the adapter is a LoRA that was trained in a window, which its file can't hold."""
    return method_of(args).family == "lora" and schedule_of(args) is not None


def window_facts(args: Any) -> dict[str, str]:
    """What a run says of its window of noise levels; nothing without one."""
    window, method = window_of(args), method_of(args)
    if window.is_everything:
        return {}
    until = "≤ λ ≤ 1" if window.high == 1 else f"≤ λ < {window.high:g}"
    if window.hold_weight is not None:
        outside = "the base is held outside, the adapter is on everywhere"
    elif args.open_window:
        outside = "the adapter is left on outside, where it was not trained"
    elif method.family == "nara":
        outside = "the adapter is off outside, by the strength in its file"
    elif method.family == "lora":
        outside = "its file can't hold that: give it its schedule as below"
    else:
        outside = f"outside, {method.title} stays on, where it was not trained: it takes no StrengthSchedule"
    if schedule_of(args) is not None and effective(args, "use_dora"):
        outside += " (but for DoRA's magnitudes, which hold at every λ)"
    return {"noise levels": f"{window.low:g} {until}; {outside}"}


def told_schedule(line: str) -> str:
    """The end of a LoRA's run in a window; `line` is the code that gives it its schedule."""
    return (
        "This adapter was trained in a window of noise levels, which its file can't hold. Whenever it is loaded, "
        f"switch it off outside: {line}"
    )


def core_import(args: Any) -> str:
    """The line of a model card's code that registers a custom core; nothing for other adapters."""
    if method_of(args).family != "nara" or effective(args, "core_type") in BUILT_IN:
        return ""
    if args.core_module is None:
        return f"# first import the module that registers core_type {args.core_type!r}\n"
    return f"import {module_name(args.core_module)}  # registers core_type {args.core_type!r}\n"


def publish(run: Run, results: Mapping[str, Any], table: str, note: str = "") -> str:
    """Write results.json, upload the folder if asked to, and return the text to show, `table` and `note` in it."""
    write_json(run.folder / "results.json", dict(results))
    lines = [f"\n{table}\n", f"{results['seconds']:.0f} s; everything is in {run.folder}"]
    if run.hub_id is not None:
        push_to_hub(run.hub_id, run.folder)
        lines.append(f"pushed to https://huggingface.co/{run.hub_id}")
    if note:
        lines.append(note)
    return "\n".join(lines)
