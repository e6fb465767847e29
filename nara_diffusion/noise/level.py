"""λ: its unit and validation, contexts and sources, and the levels that training draws.

λ is a float32 tensor (1,), (b,) or (b, k) in [0, 1]; 1 is pure noise. The host reads it only on the
CPU: on another device, a λ outside [0, 1] becomes NaN, and so does the output. A forward of an
adapted model gets λ from the first of these that exists:

1. the context `with noise_level(model, value): …`;
2. the source that `set_noise_source(model, source)` has set;
3. the source that `register_noise_source` has registered under the `noise_convention` of the
   model's first adapter;
4. the default of its class: `timesteps.Denoiser` if Diffusers' pipelines pass a timestep to models
   of this class (`rows` has the table); `blocks` has LLaDA2's, `canvas_source` DiffusionGemma's.

An adapter is saved with the name of its definition of λ (`noise_convention`). If the model's source
has another definition, an error is raised. `masked_share` has the source that reads λ from the
masks in a language model's input; it is never a default.

The contexts are entries of one `ContextVar`, and each entry knows its parent. Threads therefore do
not see each other's λ, and a thread that is started inside a context has none. Each async task has
its own λ. Generators behave as under `torch.no_grad`: a generator that is suspended inside the
context leaves λ to its caller. Exit contexts in reverse order; otherwise an error is raised and λ
is cleared.

A part of the model that is called by itself, such as the encoder in `generate` of T5 and BART, uses
the λ of the context around the call. Only forwards of the whole model call a source.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
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
    """Return name → argument of a forward of `module`, in the order of its signature."""
    given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
    return dict(list(given.items())[1:])


def as_level(value: Level, *, axes: int = 1) -> Tensor:
    """Return `value` as a new float32 tensor (1,) or (b,) in [0, 1], or (b, k) if `axes` is 2.

    If `value` is a tensor, gradients flow to it. If it is on another device than the CPU, values
    outside [0, 1] become NaN.

    Raises:
        ValueError: `value` is misshapen, or has a value outside [0, 1].
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
    """Return the values of a tensor on the CPU as a flat list; None for any other tensor.

    Reading any other tensor would mean waiting for its device, and fake tensors have no values.
    """
    if tensor.device.type != "cpu" or type(tensor) not in (Tensor, nn.Parameter):
        return None
    return tensor.reshape(-1).tolist()


def nan_outside(level: Tensor, slack: float = 0.0) -> Tensor:
    """Return λ with NaN in place of values outside [−slack, 1 + slack]. The host reads none."""
    return level.where((level - 0.5).abs() <= 0.5 + slack, torch.nan)


def one_if_expanded(values: Tensor) -> Tensor:
    """Return `values` (b, …), or only the first (1, …) if they are one value that was expanded.

    The strides show that. After an operation, such as a cast, they no longer do.
    """
    return values[:1] if values.dim() > 0 and values.stride(0) == 0 else values


def as_tensor(value: Any) -> Tensor:
    """Return `value` as a tensor.

    Real numbers of Python and numpy become float32, whatever torch's default dtype is.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)) and any(isinstance(one, Tensor) for one in value):
        return torch.stack([as_tensor(one) for one in value])  # keeps their gradients
    tensor = torch.as_tensor(value)
    return torch.as_tensor(value, dtype=torch.float32) if tensor.is_floating_point() else tensor


def is_number(value: Any) -> bool:
    """Return whether `value` is a real number, not a bool, with a square that fits float32."""
    return isinstance(value, Real) and not isinstance(value, bool) and -1e9 <= float(value) <= 1e9


# ---------------------------------------------------------------------- contexts


class Entry:
    """One entered context.

    Attributes:
        parent: the context around it, if any.
        holders: the holders of cores that it applies to.
        level: λ; None after the context has exited, since copies of the `ContextVar` may remain.
        backward: `backward_pass()` at the time of entry.
    """

    __slots__ = ("backward", "holders", "level", "parent")

    def __init__(self, parent: Entry | None, holders: frozenset[nn.Module], level: Tensor) -> None:
        self.parent, self.holders = parent, holders
        self.level: Tensor | None = level
        self.backward = backward_pass()


present: ContextVar[Entry | None] = ContextVar("nara_noise_level", default=None)
"""The innermost entered context, whatever model it applies to."""


class noise_level(ContextDecorator):
    """Run forwards of `model` and of its parts at noise level λ = `value`, whatever the source.

        with noise_level(model, 0.3):
            model(x)

    Contexts can be nested and entered again. On exit, also after an exception, the previous value
    is restored. Other threads and async tasks do not see λ. (`value` is copied. If it is a tensor
    that requires a gradient, it receives one.)

    Args:
        model: an adapted model, wrapped (PeftModel, DDP, `torch.compile`) or not.
        value: λ in [0, 1], 1 = pure noise: a float, or a tensor, array or list (b,) with one value
            for each sample. Several values need adapted layers that see the batch first, (b, …).
            If the model's layers get (length, b, …), pass a float. (b, k) has one value for each of
            k equal, consecutive parts of the l positions of a sample, such as blocks of a text;
            the layers then have to see (b, l, …). (1, k) applies to all samples.

    Raises:
        ValueError: `value` is outside [0, 1], NaN or misshapen, or `model` has no NaRA adapter.
        RuntimeError: on exit, if another context is the innermost.
    """

    def __init__(self, model: nn.Module, value: Level) -> None:
        self._model, self._value = model, value
        self._entries: list[Entry] = []

    def __call__(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate `func`: its calls run at λ.

        Raises:
            ValueError: `func` is a generator or `async def`, so its body runs after its call has
                returned.
        """
        kinds = (
            inspect.isgeneratorfunction,
            inspect.iscoroutinefunction,
            inspect.isasyncgenfunction,
        )
        if any(is_kind(func) for is_kind in kinds):
            raise ValueError(
                f"noise_level(…) decorates {getattr(func, '__name__', func)}, a generator or `async def`, and would "
                "end before its body runs: write `with noise_level(model, value):` inside of it."
            )
        return super().__call__(func)

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
    """Return the innermost open context for the model of `holder`; None if there is none."""
    entry = present.get()
    while entry is not None and (entry.level is None or holder not in entry.holders):
        entry = entry.parent
    return entry


