"""Every ablation of the paper, and every option beyond it, is a setting that trains: in two stages, by any input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file
from torch import Tensor

ABLATIONS: dict[str, dict[str, Any]] = {
    "η": {"core_scale": 1.0},
    "rank": {"rank": 5},
    "mlp": {"noise_embedding": "mlp"},
    "raw": {"noise_embedding": "raw"},
    "Fourier scale": {"fourier_scale": 2.0},
    "by type": {"core_sharing": "module_type"},
    "by layer": {"core_sharing": "layer"},
    "zero_all": {"core_init": "zero_all"},
    "density": {"core_input": "mask_density", "mask_density_radius": 2},
    "both": {"core_input": "both"},
    "both, mlp, by type": {"core_input": "both", "noise_embedding": "mlp", "core_sharing": "module_type"},
    "both, by layer": {"core_input": "both", "core_sharing": "layer"},
    "NaRA-C": {"adapter": "nara_c"},
    "NaRA-DoRA": {"adapter": "nara_dora"},
    "orthogonal start": {"lora_a_init": "orthogonal"},
}


def weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The core's tensors and the others."""
    tensors = load_file(folder / "adapter_model.safetensors")
    core = {name: tensor for name, tensor in tensors.items() if "nara_core" in name}
    return core, {name: tensor for name, tensor in tensors.items() if name not in core}


@pytest.mark.parametrize("settings", ABLATIONS.values(), ids=ABLATIONS)
def test_each_setting_trains_a_and_b_first_and_then_its_core_too(settings, small_args, small_run) -> None:
    args = small_args(core_start_step=2, max_train_steps=4, checkpointing_steps=1, lr_warmup_steps=0.0, **settings)
    run = small_run(args)
    (core_1, first), (core_2, second), (core, last) = (
        weights(run.run.folder / part) for part in ("checkpoint-1", "checkpoint-2", ".")
    )
    assert core.keys() == core_1.keys()
    for name, tensor in core_1.items():
        assert torch.equal(core_2[name], tensor), name
    assert any(not torch.equal(core[name], tensor) for name, tensor in core_2.items())
    assert all(not torch.equal(last[name], first[name]) for name in last if "lora_B" in name)
    assert any(not torch.equal(second[name], first[name]) for name in second)
    config = PeftConfig.from_pretrained(run.run.folder)
    names = {"rank": "r"}
    for name, value in settings.items():
        if name != "adapter":
            assert getattr(config, names.get(name, name)) == value


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        # the last of r directions serves λ = 0 alone, which no masked text has
        ({"adapter": "tlora", "rank_mask_min": 1}, [True, True, False]),
        ({"adapter": "multi_lora", "core_bins": 2}, [True] * 6),
    ],
    ids=["T-LoRA", "Multi-LoRA"],
)
def test_masked_methods_train_their_directions_and_have_no_core_to_hold(
    settings, trained, small_args, small_run
) -> None:
    run = small_run(small_args(max_train_steps=3, lr_warmup_steps=0.0, **settings))
    core, factors = weights(run.run.folder)
    assert core == {}
    B = [tensor for name, tensor in factors.items() if "lora_B" in name]
    assert all((tensor.abs().sum(0) > 0).tolist() == trained for tensor in B)
    with pytest.raises(
        ValueError, match=r"core_start_step is 2, but core_type '(rank_mask|bins)' has no core to train"
    ):
        small_run(small_args(core_start_step=2, output_dir=f"{run.run.folder}-2", **settings))


@pytest.mark.parametrize("adapter", ["nara", "nara_c"])
def test_two_stages_need_c_to_be_i_at_first(adapter, small_args) -> None:
    with pytest.raises(ValueError, match="core_start_step trains A and B with C = I first, but core_init 'kaiming'"):
        small_args(adapter=adapter, core_start_step=2, core_init="kaiming")
