"""Arguments of a script: a dataclass is read from flags, from a YAML file, or from both.

Each field is declared with `option(default, help, …)`. Flags win over the file given as `--config`, the file wins over
the defaults, and both are checked alike:

    bool               --flag, --no_flag, --flag true
    list[str]          words separated by spaces or commas; quoted texts, if it is one of `sentences`
    dict[str, Any]     NAME=VALUE …, values as JSON or else as YAML; several flags and the file add up
    X | None           takes `none` too

A field that is declared `within` a dict has no flag: it is set by a NAME=VALUE of that dict (`spread_options`).
`--help` shows the common options, `--help_all` all of them. Hyphens in a flag count as underscores.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers.hf_argparser import string_to_bool

Arguments = TypeVar("Arguments")

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
}
_METAVARS: dict[Any, str] = {
    int: "N",
    float: "X",
    list: "TEXT",
    dict: "NAME=VALUE",
    bool: "true|false",
}

# ---------------------------------------------------------------- names that people try

USUAL = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "steps": "max_train_steps",
    "prompt": "instance_prompt",
}
"""{name in other programs: ours}."""
_CORE = (
    "core_scale use_rslora num_virtual_tokens core_hidden_dims core_init core_sharing lora_a_init "
)
_CORE += "rank_mask_min core_bins core_knots noise_embedding noise_embedding_dim fourier_scale"
_GONE = "lr_num_cycles lr_power scale_lr allow_tf32 dataloader_num_workers logging_dir hold_base_outside ema_decay "
_GONE += "hold_base_share timestep_bias_strategy timestep_bias_multiplier timestep_bias_portion timestep_bias_begin "
_GONE += "timestep_bias_end shuffle_caption keep_tokens repeats caption_source cache_memory upcast_vae loss_type "
_GONE += "prior_generation_precision do_edm_style_training huber_c clip_skip adam_weight_decay_text_encoder "
_GONE += "open_window cache_folder use_ema cache_latents core_input mask_density_radius"
_PRODIGY = ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")
RENAMED: dict[str, str] = {
    **{name: f"give --adapter_options {name}=VALUE." for name in _CORE.split()},
    **{f"prodigy_{name}": f"give --optimizer_options {name}=VALUE." for name in _PRODIGY},
    **dict.fromkeys(_GONE.split(), "has gone; the table in CHANGELOG.md says what to do now."),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), "give --optimizer_options betas=[0.9,0.999]."),
    "use_dora": "give --adapter nara_dora or dora, or --adapter_options use_dora=true.",
    "adam_epsilon": "give --optimizer_options eps=1e-8.",
    "adam_weight_decay": "give --weight_decay.",
    "use_8bit_adam": "give --optimizer AdamW8bit.",
    "push_to_hub": "give --hub_model_id alone, the repository to upload to.",
    "with_prior_preservation": "give --class_data_dir and --class_prompt alone.",
    "cache_dir": "has gone; set the environment variable HF_HOME.",
    "prediction_type": "leave it out: a model is trained as what it predicts (docs/conversion.md).",
    "validation_epochs": "give --validation_steps.",
    "validation_prompt": "give --validation_prompts.",
}
"""{flag of version 0.1: what to do now}; it serves one release. Those `within` another the parser knows by itself."""


# ---------------------------------------------------------------- declarations


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    choices: Sequence[str] = (),
    rare: bool = False,
    within: str = "",
    sentences: bool = False,
) -> Any:
    """Declare one argument.

    Args:
        default: its value when neither the file nor a flag sets it; a list or dict is copied for each instance.
        help: one sentence for `--help`.
        unit: what a number counts, for `--help`.
        choices: the words that are allowed.
        rare: True if `--help_all` alone shows it.
        within: the dict argument whose NAME=VALUE sets it, in place of a flag.
        sentences: for a list: each word of the command line, quoted there, is one element with its spaces and commas.
    """
    metadata = {
        "help": help,
        "unit": unit,
        "choices": choices,
        "rare": rare,
        "within": within,
        "sentences": sentences,
    }
    if isinstance(default, (list, dict)):
        return dataclasses.field(
            default_factory=lambda: copy(default), metadata=metadata, init=not within
        )
    return dataclasses.field(default=default, metadata=metadata, init=not within)


def given_arguments(args: Any) -> dict[str, Any]:
    """{name: value} by which `args`, a dataclass of options, can be made again."""
    return {
        field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.init
    }


def gathered(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those of fields that are declared `within` a dict put into that dict."""
    found: dict[str, Any] = dict(values)
    for field in dataclasses.fields(cls):
        if (container := field.metadata["within"]) and field.name in found:
            found[container] = found.get(container, {}) | {field.name: found.pop(field.name)}
    return found


