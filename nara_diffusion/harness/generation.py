"""Conversion of a request's gen_kwargs to the arguments of `nara_diffusion.dllm.generate`.

lm-eval merges --gen_kwargs into the gen_kwargs of the task file, and passes the result with each request.

| `generate`             | in gen_kwargs                             | default        |
|------------------------|-------------------------------------------|----------------|
| `gen_length`           | gen_length, else max_gen_toks             | 256            |
| `steps`                | steps                                     | one a token    |
| `block_length`         | block_length                              | one block      |
| `temperature`          | temperature, unless do_sample is false    | 0              |
| `cfg_scale`            | cfg_scale                                 | 0              |
| `remasking`            | remasking                                 | low_confidence |
| `confidence_threshold` | confidence_threshold                      | none           |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nara_diffusion.dllm.sampler_config import Sampling

SETTINGS = ("gen_length", "steps", "block_length", "temperature", "cfg_scale", "remasking", "confidence_threshold")
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's names, first wins
DEFAULT_LENGTH = 256

# Settings for autoregressive samplers in task files, and their values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (None, 1),
    "top_k": (None, 0, -1),
    "min_p": (None, 0),
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1),
}


@dataclass(frozen=True)
class HowToAnswer:
    """Attributes:
    until: the answer ends at the first occurrence of any of these texts.
    sampling: the arguments of `nara_diffusion.dllm.generate`, as sorted pairs, which can be compared and hashed.
    """

    until: tuple[str, ...]
    sampling: tuple[tuple[str, Any], ...]


def read_gen_kwargs(gen_kwargs: Mapping[str, Any]) -> HowToAnswer:
    """Read the gen_kwargs of a request.

    Raises:
        ValueError: a setting that the masked-diffusion sampler doesn't have, or a value that it refuses.
    """
    given = dict(gen_kwargs)
    until = given.pop("until", None) or []
    lengths = {name: given.pop(name, None) for name in LENGTHS}
    is_greedy = given.pop("do_sample", None) is False or not given.get("temperature")
    others = {name: given.pop(name) for name in _NEUTRAL if name in given}
    wrong = [name for name, value in others.items() if not is_greedy and value not in _NEUTRAL[name]]
    if wrong:
        raise ValueError(
            f"gen_kwargs has {wrong[0]}={others[wrong[0]]}, which the masked-diffusion sampler doesn't have: switch it "
            f"off with --gen_kwargs {wrong[0]}={_NEUTRAL[wrong[0]][-1]}"
        )
    unknown = sorted(given.keys() - set(SETTINGS))
    if unknown:
        raise ValueError(f"gen_kwargs has {', '.join(unknown)}; the sampler's settings are {', '.join(SETTINGS)}")
    sampling = {name: _converted(name, value) for name, value in given.items() if value is not None}
    if is_greedy:
        sampling["temperature"] = 0.0
    if "gen_length" not in sampling:
        found = (_converted(name, length) for name, length in lengths.items() if length is not None)
        sampling["gen_length"] = next(found, DEFAULT_LENGTH)
    _check(sampling)
    return HowToAnswer((until,) if isinstance(until, str) else tuple(until), tuple(sorted(sampling.items())))


def contradiction(gen_kwargs: Mapping[str, Any]) -> str | None:
    """A warning about a temperature that contradicts do_sample; None if they agree.

    It is no error: lm-eval's tasks have such pairs, and lm-eval's own models follow do_sample too.
    """
    samples, temperature = gen_kwargs.get("do_sample"), gen_kwargs.get("temperature") or 0
    if samples is False and temperature:
        return (
            f"gen_kwargs has temperature={temperature:g}, which isn't used beside do_sample=False: add "
            "--gen_kwargs do_sample=True to sample"
        )
    if samples is True and not temperature:
        return (
            "gen_kwargs has do_sample=True, but answers are greedy at temperature=0 all the same: add "
            "--gen_kwargs temperature=0.7, or another, to sample"
        )
    return None


def _check(sampling: Mapping[str, Any]) -> None:
    """Raises the errors of `generate` before the first answer is generated."""
    defaults = {"steps": None, "block_length": sampling["gen_length"], "cfg_scale": 0.0}
    defaults |= {"remasking": "low_confidence", "confidence_threshold": None}
    Sampling(**{**defaults, **sampling})  # type: ignore[arg-type]


def _converted(name: str, value: Any) -> Any:
    kinds = dict.fromkeys((*LENGTHS, "gen_length", "steps", "block_length"), int) | {"remasking": str}
    kind = kinds.get(name, float)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = isinstance(value, str) if kind is str else is_number and (kind is float or float(value).is_integer())
    if not fits:
        expected = {int: "a whole number", float: "a number", str: "a word"}[kind]
        raise ValueError(f"gen_kwargs has {name}={value!r}, expected {expected}")
    return kind(value)


def cut(text: str, until: tuple[str, ...]) -> str:
    """`text` up to the first occurrence of any text in `until`."""
    places = [text.find(stop) for stop in until if stop]
    return text[: min((place for place in places if place >= 0), default=len(text))]
