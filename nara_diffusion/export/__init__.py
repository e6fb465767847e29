"""Export NaRAs as plain LoRAs for programs that support only LoRA, and import plain LoRAs."""

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
