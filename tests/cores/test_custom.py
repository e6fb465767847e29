"""A custom core: registered in one line, then made, trained, saved and loaded like those of the package."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from nara_diffusion import NaraConfig, core_matrix, noise_level, register_core
from nara_diffusion.cores import custom as custom_cores
from nara_diffusion.cores.embeddings import make_embedding
from nara_diffusion.cores.hypernetwork import HypernetworkCore
from nara_diffusion.noise.ablations import mean_core
from tests.helpers.adapted import OneLayer, TwoLayers, adapted, core_by_hand, disturb, nara_config, relative_error
from tests.helpers.core_types import Affine, Still
from tests.helpers.layers.recomputation import EXACT, REENTRANT, TARGETS, check, gradients, llama_loss
from tests.helpers.layers.recomputation import LEVELS as RECOMPUTED
from tests.helpers.small_pipelines import small_sdxl
from tests.loaders.adapters import predict, trained

LEVELS = torch.tensor([0.05, 0.5, 0.93])
PREFIX = "base_model.model.nara_core.cores.default.shared.core."


class Density(Affine):
    needs_density = True

    def forward(self, noise_level: Tensor, mask_density: Tensor) -> Tensor:
        return super().forward(noise_level * mask_density)


class Normalised(nn.Module):
    """C(λ) = √r C' / ‖C'‖ for the C'(λ) of a hypernetwork that reads log(λ / (1 − λ)), clipped at ±5, in [0, 1]."""

    def __init__(self, config: NaraConfig, rank: int) -> None:
        super().__init__()
        self.inner = HypernetworkCore(
            rank,
            scale=config.core_scale,
            hidden_dims=config.core_hidden_dims,
            init=config.core_init,
            core_input="noise_level",
            embedding=lambda: make_embedding(config.noise_embedding, config.noise_embedding_dim, config.fourier_scale),
        )

    def forward(self, noise_level: Tensor) -> Tensor:
        core = self.inner((torch.logit(noise_level, eps=1e-7).clamp(-5, 5) + 5) / 10)
        return core * math.sqrt(core.shape[-1]) / core.norm(dim=(1, 2), keepdim=True)


class Grid(nn.Module):
    """C(λ) between matrices at fixed λ, which are no part of its state: like an embedding's frequencies, say."""

    def __init__(self, config: NaraConfig, rank: int) -> None:
        super().__init__()
        self.P = nn.Parameter(torch.zeros(2, rank, rank))
        self.register_buffer("levels", torch.linspace(0, 1, 2), persistent=False)

    def forward(self, noise_level: Tensor) -> Tensor:
        weights = 1 - (noise_level[:, None] - self.levels).abs()
        return torch.eye(self.P.shape[-1]) + torch.einsum("bk,kij->bij", weights, self.P)


@pytest.fixture(autouse=True)
def _registered(monkeypatch) -> None:
    monkeypatch.setattr(custom_cores, "_factories", {})
    register_core("affine", Affine)
    register_core("density", Density)
    register_core("still", Still)
    register_core("grid", Grid)
    register_core("normalised", Normalised)


def affine_by_hand(model: PeftModel, level: Tensor) -> Tensor:
    state = {name.removeprefix(PREFIX): tensor.double() for name, tensor in model.state_dict().items()}
    return torch.eye(4, dtype=torch.float64) + level.double()[:, None, None] * state["P"] + state["Q"]


def layer_by_hand(model: PeftModel, x: Tensor, core: Tensor) -> Tensor:
    layer = model.base_model.model.layer
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    base = layer.get_base_layer()
    W = base.weight.double() + 6 / 4 * torch.einsum("or,brq,qi->boi", B, core, A)
    return torch.einsum("bi,boi->bo", x.double(), W.expand(len(x), -1, -1)) + base.bias.double()


def one_layer(**changes: Any) -> PeftModel:
    return adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"], **changes)


def test_a_custom_core_is_read_per_sample_and_trained():
    model = one_layer(core_type="affine")
    x = torch.randn(3, 7)
    with noise_level(model, LEVELS):
        output = model(x)
    assert relative_error(output, layer_by_hand(model, x, affine_by_hand(model, LEVELS))) < 2e-6
    output.square().sum().backward()
    for name in ("P", "Q"):
        assert model.get_parameter(PREFIX + name).grad.abs().max() > 0
    with mean_core(model, LEVELS):
        mean = affine_by_hand(model, LEVELS).mean(0, keepdim=True)
        assert relative_error(model(x), layer_by_hand(model, x, mean)) < 2e-6


@pytest.mark.parametrize("noise_embedding", ["mlp", "raw"])
def test_a_hypernetwork_with_its_own_scale_and_norm_is_a_custom_core(noise_embedding, tmp_path):
    base = OneLayer(nn.Linear(7, 5))
    again = copy.deepcopy(base)
    model = adapted(base, target_modules=["layer"], core_type="normalised", noise_embedding=noise_embedding)
    levels = torch.tensor([0.0, 0.02, 0.5, 0.93, 1.0])
    logit = torch.log(levels.double() / (1 - levels.double())).clamp(-5, 5)
    plain = core_by_hand(model.state_dict(), f"{PREFIX}inner.", model.peft_config["default"], (logit + 5) / 10)
    expected = torch.stack([2 * C / C.square().sum().sqrt() for C in plain])
    assert relative_error(core_matrix(model, levels), expected) < 5e-6
    assert (expected[1] - expected[3]).abs().max() > 0.05
    x = torch.randn(5, 7)
    with noise_level(model, levels):
        output = model(x)
    assert relative_error(output, layer_by_hand(model, x, expected)) < 5e-6
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(again, tmp_path)
    with noise_level(other, levels):
        assert torch.equal(other(x), output)


