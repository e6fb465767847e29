"""Offload by accelerate (model, sequential, disk) and by Diffusers (groups): the same numbers as without.

Everything runs on the CPU, where a weight that is elsewhere still shows: accelerate leaves it on "meta", and group
offloading to disk leaves memory that is filled with NaN here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from nara_diffusion.runtime.offloading import beside_inputs
from peft import get_peft_model
from torch import Tensor

from nara_diffusion import core_matrix, noise_level
from tests.diffusers.reference import UNET_TARGETS
from tests.helpers.adapted import disturb, nara_config, relative_error
from tests.helpers.core_types import TYPES
from tests.helpers.rounding import rounding_of
from tests.helpers.small_pipelines import pixels, small_sd, small_unet

CPU = torch.device("cpu")
TIMESTEPS = torch.tensor([20, 500, 900])


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[assignment]
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[assignment]


def adapted_unet(**changes: Any) -> Any:
    model = small_unet(16)
    model.add_adapter(nara_config(target_modules=UNET_TARGETS, **changes))
    disturb(model)
    return model


def run(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    sample, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 5, 16, generator=generator)
    with torch.no_grad():
        return model(sample, TIMESTEPS, text).sample


def groups(kind: str, on_disk: bool) -> Callable[[Any, Path], None]:
    def offload(model: Any, folder: Path) -> None:
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        disk = {"offload_to_disk_path": str(folder)} if on_disk else {}
        model.enable_group_offload(CPU, CPU, kind, **blocks, **disk)

    return offload


OFFLOADS: dict[str, Callable[[Any, Path], Any]] = {
    "model": lambda model, _: accelerate.cpu_offload_with_hook(model, CPU),
    "sequential": lambda model, _: accelerate.cpu_offload(model, CPU, offload_buffers=True),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, CPU, offload_buffers=True),
    "groups of blocks": groups("block_level", False),
    "groups of leaves": groups("leaf_level", False),
    "groups of blocks on disk": groups("block_level", True),
    "groups of leaves on disk": groups("leaf_level", True),
}


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_offloaded_denoiser_gives_the_same_numbers(offload, use_dora, tmp_path):
    model = adapted_unet(use_dora=use_dora)
    expected = run(model)
    with noise_level(model, 0.5):
        assert relative_error(run(model), expected) > 1e-2
    OFFLOADS[offload](model, tmp_path)
    for _ in range(2):  # the second time after weights have been taken away again
        assert relative_error(run(model), expected) < rounding_of(
            model
        )  # weights read from disk lie elsewhere: other kernels


@pytest.mark.parametrize("kind", ["by layer", "knots", "rank mask"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_other_types_of_core_are_offloaded_too(offload, kind, tmp_path):
    model = adapted_unet(**TYPES[kind])
    expected = run(model)
    OFFLOADS[offload](model, tmp_path)
    for _ in range(2):
        assert relative_error(run(model), expected) < rounding_of(model)


@pytest.mark.parametrize("core_type", ["constant", "hypernetwork"])
def test_cores_on_disk_can_be_looked_at(core_type, tmp_path):
    model = adapted_unet(core_type=core_type, core_sharing="module_type")
    expected = core_matrix(model, 0.3, module="mid_block.attentions.0.proj_in")
    groups("block_level", True)(model, tmp_path)
    for _ in range(2):
        torch.testing.assert_close(core_matrix(model, 0.3, module="mid_block.attentions.0.proj_in"), expected)
        run(model)


def _sequential(pipe: Any) -> None:
    accelerate.cpu_offload(pipe.unet, CPU, offload_buffers=True)  # stock VAEs fail where both devices are the CPU


PIPELINE_OFFLOADS: dict[str, Callable[[Any], None]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": _sequential,
    "groups": lambda pipe: pipe.enable_group_offload(CPU, CPU, "leaf_level"),
}


@pytest.mark.parametrize(
    ("offload", "first"),
    [("model", False), ("model", True), ("sequential", False), ("groups", False), ("groups", True)],
)
def test_a_pipeline_gives_the_same_pixels(offload, first):
    """Whether it is `first` offloaded, and then adapted, or the other way round."""

    def add(pipe: Any) -> None:
        torch.manual_seed(1)  # the frequencies too
        pipe.unet.add_adapter(nara_config(target_modules=UNET_TARGETS))
        disturb(pipe.unet)

    plain, pipe, enable = small_sd(), small_sd(), PIPELINE_OFFLOADS[offload]
    add(plain)
    for step in (enable, add) if first else (add, enable):
        step(pipe)
    assert torch.equal(pixels(pipe), pixels(plain))


REFUSED_TO_MERGE: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "leaves on disk": (groups("leaf_level", True), "group offloading keeps a copy"),
    "blocks on disk": (groups("block_level", True), "group offloading keeps a copy"),
    "sequential": (OFFLOADS["sequential"], "accelerate has offloaded its weight"),
    "float8": (lambda model, _: model.enable_layerwise_casting(), "its weight is stored as torch.float8_e4m3fn"),
}


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("how", REFUSED_TO_MERGE)
def test_merging_into_a_weight_that_is_elsewhere_is_refused(how, has_run, tmp_path):
    """What would be merged would be lost when the weight is read again."""
    model = adapted_unet()
    offload, said = REFUSED_TO_MERGE[how]
    expected = None if how == "float8" else run(model)
    offload(model, tmp_path)
    if has_run or expected is None:
        expected = run(model)
    with noise_level(model, 0.5), pytest.raises(ValueError, match=f"cannot be merged: {said}"):
        model.fuse_lora()
    assert relative_error(run(model), expected) < rounding_of(model)


def test_peft_merges_into_no_block_that_is_kept_on_disk(tmp_path):
    base = small_unet(16)
    model = get_peft_model(base, nara_config(target_modules=UNET_TARGETS))  # type: ignore[arg-type]
    disturb(model)
    expected = run(model)
    groups("block_level", True)(base, tmp_path)
    with pytest.raises(ValueError, match="cannot be merged: group offloading keeps a copy"):
        model.merge_adapter(noise_level=0.5)
    assert relative_error(run(model), expected) < rounding_of(model)


def test_adding_an_adapter_to_a_sequentially_offloaded_denoiser_is_refused():
    """PEFT would make it on "meta", where base weights are, without values."""
    model = small_unet(16)
    accelerate.cpu_offload(model, CPU)
    with pytest.raises(ValueError, match=r"offloaded layer by layer.*pipe\.load_nara_weights\(\)"):
        model.add_adapter(nara_config(target_modules=UNET_TARGETS))
    assert not hasattr(model, "nara_core")


def test_merging_into_a_weight_of_a_group_in_memory_stays():
    model = adapted_unet()
    with noise_level(model, 0.5):
        expected = run(model)
        groups("leaf_level", False)(model, Path())
        model.fuse_lora()
    assert relative_error(run(model), expected) < rounding_of(model)


def test_adapters_of_a_pipeline_whose_weights_are_on_disk_are_refused_before_anything_is_changed(tmp_path):
    """Group offloading would read a file again that knows nothing of a new adapter, and save memory without values."""
    pipe, other = small_sd(), small_sd()
    pipe.unet.add_adapter(nara_config(target_modules=UNET_TARGETS))
    disturb(pipe.unet)
    pipe.save_nara_weights(tmp_path / "adapter")  # type: ignore[attr-defined]
    expected = pixels(pipe)
    names = {name for name, _ in other.unet.named_modules()}
    for each in (pipe, other):
        each.unet.enable_group_offload(CPU, CPU, "leaf_level", offload_to_disk_path=str(tmp_path / str(id(each))))
    for attempt in (
        lambda: pipe.save_nara_weights(tmp_path / "again"),  # type: ignore[attr-defined]
        lambda: pipe.unload_nara_weights(),  # type: ignore[attr-defined]
        lambda: other.load_nara_weights(tmp_path / "adapter"),  # type: ignore[attr-defined]
    ):
        with pytest.raises(ValueError, match=r"keeps the weights of unet on disk.*load, save or unload adapters first"):
            attempt()
    assert not (tmp_path / "again").exists()
    assert {name for name, _ in other.unet.named_modules()} == names
    assert relative_error(pixels(pipe), expected) < rounding_of(pipe.unet)


def test_c_goes_where_the_inputs_are_once_a_forward():
    cores = {("a", "shared"): torch.eye(3)[None]}
    moved = beside_inputs(cores, (), {"sample": torch.empty(2, device="meta"), "timestep": torch.empty(1)})
    assert [core.device.type for core in moved.values()] == ["meta"]
    assert beside_inputs(cores, (3,), {}) == cores
