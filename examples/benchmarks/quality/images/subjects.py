"""The subjects of the image benchmark, and the backbone that learns them."""

from __future__ import annotations

BACKBONE = "sdxl-tiny"
SUBJECTS = {"toy": "subject", "car": "subject-car", "cup": "subject-cup", "house": "subject-house"}
"""{name, which is that of its kind: folder of its five pictures}."""
IDENTIFIER = "sks"
SIZE = (64, 64)


def instance_prompt(subject: str) -> str:
    return f"a photo of {IDENTIFIER} {subject}"


def check_subject(subject: str) -> None:
    """Raises ValueError if there is no such subject."""
    if subject not in SUBJECTS:
        raise ValueError(f"subject is {subject!r}, expected one of {', '.join(SUBJECTS)}.")
