"""Comparison of two adapters of one base model: fields of the configuration, adapted modules, and ΔW over λ.

    nara diff my-toy my-toy-longer
    nara diff outputs/dllm-1 outputs/dllm-1/checkpoint-200 --points 11

ΔW is compared as ‖ΔW − ΔW'‖ / max(‖ΔW‖, ‖ΔW'‖) at each λ: 0 if the updates are the same, whatever A, B and C are; 1 if
one of them is zero; 2 if they are opposite. It measures updates, not images or answers. Magnitudes of NaRA-DoRA and
biases are not part of it; modules in which they differ are named. Like diff, it exits with 0 if nothing differs, 1 if
something does, 2 on an error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nara_diffusion.loaders.format import AdapterPart
from nara_diffusion.training.output.model_card import format_table
from nara_diffusion.tuner.config_files import config_to_fields

from .adapter_file import AdapterFile, modules_of, read
from .updates import Update, norm_of_difference, updates_of

ROUNDING = 1e-6  # a relative distance that float32 makes
SHOWN = 5
"""The number of modules that are shown, those that differ most."""


def field_differences(one: AdapterPart, other: AdapterPart) -> list[tuple[str, Any, Any]]:
    """(field, its value in `one`, its value in `other`) of the configuration's fields that differ."""
    fields, others = config_to_fields(one.config), config_to_fields(other.config)
    names = sorted(fields.keys() | others.keys())
    return [(name, fields.get(name), others.get(name)) for name in names if fields.get(name) != others.get(name)]


def module_differences(one: AdapterPart, other: AdapterPart, levels: Tensor) -> dict[str, Tensor]:
    """{module that both adapt: ‖ΔW − ΔW'‖², ‖ΔW‖² and ‖ΔW'‖² at λ (n,): (3, n)}.

    Raises:
        ValueError: a module's ΔW has different shapes; see `updates_of`.
    """
    updates, others = updates_of(one, levels), updates_of(other, levels)
    return {name: _squares(name, updates[name], others[name]) for name in updates if name in others}


def _squares(name: str, one: Update, other: Update) -> Tensor:
    if one.shape != other.shape:
        raise ValueError(
            f"ΔW of '{name}' is {one.shape} in one adapter and {other.shape} in the other: compare adapters of one "
            "base model."
        )
    return torch.stack([norm_of_difference(one, other), one.norm(), other.norm()]) ** 2


def relative(squares: Tensor) -> Tensor:
    """‖ΔW − ΔW'‖ / max(‖ΔW‖, ‖ΔW'‖) (n,) of the squares (3, n); 0 where both norms are 0."""
    largest = squares[1:].amax(0)
    return (squares[0] / largest.where(largest > 0, 1.0)).sqrt()


def report(one: AdapterFile, other: AdapterFile, points: int) -> Iterator[str]:
    """The lines of `nara diff` at `points` λ; none if the adapters are the same."""
    for name in sorted(one.parts.keys() ^ other.parts.keys()):
        yield f"{name}: only in {(one if name in one.parts else other).path}"
    levels = torch.linspace(0, 1, points, dtype=torch.float32)
    for name in sorted(one.parts.keys() & other.parts.keys()):
        lines = list(_component(one.parts[name], other.parts[name], levels))
        yield from ([f"{name}:", *(f"  {line}" for line in lines)] if lines else [])


def _component(one: AdapterPart, other: AdapterPart, levels: Tensor) -> Iterator[str]:
    yield from (f"{field}: {value!r} → {new!r}" for field, value, new in field_differences(one, other))
    mine, theirs = modules_of(one).keys(), modules_of(other).keys()
    yield from _named("modules only in the first", mine - theirs)
    yield from _named("modules only in the second", theirs - mine)
    yield from _named("magnitudes or biases differ in", _other_differences(one, other))
    squares = module_differences(one, other, levels)
    if all(relative(found).max() <= ROUNDING for found in squares.values()):
        return
    yield f"ΔW of the {len(squares)} modules of both, ‖ΔW − ΔW'‖ / max(‖ΔW‖, ‖ΔW'‖) over λ:"
    yield from _table(squares, levels).splitlines()


def _other_differences(one: AdapterPart, other: AdapterPart) -> set[str]:
    """The modules whose magnitudes or biases of B differ, which are not part of ΔW."""
    names = [key for key in one.tensors if key.endswith((".lora_magnitude_vector", ".lora_B.bias"))]
    return {
        name.partition(".lora_")[0]
        for name in names
        if name in other.tensors and not torch.equal(one.tensors[name], other.tensors[name])
    }


def _named(title: str, names: Any) -> Iterator[str]:
    if names:
        shown = sorted(names)[:SHOWN]
        yield f"{title}: {', '.join(shown)}{'' if len(names) <= SHOWN else f' and {len(names) - SHOWN} more'}"


def _table(squares: Mapping[str, Tensor], levels: Tensor) -> str:
    """The table: a row for all modules, and one for each of those that differ most."""
    most = sorted(squares, key=lambda name: -relative(squares[name]).mean().item())[:SHOWN]
    rows = [("all", torch.stack(list(squares.values())).sum(0)), *((name, squares[name]) for name in most)]
    header = ["λ", *(f"{level:.2f}" for level in levels.tolist())]
    return format_table(header, [[name, *(f"{value:.3g}" for value in relative(own).tolist())] for name, own in rows])


def main(argv: Sequence[str] | None = None) -> None:
    """The command `nara diff`."""
    parser = argparse.ArgumentParser(
        "nara diff", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", metavar="FILE", help="an adapter: a file, or a folder")
    parser.add_argument("other", metavar="OTHER", help="another adapter of the same base model")
    parser.add_argument(
        "--points", type=int, default=5, help="number of λ, evenly from 0 to 1, at least 2 (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        if args.points < 2:
            raise ValueError(f"--points is {args.points}, expected at least 2.")
        lines = list(report(read(args.file), read(args.other), args.points))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    sys.stdout.write("".join(f"{line}\n" for line in lines or ["the adapters are the same"]))
    sys.exit(1 if lines else 0)
