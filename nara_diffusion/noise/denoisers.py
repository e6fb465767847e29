"""Who tells λ to a model: the timestep of its class of denoisers, or a source that users register or set.

What the pipelines of Diffusers pass to each class as its timestep was read off their sources. A class is looked up by
its name, then by those of its base classes; `register_denoiser` adds one. Where layers see b · k rows, k consecutive
ones a sample, while the model sees b samples, the class is declared so (`sample_major`): frames of a video, timesteps
of tokens or frames, tokens of a text inside an embedder. It is never guessed from sizes.

An adapter is saved with the name of the definition of λ that it was trained with (`noise_convention`), and is refused
by a model whose source has another. Registering a source under that name says how to read λ for such an adapter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .level import MASKED_SHARE, NoiseSource, as_tensor, core_holders
from .timesteps import CONVENTIONS, COUNTED, LARGEST_LOG_SIGMA, TimestepNoise


@dataclass
class Denoiser(TimestepNoise):
    """The default source of λ of a class of denoisers, until a user sets one; and how its layers see the batch.

    N is that of the present schedulers. A small discrete timestep might be ¼ ln σ of an EDM schedule instead:

        discrete   t in [0, N], N = 1000: whole, fractional with Karras' sigmas, below 3.5 in the last steps alone
        EDM        t = ¼ ln σ: within ±3.5 throughout, and for σ from 80 to 1, the first steps, from 1.1 to 0

    Confused with the other, the first steps of an EDM pipeline would run at λ = 0.001. So it is refused, unless a
    present scheduler is discrete, or it is a whole number and there is none.

    Attributes:
        sample_major: whether layers may see b · k rows, k consecutive ones a sample, where the model sees b. Otherwise
            another number of rows than the batch's is an error.
        one_level: whether the first axis that layers see is not the samples': a batch of unequal λ is refused.
        schedulers: of the pipelines that loaded the adapters; see `under`.
    """

    sample_major: bool = False
    one_level: bool = False
    schedulers: Sequence[Any] = ()

    def read_as(self, convention: str | None) -> Denoiser:
        """The same for adapters with this `convention`: models of discrete schedules are trained in EDM's terms too, or
        converted to a rectified flow."""
        meanings = {"edm": "edm", "flow": "sigma_1000"} if self.meaning == "discrete" else {}
        return replace(self, meaning=meanings.get(convention or "", self.meaning))

    def under(self, schedulers: Sequence[Any]) -> Denoiser:
        """The same while these are the schedulers of the pipelines, whose N have to agree where λ depends on it."""
        lengths = {
            length for one in schedulers if (length := one.config.get("num_train_timesteps"))
        }
        if self.meaning not in COUNTED or not lengths:
            return replace(self, schedulers=schedulers)
        if len(lengths) > 1:
            raise ValueError(
                f"λ = {self.argument} / N can't be read: the schedulers of the pipelines that loaded the adapters have "
                f"{' and '.join(f'N = {length}' for length in sorted(lengths))}: say which, "
                f"set_noise_source(model, TimestepNoise({self.meaning!r}, num_train_timesteps=N))."
            )
        return replace(self, schedulers=schedulers, num_train_timesteps=lengths.pop())

    def noise_level(self, timestep: float | Tensor) -> Tensor:
        """λ of a timestep; of the scheduler's own where a pipeline rounded it to half precision."""
        given = [getattr(one, "timesteps", None) for one in self.schedulers]
        schedules = [each.flatten() for each in given if isinstance(each, Tensor)]
        if (
            schedules
            and isinstance(timestep, Tensor)
            and timestep.dtype in (torch.bfloat16, torch.float16)
        ):
            device = timestep.device
            is_async = device.type != "cpu"  # a copy to the CPU has to be waited for
            there = [each.to(device, torch.float32, non_blocking=is_async) for each in schedules]
            timestep = self.unrounded(timestep, torch.cat(there))
        return super().noise_level(timestep)

    def check(self, timestep: float | Tensor) -> None:
        t = as_tensor(timestep).detach()
        is_large = 4 * t.float().abs() >= LARGEST_LOG_SIGMA
        if self.meaning != "discrete" or not t.is_floating_point() or bool(is_large.any()):
            return
        continuous = [type(one).__name__ for one in self.schedulers if passes_log_sigma(one)]
        if not continuous and (self.schedulers or bool((t == t.round()).all())):
            return
        who = (
            f"{continuous[0]} passes ¼ ln σ"
            if continuous
            else "it may be ¼ ln σ of an EDM schedule"
        )
        raise ValueError(
            f"{self.argument} is {t.tolist()}, which as 'discrete' would be almost no noise, but {who}: say what this "
            'pipeline means by it, once, set_noise_source(model, TimestepNoise("edm")) or TimestepNoise("discrete").'
        )


