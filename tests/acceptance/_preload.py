"""What the server of child processes imports once, before it forks them."""

import accelerate
import datasets
import diffusers
import peft
import transformers

import nara_diffusion
import nara_diffusion.dllm

__all__ = ["accelerate", "datasets", "diffusers", "nara_diffusion", "peft", "transformers"]
