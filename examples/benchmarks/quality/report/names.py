"""What the report calls things, which method is compared with which, and which figures there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nara_diffusion.training.adapters.methods import METHODS
from quality.report.data import Arm, Record
from quality.running import METHODS as MUST

LORA, DORA, FULL = Arm("lora"), Arm("dora"), Arm("full")
CONTROLS = {
    "constant": "trained with λ = 0.5",
    "shuffled": "trained with other samples' λ",
    "mean_core": "evaluated with the mean of C(λ)",
    "reversed": "evaluated with 1 − λ",
}
BASE = "base"
_TITLES = {BASE: "the backbone as it is", "nara_centred": "NaRA-Knots, centred", "nara_knots_dora": "NaRA-Knots-DoRA"}
SUITES = {"text": "Text", "images": "Images"}
_ORDER = (BASE, *MUST)


@dataclass(frozen=True)
class Measure:
    """Attributes:
    key: of a record.
    title: for people.
    digits: after the point.
    lower_is_better: as a loss.
    """

    key: str
    title: str
    digits: int
    lower_is_better: bool = False

    def __call__(self, record: Record) -> float | None:
        return record.get(self.key)


LOSS = Measure("validation_loss", "validation loss", 4, lower_is_better=True)
FURTHER = {
    "text": (Measure("exact_match", "exact match", 3),),
    "images": (
        Measure("similarity", "similarity to the subject", 3),
        Measure("text_alignment", "text alignment", 3),
        Measure("place_similarity", "similarity to the subject drawn in that place", 3),
    ),
}


def loss_of(suite: str) -> Measure:
    """Of images it is a hundredth as large, and so are its differences."""
    return replace(LOSS, digits=6) if suite == "images" else LOSS


def measures(suite: str, records: Sequence[Record]) -> list[Measure]:
    """The loss, and what else some of the records have."""
    return [loss_of(suite), *(m for m in FURTHER.get(suite, ()) if any(m(record) is not None for record in records))]


def title(arm: Arm) -> str:
    """For people: "NaRA", "NaRA, trained with λ = 0.5"."""
    method = _method_title(arm.method)
    return method if arm.control is None else f"{method}, {CONTROLS.get(arm.control, arm.control)}"


def _method_title(method: str) -> str:
    return METHODS[method].title if method in METHODS else _TITLES.get(method, method)


def ordered(arms: Sequence[Arm]) -> list[Arm]:
    """Baselines first, each noise-aware method with its controls behind it."""
    controls = list(CONTROLS)

    def place(arm: Arm) -> tuple[int, str, int]:
        known = _ORDER.index(arm.method) if arm.method in _ORDER else len(_ORDER)
        return known, arm.method, controls.index(arm.control) + 1 if arm.control in controls else 0

    return sorted(arms, key=place)


def baseline_of(method: str) -> Arm:
    """What a method has to beat."""
    return DORA if "dora" in method else LORA
