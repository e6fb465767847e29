"""Adapters in the LLaDA pipeline answer as in PEFT: loaded, mixed, switched, scaled, offloaded and unloaded."""

from __future__ import annotations

import json
import logging
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors import safe_open
from torch import Tensor

from nara_diffusion import NaraConfig, StrengthSchedule, core_matrix, noise_level, set_strength
from nara_diffusion.dllm import load_backbone
from pipelines.llada import LLaDAPipeline

from .llada_answers import LENGTH, MODEL, QUESTIONS, by_generate, loaded_pipeline, states

FALLING = StrengthSchedule([(0, 1.0), (1, 0.2)])
IDS = torch.randint(0, 200, (1, 9), generator=torch.Generator().manual_seed(1))
LEVELS = (0.25, 0.9)
assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-4)


@pytest.fixture
def pipe() -> LLaDAPipeline:
    return loaded_pipeline()


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A folder as train_scripts/dllm.py writes it, whose adapter changes answers, by λ too."""
    return save_adapter(tmp_path / "adapter", seed=7)


def save_adapter(folder: Path, seed: int, **options) -> Path:
    adapted(seed, **options).save_pretrained(folder)
    return folder


def adapted(seed: int, **options) -> PeftModel:
    model, _ = load_backbone(str(MODEL))
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "core_hidden_dims": (8, 8), **options}
    model = get_peft_model(model, NaraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def test_the_adapter_of_a_training_run_answers_as_in_peft(pipe, adapter):
    base = pipe(QUESTIONS, **LENGTH).sequences
    before = states(pipe)
    pipe.load_nara_weights(adapter)
    model = PeftModel.from_pretrained(load_backbone(str(MODEL))[0], adapter)
    expected = by_generate(model, pipe.tokenizer)
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, expected)
    assert not torch.equal(expected, base)
    pipe.unload_nara_weights()
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, base)
    assert states(pipe).keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in states(pipe).items())


def test_each_step_is_answered_at_its_own_noise_level(pipe, adapter):
    pipe.load_nara_weights(adapter)
    seen = []
    layer = pipe.transformer.model.layers[0].self_attn.q_proj
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    told = []
    result = pipe(QUESTIONS, **LENGTH, callback_on_step_end=lambda pipe, step, level, tensors: told.append(level))
    hook.remove()
    assert len(told) == len(seen) == result.forwards
    assert told[0].tolist() == [1.0, 1.0, 1.0]
    assert all((later <= earlier).all() for earlier, later in pairwise(told))


def test_adapters_are_saved_mixed_and_switched(pipe, adapter, tmp_path):
    second = save_adapter(tmp_path / "second", seed=8, r=4)
    base = pipe(QUESTIONS, **LENGTH).sequences
    pipe.load_nara_weights(adapter, adapter_name="first")
    first = pipe(QUESTIONS, **LENGTH).sequences
    pipe.load_nara_weights(second, adapter_name="second")
    pipe.set_adapters("second")
    assert pipe.get_active_adapters() == ["second"]
    alone = pipe(QUESTIONS, **LENGTH).sequences
    pipe.set_adapters(["first", "second"], [1.0, 0.0])
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, first)
    pipe.set_adapters(["first", "second"], [0.0, 1.0])
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, alone)
    pipe.save_nara_weights(tmp_path / "saved", "second")
    pipe.disable_lora()
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, base)
    pipe.enable_lora()
    pipe.delete_adapters("first")
    assert pipe.get_list_adapters() == {"transformer": ["second"]}
    pipe.unload_lora_weights()
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, base)
    fresh = LLaDAPipeline.from_pretrained(MODEL)
    fresh.set_progress_bar_config(disable=True)
    fresh.load_nara_weights(tmp_path / "saved")
    assert torch.equal(fresh(QUESTIONS, **LENGTH).sequences, alone)
    assert len({tuple(found.flatten().tolist()) for found in (base, first, alone)}) == 3


def test_half_an_adapter_is_half_its_update(pipe, adapter):
    pipe.load_nara_weights(adapter, adapter_name="weak")
    pipe.set_adapters("weak", 0.5)
    model = PeftModel.from_pretrained(load_backbone(str(MODEL))[0], adapter)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.5
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, by_generate(model, pipe.tokenizer))


def test_offload_gives_the_same_answers(pipe, adapter):
    pipe.load_nara_weights(adapter)
    expected = pipe(QUESTIONS, **LENGTH).sequences
    pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipe.transformer, "_hf_hook")
    for _ in range(2):
        assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, expected)


# ---------------------------------------------------------------------- strengths


def falling(level: float) -> float:
    """FALLING by hand."""
    return 1 - 0.8 * level


def logits(model: Any, level: float) -> Tensor:
    with torch.no_grad(), noise_level(model, level):
        return model(IDS).logits


def by_factors(folders: dict[Path, float], level: float) -> Tensor:
    """The logits of the base whose weights have each adapter's s · α/r · B C(λ) A, from its file in PEFT."""
    base = load_backbone(str(MODEL))[0]
    for folder, factor in folders.items():
        add_update(base, PeftModel.from_pretrained(load_backbone(str(MODEL))[0], folder), level, factor)
    with torch.no_grad():
        return base(IDS).logits


