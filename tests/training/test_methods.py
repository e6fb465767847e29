"""--adapter and --optimizer: PEFT's methods by their names, what they read, and what is refused."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaForCausalLM

from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.dllm.text_arguments import Arguments
from nara_diffusion.training.adapters import adapter_config, build_adapter, title_of
from nara_diffusion.training.optimization import build_lr_scheduler, build_optimizer, freeze_core
from tests.acceptance._text import backbone


def arguments(adapter: str = "nara", **changes: Any) -> Arguments:
    values: dict[str, Any] = {"rank": 4, "target_modules": ["q_proj", "v_proj"], **changes}
    return Arguments(pretrained_model_name_or_path="x", train_file="y", adapter=adapter, **values)


def llama() -> LlamaForCausalLM:
    return backbone(30, num_key_value_heads=4).requires_grad_(False)


RESIDUAL = {"lora_a_init": "residual"}
METHODS = {
    "nara": ("NARA", {}, "NaRA"),
    "nara_dora": ("NARA", {"use_dora": True}, "NaRA-DoRA"),
    "nara_c": ("NARA", {"core_type": "constant"}, "NaRA-C"),
    "nara_knots": ("NARA", {"core_type": "knots", "core_sharing": "layer", "core_scale": 1.0}, "NaRA-Knots"),
    "tlora": ("NARA", {"core_type": "rank_mask", "r": 4, "rank_mask_min": 1, "rank_mask_step": 1}, "T-LoRA"),
    "multi_lora": ("NARA", {"core_type": "bins", "r": 20, "lora_alpha": 20}, "Multi-LoRA"),
    "lora": ("LORA", {"use_dora": False, "r": 4, "lora_alpha": 4}, "LoRA"),
    "dora": ("LORA", {"use_dora": True}, "DoRA"),
    "hira": ("HIRA", {"r": 4}, "HiRA"),
    "vera": ("VERA", {"r": 4}, "vera"),
    "loha": ("LOHA", {"r": 4, "alpha": 4}, "loha"),
    "prompt_tuning": ("PROMPT_TUNING", {"num_virtual_tokens": 20}, "Prompt tuning"),
    "p_tuning": ("P_TUNING", {"num_virtual_tokens": 20}, "P-tuning"),
}


@pytest.mark.parametrize("adapter", METHODS)
def test_method_trains_its_adapter_alone(adapter: str) -> None:
    kind, fields, title = METHODS[adapter]
    args = arguments(adapter)
    model: Any = build_adapter(llama(), args)
    config = model.peft_config["default"]
    assert config.peft_type.value == kind
    assert {name: getattr(config, name) for name in fields} == fields
    assert title_of(args) == title
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert not [name for name in trained if "base_layer" in name or name.endswith("_proj.weight")]
    with noise_level(model, 0.5) if kind == "NARA" else nullcontext():
        assert model(torch.ones(1, 3, dtype=torch.long)).logits.isfinite().all()


def test_options_are_fields_of_the_configuration() -> None:
    options = {"core_hidden_dims": [8, 7], "core_init": "kaiming", "init_lora_weights": "gaussian"}
    config: Any = adapter_config(arguments(adapter_options=options, lora_alpha=6.0, lora_dropout=0.1))
    assert isinstance(config, NaraConfig)
    assert (config.core_hidden_dims, config.core_init, config.init_lora_weights) == ((8, 7), "kaiming", "gaussian")
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 6.0, 0.1)
    plain = adapter_config(arguments("lora", adapter_options={"core_hidden_dims": [8, 7], "use_rslora": True}))
    assert type(plain) is LoraConfig
    assert plain.use_rslora


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 6 / 4), (True, 6 / 2)])
def test_residual_tlora_has_twice_r_at_its_scale(use_rslora: bool, scaling: float) -> None:
    options = {**RESIDUAL, "rank_mask_exponent": 2.0, "use_rslora": use_rslora}
    model: Any = build_adapter(llama(), arguments("tlora", lora_alpha=6, adapter_options=options))
    config = model.peft_config["default"]
    assert (config.r, config.rank_mask_min, config.rank_mask_step, config.rank_mask_exponent) == (8, 2, 2, 2.0)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(scaling)


def test_rank_mask_without_minimum_keeps_half_of_r() -> None:
    config: Any = adapter_config(arguments("nara", core_type="rank_mask"))
    assert config.rank_mask_min is None
    assert adapter_config(arguments("tlora", adapter_options={"rank_mask_min": None})).rank_mask_min is None


def test_contradiction_is_refused() -> None:
    for changes, message in [
        ({"adapter": "nora"}, r"adapter is 'nora', which is not a method: did you mean nara\?"),
        ({"adapter": "adalora"}, r"adapter adalora can't be trained here"),
        ({"adapter_options": {"core_innit": "kaiming"}}, r"'core_innit', .* mean core_init"),
        ({"adapter": "dora", "adapter_options": {"use_dora": False}}, r"adapter dora sets use_dora to True"),
        ({"adapter": "nara_c", "core_type": "knots"}, "that of adapter nara_c is always constant"),
        ({"adapter": "lora", "core_type": "constant"}, "that of adapter lora is always none"),
        ({"core_type": "constent"}, r"core_type is 'constent'"),
        ({"adapter": "lora", "adapter_options": {"init_lora_weights": "pissa"}}, r"init_lora_weights=pissa changes"),
        ({"adapter": "lora", "adapter_options": {"init_lora_weights": "eva"}}, r"init_lora_weights=eva needs a pass"),
        (
            {"adapter": "tlora", "weight_decay": 0.1, "adapter_options": {"lora_a_init": "residual"}},
            "weight_decay is 0.1",
        ),
        ({"core_start_step": 3, "adapter_options": {"core_init": "kaiming"}}, r"core_start_step trains A and B"),
        ({"adapter_options": {"core_input": "both"}}, r"core_input is 'both': choose one of 'noise_level'"),
        ({"seed": -1}, r"seed must be at least 0"),
        ({"global_batch_size": 8, "gradient_accumulation_steps": 2}, r"give only one of the two"),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 5}, r"lr_scheduler 'constant' has no warm-up"),
        ({"core_module": "nowhere.py"}, r"core_module 'nowhere.py' can't be imported: ModuleNotFoundError"),
    ]:
        with pytest.raises(ValueError, match=message):
            arguments(**changes)


def test_missing_target_is_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"target_modules q_pro match no module .* did you mean q_proj\?"):
        build_adapter(llama(), arguments(target_modules=["q_pro"]))


@pytest.mark.usefixtures("_custom_cores")
def test_core_module_registers_the_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    file = tmp_path / "my_own_cores.py"
    file.write_text(
        "from torch import nn\nfrom nara_diffusion import register_core\n"
        "register_core('mine', lambda config, rank: nn.Identity())\n"
    )
    assert arguments(core_module=str(file), core_type="mine").core_type == "mine"


# ---------------------------------------------------------------- optimization


def test_core_and_adapter_have_rates_of_their_own() -> None:
    args = arguments(learning_rate=1e-2, core_learning_rate=1e-3, optimizer_options={"betas": [0.8, 0.9], "eps": 1e-6})
    optimizer = build_optimizer(build_adapter(llama(), args), args)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {"adapter": 1e-2, "core": 1e-3}
    assert (groups["core"]["betas"], groups["core"]["eps"], type(optimizer)) == ((0.8, 0.9), 1e-6, torch.optim.AdamW)
    assert sum(len(group["params"]) for group in groups.values()) == 8 + 6
    for group in groups.values():
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    freeze_core(optimizer)
    assert all(parameter.grad is None for parameter in groups["core"]["params"])
    assert all(parameter.grad is not None for parameter in groups["adapter"]["params"])


def test_optimizer_without_a_core_and_adafactor() -> None:
    args = arguments("lora", optimizer="adafactor", core_start_step=1)
    model = build_adapter(llama(), args)
    with pytest.raises(ValueError, match="core_start_step is 1, but adapter lora"):
        build_optimizer(model, args)
    args.core_start_step = 0
    assert type(build_optimizer(model, args)).__name__ == "Adafactor"


@pytest.mark.parametrize(("warmup", "first"), [(2, 0.5), (0.5, 0.5), (0, 0.75)])
def test_schedule_warms_up_over_steps_or_a_share(warmup: float, first: float) -> None:
    args = arguments("lora", lr_warmup_steps=warmup, learning_rate=1.0)
    optimizer = build_optimizer(build_adapter(llama(), args), args)
    schedule = build_lr_scheduler(optimizer, args, 4)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(first)
