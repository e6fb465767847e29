"""λ: what is taken for it, for how long and for whom it holds, and the sources that tell it."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from nara_diffusion import noise_level, set_noise_source
from nara_diffusion.denoisers import _DENOISERS, register_denoiser
from nara_diffusion.noise import NoiseSignals, is_noise_aware, mask_density_radius, needs_mask_density
from tests.adapted import TwoLayers, adapted, core_by_hand, default_core, disturb, nara_config, relative_error

TARGETS = ["first", "second"]
LEVELS = torch.tensor([0.05, 0.5, 0.93])


@pytest.fixture
def model() -> PeftModel:
    return adapted(TwoLayers(), target_modules=TARGETS)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 7)


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def by_hand(model: PeftModel, x: Tensor, core: Tensor) -> Tensor:
    """The output of a TwoLayers in float64, from its state dict and C (b, r, r)."""
    state = {name.removeprefix("base_model.model."): t.double() for name, t in model.state_dict().items()}
    scaling = 6 / 4

    def layer(name: str, x: Tensor) -> Tensor:
        A, B = (state[f"{name}.lora_{factor}.default.weight"] for factor in "AB")
        base = x @ state[f"{name}.base_layer.weight"].T + state[f"{name}.base_layer.bias"]
        return base + scaling * torch.einsum("or,brs,si,bi->bo", B, core, A, x)

    return layer("second", torch.tanh(layer("first", x.double())))


def expect(model: PeftModel, x: Tensor, level: float | Tensor) -> Tensor:
    levels = torch.as_tensor(level, dtype=torch.float32).expand(len(x))
    return by_hand(model, x, default_core(model, levels))


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize(
    "value",
    [
        0,
        1,
        0.0,
        1.0,
        0.37,
        np.float64(0.37),
        np.float32(0.37),
        np.int64(1),
        torch.tensor(0.37),
        torch.tensor([0.37]),
        torch.tensor(0.37, dtype=torch.float64),
        torch.tensor([0.37], dtype=torch.float16),
        LEVELS,
        LEVELS.double(),
        LEVELS.bfloat16(),
        torch.tensor([0, 1, 1]),
        torch.tensor([1.0, 0.0, 0.5], requires_grad=True),
        LEVELS.repeat(2)[::2],
    ],
)
def test_a_level_may_be_a_number_or_one_number_a_sample(model: PeftModel, x: Tensor, value: Any) -> None:
    with noise_level(model, value):
        output = run(model, x)
    level = value.detach().float() if isinstance(value, Tensor) else float(value)
    assert relative_error(output, expect(model, x, level)) < 2e-6


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), r"noise_level is \[nan\].*\[0, 1\], where 1 is pure noise"),
        (float("inf"), r"noise_level is \[inf\].*\[0, 1\]"),
        (-0.01, r"noise_level is \[-0.0\d+\].*\[0, 1\]"),
        (1.01, r"noise_level is \[1.0\d+\].*\[0, 1\]"),
        (500, r"noise_level is \[500.0\].*\[0, 1\]"),
        (torch.tensor([0.2, float("nan"), 0.1]), r"nan.*\[0, 1\]"),
        (torch.tensor([0.2, 1.5, 0.1]), r"1.5.*\[0, 1\]"),
        (torch.tensor([[0.2, 0.5, 0.1]]), r"shape \(1, 3\).*one number, or a tensor of shape \(batch,\)"),
        (torch.zeros(3, 1), r"shape \(3, 1\).*shape \(batch,\)"),
        (torch.zeros(0), r"shape \(0,\).*shape \(batch,\)"),
        (torch.tensor([True, False, True]), r"torch.bool.*one number"),
        (torch.tensor([0.1 + 0j]), r"complex.*one number"),
        (np.bool_(True), r"noise_level is np.True_: pass a float"),
        (True, r"noise_level is True: pass a float in \[0, 1\]"),
        ("0.3", r"noise_level is '0.3': pass a float in \[0, 1\]"),
        (None, r"noise_level is None: pass a float in \[0, 1\]"),
        ([0.1, 0.2, 0.3], r"noise_level is \[0.1, 0.2, 0.3\]: pass a float in \[0, 1\]"),
    ],
)
def test_what_is_no_level_is_refused(model: PeftModel, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said), noise_level(model, value):
        pytest.fail("the context was entered")


@pytest.mark.parametrize("length", [2, 4])
def test_a_level_of_the_wrong_length_names_layer_and_batch(model: PeftModel, x: Tensor, length: int) -> None:
    with (
        noise_level(model, torch.rand(length)),
        pytest.raises(ValueError, match=rf"noise_level has {length} values, .* layer '.*first' is 3: pass one value"),
    ):
        model(x)


@pytest.fixture
def _films_repeat_samples() -> Iterator[None]:
    register_denoiser("Film", sample_major=True)
    yield
    _DENOISERS.pop("Film")


class Film(TwoLayers):
    """A denoiser whose second layer sees three frames of each sample."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        return self.second(torch.tanh(self.first(x)).repeat_interleave(3, dim=0))


