"""The table of the values of `--adapter`: every method of fine-tuning that the train scripts offer.

NaRA's own family comes from this package; the others are PEFT's implementations. A method may fix arguments: `dora` is
`lora` with `use_dora`, and `nara_c` is `nara` with `core_type` "constant".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import LoraConfig

from nara_diffusion import NaraConfig

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


def method_of(args: Any) -> Method:
    """The method that `args.adapter` names."""
    return METHODS[args.adapter]


def effective(args: Any, name: str) -> Any:
    """The value of the argument `name`: the one that the method fixes, or else the one that was given."""
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
    """The usual name of the method that `args` describe, such as "NaRA-C" for `nara` with a constant core."""
    kind, core_type = kind_of(args), effective(args, "core_type")
    title = METHODS[kind].title
    if effective(args, "use_dora") and not title.endswith("DoRA"):
        title = f"{title}-DoRA"
    unnamed = kind in ("nara", "nara_dora") and core_type != "hypernetwork"
    return f"{title} with core {core_type!r}" if unnamed else title


def check_flags(args: Any, flags: Mapping[str, Any]) -> None:
    """Refuse flags that contradict the method, also where their value is the default (`check_method` cannot see those).

    Args:
        args: the arguments.
        flags: those of them that the command line gives; a file, which may serve several methods, isn't meant.

    Raises:
        ValueError: naming the flag, its value and what the method means.
    """
    for name, value in method_of(args).fixed.items():
        if flags.get(name, value) != value:
            raise ValueError(f"{name} is {flags[name]!r}, but adapter {args.adapter} means {name} {value!r}.")
