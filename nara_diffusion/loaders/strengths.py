"""λ-dependent strengths as values of Diffusers' `set_adapters`.

Diffusers' own function maps weights to layers; it is called on stand-ins of the layers. It ignores a weight for an
unknown block or component without an error: a schedule there is refused. So is one for a text encoder, which runs
without a λ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from diffusers.loaders.peft import _SET_ADAPTER_SCALE_FN_MAPPING, PeftAdapterMixin
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
from diffusers.utils.peft_utils import set_weights_and_activate_adapters
from peft.tuners.tuners_utils import BaseTunerLayer

from nara_diffusion.noise.strength import StrengthSchedule
from nara_diffusion.tuner.strength.conversions import warn_where_off
from nara_diffusion.tuner.strength.layers import check_strength, has_strength, layers_of, live_strengths
from nara_diffusion.tuner.strength.set_strength import replace_schedules

from .guards import check_not_wrapped
from .insertion import adapters_of
from .schedulers import DENOISERS

ByLayer = dict[str, StrengthSchedule]
_UNET_KEYS = ("down", "mid", "up")


def set_weights(original: Callable[..., None], model: Any, adapter_names: list[str] | str, weights: Any) -> None:
    """Diffusers' `set_adapters` of one model, with schedules allowed among the weights.

    A layer that gets a schedule has that, in place of the one that it had; a number, 1 where there is none, multiplies
    the schedule of its layer.

    Raises:
        ValueError: there is no such block; a weight is another function than a schedule; or see
            `strength_layers.check_strength`. The model is unchanged.
    """
    _refuse_functions(weights)
    _check_no_tuple(weights)
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    given = weights if isinstance(weights, list) else [weights] * len(names)
    found = strengths_of(model, names, given)
    original(model, adapter_names, _without_schedules(weights))
    for name in found:
        if found[name]:
            replace_schedules(model, name, live_strengths(model, name) | found[name])
        warn_where_off(model, name)


def strengths_of(model: Any, adapter_names: list[str], weights: list[Any]) -> dict[str, ByLayer]:
    """Adapter → name of a layer of `model` → its λ-dependent strength, for the layers that get one.

    Raises:
        ValueError: see `set_weights`.
    """
    found: dict[str, ByLayer] = {}
    for name, weight in zip(adapter_names, weights, strict=False):  # Diffusers has an error where lengths differ
        if name not in adapters_of(model):
            continue  # in another component
        found[name] = _by_layer(model, name, weight) if has_schedules(weight) else {}
        if found[name] or has_strength(model, name):
            check_strength(model, adapters_of(model)[name], name, found[name])
    return found


def check_components(pipe: Any, adapter_names: list[str] | str, weights: Any) -> None:
    """Refuse schedules for components that cannot have them, before the first component is changed.

    Raises:
        ValueError: the component does not exist, runs without a λ, or is wrapped; or see `set_weights`.
    """
    _refuse_functions(weights)
    if not has_schedules(weights):
        return
    _check_no_tuple(weights)
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    given = weights if isinstance(weights, list) else [weights] * len(names)
    _check_dicts(names, given)
    for name, weight in zip(names, given, strict=False):
        components = pipe._lora_loadable_modules
        unknown = sorted(weight.keys() - set(components)) if isinstance(weight, dict) else []
        if unknown:
            raise ValueError(
                f"adapter_weights has {', '.join(map(repr, unknown))}, which is no component of {type(pipe).__name__} "
                f"that adapters are for: choose among {', '.join(map(repr, components))}."
            )
        for component in components:
            own = weight.get(component) if isinstance(weight, dict) else weight
            _check_component(pipe, component, name, own)


def _check_no_tuple(weights: Any) -> None:
    """Raises ValueError if schedules are in a tuple, of which Diffusers would make a strength."""
    if isinstance(weights, tuple) and has_schedules(weights):
        raise ValueError(
            f"adapter_weights has {weights!r}, which is a tuple, which set_adapters takes for one strength: pass a "
            f"list, {list(weights)!r}."
        )
    inner = weights.values() if isinstance(weights, Mapping) else weights if isinstance(weights, list) else ()
    for weight in inner:
        _check_no_tuple(weight)


def _check_dicts(adapter_names: list[str], given: list[Any]) -> None:
    """Raises ValueError if adapters share a dict with schedules: Diffusers takes out what it gives to the first."""
    for weight in given:
        sharing = [name for name, other in zip(adapter_names, given, strict=False) if other is weight]
        if isinstance(weight, dict) and has_schedules(weight) and len(sharing) > 1:
            raise ValueError(
                f"adapter_weights has one dict for {' and '.join(map(repr, sharing))}, of which Diffusers gives the "
                f"strengths to {sharing[0]!r} alone: pass each a dict of its own, [{{…}}, {{…}}]."
            )


def _check_component(pipe: Any, component: str, adapter_name: str, weight: Any) -> None:
    model = getattr(pipe, component, None)
    if model is None or adapter_name not in adapters_of(model) or not has_schedules(weight):
        return
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            f"pipe.{component} is wrapped by torch.compile, which Diffusers' set_adapters passes by: call "
            f"nara_diffusion.set_strength(pipe.{component}, {adapter_name!r}, strength), or compile it in place, "
            f"pipe.{component}.compile()."
        )
    check_not_wrapped(model, component, "set_adapters")
    if not isinstance(model, PeftAdapterMixin) and component not in DENOISERS:
        raise ValueError(
            f"Adapter '{adapter_name}' has a part in {component}, which runs before there is a λ, so that it can have "
            "no StrengthSchedule: pass a weight for each component, adapter_weights={"
            f"'{pipe._lora_loadable_modules[0]}': StrengthSchedule(…), '{component}': 1.0}}."
        )
    strengths_of(model, [adapter_name], [weight])


# ---------------------------------------------------------------------- which layer has which


class _StandIn(BaseTunerLayer):
    """Records the weight that Diffusers sets on a layer."""

    def __init__(self) -> None:
        self.weight_of: dict[str, Any] = {}

    def set_adapter(self, adapter_names: Any, inference_mode: bool = False) -> None:
        """Which adapters are active is not asked here."""

    def set_scale(self, adapter: str, scale: Any) -> None:
        self.weight_of[adapter] = scale


class _StandIns:
    """A model's adapted layers, as Diffusers walks over them."""

    def __init__(self, layers: dict[str, _StandIn]) -> None:
        self.layers = layers

    def named_modules(self) -> Iterator[tuple[str, _StandIn]]:
        yield from self.layers.items()


