"""nara-check on the regimes: trials, and verdicts beside what is known."""
