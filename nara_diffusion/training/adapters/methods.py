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
from nara_diffusion.cores.custom import BUILT_IN

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
# The types of core of this package that read an argument, where that aren't all; types of one's own may read any.
_TRAINED = ("hypernetwork", "constant", "knots")
_CORE_READERS: dict[str, tuple[str, ...]] = {
    "core_module": (),
    "core_learning_rate": _TRAINED,
    "core_scale": _TRAINED,
    "core_sharing": _TRAINED,
    "core_hidden_dims": ("hypernetwork",),
    "layer_embedding_dim": ("hypernetwork",),
    "mask_density_radius": ("hypernetwork",),
    "noise_embedding_dim": ("hypernetwork",),
    "fourier_scale": ("hypernetwork",),
    "core_bins": ("bins",),
    "core_knots": ("knots",),
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


def kind_of(args: Any) -> str:
    """The name in `METHODS` of what the configuration really is: "lora" also for `nara` with `core_type` "identity".

    A core that no method has is "nara", or "nara_dora".
    """
    family, core_type = method_of(args).family, effective(args, "core_type")
    dora, rslora = effective(args, "use_dora"), effective(args, "use_rslora")
    if args.adapter == "lora" or (family == "nara" and core_type == "identity"):
        return "dora" if dora else "rslora" if rslora else "lora"
    if family != "nara":
        return args.adapter
    for name, method in METHODS.items():
        if "core_type" in method.fixed and all(effective(args, key) == value for key, value in method.fixed.items()):
            return name
    return "nara_dora" if dora else "nara"


def title_of(args: Any) -> str:
    """What people call the method that `args` describe, by whatever name: "NaRA-C" for `nara` with a constant core."""
    kind, core_type = kind_of(args), effective(args, "core_type")
    title = METHODS[kind].title
    if effective(args, "use_dora") and not title.endswith("DoRA"):
        title = f"{title}-DoRA"
    unnamed = kind in ("nara", "nara_dora") and core_type != "hypernetwork"
    return f"{title} with core {core_type!r}" if unnamed else title


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
    _check_options(args)
    unread = unread_arguments(args)
    if unread:
        logger.warning("adapter %s doesn't read %s", _described(args), ", ".join(unread))


def _check_options(args: Any) -> None:
    """Refuses `adapter_options` that would change what the method is behind its arguments' back."""
    own = {name for name in _defaults(args) if name in CORE_FIELDS or name in ("use_dora", "use_rslora")}
    for option in args.adapter_options or []:
        name = option.partition("=")[0]
        if name in own:
            raise ValueError(
                f"adapter_options holds {option!r}, which is an argument of its own: give {name} (--{name})."
            )


def _described(args: Any) -> str:
    """The adapter's name, with the core where that is a choice of its own."""
    method = method_of(args)
    if method.family != "nara" or "core_type" in method.fixed:
        return args.adapter
    return f"{args.adapter} with core_type {args.core_type!r}"


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
    core_type = effective(args, "core_type")
    return [
        field.name
        for field in dataclasses.fields(args)
        if not _reads(args.adapter, core_type, field.name) and getattr(args, field.name) != _default(field)
    ]


def without_unread(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, which stand in for arguments that weren't `given`, without those that the given method doesn't read."""
    adapter = given.get("adapter", "nara")
    core_type = METHODS[adapter].fixed.get("core_type", given.get("core_type", "hypernetwork"))
    return {name: value for name, value in values.items() if _reads(adapter, core_type, name)}


def _reads(adapter: str, core_type: str, name: str) -> bool:
    family = METHODS[adapter].family
    if name in CORE_FIELDS or name in _CORE_READERS:
        return family == "nara" and (core_type not in BUILT_IN or core_type in _CORE_READERS.get(name, BUILT_IN))
    return family in _READERS.get(name, (family,))


def _defaults(args: Any) -> dict[str, Any]:
    """Of the arguments of an adapter, {name: default}."""
    from nara_diffusion.training.arguments import AdapterArguments  # which has the table's names as choices

    fields = dataclasses.fields(AdapterArguments)
    own = {field.name: field for field in dataclasses.fields(args)}
    return {field.name: _default(own.get(field.name, field)) for field in fields}


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default
