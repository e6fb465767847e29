"""The finished repeats of a check, one on each line of repeats.jsonl, so that a stopped check can continue."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from .trials import Repeat


class RepeatFile:
    """The repeats of one check.

    Args:
        path: the file. It need not exist.
        digests: {content: digest} of the data and the base model of the check.
    """

    def __init__(self, path: Path, digests: Mapping[str, str]) -> None:
        self.path, self.digests = path, dict(digests)

    def read(self) -> list[Repeat]:
        """Return the repeats of the file, without a last line that was cut off.

        Raises:
            ValueError: the repeats were measured on other data or with another base model.
        """
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            self.path.write_text(complete, encoding="utf-8")
        repeats = []
        for line in complete.splitlines():
            fields = json.loads(line)
            if fields["digests"] != self.digests:
                raise ValueError(
                    f"{self.path} was measured on other data or with another base model: give a fresh --output_dir."
                )
            losses = {arm: torch.tensor(values).double() for arm, values in fields["losses"].items()}
            repeats.append(Repeat(torch.tensor(fields["noise_level"]), losses))
        return repeats

    def append(self, repeat: Repeat) -> None:
        """Write one more repeat."""
        losses = {arm: values.tolist() for arm, values in repeat.losses.items()}
        fields = {"digests": self.digests, "noise_level": repeat.noise_level.tolist(), "losses": losses}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")
