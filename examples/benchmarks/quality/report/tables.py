"""The tables of RESULTS.md: Grid → Markdown; what they call things, and which method is compared with which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nara_diffusion.training.arguments import NAMED
from quality.report.data import NOTHING, Arm, Grid, Record, Value, change, difference, percent, spread, table
from quality.running import METHODS as MUST
from quality.running import is_noise_aware

# ---------------------------------------------------------------------- names

LORA, DORA, FULL = Arm("lora"), Arm("dora"), Arm("full")
CONTROLS = {
    "constant": "trained with λ = 0.5",
    "shuffled": "trained with other samples' λ",
    "mean_core": "evaluated with the mean of C(λ)",
    "reversed": "evaluated with 1 − λ",
}
BASE = "base"
_TITLES = {
    BASE: "the backbone as it is",
    "full": "full fine-tuning",
    "rslora": "rsLoRA",
    "pissa": "PiSSA",
    "vera": "VeRA",
    "adalora": "AdaLoRA",
    "oft": "OFT",
    "nara_centred": "NaRA-Knots, centred",
    "nara_knots_dora": "NaRA-Knots-DoRA",
}
SUITES = {"text": "Text", "images": "Images"}
_ORDER = (BASE, *MUST)


@dataclass(frozen=True)
class Measure:
    """Attributes:
    key: of a record.
    title: for people.
    digits: after the point.
    """

    key: str
    title: str
    digits: int

    def __call__(self, record: Record) -> float | None:
        return record.get(self.key)


LOSS = Measure("validation_loss", "validation loss", 4)
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


def title(arm: Arm) -> str:
    """For people: "NaRA", "NaRA, trained with λ = 0.5"."""
    method = _method_title(arm.method)
    return method if arm.control is None else f"{method}, {CONTROLS.get(arm.control, arm.control)}"


def _method_title(method: str) -> str:
    return NAMED[method].title if method in NAMED else _TITLES.get(method, method)


def ordered(arms: Sequence[Arm]) -> list[Arm]:
    """Baselines first, each noise-aware method with its controls behind it."""
    controls = list(CONTROLS)

    def place(arm: Arm) -> tuple[int, str, int]:
        position = _ORDER.index(arm.method) if arm.method in _ORDER else len(_ORDER)
        return position, arm.method, controls.index(arm.control) + 1 if arm.control in controls else 0

    return sorted(arms, key=place)


def baseline_of(method: str) -> Arm:
    """What a method has to beat."""
    return DORA if "dora" in method else LORA


# ---------------------------------------------------------------------- tables


def quality_table(grid: Grid, measure: Measure) -> str:
    """A row for each arm: the measure on each domain and over all, and the difference to LoRA, and of DoRAs to DoRA."""
    domains, digits, is_loss = grid.domains, measure.digits, measure.key == LOSS.key
    rows = []
    for arm in ordered(grid.arms):
        by_domain = [spread(grid.spread(arm, measure, [name]), digits) for name in domains]
        over_all = [spread(grid.spread(arm, measure), digits)] if len(domains) > 1 else []
        to_lora = NOTHING if arm == LORA else difference(grid.difference(arm, LORA, measure), digits)
        is_dora = "dora" in arm.method and arm != DORA
        to_dora = difference(grid.difference(arm, DORA, measure), digits) if is_dora else NOTHING
        gap = [closed(grid, arm)] if is_loss and FULL in grid.arms else []
        rows.append([_with_seeds(grid, arm, measure), *by_domain, *over_all, to_lora, to_dora, *gap])
    mean = ["all"] if len(domains) > 1 else []
    gap = ["gap closed"] if is_loss and FULL in grid.arms else []
    return table([measure.title, *domains, *mean, "− LoRA", "− DoRA", *gap], rows)


def domains_table(grid: Grid, measure: Measure) -> str:
    """A row for each arm, a column for each domain: the paired difference to LoRA, of DoRAs to DoRA, and of a control
    to what it controls."""
    rows = []
    for arm in ordered(grid.arms):
        other = Arm(arm.method) if arm.control else baseline_of(arm.method)
        if arm != LORA and arm.method != BASE:
            differences = [
                grid.difference(arm, LORA if arm == DORA else other, measure, [name]) for name in grid.domains
            ]
            rows.append([title(arm), *(difference(of_domain, measure.digits) for of_domain in differences)])
    return table([f"{measure.title}, difference", *grid.domains], rows)


def closed(grid: Grid, arm: Arm) -> str:
    """(LoRA − arm) / (LoRA − full), of mean losses: 0 % is LoRA, 100 % full fine-tuning."""
    gain, full = grid.difference(arm, LORA, LOSS), grid.difference(FULL, LORA, LOSS)
    if gain is None or full is None or full.mean >= 0:
        return NOTHING
    return percent(gain.mean / full.mean)


def _with_seeds(grid: Grid, arm: Arm, measure: Measure) -> str:
    """Its name, and of how many seeds it has a mean over all domains, where others have more."""
    count, most = (len(grid.per_seed(other, measure)) for other in (arm, LORA))
    return title(arm) if count >= most else f"{title(arm)} ({count} of {most} seeds)"


def bin_value(index: int) -> Value:
    """The loss of one bin of λ."""

    def value(record: Record) -> float:
        return float(record["losses"][index])

    return value


def noise_levels(grid: Grid) -> list[float]:
    """λ of the bins."""
    return next(iter(grid.cells.values()))["noise_levels"]


def bins_table(grid: Grid) -> str:
    """Over the bins of λ: LoRA's and DoRA's loss ± deviation; the others' difference to them ± half the interval."""
    digits = loss_of(next(iter(grid.cells.values()))["suite"]).digits
    levels = noise_levels(grid)
    baselines = [arm for arm in (LORA, DORA) if arm in grid.arms]
    rows = []
    for arm in baselines:
        rows.append([title(arm), *(spread(grid.spread(arm, bin_value(i)), digits) for i in range(len(levels)))])
    for arm in ordered(grid.arms):
        if arm in baselines:
            continue
        baseline = baseline_of(arm.method)
        differences = [grid.difference(arm, baseline, bin_value(index)) for index in range(len(levels))]
        rows.append([f"{title(arm)} − {title(baseline)}", *(change(of_bin, digits) for of_bin in differences)])
    return table(["λ", *(f"{level:.2f}" for level in levels)], rows)


def controls_table(grid: Grid, measure: Measure) -> str | None:
    """Each control against the method that it controls, and against its LoRA or DoRA; None if none ran."""
    rows = []
    for arm in ordered(grid.arms):
        if arm.control is None or not is_noise_aware(arm.method):
            continue
        method, baseline = Arm(arm.method), baseline_of(arm.method)
        rows.append(
            [
                title(arm),
                spread(grid.spread(arm, measure), measure.digits),
                difference(grid.difference(arm, method, measure), measure.digits),
                difference(grid.difference(arm, baseline, measure), measure.digits),
            ]
        )
    header = [measure.title, "of the control", "control − method", "control − its LoRA or DoRA"]
    return table(header, rows) if rows else None
