"""The node "Load NaRA" against the NaRA in Diffusers, sample by sample, on stubs of ComfyUI's interface."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from peft import inject_adapter_in_model
from torch import nn

from nara_diffusion import StrengthSchedule, core_matrix, noise_level
from nara_diffusion.export.hosts.unet import SDXL, stability_name
from nara_diffusion.loaders.file import AdapterFile
from nara_diffusion.loaders.insertion import part_of
from nara_diffusion.loaders.schedulers import scheduler_fields
from tests.comfyui.conftest import CONST, EPS, V_PREDICTION, FlowSampling, Named, Patcher, Sampling
from tests.helpers.adapted import disturb, nara_config
from tests.helpers.small_pipelines import small_flux, small_sdxl

TARGETS = ["to_q", "to_v", "to_out.0", "ff.net.2", "conv1", "conv_shortcut", "time_emb_proj", "conv_in"]
TARGETS += ["downsamplers.0.conv"]
FILE = "pytorch_nara_weights.safetensors"


def small(name="unet"):
    return small_sdxl(layers_per_block=2)


def saved(pipe, folder, **changes):
    pipe.unet.add_adapter(nara_config(**{"target_modules": TARGETS, **changes}), "toy")
    disturb(pipe.unet)
    pipe.save_nara_weights(folder, adapter_name="toy")
    return pipe


def call(unet, x, timestep, context, pooled):
    time_ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(len(x), 6)
    given = {"text_embeds": pooled, "time_ids": time_ids}
    return unet(x, timestep, context, added_cond_kwargs=given, return_dict=False)[0]


def comfy_model(unet, kind=EPS, schedule=Sampling):
    """A patcher of the base UNet by Stability's names."""
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    sampling = type("ModelSampling", (schedule, kind), {})()
    model = SimpleNamespace(
        diffusion_model=Named({stability_name(name, SDXL): module for name, module in layers.items()}),
        model_sampling=sampling,
        apply_model=lambda x, sigma, **c: call(unet, x, sampling.timestep(sigma), **c),
    )
    return Patcher(model)


def inputs(unet, rows=3):
    torch.manual_seed(4)
    x = torch.randn(rows, 4, 8, 8)
    width = unet.config.cross_attention_dim
    return x, {"context": torch.randn(rows, 5, width), "pooled": torch.randn(rows, 24)}


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"core_sharing": "layer", "core_type": "knots", "rank_pattern": {"conv1": 3}, "use_rslora": True},
        {"strength": StrengthSchedule([(0, 1.0), (0.6, 0.2)]), "alpha_pattern": {"to_q": 9}},
        {"core_type": "bins", "core_bins": 2},
    ],
)
def test_model_is_the_nara_of_diffusers_at_each_samples_noise_level(comfyui, changes):
    pipe = saved(small(), comfyui.folder, **changes)
    x, c = inputs(pipe.unet)
    base = small().unet
    model = comfy_model(base)
    sigma = model.model.model_sampling.sigmas[[37, 512, 940]]
    patched, clip = comfyui.node.LoadNaRA().load(model, FILE, "sdxl", 1.0)
    wanted = call(pipe.unet, x, torch.tensor([37, 512, 940]), **c)
    torch.testing.assert_close(patched.sample(x, sigma, **c), wanted, rtol=1e-4, atol=1e-5)
    assert clip is None
    plain = model.sample(x, sigma, **c)
    torch.testing.assert_close(plain, call(base, x, torch.tensor([37, 512, 940]), **c), rtol=0, atol=0)
    assert (plain - wanted).abs().max() > 0.01


class ScaledFlow(FlowSampling):
    """ModelSamplingSD3: 1000 σ is what the model sees."""

    def timestep(self, sigma):
        return 1000 * sigma


V = scheduler_fields(EulerDiscreteScheduler(prediction_type="v_prediction"))
FLOW = scheduler_fields(DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True))


