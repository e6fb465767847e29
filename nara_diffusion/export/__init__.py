"""To plain LoRAs and back, for hosts that know only those."""

from .fold import to_lora
from .plain_lora import PlainLora, PlainLoraLayer

__all__ = ["PlainLora", "PlainLoraLayer", "to_lora"]