@pytest.mark.usefixtures("_films_repeat_samples")
def test_where_layers_see_repeats_of_the_batch_the_level_still_has_its_length() -> None:
    model = adapted(Film(), target_modules=TARGETS)
    x, t = torch.randn(4, 7), torch.tensor([500])
    levels = torch.rand(4)
    with noise_level(model, levels), torch.no_grad():
        outputs = model(x, t)
        assert torch.equal(model(timestep=t, x=x), outputs)
    for row, level in enumerate(levels):
        with noise_level(model, level), torch.no_grad():
            assert relative_error(outputs[3 * row : 3 * row + 3], model(x[row : row + 1], t)) < 1e-6
    for length in (2, 12):  # divides the rows that a layer sees, or equals them
        with (
            noise_level(model, torch.rand(length)),
            pytest.raises(ValueError, match=f"noise_level has {length} values, but the batch is 4: pass one value"),
        ):
            model(x, t)


def test_samples_get_their_own_level(model: PeftModel, x: Tensor) -> None:
    order = torch.tensor([2, 0, 1])
    with noise_level(model, LEVELS):
        output = run(model, x)
    with noise_level(model, LEVELS[order]):
        assert relative_error(run(model, x[order]), output[order]) < 1e-6
        assert relative_error(run(model, x), output) > 0.02


def test_a_level_is_what_it_was_on_entry(model: PeftModel, x: Tensor) -> None:
    """A loop that reuses its tensor does not move the λ of a context that is open."""
    level = LEVELS.clone()
    with noise_level(model, level):
        level.fill_(7.0)
        assert relative_error(run(model, x), expect(model, x, LEVELS)) < 2e-6


