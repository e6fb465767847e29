"""To plain LoRAs and back, for hosts that know only those."""

from .fold import to_lora
from .lora_to_nara import from_lora
from .plain_lora import PlainLora, PlainLoraLayer

__all__ = ["PlainLora", "PlainLoraLayer", "from_lora", "to_lora"]
