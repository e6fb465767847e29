"""Transformers that are rectified flows: a file each, and what several of them share."""
