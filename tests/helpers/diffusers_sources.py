"""The classes of the installed Diffusers, read off its sources: nothing is imported, so that none is passed by."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import diffusers

_TIME = re.compile(r"t|r|timesteps?|timestep_\w+|\w+_timesteps?|\w+_time")
"""Names of arguments that tell a denoiser the noise."""


@functools.cache
def classes() -> dict[str, tuple[list[str], list[str]]]:
    """Name → (base classes by name, arguments of its own forward), of all models of Diffusers."""
    by_name: dict[str, tuple[list[str], list[str]]] = {}
    for folder in ("models", "pipelines", "modular_pipelines"):
        for path in sorted((Path(diffusers.__file__).parent / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            for node in ast.parse(text).body if "ModelMixin" in text or "PeftAdapterMixin" in text else ():
                if isinstance(node, ast.ClassDef):
                    bases = [ast.unparse(base).split(".")[-1] for base in node.bases]
                    forwards = [
                        part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "forward"
                    ]
                    arguments = [one.arg for part in forwards for one in (*part.args.args, *part.args.kwonlyargs)]
                    by_name[node.name] = [base for base in bases if base != node.name], arguments
    return by_name


def lineage(name: str) -> list[str]:
    """A class and all that it derives from."""
    names = [name]
    for one in names:
        names += [base for base in classes().get(one, ([], []))[0] if base not in names]
    return names


def forward_of(name: str) -> list[str]:
    """The arguments of a class's forward, its own or the one that it inherits."""
    return next((classes()[one][1] for one in lineage(name) if one in classes() and classes()[one][1]), [])


def reads_the_time(name: str) -> bool:
    """Whether the forward of a class has an argument of a timestep."""
    return any(_TIME.fullmatch(argument) for argument in forward_of(name))
