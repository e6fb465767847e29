"""What an adapter's file holds, that it loads bit by bit, and that anything else is refused by key."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from nara_diffusion import core_matrix, noise_level
from tests.adapted import OneLayer, TwoLayers, adapted, disturb, lora_config, nara_config

LEVELS = torch.tensor([0.05, 0.5, 0.93])
TARGETS = ["first", "second"]
WEIGHTS = "adapter_model.safetensors"
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


def base_model() -> TwoLayers:
    torch.manual_seed(7)
    return TwoLayers()


def saved(path: Path, **options: Any) -> PeftModel:
    model = adapted(base_model(), target_modules=TARGETS, **options)
    model.save_pretrained(path)
    return model


def reseeded_base() -> TwoLayers:
    """The same base model, after which the generator is somewhere else."""
    base = base_model()
    torch.manual_seed(12345)
    return base


def output(model: nn.Module, x: Tensor) -> Tensor:
    with noise_level(model, LEVELS, mask_density=LEVELS.flip(0)), torch.no_grad():
        return model(x)


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / WEIGHTS)


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


def test_another_process_loads_the_same_bits(tmp_path):
    model = saved(tmp_path / "adapter")
    x = torch.randn(3, 7)
    torch.save({"base": base_model().state_dict(), "x": x}, tmp_path / "given.pt")
    program = """
import sys, torch
from peft import PeftModel
from nara_diffusion import noise_level
from tests.adapted import TwoLayers
torch.manual_seed(99)
given = torch.load(sys.argv[1] + "/given.pt")
base = TwoLayers()
base.load_state_dict(given["base"])
model = PeftModel.from_pretrained(base, sys.argv[1] + "/adapter")
with noise_level(model, torch.tensor([0.05, 0.5, 0.93])), torch.no_grad():
    torch.save({"y": model(given["x"]), "state": model.state_dict()}, sys.argv[1] + "/made.pt")
