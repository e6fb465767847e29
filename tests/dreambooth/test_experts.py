"""Both transformers of Wan 2.2: which one trains on a forward, at which λ, and what a stock pipeline samples with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from nara_diffusion import NaraConfig
from nara_diffusion.dreambooth.dataset import DreamBoothDataset, collate_samples
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser
from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments, run_family
from nara_diffusion.dreambooth.image_plan import planned_image_step
from nara_diffusion.dreambooth.pipelines import family_of, modules_of, sharing_pipeline
from nara_diffusion.dreambooth.placement import Swap
from nara_diffusion.dreambooth.source_images import records_from_folder
from nara_diffusion.dreambooth.training_step import ValidationLoss, expert_levels, training_step
from nara_diffusion.training.planned_step import measure, nbytes
from tests.acceptance._commands import by_the_card, run, tensors
from tests.acceptance._engines import in_two_processes, needs_gloo
from tests.acceptance._runs import image_flags
from tests.dreambooth.pictures import folder_of
from tests.helpers.adapted import disturb
from tests.helpers.pipelines.families import small_wan_experts, small_wan_images

CPU = torch.device("cpu")
NAMES = ("transformer", "transformer_2")
BOUNDARY = 600.0
Record = list[tuple[str, float, list[float]]]


def frozen(pipe: Any) -> Any:
    for module in modules_of(pipe).values():
        module.requires_grad_(False)
    return pipe


def arguments(**flags: Any) -> DreamBoothArguments:
    common = {"pretrained_model_name_or_path": "none", "instance_data_dir": "none", "max_sequence_length": 20}
    return DreamBoothArguments(**common, **flags)


@contextmanager
def recorded(pipe: Any) -> Iterator[Record]:
    """(transformer, timestep, λ at its core) of each forward."""
    calls: Record = []
    handles = []
    for name in NAMES:
        model, levels = getattr(pipe, name), []

        def note_level(_: Any, inputs: Any, levels: list[Tensor] = levels) -> None:
            levels.append(inputs[0])

        def note_call(_: Any, args: Any, kwargs: Any, __: Any, name: str = name, levels: list[Tensor] = levels) -> None:
            calls.append((name, kwargs["timestep"].min().item(), levels.pop().tolist() if levels else []))

        handles.append(model.register_forward_hook(note_call, with_kwargs=True))
        for key, module in model.named_modules():
            if key.startswith("lora_core.cores.") and key.endswith(".shared"):
                handles.append(module.register_forward_pre_hook(note_level))
    yield calls
    for handle in handles:
        handle.remove()


def check_record(calls: Record, boundary: float = BOUNDARY) -> None:
    """Each forward at t ≥ boundary was the first transformer's, the others the second's, at λ = t / 1000."""
    assert {name for name, *_ in calls} == set(NAMES)
    for name, timestep, levels in calls:
        assert name == ("transformer" if timestep >= boundary else "transformer_2")
        assert min(levels) == pytest.approx(timestep / 1000, abs=1e-6)


# ---------------------------------------------------------------------- levels and draws


def test_levels_split_where_the_stock_pipeline_switches() -> None:
    """At a boundary that is exactly a timestep of the sampling."""
    pipe = small_wan_experts()
    call: dict[str, Any] = {"prompt": "a toy", "height": 16, "width": 16, "num_frames": 1, "num_inference_steps": 5}
    pipe.scheduler.set_timesteps(5)
    timestep = pipe.scheduler.timesteps[2].item()
    pipe.register_to_config(boundary_ratio=timestep / 1000)
    with recorded(pipe) as calls:
        pipe(**call, guidance_scale=1.0, max_sequence_length=20, output_type="latent")
    family = family_of(pipe)
    assert [name for name, *_ in calls] == ["transformer"] * 3 + ["transformer_2"] * 2
    assert [family.denoiser_at(torch.tensor(t)) for _, t, _ in calls] == [name for name, *_ in calls]
    timesteps = torch.tensor([t for _, t, _ in calls]).flip(0)
    levels = expert_levels(family, torch.arange(5), timesteps)
    numbers = {name: index.tolist() for name, index in levels.items()}
    assert numbers == {"transformer": [2, 3, 4], "transformer_2": [0, 1]}


@pytest.mark.parametrize("forwards", [1, 3])
def test_experts_are_drawn_by_their_share_of_levels(forwards: int) -> None:
    levels = {"transformer": torch.arange(333, 1000), "transformer_2": torch.arange(333)}
    step = replace(
        step_of(small_wan_experts()), experts=levels, forward_size=6, seed=5, group_size=6 * forwards, stratified=True
    )
    drawn = [step.expert_of(6 * number) for number in range(900)]
    assert drawn[:90] == [step.expert_of(6 * number + 5) for number in range(90)]  # by any process, for any sample
    assert drawn[:90] != [replace(step, seed=6).expert_of(6 * number) for number in range(90)]
    high = np.array(drawn) == "transformer"
    assert high.mean() == pytest.approx(0.667, abs=0.047)  # three standard deviations
    if forwards == 3:
        assert set(high.reshape(-1, 3).sum(1)) <= {1, 2, 3}
        assert high.reshape(-1, 3).sum(1).std() < 0.1  # 0.82 of independent draws


def step_of(pipe: Any, **flags: Any) -> Any:
    args = arguments(train_batch_size=2, gradient_accumulation_steps=2, **flags)
    return training_step(args, pipe, run_family(args, pipe), CPU, 4, 2)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.3, 0.8)])
def test_levels_of_both_experts_are_those_of_one(bounds: tuple[float, float]) -> None:
    pipe, one = small_wan_experts(), small_wan_images()
    flags: dict[str, Any] = dict(zip(("min_noise_level", "max_noise_level"), bounds, strict=True))
    pipe.scheduler = one.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    step = step_of(pipe, weighting_scheme="logit_normal", **flags)
    drawable = step_of(one, weighting_scheme="logit_normal", **flags).drawable
    both = torch.cat([step.experts["transformer_2"], step.experts["transformer"]])
    assert torch.equal(both, drawable)
    sigma = {name: step.objective.noise_levels[index] for name, index in step.experts.items()}
    assert bounds[0] <= sigma["transformer_2"].min() < sigma["transformer_2"].max() < 0.6
    assert 0.6 <= sigma["transformer"].min() < sigma["transformer"].max() <= bounds[1]


# ---------------------------------------------------------------------- training steps


def samples_of(folder: Path) -> DreamBoothDataset:
    records = records_from_folder(folder_of(folder, [(40, 36)] * 3), prompt="a toy", progress=False)
    return DreamBoothDataset(records, [(32, 32)], batch_size=2, seed=1)


def adapted(pipe: Any, config: Any = None, **flags: Any) -> tuple[AdaptedDenoiser, Any]:
    step = step_of(pipe, **flags)
    core = {"core_hidden_dims": (4, 4), "core_init": "kaiming", "noise_convention": "flow"}
    config = config or NaraConfig(r=2, target_modules=["to_q", "to_v"], **core)  # type: ignore[arg-type]
    torch.manual_seed(3)
    model = AdaptedDenoiser(pipe, config, family=run_family(arguments(**flags), pipe)).train()
    return model, replace(step, model=model)


def forward(step: Any, samples: Any, number: int) -> Tensor:
    return step(collate_samples([samples[2 * number], samples[2 * number + 1]])).loss


def parameters_of(model: AdaptedDenoiser, name: str) -> dict[str, Tensor]:
    return {key: value for key, value in model.trained.items() if key.startswith(f"{name}.")}


def test_forward_changes_only_the_weights_of_its_expert(tmp_path: Path) -> None:
    """With weight decay, and with accumulation that mixes experts."""
    pipe = frozen(small_wan_experts())
    model, step = adapted(pipe)
    disturb(model, scale=0.2)
    samples = samples_of(tmp_path)
    optimizer = torch.optim.AdamW(model.trained.values(), lr=1e-2, weight_decay=0.5, fused=True)
    experts = [step.expert_of(2 * number) for number in range(12)]
    assert 2 < experts.count("transformer_2") < 10
    with recorded(pipe) as calls:
        for number, expert in enumerate(experts):
            before = {key: value.detach().clone() for key, value in model.trained.items()}
            forward(step, samples, number).backward()
            optimizer.step()
            optimizer.zero_grad()
            changed = {key for key, value in model.trained.items() if not torch.equal(value, before[key])}
            assert changed == parameters_of(model, expert).keys()
    assert [name for name, *_ in calls] == experts
    check_record(calls)
    for name in NAMES:
        for parameter in parameters_of(model, name).values():
            assert optimizer.state[parameter]["step"] == experts.count(name)


def test_accumulation_over_both_experts_sums_their_gradients(tmp_path: Path) -> None:
    model, step = adapted(frozen(small_wan_experts()))
    disturb(model, scale=0.2)
    samples, gradients = samples_of(tmp_path), {}
    numbers = {step.expert_of(2 * number): number for number in range(12)}
    for name, number in numbers.items():
        forward(step, samples, number).backward()
        own = parameters_of(model, name)
        assert all(value.grad is None for key, value in model.trained.items() if key not in own)
        gradients |= {key: value.grad.clone() for key, value in own.items() if value.grad is not None}
        model.zero_grad()
    for number in numbers.values():
        forward(step, samples, number).backward()
    for key, value in model.trained.items():
        torch.testing.assert_close(value.grad, gradients[key], rtol=0, atol=0)


@pytest.mark.parametrize(("expert", "name"), [("high", "transformer"), ("low", "transformer_2")])
def test_one_expert_trains_within_its_window(expert: str, name: str, tmp_path: Path) -> None:
    pipe = frozen(small_wan_experts())
    model, step = adapted(pipe, expert=expert)
    assert list(model.components) == [name]
    samples = samples_of(tmp_path)
    with recorded(pipe) as calls:
        for number in range(6):
            forward(step, samples, number).backward()
    assert {name for name, *_ in calls} == {name}
    levels = [level for *_, levels in calls for level in levels]
    assert all((level >= 0.6) == (expert == "high") for level in levels)
    assert len({round(level, 4) for level in levels}) > 6


def test_validation_loss_is_that_of_each_expert(tmp_path: Path) -> None:
    pipe = small_wan_experts()
    family = run_family(arguments(), pipe)
    step, samples = step_of(pipe), samples_of(tmp_path).plain_samples()
    loss = ValidationLoss(step, samples, family, 4, 2)
    with recorded(pipe) as calls:
        loss.curve(pipe, Accelerator(cpu=True))
    assert [name for name, *_ in calls] == ["transformer_2"] * 2 + ["transformer"] * 6
    assert all((t >= BOUNDARY) == (name == "transformer") for name, t, _ in calls)


# ---------------------------------------------------------------------- one expert on the device


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The transformers whose weights are copied, in order; freed copies are poisoned."""
    events: list[str] = []
    load, free, enter = Swap.load, Swap.free, Swap.enter

    def logged_load(swap: Swap, number: int) -> None:
        if number not in swap.copied:
            events.append(NAMES[number])
        load(swap, number)

    def poisoned_free(swap: Swap, numbers: Iterable[int]) -> None:
        numbers = list(numbers)
        for number in swap.copied.keys() & numbers:
            for parameter, _ in swap.weights[number]:
                parameter.data.fill_(torch.nan)
        free(swap, numbers)

    def checked_enter(swap: Swap, number: int, *inputs: Any) -> None:
        enter(swap, number, *inputs)
        assert list(swap.copied) == [number]
        assert all(parameter.numel() == 0 for parameter, _ in swap.weights[1 - number])

    monkeypatch.setattr(Swap, "load", logged_load)
    monkeypatch.setattr(Swap, "free", poisoned_free)
    monkeypatch.setattr(Swap, "enter", checked_enter)
    return events


