"""The task files of nara-eval, and the scoring of answers."""
