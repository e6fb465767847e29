"""Export of NaRA to plain LoRAs, and import of those, for hosts that know only LoRA."""

from .from_lora import from_lora
from .host_files import save_host_file
from .plain_lora import ExportError, PlainLora, PlainLoraLayer
from .to_lora import to_lora

__all__ = [
    "ExportError",
    "PlainLora",
    "PlainLoraLayer",
    "from_lora",
    "save_host_file",
    "to_lora",
]
