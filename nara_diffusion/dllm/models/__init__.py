"""Masked language models: loading, tokenizers, heads."""
