"""The outputs of an adapted model on a user's batch: with its own C(λ), with other cores, and without adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from nara_diffusion.noise.context import noise_level
from nara_diffusion.noise.signals import Level
from nara_diffusion.tuner.strength.layers import layers_of
from nara_diffusion.utils.eval_mode import disabled, evaluating

from .adapted_layers import AdaptedLayer, Adapter
from .errors import relative

Batch = Mapping[str, Any] | tuple[Any, ...] | Tensor | Callable[[float], Any]
"""A model's arguments, the same at each λ; or a function of λ that calls it on inputs of that noise level."""

OUTPUT_LEVELS = 16


class Outputs:
    """Runs of `model` on `batch`, in evaluation mode and without gradients.

    Raises:
        ValueError: `batch` is of another type, or the adapter is merged, disabled or not active.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, batch: Batch, mask_density: Level | None) -> None:
        if not isinstance(batch, Mapping | tuple | Tensor) and not callable(batch):
            raise ValueError(
                f"batch is a {type(batch).__name__}: pass the model's arguments as a dict, a tuple or a tensor, or a "
                "function of λ that calls the model and returns its output."
            )
        self.model, self.adapter, self.batch, self.mask_density = model, adapter, batch, mask_density
        self.layers = layers_of(adapter.root, adapter.name)
        for name, layer in self.layers.items():
            if layer.merged or adapter.name not in layer.active_adapters or layer.disable_adapters:
                raise ValueError(
                    f"batch is run with the adapter active, but '{adapter.name}' is merged, disabled or not active in "
                    f"layer '{name}': call unmerge_adapter() or set_adapter({adapter.name!r}) first."
                )

    def at(self, level: float) -> Tensor:
        """The output y of the model at λ, as it is now: flattened, float64."""
        with noise_level(self.model, level, mask_density=self.mask_density), torch.no_grad(), evaluating(self.model):
            return _tensor_of(self._call(level)).detach().double().cpu().flatten()

    def _call(self, level: float) -> Any:
        batch = self.batch
        if isinstance(batch, Mapping):
            return self.model(**batch)
        if isinstance(batch, tuple):
            return self.model(*batch)
        return self.model(batch) if isinstance(batch, Tensor) else batch(level)

    @contextmanager
    def with_cores(self, cores: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the named layers read these cores (1, r, r) at every λ."""
        with ExitStack() as stack:
            for layer in self.adapter.layers:
                if layer.key is not None:
                    variant = self.layers[layer.name].lora_variant[self.adapter.name]
                    stack.enter_context(_reading(variant, cores[layer.name].float()))
            yield

    def errors(self, levels: Tensor, exported: Callable[[Tensor], Mapping[str, Tensor]]) -> list[float]:
        """`ExportError.output` at each λ: (m,). `exported`: λ (1,) → layer → the core that is exported for it."""
        differences, sizes = [], []
        layers = [module for module in self.adapter.root.modules() if isinstance(module, BaseTunerLayer)]
        for level in levels:
            y = self.at(float(level))
            with self.with_cores(exported(level[None])):
                differences.append(float((self.at(float(level)) - y).norm()))
            with disabled(layers):
                sizes.append(float((self.at(float(level)) - y).norm()))
        return relative(differences, sizes, [1 / len(sizes)] * len(sizes))

    def input_grams(self, levels: Tensor) -> dict[str, Tensor]:
        """Layer → S (m, r, r), float64: the sum of A x (A x)ᵀ over the rows of its input at each λ."""
        found: dict[str, list[Tensor]] = {layer.name: [] for layer in self.adapter.layers}
        with ExitStack() as stack:
            sums: dict[str, Tensor] = {}
            for layer in self.adapter.layers:
                hook = self.layers[layer.name].register_forward_pre_hook(_gram_hook(layer, self.adapter.name, sums))
                stack.callback(hook.remove)
            for level in levels:
                sums.clear()
                self.at(float(level))
                for layer in self.adapter.layers:
                    found[layer.name].append(sums.get(layer.name, torch.zeros(layer.rank, layer.rank).double()))
        return {name: torch.stack(grams) for name, grams in found.items()}


@contextmanager
def _reading(variant: Any, core: Tensor) -> Iterator[None]:
    def read_core(rank: int) -> Tensor:
        return core[:, :rank, :rank]

    variant.read_core = read_core
    try:
        yield
    finally:
        del variant.read_core


def _gram_hook(layer: AdaptedLayer, adapter_name: str, sums: dict[str, Tensor]) -> Callable[[Any, Any], None]:
    def add(module: Any, args: Any) -> None:
        h = _projected(module, layer, adapter_name, args[0])  # (n, r)
        sums[layer.name] = sums.get(layer.name, 0) + (h.T @ h).cpu()

    return add


def _projected(module: Any, layer: AdaptedLayer, adapter_name: str, x: Tensor) -> Tensor:
    """A x for each row of the layer's input: (n, r), float64."""
    A = layer.A.to(x.device)
    if layer.is_embedding:
        return A.double().T[x.flatten()]
    if A.dim() == 2:
        return x.reshape(-1, x.shape[-1]).double() @ A.double().T
    convolution = module.lora_A[adapter_name]
    h = convolution._conv_forward(x.to(A.dtype), A, None)  # (b, r, …)
    return h.movedim(1, -1).reshape(-1, layer.rank).double()


def _tensor_of(answer: Any) -> Tensor:
    """The tensor in the output of a model."""
    for name in ("logits", "sample", "last_hidden_state"):
        if isinstance(getattr(answer, name, None), Tensor):
            return getattr(answer, name)
    found = answer[0] if isinstance(answer, (tuple, list)) and answer else answer
    if not isinstance(found, Tensor):
        raise ValueError(
            f"on batch, the model returned a {type(answer).__name__}, expected a tensor, a tuple that begins with one, "
            "or an output with logits, sample or last_hidden_state."
        )
    return found
