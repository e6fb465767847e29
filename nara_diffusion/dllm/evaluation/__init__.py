"""Evaluation of language models: exact match, likelihood, and the loss over λ."""
