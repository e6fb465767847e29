"""Import the private names of PEFT that this package uses, with a reason for each.

PEFT may change these names at any time, so pyproject.toml allows only a narrow range of PEFT
versions. If a new version moves a name, tests/tuner/test_peft_internals.py reports it.
"""

from __future__ import annotations

from peft import PeftConfig
from peft.tuners.lora import Conv2d, Embedding, LoraLayer

OVERRIDDEN = {
    "_create_and_replace": "checks each target, and gives each new layer its LoRA variant",
    "_unload_and_optionally_merge": "removes the holder of the cores when PEFT unloads",
    "_enable_peft_forward_hooks": "refuses an adapter for each sample",
    "_get_adapter_state_dict": "adds the cores to what PEFT saves",
    "_remove_adapter_name_from_key": "names the cores in files",
    "_remap_adapter_state_dict_for_load": "finds the cores in a file, and checks all its tensors",
}
"""Methods of `LoraModel` that `NaraModel` overrides. PEFT has no public hooks for them."""

READ: dict[type, dict[str, str]] = {
    LoraLayer: {
        "_cache_store": "keeps what a merge added to the base weight, until it is unmerged",
        "_cache_pop": "takes that back",
        "_unmerged_base_weight": "gives DoRA's norm the base weight without other merged adapters",
    },
    PeftConfig: {"_get_peft_type": "tells whether an adapter on the Hub is a NaRA"},
    Embedding: {
        "_embed": "looks up A with the padding and sparsity of the base layer",
        "_get_embed_scale": "is the scale of the embeddings in some models",
    },
}
"""PEFT's class → its methods that the layers and loaders call."""

SET: dict[type, dict[str, str]] = {
    LoraLayer: {
        "_disable_adapters": "switches layers on or off without a change of what is trainable",
        "_active_adapter": "activates adapters without a change of what is trainable",
    },
    Conv2d: {"_kernel_dim": "tells a sample without batch axis from a batch"},
}
"""PEFT's class → attributes of its layers that are read or set."""
