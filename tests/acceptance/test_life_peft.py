"""What PEFT does with adapters does to a NaRA what it does to a LoRA, at each sample's λ."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from nara_diffusion import noise_level
from tests.acceptance._by_hand import LEVELS, assert_near, disturb
from tests.acceptance._twins import X, adapted, by_hand, lora_config, nara_config, run, two, with_second
from tests.helpers import adapted as tiny
from tests.helpers.rounding import assert_far

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already unmerged"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
]
DEFAULT = [["default"]] * 3
WEIGHTS = "adapter_model.safetensors"


def ids_of_trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def two_elsewhere() -> nn.Module:
    """The same base, after which another draw is at hand, should anything of an adapter be drawn anew."""
    base = two()
    torch.manual_seed(77)
    return base


STEPS: dict[str, Callable[[Any], Any]] = {
    "set_adapter": lambda model: model.set_adapter("default"),
    "merge_adapter": lambda model: model.merge_adapter(),
    "unmerge_adapter": lambda model: model.unmerge_adapter(),
    "both": lambda model: model.base_model.set_adapter(["default", "other"]),
    "merge both": lambda model: model.merge_adapter(["other", "default"]),
    "unmerge both": lambda model: model.unmerge_adapter(),
    "delete_adapter": lambda model: model.delete_adapter("other"),
    "disable": lambda model: model.base_model.disable_adapter_layers(),
    "enable": lambda model: model.base_model.enable_adapter_layers(),
    "merge_and_unload": lambda model: model.merge_and_unload(),
}


def test_identity_core_equals_peft_lora_over_a_life() -> None:
    second = {"r": 3, "target_modules": ["first"]}
    nara, lora = get_peft_model(two(), nara_config(core_type="identity")), get_peft_model(two(), lora_config())
    nara.add_adapter("other", nara_config(core_type="identity", **second))
    lora.add_adapter("other", lora_config(**second))
    for model in (nara, lora):
        disturb(model, "default", seed=1)
        disturb(model, "other", seed=2)
    assert_near(nara(X), lora(X))
    for name, step in STEPS.items():
        results = [step(model) for model in (nara, lora)]
        if name == "merge_and_unload":
            nara, lora = results
        assert_near(nara(X), lora(X), name)
        assert ids_of_trainable(nara) == ids_of_trainable(lora), name


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["NaRA", "NaRA-DoRA"])
def test_saved_adapter_is_the_same_in_another_model(tmp_path: Path, options: dict[str, Any]) -> None:
    model = adapted(nara_config(**options))
    expected = by_hand(model, DEFAULT)
    assert_near(run(model), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(two_elsewhere(), tmp_path)
    assert_near(run(loaded), expected)
    assert_far(run(loaded), run(loaded, LEVELS.roll(1)))
    again = PeftModel.from_pretrained(two(), tmp_path, is_trainable=True)
    assert ids_of_trainable(again) == {name for name, _ in again.named_parameters() if ".default." in name}
    loaded.load_adapter(tmp_path, "again")
    loaded.set_adapter("again")
    assert_near(run(loaded), expected)
    loaded.save_pretrained(tmp_path / "again", selected_adapters=["again"])
    first = load_file(tmp_path / WEIGHTS)
    again = load_file(tmp_path / "again" / "again" / WEIGHTS)
    assert first.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


@pytest.mark.parametrize("name", ["lora_core", "cores", "first", "lora_A"])
def test_name_like_a_key_is_refused_beside_another(tmp_path: Path, name: str) -> None:
    for alone, added in ((name, "default"), ("default", name)):
        model = get_peft_model(two(), nara_config(), adapter_name=alone)
        disturb(model)
        keys = model.state_dict().keys()
        with pytest.raises(ValueError, match=f"The adapter name '{name}' is also a part of"):
            model.add_adapter(added, nara_config(target_modules=["first"]))
        assert model.state_dict().keys() == keys
        assert set(model.peft_config) == {alone}
        model.save_pretrained(tmp_path)
        folder = tmp_path / ("" if alone == "default" else name)
        assert len(load_file(folder / WEIGHTS)) == 2 * 2 + 7
        for adapter_name in (name, "default"):
            assert torch.equal(run(PeftModel.from_pretrained(two(), folder, adapter_name=adapter_name)), run(model))


def test_names_with_a_common_prefix_are_distinct(tmp_path: Path) -> None:
    model: Any = get_peft_model(two(), nara_config(), adapter_name="x")
    model.add_adapter("xy", nara_config())
    model.add_adapter("y_x", nara_config(core_type="constant"))
    disturb(model)
    model.save_pretrained(tmp_path)
    for name, count in (("x", 11), ("xy", 11), ("y_x", 5)):
        assert len(load_file(tmp_path / name / WEIGHTS)) == count
        other = PeftModel.from_pretrained(two_elsewhere(), tmp_path / name)
        model.set_adapter(name)
        assert torch.equal(run(other), run(model))
    other.load_adapter(tmp_path / "x", adapter_name="renamed")
    other.base_model.set_adapter(["renamed", "default"])
    model.base_model.set_adapter(["x", "y_x"])
    assert torch.equal(run(other), run(model))


def test_ignore_mismatched_sizes_is_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    wider = nn.ModuleDict({"first": nn.Linear(8, 11), "second": nn.Linear(11, 5)})
    with pytest.raises(ValueError, match=r"has shape .* completely or not at all"):
        PeftModel.from_pretrained(wider, tmp_path, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("name", ["default", "other"])
def test_biases_that_peft_saves_twice_load_anywhere(tmp_path: Path, name: str) -> None:
    """With bias="all", PEFT writes those of `modules_to_save` a second time, under names that no model has."""
    config = nara_config(target_modules=["first"], modules_to_save=["second"], bias="all")
    base = nn.ModuleDict({"first": nn.Linear(7, 11), "second": nn.Sequential(nn.Linear(11, 6), nn.Linear(6, 5))})
    single = nn.ModuleDict({"first": nn.Linear(7, 11), "second": nn.Linear(11, 5)})
    for number, model in enumerate((base, single)):
        saved: Any = get_peft_model(copy.deepcopy(model), config)
        disturb(saved)
        for parameter in saved.parameters():
            parameter.data.add_(1.0)
        saved.save_pretrained(tmp_path / str(number))
        assert any(".modules_to_save." in key for key in load_file(tmp_path / str(number) / WEIGHTS))
        loaded = PeftModel.from_pretrained(model, tmp_path / str(number), adapter_name=name)
        expected = saved.state_dict()
        for key, tensor in loaded.state_dict().items():
            if "base_layer.weight" not in key and "original_module" not in key:
                assert torch.equal(tensor, expected[key.replace(f".{name}.", ".default.")]), key


def test_converted_core_is_refused_before_writing(tmp_path: Path) -> None:
    model = adapted()
    converted = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"is torch\.bfloat16 in the state_dict to be saved, .* leave state_dict out"):
        model.save_pretrained(tmp_path, state_dict=converted)
    without = {name: tensor for name, tensor in model.state_dict().items() if "lora_core" not in name}
    with pytest.raises(
        ValueError, match="of the core of adapter 'default' is missing from the state_dict to be saved: leave"
    ):
        model.save_pretrained(tmp_path, state_dict=without)
    assert not list(tmp_path.rglob("*.safetensors"))
    with_core = {name: model.state_dict()[name] if "lora_core" in name else t for name, t in converted.items()}
    model.save_pretrained(tmp_path, state_dict=with_core)
    loaded = PeftModel.from_pretrained(two_elsewhere(), tmp_path)
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items() if "core" in name)


def test_of_two_adapters_the_active_ones_count() -> None:
    model = with_second()
    assert_near(run(model), by_hand(model, DEFAULT))
    model.set_adapter("other")
    assert_near(run(model), by_hand(model, [["other"]] * 3))
    with pytest.raises(ValueError, match="adapter_names, an adapter for each sample, is not supported"):
        run(model, adapter_names=["other", "__base__", "default"])
    model.base_model.set_adapter(["default", "other"])
    assert_near(run(model), by_hand(model, [["default", "other"]] * 3))


def test_active_adapter_trains_with_its_core_only() -> None:
    model = with_second(get_peft_model(two(), nara_config()))
    for active in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(active)
        names = [active] if isinstance(active, str) else active
        expected = {n for n, _ in model.named_parameters() if any(f".{name}." in n for name in names)}
        assert ids_of_trainable(model) == expected
        assert len([name for name in expected if "core." in name]) == 6 * len(names)  # three layers of F
    model.set_adapter("default", inference_mode=True)
    assert not ids_of_trainable(model)


def test_disabled_or_unloaded_adapter_is_the_base() -> None:
    model, base = with_second(), two()
    expected = run(model)
    with model.disable_adapter(), torch.no_grad():
        assert_near(model(X), base(X))
    assert_near(run(model), expected)
    with pytest.raises(ValueError, match="noise_level"):
        model(X)
    unloaded: Any = model.unload()
    assert {n: type(m) for n, m in unloaded.named_modules()} == {n: type(m) for n, m in base.named_modules()}
    assert unloaded.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(tensor, unloaded.state_dict()[name]) for name, tensor in base.state_dict().items())
    assert_near(unloaded(X), base(X))


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "add_weighted_adapter": (
        lambda model: model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum", combination_type="svd"),
        "weighted",
    ),
    "convert_to_lora": (lambda model: peft.convert_to_lora(model, rank=2), "LoRA conversion"),
    "save_as_lora": (lambda model: peft.save_as_lora("somewhere", model, rank=2), "LoRA conversion"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_lose_lambda_is_refused_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = with_second()
    call, match = REFUSED[name]
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=match):
        call(model)
    assert list(model.peft_config) == ["default", "other"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert_near(run(model), by_hand(model, DEFAULT))


def through_pickle(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle], ids=["deepcopy", "torch.save"])
def test_a_copy_shares_neither_weights_nor_lambda(copied: Callable[[Any], Any]) -> None:
    model = with_second()
    expected = run(model)
    with noise_level(model, LEVELS):
        clone = copied(model)
        with pytest.raises(ValueError, match="noise_level"):
            clone(X)
        with noise_level(clone, LEVELS.flip(0)), torch.no_grad():
            assert_near(model(X), expected)
            assert_near(clone(X), by_hand(model, DEFAULT, LEVELS.flip(0)))
    disturb(clone, seed=12)
    assert_near(run(model), expected)
    assert_near(run(clone), by_hand(clone, DEFAULT))
    assert_far(run(clone), expected)


def test_generate_reads_the_level_of_the_context(tiny_llama: Any) -> None:
    model: Any = tiny.adapted(tiny_llama, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    ids = torch.randint(1, 49, (2, 4))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with noise_level(model, torch.tensor([0.1, 0.9])):
        both = model.generate(input_ids=ids, **options)
    options["attention_mask"] = options["attention_mask"][:1]
    for i, level in enumerate((0.1, 0.9)):
        with noise_level(model, level):
            assert torch.equal(model.generate(input_ids=ids[i : i + 1], **options), both[i : i + 1])
    with pytest.raises(ValueError, match="λ is not known"):
        model.generate(input_ids=ids[:1], **options)
