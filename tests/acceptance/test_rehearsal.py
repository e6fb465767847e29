"""A rehearsal at true size, 2 to 26 billion parameters, without weights or a GPU: insert, train, save, load, sample.

A training step runs twice: under bfloat16 autocast on fake tensors of the CPU, where kernels are counted and a read by
the host raises; and with gradient checkpointing on the meta device, where a read raises too, and so does an operation
on tensors of meta and the CPU. So does the sampling step, with the adapter that was saved and loaded.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_counts import Kernels
from safetensors import safe_open
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nara_diffusion.layers import functional
from nara_diffusion.training.planned_step import StepCounter, tensors_of, to_fake
from tests.acceptance._rehearsed import RANK, Rehearsed
from tests.acceptance._true_size import MODELS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
MOST = {False: (6, 12), True: (22, 23)}
"""Kernels of a layer beside its base's, forward and backward; DoRA has one more where the layer has a bias.
tests/benchmarks/test_kernels.py has one less of NaRA: here the inputs of some layers are slices, which are copied."""
ONCE = 60
"""Kernels of λ and its core, once a forward or backward."""


@pytest.mark.parametrize("name", MODELS)
def test_true_size_model_trains_saves_loads_and_samples(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "SLICE", functional.DEVICE_SLICE)  # fake tensors say that they are on the CPU
    model = MODELS[name]
    base = model.alone()
    assert sum(p.numel() for p in base.parameters()) / 1e9 == pytest.approx(model.billions, rel=0.01)
    alone = train_on_fake_tensors(model, base)
    for use_dora in (False, True):
        adapted = model.adapted(use_dora=use_dora)
        layers = [adapted_layer for adapted_layer in adapted.modules() if hasattr(adapted_layer, "lora_variant")]
        on_meta = train_on_meta(model, adapted)
        file = saved(model, adapted, tmp_path / str(use_dora))
        assert_keys_and_shapes(file, layers, use_dora)
        on_fakes = train_on_fake_tensors(model, adapted)
        assert on_fakes["kept"] > model.saving * on_meta
        forwards = len(layers) * model.passes
        more = [on_fakes[way].total() - alone[way].total() for way in ("forward", "backward")]
        biases = sum(use_dora and layer.base_layer.bias is not None for layer in layers) * model.passes
        most = MOST[use_dora][0] * forwards + biases + ONCE * model.passes
        assert more[0] <= most, on_fakes["forward"] - alone["forward"]
        assert more[1] <= MOST[use_dora][1] * len(layers) + ONCE, on_fakes["backward"] - alone["backward"]
        loaded = model.load(file.parent)
        assert {p.shape for p in loaded.parameters()} == {p.shape for p in adapted.parameters()}
        with torch.no_grad():
            assert model.sample(loaded.eval(), "meta").device.type == "meta"


def train_on_fake_tensors(model: Rehearsed, module: nn.Module) -> dict[str, Any]:
    """Take a step under bfloat16 autocast. Return kernels of forward and backward, and bytes kept between them."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # what is drawn on the CPU is real
    to_fake(module, mode)
    module.train()
    with mode:
        with StepCounter(tensors_of(module)) as memory, Kernels() as forward, torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(module, "cpu")
        bytes_kept = memory.live
        with Kernels() as backward:
            loss.backward()
        update(module, model.unused)
    return {"forward": forward.counts, "backward": backward.counts, "kept": bytes_kept}


def train_on_meta(model: Rehearsed, module: nn.Module) -> int:
    """Take a step with gradient checkpointing. Return the bytes kept between forward and backward."""
    model.checkpoint(module, True)
    module.train()
    with StepCounter(tensors_of(module)) as memory:
        loss = model.loss(module, "meta")
    assert loss.device.type == "meta"
    bytes_kept = memory.live
    loss.backward()
    update(module, model.unused)
    model.checkpoint(module, False)
    return bytes_kept


def update(module: nn.Module, unused: str) -> None:
    """Clip the gradients, and let AdamW take its step; layers named `unused` have none."""
    trained = [p for name, p in module.named_parameters() if p.requires_grad and unused not in name]
    if not trained:
        return
    assert all(p.grad is not None and p.grad.shape == p.shape for p in trained)
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    torch.optim.AdamW(trained, foreach=True).step()
    module.zero_grad()


def saved(model: Rehearsed, module: nn.Module, folder: Path) -> Path:
    """Save the adapter of `module`, after its weights have become zeros of the CPU. Return the file."""
    for place, part in module.named_modules():
        for name, tensor in part.named_parameters(recurse=False):
            if tensor.requires_grad:
                setattr(part, name, nn.Parameter(torch.zeros_like(tensor, device="cpu")))
        for name, tensor in part.named_buffers(recurse=False):
            if "lora_core" in place:
                setattr(part, name, torch.zeros_like(tensor, device="cpu"))
    return model.save(module, folder)


def assert_keys_and_shapes(file: Path, layers: list[Any], use_dora: bool) -> None:
    """The file has A (r, d_in), B (d_out, r) and m (d_out,) of each layer, of twins once, and the core's tensors."""
    expected: Counter[tuple[int, ...]] = Counter()
    seen = set()
    for layer in layers:
        if layer.lora_A["default"].weight not in seen:
            seen.add(layer.lora_A["default"].weight)
            expected[RANK, layer.in_features] += 1
            expected[layer.out_features, RANK] += 1
            expected[layer.out_features,] += use_dora
    shapes: Counter[tuple[int, ...]] = Counter()
    with safe_open(file, "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            if "nara_core" not in key:
                shapes[tuple(tensors.get_slice(key).get_shape())] += 1
        assert sum("nara_core" in key for key in tensors.keys()) == 7  # noqa: SIM118
    assert shapes == +expected
