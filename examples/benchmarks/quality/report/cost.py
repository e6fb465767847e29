"""What methods cost, of records of the stage "cost", as a table."""

from __future__ import annotations

from collections.abc import Sequence

from quality.report.data import Arm, Record
from quality.report.markdown import table
from quality.report.names import ordered, title


def cost_table(records: Sequence[Record]) -> str:
    """Parameters, the time and the memory of a step, and their ratios to LoRA's of the same process."""
    found = {Arm(record["method"]): record for record in records}
    rows = []
    for arm in ordered(list(found)):
        record = found[arm]
        low, high = (f"{value:.2f}" for value in record["step_ratio_quartiles"])
        rows.append(
            [
                title(arm),
                f"{record['trainable_parameters']:,}".replace(",", " "),
                f"{record['parameters_ratio']:.2f}",
                f"{record['step_ms']:.0f}",
                f"{record['step_ratio']:.2f} ({low} to {high})",
                f"{record['memory_ratio']:.2f}",
            ]
        )
    return table(["", "parameters", "/ LoRA's", "ms a step", "/ LoRA's", "memory / LoRA's"], rows)
