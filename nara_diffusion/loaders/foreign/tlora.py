"""T-LoRA as its authors' program writes it (ControlGenAI/T-LoRA): layers of attention processors of a UNet.

    y = W x + P (λ ⊙ m(t) ⊙ Q x) − P⁰ (λ⁰ ⊙ m(t) ⊙ Q⁰ x)      q_layer, p_layer, lambda_layer; base_q, base_p, …
    y = W x + up (m(t) ⊙ down x)                              the same without orthogonal layers

m(t) is 1 in the first ⌊(r − r_min)(T − t) / T⌋ + r_min of r directions, for t of T = 1000 timesteps. There is no α.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nara_diffusion.loaders.format import AdapterPart
from nara_diffusion.loaders.validation import check_has_modules

from .masked import Factors, masked_part
from .pairs import pair_factors, singular

_LAYER = re.compile(r"(?:unet\.)?(?P<attention>.+)\.processor\.(?P<place>to_[qkv]|to_out)_lora\.(?P<kind>.+)")
_PLAIN = {"down.weight", "up.weight"}
_ORTHOGONAL = {"q_layer.weight", "p_layer.weight", "lambda_layer", "base_q.weight", "base_p.weight", "base_lambda"}


def is_authors(tensors: Mapping[str, Any], with_min: bool) -> bool:
    """Whether it is such a file. `with_min`: r_min is given, so that plain layers are meant as T-LoRA's."""
    kinds = {match["kind"] for key in tensors if (match := _LAYER.fullmatch(key))}
    return "lambda_layer" in kinds or (with_min and kinds == _PLAIN)


def read_authors(tensors: Mapping[str, Tensor], model: nn.Module, rank_mask_min: int, origin: str) -> AdapterPart:
    """The part of the UNet. Raises ValueError: see `read_foreign`."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _LAYER.fullmatch(key)
        if match is None:
            raise ValueError(f"{origin} holds '{key}', which is no tensor of a T-LoRA that is known here.")
        place = "to_out.0" if match["place"] == "to_out" else match["place"]
        layers.setdefault(f"{match['attention']}.{place}", {})[match["kind"]] = tensor
    check_has_modules(model, layers.keys(), origin)
    in_pairs = any("lambda_layer" in own for own in layers.values())
    for name, own in layers.items():
        if own.keys() != (_ORTHOGONAL if in_pairs else _PLAIN):
            raise ValueError(
                f"{origin} has {', '.join(sorted(own))} of '{name}', where "
                f"{', '.join(sorted(_ORTHOGONAL if in_pairs else _PLAIN))} belong: damaged."
            )
    factors = {name: _factors(own, in_pairs, f"'{name}' in {origin}") for name, own in layers.items()}
    part = masked_part(factors, 1.0, rank_mask_min, origin, in_pairs=in_pairs)
    part.config.noise_convention = "timestep"
    return part


def _factors(own: Mapping[str, Tensor], in_pairs: bool, where: str) -> Factors:
    if not in_pairs:
        return own["down.weight"], own["up.weight"]
    now = singular(own["p_layer.weight"], own["lambda_layer"], own["q_layer.weight"], where)
    return pair_factors(now, singular(own["base_p.weight"], own["base_lambda"], own["base_q.weight"], where))
