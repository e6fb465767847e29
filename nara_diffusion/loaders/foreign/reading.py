"""Reading adapters of other programs as parts of a NaRA.

    program                      tensors of a layer                                       becomes
    T-LoRA, its authors' (lora)  ….processor.to_q_lora.down.weight, up.weight             rank_mask
    T-LoRA, authors' (ortho)     …_lora.q_layer, p_layer, lambda_layer, base_q, base_p, … rank_mask_pairs
    T-LoRA, LyCORIS              lycoris_….q_layer.weight, p_layer, lambda_layer, alpha   rank_mask_pairs
    MultiAlign, DiffSynth        ….lora_A, lora_B, lora_time_gamma, lora_time_beta        diagonal

The files don't have all settings of the training: T-LoRA's r_min has to be given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nara_diffusion.loaders.format import METADATA_KEY, AdapterPart

from .multialign import is_multialign, read_multialign
from .tlora import is_authors, read_authors
from .tlora_lycoris import is_lycoris, read_lycoris


@dataclass(frozen=True)
class ForeignOptions:
    """The options with which a file of another program is read.

    Attributes:
        models: component → model, the denoiser first. rank_mask_min: r_min of a T-LoRA, or None.
    """

    models: Mapping[str, nn.Module]
    rank_mask_min: int | None = None


def format_of(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None, with_min: bool = False) -> str | None:
    """The program's name in messages; None if the file is none of theirs.

    Args:
        with_min: whether r_min is given. The names of a T-LoRA without orthogonal layers are those of a LoRA, too.
    """
    if metadata and METADATA_KEY in metadata:
        return None
    if is_multialign(tensors):
        return "a MultiAlign of DiffSynth-Studio"
    if is_lycoris(tensors):
        return "a T-LoRA of LyCORIS"
    return "a T-LoRA of its authors' program" if is_authors(tensors, with_min) else None


def read_foreign(
    tensors: Mapping[str, Tensor], config: Callable[[], Mapping[str, Any]], options: ForeignOptions, origin: str
) -> dict[str, AdapterPart]:
    """The adapter's part, of the denoiser.

    Args:
        tensors: for which `format_of` gives a name. config: reads the adapter_config.json beside them.
        origin: the name of the file in messages.

    Raises:
        ValueError: r_min is missing, or given where there is none; a field that can't be expressed; a module that the
            model lacks; damaged.
    """
    component, model = next(iter(options.models.items()))
    if is_multialign(tensors):
        if options.rank_mask_min is not None:
            raise ValueError(f"rank_mask_min is {options.rank_mask_min}, but {origin} is a MultiAlign: leave it out.")
        return {component: read_multialign(tensors, config(), origin)}
    if options.rank_mask_min is None:
        raise ValueError(
            f"{origin} is a T-LoRA, and doesn't say how many directions stay in pure noise: pass rank_mask_min=, as it "
            "was trained (min_rank, tlora_min_rank; 1 unless it was set there). Its rank has to fall linearly with λ, "
            "by the exponent 1 (alpha_rank_scale, tlora_alpha)."
        )
    read = read_lycoris if is_lycoris(tensors) else read_authors
    return {component: read(tensors, model, options.rank_mask_min, origin)}
