"""The core C(λ) against its formula, who shares it, and its cost."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from nara_diffusion import core_matrix, noise_level
from nara_diffusion.cores.float32 import Dense
from tests.helpers.adapted import OneLayer, TwoLayers, adapted, core_by_hand, default_core, nara_config, relative_error

LEVELS = torch.tensor([0.0, 0.31, 0.77, 1.0])
DENSITY = torch.tensor([0.9, 0.2, 0.0, 0.6])

PREFIX = "base_model.model.nara_core.cores.default.shared."

# ---------------------------------------------------------------- the formula


@pytest.mark.parametrize("core_init", ["zero_last", "kaiming", "zero_all"])
@pytest.mark.parametrize("core_input", ["noise_level", "mask_density", "both"])
@pytest.mark.parametrize("noise_embedding", ["fourier", "mlp", "raw"])
def test_every_hypernetwork_follows_its_formula(noise_embedding, core_input, core_init):
    model = adapted(
        OneLayer(nn.Linear(7, 5)),
        target_modules=["layer"],
        noise_embedding=noise_embedding,
        core_input=core_input,
        core_init=core_init,
    )
    density = None if core_input == "noise_level" else DENSITY
    actual = core_matrix(model, LEVELS, mask_density=density)
    expected = core_by_hand(model.state_dict(), PREFIX, model.peft_config["default"], LEVELS, DENSITY)
    assert actual.dtype == torch.float32
    assert relative_error(actual, expected) < 2e-6
    if density is None:
        assert relative_error(core_matrix(model, 0.31), expected[1:2]) < 2e-6


def test_hidden_layers_may_be_of_any_number_and_width():
    model = adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"], core_hidden_dims=(3, 11, 6))
    assert relative_error(core_matrix(model, LEVELS), default_core(model, LEVELS)) < 2e-6
    assert len([n for n, _ in model.named_parameters() if n.startswith(PREFIX) and n.endswith("weight")]) == 4


def test_a_constant_core_ignores_the_noise_level():
    model = adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"], core_type="constant")
    expected = torch.eye(4) + 0.7 * model.state_dict()[PREFIX + "deviation"]
    assert torch.equal(core_matrix(model, LEVELS), expected[None])
    x = torch.randn(2, 7)
    output = model(x)  # no λ needed
    with noise_level(model, 0.3):
        assert torch.equal(model(x), output)
    layer = model.base_model.model.layer
    update = layer.lora_B["default"].weight.double() @ expected.double() @ layer.lora_A["default"].weight.double()
    by_hand = layer.get_base_layer()(x).double() + 6 / 4 * x.double() @ update.T
    assert relative_error(output, by_hand) < 2e-6


def test_an_identity_core_has_no_parameters():
    model = adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"], core_type="identity")
    assert torch.equal(core_matrix(model, LEVELS), torch.eye(4)[None])
    assert not [name for name in model.state_dict() if "nara_core" in name]


@pytest.mark.parametrize("core_init", ["zero_last", "zero_all"])
@pytest.mark.parametrize(
    ("core_type", "noise_embedding"),
    [("hypernetwork", "fourier"), ("hypernetwork", "mlp"), ("hypernetwork", "raw"), ("constant", "fourier")],
)
def test_c_is_exactly_i_at_step_0(core_type, noise_embedding, core_init):
    config = nara_config(
        target_modules=["layer"], core_type=core_type, core_init=core_init, noise_embedding=noise_embedding
    )
    model = get_peft_model(OneLayer(nn.Linear(7, 5)), config)
    core = core_matrix(model, LEVELS)
    assert torch.equal(core, torch.eye(4).expand_as(core))


def test_zero_last_leaves_every_layer_of_f_a_gradient_after_one_step_and_kaiming_starts_off_i():
    model = get_peft_model(OneLayer(nn.Linear(7, 5)), nara_config(target_modules=["layer"], core_init="kaiming"))
    assert (core_matrix(model, LEVELS) - torch.eye(4)).abs().max() > 1e-3
    hidden = model.state_dict()[PREFIX + "layers.0.weight"]
    assert hidden.abs().max() <= 8**-0.5  # Kaiming-uniform with a = √5: ±1 / √fan_in
    assert hidden.std() > 0.5 * 8**-0.5 / 3**0.5
    zero_last = get_peft_model(OneLayer(nn.Linear(7, 5)), nara_config(target_modules=["layer"]))
    assert zero_last.state_dict()[PREFIX + "layers.0.weight"].abs().max() > 0
    assert zero_last.state_dict()[PREFIX + "layers.2.weight"].abs().max() == 0


def test_fourier_frequencies_are_drawn_with_the_given_scale_and_frozen():
    config = nara_config(target_modules=["layer"], noise_embedding_dim=4096, fourier_scale=5.0)
    model = get_peft_model(OneLayer(nn.Linear(7, 5)), config)
    frequencies = model.state_dict()[PREFIX + "embeddings.noise_level.frequencies"]
    assert frequencies.shape == (2048,)
    assert abs(float(frequencies.std()) - 5.0) < 0.5
    assert not any("frequencies" in name for name, _ in model.named_parameters())


# ---------------------------------------------------------------- who shares a core


class Blocks(nn.Module):
    """Two blocks of a `q_proj` and a `to_out.0`, as Transformers and Diffusers name them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(7, 7), "to_out": nn.ModuleList([nn.Linear(7, 7)])}) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block["to_out"][0](torch.tanh(block["q_proj"](x)))
        return x


