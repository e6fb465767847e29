"""Represent a plain LoRA outside any model, with its factors, LoraConfig and error."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from nara_diffusion.cores.core_set import is_core_key
from nara_diffusion.loaders.adapter_part import by_pattern, configured_scaling
from nara_diffusion.loaders.tensor_files import save_tensors
from nara_diffusion.strict import PEFT_PREFIX
from nara_diffusion.utils.files import atomic_write_files


@dataclass(frozen=True)
class ExportError:
    """The errors of an export at several noise levels, relative to the size of the update.

    Attributes:
        noise_levels: λ (n,).
        weights: the weight of each λ (n,). The weights sum to 1.
        update: the errors (n,), ‖ΔW_exported(λ) − ΔW(λ)‖_F over all layers, divided by the root
            mean square of ‖ΔW‖_F over λ.
    """

    noise_levels: list[float]
    weights: list[float]
    update: list[float]

    @property
    def worst_update(self) -> float:
        """Return the largest value in `update`."""
        return max(self.update)

    @property
    def mean_update(self) -> float:
        """Return the root mean square of `update`, weighted by `weights`."""
        pairs = zip(self.weights, self.update, strict=True)
        return math.sqrt(sum(weight * error**2 for weight, error in pairs))


@dataclass(frozen=True)
class PlainLoraLayer:
    """One layer of a plain LoRA, with the update ΔW = alpha / rank · B · A.

    Attributes:
        A: the factor (rank, d_in); in a convolution (rank, d_in, *kernel), in an embedding
            (rank, n).
        B: the factor (d_out, rank); in a convolution (d_out, rank / groups, 1, …).
        alpha: the numerator of the scale alpha / rank, even with use_rslora in the configuration.
        rank: the rank r.
        magnitude: DoRA's m, in PEFT's shape for the layer, or None.
        is_embedding: whether the module is an embedding, so its weight changes by ΔWᵀ (n, d_out).
    """

    A: Tensor
    B: Tensor
    alpha: float
    rank: int
    magnitude: Tensor | None = None
    is_embedding: bool = False

    @property
    def scaling(self) -> float:
        """Return the scale alpha / rank."""
        return self.alpha / self.rank

    @property
    def groups(self) -> int:
        """Return the number of groups of a convolution, or 1 for any other layer."""
        return self.rank // self.B.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return A, B and the magnitude under the names that PEFT gives them in a module."""
        if self.is_embedding:
            tensors = {"lora_embedding_A": self.A, "lora_embedding_B": self.B}
        else:
            tensors = {"lora_A.weight": self.A, "lora_B.weight": self.B}
        if self.magnitude is not None:
            tensors["lora_magnitude_vector"] = self.magnitude
        return tensors


@dataclass(frozen=True)
class PlainLora:
    """A LoRA or DoRA that any host can load.

    Attributes:
        config: PEFT's configuration.
        layers: {name of the module in the adapted model: its factors}.
        others: the adapter's other tensors, by PEFT's keys: trained biases, token embeddings,
            modules_to_save.
        error: the error over λ of `to_lora(model, "best")`. None for a LoRA at one λ, since it is
            exact there.
    """

    config: LoraConfig
    layers: Mapping[str, PlainLoraLayer]
    others: Mapping[str, Tensor] = field(default_factory=dict)
    error: ExportError | None = None

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the tensors as `peft.get_peft_model_state_dict` does, with `prefix` before each key."""
        extra = {f"{prefix}{key}": tensor.contiguous() for key, tensor in self.others.items()}
        return tensors_of_layers(self.layers, prefix) | extra

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write adapter_config.json and adapter_model.safetensors, for `PeftModel.from_pretrained`.

        If there is an `error`, also write export_error.json. Either all files are written, or none.
        """
        with atomic_write_files(Path(directory)) as partial:
            save_tensors(self.state_dict(PEFT_PREFIX), partial / SAFETENSORS_WEIGHTS_NAME)
            self.config.save_pretrained(str(partial))
            if self.error is not None:
                means = {
                    "worst_update": self.error.worst_update,
                    "mean_update": self.error.mean_update,
                }
                text = json.dumps(asdict(self.error) | means, indent=2) + "\n"
                (partial / "export_error.json").write_text(text, encoding="utf-8")


def tensors_of_layers(layers: Mapping[str, PlainLoraLayer], prefix: str = "") -> dict[str, Tensor]:
    """Return the factors of layers by PEFT's keys, with `prefix` before each key."""
    return {
        f"{prefix}{name}.{key}": tensor.contiguous()
        for name, layer in layers.items()
        for key, tensor in layer.tensors().items()
    }


def layers_of_tensors(
    config: LoraConfig, tensors: Mapping[str, Tensor]
) -> dict[str, PlainLoraLayer]:
    """Return {module: its factors} from tensors by PEFT's keys, ignoring any other tensors.

    Raises:
        ValueError: A or B of a module is missing, or the module's tensors contradict use_dora or
            lora_bias.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, is_factor, kind = key.partition(".lora_")
        if is_factor:
            modules.setdefault(name, {})[kind.removesuffix(".weight")] = tensor
    layers = {}
    for name, factors in modules.items():
        rank = by_pattern(config.rank_pattern, name, config.r)
        is_embedding = any(kind.startswith("embedding") for kind in factors)
        letters = ("embedding_A", "embedding_B") if is_embedding else ("A", "B")
        expected = {*letters, "magnitude_vector"} if config.use_dora else {*letters}
        ignored = {"B.bias"} if config.lora_bias else set()
        if factors.keys() - ignored != expected:
            raise ValueError(
                f"'{name}' has {', '.join(sorted(factors))}, expected {', '.join(sorted(expected))} with use_dora="
                f"{config.use_dora}. The file is damaged: download or save it again."
            )
        A, B = factors[letters[0]], factors[letters[1]]
        alpha = configured_scaling(config, name, rank) * rank
        magnitude = factors.get("magnitude_vector")
        layers[name] = PlainLoraLayer(A, B, alpha, rank, magnitude, is_embedding)
    return layers


def extra_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that are neither factors nor cores, such as biases and tokens."""
    return {
        key: tensor
        for key, tensor in tensors.items()
        if ".lora_" not in key and not is_core_key(key)
    }
