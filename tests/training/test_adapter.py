"""From arguments to an adapted model and its optimizer."""

import pytest
import torch

from nara_diffusion.training.adapter import adapter_config, add_adapter
from nara_diffusion.training.optimization import build_optimizer, build_scheduler, hold_core, warmup_steps


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
