"""An adapter whose factors float16 can't hold is refused by a half-precision pipeline, which stays as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.acceptance._lives import FILE, frozen_sd, save_nara


def saved(folder: Path, component: str, factor: str, value: float) -> str:
    """A NaRA in float32, one element of which is `value`; what an error says of it."""
    save_nara(folder, text=True, target_modules=["to_q", "conv1"])
    with safe_open(folder / FILE, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / FILE)
    key = max(key for key in tensors if key.startswith(component) and f"lora_{factor}" in key)
    tensors[key].view(-1)[3] = value
    save_file(tensors, folder / FILE, metadata=metadata)
    module = key.removeprefix(f"{component}.").partition(".lora_")[0]
    return rf"{component}: .*{module}\.lora_{factor}\.(toy\.)?weight"


def weights(pipe: Any) -> dict[str, Tensor]:
    parts = (pipe.unet, pipe.text_encoder)
    return {name: tensor.clone() for model in parts for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("component", "factor", "value"), [("unet", "A", 65520.0), ("unet", "B", -7e4), ("text_encoder", "A", 65520.0)]
)
def test_a_factor_that_overflows_float16_is_refused_and_loads_in_bfloat16(tmp_path, component, factor, value) -> None:
    name = saved(tmp_path, component, factor, value)
    pipe: Any = frozen_sd().to(torch.float16)
    before = weights(pipe)
    with pytest.raises(ValueError, match=rf"{name}.* too large for its layer: .* bfloat16 or float32"):
        pipe.load_nara_weights(tmp_path, adapter_name="toy")
    after = weights(pipe)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    other: Any = frozen_sd().to(torch.bfloat16)
    other.load_nara_weights(tmp_path)
    assert all(tensor.isfinite().all() for tensor in weights(other).values())


def test_the_largest_number_of_float16_loads_and_a_larger_one_is_not_swapped_in(tmp_path: Path) -> None:
    saved(tmp_path / "old", "unet", "A", 65504.0)
    saved(tmp_path / "new", "unet", "A", 1e5)
    pipe: Any = frozen_sd().to(torch.float16)
    pipe.load_nara_weights(tmp_path / "old", adapter_name="toy")
    before = weights(pipe)
    assert max(tensor.max() for key, tensor in before.items() if "lora_A" in key) == 65504
    with pytest.raises(ValueError, match=r"lora_A\.weight.* too large for its layer"):
        pipe.load_nara_weights(tmp_path / "new", adapter_name="toy", hotswap=True)
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(pipe).items())
