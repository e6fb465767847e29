"""`NaraConfig`: PEFT's LoraConfig plus the options of the noise-conditioned core, and its fields in files."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields
from enum import Enum
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig

from nara_diffusion.cores.registry import BUILT_IN, check_core_type
from nara_diffusion.noise.strength_schedule import StrengthSchedule, is_number
from nara_diffusion.utils.atomic_write import atomic_write_files

_CHOICES: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
    "core_init": (("zero_last", "kaiming", "zero_all"), ("hypernetwork", "constant")),
    "core_input": (("noise_level",), BUILT_IN),
    "core_sharing": (("global", "module_type", "layer"), BUILT_IN),
    "lora_a_init": (("peft", "orthogonal"), BUILT_IN),
    "mask_density_radius": ((4,), BUILT_IN),
    "noise_embedding": (("fourier", "mlp", "raw"), ("hypernetwork",)),
}
"""Field → its choices, and the built-in types of core that read it; custom cores may read all."""
_SIZES = ("r", "noise_embedding_dim", "core_bins", "core_knots")
_SCALES = ("core_scale", "fourier_scale")
_GONE = {"core_normalization": "none", "noise_scale": "linear", "layer_embedding_dim": 16}
"""Fields of version 0.1 that are gone → their defaults there, with which files load as before."""
_REFUSED = (
    "target_parameters", "layer_replication", "megatron_config", "alora_invocation_tokens", "arrow_config",
    "use_bdlora", "use_qalora", "velora_config", "monteclora_config", "kasa_config", "ensure_weight_tying",
)  # fmt: skip
"""LoRA options by which PEFT computes the update in another way, without C(λ)."""


class NaraPeftType(str, Enum):
    """NaRA's entry among PEFT's types."""

    NARA = "NARA"

    def __str__(self) -> str:
        return self.value


@dataclass
class NaraConfig(LoraConfig):
    """Configuration of NaRA: ΔW(λ) = s · B · C(λ) · A with C(λ) = I + η F(e(λ)) (arXiv 2605.29716, section 4).

    All fields of `peft.LoraConfig` keep their meaning (`use_dora=True` is NaRA-DoRA). With `rank_pattern`, one core of
    the largest rank serves all: a layer of rank r' reads the leading block C(λ)[:r', :r'].

    Args:
        core_type: what makes C. "hypernetwork" is NaRA; "constant" NaRA-C (one learnable C, no noise input); "identity"
            plain LoRA (C = I, no λ needed, may be merged); "rank_mask" T-LoRA (fewer of the r directions the noisier);
            "bins" Multi-LoRA (r / core_bins directions of their own for each bin of λ); "knots" interpolates between
            learned matrices at core_knots values of λ (best with core_sharing "layer"); or a registered name.
        core_scale: η in C = I + η F(e(λ)), greater than 0.
        core_hidden_dims: widths of the hidden layers of the hypernetwork F.
        core_init: of F. "zero_last" (last layer zero, so that C = I at step 0), "zero_all" (all zero: only the last
            bias receives a gradient at first), "kaiming" (C is not I at step 0).
        core_input: a field of version 0.1 that files have; one choice is left.
        core_sharing: which adapted modules share one F: all, those of one name such as q_proj, or none ("layer").
        noise_embedding: e(λ): frozen Gaussian Fourier features, a learnable Linear and SiLU, or λ itself.
        noise_embedding_dim: width of e(λ); even for "fourier", unused by "raw".
        fourier_scale: standard deviation of the Fourier frequencies, in radians per unit of λ.
        rank_mask_min: for "rank_mask": directions that stay in pure noise, at most r; None means half of r.
        lora_a_init: how A starts: as init_lora_weights says, or with orthonormal rows while B is zero, so that no
            direction repeats what a masked one knows (T-LoRA's idea).
        core_knots: for "knots": how many, at equal distances from λ = 0 to λ = 1; 2 or more.
        core_bins: for "bins": the number K of equal bins of λ; r is the rank of all together, a multiple of K.
        mask_density_radius: a field of version 0.1 that files have; nothing reads it.
        noise_convention: name of λ's definition in training, e.g. "masked_share"; a source of λ with another name is
            refused. None is unknown.
        scheduler: class (`_class_name`) and configuration of the Diffusers scheduler that an adapter was trained for
            which predicts something else than its base. None: whatever samples the base.
        strength: of the update as a function of λ: StrengthSchedule([(λ, strength), …]), or its points. None is 1.

    Raises:
        ValueError: a field or choice that does not exist, a number out of range, or a LoRA option that has no meaning
            for an update that depends on λ; the message names the field.
    """

    core_type: str = "hypernetwork"
    core_scale: float = 0.1
    core_hidden_dims: tuple[int, ...] = (256, 512)
    core_init: Literal["zero_last", "kaiming", "zero_all"] = "zero_last"
    core_input: Literal["noise_level"] = "noise_level"
    core_sharing: Literal["global", "module_type", "layer"] = "global"
    noise_embedding: Literal["fourier", "mlp", "raw"] = "fourier"
    noise_embedding_dim: int = 64
    fourier_scale: float = 16.0
    rank_mask_min: int | None = None
    lora_a_init: Literal["peft", "orthogonal"] = "peft"
    core_knots: int = 5
    core_bins: int = 5
    mask_density_radius: int = 4
    noise_convention: str | None = None
    scheduler: dict[str, Any] | None = None
    strength: StrengthSchedule | list[list[float]] | None = None

    assumes_convention = False
    """No field: True if `noise_convention` is only the definition of the model's default source."""

    def __new__(cls, *args: Any, **given: Any) -> NaraConfig:
        # PEFT leaves unknown fields of a file out with a warning: another adapter than the one that was saved
        known = {own.name for own in fields(cls)}
        if unknown := [
            name for name, value in given.items() if name not in known and not is_idle(name, value)
        ]:
            raise ValueError(
                f"NaraConfig has no field {', '.join(map(repr, unknown))}: remove it, or, if a file has it, update "
                "nara-diffusion and PEFT, or save the adapter again with these."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NaraPeftType.NARA  # type: ignore[assignment]
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        check_core_type(self.core_type)
        self._check_choices()
        self._check_numbers()
        self._check_masks()
        if self.strength is not None:
            self._check_strength(self.strength)
        if self.reads_core:
            self._check_lora_fields()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, subfolder: Any = None, **kwargs: Any
    ) -> Any:
        """As PEFT's; a refused file is named."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            where = os.path.join(pretrained_model_name_or_path, subfolder or "")
            if where in str(error):
                raise
            raise ValueError(f"The configuration in '{where}' is refused: {error}") from error

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As PEFT's, but atomic: adapter_config.json is replaced as a whole or not at all."""
        with atomic_write_files(Path(save_directory)) as partial:
            super().save_pretrained(str(partial), **kwargs)

    @property
    def reads_core(self) -> bool:
        """Whether its layers read a C: one that is not I, or that is scaled by a strength."""
        return self.core_type != "identity" or self.strength is not None

    def _refuse(self, name: str, expected: str) -> None:
        raise ValueError(f"{name} is {getattr(self, name)!r}{expected}")

    def _check_choices(self) -> None:
        for name, (choices, readers) in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                self._refuse(name, f": choose one of {', '.join(map(repr, choices))}.")
            if self.core_type in set(BUILT_IN) - set(readers) and value != choices[0]:
                self._refuse(
                    name,
                    f", which core_type {self.core_type!r} doesn't read: leave it at {choices[0]!r}, or use core_type "
                    f"{' or '.join(map(repr, readers))}.",
                )

    def _check_numbers(self) -> None:
        widths = self.core_hidden_dims if isinstance(self.core_hidden_dims, (list, tuple)) else ()
        if not widths or not all(map(_is_size, widths)):
            self._refuse("core_hidden_dims", ": pass one positive integer a hidden layer.")
        self.core_hidden_dims = tuple(widths)  # JSON has a list
        for name in _SIZES:
            if not _is_size(getattr(self, name)):
                self._refuse(name, ": pass a positive integer.")
        for name in _SCALES:
            if not is_number(getattr(self, name)) or getattr(self, name) <= 0:
                self._refuse(name, ": pass a finite number greater than 0.")
        if not is_number(self.lora_alpha):
            self._refuse("lora_alpha", ": pass a finite number.")
        for name, is_right in (("rank_pattern", _is_size), ("alpha_pattern", is_number)):
            pattern = getattr(self, name)
            if not isinstance(pattern, dict) or not all(map(is_right, pattern.values())):
                self._refuse(
                    name,
                    ": pass {name of a module: its positive integer rank, or its finite alpha}.",
                )
        if self.noise_embedding == "fourier" and self.noise_embedding_dim % 2:
            self._refuse(
                "noise_embedding_dim",
                ": Fourier features are sine and cosine pairs, so pass an even number.",
            )
        if self.core_type == "knots" and self.core_knots < 2:
            self._refuse("core_knots", ": interpolation needs one at either end, so 2 or more.")
        if self.scheduler is not None and not (
            isinstance(self.scheduler, dict) and "_class_name" in self.scheduler
        ):
            self._refuse("scheduler", ": pass a scheduler's configuration with its _class_name.")

    def _check_masks(self) -> None:
        ranks = {self.r, *self.rank_pattern.values()}  # type: ignore[union-attr]
        least = self.rank_mask_min
        if least is not None and not (
            self.core_type == "rank_mask" and _is_size(least) and least <= min(ranks)
        ):
            self._refuse(
                "rank_mask_min",
                f", with core_type={self.core_type!r} and r={min(ranks)}: it is for core_type='rank_mask', an integer "
                "from 1 to r, or None for half of r.",
            )
        uneven = sorted(
            rank for rank in ranks if self.core_type == "bins" and rank % self.core_bins
        )
        if uneven:
            raise ValueError(
                f"r is {uneven[0]}, which {self.core_bins} bins cannot share evenly: with core_type='bins', r is the "
                "rank of all bins together, so pass core_bins times the rank of one."
            )

    def _check_strength(self, given: Any) -> None:
        try:
            self.strength = (
                given if isinstance(given, StrengthSchedule) else StrengthSchedule(given)
            ).as_lists()
        except ValueError as error:
            self._refuse("strength", f": {error}")
        for name in unscaled_fields(self):
            raise ValueError(
                f"strength depends on λ, but would not reach what {name}={getattr(self, name)!r} changes in the model: "
                "remove one of the two."
            )

    def _check_lora_fields(self) -> None:
        for name in _REFUSED:
            value = getattr(self, name, None)
            if value or isinstance(
                value, dict
            ):  # of which PEFT makes an option that is on, empty or not
                raise ValueError(
                    f"NaRA does not support {name}, by which PEFT computes the update without C(λ): remove it, or use "
                    "core_type='identity' without a strength."
                )
        start = self.init_lora_weights
        if self.lora_a_init != "peft" and (self.core_type == "identity" or start is not True):
            self._refuse(
                "lora_a_init",
                f", with core_type={self.core_type!r} and init_lora_weights={start!r}: it needs a core, and "
                "init_lora_weights=True.",
            )
        if isinstance(start, bool) or start == "gaussian" or self.core_type == "identity":
            return
        if not re.fullmatch(r"pissa(_niter_\d+)?|olora|orthogonal", str(start)):
            raise ValueError(
                f"NaRA does not support init_lora_weights={start!r}: use True, False, 'gaussian', 'pissa', "
                "'pissa_niter_N', 'olora' or 'orthogonal'."
            )
        if (
            self.core_type not in ("hypernetwork", "constant", "knots")
            or self.core_init == "kaiming"
        ):
            raise ValueError(
                f"init_lora_weights={start!r} needs C = I at step 0, which core_type={self.core_type!r} with core_init="
                f"{self.core_init!r} does not promise: use init_lora_weights=True."
            )


def changes_base(start: Any) -> bool:
    """Whether `init_lora_weights` replaces the base weights: by W − s·B·A, or by LoftQ's quantised ones."""
    return str(start).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))


def unscaled_fields(config: LoraConfig) -> list[str]:
    """The options of a LoRA by which it changes the model outside of s · B · C · A, where no strength would reach."""
    names = ("bias", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters")
    changed = [
        name for name in names if getattr(config, name, None) not in (None, False, "none", [])
    ]
    return [*changed, "init_lora_weights"] if changes_base(config.init_lora_weights) else changed


def _is_size(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def is_idle(name: str, value: object) -> bool:
    """Return True if a field that `NaraConfig` lacks has no meaning for the adapter."""
    return not value or _GONE.get(name) == value