def _by_layer(model: Any, adapter_name: str, weight: Any) -> ByLayer:
    layers = {name: _StandIn() for name in layers_of(model, adapter_name)}
    _check_blocks(model, weight)
    expanded = _SET_ADAPTER_SCALE_FN_MAPPING[type(model).__name__](model, [weight])
    for name, layer in layers.items():
        try:
            set_weights_and_activate_adapters(_StandIns({name: layer}), [adapter_name], expanded)
        except IndexError:
            raise ValueError(
                f"adapter_weights names blocks, and Diffusers finds none for layer '{name}' of adapter "
                f"'{adapter_name}': pass one strength for the whole model."
            ) from None
    given = {name: layer.weight_of[adapter_name] for name, layer in layers.items()}
    return {name: strength for name, strength in given.items() if isinstance(strength, StrengthSchedule)}


def _check_blocks(model: Any, weight: Any) -> None:
    """Raises ValueError for names of blocks that Diffusers would ignore, or on which it would fail."""
    if not isinstance(weight, Mapping):
        return
    if _SET_ADAPTER_SCALE_FN_MAPPING[type(model).__name__] is not _maybe_expand_lora_scales:
        modules = [name for name, _ in model.named_modules()]
        for key in weight:
            if not any(str(key) in name for name in modules):
                _refuse_block(key, model, "a part of the names of its modules, e.g. 'transformer_blocks.0.'")
        return
    for key, inner in weight.items():
        if key not in _UNET_KEYS:
            _refuse_block(key, model, f"{', '.join(map(repr, _UNET_KEYS))}")
        blocks = getattr(model, f"{key}_blocks", ())
        known = [f"block_{index}" for index, block in enumerate(blocks) if hasattr(block, "attentions")]
        for name in inner if isinstance(inner, Mapping) else ():
            if name not in known:
                _refuse_block(f"{key}.{name}", model, ", ".join(map(repr, known)) or "one strength")


def _refuse_block(key: Any, model: Any, choices: str) -> None:
    raise ValueError(
        f"adapter_weights names {key!r}, which is no block of this {type(model).__name__} that can have a weight of "
        f"its own: choose {choices}."
    )


# ---------------------------------------------------------------------- schedules in nested weights


def has_schedules(weights: Any) -> bool:
    """Whether `set_adapters` is given a StrengthSchedule, for whatever component or block."""
    return any(isinstance(weight, StrengthSchedule) for weight in _leaves(weights))


def has_functions(weights: Any) -> bool:
    """Whether `set_adapters` is given a StrengthSchedule, or another function, which is refused."""
    return any(map(callable, _leaves(weights)))


def _refuse_functions(weights: Any) -> None:
    """Raises ValueError for a function of λ that is no StrengthSchedule, on which PEFT fails amid the layers."""
    for weight in _leaves(weights):
        if callable(weight) and not isinstance(weight, StrengthSchedule):
            raise ValueError(
                f"adapter_weights holds {weight!r}: a strength that depends on λ is a StrengthSchedule([(λ, strength), "
                "…]), linear between its points."
            )


def _leaves(weights: Any) -> Iterator[Any]:
    if isinstance(weights, Mapping):
        weights = list(weights.values())
    if isinstance(weights, (list, tuple)):
        for weight in weights:
            yield from _leaves(weight)
    else:
        yield weights


def _without_schedules(weights: Any) -> Any:
    """The same weights with 1 in place of each schedule."""
    if isinstance(weights, StrengthSchedule):
        return 1.0
    if isinstance(weights, Mapping):
        return {key: _without_schedules(weight) for key, weight in weights.items()}
    return [_without_schedules(weight) for weight in weights] if isinstance(weights, list) else weights
