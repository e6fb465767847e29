"""The classes of the installed Diffusers, read off its sources: nothing is imported, so that none is passed by."""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import dataclass
from pathlib import Path

import diffusers

ROOT = Path(diffusers.__file__).parent
_TIME = re.compile(r"t|r|timesteps?|timestep_\w+|\w+_timesteps?|\w+_time")
"""Names of arguments that tell a denoiser the noise."""


@dataclass(frozen=True)
class SourceClass:
    """A class: its base classes by name, the arguments of its forward, and the file that it is in."""

    bases: tuple[str, ...]
    forward: tuple[str, ...]
    path: Path


@functools.cache
def classes() -> dict[str, SourceClass]:
    """Name → class, of all models of Diffusers."""
    found: dict[str, SourceClass] = {}
    for folder in ("models", "pipelines", "modular_pipelines"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            for node in ast.parse(text).body if "ModelMixin" in text or "PeftAdapterMixin" in text else ():
                if isinstance(node, ast.ClassDef):
                    bases = (ast.unparse(base).split(".")[-1] for base in node.bases)
                    own = tuple(base for base in bases if base != node.name)
                    found[node.name] = SourceClass(own, _forward(node), path)
    return found


def _forward(node: ast.ClassDef) -> tuple[str, ...]:
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "forward":
            return tuple(argument.arg for argument in (*part.args.args, *part.args.kwonlyargs))
    return ()


def is_a(name: str, base: str) -> bool:
    """Whether the class `name` derives from the class `base`."""
    known = classes().get(name)
    return name == base or (known is not None and any(is_a(own, base) for own in known.bases))


def told_the_time(name: str) -> bool:
    """Whether the forward of the class, or the one that it inherits, has an argument of a timestep."""
    known = classes().get(name)
    if known is None:
        return False
    if known.forward:
        return any(_TIME.fullmatch(argument) for argument in known.forward)
    return any(told_the_time(base) for base in known.bases)