def backward_pass() -> int:
    """Return the number of the backward pass that runs in this thread.

    Outside a backward pass, and while a compiler traces, it is −1.
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
    """Computes λ (1,) or (b,) from a forward's arguments. `convention` names its definition."""

    convention: str

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor: ...


_registered: dict[str, NoiseSource] = {}


def register_noise_source(source: NoiseSource) -> None:
    """Make `source` the default source of models that have its convention.

        register_noise_source(ShareOfFrames())  # its `convention` is "share_of_frames"
        pipe.load_nara_weights("adapter")  # NaraConfig(noise_convention="share_of_frames")

    A model has the `noise_convention` of its first adapter. A source is a callable
    (module, args, kwargs) → λ (1,) or (b,) in [0, 1]. It applies to models that are adapted after
    this call, and takes precedence over the default of their class. All these models share this one
    source.

    Raises:
        ValueError: the source has no convention, or its convention belongs to this package or to
            another source.
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
    """Return the registered source with this definition of λ; None if there is none."""
    return _registered.get(convention or "")


def set_noise_source(model: nn.Module, source: NoiseSource | None) -> None:
    """Read λ (1,) or (b,) from `source` at each forward of `model` outside `noise_level(…)`.

    None removes the source.

    Raises:
        ValueError: `model` has no NaRA adapter, or one was trained with another definition of λ.
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
    """Return the holders of cores at or below `model`."""
    return [
        child
        for module in outer_modules(model)
        for child in module._modules.values()
        if getattr(type(child), "is_core_holder", False)
    ]


def outer_modules(root: nn.Module) -> list[nn.Module]:
    """Return `root` and the modules below it, in any order.

    Modules inside adapted layers and holders are left out: they make up five sixths of an adapted
    SDXL UNet, and samplers look for holders at every step.
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
    """Return the holders of cores at or below `model`.

    Raises:
        ValueError: `model` is not a module, or there are none.
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
    """The noise levels that training draws λ from: low ≤ λ < high, and also λ = 1 if high is 1.

    Raises:
        ValueError: not 0 ≤ low < high ≤ 1.
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
        """True if every λ in [0, 1] lies inside."""
        return self.low <= 0 and self.high >= 1

    def contains(self, noise_level: Tensor) -> Tensor:
        """Return whether each λ (b,) lies inside, (b,) bool, compared in float32."""
        levels = noise_level.float()
        low, high = levels.new_tensor(self.low), levels.new_tensor(self.high)
        return (levels >= low) & ((levels < high) | (high == 1))


EVERYTHING = NoiseWindow()


def stratified_uniform(
    indices: Sequence[int], group_size: int, shift: Generators, value: Generators
) -> np.ndarray:
    """Return u (b,), float64 in [0, 1), for each index; independent draws if the group is 1.

    Random numbers depend only on the samples' indices: a sample gets the same number in any
    process, at any batch size, in any order, and after resuming. In every group of n consecutive
    indices, each index takes one of the n equal strata of [0, 1),

        u_i = ((i + shift) mod n + v_i) / n,   shift ~ U{0 … n − 1} per group,  v_i ~ U(0, 1)

    so that each u_i is still uniform, while the mean over the group varies far less.

    Args:
        indices: indices of the samples in the training stream.
        group_size: n, the samples of a global batch, 1 or more.
        shift: the generator of a group's shift, by the group's number.
        value: the generator of a sample's v, by its index.
    """
    n = group_size
    shifts = {group: int(shift(group).integers(n)) for group in {i // n for i in indices}}
    return np.array([((i + shifts[i // n]) % n + value(i).random()) / n for i in indices])
