"""T-LoRA of LyCORIS and of its own repository against their formulas in float64, and the names of their layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor, nn

from nara_diffusion.layers.residual import singular_triples
from nara_diffusion.loaders.file import AdapterFile
from nara_diffusion.loaders.lycoris import dotted, module_names
from tests.acceptance import _bases
from tests.acceptance._files import refused
from tests.helpers.adapted import relative_error
from tests.helpers.small_pipelines import BETAS, small_sdxl
from tests.helpers.tlora_files import (
    FILE,
    FLUX,
    MASK,
    NAMES,
    SDXL,
    SETTINGS,
    active,
    in_float64,
    lycoris_file,
    lycoris_updates,
    repository_file,
    repository_updates,
    saved,
    start_as_in_lycoris,
)

TIMESTEPS = (0, 1, 99, 250, 333, 500, 666, 750, 870, 999)


@torch.no_grad()
def rows_at(unet: Any, timesteps: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    return _bases.unet_output(unet, inputs[0], timesteps, *inputs[1:])


def assert_unet_equals(
    pipe: Any, updates: Callable[[Any, int], dict[str, Tensor]], bound: float, rank: int = 4
) -> None:
    """All rows at one timestep, ten times, then three rows at three, against a base with the update in its weights."""
    base, dtype = _bases.unet(), pipe.unet.dtype
    inputs = tuple(tensor.to(dtype) for tensor in _bases.unet_inputs())
    exact = tuple(tensor.double() for tensor in inputs)
    changed = {active_rank: in_float64(base, updates(base, active_rank)) for active_rank in range(1, 5)}
    rows = {}
    for t in TIMESTEPS:
        rows[t] = rows_at(changed[active(t, 4, 1, 2.0)], torch.tensor(t), exact)
        assert relative_error(rows_at(pipe.unet, torch.tensor(t), inputs), rows[t]) <= bound
    mixed = rows_at(pipe.unet, torch.tensor([999, 250, 1]), inputs)
    expected = torch.stack([rows[t][index] for index, t in enumerate((999, 250, 1))])
    assert relative_error(mixed, expected) <= bound
    assert relative_error(rows_at(pipe.unet, torch.tensor(999), inputs), rows[0]) > 1e-2


# ---------------------------------------------------------------- LyCORIS


def test_lycoris_file_equals_its_formula_in_float32(tmp_path) -> None:
    pipe = _bases.sdxl()
    tensors = lycoris_file(pipe.unet, NAMES)
    pipe.load_nara_weights(saved(tmp_path, tensors, SETTINGS))
    assert_unet_equals(pipe, lambda base, kept: lycoris_updates(base, tensors, kept), 1e-4)


def test_lycoris_file_equals_its_formula_in_float64() -> None:
    pipe = _bases.sdxl()
    tensors = {key: tensor.double() for key, tensor in lycoris_file(pipe.unet, NAMES).items()}
    pipe.unet.double()
    pipe.load_nara_weights(tensors, rank_mask=MASK)
    assert_unet_equals(pipe, lambda base, kept: lycoris_updates(base, tensors, kept, start_as_in_lycoris), 1e-6)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_lycoris_file_plays_with_guidance_in_each_sampler(scheduler) -> None:
    options = {"num_inference_steps": 3, "output_type": "latent"}
    outputs = []
    for is_reference in (False, True):
        pipe: Any = small_sdxl()
        pipe.scheduler = scheduler(**BETAS)
        tensors = lycoris_file(pipe.unet, NAMES)
        if is_reference:
            weights = {name: pipe.unet.get_submodule(name).weight for name in NAMES}
            base = {name: weight.detach().clone() for name, weight in weights.items()}
            by_rank = {rank: lycoris_updates(pipe.unet, tensors, rank) for rank in range(1, 5)}

            def follow(
                unet: Any, args: tuple[Any, ...], weights: Any = weights, base: Any = base, by_rank: Any = by_rank
            ):
                for name, update in by_rank[active(float(args[1]), 4, 1, 2.0)].items():
                    weights[name].data = base[name] + update.float().reshape(base[name].shape)

            pipe.unet.register_forward_pre_hook(follow)
        else:
            pipe.load_nara_weights(tensors, rank_mask=MASK)
        call = {"height": 16, "width": 16, "guidance_scale": 4.0, "generator": torch.Generator().manual_seed(0)}
        outputs.append(pipe("a photo of a toy", **options, **call).images)
    assert relative_error(*outputs) <= 1e-4


def test_lycoris_names_of_flux_reach_their_layers() -> None:
    pipe = _bases.flux()
    names = ["proj_out", "single_transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff_context.net.2"]
    tensors = lycoris_file(pipe.transformer, names)
    pipe.load_nara_weights(tensors, "mine", rank_mask=MASK)
    assert pipe.transformer.peft_config["mine"].noise_convention == "flow"
    output = _bases.flux_outputs(pipe)["transformer"]
    for index, level in enumerate(_bases.LEVELS):
        updates = lycoris_updates(_bases.flux().transformer, tensors, active(1000 * level.item(), 4, 1, 2.0))
        pipe = _bases.flux()
        for name, update in updates.items():
            pipe.transformer.get_submodule(name).weight.data += update.float()
        assert relative_error(output[index], _bases.flux_outputs(pipe)["transformer"][index]) <= 1e-5


def test_lycoris_alpha_of_zero_means_the_rank() -> None:
    pipe = _bases.sdxl()
    tensors = lycoris_file(pipe.unet, NAMES)
    keys = [key for key in tensors if key.endswith("alpha")]
    tensors[keys[0]], tensors[keys[1]] = torch.tensor(0), torch.tensor(7)
    pipe.load_nara_weights(tensors, rank_mask=MASK)
    tensors[keys[0]] = torch.tensor(4.0)
    assert_unet_equals(pipe, lambda base, kept: lycoris_updates(base, tensors, kept), 1e-4)


def test_base_factors_beyond_the_smaller_size_are_padded() -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    P, values, Q = singular_triples(weight, 6)
    assert (P.shape, values.shape, Q.shape) == ((3, 6), (6,), (6, 5))
    torch.testing.assert_close(P * values @ Q, weight)
    assert not torch.cat([P[:, 3:].flatten(), values[3:], Q[3:].flatten()]).any()


def test_kernel_without_padding_is_played_others_refused() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near, self.far = nn.Conv2d(3, 8, 2, stride=2), nn.Conv2d(3, 8, 3, padding=1)

    model = Patches()
    tensors = lycoris_file(model, ["near"], 2)
    (part,) = AdapterFile.read(tensors, base=lambda: model, for_model=True, rank_mask=MASK).parts.values()
    A, B = part.tensors["near.lora_A.weight"], part.tensors["near.lora_B.weight"]
    x = torch.randn(1, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    actual = nn.functional.conv2d(nn.functional.conv2d(x, A, stride=2), B) * 3 / 2
    update = lycoris_updates(model, tensors, 2)["near"].float()
    torch.testing.assert_close(actual, nn.functional.conv2d(x, update[..., None, None], stride=2))
    with pytest.raises(ValueError, match=r"'lycoris_far' is for a convolution with kernel \(3, 3\)"):
        AdapterFile.read(lycoris_file(model, ["far"], 2), base=lambda: model, rank_mask=MASK)


@pytest.mark.parametrize("prefix", ["lycoris_", "lycoris__", "lycoris_unet_", "lora_unet_"])
def test_prefixes_of_old_and_other_versions_are_understood(prefix: str) -> None:
    unet = _bases.unet()
    keys = [prefix + name.replace(".", "_") for name in NAMES]
    assert list(module_names(keys, unet).values()) == NAMES
    assert list(map(dotted, keys)) == NAMES


def test_names_are_guessed_without_a_model() -> None:
    for model in (_bases.unet(), _bases.flux().transformer):
        names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        assert [dotted("lycoris_" + name.replace(".", "_")) for name in names] == names


def test_key_naming_no_module_or_two_is_refused() -> None:
    model = nn.ModuleDict({"a_b": nn.Linear(2, 3), "a": nn.ModuleDict({"b": nn.Linear(2, 3)})})
    with pytest.raises(ValueError, match=r"'lycoris_a_b' names 'a_b' and 'a\.b' of ModuleDict"):
        module_names(["lycoris_a_b"], model)
    with pytest.raises(ValueError, match="'lora_te1_text_model' names no module of UNet2D"):
        module_names(["lora_te1_text_model"], _bases.unet())


# ---------------------------------------------------------------- T-LoRA's own repository


@pytest.mark.parametrize("ortho", [False, True], ids=["vanilla", "ortho"])
def test_repository_file_of_sdxl_equals_its_formula(ortho: bool, tmp_path) -> None:
    pipe = _bases.sdxl()
    tensors = repository_file(pipe.unet, SDXL, ortho=ortho)
    pipe.load_nara_weights(saved(tmp_path, tensors) / FILE, rank_mask=MASK)
    names = dict(pipe.unet.named_modules())
    assert_unet_equals(pipe, lambda base, kept: repository_updates(tensors, SDXL, kept, names), 1e-5)


def test_repository_file_of_flux_equals_its_formula(tmp_path) -> None:
    pipe = _bases.flux()
    tensors = repository_file(pipe.transformer, FLUX, rank=5)
    torch.save(tensors, tmp_path / "lora.pt")
    pipe.load_nara_weights(tmp_path, rank_mask={"min": 2})
    output = _bases.flux_outputs(pipe)["transformer"]
    for index, level in enumerate(_bases.LEVELS):
        pipe = _bases.flux()
        names = dict(pipe.transformer.named_modules())
        for name, update in repository_updates(tensors, FLUX, active(1000 * level.item(), 5, 2), names).items():
            pipe.transformer.get_submodule(name).weight.data += update.float()
        assert relative_error(output[index], _bases.flux_outputs(pipe)["transformer"][index]) <= 1e-5


def test_pickle_with_code_is_refused_unread(tmp_path) -> None:
    torch.save({"x": Path("y")}, tmp_path / "lora.pt")
    refused(lambda: pipe.load_nara_weights(tmp_path), pipe := _bases.flux(), "lora.pt", "tensors only")
