"""Plain LoRAs: in memory, and in the files of PEFT, Diffusers, kohya and ComfyUI."""
