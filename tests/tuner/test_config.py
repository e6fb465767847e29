"""NaraConfig: every choice checked, and everything that cannot work refused by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, EvaConfig, KasaConfig, MontecloraConfig, VeloraConfig
from torch import nn

from nara_diffusion import NaraConfig, noise_level
from tests.helpers.adapted import TwoLayers, adapted, nara_config

# ---------------------------------------------------------------- choices


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("core_type", "hyper", "core_type is 'hyper': choose one of 'hypernetwork', 'constant', 'identity'"),
        ("core_init", "zeros", "core_init is 'zeros': choose one of 'zero_last', 'kaiming', 'zero_all'"),
        ("core_input", "t", "core_input is 't': choose one of 'noise_level', 'mask_density', 'both'"),
        ("core_sharing", "model", "core_sharing is 'model': choose one of 'global', 'module_type', 'layer'"),
        ("noise_embedding", "sin", "noise_embedding is 'sin': choose one of 'fourier', 'mlp', 'raw'"),
        ("core_type", None, "core_type is None"),
        ("core_type", [], "core_type is"),
        ("core_hidden_dims", (), "core_hidden_dims is"),
        ("core_hidden_dims", (256, 0), "core_hidden_dims is"),
        ("core_hidden_dims", (256.0,), "core_hidden_dims is"),
        ("core_hidden_dims", (True,), "core_hidden_dims is"),
        ("core_hidden_dims", 256, "core_hidden_dims is 256"),
        ("core_hidden_dims", None, "core_hidden_dims is None"),
        ("noise_embedding_dim", 0, "noise_embedding_dim is 0: pass a positive integer"),
        ("noise_embedding_dim", 63, "noise_embedding_dim is 63: Fourier features are sine and cosine pairs"),
        ("noise_embedding_dim", 64.0, "noise_embedding_dim is 64.0"),
        ("mask_density_radius", 0, "mask_density_radius is 0"),
        ("mask_density_radius", -1, "mask_density_radius is -1"),
        ("core_scale", 0, "core_scale is 0: pass a finite number greater than 0"),
        ("core_scale", -0.1, "core_scale is -0.1"),
        ("core_scale", float("nan"), "core_scale is nan"),
        ("core_scale", float("inf"), "core_scale is inf"),
        ("core_scale", "0.1", "core_scale is '0.1'"),
        ("core_scale", True, "core_scale is True"),
        ("fourier_scale", 0.0, "fourier_scale is 0.0"),
        ("fourier_scale", None, "fourier_scale is None"),
        ("noise_convention", 3, "noise_convention is 3"),
        ("noise_convention", "", "noise_convention is ''"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_given_and_what_is_expected(field, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        NaraConfig(**{field: value})


def test_an_odd_embedding_is_fine_where_there_are_no_pairs():
    assert NaraConfig(noise_embedding="mlp", noise_embedding_dim=63).noise_embedding_dim == 63


# ---------------------------------------------------------------- LoRA's options


REFUSED = {
    "target_parameters": ["layer.weight"],
    "layer_replication": [(0, 1)],
    "megatron_config": {"a": 1},
    "alora_invocation_tokens": [1, 2],
    "arrow_config": ArrowConfig(),
    "use_bdlora": BdLoraConfig(),
    "use_qalora": True,
    "velora_config": VeloraConfig(),
    "monteclora_config": MontecloraConfig(),
    "kasa_config": KasaConfig(),
    "ensure_weight_tying": True,
}

# Options of LoraConfig that mean the same for NaRA; each has a test here, in test_layer*.py or in test_peft_api.py,
# or is bookkeeping of PEFT's.
KEPT = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "trainable_token_indices", "use_dora", "runtime_config", "lora_bias",
}  # fmt: skip

# Options that only qualify a refused one.
QUALIFIERS = {"megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"}


def test_every_option_of_peft_has_been_considered():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    considered = KEPT | QUALIFIERS | REFUSED.keys()
    assert fields - considered == set(), "new in PEFT: refuse it in config.py, or test it"
    assert considered - fields == set(), "no longer in PEFT"


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
@pytest.mark.parametrize("option", REFUSED)
@pytest.mark.parametrize("core_type", ["hypernetwork", "constant"])
def test_an_option_without_meaning_for_nara_is_refused_by_name(core_type, option):
    with pytest.raises(ValueError, match=f"NaRA does not support {option}: .*core_type='identity'"):
        NaraConfig(core_type=core_type, **{option: REFUSED[option]})


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
@pytest.mark.parametrize("option", REFUSED)
def test_a_plain_lora_keeps_all_options(option):
    assert getattr(NaraConfig(core_type="identity", **{option: REFUSED[option]}), option)


def test_every_lora_variant_but_dora_is_refused():
    variants = {f.name for f in dataclasses.fields(LoraConfig) if f.metadata.get("is_lora_variant")}
    assert variants - REFUSED.keys() == {"use_dora"}


# ---------------------------------------------------------------- initialisations


SUPPORTED_INITS = [True, False, "gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal"]


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is:UserWarning")
@pytest.mark.parametrize(
    ("init", "options"),
    [
        ("eva", {"eva_config": EvaConfig()}),
        ("corda", {}),
        ("lora_ga", {}),
        ("mica", {}),
        ("MiCA", {}),
    ],
)
def test_an_initialisation_that_cannot_work_is_refused_by_name(init, options):
    with pytest.raises(ValueError, match=f"NaRA does not support init_lora_weights={init!r}: .*'pissa'"):
        NaraConfig(init_lora_weights=init, **options)


def test_loftq_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # PEFT asks for scipy first
    with pytest.raises(ValueError, match="NaRA does not support init_lora_weights='loftq'"):
        NaraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})


@pytest.mark.parametrize("init", ["zeros", "PiSSA", "pissa_niter_", "pissa_niter_x", "gaussian_niter_4", 3, None])
def test_an_unknown_initialisation_is_refused_when_the_config_is_built(init):
    with pytest.raises(ValueError, match=f"^init_lora_weights is {init!r}, which NaRA does not know: use True, False"):
        NaraConfig(init_lora_weights=init)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_an_initialisation_that_splits_the_base_weight_needs_c_to_start_as_i(init):
    with pytest.raises(ValueError, match="needs C = I at step 0, but core_init is 'kaiming'"):
        NaraConfig(init_lora_weights=init, core_init="kaiming")


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
@pytest.mark.parametrize("core_type", ["hypernetwork", "constant", "identity"])
@pytest.mark.parametrize("init", [init for init in SUPPORTED_INITS if init is not False])
def test_a_supported_initialisation_starts_at_the_function_of_the_base_model(init, core_type, use_dora):
    base = TwoLayers()
    x = torch.randn(3, 4, 7)
    expected = base(x)
    config = nara_config(
        target_modules=["first", "second"], init_lora_weights=init, core_type=core_type, use_dora=use_dora
    )
    model = get_peft_model(base, config)
    with noise_level(model, torch.tensor([0.1, 0.5, 0.9])):
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=2e-6)
    A, B = model.base_model.model.first.lora_A["default"].weight, model.base_model.model.first.lora_B["default"].weight
    assert A.abs().max() > 0
    assert (B.abs().max() > 0) == (init not in (True, "gaussian"))


@pytest.mark.parametrize("init", SUPPORTED_INITS)
def test_a_supported_initialisation_draws_what_peft_draws(init):
    states = []
    for config_class in (LoraConfig, NaraConfig):
        torch.manual_seed(5)
        base = TwoLayers()
        config = config_class(r=4, lora_alpha=6, target_modules=["first", "second"], init_lora_weights=init)
        model = get_peft_model(base, config)
        states.append({n: t for n, t in model.state_dict().items() if "nara_core" not in n})
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


# ---------------------------------------------------------------- which modules


def adapted_names(model: PeftModel) -> set[str]:
    return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")}


def test_layers_to_transform_and_exclude_modules_choose_the_adapted_ones(tiny_llama):
    model = adapted(tiny_llama, target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    assert adapted_names(model) == {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}
    with noise_level(model, torch.tensor([0.2, 0.8])):
        outputs = model(torch.randint(49, (2, 5))).logits
    assert outputs.shape == (2, 5, 50)


def test_layers_pattern_names_the_list_of_layers(tiny_llama):
    model = adapted(tiny_llama, target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="layers")
    assert adapted_names(model) == {"model.layers.0.self_attn.q_proj"}


def test_exclude_modules_leaves_a_module_out(tiny_llama):
    model = adapted(tiny_llama, target_modules=["q_proj", "v_proj"], exclude_modules=["layers.0.self_attn.q_proj"])
    assert "model.layers.0.self_attn.q_proj" not in adapted_names(model)
    assert len(adapted_names(model)) == 3


def test_targets_that_match_nothing_leave_the_model_as_it_was():
    base = TwoLayers()
    before = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(ValueError, match="nothing_of_that_name"):
        get_peft_model(base, nara_config(target_modules=["nothing_of_that_name"]))
    assert {name: type(module) for name, module in base.named_modules()} == before
    assert all(p.requires_grad for p in base.parameters())
    assert not base._forward_pre_hooks
    assert not base._forward_hooks


def test_defaults_are_those_of_the_paper():
    config = NaraConfig()
    assert (config.core_scale, config.core_hidden_dims, config.noise_embedding_dim) == (0.1, (256, 512), 64)
    assert (config.fourier_scale, config.core_init, config.core_type) == (16.0, "zero_last", "hypernetwork")


def test_two_configs_do_not_share_state():
    first, second = NaraConfig(), NaraConfig()
    first.rank_pattern["a"] = 3
    assert second.rank_pattern == {}


def test_the_kind_of_layer_is_told_where_no_rule_exists():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

    base = Attention()
    modules = {name: id(module) for name, module in base.named_modules()}
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(ValueError, match=r"NaRA cannot adapt 'attention' \(MultiheadAttention.*exclude_modules"):
        get_peft_model(base, nara_config(target_modules=["attention"]))
    assert {name: id(module) for name, module in base.named_modules()} == modules
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in state.items())


def test_a_custom_lora_layer_that_does_not_consult_rules_is_refused():
    class CustomLayer(lora.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))

    base = TwoLayers()
    config = nara_config(target_modules=["first"])
    config._register_custom_module({nn.Linear: CustomLayer})
    with pytest.raises(ValueError, match=r"NaRA cannot adapt 'first' \(Linear, adapted by PEFT's CustomLayer\)"):
        get_peft_model(base, config)
    assert type(base.first) is nn.Linear


@pytest.mark.parametrize("core_type", ["constant", "identity", "rank_mask", "bins", "knots"])
@pytest.mark.parametrize(
    ("field", "value"),
    [("core_input", "mask_density"), ("noise_embedding", "raw"), ("core_init", "kaiming")],
)
def test_a_choice_that_the_core_does_not_read_is_refused(core_type: str, field: str, value: str) -> None:
    if (core_type, field) == ("constant", "core_init"):
        assert NaraConfig(core_type=core_type, r=5, core_init=value).core_init == value
        return
    with pytest.raises(ValueError, match=f"^{field} is '{value}', which core_type '{core_type}' doesn't read: leave"):
        NaraConfig(core_type=core_type, r=5, **{field: value})
