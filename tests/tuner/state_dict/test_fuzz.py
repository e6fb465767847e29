"""Each tensor of a file in turn left out, renamed, or of another shape: never half of an adapter is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.adapted import adapted
from tests.helpers.files.saved_adapters import TARGETS, WEIGHTS, base_model, saved

SHARINGS = ["global", "module_type", "layer"]
CORES: list[dict[str, Any]] = [
    *({"core_sharing": sharing} for sharing in SHARINGS),
    *({"core_type": "constant", "core_sharing": sharing} for sharing in SHARINGS),
    *({"core_type": "knots", "core_sharing": sharing} for sharing in SHARINGS),
    {"core_type": "rank_mask"},
    {"core_type": "bins", "core_bins": 2},
    {"core_type": "identity"},
    {"core_input": "both", "noise_embedding": "mlp"},
    {"rank_pattern": {"second": 2}, "core_sharing": "layer"},
]
LAYERS: list[dict[str, Any]] = [{}, {"use_dora": True}, {"lora_bias": True}, {"bias": "all"}, {"bias": "lora_only"}]


def damaged(tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(what was done, the tensors then), for each tensor: it is left out, renamed, misshapen."""
    for key, tensor in tensors.items():
        others = {name: other for name, other in tensors.items() if name != key}
        yield f"without {key}", others
        yield f"{key} under another name", others | {f"{key}x": tensor}
        yield f"{key} of another module", others | {key.replace("base_model.model.", "base_model.model.x."): tensor}
        longer = torch.cat([tensor.reshape(-1), torch.ones(1)]) if tensor.dim() < 2 else torch.cat([tensor, tensor])
        yield f"{key} longer", others | {key: longer}
        yield f"{key} flat", others | {key: torch.ones(tensor.numel() + 1)}


@pytest.mark.parametrize("layers", LAYERS, ids=str)
@pytest.mark.parametrize("core", CORES, ids=str)
def test_a_file_with_one_tensor_damaged_is_refused_and_changes_nothing(core, layers, tmp_path):
    saved(tmp_path, **core, **layers)
    tensors = load_file(tmp_path / WEIGHTS)
    model = adapted(base_model(), target_modules=TARGETS, **core, **layers)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for what, changed in damaged(tensors):
        save_file(changed, tmp_path / WEIGHTS)
        with pytest.raises(ValueError, match=r"The checkpoint (lacks|holds)|in the checkpoint"):
            _load(model, tmp_path, what)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def _load(model: PeftModel, folder: Path, what: str) -> None:
    model.load_adapter(str(folder), "default")
    pytest.fail(f"{what}: it has been loaded")