def passes_log_sigma(scheduler: Any) -> bool:
    """Whether a scheduler of Diffusers hands ¼ ln σ to the denoiser as its timestep."""
    config = scheduler.config
    continuous = (
        config.get("timestep_type") == "continuous"
        and config.get("prediction_type") == "v_prediction"
    )
    return type(scheduler).__name__.startswith("EDM") or continuous


_PLAIN = {
    "discrete": """UNet2DConditionModel AudioLDM2UNet2DConditionModel Kandinsky3UNet UNetControlNetXSModel
        CogView3PlusTransformer2DModel CogView4Transformer2DModel DiTTransformer2DModel GlmImageTransformer2DModel
        PixArtTransformer2DModel PriorTransformer""",
    "sigma_1000": """BriaFiboTransformer2DModel BriaTransformer2DModel ChronoEditTransformer3DModel DreamLiteUNetModel
        HeliosTransformer3DModel HunyuanImageTransformer2DModel HunyuanVideo15Transformer3DModel
        HunyuanVideoFramepackTransformer3DModel HunyuanVideoTransformer3DModel JoyImageEditTransformer3DModel
        Kandinsky5Transformer3DModel Kandinsky6SRTransformer3DModel Kandinsky6Transformer3DModel
        MotifVideoTransformer3DModel SD3Transformer2DModel SanaTransformer2DModel WanVACETransformer3DModel""",
    "sigma": """AceStepTransformer1DModel AuraFlowTransformer2DModel BriaFibo2Transformer2DModel
        ChromaTransformer2DModel Flux2Transformer2DModel Flux3Transformer2DModel FluxTransformer2DModel
        LongCatAudioDiTTransformer LongCatImageTransformer2DModel NucleusMoEImageTransformer2DModel
        OvisImageTransformer2DModel PRXTransformer2DModel QwenImage21Transformer2DModel QwenImageTransformer2DModel
        StableAudio3DiTModel""",
    "data": """Ideogram4Transformer2DModel Lumina2Transformer2DModel LuminaNextDiT2DModel
        MiniMaxMusic3Transformer1DModel OmniGenTransformer2DModel""",
    "angle": "StableAudioDiTModel",
}
"""Meaning of `timestep` → classes whose layers see one row a sample."""

_SAMPLE_MAJOR = {
    "discrete": """UNetMotionModel UNet3DConditionModel I2VGenXLUNet AllegroTransformer3DModel
        CogVideoXTransformer3DModel ConsisIDTransformer3DModel HunyuanDiT2DModel LatteTransformer3DModel""",
    "sigma_1000": """AnyFlowFARTransformer3DModel AnyFlowTransformer3DModel EasyAnimateTransformer3DModel
        JoyImageEditPlusTransformer3DModel LTXVideoTransformer3DModel SanaVideoTransformer3DModel
        SanaWMTransformer3DModel SkyReelsV2Transformer3DModel WanAnimateTransformer3DModel WanTransformer3DModel""",
    "sigma": "CosmosTransformer3DModel Krea2Transformer2DModel SanaWMLTX2RefinerTransformer3DModel",
    "data_1000": "MochiTransformer3DModel",
    "edm": "UNetSpatioTemporalConditionModel",
}
"""Meaning of `timestep` → classes whose layers may see k rows a sample."""

_DENOISERS: dict[str, Denoiser] = {
    **{name: Denoiser(meaning) for meaning, names in _PLAIN.items() for name in names.split()},
    **{
        name: Denoiser(meaning, sample_major=True)
        for meaning, names in _SAMPLE_MAJOR.items()
        for name in names.split()
    },
    "StableCascadeUNet": Denoiser("ratio", argument="timestep_ratio"),
    "WuerstchenDiffNeXt": Denoiser("ratio", argument="r"),
    "WuerstchenPrior": Denoiser("ratio", argument="r"),
    "Cosmos3OmniTransformer": Denoiser(
        "sigma_1000",
        argument="vision_timesteps",
        also=("sound_timesteps", "action_timesteps"),
        packed=True,
    ),
    "ErnieImageTransformer2DModel": Denoiser(
        "sigma_1000", one_level=True
    ),  # tokens first, then samples
    "HiDreamImageTransformer2DModel": Denoiser("sigma_1000", argument="timesteps"),
    "LTX2VideoTransformer3DModel": Denoiser(
        "sigma_1000", sample_major=True, also=("audio_timestep",)
    ),
    "WanAnimate2Transformer3DModel": Denoiser(
        "sigma_1000", pinned=("kv_cache_mode", "extract", 1.0)
    ),
    "MiniMaxH3Transformer3DModel": Denoiser(
        "data", packed=True
    ),  # the distinct timesteps of its tokens
    "RFD4ProteinaTransformer": Denoiser(
        "data", argument="bb_ca_time", also=("local_latents_time",)
    ),
    "ZImageTransformer2DModel": Denoiser("data", argument="t"),
}


