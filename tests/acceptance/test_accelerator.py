"""What only an accelerator shows: each test runs on the CPU at a small size, and on a CUDA device with `-m gpu`.

examples/benchmarks/on_gpu.sh runs them with the benchmarks, and writes one record.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import accelerate
import measure_memory
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.dllm import load_backbone, masked_diffusion_loss
from nara_diffusion.training.adapters import add_adapter
from nara_diffusion.utils.quantised import prepare_quantised
from tests.acceptance._noise_models import UNET_TARGETS, Stock, adapt
from tests.acceptance._text import LLADA_TINY, backbone, nara
from tests.helpers.adapted import disturb
from tests.helpers.small_pipelines import MORE_ATTENTION, small_unet

no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_cuda])]
SLOW_ON_CPU = [pytest.param("cpu", marks=pytest.mark.slow), DEVICES[1]]
METHODS = {"nara": {}, "nara_dora": {"use_dora": True}}
on_devices = pytest.mark.parametrize("device", DEVICES)
of_methods = pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
LEVELS = torch.tensor([0.15, 0.5, 0.92])
TEXT = 20


def error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64, on the CPU."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return float((actual - expected).norm() / expected.norm())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.cpu().clone() for name, p in model.named_parameters() if p.grad is not None}


def joined(model: nn.Module) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients(model).values()])


def unet_step(unet: nn.Module, device: str, dtype: torch.dtype, scaler: Any = None) -> tuple[Tensor, Tensor]:
    """The prediction of three samples, each at its timestep, after the backward of its loss."""
    generator = torch.Generator().manual_seed(3)
    latents, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 5, TEXT, generator=generator)
    base_dtype = next(p.dtype for p in unet.parameters() if not p.requires_grad)
    latents, timesteps, text = latents.to(device, base_dtype), (LEVELS * 1000).to(device), text.to(device, base_dtype)
    with torch.autocast(device, dtype, enabled=dtype != torch.float64):
        output = unet(latents, timesteps, text).sample
    loss = (output.to(torch.promote_types(output.dtype, torch.float32)) - 0.3).square().mean()
    (loss if scaler is None else scaler.scale(loss)).backward()
    return output, loss


@on_devices
@of_methods
def test_bfloat16_predicts_and_learns_as_float64(device: str, options: dict[str, Any]) -> None:
    unet, _ = adapt(small_unet(TEXT, **MORE_ATTENTION), UNET_TARGETS, scale=0.3, **options)
    for parameter in unet.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    exact = copy.deepcopy(unet).double()
    expected, _ = unet_step(exact, "cpu", torch.float64)
    output, _ = unet_step(unet.to(device), device, torch.bfloat16)
    assert error(output, expected) < 0.06
    assert error(joined(unet), joined(exact)) < 0.2
    with noise_level(exact, LEVELS.flip(0)):
        assert error(unet_step(exact, "cpu", torch.float64)[0], expected) > 0.2


@on_devices
@of_methods
def test_float16_learns_the_same_and_skips_overflows(device: str, options: dict[str, Any]) -> None:
    unet, _ = adapt(small_unet(TEXT), UNET_TARGETS, scale=0.3, **options)
    exact = copy.deepcopy(unet).double()
    unet_step(exact, "cpu", torch.float64)
    unet.to(device)
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for scale, is_taken in ((2.0**12, True), (2.0**60, False)):
        scaler = torch.amp.GradScaler(device, init_scale=scale)
        original = [p.detach().clone() for p in trained]
        optimizer.zero_grad()
        unet_step(unet, device, torch.float16, scaler)
        scaler.unscale_(optimizer)
        if is_taken:
            actual = gradients(unet)
            for name, gradient in gradients(exact).items():
                assert error(actual[name], gradient) < 0.03, name
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(p, old) != is_taken for p, old in zip(trained, original, strict=True))
        assert (scaler.get_scale() < scale) != is_taken


@pytest.fixture
def _compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", SLOW_ON_CPU)
def test_cuda_graphs_give_each_levels_outputs(device: str) -> None:
    model = nara(backbone(50)).to(device)
    stock = Stock(backbone(50), model.get_base_model().cpu()).double()
    model.to(device)
    ids = torch.randint(0, 49, (3, 16), generator=torch.Generator().manual_seed(0))
    fast = torch.compile(model, mode="reduce-overhead")
    for number in range(4):
        levels = LEVELS.roll(number)
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad(), noise_level(model, levels.to(device)):
            logits = fast(ids.to(device)).logits.clone()
        assert error(logits, stock.each(levels, ids)) < 1e-3
    assert sum(counters["graph_break"].values()) <= 1
    assert counters["inductor"]["cudagraph_skips"] == (device == "cpu")  # there are none on a CPU


OFFLOADS = {
    "whole": lambda model, device: accelerate.cpu_offload_with_hook(model, device),
    "sequential": lambda model, device: accelerate.cpu_offload(model, device),
    "blocks": lambda model, device: model.enable_group_offload(
        device, torch.device("cpu"), "block_level", num_blocks_per_group=1, use_stream=device.type == "cuda"
    ),
}


@on_devices
@pytest.mark.parametrize("how", OFFLOADS)
def test_offloaded_model_predicts_as_on_the_device(device: str, how: str) -> None:
    unet, _ = adapt(small_unet(TEXT), UNET_TARGETS, scale=0.3)
    unet.requires_grad_(False)
    latents, text = torch.randn(3, 4, 8, 8).to(device), torch.randn(3, 5, TEXT).to(device)
    timesteps = (LEVELS * 1000).to(device)
    with torch.no_grad():
        expected = copy.deepcopy(unet).to(device)(latents, timesteps, text).sample
        OFFLOADS[how](unet, torch.device(device))
        for _ in range(2):
            output = unet(latents, timesteps, text).sample
            assert output.device == expected.device
            assert error(output, expected) < 1e-5


@on_devices
@pytest.mark.filterwarnings("ignore")
def test_four_bits_learn_what_their_rounded_weights_learn(device: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    models = []
    for bits in (True, False):
        model, _ = load_backbone(LLADA_TINY, dtype=torch.float32, load_in_4bit=bits, device_map={"": device})
        models.append(model)
    small, full = models
    for name, layer in small.named_modules():
        if type(layer).__name__ == "Linear4bit":
            weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            full.get_submodule(name).weight.data = weight.float()
    prepare_quantised(small)
    ids = torch.randint(4, 60, (3, 12), generator=torch.Generator().manual_seed(0)).to(device)
    actual = []
    for model in (small, full):
        torch.manual_seed(1)
        config = NaraConfig(r=3, target_modules=["q_proj", "down_proj"])
        adapted = add_adapter(model, config)
        disturb(adapted, scale=0.1)
        loss = masked_diffusion_loss(adapted.train(), ids, [4] * 3, seed=1, noise_level=0.5).loss
        loss.backward()
        actual.append((float(loss), gradients(adapted)))
    (mine, ours), (reference, theirs) = actual
    assert mine == pytest.approx(reference, rel=1e-3)
    for name, gradient in theirs.items():
        assert error(ours[name], gradient) < 0.01, name


@pytest.mark.parametrize("device", SLOW_ON_CPU)
def test_step_needs_the_memory_that_plan_says(device: str) -> None:
    size = "tiny" if device == "cpu" else "1b"
    figures = measure_memory.main(size=size, device=device)
    assert figures["measured"] == pytest.approx(figures["planned"], rel=0.02 if device == "cpu" else 0.15)
