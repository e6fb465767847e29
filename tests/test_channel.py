"""C(λ) on its way from the root to the layers: while the root's forward runs, in the thread that runs it."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.noise import find_holders
from tests.adapted import TwoLayers, adapted, default_core, disturb, lora_config, nara_config, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")

TARGETS = ["first", "second"]
LEVELS = torch.tensor([0.05, 0.5, 0.93])


@pytest.fixture
def model() -> PeftModel:
    return adapted(TwoLayers(), target_modules=TARGETS)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 7)


def at(model: nn.Module, level: float | Tensor, x: Tensor) -> Tensor:
    with noise_level(model, level), torch.no_grad():
        return model(x)


def expect_no_core(layer: nn.Module, x: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"No C\(λ\) has reached layer '.*first'"):
        layer(x)


class Interrupted(BaseException):
    """Like KeyboardInterrupt, which `except Exception` does not catch."""


# ---------------------------------------------------------------------- stale


def test_a_layer_called_without_its_root_raises(model: PeftModel, x: Tensor) -> None:
    first = model.base_model.model.first
    expect_no_core(first, x)
    at(model, 0.3, x)
    expect_no_core(first, x)
    with noise_level(model, 0.3):
        expect_no_core(first, x)


@pytest.mark.parametrize("error", [ArithmeticError, Interrupted])
@pytest.mark.parametrize(
    "where", ["in a layer", "before the root's hooks", "after the root's hooks", "in a forward hook"]
)
def test_a_forward_that_was_cut_short_leaves_nothing_behind(
    model: PeftModel, x: Tensor, where: str, error: type[BaseException]
) -> None:
    root = model.base_model.model
    expected = at(model, 0.3, x)

    def fail(*_: Any) -> None:
        raise error

    if where == "in a layer":
        handle = root.second.register_forward_pre_hook(fail)
    elif where == "in a forward hook":
        handle = root.register_forward_hook(fail, prepend=True)
    else:
        handle = root.register_forward_pre_hook(fail, prepend=where.startswith("before"))
    with pytest.raises(error):
        at(model, 0.7, x)
    handle.remove()
    expect_no_core(root.first, x)
    assert torch.equal(at(model, 0.3, x), expected)
    expect_no_core(root.first, x)


def test_a_nested_forward_at_another_level_gives_the_outer_one_back(model: PeftModel, x: Tensor) -> None:
    root = model.base_model.model
    expected_inner, expected_outer = at(model, 0.8, x), at(model, LEVELS, x)
    inner = []

    def run_inside(*_: Any) -> None:
        handle.remove()
        inner.append(at(model, 0.8, x))

    handle = root.second.register_forward_pre_hook(run_inside)
    assert torch.equal(at(model, LEVELS, x), expected_outer)
    assert torch.equal(inner[0], expected_inner)
    expect_no_core(root.first, x)


@pytest.mark.parametrize("error", [ArithmeticError, Interrupted])
@pytest.mark.parametrize("prepend", [True, False])
def test_nested_forwards_that_fail_never_hand_over_the_c_of_another(
    model: PeftModel, x: Tensor, prepend: bool, error: type[BaseException]
) -> None:
    """Outer at one λ, middle at a second, and an inner one that fails before or after it has made its C."""
    root = model.base_model.model
    expected = [at(model, level, x) for level in (0.2, 0.8)]
    depth = 0
    middle = []

    def fail_when_deepest(*_: Any) -> None:
        if depth == 2:
            raise error

    def go_deeper(*_: Any) -> None:
        nonlocal depth
        depth += 1
        if depth == 1:
            middle.append(at(model, 0.8, x))
        elif depth == 2:
            with pytest.raises(error):
                at(model, 0.5, x)

    root.register_forward_pre_hook(fail_when_deepest, prepend=prepend)
    root.second.register_forward_pre_hook(go_deeper)
    assert torch.equal(at(model, 0.2, x), expected[0])
    assert torch.equal(middle[0], expected[1])
    expect_no_core(root.first, x)


def test_a_forward_without_the_root_s_call_raises(model: PeftModel, x: Tensor) -> None:
    with noise_level(model, 0.3), pytest.raises(RuntimeError, match="No C"):
        model.base_model.model.forward(x)


def test_switching_adapters_between_forwards(model: PeftModel, x: Tensor) -> None:
    expected = at(model, LEVELS, x)
    model.add_adapter("other", nara_config(target_modules=TARGETS, r=3))
    disturb(model.base_model.model.nara_core.cores["other"], seed=5)
    for layer in (model.base_model.model.first, model.base_model.model.second):
        nn.init.normal_(layer.lora_B["other"].weight)
    model.set_adapter("other")
    other = at(model, LEVELS, x)
    assert relative_error(other, expected) > 0.05
    model.set_adapter("default")
    assert torch.equal(at(model, LEVELS, x), expected)
    model.delete_adapter("other")
    assert torch.equal(at(model, LEVELS, x), expected)
    with model.disable_adapter():
        plain = model(x)
    assert torch.equal(plain, model.unload()(x))


# ---------------------------------------------------------------------- two models, copies, removal


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


def test_an_adapted_layer_in_a_model_that_is_not_its_root_raises(model: PeftModel, x: Tensor) -> None:
    stranger = Shares(model.base_model.model.first)
    with noise_level(model, 0.4):
        expect_no_core(stranger, x)
    with pytest.warns(UserWarning, match="modify a model with PEFT for a second time"):
        other = adapted(stranger, target_modules=["last"], r=3)
    with noise_level(model, 0.4), noise_level(other, 0.6):
        expect_no_core(other, x)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_a_channel_of_their_own(model: PeftModel, x: Tensor, duplicate: Any) -> None:
    expected = at(model, 0.3, x)
    twin = duplicate(model)
    assert torch.equal(at(twin, 0.3, x), expected)
    with noise_level(model, 0.3), pytest.raises(ValueError, match="λ is not known"):
        twin(x)
    disturb(twin, seed=9)
    assert relative_error(at(twin, 0.3, x), expected) > 0.05
    assert torch.equal(at(model, 0.3, x), expected)
    bare = twin.unload()
    assert not find_holders(bare)
    assert not bare._forward_pre_hooks
    assert not bare._forward_hooks
    assert torch.equal(at(model, 0.3, x), expected)


def test_a_copy_made_inside_a_forward_is_a_copy(model: PeftModel, x: Tensor) -> None:
    twins = []
    handle = model.base_model.model.second.register_forward_pre_hook(lambda *_: twins.append(copy.deepcopy(model)))
    expected = at(model, 0.3, x)
    handle.remove()
    twins[0].base_model.model.second._forward_pre_hooks.clear()
    expect_no_core(twins[0].base_model.model.first, x)
    assert torch.equal(at(twins[0], 0.3, x), expected)


@pytest.mark.parametrize("again", [False, True])
def test_unload_leaves_what_unloading_a_lora_leaves(tiny_llama: LlamaForCausalLM, again: bool) -> None:
    twin = copy.deepcopy(tiny_llama)
    bare = _trained_and_unloaded(tiny_llama, again, nara_config)
    assert _traces(bare) == _traces(_trained_and_unloaded(twin, again, lora_config))
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


# ---------------------------------------------------------------------- threads


def test_threads_at_different_levels_on_one_model(model: PeftModel, x: Tensor) -> None:
    workers, rounds = 4, 60
    levels = [torch.rand(3) for _ in range(workers)]
    expected = [at(model, level, x) for level in levels]
    barrier = threading.Barrier(workers, timeout=30)

    def work(index: int) -> int:
        right = 0
        for _ in range(rounds):
            barrier.wait()
            right += torch.equal(at(model, levels[index], x), expected[index])
        return right

    with ThreadPoolExecutor(workers) as pool:
        assert list(pool.map(work, range(workers))) == [rounds] * workers


def test_threads_that_meet_inside_the_forward(model: PeftModel, x: Tensor) -> None:
    """Both threads are between the root and the second layer at the same time."""
    levels = [torch.rand(3), torch.rand(3)]
    expected = [at(model, level, x) for level in levels]
    barrier = threading.Barrier(2, timeout=30)
    model.base_model.model.second.register_forward_pre_hook(_waits(barrier))
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda level: at(model, level, x), levels))
    assert all(map(torch.equal, outputs, expected))


def test_a_thread_that_runs_a_part_of_the_model_raises(model: PeftModel, x: Tensor) -> None:
    """As a model that sends its blocks to threads would."""

    def in_a_thread(*_: Any) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(expect_no_core, model.base_model.model.first, x).result()

    model.base_model.model.second.register_forward_pre_hook(in_a_thread)
    at(model, 0.3, x)


def test_replicas_of_data_parallel(model: PeftModel, x: Tensor) -> None:
    """`nn.DataParallel` runs shallow replicas in threads: λ from a context is missing there, and says so."""
    replicas = [_replica(model) for _ in range(2)]
    with noise_level(model, LEVELS), ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(replica, x) for replica in replicas]:
            with pytest.raises(ValueError, match="λ is not known"):
                future.result()
    expected = [at(model, level, x) for level in (0.2, 0.7)]
    barrier = threading.Barrier(2, timeout=30)
    for replica in replicas:
        replica.base_model.model.second.register_forward_pre_hook(_waits(barrier))
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(at, replicas, (0.2, 0.7), [x, x]))
    assert all(map(torch.equal, outputs, expected))


def _waits(barrier: threading.Barrier) -> Any:
    """A hook that lets no thread pass before the others are there."""

    def wait(*_: Any) -> None:
        barrier.wait()

    return wait


def _replica(module: nn.Module) -> nn.Module:
    """What `torch.nn.parallel.replicate` makes, without needing a GPU."""
    replica = module._replicate_for_data_parallel()
    replica._parameters = dict(module._parameters)
    replica._forward_pre_hooks = copy.copy(module._forward_pre_hooks)
    for name, child in module.named_children():
        replica._modules[name] = _replica(child)
    return replica


def test_inject_adapter_works_without_a_wrapper(x: Tensor) -> None:
    model = inject_adapter_in_model(nara_config(target_modules=TARGETS), TwoLayers())
    disturb(model)
    assert isinstance(model, TwoLayers)
    outputs = at(model, LEVELS, x)
    one_by_one = torch.cat([at(model, float(level), x[i : i + 1]) for i, level in enumerate(LEVELS)])
    assert relative_error(outputs, one_by_one) < 1e-6


def test_a_root_that_calls_its_children(x: Tensor) -> None:
    model = adapted(nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5)), target_modules=["0", "2"])
    first, _, second = list(model.base_model.model)[:3]
    C = default_core(model, LEVELS)
    expected = x.double()
    for layer in (first, torch.tanh, second):
        if layer is torch.tanh:
            expected = torch.tanh(expected)
            continue
        A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        base = F.linear(expected, layer.base_layer.weight.double(), layer.base_layer.bias.double())
        expected = base + 6 / 4 * torch.einsum("or,brs,si,bi->bo", B, C, A, expected)
    assert relative_error(at(model, LEVELS, x), expected) < 2e-6


def test_constant_and_identity_cores_need_no_level(x: Tensor) -> None:
    for core_type in ("constant", "identity"):
        model = adapted(TwoLayers(), target_modules=TARGETS, core_type=core_type)
        assert torch.equal(model(x), at(model, 0.3, x))
    assert isinstance(model.peft_config["default"], NaraConfig)
