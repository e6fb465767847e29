"""Gradient checkpointing of Transformers: each recomputation sees the λ of its own forward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from nara_diffusion import noise_level
from tests.helpers.adapted import TwoLayers, adapted, disturb, nara_config
from tests.helpers.layers.recomputation import (
    EXACT,
    LEVELS,
    REENTRANT,
    TARGETS,
    Gradients,
    at,
    check,
    gradients,
    inject,
    llama_forwards,
    seeded,
    square,
)
from tests.helpers.patience import LAST_RESORT, all_at_once

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")

VARIANTS: dict[str, dict[str, Any]] = {
    "linear": {},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.4},
    "dora with dropout": {"use_dora": True, "lora_dropout": 0.4},
    "core by layer": {"core_sharing": "layer"},
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_llama(tiny_llama: LlamaForCausalLM, variant: str, reentrant: bool) -> None:
    model = adapted(tiny_llama, target_modules=TARGETS, **VARIANTS[variant]).train()
    expected = gradients(model, llama_forwards(model))
    check(gradients(model, llama_forwards(model)), expected, EXACT)  # dropout repeats
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with _recomputations(model) as recomputed:
        actual = gradients(model, llama_forwards(model))
    assert recomputed() == 2 * len(LEVELS)
    check(actual, expected, REENTRANT if reentrant else EXACT)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("wrapper", [get_peft_model, inject])
@pytest.mark.parametrize("input_grads", [False, True])
def test_llama_that_was_checkpointed_before_it_was_adapted(
    tiny_llama: LlamaForCausalLM, wrapper: Callable[..., nn.Module], reentrant: bool, input_grads: bool
) -> None:
    plain = seeded(copy.deepcopy(tiny_llama))
    expected = gradients(plain, llama_forwards(plain))
    tiny_llama.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if input_grads:
        tiny_llama.enable_input_require_grads()
    model = seeded(tiny_llama, wrapper)
    actual = gradients(model, llama_forwards(model))
    renamed = {name if name in expected else f"base_model.model.{name}": g for name, g in actual.items()}
    check(renamed, expected, REENTRANT if reentrant else EXACT)


def test_checkpointing_turned_on_between_two_forwards(tiny_llama: LlamaForCausalLM) -> None:
    model = adapted(tiny_llama, target_modules=TARGETS).train()
    expected = gradients(model, llama_forwards(model))

    def turn_on_and_run() -> Tensor:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return second()

    first, second = llama_forwards(model)
    check(gradients(model, [first, turn_on_and_run]), expected, EXACT)


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_adapters_at_once(tiny_llama: LlamaForCausalLM, reentrant: bool) -> None:
    model = get_peft_model(tiny_llama, nara_config(target_modules=TARGETS))
    model.add_adapter("other", nara_config(target_modules=["q_proj", "o_proj"], r=3, core_type="constant"))
    model.add_adapter("plain", nara_config(target_modules=["q_proj"], core_type="identity"))
    disturb(model)
    model.base_model.set_adapter(["default", "other", "plain"])
    model.train()
    expected = gradients(model, llama_forwards(model))
    assert {"default", "other"} == {name.split("cores.")[1].split(".")[0] for name in expected if "cores." in name}
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    check(gradients(model, llama_forwards(model)), expected, REENTRANT if reentrant else EXACT)


@pytest.mark.parametrize("reentrant", [False, True])
def test_autocast(tiny_llama: LlamaForCausalLM, reentrant: bool) -> None:
    """The core computes in float32 there, so that C is to the bit what it is without autocast."""
    model = adapted(tiny_llama, target_modules=TARGETS).train()

    def forwards() -> list[Callable[[], Tensor]]:
        return [lambda forward=forward: autocast(forward) for forward in llama_forwards(model)]

    def autocast(forward: Callable[[], Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return forward()

    seen = []
    core = model.base_model.model.nara_core.cores["default"]["shared"]
    core.register_forward_hook(lambda module, args, output: seen.append(output))
    expected = gradients(model, forwards())
    llama_forwards(model)[0]()
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], seen[-1])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    check(gradients(model, forwards()), expected, REENTRANT if reentrant else EXACT)


def test_accumulation_without_checkpointing_in_between(tiny_llama: LlamaForCausalLM) -> None:
    """A backward pass inside other models' and other levels' contexts, whose λ is none of its own."""
    model = adapted(tiny_llama, target_modules=TARGETS).train()
    expected = gradients(model, llama_forwards(model))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.zero_grad()
    first, second = (forward() for forward in llama_forwards(model))
    with noise_level(model, 0.123):
        (first + second).backward()
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    check(actual, expected, EXACT)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_pass_inside_another_forward(tiny_llama: LlamaForCausalLM, reentrant: bool) -> None:
    """While one forward is between its layers, another one's blocks are recomputed: each keeps its λ."""
    model = adapted(tiny_llama, target_modules=TARGETS).train()
    first, second = llama_forwards(model)
    expected = gradients(model, [first]), gradients(model, [second])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    collected: list[Gradients] = []

    def backward(*_: Any) -> None:
        if not collected:
            collected.append({})
            with (
                torch.enable_grad()
            ):  # a reentrant checkpoint, inside of which some versions of Transformers call hooks
                collected[0] = gradients(model, [lambda: pending])
            model.zero_grad()

    pending = first()
    model.base_model.model.model.layers[1].register_forward_pre_hook(backward)
    actual = gradients(model, [second])
    bound = REENTRANT if reentrant else EXACT
    check(collected[0], expected[0], bound)
    check(actual, expected[1], bound)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_copy_of_a_model_that_has_been_checkpointed(tiny_llama: LlamaForCausalLM, reentrant: bool) -> None:
    model = adapted(tiny_llama, target_modules=TARGETS).train()
    expected = gradients(model, llama_forwards(model))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    llama_forwards(model)[0]()
    clone = copy.deepcopy(model)
    disturb(model, seed=8)
    check(gradients(clone, llama_forwards(clone)), expected, REENTRANT if reentrant else EXACT)


