"""Export of NaRA to plain LoRAs, and import of those, for hosts that know only LoRA."""

from .bins import LoraBins, read_lora_bins, to_lora_bins
from .errors import ExportError
from .fold import to_lora
from .lora_to_nara import from_lora
from .plain_lora import PlainLora, PlainLoraLayer

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