@torch.no_grad()
def add_update(base: Any, adapted: PeftModel, level: float, factor: float = 1.0) -> None:
    core = core_matrix(adapted, level)[0]
    for name, layer in adapted.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            base.get_submodule(name).weight += factor * layer.scaling["default"] * B @ core @ A


@pytest.mark.parametrize("given", ["by its file", "by set_strength", "by set_adapters"])
@pytest.mark.parametrize(("weight", "factor"), [(None, 1.0), (1.0, 1.0), (0.5, 0.5), ({"transformer": 0.5}, 0.5)])
def test_a_number_or_none_multiplies_the_schedule(given, weight, factor, pipe, adapter, tmp_path):
    source = save_adapter(tmp_path / "s", seed=7, strength=[[0, 1.0], [1, 0.2]]) if given == "by its file" else adapter
    pipe.load_nara_weights(source, adapter_name="a")
    if given == "by set_strength":
        set_strength(pipe.transformer, "a", FALLING)
    elif given == "by set_adapters":
        pipe.set_adapters("a", FALLING)
    for level in LEVELS:
        assert_close(logits(pipe.transformer, level), by_factors({source: falling(level)}, level))
    pipe.set_adapters("a", weight)
    for level in LEVELS:
        assert_close(logits(pipe.transformer, level), by_factors({source: factor * falling(level)}, level))


@pytest.mark.parametrize(
    ("weights", "factors"),
    [
        (FALLING, (falling, falling)),
        ([FALLING, 0.5], (falling, lambda level: 0.5)),
        ([None, FALLING], (lambda level: 1.0, falling)),
        ([{"transformer": FALLING}, {"transformer": 0.5}], (falling, lambda level: 0.5)),
    ],
)
def test_a_schedule_stands_wherever_a_weight_does(weights, factors, pipe, adapter, tmp_path):
    folders = adapter, save_adapter(tmp_path / "second", seed=8, r=4)
    for name, folder in zip("ab", folders, strict=True):
        pipe.load_nara_weights(folder, adapter_name=name)
    pipe.set_adapters(["a", "b"], weights)
    assert pipe.get_active_adapters() == ["a", "b"]
    for level in LEVELS:
        expected = by_factors({of: factor(level) for of, factor in zip(folders, factors, strict=True)}, level)
        assert_close(logits(pipe.transformer, level), expected)


