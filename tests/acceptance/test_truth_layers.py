"""What layers can't follow is refused: convolutions, factors beyond float16; and merged layers say so at another λ."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nara_diffusion import NaraConfig, noise_level, set_noise_source, set_strength
from nara_diffusion.noise.strength_schedule import StrengthSchedule
from tests.acceptance._lives import FILE, add_nara, frozen_sd, predict, save_nara
from tests.helpers.adapted import TwoLayers, adapted, disturb, lora_config


@pytest.mark.parametrize(
    ("convolution", "named"),
    [
        (nn.Conv2d(6, 7, 3, padding=(2, 1), dilation=(2, 1)), r"Conv2d with dilation=\(2, 1\)"),
        (nn.Conv3d(6, 7, 3, padding=1, padding_mode="circular"), "Conv3d with padding_mode='circular'"),
    ],
)
def test_it_is_refused_and_the_model_stays_as_it_was(convolution: nn.Module, named: str) -> None:
    model: Any = nn.ModuleDict({"convolution": convolution, "linear": nn.Linear(7, 5)})
    before = [name for name, _ in model.named_modules()]
    for options in ({}, {"use_dora": True}, {"core_type": "identity"}):
        config = NaraConfig(r=3, target_modules=["linear", "convolution"], **options)
        with pytest.raises(ValueError, match=rf"cannot adapt 'convolution' \({named}\).*exclude_modules"):
            get_peft_model(model, config)
        assert [name for name, _ in model.named_modules()] == before
    get_peft_model(model, NaraConfig(r=3, target_modules=["linear", "convolution"], exclude_modules=["convolution"]))


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


@pytest.mark.parametrize(("component", "factor", "value"), [("unet", "B", -7e4), ("text_encoder", "A", 65520.0)])
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


X = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))


class Source:
    convention = "mine"

    def __init__(self, levels: Any) -> None:
        self.levels = levels

    def __call__(self, module: Any, args: Any, kwargs: Any) -> Tensor:
        if self.levels is None:
            raise ValueError("λ can't be read")
        return torch.tensor(self.levels)


def run(model: Any) -> Tensor:
    with torch.no_grad():
        return model(X)


@pytest.mark.parametrize("kind", ["NaRA", "LoRA with a schedule"])
def test_a_source_that_tells_another_level_is_warned_of_once_a_merge(kind: str) -> None:
    if kind == "NaRA":
        model: Any = adapted(TwoLayers(), target_modules=["first"])
    else:
        model = get_peft_model(TwoLayers(), lora_config(target_modules=["first"])).eval()
        disturb(model)
        set_strength(model, "default", StrengthSchedule([(0, 1.0), (1, 0.2)]))
    with noise_level(model, 0.3):
        expected = run(model)
    source, said = Source(None), r"merged at noise_level 0\.3.* source tells \[0\.3, 0\.7.*unmerge_adapter"
    set_noise_source(model, source)
    for _ in range(2):
        with noise_level(model, 0.3):
            model.merge_adapter()
        for source.levels in (None, [0.3, 0.3]):  # a source that can't tell stops no merged model
            torch.testing.assert_close(run(model), expected)  # without a warning, which would be an error
        source.levels = [0.3, 0.7]
        with pytest.warns(UserWarning, match=said):
            torch.testing.assert_close(run(model), expected)
        run(model)  # said once
        model.unmerge_adapter()


@pytest.mark.filterwarnings("ignore:Already unmerged")
def test_fusing_has_said_so_and_says_no_more(caplog: pytest.LogCaptureFixture) -> None:
    pipe = add_nara(frozen_sd())
    with noise_level(pipe.unet, 0.3), caplog.at_level(logging.WARNING):
        pipe.fuse_lora(components=["unet"])
    assert "is fused at noise_level 0.3: until unfuse_lora() every step" in caplog.text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(pipe)


def test_merged_adapter_that_is_disabled_runs_as_the_base_at_every_level() -> None:
    model = adapted(TwoLayers(), target_modules=["first", "second"])
    expected = model.base_model.model.first.base_layer(X)
    model.merge_adapter(noise_level=0.3)
    with model.disable_adapter(), noise_level(model, 0.9):
        run(model)
        torch.testing.assert_close(model.base_model.model.first(X), expected)
