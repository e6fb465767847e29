"""Plain LoRAs in memory, and reading them from files of PEFT, Diffusers, kohya and ComfyUI."""
