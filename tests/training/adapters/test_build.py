"""Every method of --adapter on a tiny Llama: the right kind of adapter, what is trainable, a loss that trains it."""

import dataclasses
import math

import pytest
import torch
from peft import PeftModel, PeftType
from torch import nn

from nara_diffusion import NaraConfig
from nara_diffusion.dllm import generate, masked_diffusion_loss
from nara_diffusion.dllm.loss import masked_cross_entropy
from nara_diffusion.dllm.masking import mask_answers
from nara_diffusion.training.adapters.build import build_adapter
from nara_diffusion.training.adapters.configs import adapter_config
from nara_diffusion.training.adapters.method_arguments import check_method, unread_arguments
from nara_diffusion.training.adapters.methods import METHODS, kind_of, title_of
from nara_diffusion.training.arguments.cli import parse_arguments
from nara_diffusion.training.arguments.common import AdapterArguments

TYPES = {
    "hira": PeftType.HIRA,
    "vera": PeftType.VERA,
    "adalora": PeftType.ADALORA,
    "oft": PeftType.OFT,
    "prompt_tuning": PeftType.PROMPT_TUNING,
    "p_tuning": PeftType.P_TUNING,
}
LORAS = {"lora", "dora", "rslora", "pissa"}


def arguments(adapter: str, **changes) -> AdapterArguments:
    values = {"rank": 2, "target_modules": ["q_proj", "up_proj"], "core_hidden_dims": [5, 7], "num_virtual_tokens": 3}
    return AdapterArguments(**{**values, "adapter": adapter, **changes})


def batch(rows: int = 3, length: int = 10):
    ids = torch.randint(1, 49, (rows, length), generator=torch.Generator().manual_seed(1))
    return mask_answers(ids, [3, 4, 5][:rows], mask_token_id=0, seed=1, sample_indices=range(rows))


@pytest.mark.parametrize("adapter", METHODS)
def test_every_method_trains_what_it_has_and_nothing_else(tiny_llama, adapter: str) -> None:
    frozen = {id(parameter) for parameter in tiny_llama.parameters()}
    model = build_adapter(tiny_llama, arguments(adapter), total_steps=10)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trainable
    if adapter == "full":
        assert model is tiny_llama
        assert {id(parameter) for parameter in trainable} == frozen
    else:
        assert isinstance(model, PeftModel)
        assert not any(id(parameter) in frozen for parameter in trainable)
    loss = masked_diffusion_loss(model, batch().targets, [3, 4, 5], seed=0, sample_indices=range(3), mask_token_id=0)
    loss.loss.backward()
    assert all(parameter.grad is not None for parameter in trainable)
    assert any(parameter.grad.abs().sum() > 0 for parameter in trainable)


@pytest.mark.parametrize("adapter", [name for name in METHODS if name != "full"])
def test_the_configuration_is_peft_s_own(tiny_llama, adapter: str) -> None:
    config = build_adapter(tiny_llama, arguments(adapter), total_steps=10).peft_config["default"]
    if METHODS[adapter].family == "nara":
        assert isinstance(config, NaraConfig)
        assert config.noise_convention == "masked_share"
    else:
        assert config.peft_type == (PeftType.LORA if adapter in LORAS else TYPES[adapter])
    assert getattr(config, "use_dora", False) is (adapter in ("nara_dora", "dora"))
    assert getattr(config, "use_rslora", False) is (adapter == "rslora")