def test_swapped_experts_train_and_sample_the_same(tmp_path: Path, loads: list[str]) -> None:
    call: dict[str, Any] = {"prompt": "a toy", "height": 16, "width": 16, "num_frames": 1, "num_inference_steps": 4}
    call |= {"guidance_scale": 1.0, "max_sequence_length": 20}
    samples, results, images = samples_of(tmp_path / "pictures"), [], []
    for is_swapped in (False, True):
        pipe = frozen(small_wan_experts())
        sampling: Any = sharing_pipeline(pipe, torch.float32)
        if is_swapped:
            swap = Swap(pipe, family_of(pipe), 0, CPU)
            swap.attach(pipe)
            swap.attach(sampling)
        targets = ["to_q", "ffn.net.2"]
        config = NaraConfig(r=2, target_modules=targets, use_dora=True, noise_convention="flow")
        model, step = adapted(pipe, config)
        optimizer = torch.optim.AdamW(model.trained.values(), lr=1e-2)
        loads.clear()
        experts = [step.expert_of(2 * number) for number in range(6)]
        for number in range(6):
            forward(step, samples, number).backward()
            optimizer.step()
            optimizer.zero_grad()
        switches = [name for name, last in zip(experts, [None, *experts], strict=False) if name != last]
        assert loads == (switches if is_swapped else [])
        generator = torch.Generator().manual_seed(1)
        images.append(sampling(generator=generator, output_type="np", **call).frames)
        results.append({key: value.detach().clone() for key, value in model.trained.items()})
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=0, atol=0)
    np.testing.assert_array_equal(*images)


