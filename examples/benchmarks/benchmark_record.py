"""What the benchmarks share: timing in turns, records with command, hardware, versions and commit, the command line."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from quality.results import now

PACKAGES = ("torch", "peft", "transformers", "diffusers", "accelerate", "nara-diffusion")
ROOT = Path(__file__).parents[2]


def processor() -> str:
    """The processor's name: Linux keeps it in /proc/cpuinfo, `platform` knows it elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of this checkout, with "+" if tracked files but records were changed since; None outside of git."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        diff = ["git", "diff", "--quiet", "HEAD", "--", ".", ":!*.jsonl"]
        changes = subprocess.run(diff, cwd=ROOT, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changes.returncode else "")


def main_commit() -> str | None:
    """The commit of main that this checkout stands on; None without a main."""
    for branch in ("main", "origin/main"):
        base = subprocess.run(["git", "merge-base", "HEAD", branch], cwd=ROOT, capture_output=True, text=True)
        if base.returncode == 0:
            return base.stdout.strip()
    return None


def versions() -> dict[str, str | None]:
    by_package: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            by_package[package] = version(package)
        except PackageNotFoundError:
            by_package[package] = None
    return by_package


@cache
def provenance() -> dict[str, Any]:
    """What is needed to repeat a run: command, hardware, versions, and the commit when this is called first."""
    hardware = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    command = shlex.join([Path(sys.executable).name, *map(without_folder, sys.argv)])
    return {"command": command, "hardware": hardware, "versions": versions(), "commit": commit()}


def without_folder(word: str) -> str:
    """A word of a command line, with an absolute path in it relative to the project, or reduced to its name."""
    flag, equals, value = word.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return word
    inside = path.is_relative_to(ROOT)
    return flag + equals + (path.relative_to(ROOT).as_posix() if inside else path.name)


def made_in(stage: str) -> dict[str, Any]:
    """`provenance` and the date; of a confirming run also the commit of main, which each clone has.

    Call this when the run starts, so that the date and the plan's commit can be compared.

    Raises:
        ValueError: a confirming run has code that no commit holds, or there is no main.
    """
    record = {**provenance(), "date": now()}
    if stage != "confirm":
        return record
    if record["commit"] is None or record["commit"].endswith("+"):
        raise ValueError(f"{ROOT} has changes that aren't committed: commit them before a confirming run.")
    main = main_commit()
    if main is None:
        raise ValueError("there is no branch main that this commit stands on: fetch it before a confirming run.")
    return {**record, "main": main}


def save_record(name: str, figures: dict[str, Any], output_dir: str | Path) -> Path:
    """Write `figures` with all that is needed to repeat them to `output_dir/name.json`; return the file."""
    record = {**provenance(), "date": now(), **figures}
    file = Path(output_dir) / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return file


def times_in_turn(
    arms: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each arm in each round, in a random order within a round, so that whatever else the machine does meets
    all of them. A round before the first one allocates and fills caches, unless `warm_up` is False."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    shuffler = random.Random(0)
    for number in range(0 if warm_up else 1, rounds + 1):
        for name in shuffler.sample(sorted(arms), k=len(arms)):
            start = clock()
            arms[name]()
            if number:
                times[name].append(clock() - start)
    return times


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(our / their for our, their in zip(ours, theirs, strict=True))


def summarize(times: list[float]) -> dict[str, float]:
    """Median and quartiles, in seconds."""
    low, median, high = statistics.quantiles(times, n=4)
    return {"median": median, "quartile_low": low, "quartile_high": high}


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def for_terminal(main: Callable[[], int]) -> int | str:
    """What `sys.exit` takes of `main`, an error as one line."""
    try:
        return main()
    except ValueError as error:
        return f"error: {error}"
    except KeyboardInterrupt:
        return "stopped; give the same command again to go on"


def run_command(main: Callable[..., Any]) -> None:
    """Call `main` with the flags of its numbers and texts, whose help is their default."""
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name, parameter in inspect.signature(main).parameters.items():
        if isinstance(parameter.default, int | float | str):
            parser.add_argument(f"--{name}", type=type(parameter.default), default=parameter.default, help=" ")
    main(**vars(parser.parse_args()))
