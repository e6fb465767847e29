"""Export of NaRA to plain LoRAs, and import of those, for hosts that know only LoRA."""

from .bins import LoraBins, read_lora_bins, to_lora_bins
from .errors import ExportError
from .fold import to_lora
from .lora.plain_lora import PlainLora, PlainLoraLayer
from .lora_to_nara import from_lora

__all__ = [
    "ExportError",
    "LoraBins",
    "PlainLora",
    "PlainLoraLayer",
    "from_lora",
    "read_lora_bins",
    "to_lora",
    "to_lora_bins",
]