def test_prompt_tokens_are_read_before_the_text_and_scored_nowhere(tiny_llama) -> None:
    model = build_adapter(tiny_llama, arguments("prompt_tuning"))
    prompts = model.get_prompt_embedding_to_save("default")  # (3, d)
    data = batch()
    embedded = tiny_llama.get_input_embeddings()(data.input_ids)  # (b, l, d)
    both = torch.cat([prompts.expand(len(embedded), -1, -1), embedded], 1)
    logits = tiny_llama(inputs_embeds=both).logits[:, 3:].detach()
    expected = nn.functional.cross_entropy(logits.transpose(1, 2), data.targets, reduction="none") * data.masked
    for kind in ("masked", "all"):
        torch.testing.assert_close(masked_cross_entropy(model, data, logits=kind), expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        plain = masked_cross_entropy(model, data)
    torch.testing.assert_close(plain, masked_cross_entropy(tiny_llama, data))
    assert not torch.allclose(plain, expected, rtol=1e-3)


def test_a_prompt_tuned_model_generates_from_the_positions_of_its_text(tiny_llama) -> None:
    model = build_adapter(tiny_llama, arguments("p_tuning"))
    prompt = torch.tensor([[5, 6, 7]])
    found = generate(model, prompt, gen_length=1, mask_token_id=0, eos_token_id=48)[0, -1]
    embedded = tiny_llama.get_input_embeddings()(torch.tensor([[5, 6, 7, 0]]))
    both = torch.cat([model.get_prompt(1), embedded], 1)
    logits = tiny_llama(inputs_embeds=both).logits[0, -1].detach()
    logits[0] = -math.inf
    assert found == logits.argmax()


@pytest.mark.parametrize(("alpha", "rslora"), [(None, False), (6.0, False), (6.0, True)])
def test_each_lora_of_multi_lora_has_the_rank_and_scale_of_one(tiny_llama, alpha, rslora) -> None:
    options = {"lora_alpha": alpha, "use_rslora": rslora}
    scales = {}
    for name in ("lora", "multi_lora"):
        config = adapter_config(arguments(name, **options))
        assert config.r == (2 if name == "lora" else 10)
        scales[name] = config.lora_alpha / (math.sqrt(config.r) if rslora else config.r)
    assert scales["multi_lora"] == pytest.approx(scales["lora"])


def test_adalora_keeps_the_scale_of_a_lora(tiny_llama) -> None:
    model = build_adapter(tiny_llama, arguments("adalora", lora_alpha=6.0), total_steps=10)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.r["default"] == 3
    assert layer.scaling["default"] / layer.ranknum["default"].item() == pytest.approx(6 / 2)


def test_oft_has_about_the_parameters_of_a_lora_on_a_square_layer() -> None:
    square = nn.ModuleDict({"q_proj": nn.Linear(64, 64, bias=False), "up_proj": nn.Linear(64, 64, bias=False)})
    counts = {}
    for name in ("oft", "lora"):
        layers = nn.ModuleDict({key: nn.Linear(64, 64, bias=False) for key in square})
        model = build_adapter(layers, arguments(name, rank=4))  # type: ignore[arg-type]
        counts[name] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert counts["oft"] == pytest.approx(counts["lora"], rel=0.1)


def test_options_reach_peft_s_configuration() -> None:
    config = adapter_config(arguments("adalora", adapter_options=["init_r=7", "beta1=0.9"]), total_steps=10)
    assert (config.init_r, config.beta1) == (7, 0.9)
    config = adapter_config(arguments("lora", adapter_options=["rank_pattern={up_proj: 1}"]))
    assert config.rank_pattern == {"up_proj": 1}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("init_r", r"'init_r', expected NAME=VALUE with a field of LoraConfig"),
        ("rank_patern=1", r"'rank_patern=1', .* Did you mean rank_pattern\?"),
        ("rank_pattern={", r"not valid YAML"),
    ],
)
def test_options_that_peft_does_not_have_are_named(option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapter_config(arguments("lora", adapter_options=[option]))


@pytest.mark.parametrize(
    ("adapter", "changes", "message"),
    [
        ("hira", {"use_dora": True}, r"use_dora is True, which adapter hira doesn't know: .* nara, nara_dora"),
        ("lora", {"core_type": "constant"}, r"core_type is 'constant', which adapter lora doesn't know"),
        (
            "nara_c",
            {"core_type": "identity"},
            r"core_type is 'identity', but adapter nara_c means core_type 'constant'",
        ),
        ("vera", {"lora_alpha": 3.0}, r"lora_alpha is 3.0, which adapter vera doesn't know: .* adalora"),
    ],
)
def test_contradictions_are_refused(adapter: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_method(arguments(adapter, **changes))


def test_settings_that_a_method_does_not_read_are_named(caplog) -> None:
    check_method(AdapterArguments(adapter="lora", core_scale=0.5, rank=3))
    check_method(AdapterArguments(adapter="full", rank=3))
    check_method(AdapterArguments(adapter="nara_c", core_scale=0.5, lora_alpha=3.0, rank=5))
    check_method(AdapterArguments(adapter="hira", lora_alpha=5.0, rank=5))
    assert [record.getMessage() for record in caplog.records] == [
        "adapter lora doesn't read core_scale",
        "adapter full doesn't read rank",
    ]


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        ({"core_type": "identity", "core_scale": 0.5, "core_sharing": "layer"}, ["core_scale", "core_sharing"]),
        ({"adapter": "tlora", "core_hidden_dims": [5], "core_bins": 3}, ["core_hidden_dims", "core_bins"]),
        ({"adapter": "multi_lora", "core_knots": 3, "core_bins": 2}, ["core_knots"]),
        ({"adapter": "nara_c", "core_scale": 0.5, "fourier_scale": 2.0}, ["fourier_scale"]),
        ({"adapter": "nara_knots", "core_knots": 3, "noise_embedding_dim": 8}, ["noise_embedding_dim"]),
        ({"core_scale": 0.5, "core_hidden_dims": [5], "core_sharing": "layer", "mask_density_radius": 3}, []),
        ({"adapter": "prompt_tuning", "noise_embedding": "raw"}, ["noise_embedding"]),
    ],
    ids=str,
)
def test_settings_that_a_type_of_core_does_not_read_are_named(settings: dict, unread: list[str]) -> None:
    assert unread_arguments(AdapterArguments(**settings)) == unread


