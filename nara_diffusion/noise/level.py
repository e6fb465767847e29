"""λ: its unit and validation, contexts and sources, and the levels that training draws.

λ is a float32 tensor (1,), (b,) or (b, k) in [0, 1]; 1 is pure noise. Its values are checked on the
host only if it is on the CPU. On another device, a λ outside [0, 1] becomes NaN, and so does the
output. A forward of an adapted model takes λ from the first of these that exists:

1. the context `with noise_level(model, value): …`;
2. the source that was set with `set_noise_source(model, source)`;
3. the source that was registered with `register_noise_source` for the `noise_convention` of the
   model's first adapter;
4. the default source of the model's class: `timesteps.Denoiser` for classes that receive a timestep
   from Diffusers' pipelines (see the table in `rows`), `blocks.BlockNoise` for LLaDA2, and
   `canvas_source.CanvasNoise` for DiffusionGemma.

An adapter is saved with the name of its definition of λ (`noise_convention`). If the model's source
uses another definition, an error is raised. The source in `masked_share`, which reads λ from the
masks in a language model's input, is never a default.

The contexts are entries of one `ContextVar`, and each entry knows its parent. Threads therefore do
not see each other's λ, and a thread that is started inside a context has no λ. Each async task has
its own λ. Generators behave as under `torch.no_grad`: if a generator is suspended inside the
context, its λ stays set for the caller. Exit contexts in reverse order; otherwise an error is
raised and λ is cleared.

If a part of the model is called directly, such as the encoder in `generate` of T5 and BART, it uses
the λ of the context around the call. Only forwards of the whole model call a source.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

Level = float | Tensor | np.ndarray | Sequence[float]
"""One number in [0, 1], or one for each sample."""


def arguments_of(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a forward of `module` by name, in the order of its signature."""
    given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
    return dict(list(given.items())[1:])


def as_level(value: Level, *, axes: int = 1) -> Tensor:
    """Return `value` as a new float32 tensor (1,) or (b,) in [0, 1], or (b, k) if `axes` is 2.

    If `value` is a tensor, gradients flow to it. If that tensor is not on the CPU, values outside
    [0, 1] become NaN.

    Raises:
        ValueError: `value` has a wrong shape, or contains a number outside [0, 1].
    """
    try:
        level = as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"noise_level is {value!r}: pass a number in [0, 1], or a tensor or list with one value per sample."
        ) from None
    if level.is_complex() or level.dtype == torch.bool or level.dim() > axes or level.numel() == 0:
        raise ValueError(
            f"noise_level has shape {tuple(level.shape)} and dtype {level.dtype}: "
            f"pass one number, or a tensor of shape (batch,){' or (batch, parts)' * (axes - 1)}."
        )
    level = torch.atleast_1d(level.clone().float())  # later writes to `value` don't change λ
    return _in_range(level)


@torch.compiler.disable(recursive=True)
def _in_range(level: Tensor) -> Tensor:
    values = host_values(level)
    if values is None:
        return nan_outside(level)
    if not all(0 <= value <= 1 for value in values):
        raise ValueError(
            f"noise_level is {values}: every value has to lie in [0, 1], where 1 is pure noise."
        )
    return level


def host_values(tensor: Tensor) -> list[Any] | None:
    """Return the values of a CPU tensor as a flat list, or None for any other tensor.

    Reading a tensor on another device would block until that device is done, and fake tensors have
    no values.
    """
    if tensor.device.type != "cpu" or type(tensor) not in (Tensor, nn.Parameter):
        return None
    return tensor.reshape(-1).tolist()


def nan_outside(level: Tensor, slack: float = 0.0) -> Tensor:
    """Return λ with NaN for values outside [−slack, 1 + slack], without a copy to the host."""
    return level.where((level - 0.5).abs() <= 0.5 + slack, torch.nan)


def one_if_expanded(values: Tensor) -> Tensor:
    """Return `values` (b, …), or only the first as (1, …) if one value was expanded to the batch.

    An expanded tensor has a stride of zero. After an operation such as a cast, it no longer does.
    """
    return values[:1] if values.dim() > 0 and values.stride(0) == 0 else values