@torch.no_grad()
@pytest.mark.parametrize(
    ("fields", "convention", "right", "wrong", "node"),
    [
        (V, "timestep", (V_PREDICTION, Sampling), (EPS, Sampling), r"ModelSamplingDiscrete \(sampling v_prediction,"),
        (FLOW, "flow", (CONST, ScaledFlow), (EPS, Sampling), r"ModelSamplingSD3 \(shift 1\.0\)"),
    ],
)
def test_a_converted_model_is_sampled_by_its_prediction_or_refused(comfyui, fields, convention, right, wrong, node):
    pipe = saved(small(), comfyui.folder, scheduler=fields, noise_convention=convention)
    x, c = inputs(pipe.unet)
    load, timestep = comfyui.node.LoadNaRA().load, torch.tensor([37, 512, 940])
    model = comfy_model(small().unet, *right)
    sigma = timestep / 1000 if convention == "flow" else model.model.model_sampling.sigmas[timestep]
    patched, _ = load(model, FILE, "sdxl", 1.0)
    torch.testing.assert_close(patched.sample(x, sigma, **c), call(pipe.unet, x, timestep, **c), rtol=1e-4, atol=1e-5)
    other, _ = load(comfy_model(small().unet, *wrong), FILE, "sdxl", 1.0)
    with pytest.raises(ValueError, match=f"samples it as epsilon: put the node {node}"):
        other.sample(x, torch.full((3,), 0.5), **c)


