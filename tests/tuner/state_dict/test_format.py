"""What an adapter's file holds, and that a differently seeded model or another process loads it bit by bit."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from nara_diffusion import core_matrix, noise_level
from tests.helpers.adapted import adapted, disturb, nara_config
from tests.helpers.files.saved_adapters import LEVELS, TARGETS, WEIGHTS, base_model, output, reseeded_base, saved

CORES: dict[str, dict[str, Any]] = {
    "fourier": {},
    "mlp": {"noise_embedding": "mlp"},
    "raw": {"noise_embedding": "raw"},
    "density": {"core_input": "both"},
    "constant": {"core_type": "constant"},
    "identity": {"core_type": "identity"},
    "by type": {"core_sharing": "module_type"},
    "by layer": {"core_sharing": "layer"},
    "DoRA": {"use_dora": True},
    "ranks": {"rank_pattern": {"second": 2}},
}

# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize("options", CORES.values(), ids=CORES)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
def test_a_differently_seeded_model_loads_the_same_bits(tmp_path, options, low_cpu_mem_usage):
    model = saved(tmp_path, **options)
    other = PeftModel.from_pretrained(reseeded_base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    expected, actual = model.state_dict(), other.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
        assert actual[name].dtype == tensor.dtype
    x = torch.randn(3, 7)
    assert torch.equal(output(other, x), output(model, x))
    assert not any(p.requires_grad for p in other.parameters())


def test_a_file_that_calls_the_shared_core_global_loads_the_same_bits(tmp_path):
    """As all files did until `global`, a keyword of Python, kept models from being exported."""
    model = saved(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    old = {name.replace("nara_core.shared.", "nara_core.global."): tensor for name, tensor in tensors.items()}
    assert old.keys() != tensors.keys()
    save_file(old, tmp_path / WEIGHTS)
    other = PeftModel.from_pretrained(reseeded_base(), tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    save_file({name: tensor.clone() for name, tensor in (old | tensors).items()}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="holds the shared core twice"):
        PeftModel.from_pretrained(reseeded_base(), tmp_path)


def test_another_process_loads_the_same_bits(tmp_path):
    model = saved(tmp_path / "adapter")
    x = torch.randn(3, 7)
    torch.save({"base": base_model().state_dict(), "x": x}, tmp_path / "given.pt")
    program = """
import sys, torch
from peft import PeftModel
from nara_diffusion import noise_level
from tests.helpers.adapted import TwoLayers
torch.manual_seed(99)
given = torch.load(sys.argv[1] + "/given.pt")
base = TwoLayers()
base.load_state_dict(given["base"])
model = PeftModel.from_pretrained(base, sys.argv[1] + "/adapter")
with noise_level(model, torch.tensor([0.05, 0.5, 0.93])), torch.no_grad():
    torch.save({"y": model(given["x"]), "state": model.state_dict()}, sys.argv[1] + "/made.pt")