def test_beams_and_repeats_have_to_be_told(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.config.is_causal = True
    model = adapted(tiny_llama, target_modules=["q_proj", "v_proj"])
    ids = torch.randint(1, 49, (2, 4))
    options: dict[str, Any] = {"max_new_tokens": 2, "num_beams": 2, "attention_mask": torch.ones_like(ids)}
    with (
        noise_level(model, torch.tensor([0.2, 0.8])),
        pytest.raises(ValueError, match=r"2 values, but the batch inside layer .*q_proj' is 4.*beams"),
    ):
        model.generate(input_ids=ids, **options)
    with noise_level(model, 0.2):
        shared = model.generate(input_ids=ids, **options)
    with noise_level(model, torch.full((4,), 0.2)):
        assert torch.equal(model.generate(input_ids=ids, **options), shared)


# ---------------------------------------------------------------------- the mask density


def density_model(core_input: str) -> PeftModel:
    return adapted(TwoLayers(), target_modules=TARGETS, core_input=core_input, mask_density_radius=3)


@pytest.mark.parametrize("core_input", ["mask_density", "both"])
@pytest.mark.parametrize(
    ("level", "density"),
    [(LEVELS, LEVELS.flip(0)), (0.3, LEVELS), (LEVELS, 0.3), (0.3, 0.8), (0.3, torch.tensor([0.8]))],
)
def test_level_and_density_may_each_be_shared_by_the_batch(
    x: Tensor, core_input: str, level: float | Tensor, density: float | Tensor
) -> None:
    model = density_model(core_input)
    with noise_level(model, level, mask_density=density):
        output = run(model, x)
    rows = [torch.as_tensor(signal, dtype=torch.float32).expand(3) for signal in (level, density)]
    prefix = "base_model.model.nara_core.cores.default.global."
    core = core_by_hand(model.state_dict(), prefix, model.peft_config["default"], *rows)
    assert relative_error(output, by_hand(model, x, core)) < 2e-6


def test_a_density_that_does_not_fit_is_refused(x: Tensor) -> None:
    model = density_model("both")
    with (
        pytest.raises(ValueError, match=r"mask_density has 2 values, noise_level 3: pass one value, or one a sample"),
        noise_level(model, LEVELS, mask_density=torch.rand(2)),
    ):
        pytest.fail("the context was entered")
    with pytest.raises(ValueError, match=r"mask_density is \[1.5\]"), noise_level(model, 0.3, mask_density=1.5):
        pytest.fail("the context was entered")
    with noise_level(model, 0.3), pytest.raises(ValueError, match=r"mask density is not known.*mask_density="):
        model(x)


def test_what_a_model_reads() -> None:
    assert not is_noise_aware(TwoLayers())
    assert is_noise_aware(adapted(TwoLayers(), target_modules=TARGETS))
    assert not is_noise_aware(adapted(TwoLayers(), target_modules=TARGETS, core_type="constant"))
    model = density_model("both")
    assert needs_mask_density(model)
    assert mask_density_radius(model) == 3
    with model.disable_adapter():
        assert not is_noise_aware(model)
        assert not needs_mask_density(model)
    model.add_adapter("far", nara_config(target_modules=TARGETS, core_input="both", mask_density_radius=9))
    model.base_model.set_adapter(["default", "far"])
    with pytest.raises(ValueError, match=r"different radii, \[3, 9\]"):
        mask_density_radius(model)


# ---------------------------------------------------------------------- for how long


def test_a_forward_without_a_level_names_both_remedies(model: PeftModel, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"λ is not known.*noise_level\(model, value\).*set_noise_source\(model"):
        model(x)


def test_a_model_without_nara_is_refused() -> None:
    for call in (lambda: noise_level(TwoLayers(), 0.3).__enter__(), lambda: set_noise_source(TwoLayers(), None)):
        with pytest.raises(ValueError, match="TwoLayers holds no NaRA adapter"):
            call()


def test_a_pipeline_is_not_a_model() -> None:
    class Pipeline:
        """As those of Diffusers, which are no modules."""

    with pytest.raises(ValueError, match=r"Pipeline is no torch.nn.Module: pass the model itself, e.g. pipe.unet"):
        noise_level(Pipeline(), 0.3).__enter__()  # type: ignore[arg-type]


def test_nested_contexts_restore_the_previous_level(model: PeftModel, x: Tensor) -> None:
    expected = {level: expect(model, x, level) for level in (0.1, 0.5, 0.9)}

    def check(level: float) -> None:
        assert relative_error(run(model, x), expected[level]) < 2e-6

    def leave_by_an_exception(level: float) -> None:
        with noise_level(model, level):
            check(level)
            raise KeyError

    with noise_level(model, 0.1):
        with noise_level(model, 0.5):
            with pytest.raises(KeyError):
                leave_by_an_exception(0.9)
            check(0.5)
            with pytest.raises(ValueError, match="is 3"), noise_level(model, torch.rand(2)):
                model(x)
            check(0.5)
            with pytest.raises(ValueError, match="nan"), noise_level(model, float("nan")):
                pass
            check(0.5)
        check(0.1)
    with pytest.raises(ValueError, match="λ is not known"):
        model(x)


def test_contexts_may_end_in_any_order(model: PeftModel, x: Tensor) -> None:
    first, second = ExitStack(), ExitStack()
    first.enter_context(noise_level(model, 0.1))
    second.enter_context(noise_level(model, 0.9))
    first.close()
    assert relative_error(run(model, x), expect(model, x, 0.9)) < 2e-6
    second.close()
    with pytest.raises(ValueError, match="λ is not known"):
        model(x)


def outputs_at(model: nn.Module, x: Tensor, level: float) -> Iterator[Tensor]:
    with noise_level(model, level):
        while True:
            yield run(model, x)


def test_a_generator_that_is_left_early_leaves_no_level_behind(model: PeftModel, x: Tensor) -> None:
    for output in outputs_at(model, x, 0.1):
        assert relative_error(output, expect(model, x, 0.1)) < 2e-6
        break
    gc.collect()
    with pytest.raises(ValueError, match="λ is not known"):
        model(x)


def test_a_generator_that_ends_inside_another_context_leaves_that_one_alone(model: PeftModel, x: Tensor) -> None:
    generator = outputs_at(model, x, 0.1)
    next(generator)
    with noise_level(model, 0.9):
        generator.close()
        assert relative_error(run(model, x), expect(model, x, 0.9)) < 2e-6
    with pytest.raises(ValueError, match="λ is not known"):
        model(x)


def test_a_generator_that_another_context_ends(model: PeftModel, x: Tensor) -> None:
    """Its context variables are not those of whoever ends it, so that nothing can be reset, only closed."""
    generator = outputs_at(model, x, 0.1)
    here = contextvars.copy_context()
    here.run(next, generator)
    generator.close()
    with pytest.raises(ValueError, match="λ is not known"):
        here.run(model, x)


def test_generators_that_take_turns_each_have_their_level(model: PeftModel, x: Tensor) -> None:
    levels = (0.1, 0.9, 0.5)
    expected = [expect(model, x, level) for level in levels]
    generators = [outputs_at(model, x, level) for level in levels]
    for _ in range(3):
        for generator, reference in zip(generators, expected, strict=True):
            assert relative_error(next(generator), reference) < 2e-6
    generators[1].close()
    for index in (0, 2):
        assert relative_error(next(generators[index]), expected[index]) < 2e-6


def test_a_suspended_generator_does_not_lend_its_level(model: PeftModel, x: Tensor) -> None:
    generator = outputs_at(model, x, 0.1)
    next(generator)
    with pytest.raises(ValueError, match="λ is not known"):
        model(x)
    with noise_level(model, 0.9):
        next(generator)
        assert relative_error(run(model, x), expect(model, x, 0.9)) < 2e-6
        assert relative_error(next(generator), expect(model, x, 0.1)) < 2e-6
    generator.close()


@pytest.mark.parametrize("enter", [lambda context, stack: context, lambda context, stack: stack.enter_context(context)])
def test_a_context_manager_of_one_s_own_may_hold_the_level(model: PeftModel, x: Tensor, enter: Any) -> None:
    """It is a generator too, but one that yields to the body of its `with`."""

    @contextmanager
    def at_half() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(noise_level(model, 0.5))
            yield

    with noise_level(model, 0.1), ExitStack() as stack, enter(at_half(), stack) or nullcontext():
        assert relative_error(run(model, x), expect(model, x, 0.5)) < 2e-6


def test_async_generators_that_take_turns_in_one_task(model: PeftModel, x: Tensor) -> None:
    async def stream(level: float) -> AsyncIterator[Tensor]:
        with noise_level(model, level):
            while True:
                await asyncio.sleep(0)
                yield run(model, x)
                with pytest.raises(ValueError, match="λ is not known"):
                    await asyncio.to_thread(run, model, x)

    async def main() -> None:
        streams = {level: stream(level) for level in (0.1, 0.9)}
        for _ in range(4):
            for level, generator in streams.items():
                assert relative_error(await anext(generator), expect(model, x, level)) < 2e-6
        with pytest.raises(ValueError, match="λ is not known"):
            run(model, x)
        for generator in streams.values():
            await generator.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())