# ---------------------------------------------------------------------- runs


SHORT: dict[str, Any] = {"max_sequence_length": 20, "resolution": 32, "num_inference_steps": 4, "curve_points": 3}
SHORT |= {"max_train_steps": 4, "gradient_accumulation_steps": 2, "train_batch_size": 1, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return image_flags(tmp_path_factory.mktemp("wan"), small_wan_experts()) | SHORT


@pytest.fixture(scope="module")
def finished(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    run("dreambooth.py", **flags, output_dir=folder)
    return folder


def check_samples(folder: Path) -> Any:
    """The card's code loads both parts, and draws the run's sample across the boundary."""
    scope = by_the_card(folder, until="image = ")
    code = (folder / "README.md").read_text().partition("image = ")[2].partition("image.save")[0]
    pipe = scope["pipe"]
    pipe.set_progress_bar_config(disable=True)
    with recorded(pipe) as calls:
        exec("image = " + code, scope)
    (path,) = (folder / "samples-after").glob("*.png")
    np.testing.assert_array_equal(np.asarray(scope["image"]), np.asarray(Image.open(path)))
    return calls


def test_run_of_both_loads_by_one_call(finished: Path) -> None:
    card = (finished / "README.md").read_text()
    assert card.count("pipe.load_") == 1
    keys = tensors(finished)
    assert {key.partition(".")[0] for key in keys} == set(NAMES)
    assert all(any(key.startswith(f"{name}.nara_core.") for key in keys) for name in NAMES)
    assert all(value.abs().max() > 0 for key, value in keys.items() if "lora_B" in key)
    check_record(check_samples(finished))


@pytest.mark.slow
def test_resumed_run_of_both_has_the_same_bits(finished: Path, flags: dict[str, Any], tmp_path: Path) -> None:
    again = {"output_dir": tmp_path / "again", "resume_from_checkpoint": finished / "checkpoint-2"}
    run("dreambooth.py", **flags, **again)
    one, other = tensors(finished), tensors(tmp_path / "again")
    assert one.keys() == other.keys() != set()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.slow
@needs_gloo
def test_two_processes_train_the_same_experts_as_one(flags: dict[str, Any], tmp_path: Path) -> None:
    """Under DDP, with accumulation over both experts, which it has to reduce without gradients of one."""
    files = {name: tmp_path / name for name in ("one", "two")}
    common = flags | {"checkpointing_steps": None, "lora_dropout": 0.0, "random_flip": False}
    run("dreambooth.py", **{**common, "train_batch_size": 2}, output_dir=files["one"])
    in_two_processes([("ddp", "dreambooth.py", common | {"output_dir": files["two"]})], tmp_path)
    expected = tensors(files["one"])
    for key, value in tensors(files["two"]).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_lora_of_both_is_two_files(flags: dict[str, Any], tmp_path: Path) -> None:
    plain = {"adapter": "lora", "core_learning_rate": None, "adapter_options": {}, "checkpointing_steps": None}
    run("dreambooth.py", **{**flags, **plain, "max_train_steps": 3}, output_dir=tmp_path)
    stems = [f"pytorch_lora_weights_{noise}_noise.safetensors" for noise in ("high", "low")]
    files = [load_file(tmp_path / stem) for stem in stems]
    assert files[0].keys() == files[1].keys()
    assert {key.partition(".")[0] for key in files[0]} == {"transformer"}
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == stems
    calls = check_samples(tmp_path)
    assert [name for name, *_ in calls] == sorted(name for name, *_ in calls)
    pipe = WanPipeline.from_pretrained(flags["pretrained_model_name_or_path"])
    for name, (stem, into) in zip(NAMES, zip(stems, ({}, {"load_into_transformer_2": True}), strict=True), strict=True):
        pipe.load_lora_weights(str(tmp_path), weight_name=stem, adapter_name="toy", **into)
        layer = getattr(pipe, name).blocks[0].attn1.to_q
        key = "transformer.blocks.0.attn1.to_q.lora_A.weight"
        torch.testing.assert_close(layer.lora_A["toy"].weight, files[NAMES.index(name)][key], rtol=0, atol=0)


# ---------------------------------------------------------------------- plan and refusals


@pytest.mark.slow
def test_plan_has_one_expert_on_the_device(flags: dict[str, Any]) -> None:
    changes = {"pretrained_model_name_or_path": str(flags["pretrained_model_name_or_path"]), "resolution": 16}
    args = replace(arguments(plan=1.0, expert="both", adapter="lora", target_modules=["to_q"]), **changes)
    step = planned_image_step(args)
    assert step.swappable == 0
    both, high = measure(step, args), planned_image_step(replace(args, expert="high")).model
    buffers = nbytes(small_wan_experts().transformer_2.buffers())  # of positions, which stay
    assert both.weights - buffers == both.parts["transformer"]
    assert both.parts.keys() == {"transformer", "transformer_2", "text_encoder", "vae"}
    assert both.adapter == 2 * sum(parameter.nbytes for parameter in high.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"load_in_8bit": True}, "load_in_8bit is True, but Wan .* has two transformers"),
        ({"block_swap": 3, "gradient_checkpointing": True}, "block_swap is 3, but Wan .* has two transformers"),
    ],
)
def test_flags_that_two_experts_exclude_are_refused(flags: dict[str, Any], message: str) -> None:
    pipe = small_wan_experts()
    with pytest.raises(ValueError, match=message):
        run_family(arguments(**flags), pipe)


def test_expert_of_a_model_with_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--expert is low, but Wan .* has one denoiser: leave it out"):
        run_family(arguments(expert="low"), small_wan_images())


def test_expert_without_levels_in_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"transformer_2 has no noise level between .* give --expert high"):
        step_of(small_wan_experts(), min_noise_level=0.7)
    assert step_of(small_wan_experts(), min_noise_level=0.7, expert="high").experts["transformer"].numel() > 0