def register_denoiser(
    class_name: str,
    meaning: str = "discrete",
    *,
    argument: str = "timestep",
    sample_major: bool = False,
) -> None:
    """Declare what the timestep of a class of denoisers means, before adapters are added to one.

        register_denoiser("MyTransformer2DModel", "sigma")

    Args: see `TimestepNoise` for its shapes and units, and `Denoiser`.

    Raises:
        ValueError: an unknown meaning, or the class is declared otherwise already.
    """
    denoiser = Denoiser(meaning, argument=argument, sample_major=sample_major)
    if _DENOISERS.setdefault(class_name, denoiser) != denoiser:
        raise ValueError(
            f"{class_name} is declared already, as {_DENOISERS[class_name]}: give a model that means something else a "
            "source of its own, set_noise_source(model, TimestepNoise(meaning))."
        )


def denoiser_of(model: nn.Module) -> Denoiser | None:
    """The entry of the class of `model`; None if no such denoiser was declared.

    Some classes serve models that mean different things, which their configuration tells apart.
    """
    name = next(
        (kind.__name__ for kind in type(model).__mro__ if kind.__name__ in _DENOISERS), None
    )
    if name is None:
        return None
    denoiser: Denoiser = _DENOISERS[name]
    config: Any = getattr(model, "config", None)
    if (
        name == "SanaTransformer2DModel"
    ):  # SanaSprint, which alone is conditioned on guidance, is given σ
        changes = (
            {"meaning": "sigma"} if config.guidance_embeds else {"scale": config.timestep_scale}
        )
        return replace(denoiser, **changes)
    if (
        name == "CosmosTransformer3DModel" and config.extra_pos_embed_type == "learnable"
    ):  # Cosmos 1: ¼ ln σ of EDM
        return replace(denoiser, meaning="edm")
    if name == "SanaWMLTX2RefinerTransformer3DModel":  # it is given σ · timestep_scale_multiplier
        return replace(denoiser, scale=config.timestep_scale_multiplier)
    return denoiser


_TIME_LAYERS = re.compile(
    r"(.*\.)?(time_embedding\.linear_\d|time_emb_proj|time(step)?_embedder\.linear_\d|t_embedder\.mlp\.\d|time_proj"
    r"|norm\w*\.linear|\w*mod(ulation\w*)?\.(linear|\d))"
)


def time_layers(model: nn.Module) -> list[str]:
    """The names of the linear layers of a denoiser, of those without an adapter, that read the timestep's embedding."""
    named = model.named_modules()
    return [
        name for name, each in named if isinstance(each, nn.Linear) and _TIME_LAYERS.fullmatch(name)
    ]


# ---------------------------------------------------------------------- sources that users register or set


_sources: dict[str, NoiseSource] = {}


def register_noise_source(source: NoiseSource) -> None:
    """Use `source` for every model whose first adapter has the `noise_convention` of the source.

        register_noise_source(ShareOfFrames())  # whose `convention` is "share_of_frames"
        pipe.load_nara_weights("adapter")       # trained with NaraConfig(noise_convention="share_of_frames")

    It is a callable (module, args, kwargs) → λ (1,) or (b,) in [0, 1]. It holds for models that are
    adapted afterwards, and takes precedence over the default of their class. All of them share the one source.

    Raises:
        ValueError: the source names no convention, one that this package defines, or one that another source tells.
    """
    name = getattr(source, "convention", None)
    if not (isinstance(name, str) and name and callable(source)):
        raise ValueError(
            f"{source!r} is no source of λ: expected a callable (module, args, kwargs) → λ (1,) or (b,) whose "
            "attribute `convention` names its definition."
        )
    if name in (*CONVENTIONS, MASKED_SHARE):
        raise ValueError(
            f"λ as {name!r} is defined by this package: name your definition otherwise, or give one model a source of "
            "its own, set_noise_source(model, source)."
        )
    if _sources.setdefault(name, source) is not source:
        raise ValueError(
            f"λ as {name!r} has a source already, {_sources[name]!r}: name your definition otherwise."
        )


def first_source(denoiser: Denoiser | None, convention: str | None) -> NoiseSource | None:
    """The default source of λ of a model whose first adapter defines λ so; None if there is none."""
    if convention in _sources:
        return _sources[convention]
    return None if denoiser is None else denoiser.read_as(convention)


def set_noise_source(model: nn.Module, source: NoiseSource | None) -> None:
    """Read λ (1,) or (b,) from `source` at each forward of `model` outside of `noise_level(…)`; None removes it.

    Raises:
        ValueError: `model` holds no NaRA adapter, or one was trained with another convention of λ.
    """
    holders = core_holders(model)
    for holder in holders:
        holder.finder.check_source(source)
    for holder in holders:
        holder.finder.set_source(source)
