"""ComfyUI's node: what the model says there is what it says in Diffusers, at the λ of the sampling at work.

A sampling whose σ tells no λ is refused.
"""

from __future__ import annotations

import gc
import shutil
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nara_diffusion import NaraConfig, StrengthSchedule, noise_level
from nara_diffusion.export.original_names import parts_of
from nara_diffusion.loaders.file import AdapterFile
from tests.acceptance import _bases, _files
from tests.acceptance._comfyui import (
    CONST,
    EPS,
    V_PREDICTION,
    Discrete,
    DiscreteEDM,
    Distilled,
    Flow,
    Patcher,
    comfyui,
    named,
)
from tests.acceptance._comfyui import named_as_stability_does as renamed
from tests.helpers import tlora_files
from tests.helpers.adapted import disturb, relative_error

OUTPUTS = _files.expected("pipelines")
PIPELINES = _files.FILES / "pipelines"


@pytest.fixture(scope="module")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """ComfyUI with the stored files in models/loras, by their names."""
    folder = tmp_path_factory.mktemp("loras")
    for name in ("sdxl_float32", "sdxl_bfloat16", "sdxl_unet_float32", "flux_float32"):
        shutil.copy(PIPELINES / name / _files.PIPELINE_WEIGHTS, folder / f"{name}.safetensors")
    with comfyui(folder) as program:
        program.folder = folder
        yield program


def sampling(*kinds: type) -> Any:
    return type("ModelSampling", kinds, {})()


def sdxl(unet: Any = None, *kinds: type) -> Patcher:
    unet, model_sampling = unet or _bases.unet(), sampling(*(kinds or (Discrete, EPS)))

    @torch.no_grad()
    def apply_model(x: Tensor, sigma: Tensor, context: Tensor, y: Tensor) -> Tensor:
        return _bases.unet_output(unet, x, model_sampling.timestep(sigma), context, y)

    return Patcher(renamed(unet), model_sampling, apply_model)


def sampled(patcher: Patcher, sigma: Tensor | None = None) -> Tensor:
    """What the model says at σ (3,), those of the stored outputs' timesteps by default."""
    sigma = patcher.model.model_sampling.sigmas[_bases.TIMESTEPS] if sigma is None else sigma
    x, context, y = _bases.unet_inputs()
    return patcher.sample(x, sigma, context=context, y=y)


def saved(comfy: SimpleNamespace, **changes: Any) -> tuple[Any, str]:
    """A pipeline with a NaRA, and the file in which it is saved."""
    pipe, file = _bases.sdxl(), "mine.safetensors"
    options = {"r": 4, "lora_alpha": 3, "target_modules": ["to_q", "conv1", "time_emb_proj"], "core_hidden_dims": (6,)}
    pipe.unet.add_adapter(NaraConfig(**{**options, **changes}), "mine")
    disturb(pipe.unet, "mine")
    pipe.save_nara_weights(comfy.folder, "mine", weight_name=file)
    return pipe, file


@pytest.mark.parametrize("name", ["sdxl_float32", "sdxl_bfloat16"])
def test_node_output_matches_the_pipeline_at_each_level(name: str, comfy) -> None:
    unet = _bases.unet()
    model = sdxl(unet)
    patched, clip = comfy.load(model, f"{name}.safetensors", "sdxl", 1.0, "a CLIP")
    _files.assert_near(sampled(patched), OUTPUTS[f"{name}.unet"], unet)
    assert clip == "a CLIP with a LoRA"
    _files.assert_near(sampled(model), OUTPUTS["base.sdxl.unet"], unet)


