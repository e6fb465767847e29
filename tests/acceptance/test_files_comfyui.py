"""ComfyUI's node on the stored files: what the model says there is what it says in Diffusers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nara_diffusion import noise_level
from tests.acceptance import _bases, _files
from tests.acceptance._comfyui import CONST, EPS, V_PREDICTION, Discrete, Flow, Named, Patcher, comfyui
from tests.acceptance._comfyui import named_as_stability_does as renamed

PIPELINES = _files.FILES / "pipelines"


@pytest.fixture(scope="module")
def outputs() -> dict[str, Tensor]:
    return _files.expected("pipelines")


@pytest.fixture(scope="module")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """ComfyUI with the stored files in models/loras, by their names."""
    folder = tmp_path_factory.mktemp("loras")
    for name in ("sdxl_float32", "sdxl_bfloat16", "sdxl_unet_float32", "flux_float32"):
        shutil.copy(PIPELINES / name / _files.PIPELINE_WEIGHTS, folder / f"{name}.safetensors")
    pipe = _bases.sdxl()
    pipe.load_nara_weights(_files.FILES / "peft" / "converted")
    pipe.save_nara_weights(folder, weight_name="converted.safetensors")
    with comfyui(folder) as found:
        yield found


def sampling(*kinds: type) -> Any:
    return type("ModelSampling", kinds, {})()


def sdxl(unet: Any = None, *kinds: type) -> Patcher:
    unet, own = unet or _bases.unet(), sampling(*(kinds or (Discrete, EPS)))

    @torch.no_grad()
    def apply_model(x: Tensor, sigma: Tensor, context: Tensor, y: Tensor) -> Tensor:
        return _bases.unet_output(unet, x, own.timestep(sigma), context, y)

    return Patcher(renamed(unet), own, apply_model)


def sampled(patcher: Patcher, timesteps: Tensor = _bases.TIMESTEPS) -> Tensor:
    """What the model says at the stored outputs' timesteps, a row each."""
    x, context, y = _bases.unet_inputs()
    return patcher.sample(x, patcher.model.model_sampling.sigmas[timesteps], context=context, y=y)


@pytest.mark.parametrize("name", ["sdxl_float32", "sdxl_bfloat16"])
def test_node_gives_the_pipelines_output_at_each_rows_noise_level(name: str, comfy, outputs) -> None:
    unet = _bases.unet()
    model = sdxl(unet)
    patched, clip = comfy.load(model, f"{name}.safetensors", "sdxl", 1.0, "a CLIP")
    _files.assert_near(sampled(patched), outputs[f"{name}.unet"], unet)
    assert clip == "a CLIP with a LoRA"
    _files.assert_near(sampled(model), outputs["base.sdxl.unet"], unet)


def test_strength_of_the_node_is_that_of_set_adapters(comfy) -> None:
    pipe = _bases.sdxl()
    pipe.load_nara_weights(PIPELINES / "sdxl_float32", "toy")
    pipe.set_adapters("toy", 0.375)
    patched, _ = comfy.load(sdxl(), "sdxl_float32.safetensors", "sdxl", 0.375, "a CLIP")
    _files.assert_near(sampled(patched), _bases.sdxl_outputs(pipe)["unet"], pipe.unet)


def test_two_nodes_add_up_around_a_wrapper_of_another_node(comfy, outputs) -> None:
    model, calls = sdxl(), []

    def other(apply_model: Any, args: dict[str, Any]) -> Tensor:
        calls.append(args["timestep"])
        return apply_model(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(other)
    half, _ = comfy.load(model, "sdxl_float32.safetensors", "sdxl", 0.5, "a CLIP")
    whole, _ = comfy.load(half, "sdxl_float32.safetensors", "sdxl", 0.5, "a CLIP")
    _files.assert_near(sampled(whole), outputs["sdxl_float32.unet"], _bases.unet())
    assert len(calls) == 1


def test_text_encoders_go_to_clip_as_the_loras_that_fold_writes(comfy) -> None:
    comfy.clips.clear()
    comfy.load(sdxl(), "sdxl_float32.safetensors", "sdxl", 0.75, "a CLIP")
    ((clip, tensors, strength),) = comfy.clips
    stored = load_file(_files.FILES / "exports" / "sdxl_kohya.safetensors")
    wanted = {key: tensor for key, tensor in stored.items() if key.startswith("lora_te")}
    assert (clip, strength) == ("a CLIP", 0.75)
    torch.testing.assert_close({key: torch.as_tensor(value) for key, value in tensors.items()}, wanted)


def test_the_three_projections_of_flux_in_one_matrix_have_each_its_core(comfy, outputs) -> None:
    pipe = _bases.flux()
    double = pipe.transformer.transformer_blocks[0].attn
    single = pipe.transformer.single_transformer_blocks[0]
    qkv = joined(double.to_q, double.to_k, double.to_v)
    linear1 = joined(single.attn.to_q, single.attn.to_k, single.attn.to_v, single.proj_mlp)
    x = _bases.drawn("hidden", 3, 5, 32)
    model = Patcher(flux_model(pipe, qkv, linear1), sampling(Flow, CONST), lambda x, sigma: qkv(linear1(x)[..., :32]))
    patched, _ = comfy.load(model, "flux_float32.safetensors", "flux", 1.0)
    with torch.no_grad():
        found = patched.sample(x, _bases.LEVELS)
        plain = model.sample(x, _bases.LEVELS)
    pipe.load_nara_weights(PIPELINES / "flux_float32")
    double, single = pipe.transformer.transformer_blocks[0].attn, pipe.transformer.single_transformer_blocks[0]
    with torch.no_grad(), noise_level(pipe.transformer, _bases.LEVELS):
        hidden = single.attn.to_q(x)
        wanted = torch.cat([layer(hidden) for layer in (double.to_q, double.to_k, double.to_v)], dim=-1)
    _files.assert_near(found, wanted, pipe.transformer)
    assert (plain - wanted).abs().max() > 0.1


def joined(*layers: Any) -> nn.Linear:
    both = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers))
    both.weight.data = torch.cat([layer.weight.data for layer in layers])
    both.bias.data = torch.cat([layer.bias.data for layer in layers])
    return both


