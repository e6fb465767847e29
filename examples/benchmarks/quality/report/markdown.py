"""Numbers and tables as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nara_diffusion.utils.statistics import Interval
from quality.report.data import clear_of_zero

NOTHING = "–"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(found: Interval | None, digits: int) -> str:
    """Mean ± standard deviation; the mean alone of a single seed."""
    if found is None:
        return NOTHING
    mean = f"{found.mean:.{digits}f}"
    return mean if math.isnan(found.std) else f"{mean} ± {found.std:.{digits}f}"


def difference(found: Interval | None, digits: int) -> str:
    """Mean and 95 % interval with signs; bold where the interval doesn't hold zero, and the mean shows it."""
    if found is None:
        return NOTHING
    mean, low, high = (signed(value, digits) for value in (found.mean, found.low, found.high))
    return f"{_emphasised(mean, found)} [{low}, {high}]"


def change(found: Interval | None, digits: int) -> str:
    """As `difference`, in less room: mean ± half the width of the 95 % interval."""
    if found is None:
        return NOTHING
    return f"{_emphasised(signed(found.mean, digits), found)} ± {(found.high - found.low) / 2:.{digits}f}"


def _emphasised(mean: str, found: Interval) -> str:
    return f"**{mean}**" if clear_of_zero(found) and mean.strip("+−0.") else mean


def percent(share: float) -> str:
    """In whole percents."""
    text = f"{100 * share:.0f}"
    return ("0" if text == "-0" else text.replace("-", "−")) + " %"


def signed(value: float, digits: int) -> str:
    """With a real minus, and no sign on a zero."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def listed(values: Sequence[object]) -> str:
    """ "a, b and c"."""
    words = [str(value) for value in values]
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1] if words else ""]))
