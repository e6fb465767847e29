"""Map λ of the samples to C for the rows that a layer sees, and hold the table of denoisers.

    one for all     λ (1,)   C (1, r, r)   for every row
    one per sample  λ (b,)   C (b, r, r)   row i of a layer's input (b, …) is sample i
    b · k rows      λ (b,)   C (b, r, r)   rows i·k to i·k + k − 1 are sample i: frames, tokens
    guidance        λ (b,)   λ (2b,)       the samples, then the same samples again
    k parts         λ (b, k)               parts of a sample's positions: see `parts`

Shapes do not show what a row is: the number of tokens may equal the batch size by chance. It is
therefore declared for each model (`ModelRows`) and determined for each layer (`row_kind_of`). If
rows cannot be assigned to samples, different values of λ raise an error, while one value for the
whole batch works. Only in this case are the values read on the host, to compare them.

The table of denoisers says what the `timestep` of each model class means, and what its layers see.
The table follows the source code of Diffusers' pipelines. A class is looked up by its name, then by
the names of its base classes. `register_denoiser` adds a class. In some classes the model sees b
samples, but its layers see b · k rows, with k consecutive rows for each sample. These rows may be
frames of a video, timesteps of tokens or frames, or text tokens inside an embedder. Such classes
are declared `sample_major`, because sizes do not show it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from peft.tuners.lora.layer import Embedding
from torch import Tensor, nn

from .level import arguments_of, outer_modules
from .parts import FrameTokens, Parts, RowKind, parts_of, positions_of
from .timesteps import Denoiser

Repetition = Literal["tiled", "interleaved"]
"""The order of rows that are repeated k times: "tiled" abab, "interleaved" aabb."""
REPETITIONS: tuple[Repetition, ...] = ("tiled", "interleaved")


def repeat_rows(values: Tensor, times: int, order: Repetition) -> Tensor:
    """Return `values` (b, …) of samples, repeated for b · `times` rows, as (b · times, …)."""
    if order == "interleaved":
        return values.repeat_interleave(times, dim=0)
    return torch.cat([values] * times)


def guidance_rows(values: Tensor) -> Tensor:
    """Return `values` (b, …) of samples, repeated for the 2b rows of classifier-free guidance.

    The conditional rows come first. Both rows of a sample have the same λ.
    """
    return repeat_rows(values, 2, "tiled")


def core_of_rows(
    core: Tensor, x: Tensor, *, kind: RowKind, sample_major: bool, layer_name: str
) -> Tensor:
    """Return C for each row of a layer's input.

    Args:
        core: C of the samples, (b, r, r), or (1, r, r) for all samples.
        x: the input of the layer, (rows, …).
        sample_major: whether the layer may see b · k rows, k consecutive rows for each sample.

    Returns:
        C (rows, r, r), or (1, r, r) if all rows have the same C.

    Raises:
        ValueError: there are different values of λ, and the rows cannot be assigned to samples.
    """
    samples, rows = core.shape[0], x.shape[0]
    if samples == 1:
        return core
    if _lacks_batch_axis(x, kind):
        refusal = _cannot_assign(
            samples,
            f"the rows that layer '{layer_name}' sees, {tuple(x.shape)}, are {kind}, not samples",
            "leave the layer out with `exclude_modules`",
        )
        return _the_only(core, refusal)
    if samples == rows:
        return core
    if rows == 0:  # an expert without tokens: A and B get gradients of zero
        return core[:1]
    if sample_major and rows % samples == 0:
        return repeat_rows(core, rows // samples, "interleaved")
    refusal = _cannot_assign(
        samples,
        f"the batch inside layer '{layer_name}' is {rows}",
        "one per row as the layer sees them (after beams, repeats or CFG)",
    )
    return _the_only(core, refusal)


def _the_only(values: Tensor, refusal: str) -> Tensor:
    """Return the first of `values` (b, …) as (1, …) after reading them to check that all are equal.

    Raises:
        ValueError: the values differ. The message is `refusal`.
    """
    if not bool((values == values[:1]).all()):
        raise ValueError(refusal)
    return values[:1]


def _lacks_batch_axis(x: Tensor, kind: RowKind) -> bool:
    if kind in ("tokens", "routed tokens"):
        return x.dim() == 2
    if kind == "positions":  # features (l, b, d), or integer ids (l, l)
        return x.dim() > (2 if x.is_floating_point() else 1)
    return False


def row_kind_of(root: nn.Module, name: str) -> RowKind:
    """Return the kind of rows that layer `name` in `root` sees, judged by the modules around it."""
    layer: nn.Module = root
    around = []
    for part in name.split("."):
        around.append(layer)
        layer = getattr(layer, part)
    if any("Experts" in type(outer).__name__ for outer in around) or ".experts." in f".{name}.":
        return "routed tokens"
    if any(hasattr(outer, "experts") for outer in around):
        return "tokens"
    if isinstance(layer, (nn.Embedding, Embedding)):
        is_position = name.endswith(("relative_attention_bias", "distance_embedding"))
        return "positions" if is_position else "samples"
    return "positions" if any(_is_length_first(outer) for outer in around) else "samples"


def _is_length_first(module: nn.Module) -> bool:
    """Return whether `module`, or an attention module directly inside it, takes (l, b, d)."""
    for each in (module, *module._modules.values()):
        is_attention = isinstance(each, nn.MultiheadAttention)
        if (each is module or is_attention) and getattr(each, "batch_first", None) is False:
            return True
    return False


@dataclass(frozen=True)
class ModelRows:
    """A description of how the layers of a model see its batch.

    Attributes:
        sample_major, one_level, frames: as in `Denoiser`.
        is_denoiser: whether the model is a denoiser, so only `frames` says what its layers see.
    """

    sample_major: bool = False
    one_level: bool = False
    is_denoiser: bool = False
    frames: FrameTokens | None = None

    @classmethod
    def of(cls, denoiser: Denoiser | None) -> ModelRows:
        """Return how the layers of a denoiser, or of any other model (None), see the batch."""
        if denoiser is None:
            return cls()
        has_one_level = denoiser.one_level or denoiser.packed
        return cls(denoiser.sample_major, has_one_level, True, denoiser.frames)

    def parts_of_forward(
        self, level: Tensor, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Parts:
        """Return the assignment of λ (b or 1, k) to the positions of a forward of the whole model.

        Raises:
            ValueError: the forward does not have b samples, or k does not divide their length.
        """
        arguments, kind = arguments_of(root, args, kwargs), type(root).__name__
        positions = None if self.frames is None else self.frames.positions(root, arguments)
        if positions is not None:
            return parts_of(level, positions, self.frames)
        if self.is_denoiser:
            raise ValueError(
                f"noise_level has shape {tuple(level.shape)}, but the layers of {kind} aren't known to see the frames "
                "of a video in order: pass one value per sample."
            )
        return parts_of(level, positions_of(arguments, kind))

    def level_of_forward(
        self, level: Tensor, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor:
        """Return λ (b,) or (1,) for a forward of the whole model that was given λ (b,).

        Raises:
            ValueError: the values of λ differ, but the layers' first axis is not the sample axis.
                Or the layers may see multiples of the batch, but the number of values is not the
                length of the first tensor, or blocks split the batch.
        """
        refusal = self._refusal(len(level), root, args, kwargs) if len(level) > 1 else None
        return level if refusal is None else _the_only(level, refusal)

    def _refusal(
        self, values: int, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> str | None:
        """Return why a forward can't have `values` different values of λ, or None if it can."""
        kind = type(root).__name__
        if self.one_level:
            return _cannot_assign(
                values,
                f"the layers of {kind} see tokens where others see samples",
                "run the samples one by one",
            )
        if not self.sample_major:
            return None
        batch = _batch_size(arguments_of(root, args, kwargs).values())
        if values != batch:
            return _cannot_assign(
                values,
                f"the batch is {batch}",
                "one per sample as the model sees them (after CFG or repeats)",
            )
        if any(_splits_batch(module) for module in outer_modules(root)):
            return _cannot_assign(
                values,
                f"blocks of {kind} run on slices of the batch (forward chunking, or FreeNoise's "
                "split inference)",
                "turn that off (chunking along dim=1 is fine)",
            )
        return None

    def level_of_part(self, level: Tensor) -> Tensor:
        """Return λ (b,) or (1,) for a part of the model that is called directly.

        Args:
            level: λ of the context, (1,), (b,) or (b, k).

        Raises:
            RuntimeError: there are several values, but layers may see several rows for each sample,
                or their first axis is not the sample axis; or k > 1.
        """
        has_parts = level.dim() == 2 and level.shape[1] > 1
        if has_parts or (len(level) > 1 and (self.sample_major or self.one_level)):
            raise RuntimeError(
                _cannot_assign(
                    level.numel(),
                    "a part of a model, called by itself, may see several rows a sample",
                    "call the whole model",
                )
            )
        return level.reshape(-1)


