"""Settings of a Diffusers model that would bypass the adapter or mix up samples: they are refused."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer
from torch import nn

from .modules import outer_modules

_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def check_not_fused(root: nn.Module, adapter_names: list[str]) -> None:
    """Refuse attention that uses a fused copy of the base projections and so bypasses the adapted layers.

    Raises:
        ValueError: `fuse_qkv_projections()` is on where one of the named adapters adapts a projection.
    """
    if not hasattr(root, "fuse_qkv_projections"):
        return
    for module in filter(_uses_fused, outer_modules(root)):
        for projection in _PROJECTIONS:
            layer = getattr(module, projection, None)
            if isinstance(layer, LoraLayer) and any(adapter in layer.r for adapter in adapter_names):
                raise ValueError(
                    f"'{_name_of(module, root)}.{projection}' is adapted, but fuse_qkv_projections() has replaced "
                    "it by a copy of its base weight, so that the adapter would have no effect: call "
                    "unfuse_qkv_projections(). (To fuse, merge the adapter at one λ first.)"
                )


def check_not_split(root: nn.Module, values: int) -> None:
    """Refuse several values of λ where layers see slices of the batch.

    Raises:
        ValueError: there are several values of λ, and blocks run on slices of the batch.
    """
    if values == 1:
        return
    for module in filter(_splits_batch, outer_modules(root)):
        raise ValueError(
            f"noise_level has {values} values, but '{_name_of(module, root)}' runs on slices of the batch (forward "
            "chunking, or FreeNoise's split inference), whose samples cannot be told apart: pass one λ for the whole "
            "batch, or turn that off (chunking along dim=1 is fine)."
        )


def _uses_fused(module: nn.Module) -> bool:
    """Whether `module` computes with fused projections. Older modules keep them, and the flag, after unfusing."""
    if not vars(module).get("fused_projections"):
        return False
    return hasattr(module, "unfuse_projections") or "Fused" in type(getattr(module, "processor", None)).__name__


def _splits_batch(module: nn.Module) -> bool:
    own = vars(module)
    chunked = own.get("_chunk_size") is not None and own.get("_chunk_dim") == 0
    return chunked or (type(module).__name__ == "SplitInferenceModule" and own.get("split_dim") == 0)


def _name_of(module: nn.Module, root: nn.Module) -> str:
    return next(name for name, other in root.named_modules() if other is module)
