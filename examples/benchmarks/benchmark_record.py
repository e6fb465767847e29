"""Where a benchmark ran: command, hardware, versions and commit, written beside its figures as JSON."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "peft", "transformers", "diffusers", "accelerate", "nara-diffusion")
ROOT = Path(__file__).parents[2]


def processor() -> str:
    """The processor's name: Linux keeps it in /proc/cpuinfo, `platform` knows it elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of this checkout, with "+" if tracked files were changed since; None outside a git checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=ROOT, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changes.returncode else "")


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def save_record(name: str, figures: dict[str, Any], output_dir: str | Path) -> Path:
    """Write `figures` with all that is needed to repeat them to `output_dir/name.json`; return the file."""
    record = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "hardware": {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": versions(),
        "commit": commit(),
        **figures,
    }
    file = Path(output_dir) / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return file
