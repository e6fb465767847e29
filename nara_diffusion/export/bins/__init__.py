"""Several LoRAs and a schedule of strengths over λ in place of one NaRA."""
