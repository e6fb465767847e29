"""A plain LoRA outside of any model: its factors by module, its LoraConfig, and its error."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from nara_diffusion.loaders.adapter_part import by_pattern, configured_scaling
from nara_diffusion.loaders.tensor_files import save_tensors
from nara_diffusion.strict import PEFT_PREFIX, is_core_key
from nara_diffusion.utils.atomic_write import atomic_write_files

ERROR_FILE = "export_error.json"


@dataclass(frozen=True)
class ExportError:
    """Errors at several noise levels, relative to the size of the update.

    Attributes:
        noise_levels: λ (n,).
        weights: how often each λ occurs (n,); they sum to 1.
        update: ‖ΔW_exported(λ) − ΔW(λ)‖_F over all layers (n,), divided by the root mean square of ‖ΔW‖_F over λ.
    """

    noise_levels: list[float]
    weights: list[float]
    update: list[float]

    @property
    def worst_update(self) -> float:
        """The largest of `update`."""
        return max(self.update)

    @property
    def mean_update(self) -> float:
        """The root mean square of `update`, weighted by `weights`."""
        return math.sqrt(
            sum(weight * error**2 for weight, error in zip(self.weights, self.update, strict=True))
        )

    def save(self, directory: Path) -> None:
        """Write export_error.json."""
        content = asdict(self) | {
            "worst_update": self.worst_update,
            "mean_update": self.mean_update,
        }
        (directory / ERROR_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class PlainLoraLayer:
    """One layer of a plain LoRA: ΔW = alpha / rank · B · A.

    Attributes:
        A: (rank, d_in), in a convolution (rank, d_in, *kernel), in an embedding (rank, n).
        B: (d_out, rank), in a convolution (d_out, rank / groups, 1, …).
        alpha: alpha / rank is the scale, also with use_rslora in the configuration.
        rank: the rank r.
        magnitude: DoRA's m, in PEFT's shape for the layer, or None.
        is_embedding: True if the module is an embedding, to whose weight ΔWᵀ (n, d_out) is added.
    """

    A: Tensor
    B: Tensor
    alpha: float
    rank: int
    magnitude: Tensor | None = None
    is_embedding: bool = False

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @property
    def groups(self) -> int:
        """Of the convolution; 1 for any other layer."""
        return self.rank // self.B.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """A, B and the magnitude by PEFT's names in a module."""
        names = (
            ("lora_embedding_A", "lora_embedding_B")
            if self.is_embedding
            else ("lora_A.weight", "lora_B.weight")
        )
        vectors = {} if self.magnitude is None else {"lora_magnitude_vector": self.magnitude}
        return dict(zip(names, (self.A, self.B), strict=True)) | vectors


@dataclass(frozen=True)
class PlainLora:
    """A LoRA or DoRA that any host can load.

    Attributes:
        config: PEFT's configuration.
        layers: {name of the module in the adapted model: its factors}.
        others: further tensors of the adapter, by PEFT's keys: trained biases, token embeddings, modules_to_save.
        error: the error over λ of `to_lora(model, "best")`; None for a LoRA of one λ, which is exact there.
        scheduler: of a LoRA that an earlier version folded from an adapter with another prediction than its base's:
            class and configuration of the Diffusers scheduler that it needs.
    """

    config: LoraConfig
    layers: Mapping[str, PlainLoraLayer]
    others: Mapping[str, Tensor] = field(default_factory=dict)
    error: ExportError | None = None
    scheduler: Mapping[str, Any] | None = None

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors by PEFT's keys, as `peft.get_peft_model_state_dict` gives them, each with `prefix`."""
        others = {f"{prefix}{key}": tensor.contiguous() for key, tensor in self.others.items()}
        return tensors_of_layers(self.layers, prefix) | others

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write adapter_config.json and adapter_model.safetensors, for `PeftModel.from_pretrained`.

        With `error`, export_error.json is written too. All files are written, or none.
        """
        with atomic_write_files(Path(directory)) as partial:
            save_tensors(self.state_dict(PEFT_PREFIX), partial / SAFETENSORS_WEIGHTS_NAME)
            self.config.save_pretrained(str(partial))
            if self.error is not None:
                self.error.save(partial)


# ---------------------------------------------------------------------- tensors


def tensors_of_layers(layers: Mapping[str, PlainLoraLayer], prefix: str = "") -> dict[str, Tensor]:
    """The factors of layers by PEFT's keys, each with `prefix`."""
    found = {
        f"{name}.{key}": tensor
        for name, layer in layers.items()
        for key, tensor in layer.tensors().items()
    }
    return {f"{prefix}{key}": tensor.contiguous() for key, tensor in found.items()}


def layers_of_tensors(
    config: LoraConfig, tensors: Mapping[str, Tensor]
) -> dict[str, PlainLoraLayer]:
    """{module: its factors} of tensors by PEFT's keys; those that are no factors are left out.

    Raises:
        ValueError: A and B of a module are not both there, or not of the configuration's rank; or it has tensors that
            use_dora and lora_bias deny.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, is_factor, kind = key.partition(".lora_")
        if is_factor:
            found.setdefault(name, {})[kind.removesuffix(".weight")] = tensor
    layers = {}
    for name, own in found.items():
        rank, letters = by_pattern(config.rank_pattern, name, config.r), ["A", "B"]
        if is_embedding := any(kind.startswith("embedding") for kind in own):
            letters = ["embedding_A", "embedding_B"]
        if missing := [letter[-1] for letter in letters if letter not in own]:
            raise ValueError(f"'{name}' needs A and B, but {missing[0]} is missing: damaged.")
        A, B = (own[letter] for letter in letters)
        # the groups of a convolution divide r
        if min(A.dim(), B.dim()) < 2 or len(A) != rank or not B.shape[1] or rank % B.shape[1]:
            raise ValueError(
                f"'{name}' has A {tuple(A.shape)} and B {tuple(B.shape)}, expected rank {rank}: damaged."
            )
        wanted = {*letters, *(["magnitude_vector"] if config.use_dora else [])}
        if own.keys() - ({"B.bias"} if config.lora_bias else set()) != wanted:
            raise ValueError(
                f"'{name}' has {', '.join(sorted(own))}, but use_dora={config.use_dora}: damaged."
            )
        alpha = configured_scaling(config, name, rank) * rank
        layers[name] = PlainLoraLayer(A, B, alpha, rank, own.get("magnitude_vector"), is_embedding)
    return layers


def others_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is no factor and no core's: trained biases, tokens, modules."""
    return {
        key: tensor
        for key, tensor in tensors.items()
        if ".lora_" not in key and not is_core_key(key)
    }
