"""Read a Tc-LoRA, the adapter of DiffSynth-Studio whose update depends on the timestep t.

    ΔW(t) x = s B (γ(t) ⊙ A x + β(t)),   γ(t) = W_γ e(t) + b_γ,   β(t) = W_β e(t) + b_β

Its files (DiffSynth-Studio/MultiAlign-FLUX.1-dev) have PEFT's names, e.g. of `lora_time_gamma.bias`
beside `lora_A.weight`, and no configuration. The part that is read has the core "film".
"""

from __future__ import annotations

import re
from statistics import mode

from nara_diffusion.config import NaraConfig
from nara_diffusion.cores.core_set import NAME_IN_FILES, core_group
from nara_diffusion.strict import PEFT_PREFIX

from .adapter_part import AdapterPart
from .tlora import OtherFile, layers_of

SCALE = 2.0
"""s, which DiffSynth-Studio takes as an argument with this default; files don't contain it."""
KEY = re.compile(r"(?:.*\.)?lora_time_(?:gamma|beta)\..*")
"""The keys that only a Tc-LoRA has."""
_TENSOR = re.compile(rf"(?:{re.escape(PEFT_PREFIX)})?(?P<layer>.+?)\.(?P<field>lora_.+)")
_FIELDS = {
    "lora_A.weight": "",
    "lora_B.weight": "",
    "lora_time_gamma.weight": "gamma.weight",
    "lora_time_gamma.bias": "gamma.bias",
    "lora_time_beta.weight": "beta.weight",
    "lora_time_beta.bias": "beta.bias",
}
"""{name of a module's tensor: its name in the core "film", if it belongs to it}."""


def convert_tc_lora(file: OtherFile) -> AdapterPart:
    """Return the part of a Tc-LoRA, with the default s.

    Raises:
        ValueError: a tensor is missing or unknown.
    """
    modules = layers_of(file.tensors, _TENSOR, _FIELDS, "a Tc-LoRA")
    ranks = {module: named["lora_A.weight"].shape[:1].numel() for module, named in modules.items()}
    r = mode(ranks.values())
    other_ranks = {module: rank for module, rank in ranks.items() if rank != r}
    config = NaraConfig(
        r=r,
        lora_alpha=SCALE * r,  # type: ignore[arg-type]
        rank_pattern=other_ranks,
        alpha_pattern={module: SCALE * rank for module, rank in other_ranks.items()},
        target_modules=sorted(modules),
        core_type="film",
        core_sharing="layer",
        noise_convention="flow",
        noise_level_per="sample",
    )
    tensors = {}
    for module, named in modules.items():
        core = f"{NAME_IN_FILES}.{core_group(config, module, ranks[module])}"
        for field, tensor in named.items():
            if not _FIELDS[field]:
                tensors[f"{module}.{field}"] = tensor
            else:  # cores are float32
                tensor = tensor.float() if tensor.is_floating_point() else tensor
                tensors[f"{core}.{_FIELDS[field]}"] = tensor
    return AdapterPart(config, tensors)