def as_tensor(value: Any) -> Tensor:
    """Return `value` as a tensor.

    Real numbers from Python and NumPy become float32, whatever the default dtype of torch is.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)) and any(isinstance(one, Tensor) for one in value):
        return torch.stack([as_tensor(one) for one in value])  # keeps the gradients
    tensor = torch.as_tensor(value)
    return torch.as_tensor(value, dtype=torch.float32) if tensor.is_floating_point() else tensor


def is_number(value: Any) -> bool:
    """Return whether `value` is a real number (not a bool) and its square fits into float32."""
    return isinstance(value, Real) and not isinstance(value, bool) and -1e9 <= float(value) <= 1e9


# ---------------------------------------------------------------------- contexts


class Entry:
    """A `noise_level` context that has been entered.

    Attributes:
        parent: the enclosing context, or None.
        holders: the core holders that the context applies to.
        level: λ; None after the context has exited, because copies of the `ContextVar` may remain.
        backward: the value of `backward_pass()` on entry.
    """

    __slots__ = ("backward", "holders", "level", "parent")

    def __init__(self, parent: Entry | None, holders: frozenset[nn.Module], level: Tensor) -> None:
        self.parent, self.holders = parent, holders
        self.level: Tensor | None = level
        self.backward = backward_pass()


present: ContextVar[Entry | None] = ContextVar("nara_noise_level", default=None)
"""The innermost entered context, whatever model it applies to."""


class noise_level:
    """Run forwards of `model` and its parts at noise level λ = `value`, overriding any source.

        with noise_level(model, 0.3):
            model(x)

    Contexts can be nested and entered again. On exit, even after an exception, the previous value
    is restored. Other threads and async tasks do not see λ. `value` is copied. A tensor that
    requires a gradient receives one.

    Args:
        model: an adapted model. It may be wrapped (PeftModel, DDP, `torch.compile`).
        value: λ in [0, 1], 1 = pure noise: a float, or a tensor, array or list (b,) with one value
            for each sample. Several values require that the inputs of the adapted layers start with
            the batch axis, (b, …). If the layers get (length, b, …), pass a float. A value (b, k)
            holds one λ for each of k equal, consecutive parts of a sample's l positions, such as
            blocks of a text; the layers must then get (b, l, …). A value (1, k) applies to all
            samples.

    Raises:
        ValueError: `value` is outside [0, 1], is NaN or has a wrong shape, or `model` has no NaRA
            adapter.
        RuntimeError: on exit, if another context is the innermost.
    """

    def __init__(self, model: nn.Module, value: Level) -> None:
        self._model, self._value = model, value
        self._entries: list[Entry] = []

    def __enter__(self) -> None:
        entry = Entry(
            present.get(), frozenset(core_holders(self._model)), as_level(self._value, axes=2)
        )
        self._entries.append(entry)
        present.set(entry)

    def __exit__(self, *error: object) -> None:
        innermost = entry = present.get()
        # `_entries` may have entries of other threads
        while entry is not None and entry not in self._entries:
            entry = entry.parent
        entry = self._entries[-1] if entry is None else entry
        self._entries.remove(entry)
        entry.level = None
        present.set(entry.parent if innermost is entry else None)
        if innermost is not entry:
            raise RuntimeError(
                "A noise_level(…) was exited while another one is the innermost, so no λ is known from here on: exit "
                "contexts in the reverse order of entering them, as nested `with` blocks do (a generator that "
                "is suspended inside of one, and closed later, does not)."
            )


def entry_for(holder: Any) -> Entry | None:
    """Return the innermost open context for the model of `holder`, or None if there is none."""
    entry = present.get()
    while entry is not None and (entry.level is None or holder not in entry.holders):
        entry = entry.parent
    return entry


def backward_pass() -> int:
    """Return the number of the backward pass that is running in this thread.

    The result is −1 outside a backward pass and while a compiler is tracing.
    """
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


# ---------------------------------------------------------------------- sources

MASKED_SHARE = "masked_share"
"""The name of λ's definition for masked language models."""

BLOCK_SHARE = "masked_share_of_block"
"""The same, of each block of the answer: clean text has λ = 0 (LLaDA2)."""

CORRUPTED_SHARE = "corrupted_share"
"""The name of λ's definition for DiffusionGemma: the share of a canvas that holds random tokens."""

CONVENTIONS = ("timestep", "flow", "edm", MASKED_SHARE, BLOCK_SHARE, CORRUPTED_SHARE)
"""The names of this package's definitions of λ; `timesteps` has the first three."""


class NoiseSource(Protocol):
    """Compute λ (1,) or (b,) from a forward's arguments; `convention` names the definition of λ."""

    convention: str

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor: ...


_registered: dict[str, NoiseSource] = {}


def register_noise_source(source: NoiseSource) -> None:
    """Make `source` the default source of models that have its convention.

        register_noise_source(ShareOfFrames())  # its `convention` is "share_of_frames"
        pipe.load_nara_weights("adapter")  # NaraConfig(noise_convention="share_of_frames")

    A model takes the `noise_convention` of its first adapter. A source is a callable
    (module, args, kwargs) → λ (1,) or (b,) in [0, 1]. The source applies to models that are adapted
    after this call, and takes precedence over the default source of their class. All these models
    share this one object.

    Raises:
        ValueError: the source has no convention, or its convention is already used by this package
            or by another source.
    """
    name = getattr(source, "convention", None)
    if not (isinstance(name, str) and name and callable(source)):
        raise ValueError(
            f"{source!r} is not a source of λ: expected a callable (module, args, kwargs) → λ (1,) or "
            "(b,) with an attribute `convention`, the name of its definition."
        )
    if name in CONVENTIONS:
        raise ValueError(
            f"λ as {name!r} is defined by this package: choose another name for your definition, or "
            "give one model its own source, set_noise_source(model, source)."
        )
    if _registered.setdefault(name, source) is not source:
        raise ValueError(
            f"λ as {name!r} has a source already, {_registered[name]!r}: choose another name for "
            "your definition."
        )


