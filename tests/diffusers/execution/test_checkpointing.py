"""Gradient checkpointing of denoisers that read λ from their timesteps: exact gradients, or an error.

The case is always two forwards at different timesteps, one a sample, and one backward pass; the reference is the same
model without checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

from nara_diffusion.cores import registry as custom_cores
from tests.diffusers.reference import UNET_TARGETS
from tests.helpers.adapted import disturb, nara_config
from tests.helpers.core_types import TYPES, Affine
from tests.helpers.small_pipelines import TEXT_WIDTHS, small_sdxl

TIMESTEPS = (torch.tensor([950, 30]), torch.tensor([200, 700]))
BOUND = 5e-6  # the sum of the two backward passes comes in another order; a wrong λ is off by a tenth


def unet(prepare: Callable[[Any], None] = lambda model: None, **changes: Any) -> Any:
    """An SDXL UNet with an adapter of the same values in each call; `prepare` runs before it is added."""
    model = small_sdxl().unet
    model.requires_grad_(False)
    prepare(model)
    torch.manual_seed(1)
    model.add_adapter(nara_config(**{"target_modules": UNET_TARGETS, **changes}))
    disturb(model)
    return model.train()


def loss(model: Any, timesteps: Tensor, run: Callable[..., Any] | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(int(timesteps.sum()))
    sample = torch.randn(2, 4, 8, 8, generator=generator).requires_grad_()
    text = torch.randn(2, 5, sum(TEXT_WIDTHS), generator=generator)
    added = {"text_embeds": torch.randn(2, TEXT_WIDTHS[1], generator=generator), "time_ids": torch.ones(2, 6)}
    call = model if run is None else run
    return call(sample, timesteps, text, added_cond_kwargs=added, return_dict=False)[0].square().mean()


def gradients(model: nn.Module, losses: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    losses().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name.replace("_checkpoint_wrapped_module.", ""): gradient for name, gradient in found.items()}


def prior_preservation(model: Any) -> Tensor:
    """Instance and class images in forwards of their own."""
    return loss(model, TIMESTEPS[0]) + 0.7 * loss(model, TIMESTEPS[1])


def distillation(model: Any) -> Tensor:
    """A student at one timestep, and a teacher without the adapter, and then with it, at another."""
    student = loss(model, TIMESTEPS[0])
    model.disable_adapters()
    with torch.no_grad():
        target = loss(model, TIMESTEPS[1])
    model.enable_adapters()
    return (student - target).square() + 0.3 * (loss(model, TIMESTEPS[1]) - student.detach()).square()


def check(actual: dict[str, Tensor], expected: dict[str, Tensor], has_core: bool = True) -> None:
    assert actual.keys() == expected.keys()
    assert any("nara_core." in name for name in expected) is has_core
    for name, gradient in expected.items():
        assert float((actual[name] - gradient).abs().max()) <= BOUND * float(gradient.abs().max()), name


@pytest.mark.parametrize("losses", [prior_preservation, distillation])
@pytest.mark.parametrize("when", ["before", "after"])
def test_two_forwards_before_one_backward_pass(when, losses):
    plain = unet()
    expected = gradients(plain, lambda: losses(plain))
    model = unet((lambda m: m.enable_gradient_checkpointing()) if when == "before" else lambda m: None)
    if when == "after":
        model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    check(gradients(model, lambda: losses(model)), expected)
    wrong = gradients(plain, lambda: loss(plain, TIMESTEPS[0]) + 0.7 * loss(plain, TIMESTEPS[0].flip(0)))
    assert any(not torch.allclose(wrong[name], expected[name], rtol=0.1) for name in expected)


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
def test_reentrant_checkpointing(use_dora):
    plain = unet(use_dora=use_dora)
    expected = gradients(plain, lambda: prior_preservation(plain))
    model = unet(use_dora=use_dora)
    model.enable_gradient_checkpointing(
        lambda function, *args: checkpoint(function.__call__, *args, use_reentrant=True)
    )
    check(gradients(model, lambda: prior_preservation(model)), expected)


KINDS = {name: options for name, options in TYPES.items() if options.get("core_type") != "constant"}
KINDS["own"] = {"core_type": "affine"}
WITHOUT_PARAMETERS = ("rank mask", "bins")  # there a wrong λ shows in the gradients of A and B


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_of_core(kind, monkeypatch):
    monkeypatch.setattr(custom_cores, "_custom", {"affine": Affine})
    model = unet(target_modules=["to_q", "to_v", "conv1"], **KINDS[kind])
    expected = gradients(model, lambda: prior_preservation(model))
    for reentrant in (False, True):
        call = partial(checkpoint, use_reentrant=reentrant)
        model.enable_gradient_checkpointing(lambda function, *args, call=call: call(function.__call__, *args))
        actual = gradients(model, lambda: prior_preservation(model))
        check(actual, expected, has_core=kind not in WITHOUT_PARAMETERS)


def test_checkpointing_that_is_turned_off_again():
    plain, model = unet(), unet()
    expected = gradients(plain, lambda: prior_preservation(plain))
    model.enable_gradient_checkpointing()
    gradients(model, lambda: prior_preservation(model))
    model.disable_gradient_checkpointing()
    check(gradients(model, lambda: prior_preservation(model)), expected)


# ---------------------------------------------------------------------- from outside of both libraries


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_wrapper_that_fsdp_uses(when):
    def wrap(model: nn.Module) -> None:
        apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=checkpoint_wrapper,
            check_fn=lambda module: isinstance(module, BasicTransformerBlock),
        )

    plain = unet()
    expected = gradients(plain, lambda: prior_preservation(plain))
    model = unet(wrap if when == "before" else lambda m: None)
    if when == "after":
        wrap(model)
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_modules())
    check(gradients(model, lambda: prior_preservation(model)), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_whole_unet(reentrant):
    """The recomputation is a forward of its own, with the timesteps of the first."""

    def through(model: Any, timesteps: Tensor) -> Tensor:
        return loss(
            model,
            timesteps,
            lambda *args, **kwargs: checkpoint(lambda *a: model(*a, **kwargs), *args, use_reentrant=reentrant),
        )

    plain, model = unet(), unet()
    expected = gradients(plain, lambda: prior_preservation(plain))
    check(gradients(model, lambda: through(model, TIMESTEPS[0]) + 0.7 * through(model, TIMESTEPS[1])), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_one_s_own_around_a_block_is_refused(reentrant):
    model = unet()
    block = model.mid_block
    run = block.forward
    block.forward = lambda *args, **kwargs: checkpoint(lambda *a: run(*a, **kwargs), *args, use_reentrant=reentrant)
    total = prior_preservation(model)
    with pytest.raises(RuntimeError, match=r"No C\(λ\).*do not recompute a part of it by a checkpoint other than"):
        total.backward()
