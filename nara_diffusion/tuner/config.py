"""`NaraConfig`: PEFT's LoraConfig plus the options of the noise-conditioned core, with checks of their combinations."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig

from nara_diffusion.cores.registry import BUILT_IN, check_core_type
from nara_diffusion.noise.strength import StrengthSchedule
from nara_diffusion.utils.atomic_write import atomic_write_files

from .config_fields import check_core_size, check_fields
from .lora_starts import changes_base, check_start
from .peft_type import NaraPeftType

NOISE_EMBEDDINGS = ("fourier", "mlp", "raw")

_CHOICES: dict[str, tuple[str, ...]] = {
    "core_init": ("zero_last", "kaiming", "zero_all"),
    "core_input": ("noise_level", "mask_density", "both"),
    "core_sharing": ("global", "module_type", "layer"),
    "lora_a_init": ("peft", "orthogonal"),
    "noise_embedding": NOISE_EMBEDDINGS,
}

_READERS: dict[str, tuple[str, ...]] = {
    "core_init": ("hypernetwork", "constant"),
    "core_input": ("hypernetwork",),
    "noise_embedding": ("hypernetwork",),
}
"""Choices, and the built-in types of core that read them; custom cores may read all."""

_REFUSED: dict[str, str] = {
    "target_parameters": "parameters are adapted by merging the update before each forward, at no λ",
    "layer_replication": "replicated layers would share one core under several names",
    "megatron_config": "Megatron's parallel layers have no LoRA variant for C(λ)",
    "alora_invocation_tokens": "aLoRA is another LoRA variant of the same layer",
    "arrow_config": "Arrow routes between static updates",
    "use_bdlora": "BD-LoRA is another LoRA variant of the same layer",
    "use_qalora": "QA-LoRA is another LoRA variant of the same layer",
    "velora_config": "VeLoRA is another LoRA variant of the same layer",
    "monteclora_config": "MonteCLoRA is another LoRA variant of the same layer",
    "kasa_config": "KaSA is another LoRA variant of the same layer",
    "ensure_weight_tying": "tied layers use A and B the other way round, so that one would read C and the other Cᵀ",
}

_UNSCALED: dict[str, str] = {
    "bias": "the biases that are trained",
    "lora_bias": "the bias of B",
    "modules_to_save": "modules that are trained as a whole",
    "trainable_token_indices": "tokens that are trained",
}
"""LoRA options that change the model outside of s · B · C · A, and what they change."""


@dataclass
class NaraConfig(LoraConfig):
    """Configuration of NaRA: ΔW(λ) = s · B · C(λ) · A with C(λ) = I + η F(e(λ)) (arXiv 2605.29716, section 4).

    All fields of `peft.LoraConfig` keep their meaning (`use_dora=True` is NaRA-DoRA). With `rank_pattern`, one core of
    the largest rank serves all: a layer of rank r' reads the leading block C(λ)[:r', :r'].

    Raises:
        ValueError: a choice that does not exist, a number out of range, or a LoRA option that has no meaning for an
            update that depends on λ; the message names the option.
    """

    core_type: str = field(
        default="hypernetwork",
        metadata={
            "help": "What makes C: 'hypernetwork' is NaRA, 'constant' is NaRA-C (one learnable C, no noise input), "
            "'identity' is plain LoRA (C = I; no λ needed, may be merged), 'rank_mask' is T-LoRA (fewer of the r "
            "directions the noisier), 'bins' is Multi-LoRA (r / core_bins directions of their own for each bin of λ), "
            "'knots' interpolates between learned matrices at core_knots values of λ (best with core_sharing 'layer')."
        },
    )
    core_scale: float = field(default=0.1, metadata={"help": "η in C = I + η F(e(λ)); greater than 0."})
    core_hidden_dims: tuple[int, ...] = field(
        default=(256, 512), metadata={"help": "Widths of the hidden layers of the hypernetwork F."}
    )
    core_init: Literal["zero_last", "kaiming", "zero_all"] = field(
        default="zero_last",
        metadata={
            "help": "Initialisation of F: 'zero_last' (last layer zero, so that C = I at step 0), 'zero_all' (all "
            "zero: only the last bias receives a gradient at first), 'kaiming' (C is not I at step 0)."
        },
    )
    core_input: Literal["noise_level", "mask_density", "both"] = field(
        default="noise_level",
        metadata={"help": "What F reads: λ, the mask density around masked tokens (masked LMs only), or both."},
    )
    core_sharing: Literal["global", "module_type", "layer"] = field(
        default="global",
        metadata={
            "help": "Which adapted modules share one F: all of them, those of one name such as q_proj, or none "
            "('layer': each adapted module has its own)."
        },
    )
    noise_embedding: Literal["fourier", "mlp", "raw"] = field(
        default="fourier",
        metadata={"help": "e(λ): frozen Gaussian Fourier features, a learnable Linear and SiLU, or λ itself."},
    )
    noise_embedding_dim: int = field(
        default=64, metadata={"help": "Width of e(λ); even for 'fourier', unused by 'raw'."}
    )
    fourier_scale: float = field(
        default=16.0, metadata={"help": "Standard deviation of the Fourier frequencies, in radians per unit of λ."}
    )
    rank_mask_min: int | None = field(
        default=None,
        metadata={"help": "For 'rank_mask': directions that stay in pure noise, at most r; none means half of r."},
    )
    lora_a_init: Literal["peft", "orthogonal"] = field(
        default="peft",
        metadata={
            "help": "How A starts: as init_lora_weights says, or with orthonormal rows while B is zero, so that no "
            "direction repeats what a masked one knows (T-LoRA's idea)."
        },
    )
    core_knots: int = field(
        default=5, metadata={"help": "For 'knots': how many, at equal distances from λ = 0 to λ = 1; 2 or more."}
    )
    core_bins: int = field(
        default=5,
        metadata={
            "help": "For 'bins': the number K of equal bins of λ; r is the rank of all together, a multiple of K."
        },
    )
    mask_density_radius: int = field(
        default=4,
        metadata={"help": "Radius R, in tokens, of the neighbourhood whose masked share is the mask density."},
    )
    noise_convention: str | None = field(
        default=None,
        metadata={
            "help": "Name of λ's definition in training, e.g. 'masked_share'; a source of λ with another name is "
            "refused. None is unknown."
        },
    )
    scheduler: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Class (`_class_name`) and configuration of the Diffusers scheduler that an adapter was trained "
            "for which predicts something else than its base. None: whatever samples the base."
        },
    )

    strength: StrengthSchedule | list[list[float]] | None = field(
        default=None,
        metadata={
            "help": "The strength of the update as a function of λ: StrengthSchedule([(λ, strength), …]), or its "
            "points. None is 1."
        },
    )

    def __post_init__(self) -> None:
        check_fields(vars(self))
        if self.reads_core:
            self._check_lora_fields()
        self._check_strength()
        super().__post_init__()
        self.peft_type = NaraPeftType.NARA  # type: ignore[assignment]
        self.core_hidden_dims = tuple(self.core_hidden_dims)  # JSON has a list
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        self._check_core_fields()
        self._check_masks()
        self._check_use()
        self._check_size()
        check_start(self.init_lora_weights, self.core_type, self.core_init)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As PEFT's, but atomic: adapter_config.json is replaced as a whole or not at all."""
        if os.path.isfile(save_directory):
            super().save_pretrained(save_directory, **kwargs)  # which refuses a file
            return
        with atomic_write_files(Path(save_directory)) as partial:
            super().save_pretrained(str(partial), **kwargs)

    @property
    def reads_core(self) -> bool:
        """Whether its layers read a C: one that is not I, or that is scaled by a strength."""
        return self.core_type != "identity" or self.strength is not None

    @property
    def changes_base(self) -> bool:
        """Whether the initialisation changes the base weights: it subtracts s·B·A from them, or quantises them."""
        return changes_base(self.init_lora_weights)

    @property
    def ranks(self) -> set[int]:
        """The ranks that layers may have."""
        return {self.r, *self.rank_pattern.values()}  # type: ignore[union-attr]

    def _check_size(self) -> None:
        rank = max(self.ranks)
        inputs = 2 * self.noise_embedding_dim
        if self.core_type == "hypernetwork":
            widths = (inputs, *self.core_hidden_dims, rank * rank)
            check_core_size(widths, rank, f"core_hidden_dims {self.core_hidden_dims}")
        elif self.core_type == "knots":
            check_core_size((self.core_knots, rank * rank), rank, f"core_knots {self.core_knots}")

    def _check_core_fields(self) -> None:
        check_core_type(self.core_type)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(map(repr, choices))}.")
        if self.noise_embedding == "fourier" and self.noise_embedding_dim % 2:
            raise ValueError(
                f"noise_embedding_dim is {self.noise_embedding_dim}: Fourier features are sine and cosine pairs, so "
                "pass an even number."
            )

    def _check_use(self) -> None:
        """Refuse options that the chosen type of core does not read."""
        for name, types in _READERS.items():
            default = _CHOICES[name][0]
            if self.core_type in BUILT_IN and self.core_type not in types and getattr(self, name) != default:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, which core_type {self.core_type!r} doesn't read: leave it at "
                    f"{default!r}, or use core_type {' or '.join(map(repr, types))}."
                )
        if self.core_type == "knots" and self.core_knots < 2:
            raise ValueError(f"core_knots is {self.core_knots}: interpolation needs one at either end, so 2 or more.")
        if self.lora_a_init != "peft" and (self.core_type == "identity" or self.init_lora_weights is not True):
            raise ValueError(
                f"lora_a_init is {self.lora_a_init!r}, with core_type={self.core_type!r} and init_lora_weights="
                f"{self.init_lora_weights!r}: it needs a core, and init_lora_weights=True."
            )

    def _check_masks(self) -> None:
        ranks = self.ranks
        least = self.rank_mask_min
        if least is not None and (
            self.core_type != "rank_mask"
            or isinstance(least, bool)
            or not isinstance(least, int)
            or least not in range(1, min(ranks) + 1)
        ):
            raise ValueError(
                f"rank_mask_min is {least!r}, with core_type={self.core_type!r} and r={min(ranks)}: it is for "
                "core_type='rank_mask', an integer from 1 to r, or None for half of r."
            )
        uneven = sorted(rank for rank in ranks if self.core_type == "bins" and rank % self.core_bins)
        if uneven:
            raise ValueError(
                f"r is {uneven[0]}, which {self.core_bins} bins cannot share evenly: with core_type='bins', r is the "
                "rank of all bins together, so pass core_bins times the rank of one."
            )

    def _check_strength(self) -> None:
        if self.strength is None:
            return
        given = self.strength
        try:
            self.strength = (given if isinstance(given, StrengthSchedule) else StrengthSchedule(given)).as_lists()
        except ValueError as error:
            raise ValueError(f"strength is {given!r}: {error}") from None
        for name, unscaled in _UNSCALED.items():
            if getattr(self, name) not in (None, False, "none"):
                raise ValueError(
                    f"strength depends on λ, which would not reach {unscaled} ({name}={getattr(self, name)!r}): remove "
                    "one of the two."
                )
        if self.changes_base:
            raise ValueError(
                f"strength depends on λ, but init_lora_weights={self.init_lora_weights!r} takes the update at strength "
                "1 out of the base weights: remove one of the two."
            )

    def _check_lora_fields(self) -> None:
        for name, why in _REFUSED.items():
            value = getattr(self, name, None)
            if value or isinstance(value, dict):  # of which PEFT makes an option that is on, empty or not
                remedy = "strength=None" if self.core_type == "identity" else "core_type='identity'"
                raise ValueError(f"NaRA does not support {name}: {why}. Remove it, or use {remedy}.")
