"""A NaRA whose weights are elsewhere, by accelerate and by Diffusers, or stored in float8, gives the same numbers.

All runs on the CPU, where a weight that is elsewhere still shows: accelerate leaves it on "meta", and group offloading
to disk leaves uninitialised memory, which is filled with NaN here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor

from tests.acceptance._lives import FEW_TARGETS, TARGETS, Lives, add_nara, assert_near, frozen_sd, predict, save_nara
from tests.helpers.small_pipelines import pixels

CPU = torch.device("cpu")
FLOAT8 = torch.float8_e4m3fn
ADAPTERS: dict[str, dict[str, Any]] = {
    "nara": {"target_modules": TARGETS},
    "dora": {"use_dora": True, "target_modules": [*FEW_TARGETS, "conv1"]},
    "layers": {"core_sharing": "layer", "core_type": "constant", "target_modules": FEW_TARGETS},
}


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[assignment]
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[assignment]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("naras")
    for name, options in ADAPTERS.items():
        save_nara(root / name, **options)
    return root


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, Tensor]:
    """Outputs where nothing is offloaded: of the equal LoRAs by hand, except for one core a layer."""
    by_name = {name: Lives().load(root / name, "toy").check() for name in ("nara", "dora")}
    return {**by_name, "layers": predict(loaded(root / "layers"))}


def loaded(folder: Path) -> Any:
    pipe: Any = frozen_sd()
    pipe.load_nara_weights(folder, adapter_name="toy")
    return pipe


OFFLOADS: dict[str, Callable[[Any, Path], Any]] = {
    "model": lambda model, _: accelerate.cpu_offload_with_hook(model, CPU),
    "sequential": lambda model, _: accelerate.cpu_offload(model, CPU, offload_buffers=True),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, CPU, offload_buffers=True),
    "blocks": lambda model, _: model.enable_group_offload(CPU, CPU, "block_level", num_blocks_per_group=1),
    "leaves": lambda model, _: model.enable_group_offload(CPU, CPU, "leaf_level"),
    "blocks on disk": lambda model, folder: model.enable_group_offload(
        CPU, CPU, "block_level", num_blocks_per_group=1, offload_to_disk_path=str(folder)
    ),
    "leaves on disk": lambda model, folder: model.enable_group_offload(
        CPU, CPU, "leaf_level", offload_to_disk_path=str(folder)
    ),
}
PAIRS = dict.fromkeys(OFFLOADS, "nara") | {"sequential": "dora", "leaves on disk": "dora", "leaves": "layers"}


@pytest.mark.parametrize(("how", "adapter"), PAIRS.items())
def test_offloaded_unet_gives_the_same_outputs(
    root: Path, expected: dict[str, Tensor], tmp_path: Path, adapter: str, how: str
) -> None:
    pipe = loaded(root / adapter)
    OFFLOADS[how](pipe.unet, tmp_path)
    for _ in range(2):  # the second time after weights have been taken away again
        assert_near(predict(pipe), expected[adapter], pipe.unet)


@pytest.mark.parametrize(
    "offload",
    [
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        lambda pipe: pipe.enable_group_offload(CPU, CPU, "leaf_level"),
    ],
    ids=["model", "groups"],
)
def test_adapter_in_offloaded_pipeline_gives_the_same_pixels(root: Path, offload: Any) -> None:
    image = pixels(loaded(root / "nara"))
    pipe: Any = frozen_sd()
    offload(pipe)
    base = pixels(pipe)
    pipe.load_nara_weights(root / "nara", adapter_name="toy")
    actual = pixels(pipe)
    torch.testing.assert_close(actual, image, rtol=0, atol=1e-4)
    assert (actual - base).abs().max() > 0.02
    pipe.unload_nara_weights()
    torch.testing.assert_close(pixels(pipe), base, rtol=0, atol=1e-4)


def stored_in_float8() -> set[str]:
    """Names of the base's parameters that Diffusers' layerwise casting stores in float8."""
    pipe = frozen_sd()
    pipe.unet.enable_layerwise_casting(FLOAT8, torch.float32)
    return {name for name, parameter in pipe.unet.named_parameters() if parameter.dtype == FLOAT8}


@pytest.mark.parametrize("first", ["the adapter", "casting"])
def test_layerwise_casting_rounds_only_the_base(root: Path, first: str) -> None:
    lives, stored = Lives(), stored_in_float8()
    assert len(stored) > 20
    for lora in lives.loras:
        for name, parameter in lora.unet.named_parameters():
            if name in stored:
                parameter.data = parameter.data.to(FLOAT8).float()
    if first == "casting":
        lives.nara.unet.enable_layerwise_casting(FLOAT8, torch.float32)
    lives.load(root / "nara", "toy")
    if first == "the adapter":
        lives.nara.unet.enable_layerwise_casting(FLOAT8, torch.float32)
    for _ in range(2):
        lives.check()
    in_float8 = {name for name, tensor in lives.nara.unet.state_dict().items() if tensor.dtype == FLOAT8}
    assert {name.replace("base_layer.", "") for name in in_float8} == stored


def test_layerwise_casting_in_bfloat16_matches_float32(root: Path) -> None:
    pipe, exact = frozen_sd(), frozen_sd()
    pipe.unet.to(torch.bfloat16).enable_layerwise_casting(FLOAT8, torch.bfloat16)
    stored = stored_in_float8()
    for name, parameter in exact.unet.named_parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(FLOAT8 if name in stored else torch.bfloat16).float()
    base = predict(exact)
    trained = frozen_sd()
    trained.unet.enable_layerwise_casting(FLOAT8, torch.bfloat16)
    add_nara(trained)
    assert {p.dtype for p in trained.unet.parameters() if p.requires_grad} == {torch.float32}
    for pipeline in (pipe, exact):
        pipeline.load_nara_weights(root / "nara", adapter_name="toy")  # type: ignore[attr-defined]
    actual, expected = predict(pipe, dtype=torch.bfloat16).float(), predict(exact)
    error = (actual - expected).abs().flatten(1).amax(1)
    assert (error < 0.05 * (expected - base).abs().flatten(1).amax(1)).all()
