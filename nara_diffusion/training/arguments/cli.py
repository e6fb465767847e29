"""A dataclass of arguments is read from the command line, from a YAML file, or from both.

Each field is declared with `option(default, help, unit=…)`. The type annotation decides how text is read: bool
becomes `--flag/--no-flag` and takes `--flag True` too, a list takes words separated by spaces or commas (or quoted
texts, if it is one of `sentences`), `X | None` also takes `none`. Flags win over the file given as `--config`, the file
wins over the defaults, and a key that the dataclass lacks is an error. Flags of other scripts that users may bring
along are named in two class attributes: `foreign_flags`, {name: what to do instead}, and `other_names`, {name: what it
is called here}. `removed_arguments`, a third one, names the keys that files of earlier versions may hold; `positional`
says for the usage what words a program takes before its flags. A dataclass may have a method `check_flags`, which is
called with the flags of the command line alone, and may refuse them by a ValueError.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from nara_diffusion.training.arguments.values import convert, default_of, parts_of

Arguments = TypeVar("Arguments")

_TRUTHS = {"true": "--", "false": "--no-"}


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    choices: Sequence[str] = (),
    resumable: bool = False,
    content: str = "",
    sentences: bool = False,
    aliases: Sequence[str] = (),
) -> Any:
    """Declare one argument.

    Args:
        default: its value when neither the file nor a flag sets it; a list is copied for each instance.
        help: one sentence for `--help`.
        unit: what a number counts, for `--help`.
        choices: the words that are allowed.
        resumable: True if a resumed run may have another value than the run that it continues.
        content: what the value is the name of, as `Run` keeps a digest of it, such as "training data": a resumed run
            may give another name for the same content.
        sentences: for a list: each word of the command line, quoted there, is one element with its spaces and commas.
        aliases: other names of the flag, without dashes.
    """
    metadata = {"help": help, "unit": unit, "choices": tuple(choices), "resumable": resumable}
    metadata |= {"content": content, "sentences": sentences, "aliases": tuple(aliases)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_arguments(
    cls: type[Arguments],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    stand_in: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda given: {},
) -> Arguments:
    """The command line, and the file that `--config` names, as an instance of `cls`; exits with usage on an error.

    Args:
        cls: the dataclass of arguments.
        argv: the command line; None takes the program's own.
        description: what `--help` shows first.
        stand_in: from the arguments that were given, by flag or file, to values for some that weren't.
    """
    parser = build_parser(cls, description)
    known, unknown = parser.parse_known_args(_without_truths(cls, sys.argv[1:] if argv is None else argv))
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_flag_hints(cls, unknown)}")
    flags = vars(known)
    try:
        file = flags.pop("config", None)
        given = {**(read_config(cls, file) if file else {}), **flags}
        args = cls(**{**stand_in(given), **given})
        getattr(args, "check_flags", lambda flags: None)(flags)
        return args
    except ValueError as error:
        parser.error(str(error))


def build_parser(cls: type, description: str | None = None) -> argparse.ArgumentParser:
    """The parser of `cls`: a group of flags for each class that has some, titled by the start of its docstring."""
    parser = argparse.ArgumentParser(
        usage=f"%(prog)s {getattr(cls, 'positional', '')}[--config FILE.yaml] [--FLAG VALUE …]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="Arguments as YAML; flags on the command line win over it. A file that names a core_module makes that "
        "module's code run: take none from people whose code you wouldn't run.",
    )
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    groups: dict[str, Any] = {}
    for owner in cls.__mro__:
        own = [name for name in inspect.get_annotations(owner) if name in fields]
        title = (owner.__doc__ or owner.__name__).strip().splitlines()[0]
        if own and title not in groups:
            groups[title] = parser.add_argument_group(title)
        for name in own:
            _add_flag(groups[title], fields.pop(name), hints[name])  # a class may declare an inherited one anew
    for name, remedy in _foreign_flags(cls).items():
        parser.add_argument(f"--{name}", action=_refusal(remedy), nargs="?", help=argparse.SUPPRESS)
    return parser


def _without_truths(cls: type, argv: Sequence[str]) -> list[str]:
    """Replace `--flag True` and `--flag=False` by `--flag` and `--no-flag`, which argparse knows."""
    hints = typing.get_type_hints(cls)
    switches = {f"--{name}" for name, field in _flag_names(cls).items() if parts_of(hints[field])[0] is bool}
    words: list[str] = []
    for word in argv:
        flag, _, value = word.partition("=")
        if flag in switches and value.lower() in _TRUTHS:
            words.append(_TRUTHS[value.lower()] + flag[2:])
        elif words and words[-1] in switches and word.lower() in _TRUTHS:
            words[-1] = _TRUTHS[word.lower()] + words[-1][2:]
        else:
            words.append(word)
    return words


def _flag_names(cls: type) -> dict[str, str]:
    """{flag: field}, without dashes, aliases included."""
    fields = dataclasses.fields(cls)
    return {name: field.name for field in fields for name in (field.name, *field.metadata["aliases"])}


def _flag_hints(cls: type, unknown: Sequence[str]) -> str:
    names = [word[2:].partition("=")[0] for word in unknown if word.startswith("--")]
    near = [found for found in (_meant(cls, name.replace("-", "_")) for name in names) if found]
    return f". Did you mean {', '.join(f'--{name}' for name in near)}?" if near else ". --help lists the known ones."


def _meant(cls: type, name: str) -> str | None:
    """The argument that another trainer calls `name`, with the value that it implies, or one of a similar name."""
    known = _flag_names(cls)
    other = getattr(cls, "other_names", {}).get(name)
    if other is not None and other.split()[0] in known:
        return other
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def _foreign_flags(cls: type) -> Mapping[str, str]:
    return getattr(cls, "foreign_flags", {})


def _refusal(remedy: str) -> type[argparse.Action]:
    class Refuse(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            raise argparse.ArgumentError(self, f"isn't taken here: {remedy}")

    return Refuse


def read_config(cls: type, path: str | Path) -> dict[str, Any]:
    """Values of the YAML file at `path`, converted to the types of `cls`.

    Raises:
        ValueError: the file is missing, is no mapping, holds an unknown key, or a value of another type.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path} can't be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} must hold `key: value` lines, got {type(content).__name__}.")
    content = _without_removed(cls, content, path)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in content:
        if key in _foreign_flags(cls):
            raise ValueError(f"--config {path}: {key} isn't taken here: {_foreign_flags(cls)[key]}")
        if key not in fields:
            near = _meant(cls, str(key))
            hint = f" Did you mean {near!r}?" if near else " --help lists the known ones."
            raise ValueError(f"--config {path} holds the unknown key {key!r}.{hint}")
    try:
        return {key: convert(key, value, hints[key], **_reading(fields[key])) for key, value in content.items()}
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from error