"""
    root = Path(__file__).parents[1]
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
        f"base_model.model.nara_core.global.{name}"
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


# ---------------------------------------------------------------- several adapters, and their names


def test_two_adapters_save_each_its_own_and_load_under_any_name(tmp_path):
    model = saved(tmp_path / "unused")
    model.add_adapter("other", nara_config(r=2, core_hidden_dims=(5,), target_modules=["first"]))
    disturb(model, seed=3)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "other" / WEIGHTS)
    assert len(tensors) == 2 + 2 * 2 + 1
    assert len(load_file(tmp_path / WEIGHTS)) == 2 * 2 + 7
    loaded = PeftModel.from_pretrained(reseeded_base(), tmp_path / "other", adapter_name="renamed")
    loaded.load_adapter(tmp_path, adapter_name="another")
    x = torch.randn(3, 7)
    for theirs, ours in (("renamed", "other"), ("another", "default")):
        loaded.set_adapter(theirs)
        model.set_adapter(ours)
        assert torch.equal(output(loaded, x), output(model, x))
    loaded.base_model.set_adapter(["renamed", "another"])
    model.base_model.set_adapter(["other", "default"])
    assert torch.equal(output(loaded, x), output(model, x))


def test_selected_adapters_alone_are_saved(tmp_path):
    model = adapted(base_model(), target_modules=TARGETS)
    model.add_adapter("other", nara_config(target_modules=["first"]))
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert (tmp_path / "other" / WEIGHTS).exists()
    assert not (tmp_path / WEIGHTS).exists()


PARTS_OF_A_KEY = [
    *("nara_core", "cores", "global", "embeddings", "noise_level", "frequencies", "layers", "0", "weight", "bias"),
    *("first", "lora_A", "model"),
]


@pytest.mark.parametrize("name", PARTS_OF_A_KEY)
def test_an_adapter_named_like_a_part_of_a_key_is_saved_and_loaded_alone(tmp_path, name):
    model = get_peft_model(base_model(), nara_config(target_modules=TARGETS), adapter_name=name)
    disturb(model)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / name / WEIGHTS)) == 2 * 2 + 7
    for adapter_name in (name, "default"):
        other = PeftModel.from_pretrained(reseeded_base(), tmp_path / name, adapter_name=adapter_name)
        x = torch.randn(3, 7)
        assert torch.equal(output(other, x), output(model, x))


@pytest.mark.parametrize("name", PARTS_OF_A_KEY)
@pytest.mark.parametrize("clashing_first", [False, True])
def test_beside_another_adapter_such_a_name_is_refused_when_it_is_added(name, clashing_first):
    names = [name, "default"] if clashing_first else ["default", name]
    model = get_peft_model(base_model(), nara_config(target_modules=TARGETS), adapter_name=names[0])
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match=f"adapter '{name}' is named like a part of"):
        model.add_adapter(names[1], nara_config(target_modules=["first"]))
    assert model.state_dict().keys() == before
    assert set(model.peft_config) == {names[0]}


def test_a_name_that_begins_like_another_is_not_confused_with_it(tmp_path):
    model = get_peft_model(base_model(), nara_config(target_modules=TARGETS), adapter_name="x")
    model.add_adapter("xy", nara_config(target_modules=TARGETS))
    model.add_adapter("y_x", nara_config(target_modules=TARGETS, core_type="constant"))
    disturb(model)
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 7)
    for name, count in (("x", 11), ("xy", 11), ("y_x", 5)):
        assert len(load_file(tmp_path / name / WEIGHTS)) == count
        other = PeftModel.from_pretrained(reseeded_base(), tmp_path / name)
        model.set_adapter(name)
        assert torch.equal(output(other, x), output(model, x))


# ---------------------------------------------------------------- refused


CORE = "base_model.model.nara_core.global."
A_KEY = "base_model.model.first.lora_A.weight"

BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no core": (lambda t: [t.pop(k) for k in list(t) if k.startswith(CORE)], r"lacks '.*nara_core.*and 4 more tensors"),
    "no frequencies": (
        lambda t: t.pop(CORE + "embeddings.noise_level.frequencies"),
        r"lacks '.*nara_core\.cores\.default\.global\.embeddings\.noise_level\.frequencies'",
    ),
    "a missing bias": (lambda t: t.pop(CORE + "layers.1.bias"), r"lacks '.*global\.layers\.1\.bias'\."),
    "a missing A": (lambda t: t.pop(A_KEY), r"lacks '.*first\.lora_A\.default\.weight'"),
    "an extra key": (
        lambda t: t.update({CORE + "layers.7.weight": torch.ones(2)}),
        r"holds '.*layers\.7\.weight', which",
    ),
    "an extra layer": (
        lambda t: t.update({"base_model.model.third.lora_A.weight": torch.ones(4, 7)}),
        r"holds 'base_model\.model\.third\.lora_A\.weight', which this adapter does not have",
    ),
    "a misshapen core": (
        lambda t: t.update({CORE + "layers.0.weight": torch.ones(9, 6)}),
        r"'.*layers\.0\.weight' has shape \(9, 6\) in the checkpoint, but this adapter needs \(9, 8\)",
    ),
    "misshapen frequencies": (
        lambda t: t.update({CORE + "embeddings.noise_level.frequencies": torch.ones(5)}),
        r"frequencies' has shape \(5,\)",
    ),
    "a misshapen A": (lambda t: t.update({A_KEY: torch.ones(3, 7)}), r"lora_A\.default\.weight' has shape \(3, 7\)"),
    "NaN in the core": (
        lambda t: t[CORE + "layers.1.weight"].fill_(float("nan")),
        r"'.*layers\.1\.weight' holds NaN or infinity",
    ),
    "infinity in A": (lambda t: t[A_KEY].fill_(float("inf")), r"lora_A\.default\.weight' holds NaN or infinity"),
    "a core in float16": (
        lambda t: t.update({CORE + "layers.1.weight": t[CORE + "layers.1.weight"].half()}),
        r"'.*layers\.1\.weight' is torch\.float16 in the checkpoint, but a core is kept in float32",
    ),
    "frequencies in bfloat16": (
        lambda t: t.update({CORE + "embeddings.noise_level.frequencies": torch.ones(4).bfloat16()}),
        r"frequencies' is torch\.bfloat16",
    ),
}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_by_key(tmp_path, change, message, low_cpu_mem_usage):
    saved(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(reseeded_base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize("change", [{"core_type": "constant"}, {"noise_embedding": "mlp"}, {"core_input": "both"}])
@pytest.mark.parametrize("swap", [False, True])
def test_weights_of_another_kind_of_core_are_refused(tmp_path, change, swap):
    written, read = ({}, change) if not swap else (change, {})
    saved(tmp_path, **written)
    nara_config(target_modules=TARGETS, **read).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"(lacks|holds) '.*nara_core.*core_type, core_sharing, core_input"):
        PeftModel.from_pretrained(reseeded_base(), tmp_path)


def test_weights_of_a_plain_lora_are_refused_as_nara(tmp_path):
    saved(tmp_path, core_type="identity")
    nara_config(target_modules=TARGETS).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks '.*nara_core"):
        PeftModel.from_pretrained(reseeded_base(), tmp_path)


def test_a_refused_file_changes_no_tensor_of_a_model_that_has_adapters_already(tmp_path):
    saved(tmp_path)
    rewrite(tmp_path, BROKEN["no frequencies"][0])
    model = adapted(base_model(), target_modules=TARGETS)
    x = torch.randn(3, 7)
    before, expected = {n: t.clone() for n, t in model.state_dict().items()}, output(model, x)
    with pytest.raises(ValueError, match="frequencies"):
        model.load_adapter(tmp_path, adapter_name="other")
    with pytest.raises(ValueError, match="frequencies"):
        model.load_adapter(tmp_path, adapter_name="default")  # over the one that is there
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(output(model, x), expected)


def test_the_base_model_keeps_its_weights_when_a_file_is_refused(tmp_path):
    saved(tmp_path)
    rewrite(tmp_path, BROKEN["no core"][0])
    base = reseeded_base()
    before = dict(base.named_parameters())
    with pytest.raises(ValueError, match="lacks"):
        PeftModel.from_pretrained(base, tmp_path)
    after = {name.replace("base_layer.", ""): p for name, p in base.named_parameters()}
    assert all(after[name] is p for name, p in before.items())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_after_a_refused_file_the_model_gives_no_output_of_a_fresh_core_and_takes_a_good_file(tmp_path):
    model = saved(tmp_path)
    good = load_file(tmp_path / WEIGHTS)
    rewrite(tmp_path, BROKEN["no frequencies"][0])
    base = reseeded_base()
    x = torch.randn(3, 7)
    with pytest.raises(ValueError, match="frequencies"):
        PeftModel.from_pretrained(base, tmp_path)
    with pytest.raises(ValueError, match="λ is not known"):
        base(x)
    save_file(good, tmp_path / WEIGHTS)
    assert torch.equal(output(PeftModel.from_pretrained(base, tmp_path), x), output(model, x))


@pytest.mark.parametrize("core_type", ["hypernetwork", "identity"])
def test_an_adapter_is_not_saved_as_a_lora(tmp_path, core_type):
    from tests.test_core import tiny_unet

    unet = tiny_unet()
    unet.add_adapter(nara_config(target_modules=["to_q"], core_type=core_type))
    with pytest.raises(ValueError, match=r"'default' is a NaRA, .* pipe.save_nara_weights"):
        unet.save_lora_adapter(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    plain = tiny_unet()
    plain.add_adapter(lora_config(target_modules=["to_q"]))
    plain.save_lora_adapter(tmp_path)
    tiny_unet().load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")


def test_the_tensors_of_an_adapter_are_not_taken_for_a_lora(tmp_path):
    from tests.test_core import tiny_unet

    unet = tiny_unet()
    unet.add_adapter(nara_config(target_modules=["to_q"]))
    save_file(get_peft_model_state_dict(unet), tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=r"holds a NaRA adapter, .* load it by pipe.load_nara_weights"):
        tiny_unet().load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")


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
    state.pop("nara_core.global.embeddings.noise_level.frequencies")
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


# ---------------------------------------------------------------- copies


def through_pickle(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["injected", "PeftModel"])
def test_a_copy_works_and_is_independent(copy_of, wrapped):
    model: nn.Module = adapted(base_model(), target_modules=TARGETS)
    if not wrapped:
        model = model.base_model.model  # type: ignore[union-attr, assignment]
    x = torch.randn(3, 7)
    expected = output(model, x)
    twin = copy_of(model)
    assert torch.equal(output(twin, x), expected)
    disturb(twin, seed=9)
    changed = output(twin, x)
    assert not torch.equal(changed, expected)
    assert torch.equal(output(model, x), expected)
    with noise_level(model, LEVELS):
        with pytest.raises(ValueError, match="λ is not known"):
            twin(x)  # the level of the original is not that of the copy
        with noise_level(twin, LEVELS.flip(0)):
            assert torch.equal(model(x), expected)
    output_of_twin = output(twin, x)
    del model
    assert torch.equal(output(twin, x), output_of_twin)


def test_a_copy_made_while_a_level_is_set_does_not_have_it():
    model = adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"])
    with noise_level(model, 0.4):
        twin = copy.deepcopy(model)
        with pytest.raises(ValueError, match="λ is not known"):
            twin(torch.randn(2, 7))