@torch.no_grad()
def test_strength_scales_the_update_as_set_adapters_does(comfyui):
    pipe = saved(small(), comfyui.folder)
    pipe.set_adapters("toy", 0.3)
    x, c = inputs(pipe.unet)
    model = comfy_model(small().unet)
    patched, _ = comfyui.node.LoadNaRA().load(model, FILE, "sdxl", 0.3)
    sigma = model.model.model_sampling.sigmas[[200, 200, 200]]
    wanted = call(pipe.unet, x, torch.tensor([200, 200, 200]), **c)
    torch.testing.assert_close(patched.sample(x, sigma, **c), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_two_nodes_go_one_behind_another_and_around_another_wrapper(comfyui):
    saved(small(), comfyui.folder)
    model = comfy_model(small().unet)
    x, c = inputs(small().unet)
    calls = []

    def other(apply_model, args):
        calls.append(args["timestep"])
        return apply_model(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(other)
    load = comfyui.node.LoadNaRA().load
    one, _ = load(model, FILE, "sdxl", 0.25)
    two, _ = load(one, FILE, "sdxl", 0.5)
    whole, _ = load(model, FILE, "sdxl", 0.75)
    sigma = model.model.model_sampling.sigmas[[600, 600, 600]]
    torch.testing.assert_close(two.sample(x, sigma, **c), whole.sample(x, sigma, **c), rtol=1e-4, atol=1e-5)
    assert len(calls) == 2
    assert not any(module._forward_hooks for module in model.model.diffusion_model.modules())


@torch.no_grad()
def test_three_projections_of_flux_in_one_matrix_have_the_core_of_each(comfyui):
    pipe = small_flux()
    names = ["to_q", "to_v", "proj_mlp"]
    pipe.transformer.add_adapter(nara_config(target_modules=names, core_sharing="layer"), "toy")
    disturb(pipe.transformer)
    pipe.save_nara_weights(comfyui.folder, adapter_name="toy")
    adapter = comfyui.adapter.LiveAdapter(str(comfyui.folder / FILE), "flux")
    attention = pipe.transformer.transformer_blocks[0].attn
    bases = [small_flux().transformer.transformer_blocks[0].attn.get_submodule(n) for n in ("to_q", "to_k", "to_v")]
    qkv = nn.Linear(32, 96)
    qkv.weight.data = torch.cat([layer.weight for layer in bases])
    qkv.bias.data = torch.cat([layer.bias for layer in bases])
    model = Named({"double_blocks.0.img_attn.qkv": qkv, "single_blocks.0.linear1": nn.Linear(32, 224)})
    adapter.check(model)
    x, level = torch.randn(3, 5, 32), torch.tensor([0.1, 0.5, 0.95])
    with adapter.applied(model, level, 1.0):
        found = qkv(x)
    with noise_level(pipe.transformer, level):
        wanted = torch.cat([layer(x) for layer in (attention.to_q, attention.to_k, attention.to_v)], dim=-1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    sampling = type("ModelSampling", (FlowSampling, CONST), {})()
    torch.testing.assert_close(comfyui.node.noise_level("flow", sampling, level), level)


def test_text_encoders_go_to_clip_and_are_refused_without_one(comfyui):
    pipe = saved(small(), comfyui.folder)
    inject_adapter_in_model(nara_config(core_type="identity", target_modules=["q_proj"]), pipe.text_encoder_2, "toy")
    disturb(pipe.text_encoder_2, 5)
    pipe.save_nara_weights(comfyui.folder, adapter_name="toy")
    model = comfy_model(small().unet)
    with pytest.raises(ValueError, match="adapts text_encoder_2 too: connect clip"):
        comfyui.node.LoadNaRA().load(model, FILE, "sdxl", 1.0)
    _, clip = comfyui.node.LoadNaRA().load(model, FILE, "sdxl", 0.7, "a CLIP")
    assert clip == "a CLIP with a LoRA"
    ((given, tensors, strength),) = comfyui.loaded
    assert (given, strength) == ("a CLIP", 0.7)
    assert all(key.startswith("lora_te2_text_model_encoder_layers_") for key in tensors)
    layer = pipe.text_encoder_2.get_submodule("text_model.encoder.layers.1.self_attn.q_proj")
    up = tensors["lora_te2_text_model_encoder_layers_1_self_attn_q_proj.lora_up.weight"]
    torch.testing.assert_close(up, layer.lora_B["toy"].weight.detach() * 6 / 4)


def test_constant_core_of_a_text_encoder_goes_to_clip_with_its_lora(comfyui):
    pipe = saved(small(), comfyui.folder)
    inject_adapter_in_model(nara_config(core_type="constant", target_modules=["q_proj"]), pipe.text_encoder_2, "toy")
    disturb(pipe.text_encoder_2, 5)
    pipe.save_nara_weights(comfyui.folder, adapter_name="toy")
    comfyui.node.LoadNaRA().load(comfy_model(small().unet), FILE, "sdxl", 1.0, "a CLIP")
    ((_, tensors, _),) = comfyui.loaded
    layer = pipe.text_encoder_2.get_submodule("text_model.encoder.layers.1.self_attn.q_proj")
    C = core_matrix(pipe.text_encoder_2, 0.5, "toy")[0].detach()
    up = tensors["lora_te2_text_model_encoder_layers_1_self_attn_q_proj.lora_up.weight"]
    torch.testing.assert_close(up, 6 / 4 * layer.lora_B["toy"].weight.detach() @ C, rtol=1e-5, atol=1e-7)


def test_part_that_is_neither_denoiser_nor_text_encoder_is_refused(comfyui):
    pipe = saved(small(), comfyui.folder)
    file = comfyui.folder / FILE
    parts = {"unet": part_of(pipe.unet, "toy"), "prior": copy.deepcopy(part_of(pipe.unet, "toy"))}
    AdapterFile(parts).save(file)
    with pytest.raises(ValueError, match="has a part for prior, which this node can't apply"):
        comfyui.node.LoadNaRA().load(comfy_model(small().unet), FILE, "sdxl", 1.0, "a CLIP")


def test_model_that_was_compiled_in_place_is_refused_when_it_samples(comfyui):
    """Compiled code doesn't call hooks again, and would keep the λ of an earlier step."""
    pipe = saved(small(), comfyui.folder)
    x, c = inputs(pipe.unet)
    model = comfy_model(small().unet)
    patched, _ = comfyui.node.LoadNaRA().load(model, FILE, "sdxl", 1.0)
    sigma = model.model.model_sampling.sigmas[[200, 200, 200]]
    model.model.diffusion_model.get_submodule("middle_block.1").compile(backend="eager")
    with pytest.raises(ValueError, match=r"middle_block\.1 is compiled"):
        patched.sample(x, sigma, **c)


def test_model_that_was_replaced_after_loading_is_refused_when_it_samples(comfyui):
    pipe = saved(small(), comfyui.folder)
    x, c = inputs(pipe.unet)
    model = comfy_model(small().unet)
    patched, _ = comfyui.node.LoadNaRA().load(model, FILE, "sdxl", 1.0)
    model.model.diffusion_model = nn.Sequential(model.model.diffusion_model)
    with pytest.raises(ValueError, match="modules aren't in this model"):
        patched.sample(x, model.model.model_sampling.sigmas[[200, 200, 200]], **c)


@pytest.mark.parametrize(
    ("changes", "base", "message"),
    [
        (
            {"use_dora": True, "target_modules": ["to_q"]},
            "sdxl",
            "NaRA-DoRA, which ComfyUI can't apply: sample it in Diffusers",
        ),
        ({}, "sd3", "defines λ as 'timestep', where sd3 has flow"),
    ],
)
def test_adapter_that_cannot_be_applied_is_refused(comfyui, changes, base, message):
    saved(small(), comfyui.folder, **changes)
    with pytest.raises(ValueError, match=message):
        comfyui.node.LoadNaRA().load(comfy_model(small().unet), FILE, base, 1.0)


def test_model_that_lacks_a_module_or_has_other_sizes_is_refused(comfyui):
    saved(small(), comfyui.folder)
    adapter = comfyui.adapter.LiveAdapter(str(comfyui.folder / FILE), "sdxl")
    with pytest.raises(ValueError, match=r"modules aren't in this model, such as input_blocks\.0\.0"):
        adapter.check(Named({"out.2": nn.Conv2d(8, 4, 3)}))
    model = comfy_model(small().unet).model.diffusion_model
    model.get_submodule("input_blocks.0").add_module("0", nn.Conv2d(9, 8, 3))
    with pytest.raises(ValueError, match=r"input_blocks\.0\.0 has a weight \(8, 9, 3, 3\) in this model"):
        adapter.check(model)


def test_sigma_of_another_kind_of_model_is_refused(comfyui):
    """Also one that could be that of a flow, as in the last steps of a discrete schedule."""
    for sigma in (0.5, 14.6):
        with pytest.raises(ValueError, match=r"λ is the σ of a flow, which Sampling, EPS, .* ModelSamplingSD3"):
            comfyui.node.noise_level("flow", type("ModelSampling", (Sampling, EPS), {})(), torch.tensor([sigma]))


def test_edm_level_is_sigma_over_one_plus_sigma(comfyui):
    level = comfyui.node.noise_level("edm", Sampling(), torch.tensor([0.0, 1.0, 3.0]))
    torch.testing.assert_close(level, torch.tensor([0.0, 0.5, 0.75]))


def test_node_declares_its_inputs_and_outputs(comfyui):
    (name,) = comfyui.package.NODE_CLASS_MAPPINGS
    node = comfyui.package.NODE_CLASS_MAPPINGS[name]
    saved(small(), comfyui.folder)
    declared = node.INPUT_TYPES()
    assert declared["required"]["nara_name"] == ([FILE],)
    assert declared["required"]["base"][0] == ["sd15", "sdxl", "sd3", "flux", "wan"]
    assert declared["optional"] == {"clip": ("CLIP",)}
    assert node.RETURN_TYPES == ("MODEL", "CLIP")
    assert callable(getattr(node, node.FUNCTION))
    assert comfyui.package.NODE_DISPLAY_NAME_MAPPINGS.keys() == {name}