def test_an_attribute_of_the_same_name_that_is_no_function_is_left_alone() -> None:
    base = TwoLayers()
    base.first.checkpoint_fn = "first.pt"  # type: ignore[assignment]
    model = adapted(base, target_modules=["second"]).train()
    at(model, LEVELS[0], square(torch.randn(3, 7)))()
    assert base.first.checkpoint_fn == "first.pt"


# ---------------------------------------------------------------------- threads


@pytest.mark.parametrize("reentrant", [False, True])
def test_threads_train_at_their_own_levels(tiny_llama: LlamaForCausalLM, reentrant: bool) -> None:
    """Forward and backward in two threads at once, into the same `.grad`."""
    model = adapted(tiny_llama, target_modules=TARGETS).train()
    rounds = 6
    expected = {name: rounds * g for name, g in gradients(model, llama_forwards(model)).items()}
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    barrier = Barrier(2, timeout=LAST_RESORT)

    def work(forward: Callable[[], Tensor]) -> None:
        for _ in range(rounds):
            barrier.wait()
            loss = forward()
            barrier.wait()
            loss.backward()

    model.zero_grad()
    all_at_once(work, llama_forwards(model), barrier)
    check({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected, 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_pass_in_another_thread(tiny_llama: LlamaForCausalLM, reentrant: bool) -> None:
    """As on a GPU, whose blocks are recomputed in a thread of its own."""
    model = adapted(tiny_llama, target_modules=TARGETS).train()
    expected = gradients(model, llama_forwards(model))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with ThreadPoolExecutor(1) as pool:
        loss = sum(forward() for forward in llama_forwards(model))
        model.zero_grad()
        pool.submit(loss.backward).result()
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    check(actual, expected, REENTRANT if reentrant else EXACT)


@contextmanager
def _recomputations(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Counts how often a block runs more than it would without checkpointing."""
    counts = {"all": 0, "outside": 0}
    decoder = model.base_model.model.model  # what calls the blocks, and is not recomputed itself

    def count(*_: Any) -> None:
        counts["all"] += 1

    def count_call(*_: Any) -> None:
        counts["outside"] += len(decoder.layers)

    # hooks of a block stay outside the checkpoint in some versions of Transformers; those of its parts never do
    handles = [block.input_layernorm.register_forward_pre_hook(count) for block in decoder.layers]
    handles.append(decoder.register_forward_pre_hook(count_call))
    yield lambda: counts["all"] - counts["outside"]
    for handle in handles:
        handle.remove()
