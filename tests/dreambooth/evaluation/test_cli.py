"""What `nara-metrics --help` says."""

from __future__ import annotations

import re

from nara_diffusion.dreambooth.evaluation import cli as metrics_command
from nara_diffusion.dreambooth.evaluation.report import write_run_report


def test_the_help_names_a_folder_that_a_training_writes() -> None:
    named = set(re.findall(r"out-seed-\d/(\S+)", str(metrics_command.__doc__)))
    assert named == {"samples-after"}
    assert "samples-after" in str(write_run_report.__doc__)
