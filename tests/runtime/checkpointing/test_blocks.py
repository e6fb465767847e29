"""Gradient checkpointing of Diffusers and PyTorch's wrapper of blocks: each recomputation sees its own λ."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from nara_diffusion.tuner.forward_hook import detach_holder
from peft import inject_adapter_in_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from nara_diffusion import NaraConfig, noise_level
from tests.helpers.adapted import TwoLayers, disturb, nara_config
from tests.helpers.layers.recomputation import (
    EXACT,
    LEVELS,
    REENTRANT,
    Gradients,
    at,
    check,
    gradients,
    inject,
    llama_forwards,
    seeded,
)

# ---------------------------------------------------------------------- Diffusers


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )


UNET_TARGETS = ["to_q", "to_v", "to_out.0", "conv1", "proj_in"]


def unet_loss(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn(3, 3, 8, 8, generator=generator)
    text = torch.randn(3, 4, 12, generator=generator)
    return model(sample, torch.tensor([900, 500, 20]), text).sample.square().mean()


def unet_forwards(model: nn.Module) -> list[Callable[[], Tensor]]:
    return [at(model, level, unet_loss) for level in LEVELS]


def add(model: Any, config: NaraConfig) -> nn.Module:
    model.requires_grad_(False)
    model.add_adapter(config)
    return model


def reentrant_checkpoint(module: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(module.__call__, *args, use_reentrant=True)


@pytest.mark.parametrize("function", [None, reentrant_checkpoint])
@pytest.mark.parametrize(
    ("when", "wrapper", "use_dora"),
    [("before", add, False), ("after", add, True), ("before", inject, True), ("after", inject, False)],
)
def test_unet(unet: UNet2DConditionModel, when: str, function: Any, wrapper: Any, use_dora: bool) -> None:
    changes = {"target_modules": UNET_TARGETS, "use_dora": use_dora}
    plain = seeded(copy.deepcopy(unet), wrapper, **changes)
    expected = gradients(plain, unet_forwards(plain))
    model = copy.deepcopy(unet)
    if when == "before":
        model.enable_gradient_checkpointing(function)
    model = seeded(model, wrapper, **changes)
    if when == "after":
        model.enable_gradient_checkpointing(function)
    check(gradients(model, unet_forwards(model)), expected, REENTRANT)


# ---------------------------------------------------------------------- PyTorch's wrapper, as FSDP uses it


@pytest.mark.parametrize("implementation", list(CheckpointImpl))
@pytest.mark.parametrize("when", ["before", "after"])
def test_checkpoint_wrapper(tiny_llama: LlamaForCausalLM, implementation: CheckpointImpl, when: str) -> None:
    plain = seeded(copy.deepcopy(tiny_llama))
    expected = gradients(plain, llama_forwards(plain))

    def wrap(model: nn.Module) -> None:
        apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=lambda module: checkpoint_wrapper(module, implementation),
            check_fn=lambda module: isinstance(module, LlamaDecoderLayer),
        )

    if when == "before":
        wrap(tiny_llama)
    model = seeded(tiny_llama)
    if when == "after":
        wrap(model)
    actual = gradients(model, llama_forwards(model))
    actual = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in actual.items()}
    bound = REENTRANT if implementation is CheckpointImpl.REENTRANT else EXACT
    check(actual, expected, bound)
    unwrapped = model.unload().model.layers[0]
    assert type(unwrapped.checkpoint_fn).__name__ == "partial"


class Part(nn.Module):
    """Has adapters of its own, inside a model that has others; `checkpointed` wraps a block that both adapt."""

    def __init__(self, checkpointed: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.block = checkpointed(TwoLayers())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Whole(nn.Module):
    def __init__(self, checkpointed: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.part = Part(checkpointed)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.part(x))


def test_a_block_that_two_roots_adapt() -> None:
    x = torch.randn(3, 7)

    def make(checkpointed: Callable[[nn.Module], nn.Module]) -> tuple[Whole, Gradients]:
        torch.manual_seed(0)
        whole = Whole(checkpointed)
        inject_adapter_in_model(nara_config(target_modules=["first"]), whole.part)
        inject_adapter_in_model(nara_config(target_modules=["second", "last"], r=3), whole)
        disturb(whole)

        def forward(outer: Tensor, inner: Tensor) -> Tensor:
            with noise_level(whole, outer), noise_level(whole.part, inner):
                return whole(x).square().mean()

        found = gradients(whole, [lambda: forward(*LEVELS), lambda: forward(*LEVELS[::-1])])
        return whole, {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in found.items()}

    _, expected = make(lambda module: module)
    assert {name.split("nara_core.")[0] for name in expected if "nara_core" in name} == {"", "part."}
    for implementation in CheckpointImpl:
        whole, actual = make(lambda module, kind=implementation: checkpoint_wrapper(module, kind))
        check(actual, expected, REENTRANT)
        detach_holder(whole.part)
        assert whole.part.block.checkpoint_fn.channel is whole.nara_core.channel  # type: ignore[union-attr]
        detach_holder(whole)
        assert type(whole.part.block.checkpoint_fn).__name__ == "partial"
