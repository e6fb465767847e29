"""The test sets of nara-eval, and how their answers are scored."""
