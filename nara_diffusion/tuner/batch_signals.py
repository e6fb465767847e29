"""λ and the mask density of a batch: checked, and selected for an adapter or for merging."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nara_diffusion.noise.level import NoiseSignals, NoiseSource, arguments_of

from .checkpointing import outer_modules


def of_adapter(adapter_name: str, signals: NoiseSignals | None, names: list[str] | None) -> NoiseSignals | None:
    """The signals of the samples whose adapter this is. `names`: PEFT's `adapter_names`, one for each sample."""
    if names is None or signals is None:
        return signals
    rows = [index for index, name in enumerate(names) if name == adapter_name]

    def pick(signal: Tensor | None) -> Tensor | None:
        if signal is None or signal.shape[0] == 1:
            return signal
        if signal.shape[0] != len(names):
            raise ValueError(f"noise_level has {signal.shape[0]} values, but adapter_names has {len(names)}.")
        return signal[rows]

    return NoiseSignals(pick(signals.noise_level), pick(signals.mask_density))  # type: ignore[arg-type]


def check_known(
    root: nn.Module, noisy: list[str], dense: list[str], signals: NoiseSignals | None, remedy: str | None
) -> None:
    """Raises ValueError if λ, or the mask density, is not known.

    Args:
        noisy, dense: the adapters that need the one and the other. remedy: the end of the message, if not the usual.
    """
    if signals is None and noisy:
        usual = (
            "call the model inside `with noise_level(model, value):`, or let it read λ from its own inputs by "
            f"`set_noise_source(model, source)`.{_how_to_declare(root)}"
        )
        raise ValueError(
            f"λ is not known, but adapter(s) {', '.join(map(repr, noisy))} depend on it: {remedy or usual}"
        )
    if dense and (signals is None or signals.mask_density is None):
        raise ValueError(
            f"The mask density is not known, but adapter(s) {', '.join(map(repr, dense))} read it: pass "
            "noise_level(model, value, mask_density=…), or set a source that tells it."
        )


def check_rows_of_root(holder: Any, signals: NoiseSignals, source: NoiseSource | None, args: Any, kwargs: Any) -> None:
    """Refuse several values of λ which layers of this class of models can't tell apart.

    Raises:
        ValueError: layers see no samples first; or they may see multiples of the batch, and there is not one value a
            row of the root's first tensor, or blocks run on slices of the batch.
    """
    root, channel, values = holder.root, holder.channel, len(signals.noise_level)
    if not (channel.one_level or channel.sample_major):
        return
    if channel.one_level:
        raise ValueError(
            f"noise_level has {values} values, but the layers of {type(root).__name__} see tokens where others see "
            "samples, so that each cannot get its own C: let the batch share one λ, or run its samples one by one."
        )
    timestep, arguments = getattr(source, "argument", None), arguments_of(root, args, kwargs)
    tensors = (t for name, t in arguments.items() if name != timestep and isinstance(t, Tensor) and t.dim() > 0)
    batch = next(map(len, tensors), None)
    if values != batch:
        raise ValueError(
            f"noise_level has {values} values, but the batch is {batch}: pass one value, or one a sample of the batch "
            "as the model sees it (after CFG or repeats)."
        )
    if any(map(_splits_batch, outer_modules(root))):
        raise ValueError(
            f"noise_level has {values} values, but blocks of {type(root).__name__} run on slices of the batch (forward "
            "chunking, or FreeNoise's split inference), whose samples cannot be told apart: pass one λ for the whole "
            "batch, or turn that off (chunking along dim=1 is fine)."
        )


def _splits_batch(module: nn.Module) -> bool:
    own = vars(module)
    chunked = own.get("_chunk_size") is not None and own.get("_chunk_dim") == 0
    return chunked or (type(module).__name__ == "SplitInferenceModule" and own.get("split_dim") == 0)


def _how_to_declare(root: nn.Module) -> str:
    kinds = [kind.__name__ for kind in type(root).__mro__]
    if "ModelMixin" not in kinds:  # of Diffusers
        return ""
    return f" To have it read its timestep, declare register_denoiser('{kinds[0]}', meaning) before adding adapters."
