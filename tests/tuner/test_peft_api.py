"""Every public name of PEFT's on an adapted model: right for NaRA, refused by name, or irrelevant for a stated reason.

A name that a later PEFT adds fails here until somebody has looked at it.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import peft.functional
import peft.helpers
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PeftModelForCausalLM,
    convert_to_lora,
    create_arrow_model,
    get_peft_model,
    save_as_lora,
)
from peft.helpers import DoraCaching
from peft.tuners.lora import LoraModel
from peft.tuners.lora.config import ArrowConfig
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from nara_diffusion import NaraModel, noise_level
from tests.helpers.adapted import TwoLayers, adapted, disturb, nara_config

TARGETS = ["first", "second"]
LEVELS = torch.tensor([0.05, 0.5, 0.93])

# name → the test that shows it right, or refused; or why it needs none
LORA_MODEL = {
    "active_adapters": "test_status_and_counts_tell_of_every_adapter",
    "add_weighted_adapter": "test_weighted_sums_are_refused_for_cores_and_right_for_plain_loras",
    "delete_adapter": "test_the_last_adapter_may_be_deleted_and_another_one_added",
    "disable_adapter_layers": "test_disabled_it_is_the_base_model_and_needs_no_level",
    "enable_adapter_layers": "test_disabled_it_is_the_base_model_and_needs_no_level",
    "get_model_config": "irrelevant: reads the base model's configuration",
    "inject_adapter": "test_injected_adapters_save_and_load_by_state_dict",
    "merge_adapter": "test_merging_equals_the_forward_at_that_level_and_is_undone",
    "merge_and_unload": "test_merge_and_unload_leaves_a_plain_model_of_that_level",
    "prefix": "irrelevant: a constant",
    "set_adapter": "test_active_adapters_add_up_to_the_sum_written_by_hand",
    "set_requires_grad": "test_only_active_adapters_train_each_with_its_own_core",
    "subtract_mutated_init": "test_conversion_of_an_initialisation_is_refused",
    "supports_lora_conversion": "test_conversion_to_lora_is_refused",
    "target_module_mapping": "test_default_target_modules_are_those_of_lora",
    "tuner_layer_cls": "irrelevant: a constant",
    "unload": "test_unloading_gives_the_base_model_back",
    "unmerge_adapter": "test_merging_equals_the_forward_at_that_level_and_is_undone",
    "uses_shared_state": "irrelevant: a constant",
}

PEFT_MODEL = {
    "active_adapters": "test_status_and_counts_tell_of_every_adapter",
    "active_peft_config": "test_properties_of_the_wrapper",
    "add_adapter": "test_adding_an_adapter_changes_neither_what_is_active_nor_what_trains",
    "base_model_torch_dtype": "test_properties_of_the_wrapper",
    "create_or_update_model_card": "test_core_and_frequencies_are_in_the_one_file_in_float32_without_the_word_lora",
    "delete_adapter": "test_a_deleted_adapter_leaves_nothing_behind",
    "disable_adapter": "test_disabled_it_is_the_base_model_and_needs_no_level",
    "from_pretrained": "test_a_differently_seeded_model_loads_the_same_bits",
    "generate": "test_generation_reads_the_level_of_the_context",
    "get_base_model": "test_properties_of_the_wrapper",
    "get_layer_status": "test_status_and_counts_tell_of_every_adapter",
    "get_model_status": "test_status_and_counts_tell_of_every_adapter",
    "get_nb_trainable_parameters": "test_status_and_counts_tell_of_every_adapter",
    "get_prompt": "irrelevant: prompt learning",
    "get_prompt_embedding_to_save": "irrelevant: prompt learning",
    "has_active_enabled_adapter": "test_properties_of_the_wrapper",
    "load_adapter": "test_two_adapters_save_each_its_own_and_load_under_any_name",
    "modules_to_save": "test_modules_to_save_biases_and_trainable_tokens_travel_with_the_adapter",
    "peft_config": "test_properties_of_the_wrapper",
    "prepare_inputs_for_generation": "test_generation_reads_the_level_of_the_context",
    "prepare_model_for_gradient_checkpointing": "irrelevant: makes the base model's embeddings require gradients",
    "print_trainable_parameters": "irrelevant: prints get_nb_trainable_parameters",
    "push_to_hub": "test_what_is_pushed_is_what_save_pretrained_writes",
    "save_pretrained": "test_core_and_frequencies_are_in_the_one_file_in_float32_without_the_word_lora",
    "set_adapter": "test_only_active_adapters_train_each_with_its_own_core",
    "set_requires_grad": "test_only_active_adapters_train_each_with_its_own_core",
    "supports_lora_conversion": "test_conversion_to_lora_is_refused",
}

FUNCTIONS = {
    "bloom_model_postprocess_past_key_value": "irrelevant: prompt learning",
    "cast_adapter_dtype": "test_a_half_precision_base_keeps_float32_adapters_and_its_own_output_dtype",
    "cast_mixed_precision_params": "test_mixed_precision_casting_keeps_a_training_core_in_float32",
    "compose_cartridge_adapters": "irrelevant: prompt learning",
    "convert_to_lora": "test_conversion_to_lora_is_refused",
    "create_arrow_model": "test_arrow_is_refused",
    "delete_adapter": "test_injected_nara_and_lora_adapters_mix",
    "find_kappa_target_modules": "irrelevant: reads base weights",
    "get_base_model_state_dict": "test_the_state_dict_of_the_base_model_has_no_trace_of_the_core",
    "get_eva_state_dict": "test_an_initialisation_that_cannot_work_is_refused_by_name",
    "get_layer_status": "test_status_and_counts_tell_of_every_adapter",
    "get_model_status": "test_status_and_counts_tell_of_every_adapter",
    "get_peft_config": "test_a_config_is_made_from_a_dictionary",
    "get_peft_model": "test_linear_layers_follow_the_formula_per_sample",
    "get_peft_model_state_dict": "test_injected_adapters_save_and_load_by_state_dict",
    "initialize_kv_prefix_from_past_key_values": "irrelevant: prompt learning",
    "initialize_kv_prefix_from_text": "irrelevant: prompt learning",
    "initialize_lora_eva_weights": "test_an_initialisation_that_cannot_work_is_refused_by_name",
    "inject_adapter_in_model": "test_injected_adapters_save_and_load_by_state_dict",
    "load_peft_weights": "test_a_differently_seeded_model_loads_the_same_bits",
    "prepare_model_for_kbit_training": "irrelevant: prepares a base model before it is adapted",
    "preprocess_loraga": "test_an_initialisation_that_cannot_work_is_refused_by_name",
    "prompt_embeddings_from_past_key_values": "irrelevant: prompt learning",
    "replace_lora_weights_loftq": "irrelevant: for plain LoRAs on 4-bit layers; reads and writes A and B alone",
    "save_as_lora": "test_conversion_to_lora_is_refused",
    "set_adapter": "test_injected_nara_and_lora_adapters_mix",
    "set_base_model_state_dict": "test_the_state_dict_of_the_base_model_has_no_trace_of_the_core",
    "set_peft_model_state_dict": "test_injected_adapters_save_and_load_by_state_dict",
    "set_requires_grad": "test_only_active_adapters_train_each_with_its_own_core",
    "shift_tokens_right": "irrelevant: token arithmetic",
    # helpers
    "check_if_peft_model": "irrelevant: reads a configuration file",
    "disable_input_dtype_casting": "test_under_layerwise_casting_the_update_is_as_exact_as_that_of_a_lora",
    "rescale_adapter_scale": "test_scales_multiply_the_update_and_not_the_deviation_of_the_core",
    "update_forward_signature": "irrelevant: documentation of a method",
    "update_generate_signature": "irrelevant: documentation of a method",
    "update_signature": "irrelevant: documentation of a method",
}


def public(*classes: type) -> set[str]:
    return {name for cls in classes for name in dir(cls) if not name.startswith("_") and name not in dir(nn.Module)}


def public_functions() -> set[str]:
    helpers = {n for n, v in vars(peft.helpers).items() if getattr(v, "__module__", "") == "peft.helpers"}
    names = {*peft.__all__, *peft.functional.__all__, *helpers}
    return {name for name in names if name[0].islower() and not name.startswith("_")}


@pytest.mark.parametrize(
    ("found", "table"),
    [
        (public(LoraModel), LORA_MODEL),
        (public(PeftModel, PeftModelForCausalLM), PEFT_MODEL),
        (public_functions(), FUNCTIONS),
    ],
    ids=["LoraModel", "PeftModel", "functions"],
)
def test_every_public_name_has_been_considered(found, table):
    assert found - table.keys() == set(), "new in PEFT: make it right or refuse it, and name the test"
    assert table.keys() - found == set(), "no longer in PEFT"


def test_nara_adds_no_public_method_of_its_own():
    assert public(NaraModel) == public(LoraModel)


# ---------------------------------------------------------------- refused


def test_weighted_sums_are_refused_for_cores_and_right_for_plain_loras():
    model = adapted(TwoLayers(), target_modules=TARGETS)
    for name in ("plain", "other"):
        model.add_adapter(name, nara_config(target_modules=TARGETS, core_type="identity"))
    disturb(model, seed=4)
    with pytest.raises(ValueError, match="add_weighted_adapter would ignore the core of adapter 'default'"):
        model.add_weighted_adapter(["plain", "default"], [0.5, 0.5], "sum")
    assert set(model.peft_config) == {"default", "plain", "other"}
    model.add_weighted_adapter(["plain", "other"], [0.5, 0.25], "sum", combination_type="cat")
    x = torch.randn(3, 7)
    model.set_adapter("sum")
    actual = model(x)
    layers = [m for m in model.modules() if hasattr(m, "set_scale")]
    model.base_model.set_adapter(["plain", "other"])
    for layer in layers:
        layer.set_scale("plain", 0.5)
        layer.set_scale("other", 0.25)
    torch.testing.assert_close(actual, model(x), rtol=1e-5, atol=1e-5)


def test_conversion_to_lora_is_refused(tmp_path):
    model = adapted(TwoLayers(), target_modules=TARGETS)
    assert model.supports_lora_conversion() is False
    assert model.base_model.supports_lora_conversion("default") is False
    with pytest.raises(ValueError, match=r"λ is not known.*export inside `with noise_level"):
        convert_to_lora(model, rank=2)
    with pytest.raises(ValueError, match=r"λ is not known.*export inside `with noise_level"):
        save_as_lora(tmp_path, model, rank=2)
    assert not list(tmp_path.iterdir())
    assert adapted(TwoLayers(), target_modules=TARGETS, core_type="identity").supports_lora_conversion() is True


def test_conversion_of_an_initialisation_is_refused(tmp_path):
    model = adapted(TwoLayers(), target_modules=TARGETS, init_lora_weights="pissa")
    model.save_pretrained(tmp_path / "initial")
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion would write the difference"):
        model.save_pretrained(tmp_path / "final", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert not list((tmp_path / "final").glob("*.safetensors"))
    with pytest.raises(ValueError, match="subtract_mutated_init would ignore the core"):
        model.base_model.subtract_mutated_init({}, "default", {})


def test_hot_swapping_is_refused_by_name(tmp_path):
    model = adapted(TwoLayers(), target_modules=TARGETS)
    model.save_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="NARA was passed"):
        hotswap_adapter(model, tmp_path, "default")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_reducing_intruder_dimensions_is_refused():
    model = adapted(TwoLayers(), target_modules=TARGETS)
    with pytest.raises(ValueError, match="not using LoRA"):
        reduce_intruder_dimension(model)


def test_arrow_is_refused(tmp_path, tiny_llama):
    model = adapted(tiny_llama, target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Cannot combine adapters.*core_type=\"identity\""):
        create_arrow_model(model.unload(), task_specific_adapter_paths=[str(tmp_path)], arrow_config=ArrowConfig())


def test_a_nara_model_takes_no_other_configuration():
    with pytest.raises(ValueError, match="'default' has a LoraConfig: NaraModel needs a NaraConfig"):
        NaraModel(TwoLayers(), {"default": LoraConfig(target_modules=["first"])}, "default")


# ---------------------------------------------------------------- right


def test_default_target_modules_are_those_of_lora(tiny_llama):
    model = get_peft_model(tiny_llama, nara_config())
    assert {n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "lora_A")} == {"q_proj", "v_proj"}


def test_properties_of_the_wrapper(tiny_llama):
    model = adapted(tiny_llama.to(torch.bfloat16), target_modules=["q_proj"])
    assert model.active_peft_config is model.peft_config["default"]
    assert model.get_base_model() is tiny_llama
    assert model.base_model_torch_dtype == torch.bfloat16
    assert model.has_active_enabled_adapter
    assert isinstance(model.base_model, NaraModel)


def test_what_is_pushed_is_what_save_pretrained_writes(tmp_path, monkeypatch):
    model = adapted(TwoLayers(), target_modules=TARGETS)
    model.save_pretrained(tmp_path)
    pushed: dict[str, bytes] = {}

    def upload(self: Any, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> None:
        pushed.update({path.name: path.read_bytes() for path in Path(working_dir).iterdir()})

    hub = SimpleNamespace(create_repo=lambda repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(PeftModel, "_upload_modified_files", upload)
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda *args, **kwargs: hub)
    model.push_to_hub("somebody/adapter")
    assert pushed["adapter_model.safetensors"] == (tmp_path / "adapter_model.safetensors").read_bytes()
    assert b'"NARA"' in pushed["adapter_config.json"]


def test_mixed_precision_casting_keeps_a_training_core_in_float32():
    model = adapted(TwoLayers(), target_modules=TARGETS)
    peft.cast_mixed_precision_params(model, torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if "nara_core" in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "base_layer" in n} == {torch.bfloat16}


def test_a_config_is_made_from_a_dictionary():
    config = peft.get_peft_config({"peft_type": "NARA", "r": 3, "core_scale": 0.5, "target_modules": TARGETS})
    assert config == nara_config(
        r=3, lora_alpha=8, core_scale=0.5, target_modules=TARGETS, core_hidden_dims=(256, 512), noise_embedding_dim=64
    )


def test_the_cache_of_dora_is_not_stale():
    model = adapted(TwoLayers(), target_modules=TARGETS, use_dora=True)
    x = torch.randn(3, 7)
    with noise_level(model, LEVELS):
        expected = model(x)
        with DoraCaching():
            assert torch.equal(model(x), expected)
        with DoraCaching(), noise_level(model, LEVELS.flip(0)):
            other = model(x)
        assert not torch.equal(other, expected)
        assert torch.equal(model(x), expected)
