"""λ a frame of a video, in the true classes: each frame at its own λ, the rest of a sample at its largest.

b, k and l are 3, 4 and 24; the text has 24 tokens as well, so that no size shows what a layer sees.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

from nara_diffusion import TimestepNoise, noise_level, set_noise_source
from nara_diffusion.noise.denoisers import _DENOISERS
from tests.helpers.adapted import disturb, nara_config, relative_error
from tests.helpers.denoisers import WARNINGS_OF_DIFFUSERS, denoiser, levels_of_core

pytestmark = WARNINGS_OF_DIFFUSERS
SAMPLES, FRAMES, LENGTH = 3, 4, 24
PATCHES = LENGTH // FRAMES
LEVELS = torch.tensor([[0.0, 0.9, 0.4, 0.7], [0.2, 0.6, 0.1, 1.0], [0.3, 0.8, 0.5, 0.15]])
PAGE = (Path(__file__).parents[2] / "docs" / "denoisers.md").read_text(encoding="utf-8")
TIMES: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Any]]] = {
    "WanTransformer3DModel": (lambda t: 1000 * t.repeat_interleave(PATCHES, dim=1), {}),
    "SkyReelsV2Transformer3DModel": (lambda t: 1000 * t, {"enable_diffusion_forcing": True}),
    "AnyFlowTransformer3DModel": (lambda t: 1000 * t, {"r_timestep": torch.full((SAMPLES, FRAMES), 10.0)}),
    "CosmosTransformer3DModel": (lambda t: t[:, None, :, None, None], {"padding_mask": torch.zeros(1, 1, 4, 6)}),
}
"""Class → how its timesteps follow from λ (b, k), and further arguments of its forward."""


def video(name: str) -> Tensor:
    shape = (SAMPLES, FRAMES, 4, 4, 6) if name.startswith("AnyFlow") else (SAMPLES, 4, FRAMES, 4, 6)
    return torch.randn(shape)


@cache
class Runs:
    """A denoiser with an adapter on each of its linear layers, and what the layers get and give in a forward."""

    def __init__(self, name: str) -> None:
        self.name = name
        options = {"max_size": (8, 8, 8)} if name.startswith("Cosmos") else {}
        self.model = denoiser(name, num_layers=2, **options)
        linear = [key for key, module in self.model.named_modules() if isinstance(module, (nn.Linear, nn.Conv3d))]
        inject_adapter_in_model(nara_config(target_modules=linear), self.model)
        disturb(self.model)
        self.layers = {key: module for key, module in self.model.named_modules() if hasattr(module, "lora_variant")}
        torch.manual_seed(5)
        self.video, self.text = video(name), torch.randn(SAMPLES, LENGTH, 8)

    def __call__(
        self, timestep: Tensor, moved: Tensor | None = None, **changes: Any
    ) -> dict[str, tuple[Tensor, Tensor]]:
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        handles = [
            layer.register_forward_hook(lambda _, args, output, key=key: seen.update({key: (args[0], output)}))
            for key, layer in self.layers.items()
        ]
        inputs = {"hidden_states": self.video if moved is None else moved, "encoder_hidden_states": self.text}
        with torch.no_grad():
            self.model(**{**inputs, **TIMES[self.name][1], **changes}, timestep=timestep)
        for handle in handles:
            handle.remove()
        return seen

    def layers_of_samples(self, times: Tensor) -> set[str]:
        """The layers with an input that depends neither on the video nor on the timesteps; and the one of patches."""
        for layer in self.layers.values():
            layer.enable_adapters(False)
        changes = {"r_timestep": torch.rand(SAMPLES, FRAMES)} if self.name.startswith("AnyFlow") else {}
        first, second = self(times), self(times.flip(0), torch.randn_like(self.video), **changes)
        for layer in self.layers.values():
            layer.enable_adapters(True)
        return {key for key in first if "patch_embedding" in key or torch.equal(first[key][0], second[key][0])}


@pytest.mark.parametrize("name", TIMES)
def test_each_layer_sees_each_frames_level(name: str) -> None:
    runs = Runs(name)
    times = TIMES[name][0](LEVELS)
    seen = runs(times)
    expected = [*LEVELS.flatten().tolist(), *LEVELS.amax(1).tolist()]
    assert levels_of_core(runs.model, lambda: runs(times)) == pytest.approx(expected, abs=1e-6)
    of_samples = runs.layers_of_samples(times)
    assert 4 <= len(of_samples) < len(seen) - 10
    for key, (x, output) in seen.items():
        levels = LEVELS.amax(1, keepdim=True) if key in of_samples else LEVELS
        inputs = x.reshape(levels.numel(), -1, x.shape[-1]) if key not in of_samples else x
        for i, level in enumerate(levels.flatten()):
            with torch.no_grad(), noise_level(runs.model, float(level)):
                alone = runs.layers[key](inputs[i : i + 1])
            assert relative_error(output.reshape(len(inputs), *alone.shape[1:])[i : i + 1], alone) < 1e-4, key


@pytest.mark.parametrize("name", TIMES)
def test_tokens_are_in_frames_order(name: str) -> None:
    """If one frame changes, what the first attention gets changes in that frame's part."""
    runs, timestep = Runs(name), TIMES[name][0](torch.full((SAMPLES, FRAMES), 0.5))
    first = next(key for key in runs.layers if key.endswith("0.attn1.to_q"))
    unmoved = runs(timestep)[first][0]
    axis = 1 if name.startswith("AnyFlow") else 2
    for frame in range(FRAMES):
        moved = runs.video.clone()
        moved.select(axis, frame).add_(1.0)
        changed = (runs(timestep, moved)[first][0] != unmoved).any(-1)
        part = torch.zeros(SAMPLES, LENGTH, dtype=torch.bool)
        part[:, frame * PATCHES : (frame + 1) * PATCHES] = True
        assert torch.equal(changed, part)