def flux_model(pipe: Any, qkv: nn.Linear, linear1: nn.Linear) -> Named:
    """The modules of FLUX's own code that the stored adapter is on."""
    double, single = pipe.transformer.transformer_blocks[0], pipe.transformer.single_transformer_blocks[0]
    attention, block = double.attn, "double_blocks.0"
    txt_qkv = joined(attention.add_q_proj, attention.add_k_proj, attention.add_v_proj)
    return Named(
        {
            f"{block}.img_attn.qkv": qkv,
            f"{block}.txt_attn.qkv": txt_qkv,
            f"{block}.img_attn.proj": attention.to_out[0],
            f"{block}.txt_attn.proj": attention.to_add_out,
            f"{block}.img_mlp.0": double.ff.net[0].proj,
            f"{block}.txt_mlp.2": double.ff_context.net[2],
            f"{block}.img_mod.lin": double.norm1.linear,
            "single_blocks.0.linear1": linear1,
            "single_blocks.0.linear2": single.proj_out,
        }
    )


def test_a_converted_model_is_sampled_by_its_prediction_alone(comfy) -> None:
    unet = _bases.unet()
    patched, _ = comfy.load(sdxl(unet, Discrete, V_PREDICTION), "converted.safetensors", "sdxl", 1.0)
    _files.assert_near(sampled(patched), _files.expected("peft")["converted"], unet)
    other, _ = comfy.load(sdxl(), "converted.safetensors", "sdxl", 1.0)
    with pytest.raises(ValueError, match="v_prediction"):
        sampled(other)


@pytest.mark.parametrize(
    ("name", "base", "make", "message"),
    [
        ("sdxl_unet_float32", "sdxl", sdxl, "DoRA"),
        ("sdxl_float32", "sd3", sdxl, "timestep"),
        ("sdxl_float32", "sdxl", lambda: sdxl(_bases.unet(block_out_channels=(8, 24))), "weight"),
        ("flux_float32", "flux", sdxl, "modules"),
    ],
)
def test_file_that_does_not_fit_the_model_is_refused(name, base, make, message, comfy) -> None:
    with pytest.raises(ValueError, match=message):
        comfy.load(make(), f"{name}.safetensors", base, 1.0, "a CLIP")


def test_file_with_text_encoders_is_refused_without_a_clip(comfy) -> None:
    with pytest.raises(ValueError, match=r"text_encoder.*clip"):
        comfy.load(sdxl(), "sdxl_float32.safetensors", "sdxl", 1.0)


@pytest.mark.parametrize(
    ("name", "base", "kinds"), [("sdxl_float32", "sdxl", (Flow, CONST)), ("flux_float32", "flux", (Discrete, EPS))]
)
def test_sigma_of_another_kind_of_model_is_refused(name, base, kinds, comfy) -> None:
    if base == "sdxl":
        model = sdxl(None, *kinds)
    else:
        pipe = _bases.flux()
        single, double = pipe.transformer.single_transformer_blocks[0], pipe.transformer.transformer_blocks[0].attn
        linear1 = joined(single.attn.to_q, single.attn.to_k, single.attn.to_v, single.proj_mlp)
        qkv = joined(double.to_q, double.to_k, double.to_v)
        model = Patcher(flux_model(pipe, qkv, linear1), sampling(*kinds), lambda x, sigma: linear1(x))
    patched, _ = comfy.load(model, f"{name}.safetensors", base, 1.0, "a CLIP")
    with pytest.raises(ValueError, match="λ is"):
        patched.sample(_bases.drawn("x", 3, 5, 32), torch.tensor([0.2, 0.5, 0.7]))


def test_node_declares_what_comfyui_reads(comfy) -> None:
    declared = comfy.node.INPUT_TYPES()
    assert "sdxl_float32.safetensors" in declared["required"]["nara_name"][0]
    assert {"sd15", "sdxl", "sd3", "flux"} <= set(declared["required"]["base"][0])
    assert declared["required"]["strength"][1]["default"] == 1.0
    assert comfy.node.RETURN_TYPES == ("MODEL", "CLIP")