def registered_source(convention: str | None) -> NoiseSource | None:
    """Return the source that is registered for this convention, or None if there is none."""
    return _registered.get(convention or "")


def set_noise_source(model: nn.Module, source: NoiseSource | None) -> None:
    """Read λ (1,) or (b,) from `source` at each forward of `model` outside `noise_level(…)`.

    Pass None to remove the source.

    Raises:
        ValueError: `model` has no NaRA adapter, or an adapter was trained with another definition
            of λ.
    """
    holders = core_holders(model)
    for holder in holders:
        holder.finder.check_source(source)
    for holder in holders:
        holder.finder.set_source(source)


# ---------------------------------------------------------------------- adapted models


def checked_module(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{type(model).__name__} is not a torch.nn.Module: pass the model itself, e.g. pipe.unet."
        )
    return model


def find_holders(model: nn.Module) -> list[Any]:
    """Return the core holders in `model`, including `model` itself."""
    return [
        child
        for module in outer_modules(model)
        for child in module._modules.values()
        if getattr(type(child), "is_core_holder", False)
    ]


def outer_modules(root: nn.Module) -> list[nn.Module]:
    """Return `root` and its submodules, in no particular order.

    Modules inside adapted layers and holders are skipped. They make up five sixths of the modules
    of an adapted SDXL UNet, and samplers look for holders at every step.
    """
    found: dict[int, nn.Module] = {}
    left: list[nn.Module | None] = [root]
    while left:
        module = left.pop()
        if module is None or id(module) in found or "lora_A" in module._modules:
            continue
        if "cores" not in module._modules or not getattr(type(module), "is_core_holder", False):
            found[id(module)] = module
            left.extend(module._modules.values())
    return list(found.values())


def core_holders(model: nn.Module) -> list[Any]:
    """Return the core holders in `model`, including `model` itself.

    Raises:
        ValueError: `model` is not a module, or has no core holders.
    """
    found = find_holders(checked_module(model))
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no NaRA adapter: add one first, e.g. get_peft_model(model, NaraConfig(…))."
        )
    return found


# ---------------------------------------------------------------------- levels that training draws

Generators = Callable[[int], np.random.Generator]


@dataclass(frozen=True)
class NoiseWindow:
    """The range that training draws λ from: low ≤ λ < high, and also λ = 1 if high is 1.

    Raises:
        ValueError: the bounds do not satisfy 0 ≤ low < high ≤ 1.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(
                f"low is {self.low} and high {self.high}, expected 0 ≤ low < high ≤ 1: λ is 1 at pure noise, and "
                "timestep 700 of 1000 is 0.7."
            )

    @property
    def is_everything(self) -> bool:
        """Return whether the window contains every λ in [0, 1]."""
        return self.low <= 0 and self.high >= 1

    def contains(self, noise_level: Tensor) -> Tensor:
        """Return whether each λ (b,) lies inside the window, as (b,) bool, compared in float32."""
        levels = noise_level.float()
        low, high = levels.new_tensor(self.low), levels.new_tensor(self.high)
        return (levels >= low) & ((levels < high) | (high == 1))


EVERYTHING = NoiseWindow()


def stratified_uniform(
    indices: Sequence[int], group_size: int, shift: Generators, value: Generators
) -> np.ndarray:
    """Return u (b,), float64 in [0, 1), one draw for each index.

    The draws are independent if `group_size` is 1. A draw depends only on the sample's index, so a
    sample gets the same number in any process, at any batch size, in any order, and after resuming.
    In every group of n consecutive indices, each index falls into a different one of the n equal
    strata of [0, 1),

        u_i = ((i + shift) mod n + v_i) / n,   shift ~ U{0 … n − 1} per group,  v_i ~ U(0, 1)

    so each u_i is still uniform, while the mean over the group varies far less.

    Args:
        indices: indices of the samples in the training stream.
        group_size: n, the number of samples in a global batch, 1 or more.
        shift: returns the random generator for a group's shift, given the group's number.
        value: returns the random generator for a sample's v, given the sample's index.
    """
    n = group_size
    shifts = {group: int(shift(group).integers(n)) for group in {i // n for i in indices}}
    return np.array([((i + shifts[i // n]) % n + value(i).random()) / n for i in indices])
