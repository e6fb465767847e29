"""Extend PEFT's LoraConfig with the options of the noise-conditioned core.

The last section lists the LoRA options that a strength over λ can't scale, because they change the
model outside s · B · C(λ) · A.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from numbers import Integral
from typing import Any, Literal

from peft import LoraConfig

from nara_diffusion.cores.registry import BUILT_IN, check_core_type
from nara_diffusion.noise.level import is_number
from nara_diffusion.noise.strength_schedule import StrengthSchedule

_CHOICES: dict[str, tuple[tuple[str | int | None, ...], tuple[str, ...]]] = {
    "bias": (("none", "all", "lora_only"), BUILT_IN),
    "core_init": (("zero_last", "kaiming", "zero_all"), ("hypernetwork", "constant")),
    "core_input": (("noise_level",), BUILT_IN),
    "core_sharing": (("global", "module_type", "layer"), BUILT_IN),
    "lora_a_init": (("peft", "orthogonal", "residual", "residual_base"), BUILT_IN),
    "mask_density_radius": ((4,), BUILT_IN),
    "noise_embedding": (("fourier", "mlp", "raw"), ("hypernetwork",)),
    "noise_level_per": ((None, "sample", "part"), BUILT_IN),
}
"""{field: (its choices, the built-in core types that read it)}. Custom cores may read all."""
_GONE = {"core_normalization": "none", "noise_scale": "linear", "layer_embedding_dim": 16}
"""{removed field of version 0.1: its default there}. Files with that default load as before."""
OTHER_PREDICTION = (
    "an adapter of version 0.1 or 0.2 that has one predicts something other than its base does. Use "
    "it with that version, or train one that predicts what its base does (docs/conversion.md)."
)
ABSENT = {"noise_level_per": "sample"}
"""{field that files of version 0.2 lack: its value for them}. Later files have it, even as None."""
_REFUSED = (
    "alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "kasa_config", "layer_replication",
    "megatron_config", "monteclora_config", "target_parameters", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
"""LoRA options that make PEFT compute the update without C(λ)."""
_UNSCALED = ("bias", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters")
"""LoRA options that change the model outside s · B · C · A, unless their value is in `_UNSET`."""
_UNSET = (None, False, "none", [])


def _is_size(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def _ranks(config: LoraConfig) -> list[int]:
    return [config.r, *(config.rank_pattern or {}).values()]


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("r", "noise_embedding_dim", "core_bins", "core_knots", "rank_mask_step"),
        (_is_size, "a positive integer"),
    ),
    **dict.fromkeys(
        ("core_scale", "fourier_scale", "rank_mask_exponent"),
        (lambda value: is_number(value) and value > 0, "a finite number greater than 0"),
    ),
    **dict.fromkeys(
        ("fan_in_fan_out", "lora_bias", "use_dora", "use_rslora"),
        (lambda value: value is None or isinstance(value, bool), "True or False"),
    ),
    "rank_mask_min": (lambda rank: rank is None or _is_size(rank), "a positive integer or None"),
    "lora_alpha": (is_number, "a finite number"),
    "lora_dropout": (
        lambda value: is_number(value) and 0 <= value < 1,
        "a number from 0 to less than 1",
    ),
    "core_hidden_dims": (
        lambda dims: isinstance(dims, (list, tuple)) and all(map(_is_size, dims)) and len(dims) > 0,
        "one positive integer for each hidden layer",
    ),
    "modules_to_save": (lambda names: not isinstance(names, str), "a list"),
    "noise_convention": (lambda name: name is None or isinstance(name, str), "a string or None"),
    "rank_pattern": (
        lambda ranks: isinstance(ranks, dict) and all(map(_is_size, ranks.values())),
        "{name of a module: its positive integer rank}",
    ),
    "alpha_pattern": (
        lambda alphas: isinstance(alphas, dict) and all(map(is_number, alphas.values())),
        "{name of a module: its finite alpha}",
    ),
    "few_steps": (
        lambda steps: steps is None or (isinstance(steps, dict) and "num_inference_steps" in steps),
        "sampling settings with their num_inference_steps",
    ),
}
"""{field: (whether its value is valid, what to pass)}."""
_RULES: tuple[tuple[str, Callable[[NaraConfig], object], str], ...] = (
    (
        "noise_embedding_dim",
        lambda c: c.noise_embedding != "fourier" or c.noise_embedding_dim % 2 == 0,
        "an even number, since each frequency has a sine and a cosine",
    ),
    (
        "core_knots",
        lambda c: c.core_type != "knots" or c.core_knots > 1,
        "2 or more, since λ = 0 and λ = 1 have a knot each",
    ),
    (
        "core_sharing",
        lambda c: c.core_type != "film" or c.core_sharing == "layer",
        "'layer', since core_type 'film' has one core a layer",
    ),
    (
        "core_bins",
        lambda c: c.core_type != "bins" or not any(rank % c.core_bins for rank in _ranks(c)),
        "a divisor of r and of the ranks in rank_pattern, which all bins have together",
    ),
    (
        "rank_mask_min",
        lambda c: (
            c.rank_mask_min is None
            or (c.core_type == "rank_mask" and c.rank_mask_min <= min(_ranks(c)))
        ),
        "an integer from 1 to r for core_type='rank_mask', or None, which is half of r",
    ),
    (
        "rank_mask_step",
        lambda c: (
            c.core_type != "rank_mask"
            or not any(rank % c.rank_mask_step for rank in {*_ranks(c), c.rank_mask_min or 0})
        ),
        "a divisor of r and of rank_mask_min",
    ),
    (
        "lora_a_init",
        lambda c: (
            (c.lora_a_init == "peft" or not c.reads_core)
            or (c.core_type != "identity" and c.init_lora_weights is True)
        ),
        "'peft', or a core_type with a core, and init_lora_weights=True",
    ),
    (
        "lora_a_init",
        lambda c: (
            not (c.has_residual and c.reads_core)
            or (
                (c.core_type == "rank_mask" and c.rank_mask_step == 2)
                and not (c.use_dora or c.lora_bias)
            )
        ),
        "it with core_type='rank_mask' and rank_mask_step=2, without use_dora and lora_bias",
    ),
    (
        "init_lora_weights",
        lambda c: (
            (not c.reads_core or c.core_type == "identity")
            or (isinstance(c.init_lora_weights, bool) or c.init_lora_weights == "gaussian")
            or re.fullmatch(r"pissa(_niter_\d+)?|olora|orthogonal", str(c.init_lora_weights))
        ),
        "True, False, 'gaussian', 'pissa', 'pissa_niter_N', 'olora' or 'orthogonal'",
    ),
    (
        "init_lora_weights",
        lambda c: (
            (not c.reads_core or c.core_type == "identity")
            or c.init_lora_weights in (True, False, "gaussian")
            or (c.core_type in ("hypernetwork", "constant", "knots") and c.core_init != "kaiming")
        ),
        "True, since it needs C = I at step 0, and this core may start with a different C",
    ),
)
"""(field, whether its value fits the others, what to pass)."""


class NaraPeftType(str, Enum):
    """The entry for NaRA among PEFT's types."""

    NARA = "NARA"


