"""The core C(λ) against its formula, its precision, its cost, and theorem 4.1."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from nara_diffusion import core_matrix, noise_level, shared_factors
from nara_diffusion.core import Dense
from tests.adapted import (
    OneLayer,
    TwoLayers,
    adapted,
    core_by_hand,
    default_core,
    disturb,
    lora_config,
    nara_config,
    relative_error,
)

LEVELS = torch.tensor([0.0, 0.31, 0.77, 1.0])
DENSITY = torch.tensor([0.9, 0.2, 0.0, 0.6])
PREFIX = "base_model.model.nara_core.cores.default.global."


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
@pytest.mark.parametrize("noise_embedding", ["fourier", "mlp", "raw"])
@pytest.mark.parametrize("core_type", ["hypernetwork", "constant"])
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
        ("global", {"global"}),
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
            group = {"global": "global", "module_type": kind, "layer": name.replace(".", "-")}[core_sharing]
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


# ---------------------------------------------------------------- float32 always


CASTS = {
    "to(bfloat16)": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "to(dtype=, device=)": lambda model: model.to(device="cpu", dtype=torch.float16),
    "bfloat16": lambda model: model.bfloat16(),
    "type": lambda model: model.type(torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("noise_embedding", ["fourier", "mlp"])
def test_no_cast_of_the_model_reaches_the_core(noise_embedding, cast):
    model = adapted(TwoLayers(), target_modules=["first"], noise_embedding=noise_embedding)
    before = core_matrix(model, LEVELS)
    cast(model)
    state = {n: t for n, t in model.state_dict().items() if "nara_core" in n}
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert torch.equal(core_matrix(model, LEVELS), before)
    dtype = model.base_model.model.first.get_base_layer().weight.dtype
    with noise_level(model, LEVELS):
        assert model(torch.randn(4, 3, 7, dtype=dtype)).dtype == dtype


def test_gradients_follow_the_core_in_float32():
    model = adapted(TwoLayers(), target_modules=["first"])
    with noise_level(model, 0.5):
        model(torch.randn(2, 7)).sum().backward()
    model.to(torch.bfloat16)
    assert {p.grad.dtype for n, p in model.named_parameters() if "nara_core" in n} == {torch.float32}


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("core_type", ["hypernetwork", "constant"])
def test_the_default_dtype_of_torch_does_not_reach_the_core(core_type, default):
    torch.set_default_dtype(default)
    try:
        model = adapted(TwoLayers(), target_modules=["first"], core_type=core_type)
        assert {t.dtype for n, t in model.state_dict().items() if "nara_core" in n} == {torch.float32}
        assert core_matrix(model, 0.5).dtype == torch.float32
        with noise_level(model, 0.5):
            assert model(torch.randn(2, 7)).dtype == default
    finally:
        torch.set_default_dtype(torch.float32)


def test_autocast_does_not_round_the_core():
    model = adapted(TwoLayers(), target_modules=["first"])
    exact = core_matrix(model, LEVELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(core_matrix(model, LEVELS), exact)


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


# ---------------------------------------------------------------- theorem 4.1


def updates_of_rank(n: int, d_out: int, d_in: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """n matrices that share column and row spaces of dimension `rank`."""
    B, A = torch.randn(d_out, rank, dtype=torch.float64), torch.randn(rank, d_in, dtype=torch.float64)
    return torch.einsum("or,nrq,qi->noi", B, torch.randn(n, rank, rank, dtype=torch.float64), A).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize(
    ("n", "d_out", "d_in", "rank"), [(1, 9, 6, 2), (3, 9, 6, 4), (5, 6, 11, 6), (2, 40, 30, 7), (4, 7, 7, 1)]
)
def test_shared_factors_reproduce_every_update_at_the_smallest_rank(n, d_out, d_in, rank, dtype, tolerance):
    updates = updates_of_rank(n, d_out, d_in, rank, dtype)
    B, cores, A = shared_factors(updates)
    assert (B.shape, cores.shape, A.shape) == ((d_out, rank), (n, rank, rank), (rank, d_in))
    assert {t.dtype for t in (B, cores, A)} == {dtype}
    torch.testing.assert_close(B.T @ B, torch.eye(rank, dtype=dtype), atol=1e-5, rtol=0)
    torch.testing.assert_close(A @ A.T, torch.eye(rank, dtype=dtype), atol=1e-5, rtol=0)
    assert relative_error(torch.einsum("or,nrq,qi->noi", B, cores, A), updates) < tolerance


def test_updates_of_different_spaces_need_the_sum_of_their_ranks_and_no_more():
    first, second = updates_of_rank(1, 12, 10, 2, torch.float64), updates_of_rank(1, 12, 10, 3, torch.float64)
    updates = torch.cat([first, second])
    B, cores, A = shared_factors(updates)
    assert cores.shape == (2, 5, 5)
    assert relative_error(B @ cores @ A, updates) < 1e-13
    assert torch.linalg.matrix_rank(cores[0]) == 2


def test_column_and_row_spaces_of_different_dimension_share_the_larger_rank():
    left, right = torch.randn(12, 1, dtype=torch.float64), torch.randn(4, 1, 10, dtype=torch.float64)
    updates = left @ right  # one column space, four row directions
    B, cores, A = shared_factors(updates)
    assert cores.shape == (4, 4, 4)
    assert relative_error(B @ cores @ A, updates) < 1e-13


def test_a_full_rank_set_of_updates_is_reproduced_where_one_side_is_exhausted():
    updates = torch.randn(3, 5, 8, dtype=torch.float64)  # joint column space 5, joint row space 8
    B, cores, A = shared_factors(updates)
    assert relative_error(B @ cores @ A, updates) < 1e-13


def test_a_smaller_rank_keeps_the_leading_directions():
    updates = updates_of_rank(3, 9, 8, 4, torch.float64)
    B, cores, A = shared_factors(updates, rank=2)
    assert cores.shape == (3, 2, 2)
    U = torch.linalg.svd(torch.cat(list(updates), dim=1))[0][:, :2]
    V = torch.linalg.svd(torch.cat(list(updates), dim=0))[2][:2]
    expected = U @ U.T @ updates @ V.T @ V
    assert relative_error(B @ cores @ A, expected) < 1e-12


def test_zero_updates_have_a_factorisation():
    B, cores, A = shared_factors(torch.zeros(2, 5, 4))
    assert torch.equal(B @ cores @ A, torch.zeros(2, 5, 4))


@pytest.mark.parametrize(
    ("updates", "rank", "message"),
    [
        (torch.randn(5, 4), None, r"shape \(5, 4\)"),
        (torch.ones(2, 5, 4, dtype=torch.int64), None, "int64"),
        (torch.randn(2, 5, 4).bfloat16(), None, "bfloat16"),
        (torch.randn(2, 5, 4), 0, r"rank is 0: it has to lie between 1 and .* 5"),
        (torch.randn(2, 5, 4), 6, "rank is 6"),
        (torch.full((2, 5, 4), float("nan")), None, "NaN"),
        (torch.randn(0, 5, 4), None, r"shape \(0, 5, 4\)"),
    ],
)
def test_shared_factors_refuses_what_it_cannot_factor(updates, rank, message):
    with pytest.raises(ValueError, match=message):
        shared_factors(updates, rank)


# ---------------------------------------------------------------- diffusers' layerwise casting


def tiny_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
    ).eval()


@pytest.mark.parametrize("casting_first", [False, True], ids=["adapter first", "casting first"])
def test_layerwise_casting_leaves_the_core_alone(casting_first):
    unet = tiny_unet()
    if casting_first:
        unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    unet.add_adapter(nara_config(target_modules=["to_q", "to_v"]))
    disturb(unet)
    exact = core_matrix(unet, LEVELS)
    if not casting_first:
        unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert {t.dtype for n, t in unet.state_dict().items() if "nara_core" in n} == {torch.float32}
    assert torch.equal(core_matrix(unet, LEVELS), exact)


def test_under_layerwise_casting_the_update_is_as_exact_as_that_of_a_lora():
    outputs = {}
    for kind in ("exact", "LoRA", "NaRA"):
        torch.manual_seed(4)
        unet = tiny_unet()
        unet.add_adapter((nara_config if kind == "NaRA" else lora_config)(target_modules=["to_q", "to_v"]))
        generator = torch.Generator().manual_seed(2)
        for name, p in unet.named_parameters():
            if "lora_" in name:
                p.data.copy_(torch.randn(p.shape, generator=generator))
        if kind != "exact":
            unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        sample, context = torch.linspace(-1, 1, 192).view(1, 3, 8, 8), torch.linspace(-1, 1, 60).view(1, 5, 12)
        if kind == "NaRA":
            with noise_level(unet, 0.5), torch.no_grad():
                outputs[kind] = unet(sample, 7, context).sample
        else:
            with torch.no_grad():
                outputs[kind] = unet(sample, 7, context).sample
    # C = I, and both read the same float8 weights
    assert relative_error(outputs["NaRA"], outputs["LoRA"]) < 1e-5