def test_two_nodes_add_up_around_another_nodes_wrapper(comfy) -> None:
    model, calls = sdxl(), []

    def other(apply_model: Any, args: dict[str, Any]) -> Tensor:
        calls.append(args["timestep"])
        return apply_model(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(other)
    half, _ = comfy.load(model, "sdxl_float32.safetensors", "sdxl", 0.5, "a CLIP")
    folded, _ = comfy.load(half, "sdxl_float32.safetensors", "sdxl", 0.5, "a CLIP")
    _files.assert_near(sampled(folded), OUTPUTS["sdxl_float32.unet"], _bases.unet())
    assert len(calls) == 1


def test_text_encoders_reach_clip_as_folded_loras(comfy) -> None:
    comfy.clips.clear()
    comfy.load(sdxl(), "sdxl_float32.safetensors", "sdxl", 0.75, "a CLIP")
    ((clip, tensors, strength),) = comfy.clips
    stored = load_file(_files.FILES / "exports" / "sdxl_kohya.safetensors")
    expected = {key: tensor for key, tensor in stored.items() if key.startswith("lora_te")}
    assert (clip, strength) == ("a CLIP", 0.75)
    torch.testing.assert_close({key: torch.as_tensor(value) for key, value in tensors.items()}, expected)


def test_fused_flux_projections_each_have_their_own_core(comfy) -> None:
    pipe, x = _bases.flux(), _bases.drawn("hidden", 3, 5, 32)
    names = _files.layers_of(load_file(PIPELINES / "flux_float32" / _files.PIPELINE_WEIGHTS), "transformer.")
    parts = parts_of({*names, "transformer_blocks.0.attn.add_v_proj"}, "flux")
    model = named(
        {
            o: joined(*(pipe.transformer.get_submodule(str(part)) for part in joined_parts))
            for o, joined_parts in parts.items()
        }
    )
    qkv, linear1 = map(model.get_submodule, ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"))
    model = Patcher(model, sampling(Flow, CONST), lambda x, sigma: qkv(linear1(x)[..., :32]))
    patched, _ = comfy.load(model, "flux_float32.safetensors", "flux", 1.0)
    with torch.no_grad():
        actual = patched.sample(x, _bases.LEVELS)
        plain = model.sample(x, _bases.LEVELS)
    pipe.load_nara_weights(PIPELINES / "flux_float32")
    double, single = pipe.transformer.transformer_blocks[0].attn, pipe.transformer.single_transformer_blocks[0]
    with torch.no_grad(), noise_level(pipe.transformer, _bases.LEVELS):
        hidden = single.attn.to_q(x)
        expected = torch.cat([layer(hidden) for layer in (double.to_q, double.to_k, double.to_v)], dim=-1)
    _files.assert_near(actual, expected, pipe.transformer)
    assert (plain - expected).abs().max() > 0.1
    patched.model.model_sampling = sampling(Discrete, EPS)
    with pytest.raises(ValueError, match="λ is"):
        patched.sample(x, _bases.LEVELS)


def joined(*layers: Any) -> nn.Linear:
    both = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers))
    both.weight.data = torch.cat([layer.weight.data for layer in layers])
    both.bias.data = torch.cat([layer.bias.data for layer in layers])
    return both


@pytest.mark.parametrize(
    ("name", "base", "make", "clip", "message"),
    [
        ("sdxl_unet_float32", "sdxl", sdxl, ("a CLIP",), "DoRA"),
        ("sdxl_float32", "sd3", sdxl, ("a CLIP",), "timestep"),
        ("sdxl_float32", "sdxl", lambda: sdxl(_bases.unet(block_out_channels=(8, 24))), ("a CLIP",), "weight"),
        ("sdxl_float32", "sdxl", sdxl, (), "text_encoder.*clip"),
        ("flux_float32", "flux", sdxl, ("a CLIP",), "modules"),
    ],
)
def test_file_that_does_not_fit_model_is_refused(name, base, make, clip, message, comfy) -> None:
    with pytest.raises(ValueError, match=message):
        comfy.load(make(), f"{name}.safetensors", base, 1.0, *clip)


# ---------------------------------------------------------------- other samplings


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"core_type": "knots", "core_sharing": "layer", "rank_pattern": {"conv1": 3}, "use_rslora": True},
        {"core_type": "bins", "core_bins": 2, "strength": StrengthSchedule([(0, 1.0), (0.6, 0.2)])},
    ],
    ids=["knots", "bins"],
)
def test_lcm_uses_the_level_of_its_timestep(changes, comfy) -> None:
    (pipe, file), model = saved(comfy, **changes), sdxl(None, Distilled, EPS)
    patched, _ = comfy.load(model, file, "sdxl", 1.0)
    actual = sampled(patched, model.model.model_sampling.sigmas[[0, 0, 40]])
    x, context, y = _bases.unet_inputs()
    expected = _bases.unet_output(pipe.unet, x, torch.tensor([19, 19, 819]), context, y)
    _files.assert_near(actual, expected, pipe.unet)


