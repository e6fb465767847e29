"""A plain LoRA outside of any model: its factors by module, and its LoraConfig."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from nara_diffusion.loaders.strict import PEFT_PREFIX
from nara_diffusion.utils.atomic_write import atomic_write_files

from ..errors import ExportError
from .scheduler import SCHEDULER, write_scheduler


@dataclass(frozen=True)
class PlainLoraLayer:
    """One layer of a plain LoRA: ΔW = alpha / rank · B · A.

    Attributes:
        A: (rank, d_in), in a convolution (rank, d_in, *kernel), in an embedding (rank, n).
        B: (d_out, rank), in a convolution (d_out, rank / groups, 1, …).
        alpha: alpha / rank is the scale, also with use_rslora in the configuration.
        rank: the rank r.
        bias: of B (d_out,), or None.
        magnitude: DoRA's m, in PEFT's shape for the layer, or None.
        is_embedding: True if the module is an embedding, to whose weight ΔWᵀ (n, d_out) is added.
    """

    A: Tensor
    B: Tensor
    alpha: float
    rank: int
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    is_embedding: bool = False

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class PlainLora:
    """A LoRA or DoRA that any host can load.

    Attributes:
        config: PEFT's configuration.
        layers: {name of the module in the adapted model: its factors}.
        others: further tensors of the adapter, by PEFT's keys: trained biases, token embeddings, modules_to_save.
        error: the error over λ of `to_lora(model, "best")`; None for a LoRA of one λ, which is exact there.
        scheduler: class and configuration of the Diffusers scheduler that it needs, since it predicts something else
            than its base; None where it predicts the same.
    """

    config: LoraConfig
    layers: Mapping[str, PlainLoraLayer]
    others: Mapping[str, Tensor] = field(default_factory=dict)
    error: ExportError | None = None
    scheduler: Mapping[str, Any] | None = None

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors by PEFT's keys, as `peft.get_peft_model_state_dict` gives them, each with `prefix`."""
        own = {f"{name}.{key}": tensor for name, layer in self.layers.items() for key, tensor in _named(layer)}
        return {f"{prefix}{key}": tensor.contiguous() for key, tensor in {**own, **self.others}.items()}

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write adapter_config.json and adapter_model.safetensors, for `PeftModel.from_pretrained`.

        With `error`, export_error.json and export_error.png are written too, and with `scheduler` the folder of one,
        for Diffusers' `from_pretrained(directory, subfolder="scheduler")`. All files are written, or none.

        Raises:
            ValueError: `directory` is a file, or it has the scheduler of another model, which this LoRA doesn't need.
        """
        folder = Path(directory)
        if folder.is_file():
            raise ValueError(f"directory '{folder}' is a file: name a folder.")
        if self.scheduler is None and (folder / SCHEDULER).exists():
            raise ValueError(
                f"directory '{folder}' has a '{SCHEDULER}' of something else, which from_lora would take for this "
                "LoRA's: name another folder, or delete that."
            )
        with atomic_write_files(folder) as partial:
            save_file(self.state_dict(PEFT_PREFIX), partial / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
            self.config.save_pretrained(str(partial))
            if self.error is not None:
                self.error.save(partial)
            write_scheduler(self.scheduler, partial)


def _named(layer: PlainLoraLayer) -> Iterator[tuple[str, Tensor]]:
    if layer.is_embedding:
        yield "lora_embedding_A", layer.A
        yield "lora_embedding_B", layer.B
    else:
        yield "lora_A.weight", layer.A
        yield "lora_B.weight", layer.B
    if layer.bias is not None:
        yield "lora_B.bias", layer.bias
    if layer.magnitude is not None:
        yield "lora_magnitude_vector", layer.magnitude