"""
    root = Path(__file__).parents[3]
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        check=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    made = torch.load(tmp_path / "made.pt")
    assert torch.equal(made["y"], output(model, x))
    for name, tensor in model.state_dict().items():
        assert torch.equal(made["state"][name], tensor), name


def test_loading_to_train_makes_adapter_and_core_trainable(tmp_path):
    model = saved(tmp_path)
    other = PeftModel.from_pretrained(reseeded_base(), tmp_path, is_trainable=True)
    trainable = {name for name, p in other.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in model.named_parameters() if "lora_" in name or "nara_core" in name}


def test_a_causal_language_model_loads_by_auto_class(tmp_path, tiny_llama):
    tiny_llama.save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")
    other = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = torch.randint(49, (2, 5))
    with noise_level(model, 0.3), noise_level(other, 0.3):
        assert torch.equal(model(ids).logits, other(ids).logits)


# ---------------------------------------------------------------- what is in the file


def test_core_and_frequencies_are_in_the_one_file_in_float32_without_the_word_lora(tmp_path):
    model = saved(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, "adapter_config.json", "README.md"}
    tensors = load_file(tmp_path / WEIGHTS)
    core = {name: tensor for name, tensor in tensors.items() if "core" in name}
    assert len(tensors) == 2 * 2 + 7  # A and B of two layers; three Dense and the frequencies
    assert set(core) == {
        f"base_model.model.nara_core.shared.{name}"
        for name in (
            "embeddings.noise_level.frequencies",
            *(f"layers.{index}.{kind}" for index in range(3) for kind in ("weight", "bias")),
        )
    }
    assert all(tensor.dtype == torch.float32 for tensor in core.values())
    assert not any("lora" in name for name in core)
    assert not any("default" in name for name in tensors)
    for name, tensor in core.items():
        key = name.replace("nara_core.", "nara_core.cores.default.")
        assert torch.equal(tensor, model.state_dict()[key])


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_saves_its_core_in_float32(tmp_path, cast):
    model = adapted(base_model(), target_modules=TARGETS)
    exact = core_matrix(model, LEVELS)
    model.to(cast).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert {t.dtype for n, t in tensors.items() if "core" in n} == {torch.float32}
    other = PeftModel.from_pretrained(reseeded_base().to(cast), tmp_path)
    assert torch.equal(core_matrix(other, LEVELS), exact)


def test_modules_to_save_biases_and_trainable_tokens_travel_with_the_adapter(tmp_path, tiny_llama):
    state = copy.deepcopy(tiny_llama.state_dict())
    model = adapted(tiny_llama, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[3, 49])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "trainable_tokens_delta" in name:
                p.normal_()
    model.save_pretrained(tmp_path)
    base = LlamaForCausalLM(tiny_llama.config).eval()
    base.load_state_dict(state)
    other = PeftModel.from_pretrained(base, tmp_path)
    ids = torch.randint(50, (3, 6))
    with noise_level(model, LEVELS), noise_level(other, LEVELS):
        assert torch.equal(model(ids).logits, other(ids).logits)
    assert len(load_file(tmp_path / WEIGHTS)) == 2 * 2 + 7 + 2  # and the output head and the rows of two tokens


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_of_the_base_model_travel_with_the_adapter(tmp_path, bias):
    model = adapted(base_model(), target_modules=["first"], bias=bias)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias") and "core" not in n}
    expected = {"base_model.model.first.base_layer.bias"}
    assert trainable == (expected if bias == "lora_only" else expected | {"base_model.model.second.bias"})
    for name in trainable:
        model.state_dict()[name].add_(1)
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(reseeded_base(), tmp_path)
    x = torch.randn(3, 7)
    assert torch.equal(output(other, x), output(model, x))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_an_adapted_embedding_travels_with_its_base_weight(tmp_path, tiny_llama):
    state = copy.deepcopy(tiny_llama.state_dict())
    model = adapted(tiny_llama, target_modules=["embed_tokens", "v_proj"])
    model.save_pretrained(tmp_path)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(tmp_path / WEIGHTS)
    base = LlamaForCausalLM(tiny_llama.config).eval()
    base.load_state_dict(state)
    other = PeftModel.from_pretrained(base, tmp_path)
    ids = torch.randint(50, (3, 6))
    with noise_level(model, LEVELS), noise_level(other, LEVELS):
        assert torch.equal(model(ids).logits, other(ids).logits)


# ---------------------------------------------------------------- the functions below PeftModel


def test_injected_adapters_save_and_load_by_state_dict():
    model = inject_adapter_in_model(nara_config(target_modules=TARGETS), base_model())
    disturb(model)
    state = get_peft_model_state_dict(model)
    assert len(state) == 2 * 2 + 7
    other = inject_adapter_in_model(nara_config(target_modules=TARGETS), reseeded_base())
    set_peft_model_state_dict(other, state)
    x = torch.randn(3, 7)
    assert torch.equal(output(other, x), output(model, x))
    state.pop("nara_core.shared.embeddings.noise_level.frequencies")
    with pytest.raises(ValueError, match=r"lacks '.*frequencies'"):
        set_peft_model_state_dict(other, state)


def test_an_adapter_may_be_injected_from_the_keys_of_its_state_dict():
    model = inject_adapter_in_model(nara_config(target_modules=["first"]), base_model())
    disturb(model)
    state = get_peft_model_state_dict(model)
    other = inject_adapter_in_model(
        nara_config(target_modules=["first"]), reseeded_base(), state_dict=state, low_cpu_mem_usage=True
    )
    set_peft_model_state_dict(other, state, low_cpu_mem_usage=True)
    x = torch.randn(3, 7)
    assert torch.equal(output(other, x), output(model, x))
    assert not any(tensor.is_meta for tensor in other.state_dict().values())


def test_the_state_dict_of_the_base_model_has_no_trace_of_the_core():
    from peft.utils.save_and_load import get_base_model_state_dict, set_base_model_state_dict

    base = base_model()
    expected = copy.deepcopy(base.state_dict())
    model = adapted(base, target_modules=TARGETS)
    actual = get_base_model_state_dict(model)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    set_base_model_state_dict(model, {name: tensor + 1 for name, tensor in expected.items()})
    assert torch.equal(get_base_model_state_dict(model)["second.bias"], expected["second.bias"] + 1)
