"""`--core_module`: import of the user's module that registers a custom core, before `--core_type` is looked up."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path

from nara_diffusion.cores.registry import registered_cores


def import_core_module(name: str) -> None:
    """Import the module `name`, or, where it ends in .py, the file of that path.

    The folder of a file joins `sys.path` as its last entry, so that it finds the modules beside it.

    Raises:
        ValueError: there is no such module or file, it fails, or it registers no core.
    """
    path = Path(name) if name.endswith(".py") else None
    module = name if path is None else module_name(name)
    if path is not None:
        _make_importable(path)
    imported, before = module in sys.modules, registered_cores()
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever the user's code raises
        raise ValueError(
            f"core_module is {name!r}, which can't be imported: {_what(error)}{_remedy(name, error)}"
        ) from error
    file = getattr(found, "__file__", None)
    if path is not None and (file is None or Path(file).resolve() != path.resolve()):
        raise ValueError(
            f"core_module is {name!r}, but Python takes the name {module} for another module, {file}: rename the file."
        )
    after = registered_cores()
    # what was imported before has registered its cores then
    if not after or not (imported or any(before.get(core) is not factory for core, factory in after.items())):
        raise ValueError(
            f"core_module is {name!r}, which registers no core: call nara_diffusion.register_core(NAME, factory) in it."
        )


def module_name(name: str) -> str:
    """The name under which Python imports the module that `--core_module` names."""
    return Path(name).stem if name.endswith(".py") else name


def _make_importable(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"core_module is {str(path)!r}, which is no file.")
    if not path.stem.isidentifier():
        raise ValueError(
            f"core_module is {str(path)!r}, whose name Python can't import: letters, digits and _ alone make one."
        )
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)


def _what(error: Exception) -> str:
    """The error, and the last line of the user's code that led to it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    own = [frame for frame in frames if frame.filename not in (__file__, importlib.__file__)]
    where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{where}."


def _remedy(name: str, error: Exception) -> str:
    if not isinstance(error, ModuleNotFoundError) or name.endswith(".py"):
        return ""
    file = Path(*name.split(".")).with_suffix(".py")
    return (
        f" Give the file, {file}." if file.is_file() else " Give a module that Python finds, or the path of a .py file."
    )