def _without_removed(cls: type, content: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """`content` without the `removed_arguments` of `cls`, {name: the value that stands for what is always done now}.

    Raises:
        ValueError: one of them has another value. (None among the values allows any.)
    """
    removed = getattr(cls, "removed_arguments", {})
    for key, neutral in removed.items():
        if content.get(key, neutral) != neutral is not None:
            raise ValueError(
                f"--config {path}: {key} is {content[key]!r}, an option that this version no longer has: remove the "
                "key, or train with the version that wrote it."
            )
    return {key: value for key, value in content.items() if key not in removed}


def _add_flag(group: Any, field: dataclasses.Field, hint: Any) -> None:
    kind, _, is_list = parts_of(hint)
    help = _help(field)
    names = [f"--{name}" for name in (field.name, *field.metadata["aliases"])]
    if kind is bool:
        group.add_argument(*names, action=argparse.BooleanOptionalAction, help=help)
        return
    metavar = {int: "N", float: "X", str: "TEXT"}[kind]
    if field.metadata["choices"]:
        metavar = "{" + ",".join(field.metadata["choices"]) + "}"
    group.add_argument(
        *names,
        action=_convert_action(hint, **_reading(field)),
        nargs="+" if is_list else None,
        metavar=metavar,
        help=help,
    )


def _help(field: dataclasses.Field) -> str:
    default = default_of(field)
    if isinstance(default, list):
        default = ",".join(map(str, default))
    shown = str(default).lower() if default is None or isinstance(default, bool) else str(default)
    unit = f" [{field.metadata['unit']}]" if field.metadata["unit"] else ""
    return f"{field.metadata['help']}{unit} (default: {shown or 'none'})".replace("%", "%%")


def _reading(field: dataclasses.Field) -> dict[str, Any]:
    """The arguments of `convert` that say how the values of this argument are read."""
    return {name: field.metadata[name] for name in ("choices", "sentences")}


def _convert_action(hint: Any, choices: Sequence[str], sentences: bool) -> Callable[..., argparse.Action]:
    class Convert(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            if isinstance(values, list):
                values = " ".join(values) if not sentences or len(values) == 1 else values
            try:
                setattr(namespace, self.dest, convert(self.dest, values, hint, choices, sentences))
            except ValueError as error:
                raise argparse.ArgumentError(self, str(error)) from None

    return Convert
