"""The methods that `--adapter` names: NaRA's family from this package, all others from PEFT.

These go by the name of their PeftType in small letters. Some names are short for a method with fixed fields: `dora` is
`lora` with use_dora.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PromptLearningConfig

from nara_diffusion import NaraConfig

from .parser import hint

_NARA = "arXiv 2605.29716"
NAMED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "nara": ("nara", {}, "NaRA", _NARA),
    "nara_dora": ("nara", {"use_dora": True}, "NaRA-DoRA", _NARA),
    "nara_c": ("nara", {"core_type": "constant"}, "NaRA-C", _NARA),
    "nara_knots": (
        "nara",
        {"core_type": "knots", "core_sharing": "layer", "core_scale": 1.0},
        "NaRA-Knots",
        "RESULTS.md",
    ),
    "tlora": ("nara", {"core_type": "rank_mask"}, "T-LoRA", "arXiv 2507.05964"),
    "multi_lora": ("nara", {"core_type": "bins"}, "Multi-LoRA", _NARA),
    "lora": ("lora", {}, "LoRA", "arXiv 2106.09685"),
    "dora": ("lora", {"use_dora": True}, "DoRA", "arXiv 2402.09353"),
    "hira": ("hira", {}, "HiRA", "ICLR 2025"),
    "prompt_tuning": ("prompt_tuning", {}, "Prompt tuning", "arXiv 2104.08691"),
    "p_tuning": ("p_tuning", {}, "P-tuning", "arXiv 2103.10385"),
}
"""{name: (method, fields that it fixes, what people call it, where it was published)}."""
_REFUSED = {
    "adalora": "drops directions by a step of its own after each optimizer step, which this trainer doesn't take",
    "xlora": "mixes adapters that are trained already",
}


@dataclass(frozen=True)
class Method:
    """Attributes:
    name: of PEFT's type in small letters, "nara" or "full".
    title: what people call it.
    source: where it was published; of other methods of PEFT, "PEFT".
    fixed: fields of the configuration that its name decides.
    config: the class of its configuration; None for all weights.
    """

    name: str
    title: str
    source: str
    fixed: Mapping[str, Any]
    config: Any

    @property
    def family(self) -> Literal["nara", "lora", "other", "prompt", "full"]:
        """ "nara" (a core), "lora" (peft.LoraConfig), "prompt" (virtual tokens), "other" of PEFT's, "full"."""
        if self.name in ("nara", "lora", "full"):
            return self.name  # type: ignore[return-value]
        return "prompt" if issubclass(self.config, PromptLearningConfig) else "other"


def method_of(args: Any) -> Method:
    """The method that `args.adapter` names.

    Raises:
        ValueError: there is none of that name, or it can't be trained here.
    """
    chosen = args.adapter
    if chosen == "full":
        return Method("full", "full fine-tuning", "all weights", {}, None)
    name, fixed, title, source = NAMED.get(chosen, (chosen, {}, chosen.replace("_", " "), "PEFT"))
    config = NaraConfig if name == "nara" else PEFT_TYPE_TO_CONFIG_MAPPING.get(name.upper())  # type: ignore[call-overload]
    if name in _REFUSED:
        raise ValueError(f"adapter {chosen} can't be trained here: it {_REFUSED[name]}. Give nara, lora or dora.")
    if config is None or chosen != chosen.lower():
        known = [*NAMED, "full", *(str(kind.value).lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING)]
        raise ValueError(f"adapter is {chosen!r}, which is no method: {hint(chosen, dict.fromkeys(known))}")
    return Method(name, title, source, fixed, config)
