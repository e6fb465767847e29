"""Samples, and what is measured on them."""