@torch.no_grad()
def test_few_step_file_runs_at_each_steps_level(comfy) -> None:
    few_steps = {"num_inference_steps": 4, "guidance_scale": 1.0, "timesteps": [999, 749, 499, 249]}
    pipe, file = saved(comfy, core_type="knots", core_knots=4, few_steps=few_steps)
    assert AdapterFile.read(comfy.folder / file).parts["unet"].config.few_steps == few_steps
    unet = _bases.unet()
    patched, _ = comfy.load(sdxl(unet), file, "sdxl", 1.0)
    x, context, y = _bases.unet_inputs()
    for timestep in few_steps["timesteps"]:
        actual = sampled(patched, patched.model.model_sampling.sigmas[[timestep] * 3])
        with noise_level(pipe.unet, timestep / 1000):
            expected = _bases.unet_output(pipe.unet, x, torch.tensor(timestep), context, y)
        _files.assert_near(actual, expected, pipe.unet)
        with noise_level(pipe.unet, 0.1):
            other = _bases.unet_output(pipe.unet, x, torch.tensor(timestep), context, y)
        assert relative_error(actual, other) > 1e-2


@pytest.mark.parametrize(
    ("schedule", "kind", "convention", "message"),
    [
        (DiscreteEDM, V_PREDICTION, None, "DiscreteEDM.*add the node ModelSamplingDiscrete"),
        (Flow, CONST, "edm", r"σ / \(1 \+ σ\).*Flow"),
        (Flow, CONST, None, "Flow.*add the node ModelSamplingDiscrete"),
    ],
)
def test_sampling_with_unknown_sigma_is_refused(schedule, kind, convention, message, comfy) -> None:
    file = saved(comfy, noise_convention=convention)[1]
    patched, _ = comfy.load(sdxl(None, schedule, kind), file, "sdxl", 1.0)
    with pytest.raises(ValueError, match=message):
        sampled(patched, torch.tensor([0.1, 0.5, 0.9]))


@pytest.mark.parametrize("what", ["compiled", "replaced"])
def test_a_model_that_changed_after_loading_is_refused(what: str, comfy) -> None:
    """Compiled code doesn't call new hooks, and would keep the λ of an earlier step."""
    model = sdxl()
    patched, _ = comfy.load(model, saved(comfy)[1], "sdxl", 1.0)
    if what == "compiled":
        model.model.diffusion_model.get_submodule("middle_block.1").compile(backend="eager")
    else:
        model.model.diffusion_model = nn.Sequential(model.model.diffusion_model)
    with pytest.raises(ValueError, match=r"is compiled|aren't in this model"):
        sampled(patched)