def spread_options(args: Any) -> None:
    """Set the fields that are declared `within` a dict from that dict. Arguments call it first in `__post_init__`.
    Raises ValueError for another name in a dict, or a value of another type."""
    hints = typing.get_type_hints(type(args))
    fields = {field.name: field for field in dataclasses.fields(args) if field.metadata["within"]}
    for container in {field.metadata["within"]: 0 for field in fields.values()}:
        known = {
            name: field for name, field in fields.items() if field.metadata["within"] == container
        }
        for name, value in getattr(args, container).items():
            if name not in known:
                raise ValueError(f"{container} has no {name!r}: {hint(name, known)}")
            setattr(
                args,
                name,
                _converted(f"{container}: {name}", value, hints[name], known[name].metadata),
            )


def hint(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown `name`: what may be meant, or what there is."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}."


# ---------------------------------------------------------------- reading


def parse_arguments(
    cls: type[Arguments],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda given: {},
) -> Arguments:
    """The command line, and the file that `--config` names, as an instance of `cls`; exits with usage on an error.

    Args:
        cls: the dataclass of arguments.
        argv: the command line; None takes the program's own.
        description: what `--help` shows first.
        defaults: from the arguments that were given, by flag or file, to values in place of the dataclass's defaults.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(cls, description, show_all="--help_all" in words)
    try:
        given = parser.given(words)
        return cls(**merged(gathered(cls, defaults(given)), given))
    except ValueError as error:
        parser.error(str(error))


class ArgumentParser(argparse.ArgumentParser):
    """The parser of `cls`, a dataclass of `option` fields: a group of flags for each class that has some, titled by the
    start of its docstring."""

    def __init__(self, cls: type, description: str | None = None, show_all: bool = False) -> None:
        usage = "%(prog)s [--config FILE.yaml] [--FLAG VALUE …]"
        raw: Any = argparse.RawDescriptionHelpFormatter
        super().__init__(
            usage=usage, description=description, formatter_class=raw, allow_abbrev=False
        )
        self._hints = typing.get_type_hints(cls)
        self._fields = {field.name: field for field in dataclasses.fields(cls)}
        self._add_options(cls, show_all)
        about = "Arguments as YAML, over which flags win. A core_module in it is code that runs: use files you trust."
        self.add_argument("--config", metavar="FILE.yaml", default=argparse.SUPPRESS, help=about)
        self.add_argument(
            "--help_all",
            action="help",
            help="Show all options and exit; --help shows the common ones.",
        )

    def given(self, words: Sequence[str]) -> dict[str, Any]:
        """{argument: value} of the command line `words`, over those of the file that it names. Raises ValueError for an
        unknown flag or key, or a value of another type."""
        underscored = lambda flag: f"--{flag[1].replace('-', '_')}"  # noqa: E731
        found, unknown = self.parse_known_args(
            [re.sub(r"^--([\w-]+)", underscored, word) for word in words]
        )
        if unknown:
            flags = [
                self._advice(word[2:].partition("=")[0])
                for word in unknown
                if word.startswith("--")
            ]
            raise ValueError("; ".join(flags) or f"unrecognized arguments: {' '.join(unknown)}")
        flags = vars(found)
        file = flags.pop("config", None)
        low = {} if file is None else self._converted(f"--config {file}: ", self._read(file))
        return merged(low, self._converted("argument --", flags))

    def _read(self, path: str) -> dict[str, Any]:
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(
                f"--config {path} can't be read as YAML: {' '.join(str(error).split())}"
            ) from error
        if not isinstance(content, dict):
            raise ValueError(
                f"--config {path} must hold `key: value` lines, got {type(content).__name__}"
            )
        for key in content:
            if key not in self._fields or not self._fields[key].init:
                raise ValueError(f"--config {path}: {self._advice(str(key))}")
        return content

    def _converted(self, origin: str, values: Mapping[str, Any]) -> dict[str, Any]:
        fields, hints = self._fields, self._hints
        return {
            n: _converted(origin + n, value, hints[n], fields[n].metadata)
            for n, value in values.items()
        }

    def _advice(self, name: str) -> str:
        """What to do about an unknown flag or key."""
        old = name.removeprefix("no_")
        if old in self._fields and (container := self._fields[old].metadata["within"]):
            return f"--{old}: give --{container} {old}=VALUE."
        if old in RENAMED:
            return f"--{old}: {RENAMED[old]}"
        flags = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        near = (
            [USUAL[name]]
            if USUAL.get(name) in flags
            else difflib.get_close_matches(name, flags, n=1)
        )
        return f"unrecognized --{name}: {f'did you mean --{near[0]}?' if near else '--help_all lists the known ones.'}"

    def _add_options(self, cls: type, show_all: bool) -> None:
        groups: dict[str, Any] = {}
        left = {name: field for name, field in self._fields.items() if field.init}
        for owner in cls.__mro__:
            title = (owner.__doc__ or "").strip().partition("\n")[0]
            for name in [name for name in inspect.get_annotations(owner) if name in left]:
                group = (
                    groups[title]
                    if title in groups
                    else groups.setdefault(title, self.add_argument_group(title))
                )
                self._add_option(
                    group, left.pop(name), show_all
                )  # a class may declare an inherited one anew

    def _add_option(self, group: Any, field: dataclasses.Field, show_all: bool) -> None:
        kind, choices = _kind_of(self._hints[field.name])[0], field.metadata["choices"]
        within = [each for each in self._fields.values() if each.metadata["within"] == field.name]
        texts = [_help_of(field), *(f"{each.name}: {_help_of(each)}" for each in within)]
        shown = show_all or not field.metadata["rare"]
        # without a default, so that only what was given is returned
        settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        settings["help"] = "\n".join(texts) if shown else argparse.SUPPRESS
        settings["metavar"] = (
            "{" + ",".join(choices) + "}" if choices else _METAVARS.get(kind, "TEXT")
        )
        if kind is bool:
            settings |= {"nargs": "?", "const": True}
            off = {"dest": field.name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            group.add_argument(f"--no_{field.name}", action="store_false", **off)
        elif kind in (list, dict):
            settings |= {"nargs": "+", "action": "extend" if kind is dict else "store"}
        group.add_argument(f"--{field.name}", **settings)


def merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` over `low`; where both have a dict of the same name, its entries one by one. Epochs take the place of
    steps, which would win over them."""
    if high.get("num_train_epochs") is not None:
        low = {name: value for name, value in low.items() if name != "max_train_steps"}
    both = {name for name in low.keys() & high.keys() if isinstance(low[name], dict)}
    return {**low, **high, **{name: {**low[name], **high[name]} for name in both}}


def _kind_of(hint: Any) -> tuple[Any, bool]:
    """(int, float, str, bool, list or dict; may be None) of an annotation such as `float | None` or `list[str]`."""
    optional = isinstance(hint, types.UnionType)
    inner = (
        next(each for each in typing.get_args(hint) if each is not type(None)) if optional else hint
    )
    return typing.get_origin(inner) or inner, optional


def _converted(origin: str, value: Any, hint: Any, own: Mapping[str, Any]) -> Any:
    """A word or words of the command line, or a value of JSON or YAML, as the type of an annotation."""
    kind, optional = _kind_of(hint)
    words = value if isinstance(value, list) else [value]
    if optional and [str(word).lower() for word in words] == ["none"]:
        return None
    if kind is dict:
        return value if isinstance(value, dict) else _settings(origin, words)
    if kind is list:
        return [
            each
            for word in words
            for each in ([word] if own["sentences"] else str(word).replace(",", " ").split())
        ]
    text = str(value).lower() if value is None or isinstance(value, bool) else str(value)
    if own["choices"] and text not in own["choices"]:
        raise ValueError(f"{origin}: {text!r} is none of {', '.join(own['choices'])}")
    try:
        return string_to_bool(text) if kind is bool else kind(text)
    except (ValueError, argparse.ArgumentTypeError):
        raise ValueError(f"{origin} is {text!r}, expected {_WORDS[kind]}") from None


def _settings(origin: str, words: Sequence[Any]) -> dict[str, Any]:
    """{name: value} of words NAME=VALUE, or of one that is a JSON object."""
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = str(word).partition("=")
        if name.startswith("{"):
            values |= json.loads(word)
        elif not equals or not name.isidentifier():
            raise ValueError(f"{origin}: expected NAME=VALUE, got {word!r}")
        else:
            try:
                values[name] = json.loads(text)  # which reads 1e-4 as a number
            except ValueError:
                values[name] = None if text.lower() == "none" else yaml.safe_load(text)
    return values


def _help_of(field: dataclasses.Field) -> str:
    default = (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )
    shown = ",".join(map(str, default)) if isinstance(default, (list, dict)) else str(default)
    shown = shown.lower() if default is None or isinstance(default, bool) else shown
    unit = f" [{field.metadata['unit']}]" if field.metadata["unit"] else ""
    return f"{field.metadata['help']}{unit} (default: {shown or 'none'})".replace("%", "%%")