@pytest.mark.parametrize(
    ("settings", "title", "kind"),
    [
        ({}, "NaRA", "nara"),
        ({"use_dora": True}, "NaRA-DoRA", "nara_dora"),
        ({"adapter": "nara_dora"}, "NaRA-DoRA", "nara_dora"),
        ({"core_sharing": "layer"}, "NaRA", "nara"),
        ({"core_type": "constant"}, "NaRA-C", "nara_c"),
        ({"adapter": "nara_c", "use_dora": True}, "NaRA-C-DoRA", "nara_c"),
        ({"core_type": "bins"}, "Multi-LoRA", "multi_lora"),
        ({"adapter": "tlora"}, "T-LoRA", "tlora"),
        ({"core_type": "rank_mask", "use_dora": True}, "T-LoRA-DoRA", "tlora"),
        ({"core_type": "knots", "core_sharing": "layer", "core_scale": 1.0}, "NaRA-Knots", "nara_knots"),
        ({"adapter": "nara_knots", "use_dora": True}, "NaRA-Knots-DoRA", "nara_knots"),
        ({"core_type": "knots"}, "NaRA with core 'knots'", "nara"),
        ({"core_type": "mine"}, "NaRA with core 'mine'", "nara"),
        ({"core_type": "mine", "use_dora": True}, "NaRA-DoRA with core 'mine'", "nara_dora"),
        ({"core_type": "identity"}, "LoRA", "lora"),
        ({"core_type": "identity", "use_dora": True}, "DoRA", "dora"),
        ({"adapter": "nara_dora", "core_type": "identity"}, "DoRA", "dora"),
        ({"core_type": "identity", "use_rslora": True}, "rsLoRA", "rslora"),
        ({"adapter": "lora"}, "LoRA", "lora"),
        ({"adapter": "lora", "use_dora": True}, "DoRA", "dora"),
        ({"adapter": "lora", "use_rslora": True}, "rsLoRA", "rslora"),
        ({"adapter": "rslora", "use_dora": True}, "rsLoRA-DoRA", "rslora"),
        ({"adapter": "pissa", "use_dora": True}, "PiSSA-DoRA", "pissa"),
        ({"adapter": "vera"}, "VeRA", "vera"),
    ],
    ids=str,
)
def test_the_title_is_that_of_what_the_configuration_really_is(settings: dict, title: str, kind: str) -> None:
    args = AdapterArguments(**settings)
    assert (title_of(args), kind_of(args)) == (title, kind)


@pytest.mark.parametrize("option", ["core_type=identity", "use_dora=true", "core_scale=1.0"])
def test_an_option_that_is_an_argument_itself_is_refused(option: str) -> None:
    name = option.partition("=")[0]
    with pytest.raises(ValueError, match=f"adapter_options holds '{option}', .* argument of its own: give {name} "):
        check_method(arguments("nara", adapter_options=[option]))


def test_adalora_needs_the_number_of_steps_and_full_has_no_options() -> None:
    with pytest.raises(ValueError, match="pass total_steps=N"):
        adapter_config(arguments("adalora"))
    with pytest.raises(ValueError, match="full fine-tuning has no configuration"):
        adapter_config(arguments("full", adapter_options=["r=3"]))
    assert adapter_config(arguments("full")) is None


def test_every_argument_of_an_adapter_is_known_to_the_table() -> None:
    names = {field.name for field in dataclasses.fields(AdapterArguments)}
    assert {"adapter", "rank", "num_virtual_tokens", "adapter_options"} < names


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--adapter nara_knots --core_scale 0.1", "core_scale is 0.1, but adapter nara_knots means core_scale 1.0"),
        ("--adapter nara_knots --core_sharing global", "core_sharing is 'global', but adapter nara_knots means"),
        ("--adapter nara_dora --no-use_dora", "use_dora is False, but adapter nara_dora means use_dora True"),
    ],
)
def test_a_flag_that_contradicts_the_method_is_refused_at_its_default_too(flags: str, message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(AdapterArguments, flags.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("adapter", ["nara", "nara_knots", "nara_dora"])
def test_a_file_that_serves_several_methods_contradicts_none(tmp_path, adapter: str) -> None:
    (tmp_path / "all.yaml").write_text("core_scale: 0.1\nuse_dora: false\n")
    assert parse_arguments(AdapterArguments, ["--config", str(tmp_path / "all.yaml"), "--adapter", adapter])
