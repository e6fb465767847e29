"""One NaRA as several LoRAs, each with a schedule of its strength over λ."""