def test_a_schedule_by_block_and_for_a_plain_lora(pipe):
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=False)
    inject_adapter_in_model(config, pipe.transformer, "plain")
    pipe.set_adapters("plain", {"transformer": {"layers.0.": FALLING, "layers.": 0.5}})
    for level in LEVELS:
        found = logits(pipe.transformer, level)
        set_strength(pipe.transformer, "plain", None)
        pipe.set_adapters("plain", {"transformer": {"layers.0.": falling(level), "layers.": 0.5}})
        with torch.no_grad():  # a LoRA that needs no λ
            assert_close(found, pipe.transformer(IDS).logits)
        pipe.set_adapters("plain", {"transformer": {"layers.0.": FALLING, "layers.": 0.5}})
    with pytest.raises(ValueError, match=r"adapter_weights names 'blocks\.0'"):
        pipe.set_adapters("plain", {"transformer": {"blocks.0": FALLING}})


def test_the_schedule_that_is_saved_follows(pipe, adapter, tmp_path):
    pipe.load_nara_weights(adapter, adapter_name="a")
    pipe.set_adapters("a", FALLING)
    pipe.set_adapters("a", 0.5)  # for now
    pipe.save_nara_weights(tmp_path / "saved")
    with safe_open(next((tmp_path / "saved").glob("*.safetensors")), "pt") as file:
        saved = json.loads(file.metadata()["nara_adapter_metadata"])
    assert saved["components"]["transformer"]["strength"] == [[0.0, 1.0], [1.0, 0.2]]
    for level in LEVELS:
        assert_close(logits(pipe.transformer, level), by_factors({adapter: 0.5 * falling(level)}, level))


# ---------------------------------------------------------------------- fusing


def fused_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "is fused at" in record.getMessage()]


def test_fused_at_one_level_it_says_so_once_and_answers_by_that_core(pipe, adapter, caplog):
    pipe.load_nara_weights(adapter, adapter_name="a")
    free = pipe(QUESTIONS, **LENGTH).sequences
    with caplog.at_level(logging.WARNING):
        with noise_level(pipe.transformer, 0.3):
            pipe.fuse_lora(components=["transformer"])
        fused = pipe(QUESTIONS, **LENGTH).sequences
    (message,) = fused_warnings(caplog)
    assert "'a' is fused at noise_level 0.3: until unfuse_lora() every step runs at the C of that λ" in message
    base = load_backbone(str(MODEL))[0]
    add_update(base, PeftModel.from_pretrained(load_backbone(str(MODEL))[0], adapter), 0.3)
    assert torch.equal(fused, by_generate(base, pipe.tokenizer))
    assert not torch.equal(fused, free)
    with pytest.raises(ValueError, match=r"merged at noise_level 0\.3"):  # as after fuse_lora of images
        logits(pipe.transformer, 0.9)
    pipe.unfuse_lora(components=["transformer"])
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, free)


def test_an_adapter_of_other_layers_beside_a_fused_one_runs_at_the_level_of_each_step(pipe, tmp_path):
    folders = [save_adapter(tmp_path / name, seed=7, target_modules=[f"{name}_proj"]) for name in "qv"]
    for name, folder in zip("qv", folders, strict=True):
        pipe.load_nara_weights(folder, adapter_name=name)
    pipe.set_adapters(["q", "v"])
    with noise_level(pipe.transformer, 0.3):
        pipe.fuse_lora(components=["transformer"], adapter_names=["q"])
    base, fused = (load_backbone(str(MODEL))[0] for _ in range(2))
    add_update(base, PeftModel.from_pretrained(fused, folders[0]), 0.3)
    expected = by_generate(PeftModel.from_pretrained(base, folders[1]), pipe.tokenizer)
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, expected)


def test_fusing_an_adapter_without_a_level_says_nothing(pipe, tmp_path, caplog):
    pipe.load_nara_weights(save_adapter(tmp_path / "fixed", seed=7, core_type="constant"))
    expected = pipe(QUESTIONS, **LENGTH).sequences
    with caplog.at_level(logging.WARNING):
        pipe.fuse_lora(components=["transformer"])
        assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, expected)
    assert not fused_warnings(caplog)
