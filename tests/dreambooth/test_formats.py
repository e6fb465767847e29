"""The files that a fine-tuning leaves, read by Diffusers alone: every layer, at its scale."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nara_diffusion.dreambooth.denoiser import UNET_TARGETS, AdaptedDenoiser
from nara_diffusion.dreambooth.formats import LORA_WEIGHTS, adapter_loaded, write_adapter
from nara_diffusion.training.formats import read_all_weights
from tests.helpers.small_pipelines import TEXT_WIDTHS, small_sdxl

from .stock_loading import COMPONENTS, lora_layers, outputs

# PEFT's own form of PiSSA isn't what is written
pytestmark = pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning")

LINEAR = [*UNET_TARGETS, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
ALL = [*LINEAR, "conv1", "conv2"]
SIZES: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 5.0,
    "rank_pattern": {"(to_v|v_proj)": 2},
    "alpha_pattern": {"(to_k|k_proj)": 7.0},
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ALL},
    "dora": {"target_modules": ALL, "use_dora": True},
    "rslora": {"target_modules": ALL, "use_rslora": True},
    "pissa": {"target_modules": LINEAR, "init_lora_weights": "pissa"},
    "pissa-rslora": {"target_modules": LINEAR, "init_lora_weights": "pissa", "use_rslora": True},
}


def trained(method: str) -> AdaptedDenoiser:
    """A UNet and two text encoders with adapters all of whose weights differ from those of their start."""
    torch.manual_seed(1)
    model = AdaptedDenoiser(small_sdxl(), LoraConfig(**SIZES, **METHODS[method]), train_text_encoder=True)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    first, second = TEXT_WIDTHS
    return {
        "ids": torch.randint(0, 200, (2, 9), generator=generator),
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([40, 900]),
        "states": torch.randn(2, 5, first + second, generator=generator),
        "text_embeds": torch.randn(2, second, generator=generator),
        "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16], [20, 16, 4, 2, 16, 16]]),
    }


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> SimpleNamespace:
    """What trained models compute, what Diffusers makes of their folders in a process of its own, and the folders."""
    root = tmp_path_factory.mktemp("stock")
    small_sdxl().save_pretrained(root / "base")
    save_file(inputs(), root / "inputs.safetensors")
    expected, layers = {}, {}
    for method in METHODS:
        model = trained(method)
        write_adapter(model, root / method, {})
        expected[method] = outputs(model.pipe, inputs())
        layers[method] = {name: lora_layers(getattr(model, name)) for name in COMPONENTS}
    arguments = [str(root / name) for name in ("base", "inputs.safetensors", "found.safetensors", *METHODS)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(Path(__file__).with_name("stock_loading.py")), *arguments]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(root / "found.safetensors")
    return SimpleNamespace(
        root=root, expected=expected, layers=layers, found=found, plain=outputs(small_sdxl(), inputs())
    )


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("method", METHODS)
def test_lora_file_loaded_by_diffusers_alone_gives_the_trained_outputs(stock, method: str, component: str) -> None:
    expected, found = stock.expected[method][component], stock.found[f"{method}/{component}"]
    assert (expected - stock.plain[component]).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert stock.found[f"{method}/{component}/layers"] == len(stock.layers[method][component]) > 0


@pytest.mark.parametrize("method", METHODS)
def test_lora_file_names_each_tensor_as_peft_does(stock, method: str) -> None:
    with safe_open(stock.root / method / LORA_WEIGHTS, "pt") as file:
        keys = set(file.keys())
    expected = set()
    for component, layers in stock.layers[method].items():
        kinds = ["lora_A.weight", "lora_B.weight"]
        if method == "dora":
            kinds.append("lora_magnitude_vector" + (".weight" if component.startswith("text") else ""))
        expected |= {f"{component}.{layer}.{kind}" for layer in layers for kind in kinds}
    assert keys == expected


@pytest.mark.parametrize("method", METHODS)
def test_sampling_pipeline_with_the_adapter_loaded_gives_the_trained_outputs(stock, method: str) -> None:
    pipe = small_sdxl()
    with adapter_loaded(pipe, stock.root / method):
        for name, value in outputs(pipe, inputs()).items():
            torch.testing.assert_close(value, stock.expected[method][name], rtol=1e-4, atol=1e-4)
    for name, value in outputs(pipe, inputs()).items():
        torch.testing.assert_close(value, stock.plain[name], rtol=0, atol=0)


def rewritten(stock: SimpleNamespace, folder: Path, method: str, change: Any) -> Path:
    """The file of `method` in `folder`, after `change` of its tensors, with its metadata."""
    with safe_open(stock.root / method / LORA_WEIGHTS, "pt") as file:
        metadata = file.metadata()
    save_file(change(load_file(stock.root / method / LORA_WEIGHTS)), folder / LORA_WEIGHTS, metadata=metadata)
    return folder


# PEFT warns of it, and goes on
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters, an inconsistency:RuntimeWarning")
def test_sampling_pipeline_refuses_a_file_of_two_styles_of_names(stock, tmp_path: Path) -> None:
    """Attention by Diffusers' older names, all else by PEFT's."""
    layers = len(stock.layers["lora"]["unet"])
    attention = [name for name in stock.layers["lora"]["unet"] if name.endswith(tuple(UNET_TARGETS))]
    assert 0 < len(attention) < layers
    pipe = small_sdxl()
    keys = set(pipe.unet.state_dict())

    def mixed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        unet = {key: value for key, value in tensors.items() if key.startswith("unet.")}
        return {key: tensors[key] for key in tensors.keys() - unet} | convert_state_dict_to_diffusers(unet)

    folder = rewritten(stock, tmp_path, "lora", mixed)
    match = rf"{len(attention)} of the {layers} layers in .* did not load into UNet2DCond.*: 'down_blocks.*to_k'"
    with pytest.raises(ValueError, match=match), adapter_loaded(pipe, folder):
        pytest.fail("half an adapter")
    assert set(pipe.unet.state_dict()) == keys


def test_sampling_pipeline_refuses_magnitudes_that_transformers_passes_by(stock, tmp_path: Path) -> None:
    def shortened(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key.replace("magnitude_vector.weight", "magnitude_vector"): value for key, value in tensors.items()}

    folder = rewritten(stock, tmp_path, "dora", shortened)
    count = len(stock.layers["dora"]["text_encoder"])
    with (
        pytest.raises(ValueError, match=rf"{count} of the {count} layers in .* did not load into CLIPTextModel"),
        adapter_loaded(small_sdxl(), folder),
    ):
        pytest.fail("magnitudes at their start")


def folder_of_all_weights(folder: Path, component: str, change: Any) -> tuple[Any, Path]:
    """A pipeline, and what was trained of `component`, its weights file after `change` of its tensors, at `folder`."""
    pipe = small_sdxl()
    for name in ("unet", component):
        getattr(pipe, name).save_pretrained(folder / name)
    (file,) = (folder / component).glob("*model.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return pipe, folder


def without_some(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors.items() if "k_proj" not in key and "to_k" not in key}


def with_a_surplus(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "surplus.weight": torch.ones(2)}


WHOLE = pytest.mark.parametrize(
    ("component", "change", "match"),
    [
        ("unet", without_some, r"unet lacks 16 tensors of UNet2DConditionModel: '.*to_k.weight' and 13 more"),
        ("unet", with_a_surplus, r"unet holds 1 tensor that UNet2DConditionModel doesn't know: 'surplus.weight'"),
        ("text_encoder", without_some, r"text_encoder lacks 4 tensors of CLIPTextModel: '.*k_proj.* and 1 more"),
        ("text_encoder_2", with_a_surplus, r"text_encoder_2 holds 1 tensor that CLIPTextModelWithProjection doesn't"),
    ],
)


@WHOLE
def test_sampling_pipeline_refuses_all_weights_that_are_not_all(tmp_path: Path, component, change, match) -> None:
    pipe, folder = folder_of_all_weights(tmp_path, component, change)
    before = getattr(pipe, component)
    with pytest.raises(ValueError, match=match), adapter_loaded(pipe, folder):
        pytest.fail("weights at random")
    assert getattr(pipe, component) is before


@WHOLE
def test_checkpoint_of_all_weights_that_are_not_all_is_refused(tmp_path: Path, component, change, match) -> None:
    pipe, folder = folder_of_all_weights(tmp_path, component, change)
    model = getattr(pipe, component)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        read_all_weights(model, folder / component)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