@pytest.mark.parametrize(
    ("core_sharing", "groups"),
    [
        ("global", {"shared"}),
        ("module_type", {"q_proj", "to_out"}),
        ("layer", {"blocks-0-q_proj", "blocks-0-to_out-0", "blocks-1-q_proj", "blocks-1-to_out-0"}),
    ],
)
def test_core_sharing_says_which_modules_read_which_core(core_sharing, groups):
    model = adapted(Blocks(), target_modules=["q_proj", "to_out.0"], core_sharing=core_sharing)
    holder = model.base_model.model.nara_core
    assert set(holder.cores["default"]) == groups
    x, levels = torch.randn(3, 7), torch.tensor([0.1, 0.5, 0.9])
    expected = x.double()
    for index, block in enumerate(model.base_model.model.blocks):
        for kind, layer in (("q_proj", block["q_proj"]), ("to_out", block["to_out"][0])):
            name = f"blocks.{index}.{kind}" + (".0" if kind == "to_out" else "")
            group = {"global": "shared", "module_type": kind, "layer": name.replace(".", "-")}[core_sharing]
            core = default_core(model, levels, group=group)
            assert relative_error(core_matrix(model, levels, module=name), core) < 2e-6
            A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
            W = layer.get_base_layer().weight.double() + 6 / 4 * torch.einsum("or,brq,qi->boi", B, core, A)
            expected = torch.einsum("bi,boi->bo", expected, W) + layer.get_base_layer().bias.double()
            if kind == "q_proj":
                expected = torch.tanh(expected)
    with noise_level(model, levels):
        assert relative_error(model(x), expected) < 5e-6


def test_a_module_named_like_a_method_of_a_dictionary_gets_its_own_core():
    base = nn.Module()
    base.keys, base.pop = nn.Linear(7, 5), nn.Linear(7, 5)
    base.forward = lambda x: base.keys(x) + base.pop(x)
    model = adapted(base, target_modules=["keys", "pop"], core_sharing="module_type")
    with noise_level(model, 0.4):
        assert model(torch.randn(2, 7)).shape == (2, 5)
    assert not torch.equal(core_matrix(model, 0.4, module="keys"), core_matrix(model, 0.4, module="pop"))


def test_core_matrix_asks_for_a_module_where_there_are_several_cores():
    model = adapted(Blocks(), target_modules=["q_proj", "to_out.0"], core_sharing="module_type")
    with pytest.raises(ValueError, match="2 cores: pass module="):
        core_matrix(model, 0.4)
    with pytest.raises(ValueError, match=r"'blocks\.0' is not a module adapted by 'default'"):
        core_matrix(model, 0.4, module="blocks.0")
    with pytest.raises(ValueError, match="no adapter 'other': the model has 'default'"):
        core_matrix(model, 0.4, "other", module="blocks.0.q_proj")


def test_all_linear_never_adapts_a_core():
    model = adapted(TwoLayers(), target_modules="all-linear")
    model.add_adapter("other", nara_config(target_modules="all-linear"))
    holder = model.base_model.model.nara_core
    assert all(type(m).__name__ != "Linear" for m in holder.modules())
    assert len([m for m in holder.modules() if isinstance(m, Dense)]) == 2 * 3
    assert {n.split(".lora_A")[0] for n in model.state_dict() if ".lora_A.other" in n} == {
        "base_model.model.first",
        "base_model.model.second",
    }


# ---------------------------------------------------------------- the cost that the paper states


def test_at_the_shapes_of_llada_8b_the_core_costs_0_0084_percent():
    config = LlamaConfig(
        vocab_size=126464,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
    total = sum(p.numel() for p in base.parameters())
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    options = {"r": 32, "lora_alpha": 32, "core_hidden_dims": (256, 512), "noise_embedding_dim": 64}
    model = get_peft_model(base, nara_config(target_modules=targets, core_scale=0.1, **options), low_cpu_mem_usage=True)
    core = sum(p.numel() for n, p in model.named_parameters() if "nara_core." in n)
    lora = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    trainable, everything = model.get_nb_trainable_parameters()
    assert core == 673_536
    assert lora == 33_554_432
    assert total == 8_015_581_184
    assert round(100 * core / total, 4) == 0.0084
    assert (trainable, everything) == (core + lora, total + core + lora)