def _cannot_assign(values: int, reason: str, remedy: str) -> str:
    """Return the error message about rows that cannot be assigned to samples."""
    return (
        f"noise_level has {values} values, but {reason}: pass one value for the whole batch, or "
        f"{remedy}."
    )


def _batch_size(arguments: Iterable[object]) -> int | None:
    """Return the length of the first tensor that has an axis, or None if there is no such tensor."""
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.dim() > 0:
            return len(argument)
    return None


def _splits_batch(module: nn.Module) -> bool:
    """Return whether `module` runs on slices of the batch, through chunking or FreeNoise."""
    own = vars(module)
    if own.get("_chunk_size") is not None and own.get("_chunk_dim") == 0:
        return True
    return type(module).__name__ == "SplitInferenceModule" and own.get("split_dim") == 0


# ---------------------------------------------------------------------- the table of denoisers

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
"""Meaning of `timestep` → classes with layers that see one row for each sample."""

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
"""Meaning of `timestep` → classes with layers that may see k rows for each sample."""

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
    ),  # it gets the distinct timesteps of its tokens
    "RFD4ProteinaTransformer": Denoiser(
        "data", argument="bb_ca_time", also=("local_latents_time",)
    ),
    "ZImageTransformer2DModel": Denoiser("data", argument="t"),
}


