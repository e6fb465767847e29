"""From arguments to an adapted model and its optimizer."""

import sys

import pytest
import torch
from torch import Tensor, nn

from nara_diffusion.cores import registry as custom_cores
from nara_diffusion.training.adapters.build import adapter_config, add_adapter
from nara_diffusion.training.optimization import build_optimizer, build_scheduler, hold_core, warmup_steps


class Faded(nn.Module):
    """C(λ) = (1 − λ) I."""

    def __init__(self, config, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, noise_level: Tensor) -> Tensor:
        return (1 - noise_level)[:, None, None] * torch.eye(self.rank)


def test_every_argument_reaches_the_config(small_args) -> None:
    args = small_args(
        use_dora=True, core_scale=0.3, core_sharing="layer", noise_embedding="mlp", target_modules=["q_proj"]
    )
    config = adapter_config(args, task_type="CAUSAL_LM")
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora) == (3, 5.0, 0.2, True)
    assert (config.core_scale, config.core_sharing, config.noise_embedding) == (0.3, "layer", "mlp")
    assert (config.core_hidden_dims, config.task_type, config.target_modules) == ((5, 7), "CAUSAL_LM", {"q_proj"})


def test_alpha_is_the_rank_unless_given(small_args) -> None:
    assert adapter_config(small_args(lora_alpha=None)).lora_alpha == 3


def test_all_linear_adapts_each_layer_but_the_head(small_args, tiny_llama) -> None:
    model = add_adapter(tiny_llama, adapter_config(small_args(target_modules=["all-linear"])))
    adapted = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("targets", [["attn_out", "q_prj"], ["q_proj", "attn_out", "q_prj"]])
def test_names_that_match_nothing_are_refused_with_those_that_would(small_args, tiny_llama, targets) -> None:
    config = adapter_config(small_args(target_modules=targets))
    with pytest.raises(ValueError, match=r"attn_out, q_prj match no module of LlamaForCausalLM") as error:
        add_adapter(tiny_llama, config)
    assert "Did you mean q_proj?" in str(error.value)
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in str(error.value)
    assert not any("lora" in name for name, _ in tiny_llama.named_parameters())


def test_a_whole_name_and_its_end_match(small_args, tiny_llama) -> None:
    targets = ["model.layers.0.self_attn.q_proj", "1.mlp.up_proj"]
    model = add_adapter(tiny_llama, adapter_config(small_args(target_modules=targets)))
    adapted = [name for name, _ in model.named_parameters() if ".lora_A" in name]
    assert len(adapted) == 2


@pytest.fixture
def optimizer(small_args, tiny_llama) -> torch.optim.AdamW:
    model = add_adapter(tiny_llama, adapter_config(small_args()))
    return build_optimizer(model, small_args(core_learning_rate=1e-4, weight_decay=0.3, adam_beta2=0.9))


def test_two_groups_with_their_learning_rates(optimizer) -> None:
    adapter, core = optimizer.param_groups
    assert (adapter["name"], adapter["lr"], core["name"], core["lr"]) == ("adapter", 1e-2, "core", 1e-4)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.9)}
    assert len(adapter["params"]) == 2 * 4 * 2  # layers × modules × (A, B)
    assert len(core["params"]) == 3 * 2  # weight and bias of the linear layers of F


def test_holding_the_core_leaves_weights_and_moments(optimizer) -> None:
    core = optimizer.param_groups[1]["params"]
    before = [parameter.detach().clone() for parameter in core]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    hold_core(optimizer)
    optimizer.step()
    assert all(parameter.equal(value) for parameter, value in zip(core, before, strict=True))
    assert not any(parameter in optimizer.state for parameter in core)
    assert all(parameter in optimizer.state for parameter in optimizer.param_groups[0]["params"])


def test_a_plain_lora_has_one_group_and_no_second_stage(small_args, tiny_llama) -> None:
    model = add_adapter(tiny_llama, adapter_config(small_args(core_type="identity")))
    assert [group["name"] for group in build_optimizer(model, small_args()).param_groups] == ["adapter"]
    with pytest.raises(ValueError, match=r"core_start_step is 2, but core_type 'identity' has no core"):
        build_optimizer(model, small_args(core_type="identity", core_start_step=2))


@pytest.mark.parametrize("rate", [None, 1e-3])
def test_a_rate_for_a_custom_core_without_weights_is_named(small_args, tiny_llama, monkeypatch, caplog, rate) -> None:
    monkeypatch.setattr(custom_cores, "_custom", {})
    custom_cores.register_core("faded", Faded)
    args = small_args(core_type="faded", core_learning_rate=rate)
    build_optimizer(add_adapter(tiny_llama, adapter_config(args)), args)
    assert caplog.messages == (
        [] if rate is None else ["core_learning_rate isn't read: core_type 'faded' trains nothing"]
    )


def test_nothing_to_train_is_refused(small_args, tiny_llama) -> None:
    tiny_llama.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing in the model is trainable"):
        build_optimizer(tiny_llama, small_args())


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0), (0.05, 10), (0.999, 200), (1.0, 1), (30.0, 30)])
def test_warm_up_below_one_is_a_share(value: float, expected: int) -> None:
    assert warmup_steps(value, 200) == expected


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"])
def test_schedules_scale_both_groups(optimizer, small_args, name: str) -> None:
    scheduler = build_scheduler(optimizer, small_args(lr_scheduler=name, lr_warmup_steps=0.5), total_steps=8)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    adapter, core = scheduler.get_last_lr()
    assert adapter / core == pytest.approx(100)
    assert adapter == pytest.approx(1e-2 if name == "constant" else 0.5e-2)