def test_several_models_each_have_their_level(x: Tensor) -> None:
    one, two = adapted(TwoLayers(), target_modules=TARGETS), adapted(TwoLayers(), target_modules=TARGETS)
    disturb(two, seed=3)
    with noise_level(one, 0.2), noise_level(two, 0.9):
        with noise_level(one, 0.6):
            assert relative_error(run(one, x), expect(one, x, 0.6)) < 2e-6
            assert relative_error(run(two, x), expect(two, x, 0.9)) < 2e-6
        assert relative_error(run(one, x), expect(one, x, 0.2)) < 2e-6
    pair = nn.ModuleList([one, two])
    with noise_level(pair, 0.4), noise_level(two, 0.7):
        assert relative_error(run(one, x), expect(one, x, 0.4)) < 2e-6
        assert relative_error(run(two, x), expect(two, x, 0.7)) < 2e-6


class Wrapper(nn.Module):
    """As DistributedDataParallel and its like."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def test_the_model_may_be_named_by_any_of_its_wrappers(model: PeftModel, x: Tensor) -> None:
    root = model.base_model.model
    wrapped = Wrapper(model)
    compiled = torch.compile(wrapped, backend="eager")
    for named in (root, model.base_model, model, wrapped, compiled):
        for called in (root, model, wrapped):
            with noise_level(named, LEVELS):
                assert relative_error(run(called, x), expect(model, x, LEVELS)) < 2e-6


def test_an_adapter_added_later_reads_the_same_level(model: PeftModel, x: Tensor) -> None:
    with noise_level(model, 0.3):
        before = run(model, x)
        model.add_adapter("later", nara_config(target_modules=TARGETS))
        model.base_model.set_adapter(["default", "later"])
        assert torch.equal(run(model, x), before)  # its B is zero


# ---------------------------------------------------------------------- for whom


def test_a_thread_started_inside_a_context_has_no_level(model: PeftModel, x: Tensor) -> None:
    with noise_level(model, 0.3), ThreadPoolExecutor(1) as pool:
        with pytest.raises(ValueError, match="λ is not known"):
            pool.submit(model, x).result()
        inherited = pool.submit(contextvars.copy_context().run, run, model, x).result()
    assert relative_error(inherited, expect(model, x, 0.3)) < 2e-6


def test_threads_have_their_own_levels(model: PeftModel, x: Tensor) -> None:
    barrier = threading.Barrier(2, timeout=30)

    def work(level: float) -> Tensor:
        barrier.wait()
        with noise_level(model, level):
            barrier.wait()
            output = run(model, x)
            barrier.wait()
        return output

    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(work, (0.2, 0.8)))
    for level, output in zip((0.2, 0.8), outputs, strict=True):
        assert relative_error(output, expect(model, x, level)) < 2e-6


def test_interleaved_tasks_have_their_own_levels(model: PeftModel, x: Tensor) -> None:
    levels = (0.1, 0.4, 0.9)

    async def work(level: float, outputs: list[Tensor]) -> None:
        for _ in range(3):
            with noise_level(model, level):
                await asyncio.sleep(0)
                outputs.append(run(model, x))
                await asyncio.sleep(0)
                outputs.append(await asyncio.to_thread(run, model, x))
            with pytest.raises(ValueError, match="λ is not known"):
                run(model, x)

    async def all_at_once() -> dict[float, list[Tensor]]:
        outputs: dict[float, list[Tensor]] = {level: [] for level in levels}
        await asyncio.gather(*(work(level, outputs[level]) for level in levels))
        return outputs

    for level, outputs in asyncio.run(all_at_once()).items():
        assert len(outputs) == 6
        for output in outputs:
            assert relative_error(output, expect(model, x, level)) < 2e-6


def test_a_task_does_not_outlive_the_context_that_started_it(model: PeftModel, x: Tensor) -> None:
    async def late() -> None:
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="λ is not known"):
            run(model, x)

    async def main() -> None:
        with noise_level(model, 0.3):
            task = asyncio.create_task(late())
        await task

    asyncio.run(main())


def test_an_async_generator_that_is_left_early(model: PeftModel, x: Tensor) -> None:
    async def stream() -> AsyncIterator[Tensor]:
        with noise_level(model, 0.3):
            while True:
                yield run(model, x)

    async def main() -> None:
        generator = stream()
        async for output in generator:
            assert relative_error(output, expect(model, x, 0.3)) < 2e-6
            break
        await asyncio.create_task(generator.aclose())  # as the event loop does for a forgotten one: in another task
        with pytest.raises(ValueError, match="λ is not known"):
            run(model, x)

    asyncio.run(main())


# ---------------------------------------------------------------------- sources


class Share:
    """Tells λ from the inputs, as a source does: here the share of positive entries."""

    def __init__(self, convention: str | None = "positive_share") -> None:
        self.convention = convention
        self.asked: list[nn.Module] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoiseSignals:
        self.asked.append(module)
        x = args[0] if args else kwargs["x"]
        return NoiseSignals((x > 0).float().mean(1))


def test_a_source_tells_the_level_of_each_forward(model: PeftModel, x: Tensor) -> None:
    source = Share()
    set_noise_source(model, source)
    share = [(inputs > 0).float().mean(1) for inputs in (x, -x)]
    assert relative_error(run(model, x), expect(model, x, share[0])) < 2e-6
    assert relative_error(run(model, -x), expect(model, -x, share[1])) < 2e-6
    with torch.no_grad():
        assert relative_error(model.base_model.model(x=x), expect(model, x, share[0])) < 2e-6
    assert source.asked == [model.base_model.model] * 3
    with noise_level(model, 0.3):
        assert relative_error(run(model, x), expect(model, x, 0.3)) < 2e-6
    assert len(source.asked) == 3
    with model.disable_adapter():
        model(x)
    assert len(source.asked) == 3
    set_noise_source(model, None)
    with pytest.raises(ValueError, match="λ is not known"):
        model(x)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (torch.tensor([0.1, float("nan"), 0.2]), r"nan.*\[0, 1\]"),
        (torch.tensor([0.1, 500.0, 0.2]), r"500.0.*\[0, 1\]"),
        (torch.rand(3, 1), r"shape \(3, 1\)"),
        (torch.rand(2), "2 values.* is 3"),
        (None, "noise_level is None"),
    ],
)
def test_what_a_source_tells_is_checked(model: PeftModel, x: Tensor, told: Any, said: str) -> None:
    class Wrong(Share):
        def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoiseSignals:
            return NoiseSignals(told)

    set_noise_source(model, Wrong())
    with pytest.raises(ValueError, match=said):
        model(x)


def test_what_a_source_raises_is_not_replaced(model: PeftModel, x: Tensor) -> None:
    class Cannot(Share):
        def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoiseSignals:
            raise ValueError("this forward has no input_ids")

    set_noise_source(model, Cannot())
    with pytest.raises(ValueError, match="this forward has no input_ids"):
        model(x)


def test_a_source_of_another_convention_is_refused() -> None:
    def make(convention: str | None) -> PeftModel:
        return get_peft_model(TwoLayers(), nara_config(target_modules=TARGETS, noise_convention=convention))

    message = r"'{}' was trained with λ defined as 'masked_share', but the source of λ tells {}"
    model = make("masked_share")
    with pytest.raises(ValueError, match=message.format("default", "'positive_share'")):
        set_noise_source(model, Share())
    with pytest.raises(ValueError, match=message.format("default", "None")):
        set_noise_source(model, Share(None))
    with pytest.raises(ValueError, match=message.format("default", "None")):
        set_noise_source(model, lambda module, args, kwargs: NoiseSignals(args[0][:, 0]))  # type: ignore[arg-type]
    assert model.base_model.model.nara_core.source is None
    set_noise_source(model, Share("masked_share"))

    model = make(None)
    set_noise_source(model, Share())
    refused = nara_config(target_modules=TARGETS, noise_convention="masked_share")
    with pytest.raises(ValueError, match=message.format("other", "'positive_share'")):
        model.add_adapter("other", refused)
    assert "other" not in model.base_model.model.first.lora_A
    x = torch.randn(3, 7)
    disturb(model)
    assert relative_error(run(model, x), expect(model, x, (x > 0).float().mean(1))) < 2e-6


def test_a_source_may_be_a_plain_function_where_no_convention_is_known(model: PeftModel, x: Tensor) -> None:
    set_noise_source(model, lambda module, args, kwargs: NoiseSignals(args[0].abs().amax(1).clamp(max=1)))  # type: ignore[arg-type]
    model.add_adapter("other", nara_config(target_modules=TARGETS))
    model.base_model.set_adapter(["default", "other"])
    assert model.peft_config["other"].noise_convention is None
    assert relative_error(run(model, x), expect(model, x, x.abs().amax(1).clamp(max=1))) < 2e-6  # the other's B is zero


def test_a_source_is_set_on_all_models_or_on_none() -> None:
    pair = nn.ModuleList(
        get_peft_model(TwoLayers(), nara_config(target_modules=TARGETS, noise_convention=convention))
        for convention in (None, "masked_share")
    )
    with pytest.raises(ValueError, match="masked_share"):
        set_noise_source(pair, Share())
    assert pair[0].base_model.model.nara_core.source is None
