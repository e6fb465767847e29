"""sdxl-tiny and sd-tiny-flow: their networks, what these are trained on, how good they are, their cards."""
