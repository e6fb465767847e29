"""Read a Tc-LoRA, the adapter of DiffSynth-Studio whose update depends on the timestep t.

    ΔW(t) x = s B (γ(t) ⊙ A x + β(t)),   γ(t) = W_γ e(t) + b_γ,   β(t) = W_β e(t) + b_β

Its files (DiffSynth-Studio/MultiAlign-FLUX.1-dev) have PEFT's names, e.g. of `lora_time_gamma.bias`
beside `lora_A.weight`, and no configuration. The part that is read has the core "film".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from nara_diffusion.config import NaraConfig
from nara_diffusion.cores.core_set import NAME_IN_FILES, core_group
from nara_diffusion.strict import PEFT_PREFIX

from .adapter_part import AdapterPart
from .tlora import OtherFile

SCALE = 2.0
"""s, which DiffSynth-Studio takes as an argument with this default; files don't contain it."""
_OF_CORE = {"lora_time_gamma": "gamma", "lora_time_beta": "beta"}
_NAMES = (
    "lora_A.weight",
    "lora_B.weight",
    *(f"{name}.{kind}" for name in _OF_CORE for kind in ("weight", "bias")),
)
"""The names of a module's tensors."""
KEY = re.compile(rf"(.*\.)?({'|'.join(_OF_CORE)})\..*")
"""The keys that only a Tc-LoRA has."""


def convert_tc_lora(file: OtherFile) -> AdapterPart:
    """Return the part of a Tc-LoRA, with the default s.

    Raises:
        ValueError: a tensor is missing or unknown, or there is a `rank_mask`.
    """
    if file.rank_mask is not None:
        raise ValueError("rank_mask is for a T-LoRA, and this is a Tc-LoRA: leave it out.")
    return read_tc_lora(file.tensors)


def read_tc_lora(tensors: Mapping[str, Tensor], scale: float = SCALE) -> AdapterPart:
    """Return the part of an adapter for the tensors of a Tc-LoRA, with s = `scale`.

    Raises:
        ValueError: a tensor of a module is missing, or a key isn't one of a Tc-LoRA.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, dot, name = key.removeprefix(PEFT_PREFIX).partition(".lora_")
        if not module or f"lora_{name}" not in _NAMES or not dot:
            raise ValueError(
                f"It is a Tc-LoRA, but '{key}' isn't a tensor of one: expected {', '.join(_NAMES)} of each module."
            )
        modules.setdefault(module, {})[f"lora_{name}"] = tensor
    for module, named in modules.items():
        missing = [name for name in _NAMES if name not in named]
        if missing:
            raise ValueError(
                f"It is a Tc-LoRA, but lacks '{module}.{missing[0]}'. The file is damaged: download it again."
            )
    ranks = {module: len(named["lora_A.weight"]) for module, named in modules.items()}
    ((r, _),) = Counter(ranks.values()).most_common(1)
    others = {module: rank for module, rank in ranks.items() if rank != r}
    config = NaraConfig(
        r=r,
        lora_alpha=scale * r,  # type: ignore[arg-type]
        rank_pattern=others,
        alpha_pattern={module: scale * rank for module, rank in others.items()},
        target_modules=sorted(modules),
        core_type="film",
        core_sharing="layer",
        noise_convention="flow",
        noise_level_per="sample",
    )
    renamed = {}
    for module, named in modules.items():
        core = f"{NAME_IN_FILES}.{core_group(config, module, ranks[module])}"
        for name, tensor in named.items():
            owner, _, kind = name.partition(".")
            if owner in _OF_CORE:  # cores are float32
                tensor = tensor.float() if tensor.is_floating_point() else tensor
                renamed[f"{core}.{_OF_CORE[owner]}.{kind}"] = tensor
            else:
                renamed[f"{module}.{name}"] = tensor
    return AdapterPart(config, renamed)
