"""Two models and copies have channels of their own, and an unloaded model has none."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from nara_diffusion import core_matrix, noise_level
from nara_diffusion.noise.level import find_holders
from tests.helpers.adapted import TwoLayers, adapted, disturb, lora_config, nara_config, relative_error
from tests.helpers.two_layers import TARGETS
from tests.runtime.channel_calls import at, expect_no_core

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


def test_models_do_not_see_each_other_s_levels(x: Tensor) -> None:
    one, two = (adapted(TwoLayers(), target_modules=TARGETS) for _ in range(2))
    expected = at(one, 0.2, x), at(two, 0.9, x)
    with noise_level(one, 0.2):
        with pytest.raises(ValueError, match="λ is not known"):
            two(x)
        with noise_level(two, 0.9), torch.no_grad():
            assert torch.equal(one(x), expected[0])
            assert torch.equal(two(x), expected[1])
            assert torch.equal(one(x), expected[0])


class Shares(nn.Module):
    """A second model around a layer of the first."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.last = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x))


def test_an_adapted_layer_in_a_model_that_is_not_its_root_reads_the_level_of_its_root(
    model: PeftModel, x: Tensor
) -> None:
    first = model.base_model.model.first
    stranger = Shares(first)
    expect_no_core(stranger, x)
    with noise_level(model, 0.4):
        expected = first(x)
        assert torch.equal(stranger(x), stranger.last(expected))
    with pytest.warns(UserWarning, match="modify a model with PEFT for a second time"):
        other = adapted(stranger, target_modules=["last"], r=3)
    with noise_level(model, 0.4):
        expected = first(x)  # the second adapter has disturbed the first one's factors
    with noise_level(other, 0.6):
        with noise_level(model, 0.4):
            shared = other(x)
        expect_no_core(other, x)
        C = core_matrix(other, 0.6)[0]
    A, B = stranger.last.lora_A["default"].weight, stranger.last.lora_B["default"].weight
    last = stranger.last.get_base_layer()(expected) + 6 / 3 * expected @ (B @ C @ A).T
    torch.testing.assert_close(shared, last)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_a_channel_of_their_own(model: PeftModel, x: Tensor, duplicate: Any) -> None:
    expected = at(model, 0.3, x)
    clone = duplicate(model)
    assert torch.equal(at(clone, 0.3, x), expected)
    with noise_level(model, 0.3), pytest.raises(ValueError, match="λ is not known"):
        clone(x)
    disturb(clone, seed=9)
    assert relative_error(at(clone, 0.3, x), expected) > 0.05
    assert torch.equal(at(model, 0.3, x), expected)
    bare = clone.unload()
    assert not find_holders(bare)
    assert not bare._forward_pre_hooks
    assert not bare._forward_hooks
    assert torch.equal(at(model, 0.3, x), expected)


def test_a_copy_made_inside_a_forward_is_a_copy(model: PeftModel, x: Tensor) -> None:
    clones = []
    handle = model.base_model.model.second.register_forward_pre_hook(lambda *_: clones.append(copy.deepcopy(model)))
    expected = at(model, 0.3, x)
    handle.remove()
    clones[0].base_model.model.second._forward_pre_hooks.clear()
    expect_no_core(clones[0].base_model.model.first, x)
    assert torch.equal(at(clones[0], 0.3, x), expected)


@pytest.mark.parametrize("again", [False, True])
def test_unload_leaves_what_unloading_a_lora_leaves(tiny_llama: LlamaForCausalLM, again: bool) -> None:
    clone = copy.deepcopy(tiny_llama)
    bare = _trained_and_unloaded(tiny_llama, again, nara_config)
    assert _traces(bare) == _traces(_trained_and_unloaded(clone, again, lora_config))
    blocks = [block.__dict__["_gradient_checkpointing_func"] for block in bare.model.layers]
    assert all(isinstance(function, functools.partial) for function in blocks)
    bare(input_ids=torch.randint(0, 49, (2, 5)))


def _trained_and_unloaded(base: nn.Module, again: bool, config: Callable[..., LoraConfig]) -> Any:
    model = get_peft_model(base, config(target_modules=["q_proj", "down_proj"]))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if again:
        model.add_adapter("second", config(target_modules=["q_proj"]))
        model.set_adapter("second")
        model.delete_adapter("default")
    with noise_level(model, 0.3) if config is nara_config else nullcontext():
        model.train()(input_ids=torch.randint(0, 49, (2, 5)), use_cache=False)
    block = base.model.layers[0]
    assert isinstance(block.__dict__["_gradient_checkpointing_func"], functools.partial) == (config is lora_config)
    return model.unload()


def _traces(model: nn.Module) -> dict[str, Any]:
    """Everything about `model` that an adapter could have left behind."""
    return {
        name: (
            type(module).__name__,
            sorted(module.__dict__),
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            sorted(module._modules),
        )
        for name, module in model.named_modules()
    }
