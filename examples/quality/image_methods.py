"""The methods of the image benchmark as arguments of the train script, and the UNet that each of them trains."""

from __future__ import annotations

import copy
from typing import Any

from peft import LoraConfig, inject_adapter_in_model

from nara_diffusion.training.adapter import adapter_config

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"core_type": "identity"},
    "dora": {"core_type": "identity", "use_dora": True},
    "nara": {},
    "nara_dora": {"use_dora": True},
    "nara_c": {"core_type": "constant"},
}
PLAIN = ("lora", "dora")


def adapted_unet(pipe: Any, method: str, args: Any) -> Any:
    """A copy of the UNet of `pipe` in which what `method` trains, and nothing else, is trainable."""
    unet = copy.deepcopy(pipe.unet)
    if method == "full":
        return unet.requires_grad_(True)
    config: Any = adapter_config(args, noise_convention="timestep")
    if method in PLAIN:
        options = {"use_dora": args.use_dora, "use_rslora": args.use_rslora, "lora_dropout": args.lora_dropout}
        config = LoraConfig(r=args.rank, lora_alpha=config.lora_alpha, target_modules=config.target_modules, **options)
    inject_adapter_in_model(config, unet)
    return unet
