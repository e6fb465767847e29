"""Tiny random denoisers of Diffusers with a NaRA adapter: what they predict, and the λ that their core gets.

`DENOISERS` has each class whose layers may see several rows a sample: there a wrong entry in the package's table could
give a sample the λ of another. A wrong number of rows is an error everywhere else, where some classes stand for all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

from tests.helpers.adapted import disturb, nara_config

Inputs = dict[str, Any]
BATCH = 3
OPTIONS: dict[str, Any] = {
    "attention_head_dim": 8,
    "cap_feat_dim": 8,
    "caption_channels": 8,
    "in_channels": 4,
    "num_attention_heads": 2,
    "num_layers": 1,
    "out_channels": 4,
    "text_dim": 8,
    "text_embed_dim": 8,
    "time_embed_dim": 4,
}
"""Arguments of the constructors that have them, unless `DENOISERS` says otherwise."""
TEXT = (5, 8)
"""The shape of a sample's `encoder_hidden_states`, where a class takes them, unless `DENOISERS` says otherwise."""


def _unet(kind: str, **changes: Any) -> dict[str, Any]:
    blocks = {
        "down_block_types": (f"CrossAttnDownBlock{kind}", f"DownBlock{kind}"),
        "up_block_types": (f"UpBlock{kind}", f"CrossAttnUpBlock{kind}"),
    }
    options = {"sample_size": 8, "block_out_channels": (4, 8), "layers_per_block": 1, "cross_attention_dim": 8}
    if kind == "3D":
        options |= {"norm_num_groups": 2, "attention_head_dim": 2, "num_attention_heads": None}
    return {**options, **blocks, **changes}


