"""Reading noise-aware adapters of other programs: T-LoRA of LyCORIS and of its authors, MultiAlign."""

from .reading import ForeignOptions, format_of, read_foreign

__all__ = ["ForeignOptions", "format_of", "read_foreign"]
