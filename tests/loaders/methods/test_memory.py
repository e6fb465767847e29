"""Swapping adapters leaves no tensor behind, and an offloaded pipeline stays offloaded."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from diffusers.hooks import apply_group_offloading
from torch._subclasses.fake_tensor import FakeTensor

from tests.helpers.small_pipelines import pixels, small_sdxl
from tests.loaders.adapters import State, predict, trained


def tensors() -> dict[int, int]:
    """Storage → bytes, of all tensors alive."""
    gc.collect()
    alive = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    # without memory of their own: a compiler's, and those that vmap leaves in an error's frames
    alive = [tensor for tensor in alive if not issubclass(type(tensor), FakeTensor)]
    alive = [tensor for tensor in alive if not torch._C._functorch.is_functorch_wrapped_tensor(tensor)]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three NaRAs that load fast: of the same modules, the last of another rank and of a text encoder too."""
    folders = [tmp_path_factory.mktemp("light") for _ in range(3)]
    for seed, (folder, rank) in enumerate(zip(folders, (3, 3, 5), strict=True)):
        pipe = trained(seed=seed, text=rank == 5, r=rank, target_modules=["mid_block.attentions.0.proj_in"])
        pipe.save_nara_weights(folder)
    return folders


WAYS = {
    "unload_nara_weights": lambda pipe: pipe.unload_nara_weights(),
    "unload_lora_weights": lambda pipe: pipe.unload_lora_weights(),
    "delete_adapters": lambda pipe: pipe.delete_adapters("x"),
}


@pytest.mark.parametrize("way", WAYS)
def test_fifty_swaps_leave_memory_where_it_was(way, light):
    pipe = small_sdxl()
    start = tensors()
    for number in range(50):
        pipe.load_nara_weights(light[number % 3], "x")
        if number == 10:
            predict(pipe)
        WAYS[way](pipe)
    end = tensors()
    assert (len(end), sum(end.values())) == (len(start), sum(start.values()))


def test_fifty_hotswaps_leave_memory_where_it_was(light):
    pipe = small_sdxl()
    pipe.load_nara_weights(light[0], "x")
    start = tensors()
    for number in range(50):
        pipe.load_nara_weights(light[number % 2], "x", hotswap=True)
    end = tensors()
    assert (len(end), sum(end.values())) == (len(start), sum(start.values()))


def offloaded(kind: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    """A pipeline with accelerate's hooks of model offload, whose methods need an accelerator, and what was called."""
    pipe, calls = small_sdxl(), []

    def enable(self: Any, device: Any = None) -> None:
        calls.append(f"{kind} {device}")
        for part in (self.unet, self.text_encoder, self.text_encoder_2, self.vae):
            add_hook_to_module(part, CpuOffload("cpu"))

    monkeypatch.setattr(type(pipe), f"enable_{kind}_cpu_offload", enable)
    getattr(pipe, f"enable_{kind}_cpu_offload")()
    return pipe, calls


def test_model_offload_is_off_while_loading_and_on_again(nara_folder, tmp_path, monkeypatch):
    pipe, calls = offloaded("model", monkeypatch)
    pipe._offload_device = torch.device("cpu")
    expected = small_sdxl()
    expected.load_nara_weights(nara_folder)
    pipe.load_nara_weights(nara_folder)
    assert calls == ["model None", "model cpu"]
    assert isinstance(pipe.unet._hf_hook, CpuOffload)
    assert torch.equal(pixels(pipe), pixels(expected))
    pipe.save_nara_weights(tmp_path)
    assert isinstance(pipe.unet._hf_hook, CpuOffload)
    before = State(pipe)
    with pytest.raises(ValueError, match="is a duplicate"):
        pipe.load_nara_weights(nara_folder, "default_0")
    assert before == State(pipe)
    pipe.unload_nara_weights()
    assert len(calls) == 4
    assert torch.equal(pixels(pipe), pixels(small_sdxl()))


def test_group_offload_is_applied_to_what_was_loaded(nara_folder: Path):
    pipe = small_sdxl()
    apply_group_offloading(pipe.unet, onload_device=torch.device("cpu"), offload_type="leaf_level")
    base = pixels(pipe)
    pipe.load_nara_weights(nara_folder)
    expected = small_sdxl()
    expected.load_nara_weights(nara_folder)
    assert torch.equal(pixels(pipe), pixels(expected))
    names = [name for name, module in pipe.unet.named_modules() if hasattr(module, "_diffusers_hook")]
    assert any("lora_A" in name for name in names)
    pipe.unload_nara_weights()
    assert torch.equal(pixels(pipe), base)
    names = [name for name, module in pipe.unet.named_modules() if hasattr(module, "_diffusers_hook")]
    assert names
    assert not any("lora_" in name or "nara_core" in name for name in names)