@dataclass
class NaraConfig(LoraConfig):
    """The configuration of NaRA, ΔW(λ) = s · B · C(λ) · A with C(λ) = I + η F(e(λ)).

    See section 4 of arXiv 2605.29716. All fields of `peft.LoraConfig` keep their meaning;
    `use_dora=True` is NaRA-DoRA. With `rank_pattern`, all layers share one core of the largest
    rank, and a layer of rank r' reads the leading block C(λ)[:r', :r'].

    Args:
        core_type: the kind of core. "hypernetwork" is NaRA. "constant" is NaRA-C, with one
            learnable C and no noise input. "identity" is plain LoRA with C = I, which needs no λ
            and can be merged. "rank_mask" is T-LoRA, with fewer of the r directions on for noisier
            inputs. "bins" is Multi-LoRA, with r / core_bins directions for each bin of λ. "knots"
            interpolates between learned matrices at core_knots values of λ (best with core_sharing
            "layer"). "film" is Tc-LoRA, diag(γ(λ)) and an added vector β(λ), for linear layers and
            with core_sharing "layer" only. The name of a registered custom core is also accepted.
        core_scale: η in C = I + η F(e(λ)), greater than 0.
        core_hidden_dims: the widths of the hidden layers of the hypernetwork F.
        core_init: the initialisation of F. With "zero_last", the last layer is zero, so C = I at
            step 0. With "zero_all", all layers are zero, and at first only the last bias receives a
            gradient. With "kaiming", C is not I at step 0.
        core_input: kept for files of version 0.1; only one choice is left.
        core_sharing: which adapted modules share one F, either all ("global"), all with the same
            name such as q_proj ("module_type"), or none ("layer").
        noise_embedding: the embedding e(λ), which is frozen Gaussian Fourier features ("fourier"),
            a learnable Linear and SiLU ("mlp"), or λ itself ("raw").
        noise_embedding_dim: the width of e(λ). It must be even for "fourier"; "raw" ignores it.
        fourier_scale: the standard deviation of the Fourier frequencies, in radians per unit of λ.
        rank_mask_min: for "rank_mask", the number of directions that stay on in pure noise. None
            means half of r. (T-LoRA's own default is 1.)
        rank_mask_exponent: for "rank_mask", the exponent a > 0 of T-LoRA's (1 − λ)^a.
        rank_mask_step: for "rank_mask", how many directions go on and off together. It divides r
            and rank_mask_min. A T-LoRA with frozen start factors (LyCORIS) has 2.
        lora_a_init: the initialisation of A. "peft" follows init_lora_weights. "orthogonal" makes
            the rows of A orthonormal and B zero, so that no direction repeats what a masked
            direction has learned (as in T-LoRA). "residual" is T-LoRA's own start, from singular
            vectors of a random matrix, whose product is subtracted; "residual_base" takes those of
            the base weight, as LyCORIS does. Both need core_type="rank_mask" and rank_mask_step=2,
            and every second direction is fixed: r is twice T-LoRA's rank.
        core_knots: for "knots", the number of knots, 2 or more, equally spaced from λ = 0 to λ = 1.
        core_bins: for "bins", the number of equal bins of λ. It must divide r.
        mask_density_radius: kept for files of version 0.1; nothing reads it.
        noise_convention: the name of the definition of λ in training, such as "masked_share". A
            source of λ with another definition raises an error. None means unknown.
        noise_level_per: whether training used one λ per "sample" or per "part" of a sample (a frame
            or a block). The train scripts set this field; set it yourself for your own loop. A
            forward of the other kind warns once. None means unknown; a file without this field
            (version 0.2) means "sample".
        scheduler: kept for files of versions 0.1 and 0.2; only None is left.
        few_steps: the sampling settings of a few-step adapter, which are "num_inference_steps",
            "guidance_scale", "timesteps", the scheduler's "timestep_spacing" and "shift_terminal",
            and the line of code that sets its "scheduler". None means the settings of the base.
        strength: the strength of the update over λ, StrengthSchedule([(λ, strength), …]) or its
            points. None means 1.

    Raises:
        ValueError: a field or choice does not exist, a number is out of range, or a LoRA option is
            undefined for an update that depends on λ. The message names the field.
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
    rank_mask_exponent: float = 1.0
    rank_mask_step: int = 1
    lora_a_init: Literal["peft", "orthogonal", "residual", "residual_base"] = "peft"
    core_knots: int = 5
    core_bins: int = 5
    mask_density_radius: int = 4
    noise_convention: str | None = None
    noise_level_per: Literal["sample", "part"] | None = None
    scheduler: None = None
    few_steps: dict[str, Any] | None = None
    strength: StrengthSchedule | list[list[float]] | None = None

    assumes_convention = False
    """Not a field. True if `noise_convention` is only the definition of the default source."""

    def __new__(cls, *args: object, **given: object) -> NaraConfig:
        # PEFT only warns of unknown fields in a file and drops them, which changes the adapter
        names = {field.name for field in fields(cls)}
        unknown = [name for name in given if name not in names and not is_idle(name, given[name])]
        if unknown:
            raise ValueError(
                f"NaraConfig has no field {', '.join(map(repr, unknown))}. Remove it. If it comes from a file, update "
                "nara-diffusion and PEFT, or save the adapter again with the installed versions."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.scheduler is not None:
            raise ValueError(f"NaraConfig can't have a scheduler any more: {OTHER_PREDICTION}")
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        check_core_type(self.core_type)
        self._check_fields()
        super().__post_init__()
        self.peft_type = NaraPeftType.NARA  # type: ignore[assignment]
        if self.strength is not None:
            points: Any = getattr(self.strength, "points", self.strength)
            try:
                schedule = StrengthSchedule(points)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"strength is {self.strength!r}, not a StrengthSchedule or its points: {error}"
                ) from error
            self.strength = schedule.as_lists()
            for name in unscaled_fields(self):
                raise ValueError(
                    f"strength depends on λ, but can't scale what {name}={getattr(self, name)!r} changes "
                    "in the model: remove one of the two."
                )
        self._check_together()

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read the fields as PEFT's method does, and add the fields that version 0.2 lacked."""
        return ABSENT | super().from_json_file(path_json_file, **kwargs)

    @property
    def reads_core(self) -> bool:
        """Return whether the layers read C, because C is not I or because a strength scales it."""
        return self.core_type != "identity" or self.strength is not None

    @property
    def has_residual(self) -> bool:
        """Return whether every second direction is fixed, so that ΔW = 0 at the start."""
        return self.lora_a_init.startswith("residual")

    def _check_fields(self) -> None:
        for name, (choices, readers) in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"{name} is {value!r}: choose one of {', '.join(map(repr, choices))}."
                )
            is_read = self.core_type not in BUILT_IN or self.core_type in readers
            if not is_read and value != choices[0]:
                raise ValueError(
                    f"{name} is {value!r}, which core_type {self.core_type!r} doesn't read: leave it "
                    f"at {choices[0]!r}, or use core_type {' or '.join(map(repr, readers))}."
                )
        for name, (is_valid, expected) in _VALUES.items():
            value = getattr(self, name)
            if not is_valid(value):
                raise ValueError(f"{name} is {value!r}: pass {expected}.")
        self.core_hidden_dims = tuple(self.core_hidden_dims)  # JSON gives a list

    def _check_together(self) -> None:
        for name, fits, expected in _RULES:
            if not fits(self):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, with core_type={self.core_type!r} and "
                    f"r={self.r}: pass {expected}."
                )
        for name in _REFUSED if self.reads_core else ():
            value = getattr(self, name, None)
            if value or isinstance(value, dict):  # for PEFT, an empty dict sets it too
                raise ValueError(
                    f"NaRA does not support {name}, since PEFT then computes the update without C(λ): "
                    "remove it, or use core_type='identity' without a strength."
                )


def is_idle(name: str, value: object) -> bool:
    """Return whether a field that `NaraConfig` does not have has no effect on the adapter."""
    return not value or _GONE.get(name) == value


def changes_base(start: object) -> bool:
    """Return whether `init_lora_weights` changes the base to W − s·B·A or to quantised weights."""
    return str(start).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))


def unscaled_fields(config: LoraConfig) -> list[str]:
    """Return the LoRA options that change the model in ways that a strength over λ can't scale."""
    changed = [name for name in _UNSCALED if getattr(config, name, None) not in _UNSET]
    if changes_base(config.init_lora_weights):
        changed.append("init_lora_weights")
    return changed
