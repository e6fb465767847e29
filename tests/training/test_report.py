"""What a run says at its end, beside its figures."""

from __future__ import annotations

import pytest

from nara_diffusion.training.report import advice


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, []),
        ({"validation_loss_after": 1.0}, ["validation loss"]),
        ({"validation_loss_after": float("nan")}, ["validation loss"]),
        ({"exact_match_before": 0.0, "exact_match_after": 0.0}, ["Exact match"]),
        ({"exact_match_before": 0.5, "exact_match_after": 0.25}, ["Exact match"]),
        ({"exact_match_before": 1.0, "exact_match_after": 1.0}, []),
        ({"similarity_before": 0.4, "similarity_after": 0.3}, ["samples"]),
        ({"similarity_before": None, "similarity_after": None}, []),
    ],
)
def test_figures_that_training_does_not_improve_get_advice(changed: dict[str, float], said: list[str]) -> None:
    good = {"validation_loss_before": 1.0, "validation_loss_after": 0.5}
    lines = advice({**good, **changed})
    assert len(lines) == len(said)
    assert all(word in line for word, line in zip(said, lines, strict=True))
