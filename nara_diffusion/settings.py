"""Settings of a Diffusers model under which an update, or a sample's own C, would not reach what it should: refused."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.lora import LoraLayer
from torch import nn

_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def check_not_fused(root: nn.Module, adapter_names: list[str]) -> None:
    """Refuse attention that uses one fused copy of base projections, past the layers that are adapted.

    Raises:
        ValueError: `fuse_qkv_projections()` is on where one of the named adapters adapts a projection.
    """
    if not hasattr(root, "fuse_qkv_projections"):
        return
    for name, module in _modules(root):
        for projection in _PROJECTIONS if _uses_fused(module) else ():
            layer = getattr(module, projection, None)
            if isinstance(layer, LoraLayer) and any(adapter in layer.r for adapter in adapter_names):
                raise ValueError(
                    f"'{name}.{projection}' is adapted, but fuse_qkv_projections() has put a copy of its base weight "
                    "to use instead, so that the adapter would have no effect: call unfuse_qkv_projections(). (To "
                    "fuse, merge the adapter at one λ first.)"
                )


def check_not_split(root: nn.Module, values: int) -> None:
    """Refuse to tell samples apart where layers see slices of the batch.

    Raises:
        ValueError: there are several values of λ, and blocks run on slices of the batch.
    """
    if values == 1:
        return
    for name, module in _modules(root):
        chunked = getattr(module, "_chunk_size", None) is not None and getattr(module, "_chunk_dim", None) == 0
        split = type(module).__name__ == "SplitInferenceModule" and getattr(module, "split_dim", None) == 0
        if chunked or split:
            raise ValueError(
                f"noise_level has {values} values, but '{name}' runs on slices of the batch (forward chunking, or "
                "FreeNoise's split inference), whose samples cannot be told apart: pass one λ for the whole batch, or "
                "turn that off (chunking along dim=1 is fine)."
            )


def _uses_fused(attention: nn.Module) -> bool:
    """Older attention modules keep their fused projections, and the flag, when these are no longer in use."""
    if not getattr(attention, "fused_projections", False):
        return False
    return hasattr(attention, "unfuse_projections") or "Fused" in type(getattr(attention, "processor", None)).__name__


def _modules(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules below `root` with their names, without the insides of adapted layers."""
    for name, module in root._modules.items():
        if module is not None and "lora_A" not in module._modules:
            yield f"{prefix}{name}", module
            yield from _modules(module, f"{prefix}{name}.")