WAN = {"attention_head_dim": 12, "freq_dim": 8, "ffn_dim": 16, "rope_max_seq_len": 16}
LTX = {
    "cross_attention_dim": 16,
    **{"audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 4},
    **{"audio_cross_attention_dim": 8, "rope_double_precision": False},
}
COGVIDEO = {"sample_width": 4, "sample_height": 4, "sample_frames": 5, "max_text_seq_length": 5}
VIDEO = {"hidden_states": (4, 2, 4, 4)}
FRAMES = {"hidden_states": (2, 4, 4, 4)}
SIZE = {"num_frames": 2, "height": 2, "width": 2}


DENOISERS: dict[str, tuple[dict[str, Any], Inputs]] = {
    # of one row a sample
    "SD3Transformer2DModel": (
        {"sample_size": 8, "caption_projection_dim": 16, "joint_attention_dim": 8, "pooled_projection_dim": 10},
        {"hidden_states": (4, 8, 8), "pooled_projections": (10,)},
    ),
    "FluxTransformer2DModel": (
        {"num_single_layers": 1, "attention_head_dim": 16, "joint_attention_dim": 8, "pooled_projection_dim": 10}
        | {"axes_dims_rope": (4, 4, 8)},
        {"hidden_states": (8, 4), "pooled_projections": (10,)}
        | {"img_ids": lambda: torch.arange(24.0).view(8, 3), "txt_ids": lambda: torch.zeros(5, 3)},
    ),
    # given the noise by another argument than `timestep`
    "ZImageTransformer2DModel": (
        {"dim": 16, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
        | {"axes_dims": [4, 2, 2], "axes_lens": [128, 16, 16]},
        {"x": lambda: list(torch.randn(BATCH, 4, 1, 4, 4)), "cap_feats": lambda: list(torch.randn(BATCH, 5, 8))},
    ),
    # of several rows a sample
    "UNet3DConditionModel": (_unet("3D"), {"sample": (4, 4, 8, 8)}),
    "UNetMotionModel": (
        _unet("Motion", norm_num_groups=2, motion_num_attention_heads=2),
        {"sample": (4, 4, 8, 8), "encoder_hidden_states": lambda: torch.randn(BATCH, 5, 8).repeat_interleave(4, dim=0)},
    ),  # the text is repeated for each frame, as the pipeline does
    "I2VGenXLUNet": (
        _unet("3D"),
        {"sample": (4, 4, 8, 8), "fps": torch.tensor(7), "image_latents": (4, 4, 8, 8), "image_embeddings": (8,)},
    ),
    "UNetSpatioTemporalConditionModel": (
        _unet("SpatioTemporal", in_channels=8, block_out_channels=(32, 64), num_frames=4)
        | {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 12},
        {"sample": (4, 8, 8, 8), "encoder_hidden_states": (1, 8), "added_time_ids": torch.ones(3)},
    ),
    "HunyuanDiT2DModel": (
        {"sample_size": 8, "patch_size": 2, "cross_attention_dim": 8, "cross_attention_dim_t5": 8, "hidden_size": 16}
        | {"pooled_projection_dim": 4, "text_len": 5, "text_len_t5": 4},
        {"hidden_states": (4, 8, 8), "text_embedding_mask": torch.ones(5), "encoder_hidden_states_t5": (4, 8)}
        | {"text_embedding_mask_t5": torch.ones(4), "image_meta_size": torch.ones(6), "style": torch.tensor(0)}
        | {"image_rotary_emb": lambda: (torch.ones(16, 8), torch.zeros(16, 8))},
    ),
    "CogVideoXTransformer3DModel": (COGVIDEO, FRAMES),
    "ConsisIDTransformer3DModel": ({**COGVIDEO, "use_rotary_positional_embeddings": False}, FRAMES),
    "AllegroTransformer3DModel": (
        {"attention_head_dim": 12, "patch_size": 2, "cross_attention_dim": 24}
        | {"sample_height": 4, "sample_width": 4, "sample_frames": 2},
        {**VIDEO, "attention_mask": torch.ones(2, 4, 4), "encoder_attention_mask": torch.ones(1, 5)}
        | {
            "image_rotary_emb": lambda: (
                ((torch.ones(8, 4), torch.zeros(8, 4)),) * 3,
                (torch.zeros(1, 8, dtype=torch.long),) * 3,
            )
        },
    ),
    "LatteTransformer3DModel": (
        {"attention_head_dim": 12, "patch_size": 2, "cross_attention_dim": 24, "sample_size": 4, "video_length": 2}
        | {"norm_type": "ada_norm_single", "num_embeds_ada_norm": 9, "norm_elementwise_affine": False}
        | {"attention_bias": True},
        VIDEO,
    ),
    "WanTransformer3DModel": (WAN, VIDEO),
    "SkyReelsV2Transformer3DModel": (WAN, VIDEO),
    "WanAnimateTransformer3DModel": (
        {**WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 6, "added_kv_proj_dim": 24}
        | {"motion_encoder_channel_sizes": {"4": 4, "8": 4, "16": 4}, "motion_encoder_size": 16}
        | {"motion_style_dim": 8, "motion_dim": 3, "motion_encoder_dim": 8, "face_encoder_hidden_dim": 8}
        | {"face_encoder_num_heads": 2, "inject_face_latents_blocks": 1},
        {"hidden_states": (12, 3, 4, 4), "encoder_hidden_states_image": (3, 6), "pose_hidden_states": (4, 2, 4, 4)}
        | {"face_pixel_values": (3, 5, 16, 16)},
    ),
    "AnyFlowTransformer3DModel": (WAN, {**FRAMES, "r_timestep": torch.full((2,), 10.0)}),
    "AnyFlowFARTransformer3DModel": (
        {**WAN, "chunk_partition": (1, 1)},
        {**FRAMES, "r_timestep": torch.full((2,), 10.0), "chunk_partition": [1, 1]},
    ),
    "EasyAnimateTransformer3DModel": (
        {"patch_size": 2, "attention_head_dim": 16, "num_layers": 2, "mmdit_layers": 1},
        VIDEO,
    ),
    "JoyImageEditPlusTransformer3DModel": (
        {"hidden_size": 20, "mlp_width_ratio": 2.0, "rope_dim_list": [2, 4, 4]},
        {"hidden_states": (8, 4, 1, 2, 2), "shape_list": [[(1, 2, 2), (1, 2, 2)]] * BATCH},
    ),
    "LTXVideoTransformer3DModel": (
        {"cross_attention_dim": 16},
        {"hidden_states": (8, 4), "encoder_attention_mask": torch.ones(5), **SIZE},
    ),
    "LTX2VideoTransformer3DModel": (
        LTX,
        {"hidden_states": (8, 4), "audio_hidden_states": (3, 4), "audio_encoder_hidden_states": TEXT}
        | {**SIZE, "audio_num_frames": 3},
    ),
    "SanaWMLTX2RefinerTransformer3DModel": (
        LTX,
        {"hidden_states": (8, 4), "video_rotary_emb": lambda: (torch.ones(BATCH, 8, 16), torch.zeros(BATCH, 8, 16))},
    ),
    "SanaVideoTransformer3DModel": (
        {"attention_head_dim": 12, "patch_size": (1, 2, 2), "num_cross_attention_heads": 2, "sample_size": 4}
        | {"cross_attention_head_dim": 12, "cross_attention_dim": 24, "rope_max_seq_len": 16},
        VIDEO,
    ),
    "SanaWMTransformer3DModel": (
        {"num_layers": 2, "hidden_size": 24, "softmax_every_n": 2, "linear_head_dim": 12, "image_size": 4}
        | {"chunk_plucker_channels": 3, "chunk_plucker_post_attn_blocks": 1, "mlp_ratio": 2.0},
        {**VIDEO, "encoder_hidden_states": (1, *TEXT), "mask": torch.ones(5)},
    ),
    "Krea2Transformer2DModel": (
        {"attention_head_dim": 16, "num_key_value_heads": 1, "intermediate_size": 16, "timestep_embed_dim": 8}
        | {"text_hidden_dim": 8, "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 1}
        | {"text_intermediate_size": 8, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1}
        | {"axes_dims_rope": (4, 4, 8)},
        {"hidden_states": (8, 4), "encoder_hidden_states": (5, 2, 8)}
        | {"position_ids": lambda: torch.arange(39).view(13, 3)},
    ),
    "CosmosTransformer3DModel": (
        {"attention_head_dim": 12, "mlp_ratio": 2, "adaln_lora_dim": 4, "max_size": (2, 4, 4)}
        | {"extra_pos_embed_type": None},
        {**VIDEO, "padding_mask": lambda: torch.zeros(1, 1, 4, 4)},
    ),
    "MochiTransformer3DModel": (
        {"num_layers": 2, "pooled_projection_dim": 16, "max_sequence_length": 5},  # the last doesn't update the text
        {**VIDEO, "encoder_attention_mask": torch.ones(5, dtype=torch.bool)},
    ),
    # of layers that see tokens of all samples, or one sample alone
    "ErnieImageTransformer2DModel": (
        {"hidden_size": 24, "ffn_hidden_size": 20, "text_in_dim": 8, "rope_axes_dim": (4, 4, 4)},
        {"hidden_states": (4, 4, 4), "text_bth": TEXT, "text_lens": torch.tensor(5)},
    ),
    "MiniMaxH3Transformer3DModel": (
        {"attention_head_dim": 16, "hidden_size": 24, "num_refiner_layers": 1, "ffn_dim": 12, "in_channels": 2}
        | {"audio_in_channels": 3, "freq_dim": 8, "time_embed_hidden_dim": 10, "time_embed_dim": 12}
        | {"rope_freq_dim": 2},
        {"hidden_states": (4, 8), "audio_hidden_states": (3, 3)}
        | {
            "timestep_indices": lambda: torch.zeros(12, dtype=torch.long),
            "token_tags": lambda: torch.tensor([0] * 4 + [2] * 3 + [1] * 5),
            "position_ids": lambda: torch.arange(36).view(12, 3),
            "video_indices": lambda: torch.arange(4),
            "audio_indices": lambda: torch.arange(4, 7),
            "text_indices": lambda: torch.arange(7, 12),
        },
    ),
}
"""Class → (arguments of its constructor, inputs without the timestep): the shape of a sample, drawn at random; a
sample's tensor; what makes the input of `BATCH` samples; or what all share."""

TARGETS = {
    "JoyImageEditPlusTransformer3DModel": ["img_attn_qkv", "img_attn_proj"],
    "SanaWMTransformer3DModel": ["qkv", "q_linear"],
    "UNetSpatioTemporalConditionModel": ["to_v", "conv1", "conv2"],
}
"""Of classes whose attention has other names than to_q, to_v and to_out.0, or too little influence."""
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "AnyFlowFARTransformer3DModel": lambda t: t[:, None].expand(-1, 2),
    "AnyFlowTransformer3DModel": lambda t: t[:, None].expand(-1, 2),
    "SanaWMLTX2RefinerTransformer3DModel": lambda t: t[:, None].expand(-1, 8),
    "SanaWMTransformer3DModel": lambda t: t[:, None, None].expand(-1, 1, 2),
}
"""Timesteps (b,) → what a class takes, where it takes no (b,)."""
WARNINGS_OF_DIFFUSERS = [
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype:UserWarning"),  # Mochi
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning"),  # AnyFlow
]
"""The `pytestmark` of files that run these models."""


def denoiser(name: str, *, scale: float = 0.3, **changes: Any) -> Any:
    """A `random_model` of the Diffusers class `name`."""
    if name.startswith("Cosmos"):
        pytest.importorskip("torchvision", reason="Diffusers' Cosmos resizes its padding mask with torchvision")
    kind = getattr(diffusers, name)
    parameters = inspect.signature(kind.__init__).parameters
    common = {key: value for key, value in OPTIONS.items() if key in parameters}
    return random_model(kind, 3, scale=scale, **{**common, **DENOISERS[name][0], **changes})


def random_model(kind: Any, seed: int, *args: Any, scale: float = 0.1, **options: Any) -> Any:
    """A model in evaluation mode; the global generator stays where it was.

    No parameter is zero, as gates and last layers are at first, which would hide adapters.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(*args, **options).eval()
        for parameter in model.parameters():
            parameter.data += (scale if parameter.dim() > 1 else 0.05) * torch.randn(parameter.shape)
    return model


def adapted_denoiser(name: str) -> nn.Module:
    """A tiny denoiser with a NaRA adapter on its attention projections, far from C = I."""
    model = denoiser(name)
    inject_adapter_in_model(nara_config(target_modules=TARGETS.get(name, ["to_q", "to_v", "to_out.0"])), model)
    disturb(model)
    return model


def inputs_of(name: str) -> Inputs:
    """What `denoiser(name)` takes beside its timestep, for `BATCH` samples."""
    torch.manual_seed(5)
    takes_text = "encoder_hidden_states" in inspect.signature(getattr(diffusers, name).forward).parameters
    inputs = {**({"encoder_hidden_states": TEXT} if takes_text else {}), **DENOISERS[name][1]}
    return {key: _input(value) for key, value in inputs.items()}


def _input(value: Any) -> Any:
    if isinstance(value, tuple):
        return torch.randn(BATCH, *value)
    if isinstance(value, Tensor):
        return value.expand(BATCH, *value.shape).clone()
    return value() if callable(value) else value


def run(model: nn.Module, inputs: Inputs, timestep: Any, argument: str = "timestep") -> Tensor:
    """The prediction: most classes give an object, some a list with one tensor a sample."""
    shape = SHAPES.get(type(model).__name__)
    timestep = shape(timestep) if shape is not None and isinstance(timestep, Tensor) else timestep
    with torch.no_grad():
        output = model(**inputs, **{argument: timestep})
    sample = output if isinstance(output, Tensor) else output[0]
    return torch.stack(sample) if isinstance(sample, list) else sample


def levels_of_core(model: nn.Module, call: Callable[[], Any]) -> list[float]:
    """λ as the model's core gets it while `call` runs."""
    levels: list[Tensor] = []
    core = model.get_submodule("lora_core.cores.default.shared")
    handle = core.register_forward_pre_hook(lambda _, args: levels.append(args[0]))
    try:
        call()
    finally:
        handle.remove()
    assert len(levels) == 1  # once a forward
    return levels[0].tolist()


@contextmanager
def recorded(module: Any) -> Iterator[list[dict[str, Any]]]:
    """Arguments of each forward by name; those that are None, empty or about the form of the result are left out."""
    signature, calls = inspect.signature(module.forward), []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind(*args, **kwargs).arguments
        arguments = {name: value for name, value in bound.items() if name != "return_dict" and value is not None}
        calls.append({name: value for name, value in arguments.items() if value != {}})

    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()