def test_context_per_frame_gives_timestep_layers_the_largest() -> None:
    runs, timestep = Runs("WanTransformer3DModel"), torch.full((SAMPLES,), 500.0)
    with noise_level(runs.model, LEVELS):
        seen = runs(timestep)
    for key in ("condition_embedder.time_embedder.linear_1", "condition_embedder.time_proj"):
        x, output = seen[key]
        for i, level in enumerate(LEVELS.amax(1)):
            with torch.no_grad(), noise_level(runs.model, float(level)):
                assert relative_error(output[i : i + 1], runs.layers[key](x[i : i + 1])) < 1e-5


def levels_of(source: TimestepNoise, model: nn.Module, timestep: Any, **inputs: Any) -> Tensor:
    return source(model, (), {"timestep": timestep, **inputs})


def test_timesteps_of_frames_and_patches_become_levels() -> None:
    runs = Runs("WanTransformer3DModel")
    source, inputs = _DENOISERS["WanTransformer3DModel"], {"hidden_states": runs.video}
    patches = 1000 * LEVELS.repeat_interleave(PATCHES, dim=1)
    patches[:, 1::PATCHES] *= 0.5  # the noisiest patch of a frame counts
    torch.testing.assert_close(levels_of(source, runs.model, 1000 * LEVELS, **inputs), LEVELS)
    torch.testing.assert_close(levels_of(source, runs.model, patches, **inputs), LEVELS)
    shared = levels_of(source, runs.model, (1000 * LEVELS[:1]).expand(SAMPLES, -1), **inputs)
    torch.testing.assert_close(shared, LEVELS[:1])  # one row for all samples, by the strides
    for timestep in (torch.tensor(500.0), torch.full((SAMPLES,), 500.0).clone()):
        assert levels_of(source, runs.model, timestep, **inputs).dim() == 1
    other_times = torch.rand(SAMPLES, 7) * 1000  # neither frames nor patches
    torch.testing.assert_close(levels_of(source, runs.model, other_times, **inputs), other_times.amax(1) / 1000)
    torch.testing.assert_close(levels_of(source, runs.model, 1000 * LEVELS), LEVELS.amax(1))  # no video


def test_user_source_reads_frames_as_the_table_does() -> None:
    runs = Runs("SkyReelsV2Transformer3DModel")
    times = TIMES["SkyReelsV2Transformer3DModel"][0](LEVELS)
    expected = levels_of_core(runs.model, lambda: runs(times))
    source = TimestepNoise("sigma_1000")
    set_noise_source(runs.model, source)
    assert levels_of_core(runs.model, lambda: runs(times)) == expected
    assert source.frames is None


def test_page_names_the_classes_with_frame_levels() -> None:
    line = next(line for line in PAGE.split("\n- ") if line.startswith("**One value a token or frame"))
    assert {name for name, entry in _DENOISERS.items() if entry.frames is not None} == TIMES.keys()
    assert all(f"`{name}`" in line for name in TIMES)


def test_other_denoisers_refuse_levels_of_parts() -> None:
    model = denoiser("LTXVideoTransformer3DModel")
    inject_adapter_in_model(nara_config(target_modules=["to_q"]), model)
    with (
        noise_level(model, LEVELS),
        pytest.raises(ValueError, match=r"\(3, 4\).*LTXVideo.* frames of a video in order"),
    ):
        model(torch.randn(SAMPLES, LENGTH, 4), torch.randn(SAMPLES, 5, 8), torch.zeros(SAMPLES))
