"""Run as a process of its own, without nara_diffusion: what Diffusers alone makes of LoRA folders.

python stock_loading.py BASE INPUTS OUTPUT FOLDER …: each folder is loaded into a fresh pipeline, whose outputs at
INPUTS and whose numbers of LoRA layers go to OUTPUT as NAME/COMPONENT and NAME/COMPONENT/layers.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


@torch.no_grad()
def outputs(pipe: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Component → its output, whole."""
    encoders = {name: getattr(pipe, name)(inputs["ids"]).last_hidden_state for name in COMPONENTS[1:]}
    conditions = {"text_embeds": inputs["text_embeds"], "time_ids": inputs["time_ids"]}
    unet = pipe.unet(inputs["sample"], inputs["timestep"], inputs["states"], added_cond_kwargs=conditions).sample
    return {"unet": unet, **encoders}


def lora_layers(module: torch.nn.Module) -> list[str]:
    return sorted(name for name, layer in module.named_modules() if isinstance(layer, LoraLayer))


def main(base: str, inputs: str, output: str, *folders: str) -> None:
    found = {}
    for folder in folders:
        pipe = StableDiffusionXLPipeline.from_pretrained(base)
        pipe.load_lora_weights(folder)
        name = Path(folder).name
        found |= {f"{name}/{key}": value.contiguous() for key, value in outputs(pipe, load_file(inputs)).items()}
        for key in COMPONENTS:
            found[f"{name}/{key}/layers"] = torch.tensor(len(lora_layers(getattr(pipe, key))))
    assert "nara_diffusion" not in sys.modules
    save_file(found, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
