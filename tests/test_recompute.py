"""Gradient checkpointing: each recomputation sees the λ of its own forward, or raises.

The reference is always the same model without checkpointing, and the case is always two forwards at different λ, one
value a sample, followed by one backward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from threading import Barrier
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from nara_diffusion import NaraConfig, noise_level, set_noise_source
from nara_diffusion.noise import NoiseSignals
from tests.adapted import TwoLayers, adapted, disturb, nara_config

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")

LEVELS = (torch.tensor([0.05, 0.5, 0.93]), torch.tensor([0.8, 0.2, 0.6]))
TARGETS = ["q_proj", "v_proj", "down_proj"]
EXACT = 0.0
REENTRANT = 1e-6  # a reentrant checkpoint sums the two backward passes in another order
Gradients = dict[str, Tensor]


def gradients(model: nn.Module, forwards: list[Callable[[], Tensor]]) -> Gradients:
    """Of the sum of the forwards' losses; dropout draws the same in each call of this function."""
    model.zero_grad()
    losses = []
    for index, forward in enumerate(forwards):
        torch.manual_seed(index)
        losses.append(forward())
    sum(losses).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(actual: Gradients, expected: Gradients, bound: float) -> None:
    """max |actual − expected| / max |expected| of each parameter is within `bound`; so is which have a gradient."""
    assert actual.keys() == expected.keys()
    assert any("nara_core." in name for name in expected)
    errors = {name: float((actual[name] - g).abs().max() / g.abs().max()) for name, g in expected.items()}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= bound, worst


def seeded(model: nn.Module, wrapper: Callable[..., nn.Module] = get_peft_model, **changes: Any) -> Any:
    """`model` in training, adapted with the same values, frequencies included, in each call."""
    torch.manual_seed(3)
    model = wrapper(model, nara_config(**{"target_modules": TARGETS, **changes}))
    disturb(model)
    return model.train()


def inject(model: nn.Module, config: NaraConfig) -> nn.Module:
    return inject_adapter_in_model(config, model)


def add(model: Any, config: NaraConfig) -> nn.Module:
    model.requires_grad_(False)
    model.add_adapter(config)
    return model


def at(model: nn.Module, level: Tensor, loss: Callable[[nn.Module], Tensor]) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        with noise_level(model, level):
            return loss(model)

    return forward


# ---------------------------------------------------------------------- Transformers


def llama_loss(model: nn.Module) -> Tensor:
    ids = torch.arange(15).view(3, 5) + 7
    return model(input_ids=ids, use_cache=False).logits.square().mean()


def llama_forwards(model: nn.Module) -> list[Callable[[], Tensor]]:
    return [at(model, level, llama_loss) for level in LEVELS]


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
    core = model.base_model.model.nara_core.cores["default"]["global"]
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
    twin = copy.deepcopy(model)
    disturb(model, seed=8)
    check(gradients(twin, llama_forwards(twin)), expected, REENTRANT if reentrant else EXACT)


def test_an_attribute_of_the_same_name_that_is_no_function_is_left_alone() -> None:
    base = TwoLayers()
    base.first.checkpoint_fn = "first.pt"  # type: ignore[assignment]
    model = adapted(base, target_modules=["second"]).train()
    at(model, LEVELS[0], square(torch.randn(3, 7)))()
    assert base.first.checkpoint_fn == "first.pt"


@pytest.mark.parametrize("reentrant", [False, True])
def test_threads_train_at_their_own_levels(tiny_llama: LlamaForCausalLM, reentrant: bool) -> None:
    """Forward and backward in two threads at once, into the same `.grad`."""
    model = adapted(tiny_llama, target_modules=TARGETS).train()
    rounds = 6
    expected = {name: rounds * g for name, g in gradients(model, llama_forwards(model)).items()}
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    barrier = Barrier(2, timeout=30)

    def work(forward: Callable[[], Tensor]) -> None:
        for _ in range(rounds):
            barrier.wait()
            loss = forward()
            barrier.wait()
            loss.backward()

    model.zero_grad()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, llama_forwards(model)))
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
        whole.part.nara_core.detach(whole.part)  # type: ignore[union-attr, operator]
        assert whole.part.block.checkpoint_fn.channel is whole.nara_core.channel  # type: ignore[union-attr]
        whole.nara_core.detach(whole)  # type: ignore[union-attr, operator]
        assert type(whole.part.block.checkpoint_fn).__name__ == "partial"


# ---------------------------------------------------------------------- other checkpoint functions: refused


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


def square(x: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(x).square().mean()


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
