"""Every type of core and every option of it by the same proofs: samples, gradients, recomputation, files, company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaForCausalLM

from nara_diffusion import NaraConfig, core_matrix, noise_level
from tests.helpers.adapted import TwoLayers, adapted, core_by_hand, disturb, nara_config, relative_error
from tests.helpers.core_types import TYPES
from tests.helpers.rounding import rounding_of

LEVELS = torch.tensor([0.05, 0.5, 0.93])
TARGETS = ["first", "second"]
LAMBDA_DEPENDENT = {name: options for name, options in TYPES.items() if options.get("core_type") != "constant"}
DORA = pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
ALL = pytest.mark.parametrize("options", TYPES.values(), ids=TYPES)
DEPENDENT = pytest.mark.parametrize("options", LAMBDA_DEPENDENT.values(), ids=LAMBDA_DEPENDENT)


def base_model() -> TwoLayers:
    torch.manual_seed(7)
    return TwoLayers()


def core_of(
    state: dict[str, Tensor], config: NaraConfig, layer: str, levels: Tensor, adapter: str = "default"
) -> Tensor:
    """C (b, r, r) of a layer in float64 from the state dict."""
    group = "shared" if config.core_sharing == "global" else layer
    return core_by_hand(state, f"base_model.model.nara_core.cores.{adapter}.{group}.", config, levels)


def output_by_hand(state: dict[str, Tensor], config: NaraConfig, x: Tensor, levels: Tensor) -> Tensor:
    """Two layers for each sample, from materialised float64 matrices. (b, l, 7) → (b, l, 5)"""
    h, scaling = x.double(), config.lora_alpha / config.r
    for name in TARGETS:
        key = f"base_model.model.{name}."
        A, B = state[f"{key}lora_A.default.weight"], state[f"{key}lora_B.default.weight"]
        W = (
            state[f"{key}base_layer.weight"] + scaling * B @ core_of(state, config, name, levels) @ A
        )  # (b, d_out, d_in)
        if config.use_dora:
            dora_scale = state[f"{key}lora_magnitude_vector.default.weight"] / W.detach().norm(dim=2)  # (b, d_out)
            W = dora_scale[..., None] * W
        h = torch.einsum("bli,boi->blo", h, W) + state[f"{key}base_layer.bias"]
        h = torch.tanh(h) if name == "first" else h
    return h


@DORA
@ALL
def test_output_and_all_gradients_follow_the_formula_per_sample(options, use_dora):
    model = adapted(base_model(), target_modules=TARGETS, use_dora=use_dora, **options)
    x, weights = torch.randn(3, 6, 7), torch.randn(3, 6, 5)
    with noise_level(model, LEVELS):
        output = model(x)
    (output * weights).sum().backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state = {
        name: tensor.detach().double().requires_grad_(name in trainable) for name, tensor in model.state_dict().items()
    }
    expected = output_by_hand(state, model.peft_config["default"], x, LEVELS)
    assert relative_error(output, expected) < 5e-6
    (expected * weights).sum().backward()
    for name, parameter in trainable.items():
        reference = state[name].grad
        assert relative_error(parameter.grad, reference) < 2e-4, name


@ALL
def test_a_batch_equals_its_samples_one_by_one(options):
    model = adapted(base_model(), target_modules=TARGETS, **options)
    x = torch.randn(3, 6, 7)
    with noise_level(model, LEVELS):
        batch = model(x)
    for index, level in enumerate(LEVELS.tolist()):
        with noise_level(model, level):
            assert relative_error(batch[index : index + 1], model(x[index : index + 1])) < rounding_of(model)


@DEPENDENT
def test_levels_matter_and_have_to_be_known(options):
    model = adapted(base_model(), target_modules=TARGETS, **options)
    x = torch.randn(3, 7)
    with pytest.raises(ValueError, match="λ is not known"):
        model(x)
    with noise_level(model, 0.05):
        low = model(x)
    with noise_level(model, 0.93):
        assert (model(x) - low).abs().max() > 1e-2


@DORA
@ALL
def test_merged_at_one_level_it_is_itself_there(options, use_dora):
    model = adapted(base_model(), target_modules=TARGETS, use_dora=use_dora, **options)
    x = torch.randn(3, 7)
    weight = model.base_model.model.first.get_base_layer().weight.clone()
    with noise_level(model, 0.7):
        expected = model(x)
    model.merge_adapter(noise_level=0.7)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model.base_model.model.first.get_base_layer().weight, weight, rtol=1e-5, atol=1e-6)


@ALL
def test_no_cast_of_the_model_reaches_its_core(options):
    model = adapted(base_model(), target_modules=TARGETS, **options)
    before = core_matrix(model, LEVELS, module="second")
    model.to(torch.bfloat16)
    after = core_matrix(model, LEVELS, module="second")
    assert after.dtype == torch.float32
    assert torch.equal(after, before)
    with noise_level(model, LEVELS):
        assert model(torch.randn(3, 7, dtype=torch.bfloat16)).dtype == torch.bfloat16


# ---------------------------------------------------------------- checkpointing and compilation


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
@DEPENDENT
def test_recomputation_sees_the_levels_of_its_own_forward(options, use_reentrant, tiny_llama: LlamaForCausalLM):
    model = adapted(tiny_llama, target_modules=["q_proj", "down_proj"], **options).train()
    ids, later = torch.randint(0, 49, (3, 8)), torch.tensor([0.8, 0.2, 0.6])

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        losses = []
        for levels in (LEVELS, later):
            with noise_level(model, levels):
                losses.append(model(inputs_embeds=tiny_llama.get_input_embeddings()(ids).requires_grad_()).logits)
        (losses[0].square().mean() + losses[1].pow(3).mean()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    tiny_llama.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    actual = gradients()
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(actual[name], gradient) < 1e-5, name


def test_one_compiled_graph_serves_all_levels(tiny_llama: LlamaForCausalLM):
    model = adapted(tiny_llama, target_modules=["q_proj", "down_proj"], **TYPES["by layer"])
    ids = torch.arange(15).view(3, 5) + 7

    def logits(model: nn.Module, levels: Tensor) -> Tensor:
        with noise_level(model, levels), torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    rounds = [LEVELS, LEVELS.flip(0), torch.tensor([0.4, 0.0, 1.0])]
    expected = [logits(model, levels) for levels in rounds]
    torch.compiler.reset()
    backend = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(model, backend=backend)
    for levels, reference in zip(rounds, expected, strict=True):
        assert relative_error(logits(compiled, levels), reference) < 1e-6
    torch.compiler.reset()
    assert backend.frame_count == 1


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
@DORA
@ALL
def test_a_differently_seeded_model_loads_the_same_bits(options, use_dora, low_cpu_mem_usage, tmp_path: Path):
    model = adapted(base_model(), target_modules=TARGETS, use_dora=use_dora, **options)
    model.save_pretrained(tmp_path)
    base = base_model()
    torch.manual_seed(123)
    other = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert other.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    x = torch.randn(3, 7)
    with noise_level(model, LEVELS), noise_level(other, LEVELS):
        assert relative_error(other(x), model(x)) < 1e-6  # not 0: kernels depend on where in memory a tensor lies
    for name, value in options.items():
        assert getattr(other.peft_config["default"], name) == value
    saved = len(load_file(tmp_path / "adapter_model.safetensors"))
    factors = 2 * (3 if use_dora else 2)
    embedding = 2 if options.get("noise_embedding") == "mlp" else 1
    counts = {"constant": 1, "knots": 1, "rank_mask": 0, "bins": 0}
    core = counts.get(options.get("core_type", ""), 6 + embedding)
    assert saved == factors + core * (2 if "core_sharing" in options else 1)


# ---------------------------------------------------------------- beside other adapters


@DORA
@ALL
def test_beside_others_it_is_switched_mixed_added_and_deleted(options, use_dora):
    model = get_peft_model(
        base_model(), nara_config(target_modules=TARGETS, use_dora=use_dora, **options), adapter_name="this"
    )
    model.add_adapter("nara", nara_config(target_modules=["second"], r=2))
    model.add_adapter("plain", nara_config(target_modules=TARGETS, core_type="identity"))
    disturb(model)
    model.eval()
    x, names = torch.randn(3, 7), ["nara", "this", "plain"]

    def at_levels(*active: str, **mixed: Any) -> Tensor:
        model.base_model.set_adapter(list(active))
        with noise_level(model, LEVELS):
            return model(x, **mixed)

    found = {name: at_levels(name) for name in names}
    with model.disable_adapter():
        assert torch.equal(model(x), base_model()(x))
    if use_dora:
        with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA is enabled"):
            at_levels("this", adapter_names=names)
    else:
        mixed = at_levels("this", adapter_names=names)
        expected = torch.stack([found[name][index] for index, name in enumerate(names)])
        torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-6)
        hidden = torch.tanh(layer_by_hand(model, "first", x.double(), ["this"]))
        both = layer_by_hand(model, "second", hidden, ["this", "nara"])
        assert relative_error(at_levels("this", "nara"), both) < 5e-6
    model.delete_adapter("nara")
    assert torch.equal(at_levels("this"), found["this"])


def layer_by_hand(model: PeftModel, name: str, h: Tensor, adapters: list[str]) -> Tensor:
    """A layer with the updates of several adapters, for each sample, in float64. (b, d_in) → (b, d_out)"""
    state = {key: tensor.double() for key, tensor in model.state_dict().items()}
    key = f"base_model.model.{name}."
    W = state[f"{key}base_layer.weight"]
    for adapter in adapters:
        config = model.peft_config[adapter]
        A, B = state[f"{key}lora_A.{adapter}.weight"], state[f"{key}lora_B.{adapter}.weight"]
        W = W + config.lora_alpha / config.r * B @ core_of(state, config, name, LEVELS, adapter) @ A
    return torch.einsum("bi,boi->bo", h, W) + state[f"{key}base_layer.bias"]
