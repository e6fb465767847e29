"""ComfyUI's custom node "Load NaRA"; see README.md beside this file."""

from .node import LoadNaRA

NODE_CLASS_MAPPINGS = {"LoadNaRA": LoadNaRA}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadNaRA": "Load NaRA (noise-aware LoRA)"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
