"""The methods that `--adapter` can name: NaRA, its variants, and PEFT's other methods.

Methods of PEFT are named by their PeftType in lower case. Some names stand for a method with fixed
fields: `dora` is `lora` with use_dora.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PromptLearningConfig

from nara_flags.parser import hint
from nara_flags.training import AdapterArguments

_REFUSED = {
    "adalora": "needs an extra step after each optimizer step, to drop directions",
    "xlora": "mixes adapters that are trained already",
}


@dataclass(frozen=True)
class Method:
    """A method that `--adapter` can name.

    Attributes:
        name: the PeftType in lower case, or "full".
        title: the usual name of the method.
        source: the publication; "PEFT" for PEFT's other methods.
        fixed: the configuration fields that the method's name sets.
    """

    name: str
    title: str
    source: str = "PEFT"
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        """The configuration class; None for full fine-tuning and for unknown names."""
        return PEFT_TYPE_TO_CONFIG_MAPPING.get(self.name.upper())  # type: ignore[call-overload]

    @property
    def family(self) -> Literal["nara", "lora", "other", "prompt", "full"]:
        """The kind of method: with a core, LoRA, other PEFT method, virtual tokens, all weights."""
        if self.name in ("nara", "lora", "full"):
            return self.name  # type: ignore[return-value]
        return "prompt" if issubclass(self.config, PromptLearningConfig) else "other"


_NARA = "arXiv 2605.29716"
_KNOTS = {"core_type": "knots", "core_sharing": "layer", "core_scale": 1.0}
NAMED = {
    "nara": Method("nara", "NaRA", _NARA),
    "nara_dora": Method("nara", "NaRA-DoRA", _NARA, {"use_dora": True}),
    "nara_c": Method("nara", "NaRA-C", _NARA, {"core_type": "constant"}),
    "nara_knots": Method("nara", "NaRA-Knots", "RESULTS.md", _KNOTS),
    "tlora": Method("nara", "T-LoRA", "arXiv 2507.05964", {"core_type": "rank_mask"}),
    "multi_lora": Method("nara", "Multi-LoRA", _NARA, {"core_type": "bins"}),
    "lora": Method("lora", "LoRA", "arXiv 2106.09685"),
    "dora": Method("lora", "DoRA", "arXiv 2402.09353", {"use_dora": True}),
    "hira": Method("hira", "HiRA", "ICLR 2025"),
    "prompt_tuning": Method("prompt_tuning", "Prompt tuning", "arXiv 2104.08691"),
    "p_tuning": Method("p_tuning", "P-tuning", "arXiv 2103.10385"),
    "full": Method("full", "full fine-tuning", "all weights"),
}
"""{value of --adapter: method}. PEFT's other methods keep their own names."""


def method_of(args: AdapterArguments) -> Method:
    """Return the method that `args.adapter` names.

    Raises:
        ValueError: the method is unknown or can't be trained here.
    """
    chosen = args.adapter
    method = NAMED.get(chosen, Method(chosen, chosen.replace("_", " ")))
    if chosen in _REFUSED:
        raise ValueError(
            f"adapter {chosen} can't be trained here: it {_REFUSED[chosen]}. Use nara, lora or dora."
        )
    if chosen != "full" and (method.config is None or chosen != chosen.lower()):
        names = [*NAMED, *(str(kind.value).lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING)]
        raise ValueError(
            f"adapter is {chosen!r}, which is not a method: {hint(chosen, dict.fromkeys(names))}"
        )
    return method