def test_it_needs_lambda_unless_it_says_otherwise():
    with pytest.raises(ValueError, match=r"λ is not known, but adapter\(s\) 'default' depend on it"):
        one_layer(core_type="affine")(torch.randn(3, 7))
    model = one_layer(core_type="still")
    x = torch.randn(3, 7)
    core = torch.eye(4) + model.get_parameter(PREFIX + "Q")
    assert relative_error(model(x), layer_by_hand(model, x, core[None].double())) < 2e-6


def test_it_may_read_the_mask_density():
    model = one_layer(core_type="density")
    x, density = torch.randn(3, 7), torch.tensor([0.2, 0.9, 0.4])
    with noise_level(model, LEVELS), pytest.raises(ValueError, match="The mask density is not known"):
        model(x)
    with noise_level(model, LEVELS, mask_density=density):
        actual = model(x)
    assert relative_error(actual, layer_by_hand(model, x, affine_by_hand(model, LEVELS * density))) < 2e-6


@pytest.mark.parametrize("options", [{}, {"core_sharing": "layer"}, {"use_dora": True}], ids=str)
def test_it_is_saved_and_loaded_bit_by_bit(tmp_path, options):
    def base() -> TwoLayers:
        torch.manual_seed(7)
        return TwoLayers()

    model = adapted(base(), target_modules=["first", "second"], core_type="affine", **options)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    groups = 2 if options.get("core_sharing") else 1
    assert sum("nara_core" in name for name in tensors) == 3 * groups
    other = PeftModel.from_pretrained(base(), tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    x = torch.randn(3, 7)
    with noise_level(model, LEVELS), noise_level(other, LEVELS):
        assert torch.equal(other(x), model(x))


def test_loading_an_unregistered_core_says_what_to_do(tmp_path):
    one_layer(core_type="affine").save_pretrained(tmp_path)
    program = """
import sys, torch
from peft import PeftModel
import nara_diffusion
from tests.helpers.adapted import OneLayer
PeftModel.from_pretrained(OneLayer(torch.nn.Linear(7, 5)), sys.argv[1])
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    origin = tmp_path / "adapter_config.json"
    assert last.startswith(
        f"ValueError: The configuration of '{origin}' is refused: core_type is 'affine': choose one of 'hypernetwork', "
    )
    assert "first import the module that calls nara_diffusion.register_core('affine', factory), as where" in last


def test_no_cast_reaches_it():
    model = one_layer(core_type="affine")
    before = core_matrix(model, LEVELS)
    model.to(torch.bfloat16)
    assert torch.equal(core_matrix(model, LEVELS), before)
    assert before.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("core_type", ["affine", "density", "still", "grid"])
def test_recomputation_sees_the_signals_of_its_own_forward(core_type, reentrant, tiny_llama: LlamaForCausalLM):
    model = adapted(tiny_llama, target_modules=TARGETS, core_type=core_type).train()

    def forward(levels: Tensor) -> Tensor:
        with noise_level(model, levels, mask_density=levels.roll(1)):
            return llama_loss(model)

    forwards = [partial(forward, levels) for levels in RECOMPUTED]
    expected = gradients(model, forwards)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    check(gradients(model, forwards), expected, REENTRANT if reentrant else EXACT)
    swapped = [partial(forward, levels.flip(0)) for levels in RECOMPUTED]
    P = f"{PREFIX}P"
    assert core_type == "still" or relative_error(gradients(model, swapped)[P], expected[P]) > 1e-2


@pytest.mark.parametrize("core_type", ["affine", "grid"])
def test_a_diffusers_pipeline_saves_and_loads_it(tmp_path, core_type):
    pipe = trained(core_type=core_type, text=False)
    expected = predict(pipe)
    pipe.save_nara_weights(tmp_path)
    other = small_sdxl()
    base = predict(other)
    other.load_nara_weights(tmp_path)
    assert torch.equal(predict(other), expected)
    assert (expected - base).abs().max() > 1e-3
    other.unload_nara_weights()
    assert torch.equal(predict(other), base)
    roomy = small_sdxl()
    roomy.enable_lora_hotswap(target_rank=4)
    roomy.load_nara_weights(tmp_path, "x")
    assert torch.equal(predict(roomy), expected)
    roomy.load_nara_weights(tmp_path, "x", hotswap=True)
    assert torch.equal(predict(roomy), expected)


def test_beside_other_types_in_one_model():
    model = get_peft_model(TwoLayers(), nara_config(target_modules=["first"], core_type="affine"), "mine")
    model.add_adapter("nara", nara_config(target_modules=["first"]))
    disturb(model)
    model.eval()
    x = torch.randn(3, 7)
    found = {}
    for name in ("mine", "nara"):
        model.set_adapter(name)
        with noise_level(model, LEVELS):
            found[name] = model(x)
    with noise_level(model, LEVELS):
        mixed = model(x, adapter_names=["nara", "mine", "nara"])
    torch.testing.assert_close(mixed, torch.stack([found["nara"][0], found["mine"][1], found["nara"][2]]))