class Counting(TorchDispatchMode):
    """Counts operations, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def hooks(model: nn.Module) -> list[int]:
    return [count for module in model.modules() if (count := len(module._forward_hooks))]


def test_hooks_and_factors_stay_until_node_is_removed(comfy) -> None:
    model = sdxl(_bases.unet().to(torch.bfloat16))
    patched, _ = comfy.load(model, "sdxl_float32.safetensors", "sdxl", 1.0, "a CLIP")
    x, context, y = (tensor.to(torch.bfloat16) for tensor in _bases.unet_inputs())

    def sample(patcher: Any) -> Counter[str]:
        with Counting() as counting:
            patcher.sample(x, patcher.model.model_sampling.sigmas[[700, 300, 20]], context=context, y=y)
        return counting.counts

    plain = sample(model)
    first, second = sample(patched), sample(patched)
    adapted = hooks(model.model.diffusion_model)
    assert set(adapted) == {1}
    # of the factors of float32, which the first call converts
    assert first["_to_copy"] - second["_to_copy"] == 2 * len(adapted)
    assert sample(model) == plain  # the same model without the node
    del patched
    gc.collect()
    assert hooks(model.model.diffusion_model) == []


# ---------------------------------------------------------------- T-LoRA of other projects


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lycoris", "ortho"])
def test_node_plays_a_tlora_as_the_pipeline_does(kind: str, comfy) -> None:
    pipe: Any = _bases.sdxl()
    second = tlora_files.BLOCK.replace("attentions.0", "attentions.1")
    tensors = tlora_files.lycoris_file(pipe.unet, [*tlora_files.NAMES, f"{second}.attn1.to_v"])
    if kind == "ortho":
        tensors = tlora_files.repository_file(pipe.unet, tlora_files.SDXL, ortho=True)
    save_file(tensors, comfy.folder / "tlora.safetensors")
    base = _bases.unet()
    patched, _ = comfy.load(sdxl(base), "tlora.safetensors", "sdxl", 1.0)
    pipe.load_nara_weights(comfy.folder / "tlora.safetensors")
    expected = _bases.sdxl_outputs(pipe)["unet"]
    _files.assert_near(sampled(patched), expected, base)
    assert relative_error(sampled(patched), expected) <= 1e-5


@torch.no_grad()
def test_node_splits_a_matrix_of_flux_for_factors(comfy) -> None:
    pipe, x = _bases.flux(), _bases.drawn("hidden", 3, 5, 32)
    block = "single_transformer_blocks.0"
    names = [f"{block}.attn.to_k", f"{block}.proj_mlp"]
    save_file(tlora_files.lycoris_file(pipe.transformer, names), comfy.folder / "flux.safetensors")
    parts = parts_of({f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v", f"{block}.proj_mlp"}, "flux")
    model = named(
        {
            o: joined(*(pipe.transformer.get_submodule(str(part)) for part in joined_parts))
            for o, joined_parts in parts.items()
        }
    )
    (linear1,) = (model.get_submodule(name) for name in parts)
    patcher = Patcher(model, sampling(Flow, CONST), lambda x, sigma: linear1(x))
    weight = linear1.weight
    original = {"diffusion_model.single_blocks.0.linear1.weight": [(weight.clone(), None), "a patch"]}
    patcher.get_key_patches = lambda prefix: original  # type: ignore[method-assign]
    weight.data += 0.5  # as with a LoRA of ComfyUI's own
    patched, _ = comfy.load(patcher, "flux.safetensors", "flux", 1.0)
    actual = patched.sample(x, _bases.LEVELS) - linear1(x)
    pipe.load_nara_weights(comfy.folder / "flux.safetensors")
    block = pipe.transformer.single_transformer_blocks[0]
    with noise_level(pipe.transformer, _bases.LEVELS):
        k, mlp = (layer(x) - layer.base_layer(x) for layer in (block.attn.to_k, block.proj_mlp))
    zero = torch.zeros_like(k)
    expected = torch.cat([zero, k, zero, mlp], dim=-1)
    assert relative_error(actual, expected) <= 1e-5


def test_node_names_what_it_cannot_play(comfy) -> None:
    unet, second = _bases.unet(), tlora_files.BLOCK.replace("attentions.0", "attentions.1")
    names = [f"{second}.attn1.to_v", tlora_files.NAMES[0]]
    tensors = tlora_files.lycoris_file(unet, names)
    factors = {"lora_A.weight": (3, 4), "lora_B.weight": (5, 3)}
    for kind in ("gamma", "beta"):
        factors |= {f"lora_time_{kind}.weight": (3, 256), f"lora_time_{kind}.bias": (3,)}
    for content, message in (
        (tensors | tlora_files.lycoris_file(unet, ["down_blocks.1.resnets.0.conv1"]), "conv1' is for a convolution"),
        (tensors | tlora_files.lycoris_file(unet, tlora_files.NAMES[1:2], rank=3), "attn2_to_k' has rank 3"),
        ({f"proj_out.{field}": torch.ones(shape) for field, shape in factors.items()}, "is a Tc-LoRA, which this node"),
    ):
        save_file(content, comfy.folder / "other.safetensors")
        with pytest.raises(ValueError, match=message):
            comfy.load(sdxl(unet), "other.safetensors", "sdxl", 1.0)


def test_node_refuses_a_lycoris_file_of_another_base(comfy) -> None:
    tensors = tlora_files.lycoris_file(_bases.flux().transformer, ["single_transformer_blocks.0.proj_mlp"])
    save_file(tensors, comfy.folder / "tlora.safetensors")
    with pytest.raises(ValueError, match=r"linear1 isn't in this model"):
        comfy.load(sdxl(), "tlora.safetensors", "flux", 1.0)