@pytest.mark.parametrize(
    ("name", "options", "factors"),
    [
        ("cosine_with_restarts", {"lr_num_cycles": 2}, [1.0, 0.5, 1.0, 0.5]),
        ("polynomial", {"lr_power": 2.0}, [1.0, 0.5625, 0.25, 0.0625]),
    ],
)
def test_schedules_with_parameters(optimizer, small_args, name: str, options: dict, factors: list[float]) -> None:
    scheduler = build_scheduler(optimizer, small_args(lr_scheduler=name, lr_warmup_steps=0, **options), total_steps=4)
    rates = []
    for _ in range(4):
        rates.append(scheduler.get_last_lr()[0] / 1e-2)
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(factors, abs=1e-4)


class TextModel(torch.nn.Module):
    """Parameters named as those of a UNet beside its text encoders."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = torch.nn.ModuleDict({"nara_core": torch.nn.Linear(2, 3), "lora_A": torch.nn.Linear(2, 3)})
        self.text_encoder, self.text_encoder_2 = torch.nn.Linear(2, 5), torch.nn.Linear(2, 7)


def test_text_encoders_have_their_rate(small_args) -> None:
    args = small_args(core_learning_rate=1e-4)
    args.text_encoder_lr = 5e-6
    groups = {group["name"]: group for group in build_optimizer(TextModel(), args).param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "adapter": 1e-2,
        "core": 1e-4,
        "text_encoder": 5e-6,
    }
    assert {name: len(group["params"]) for name, group in groups.items()} == {
        "adapter": 2,
        "core": 2,
        "text_encoder": 4,
    }


def test_text_encoders_have_their_weight_decay(small_args) -> None:
    args = small_args(weight_decay=0.3)
    args.adam_weight_decay_text_encoder = 0.0
    decays = {group["name"]: group["weight_decay"] for group in build_optimizer(TextModel(), args).param_groups}
    assert decays == {"adapter": 0.3, "core": 0.3, "text_encoder": 0.0}


def test_scale_lr_multiplies_every_rate_by_the_global_batch(small_args) -> None:
    args = small_args(scale_lr=True, core_learning_rate=1e-4)
    with pytest.raises(ValueError, match="scale_lr multiplies the learning rates by the samples of a step: pass"):
        build_optimizer(TextModel(), args)
    rates = [group["lr"] for group in build_optimizer(TextModel(), args, global_batch=30).param_groups]
    assert rates == pytest.approx([0.3, 3e-3, 0.3])


def test_fused_adam_takes_the_steps_of_adam(small_args) -> None:
    weights = {}
    for fused in (False, True):
        torch.manual_seed(0)
        model = TextModel()
        optimizer = build_optimizer(model, small_args(weight_decay=0.1), fused=fused)
        assert {group["fused"] for group in optimizer.param_groups} == {True if fused else None}
        for step in range(3):
            optimizer.zero_grad()
            sum((step - parameter).square().sum() for parameter in model.parameters()).backward()
            optimizer.step()
        weights[fused] = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.testing.assert_close(weights[True], weights[False], rtol=1e-6, atol=1e-7)


def test_eight_bit_adam_takes_the_steps_of_adam(small_args) -> None:
    pytest.importorskip("bitsandbytes")
    small, weights = TextModel(), {}
    start = {name: value.clone() for name, value in small.state_dict().items()}
    for use_8bit in (False, True):
        small.load_state_dict(start)
        optimizer = build_optimizer(small, small_args(use_8bit_adam=use_8bit, weight_decay=0.1))
        assert type(optimizer).__name__ == ("AdamW8bit" if use_8bit else "AdamW")
        for step in range(3):
            optimizer.zero_grad()
            sum((step - parameter).square().sum() for parameter in small.parameters()).backward()
            optimizer.step()
        weights[use_8bit] = torch.cat([parameter.detach().flatten() for parameter in small.parameters()])
    torch.testing.assert_close(weights[True], weights[False], rtol=1e-3, atol=1e-4)


def test_prodigy_finds_its_rate(small_args) -> None:
    pytest.importorskip("prodigyopt")
    torch.manual_seed(0)
    model = TextModel()
    args = small_args(optimizer="prodigy", learning_rate=1.0, prodigy_beta3=0.9, weight_decay=0.0)
    optimizer = build_optimizer(model, args)
    assert optimizer.param_groups[0]["beta3"] == 0.9
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        loss = sum((parameter - 1).square().sum() for parameter in model.parameters())
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]


def test_prodigy_takes_one_rate(small_args, caplog) -> None:
    pytest.importorskip("prodigyopt")
    with pytest.raises(
        ValueError, match=r"prodigy has one learning rate for all, got adapter 1, core 0.1, text_encoder"
    ):
        build_optimizer(TextModel(), small_args(optimizer="prodigy", learning_rate=1.0, core_learning_rate=0.1))
    build_optimizer(TextModel(), small_args(optimizer="prodigy", learning_rate=1e-4))
    assert "learning_rate 0.0001: 1 is usual" in caplog.text


@pytest.mark.parametrize(
    ("options", "package"),
    [({"use_8bit_adam": True}, "bitsandbytes"), ({"optimizer": "prodigy"}, "prodigyopt")],
)
def test_a_missing_package_is_named(small_args, monkeypatch, options: dict, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{package}, which can't be imported.*: pip install {package}\.$"):
        build_optimizer(TextModel(), small_args(**options))


def test_eight_bit_prodigy_does_not_exist(small_args) -> None:
    with pytest.raises(ValueError, match="use_8bit_adam is a form of AdamW, but the optimizer is prodigy"):
        small_args(optimizer="prodigy", use_8bit_adam=True)
