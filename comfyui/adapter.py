"""Apply a NaRA to the modules of ComfyUI's own models: y += strength · up · M(λ) · down · x.

    M(λ) = diag(C(λ) of each module in the matrix), (b, r, r)

ComfyUI stores some of Diffusers' modules as one matrix, such as FLUX's q, k and v. For these, M is
block-diagonal. The adapter hooks the modules once, and keeps `up` and `down` on each module's
device. Only M is computed at each call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nara_diffusion.export.adapter_factors import adapter_of_part
from nara_diffusion.export.host_files import HOST_DENOISERS, with_scale_1
from nara_diffusion.export.original_names import UNETS, original_layers, parts_of
from nara_diffusion.export.to_lora import lora_of
from nara_diffusion.loaders.components import TEXT_ENCODER
from nara_diffusion.loaders.file import AdapterFile

CONVENTIONS = {"sd15": ("timestep", "edm"), "sdxl": ("timestep", "edm")}
"""{base: its possible definitions of λ}. All other bases have "flow"."""


class LiveAdapter:
    """The denoiser part of an adapter, with module names as in the original code.

    Args:
        path: a file or folder that `save_nara_weights` wrote, or a T-LoRA of another project.
        base: one of `nara_diffusion.export.host_files.BASES`.
        base_model: a function that returns the adapted layers of the base by their names in
            Diffusers, for a T-LoRA of LyCORIS.

    Attributes:
        convention: the definition of λ; None if the adapter doesn't need λ.
        encoders: {component: LoRA} for the text encoders, which have no λ.

    Raises:
        ValueError: the file isn't an adapter, the adapter is a DoRA, or a part of it doesn't fit
            the base or is for neither a denoiser nor a text encoder.
    """

    def __init__(
        self, path: str, base: str, base_model: Callable[[], nn.Module] | None = None
    ) -> None:
        denoiser_name = "unet" if base in UNETS else "transformer"
        file = AdapterFile.read(path, denoiser_name, base=base_model)
        parts = dict(file.parts)
        denoisers = [name for name in HOST_DENOISERS if name in parts]
        if not denoisers:
            raise ValueError(
                f"'{path}' has parts for {', '.join(parts)}, but none for a denoiser, so this node "
                "can't use it."
            )
        denoiser = parts.pop(denoisers[0])
        self.config = denoiser.config
        if file.other is not None and self.config.noise_convention is None:
            self.config.noise_convention = CONVENTIONS.get(base, ("flow",))[0]
        if self.config.use_dora or self.config.core_type == "film":
            kind = "NaRA-DoRA" if self.config.use_dora else "Tc-LoRA"
            raise ValueError(
                f"'{path}' is a {kind}, which this node can't apply. Sample it in Diffusers."
            )
        self.adapter = adapter_of_part(denoiser)
        self.convention = self._convention(base, path)
        lora = self.adapter.lora.layers
        layers = {name: with_scale_1(name, layer) for name, layer in lora.items()}
        self.factors = original_layers(layers, base)
        self.parts = parts_of(layers, base)
        self.encoders = {}
        for name, part in parts.items():
            if not name.startswith(TEXT_ENCODER):
                raise ValueError(f"'{path}' has a part for {name}, which this node can't apply.")
            self.encoders[name] = lora_of(adapter_of_part(part), None)
        self._hooked: dict[str, nn.Module] = {}
        self._handles: list[RemovableHandle] = []
        self._matrices: dict[str, Tensor] = {}
        self._placed: dict[str, tuple[Tensor, Tensor]] = {}
        weakref.finalize(self, _remove, self._handles)

    def _convention(self, base: str, path: str) -> str | None:
        if self.adapter.level_of(0.5) is None:
            return None
        convention, allowed = self.config.noise_convention, CONVENTIONS.get(base, ("flow",))
        if convention not in allowed:
            raise ValueError(
                f"'{path}' defines λ as {convention!r}, but {base} defines it as "
                f"{' or '.join(allowed)}. Choose the base that the adapter was trained on."
            )
        return convention

    def check(self, model: nn.Module) -> None:
        """Raise ValueError if a module is missing in ComfyUI's `model` or has the wrong size."""
        for name, module in self._modules(model).items():
            factors = self.factors[name]
            trained_shape = (len(factors.B), *factors.A.shape[1:])
            shape = tuple(module.weight.shape)
            if shape != trained_shape:
                raise ValueError(
                    f"{name} has a weight of shape {shape} in this model, but the adapter was "
                    f"trained on {trained_shape}. Use the checkpoint that it was trained on."
                )

    def _modules(self, model: nn.Module) -> dict[str, Any]:
        """Return the adapted modules of `model`.

        Raises:
            ValueError: a module is missing, or is compiled, which would fix λ.
        """
        modules = dict(model.named_modules())
        missing = [name for name in self.factors if name not in modules]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self.factors)} modules, such as {missing[0]}, aren't in this model. Choose "
                "the base and the checkpoint that the adapter was trained on, and leave out nodes that compile it."
            )
        for name, module in modules.items():
            if getattr(module, "_compiled_call_impl", None) is not None:
                raise ValueError(
                    f"{name or 'The model'} is compiled, so all steps would use the λ of the first. Don't compile it."
                )
        return {name: modules[name] for name in self.factors}

    def matrices(self, level: Tensor, strength: float) -> dict[str, Tensor]:
        """Return {module: strength · M(λ) (b, r, r)} at λ (b,), on the device of `level`."""
        cores = self.adapter.cores(level.float().cpu(), strength, level.device)
        return {
            name: _block_diagonal([cores[part] for part in parts if part])
            for name, parts in self.parts.items()
        }

    @contextmanager
    def applied(self, model: nn.Module, level: Tensor, strength: float) -> Iterator[None]:
        """Apply the adapter to ComfyUI's `model` inside the context, with λ (b,) for the rows."""
        if bool((level == level[0]).all()):
            level = level[:1]  # some layers don't have the batch first
        modules = self._modules(model)
        if modules != self._hooked:
            _remove(self._handles)
            # the model keeps the hooks, which must not keep this adapter alive
            reference: weakref.ref[LiveAdapter] = weakref.ref(self)
            for name, module in modules.items():
                self._handles.append(module.register_forward_hook(_hook(reference, name)))
            self._hooked = modules
        self._matrices = self.matrices(level, strength)
        try:
            yield
        finally:
            self._matrices = {}

    def update(self, name: str, module: Any, x: Tensor) -> Tensor | None:
        """Return up · M · down · x, with x (b, …, d_in) or (b, d_in, h, w); None if not applied."""
        if name not in self._matrices:
            return None
        M = self._matrices[name].to(x.device, x.dtype)
        if len(M) not in (1, len(x)):
            raise ValueError(
                f"λ has {len(M)} values, but a layer sees a batch of {len(x)}. Sample at one λ at a time."
            )
        down, up = self._placed.get(name) or (self.factors[name].A, self.factors[name].B)
        if (down.device, down.dtype) != (x.device, x.dtype):
            down, up = self._placed[name] = down.to(x.device, x.dtype), up.to(x.device, x.dtype)
        M = M.expand(len(x), -1, -1)  # (b, r, r)
        if down.dim() == 2:
            hidden = torch.einsum("brs,b...s->b...r", M, nn.functional.linear(x, down))
            return nn.functional.linear(hidden, up)
        hidden = nn.functional.conv2d(x, down, None, module.stride, module.padding, module.dilation)
        hidden = torch.einsum("brs,bs...->br...", M, hidden)  # (b, r, h', w')
        return nn.functional.conv2d(hidden, up)


def _hook(adapter: weakref.ref[LiveAdapter], name: str) -> Callable[..., Tensor]:
    def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        live = adapter()
        update = None if live is None else live.update(name, module, args[0])
        return output if update is None else output + update.to(output.dtype)

    return add


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def _block_diagonal(blocks: list[Tensor]) -> Tensor:
    """Return the block-diagonal matrices (b, Σr, Σr) made of blocks (b, r, r)."""
    if len(blocks) == 1:
        return blocks[0]
    b = max(map(len, blocks))
    samples = zip(*(block.expand(b, -1, -1) for block in blocks), strict=True)
    return torch.stack([torch.block_diag(*sample) for sample in samples])