_WAN = FrameTokens(
    whole=re.compile(
        r"patch_embedding|condition_embedder\.(text|image)_embedder\..*|fps_(embedding|projection.*)"
        r"|blocks\.\d+\.attn2\.(to_k|to_v|to_kv|add_k_proj|add_v_proj|to_added_kv)"
    ),
    times=re.compile(r"condition_embedder\.(time_embedder\..*|delta_embedder\..*|time_proj)"),
)
_FRAMES = {
    "WanTransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": _WAN,
    "AnyFlowTransformer3DModel": replace(_WAN, axis=1),
    "CosmosTransformer3DModel": FrameTokens(
        whole=re.compile(
            r"transformer_blocks\.\d+\.attn2\.(to_k|to_v|k_img|v_img)|(crossattn|img_context)_proj.*"
        ),
        times=re.compile(r"time_embed\..*|patch_embed\.proj|.*norm.*\.linear_[12]"),
    ),
}
"""Class → where its layers see the frames of a video, for λ a frame."""
for _name, _frames in _FRAMES.items():
    _DENOISERS[_name] = replace(_DENOISERS[_name], frames=_frames)


def register_denoiser(
    class_name: str,
    meaning: str = "discrete",
    *,
    argument: str = "timestep",
    sample_major: bool = False,
) -> None:
    """Declare what the timestep of a denoiser class means.

        register_denoiser("MyTransformer2DModel", "sigma")

    Call this before you add adapters. The arguments are those of `Denoiser` and `TimestepNoise`.

    Raises:
        ValueError: the meaning is unknown, or the class already has a different declaration.
    """
    denoiser = Denoiser(meaning, argument=argument, sample_major=sample_major)
    if _DENOISERS.setdefault(class_name, denoiser) != denoiser:
        raise ValueError(
            f"{class_name} is already declared, as {_DENOISERS[class_name]}: if the timestep of your model means "
            "something else, call set_noise_source(model, TimestepNoise(meaning))."
        )


def denoiser_of(model: nn.Module) -> Denoiser | None:
    """Return the table's entry for the class of `model`, or None if there is none.

    In some classes, the meaning of `timestep` depends on the model's configuration.
    """
    name = next(
        (kind.__name__ for kind in type(model).__mro__ if kind.__name__ in _DENOISERS), None
    )
    if name is None:
        return None
    denoiser: Denoiser = _DENOISERS[name]
    config: Any = getattr(model, "config", None)
    if name == "SanaTransformer2DModel":
        # only SanaSprint is conditioned on guidance; its timestep is σ
        changes = (
            {"meaning": "sigma"} if config.guidance_embeds else {"scale": config.timestep_scale}
        )
        return replace(denoiser, **changes)
    if name == "CosmosTransformer3DModel" and config.extra_pos_embed_type == "learnable":
        # Cosmos 1: ¼ ln σ of EDM
        return replace(denoiser, meaning="edm")
    if name == "SanaWMLTX2RefinerTransformer3DModel":  # it gets σ · timestep_scale_multiplier
        return replace(denoiser, scale=config.timestep_scale_multiplier)
    return denoiser
