"""Export of NaRA to plain LoRAs, and import of those, for hosts that know only LoRA."""

from .bins import LoraBins, read_lora_bins, to_lora_bins
from .from_lora import from_lora
from .host_files import save_host_file
from .plain_lora import ExportError, PlainLora, PlainLoraLayer
from .to_lora import to_lora

__all__ = [
    "ExportError",
    "LoraBins",
    "PlainLora",
    "PlainLoraLayer",
    "from_lora",
    "read_lora_bins",
    "save_host_file",
    "to_lora",
    "to_lora_bins",
]
