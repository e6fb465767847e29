"""Helpers that any part of the package may use; they know nothing of adapters."""
