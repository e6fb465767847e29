"""Plain LoRAs as files for other programs: Diffusers, kohya / A1111 / Forge, ComfyUI."""

from .files import BASES, FORMS, host_state_dict, save_host_file

__all__ = ["BASES", "FORMS", "host_state_dict", "save_host_file"]
