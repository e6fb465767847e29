"""Helpers that any part of the package may use. They do not depend on adapters."""
