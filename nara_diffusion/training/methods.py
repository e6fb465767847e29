"""The values of `--adapter`: every way to fine-tune that both train scripts offer, in one table.

NaRA's own family comes from this package; the others are PEFT's implementations. A method may fix arguments: `dora` is
`lora` with `use_dora`, and `nara_c` is `nara` with `core_type` "constant".
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import LoraConfig

from nara_diffusion import NaraConfig

logger = logging.getLogger(__name__)

CORE_FIELDS = {field.name for field in dataclasses.fields(NaraConfig)} - {
    field.name for field in dataclasses.fields(LoraConfig)
}
"""What NaraConfig adds to LoraConfig."""


@dataclass(frozen=True)
class Method:
    """Attributes:
    title: what people call it.
    source: where it was published.
    family: "nara" (a core; this package), "lora" (peft.LoraConfig), "other" (a tuner of PEFT's), "prompt" (virtual
        tokens before a text, no change in any layer), "full" (all weights).
    fixed: arguments that it decides, and their values.
    linear_only: whether PEFT has it for linear layers alone, and not for convolutions.
    """

    title: str
    source: str
    family: Literal["nara", "lora", "other", "prompt", "full"]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    linear_only: bool = False


METHODS: dict[str, Method] = {
    "nara": Method("NaRA", "arXiv 2605.29716", "nara"),
    "nara_dora": Method("NaRA-DoRA", "arXiv 2605.29716", "nara", {"use_dora": True}),
    "nara_c": Method("NaRA-C", "arXiv 2605.29716", "nara", {"core_type": "constant"}),
    "nara_knots": Method(
        "NaRA-Knots", "RESULTS.md", "nara", {"core_type": "knots", "core_sharing": "layer", "core_scale": 1.0}
    ),
    "tlora": Method("T-LoRA", "arXiv 2507.05964", "nara", {"core_type": "rank_mask"}),
    "multi_lora": Method("Multi-LoRA", "arXiv 2605.29716", "nara", {"core_type": "bins"}),
    "lora": Method("LoRA", "arXiv 2106.09685", "lora"),
    "dora": Method("DoRA", "arXiv 2402.09353", "lora", {"use_dora": True}),
    "rslora": Method("rsLoRA", "arXiv 2312.03732", "lora", {"use_rslora": True}),
    "pissa": Method("PiSSA", "arXiv 2404.02948", "lora", linear_only=True),
    "hira": Method("HiRA", "ICLR 2025", "other"),
    "vera": Method("VeRA", "arXiv 2310.11454", "other", linear_only=True),
    "adalora": Method("AdaLoRA", "arXiv 2303.10512", "other"),
    "oft": Method("OFT", "arXiv 2306.07280", "other"),
    "prompt_tuning": Method("Prompt tuning", "arXiv 2104.08691", "prompt"),
    "p_tuning": Method("P-tuning", "arXiv 2103.10385", "prompt"),
    "full": Method("full fine-tuning", "all weights", "full"),
}

# Arguments of an adapter that other families than these don't read.
_READERS: dict[str, tuple[str, ...]] = {
    "target_modules": ("nara", "lora", "other"),
    "rank": ("nara", "lora", "other"),
    "lora_dropout": ("nara", "lora", "other"),
    "num_virtual_tokens": ("prompt",),
}
# Switches whose meaning a method either knows or contradicts: {argument: (families, further methods)}.
_SWITCHES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "use_dora": (("nara", "lora"), ()),
    "use_rslora": (("nara", "lora"), ()),
    "core_type": (("nara",), ()),
    "lora_alpha": (("nara", "lora"), ("adalora",)),
}


def method_of(args: Any) -> Method:
    """The method that `args.adapter` names."""
    return METHODS[args.adapter]


def effective(args: Any, name: str) -> Any:
    """The argument `name`, as the method fixes it or as it was given."""
    return method_of(args).fixed.get(name, getattr(args, name))


def title_of(args: Any) -> str:
    """What people call the method of `args`, with its switches: "NaRA-DoRA" also for `nara` with `use_dora`."""
    title = method_of(args).title
    if effective(args, "use_dora") and not title.endswith("DoRA"):
        return "DoRA" if title == "LoRA" else f"{title}-DoRA"
    return title


def check_method(args: Any) -> None:
    """Refuses switches that contradict the method, and names those settings that it doesn't read.

    Raises:
        ValueError: naming the switch, its value and the methods that know it.
    """
    method, defaults = method_of(args), _defaults(args)
    for name, value in method.fixed.items():
        if getattr(args, name) not in (defaults[name], value):
            raise ValueError(f"{name} is {getattr(args, name)!r}, but adapter {args.adapter} means {name} {value!r}.")
    for name, (families, methods) in _SWITCHES.items():
        neutral = (defaults[name], args.rank) if name == "lora_alpha" else (defaults[name],)
        if method.family in families or args.adapter in methods or getattr(args, name) in neutral:
            continue
        knowing = [key for key, other in METHODS.items() if other.family in families or key in methods]
        raise ValueError(
            f"{name} is {getattr(args, name)!r}, which adapter {args.adapter} doesn't know: leave it out, or choose "
            f"one of {', '.join(knowing)}."
        )
    unread = unread_arguments(args)
    if unread:
        logger.warning("adapter %s doesn't read %s", args.adapter, ", ".join(unread))


def check_flags(args: Any, flags: Mapping[str, Any]) -> None:
    """Refuses flags that contradict the method, those too whose value is the default, as `check_method` can't.

    Args:
        args: the arguments.
        flags: those of them that the command line gives; a file, which may serve several methods, isn't meant.

    Raises:
        ValueError: naming the flag, its value and what the method means.
    """
    for name, value in method_of(args).fixed.items():
        if flags.get(name, value) != value:
            raise ValueError(f"{name} is {flags[name]!r}, but adapter {args.adapter} means {name} {value!r}.")


def unread_arguments(args: Any) -> list[str]:
    """Arguments with a value of their own that the method has no use for, as a file that serves all methods may set."""
    family, defaults = method_of(args).family, _defaults(args)
    readers = {**dict.fromkeys(sorted(CORE_FIELDS & defaults.keys()), ("nara",)), **_READERS}
    return [
        name for name, families in readers.items() if family not in families and getattr(args, name) != defaults[name]
    ]


def _defaults(args: Any) -> dict[str, Any]:
    """Of the arguments of an adapter, {name: default}."""
    from nara_diffusion.training.arguments import AdapterArguments  # which has the table's names as choices

    fields = dataclasses.fields(AdapterArguments)
    own = {field.name: field for field in dataclasses.fields(args)}
    return {field.name: _default(own.get(field.name, field)) for field in fields}


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default
