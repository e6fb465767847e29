"""What the arms of a regime adapt: a base model, and how a method is put on it, whatever the modality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from quality.images.methods import adapted
from quality.images.settings import arguments
from quality.images.training import ControlledDenoiser
from quality.regimes.images.data import SUBJECT, base_pipeline

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_CONVOLUTIONS = ("conv_in", "conv_out", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
_LINEAR = ("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
_TIME = ("time_emb_proj", "time_embedding.linear_1", "time_embedding.linear_2")


class Backbone(Protocol):
    """Attributes:
    targets: {name: modules that are adapted}.
    """

    targets: Mapping[str, tuple[str, ...]]

    def arguments(self, method: str, seed: int, options: Mapping[str, Any]) -> Any:
        """Those of a training: `options`, and defaults."""
        ...

    def adapted(self, method: str, args: Any) -> Any:
        """A copy of the base model, in which what `method` trains requires a gradient."""
        ...

    def controlled(self, model: Any, control: str | None, seed: int) -> nn.Module:
        """`model` as a regime's loss calls it, told the λ of a control."""
        ...


class UNetBackbone:
    """The UNet of sdxl-tiny; its targets "all" and "attention_time" have the time embedding, where a static adapter
    reads λ by itself."""

    targets: Mapping[str, tuple[str, ...]] = {
        "attention": _ATTENTION,
        "attention_time": (*_ATTENTION, *_TIME),
        "all": (*_ATTENTION, *_LINEAR, *_CONVOLUTIONS, *_TIME),
    }

    def arguments(self, method: str, seed: int, options: Mapping[str, Any]) -> Any:
        return arguments(SUBJECT, method, seed, dict(options))

    def adapted(self, method: str, args: Any) -> Any:
        return adapted(base_pipeline(), method, args).unet

    def controlled(self, model: Any, control: str | None, seed: int) -> ControlledDenoiser:
        return ControlledDenoiser(model, control)


UNET = UNetBackbone()
