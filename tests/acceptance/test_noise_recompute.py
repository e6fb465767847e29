"""Gradient checkpointing: a recomputed block has the C(λ) of its own forward, whatever ran since.

Two forwards at different λ come before one backward pass; the gradients equal those without checkpointing.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from nara_diffusion import noise_level
from tests.helpers.adapted import OneLayer, adapted
from tests.helpers.small_pipelines import small_unet

from ._noise_models import LAYERS, UNET_TARGETS, TwoLayers, adapt, distance

TEXT = 20
TIMESTEPS = (torch.tensor([950, 30]), torch.tensor([200, 700]))
LEVELS = (torch.tensor([0.95, 0.03]), torch.tensor([0.2, 0.7]))
IDS = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(0))


def unet_gradients(unet: Any, loss: Any = 0.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    for timesteps in TIMESTEPS:
        latents = torch.randn(2, 4, 8, 8, generator=generator).requires_grad_()
        text = torch.randn(2, 5, TEXT, generator=generator)
        loss = loss + unet(latents, timesteps, text).sample.square().mean()
    return gradients(unet, loss)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    )


def llama_gradients(model: Any, loss: Any = 0.0) -> dict[str, Tensor]:
    for levels in LEVELS:
        with noise_level(model, levels):
            loss = loss + model(input_ids=IDS, use_cache=False).logits.square().mean()
    with noise_level(model, 0.5):  # is not that of either forward
        return gradients(model, loss)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    by_name = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert all(bool(gradient.any()) for gradient in by_name.values())
    assert len(by_name) == sum(p.requires_grad for p in model.parameters())
    assert any("core" in name for name in by_name)
    return by_name


def by_diffusers(unet: Any, reentrant: bool) -> None:
    if reentrant:  # Diffusers takes a function; its own is not reentrant
        unet.enable_gradient_checkpointing(lambda block, *args: checkpoint(block.__call__, *args, use_reentrant=True))
    else:
        unet.enable_gradient_checkpointing()
    assert unet.is_gradient_checkpointing


def by_transformers(model: Any, reentrant: bool) -> None:
    new_name = "activation_checkpointing_enable"
    enable = getattr(model, new_name if hasattr(model, new_name) else "gradient_checkpointing_enable")
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


KINDS = {
    "unet": (lambda: small_unet(TEXT), UNET_TARGETS, by_diffusers, unet_gradients),
    "llama": (llama, ["q_proj", "down_proj"], by_transformers, llama_gradients),
}


@pytest.mark.parametrize(
    ("kind", "reentrant", "when"),
    [("unet", False, "before"), ("unet", True, "after"), ("llama", True, "before"), ("llama", False, "after")],
)
def test_checkpointing_two_forwards_gives_the_same_gradients(kind: str, reentrant: bool, when: str) -> None:
    make, targets, enable, gradients_of = KINDS[kind]
    expected = gradients_of(adapt(make(), targets, scale=0.3)[0].train())
    model: Any = make()
    if when == "before":
        enable(model, reentrant)
    model, _ = adapt(model, targets, scale=0.3)
    if when == "after":
        enable(model, reentrant)
    actual = gradients_of(model.train())
    assert actual.keys() == expected.keys()
    errors = {name: distance(gradient, expected[name]) for name, gradient in actual.items()}
    bound = 1e-5  # the two backward passes add up in another order; a λ of the other forward is off by a tenth
    assert max(errors.values()) < bound, max(errors, key=errors.__getitem__)


class Checkpointed(TwoLayers):
    """Under a checkpoint that neither library knows of."""

    def forward(self, x: Tensor, timestep: Any = None) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("around", [None, 0.5], ids=["outside of contexts", "inside another context"])
def test_user_checkpoint_never_takes_another_forwards_level(around: float | None) -> None:
    model, _ = adapt(Checkpointed(), LAYERS)
    with noise_level(model, LEVELS[0]):
        loss = model(torch.randn(2, 7)).square().mean()
    backward_at = nullcontext() if around is None else noise_level(model, around)
    with backward_at, pytest.raises(RuntimeError, match="λ"):
        loss.backward()


def test_backward_rerun_at_another_level_is_refused() -> None:
    model, x = adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"]), torch.randn(2, 7, requires_grad=True)
    with noise_level(model, 0.3):
        output: Any = checkpoint(model, x, use_reentrant=False)
    with noise_level(model, 0.7), pytest.raises(ValueError, match="A backward pass runs the whole adapted model again"):
        output.sum().backward()
