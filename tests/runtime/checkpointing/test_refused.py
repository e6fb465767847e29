"""Checkpoints of one's own: around the whole model they need λ inside, around a part of it they are refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from nara_diffusion import noise_level, set_noise_source
from nara_diffusion.noise.signals import NoiseSignals
from tests.helpers.adapted import TwoLayers, adapted, nara_config
from tests.helpers.layers.recomputation import (
    EXACT,
    LEVELS,
    REENTRANT,
    TARGETS,
    at,
    check,
    gradients,
    llama_forwards,
    square,
)

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


class Checkpointed(nn.Module):
    """A model with a checkpoint of its own around its layers."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([TwoLayers(), nn.Linear(5, 7), TwoLayers()])
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


@pytest.fixture(params=[False, True], ids=["non-reentrant", "reentrant"])
def own(request: pytest.FixtureRequest) -> PeftModel:
    return adapted(Checkpointed(request.param), target_modules=["first", "second"]).train()


def test_a_checkpoint_of_one_s_own_is_refused(own: PeftModel) -> None:
    loss = at(own, LEVELS[0], square(torch.randn(3, 7, requires_grad=True)))()
    with (
        noise_level(own, LEVELS[1]),
        pytest.raises(RuntimeError, match=r"No C\(λ\).*a checkpoint other than the model's own"),
    ):
        loss.backward()


def test_also_while_another_forward_of_the_model_is_running(own: PeftModel) -> None:
    """There is a C, but it is not that of the forward that is recomputed."""
    loss = at(own, LEVELS[0], square(torch.randn(3, 7, requires_grad=True)))()

    def backward(*_: Any) -> None:
        handle.remove()
        with pytest.raises(RuntimeError, match=r"No C\(λ\)"):
            loss.backward()

    handle = own.base_model.model.layers[1].register_forward_pre_hook(backward)
    with noise_level(own, LEVELS[1]):
        own(torch.randn(3, 7, requires_grad=True))
    assert handle.id not in own.base_model.model.layers[1]._forward_pre_hooks


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_whole_model_needs_the_level_inside(reentrant: bool) -> None:
    model = adapted(TwoLayers(), target_modules=["first", "second"]).train()
    x = torch.randn(3, 7, requires_grad=True)

    def inside(level: Tensor) -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            with noise_level(model, level):
                return model(x)

        return function

    expected = gradients(model, [at(model, level, square(x)) for level in LEVELS])
    forwards = [
        lambda level=level: checkpoint(inside(level), x, use_reentrant=reentrant).square().mean() for level in LEVELS
    ]
    check(gradients(model, forwards), expected, REENTRANT if reentrant else EXACT)
    with noise_level(model, 0.77):  # no matter what is active outside
        check(gradients(model, forwards), expected, REENTRANT if reentrant else EXACT)

    def outside(level: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=reentrant).square().mean()

    with ExitStack() as stack:
        stack.enter_context(noise_level(model, LEVELS[0]))
        first = outside(LEVELS[0])
        stack.enter_context(noise_level(model, LEVELS[1]))
        with pytest.raises(
            ValueError, match=r"backward pass runs the whole adapted model again.*inside the checkpointed"
        ):
            first.backward()
    with pytest.raises(ValueError, match="λ is not known"):
        at(model, LEVELS[0], lambda model: outside(LEVELS[0]))().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_whole_model_with_a_source(reentrant: bool) -> None:
    """The recomputation has the inputs of the first run, so that the source tells the same again."""
    model = adapted(TwoLayers(), target_modules=["first", "second"]).train()
    set_noise_source(model, lambda module, args, kwargs: NoiseSignals((args[0] > 0).float().mean(1)))  # type: ignore[arg-type]
    inputs = [torch.randn(3, 7, requires_grad=True) for _ in range(2)]
    expected = gradients(model, [lambda x=x: model(x).square().mean() for x in inputs])
    forwards = [lambda x=x: checkpoint(model, x, use_reentrant=reentrant).square().mean() for x in inputs]
    check(gradients(model, forwards), expected, REENTRANT if reentrant else EXACT)


def test_an_adapter_switched_before_the_backward_pass_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    model = adapted(tiny_llama, target_modules=TARGETS).train()
    model.add_adapter("other", nara_config(target_modules=TARGETS))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = llama_forwards(model)[0]()
    model.set_adapter("other")
    with pytest.raises(RuntimeError, match=r"No C\(λ\).*for adapter 'other'"):
        loss.backward()
