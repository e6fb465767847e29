"""A strength goes with its adapter: switched, disabled, merged, mixed, copied, saved, deleted, taken away."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from nara_diffusion import StrengthSchedule, core_matrix, noise_level, set_noise_source, set_strength
from nara_diffusion.noise.ablations import changed_noise, constant_noise, mean_core
from nara_diffusion.noise.needs import is_noise_aware
from nara_diffusion.noise.signals import NoiseSignals
from nara_diffusion.runtime.modules import find_holders
from tests.helpers.adapted import TwoLayers, disturb, lora_config, nara_config, relative_error
from tests.strength.models import LEVELS, SCHEDULE, adapted_by, strength_by_hand

TARGETS = ["first", "second"]
BOTH = pytest.mark.parametrize("kind", ["LoRA", "NaRA"])
OTHER = StrengthSchedule([(0, 0.4), (1, 1.2)])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 7)


def model_of(kind: str, **options: Any) -> PeftModel:
    torch.manual_seed(7)
    return adapted_by(kind, TwoLayers(), target_modules=TARGETS, **options)


def with_two(kind: str) -> PeftModel:
    """Adapters "default" and "other", of which the second one adapts one layer alone."""
    model = model_of(kind)
    model.add_adapter("other", (lora_config if kind == "LoRA" else nara_config)(target_modules=["first"], r=3))
    disturb(model, seed=4)
    return model


def at(model: nn.Module, x: Tensor, levels: Any = LEVELS, **options: Any) -> Tensor:
    with noise_level(model, levels), torch.no_grad():
        return model(x, **options)


def by_numbers(model: Any, x: Tensor, schedules: dict[str, Any], levels: Tensor = LEVELS) -> Tensor:
    """The output of a copy, one sample at a time, whose adapters have the numbers that the schedules say."""
    clone, rows = copy.deepcopy(model), []
    for i, level in enumerate(levels):
        for name, schedule in schedules.items():
            set_strength(clone, name, schedule(level).item())
        with torch.no_grad():
            if find_holders(clone):
                with noise_level(clone, level.item()):
                    rows.append(clone(x[i : i + 1]))
            else:
                rows.append(clone(x[i : i + 1]))
    return torch.cat(rows)


def trace(model: nn.Module) -> dict[str, Any]:
    """All that a strength may change in a model."""
    return {
        name: (
            type(module).__name__,
            {k: (type(v), getattr(v, "key", None)) for k, v in getattr(module, "lora_variant", {}).items()},
            dict(getattr(module, "scaling", {})),
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            sorted(module.__dict__),
        )
        for name, module in model.named_modules()
    }


@BOTH
@pytest.mark.parametrize("use_dora", [False, True])
def test_taking_a_strength_away_leaves_no_trace(kind, use_dora, x):
    model = model_of(kind, use_dora=use_dora)
    before = trace(model)
    expected = at(model, x) if kind == "NaRA" else model(x)
    for strength in (None, 1.0):
        set_strength(model, "default", SCHEDULE)
        assert trace(model) != before or kind == "NaRA"
        at(model, x)
        set_strength(model, "default", strength)
        assert trace(model) == before
        assert torch.equal(at(model, x) if kind == "NaRA" else model(x), expected)


@BOTH
def test_a_number_scales_the_update(kind, x):
    model = model_of(kind)
    set_strength(model, "default", 0.37)
    found = at(model, x) if kind == "NaRA" else model(x)
    clone = model_of(kind)
    for module in clone.modules():
        if hasattr(module, "scaling"):
            module.scaling["default"] *= 0.37
    assert torch.equal(found, at(clone, x) if kind == "NaRA" else clone(x))


@BOTH
def test_a_schedule_takes_the_place_of_a_number(kind, x):
    model = model_of(kind)
    set_strength(model, "default", SCHEDULE)
    expected = at(model, x)
    set_strength(model, "default", 0.1)
    set_strength(model, "default", SCHEDULE)
    assert torch.equal(at(model, x), expected)


def test_without_a_level_the_error_says_how_to_tell_it(x):
    model = model_of("LoRA")
    assert not is_noise_aware(model)
    set_strength(model, "default", SCHEDULE)
    assert is_noise_aware(model)
    with pytest.raises(ValueError, match=r"λ is not known, but adapter\(s\) 'default' depend on it: call the model"):
        model(x)


def test_a_source_tells_the_level_of_a_lora_and_outlives_a_number(x):
    class Source:
        convention = "mine"

        def __call__(self, module: Any, args: Any, kwargs: Any) -> NoiseSignals:
            return NoiseSignals(LEVELS)

    model = model_of("LoRA")
    set_strength(model, "default", SCHEDULE)
    set_noise_source(model, Source())
    expected = at(model, x)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
        set_strength(model, "default", 1.0)
        model(x)
        set_strength(model, "default", SCHEDULE)
        assert torch.equal(model(x), expected)


@BOTH
def test_each_of_several_adapters_has_its_strength(kind, x):
    model = with_two(kind)
    set_strength(model, "default", SCHEDULE)
    set_strength(model, "other", OTHER)
    for names in (["default"], ["other"], ["other", "default"]):
        model.base_model.set_adapter(names)
        expected = by_numbers(model, x, {"default": SCHEDULE, "other": OTHER})
        assert relative_error(at(model, x), expected) < 2e-6
    set_strength(model, "other", 0.8)
    assert (
        relative_error(at(model, x), by_numbers(model, x, {"default": SCHEDULE, "other": lambda _: torch.tensor(0.8)}))
        < 2e-6
    )


@BOTH
def test_a_mixed_batch_has_the_strength_of_each_sample_s_adapter(kind):
    model = with_two(kind)
    set_strength(model, "default", SCHEDULE)
    names = ["other", "default", "__base__", "default", "other", "default"]
    levels, x = torch.tensor([0.1, 0.2, 0.3, 0.5, 0.7, 0.9]), torch.randn(6, 7)
    for schedules in ({"default": SCHEDULE}, {"default": SCHEDULE, "other": OTHER}):
        set_strength(model, "other", schedules.get("other"))
        rows = []
        for i, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter(), torch.no_grad():
                    rows.append(model(x[i : i + 1]))
            else:
                model.set_adapter(name)
                rows.append(
                    by_numbers(
                        model, x[i : i + 1], {k: s for k, s in schedules.items() if k == name}, levels[i : i + 1]
                    )
                )
        assert relative_error(at(model, x, levels, adapter_names=names), torch.cat(rows)) < 2e-6


def test_a_mixed_batch_of_a_scheduled_embedding_is_refused():
    model = adapted_by("LoRA", nn.Sequential(nn.Embedding(13, 5)), target_modules=["0"])
    set_strength(model, "default", SCHEDULE)
    with noise_level(model, 0.3), pytest.raises(ValueError, match=r"the embedding '0' .* at a strength"):
        model(torch.randint(13, (2, 3)), adapter_names=["default", "__base__"])


@BOTH
def test_disabled_it_is_the_base_and_enabled_it_has_its_strength(kind, x):
    model = model_of(kind)
    set_strength(model, "default", SCHEDULE)
    expected = at(model, x)
    with model.disable_adapter(), torch.no_grad():
        base = model(x)
    assert torch.equal(base, TwoLayers.forward(model_of(kind).unload(), x))
    assert torch.equal(at(model, x), expected)


@BOTH
@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_takes_the_strength_at_its_level(kind, use_dora, x):
    model = model_of(kind, use_dora=use_dora)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    set_strength(model, "default", SCHEDULE)
    expected = at(model, x, 0.33)
    model.merge_adapter(noise_level=0.33)
    assert relative_error(model(x), expected) < 5e-6
    with pytest.raises(ValueError, match=r"merged at noise_level 0.33"):
        at(model, x, 0.5)
    with pytest.raises(ValueError, match="is merged into 'first', at the strength that it had: call"):
        set_strength(model, "default", 1.0)
    model.unmerge_adapter()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=2e-6)
    assert relative_error(at(model, x, 0.33), expected) < 5e-6
    merged = model.merge_and_unload(noise_level=0.33)
    assert relative_error(merged(x), expected) < 5e-6
    assert not find_holders(merged)
    assert not merged._forward_pre_hooks


@BOTH
def test_merging_without_a_level_merges_nothing(kind, x):
    model = with_two(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    set_strength(model, "default", SCHEDULE)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="can only be merged at one λ"):
            merge(adapter_names=["other", "default"])
        assert not any(getattr(module, "merged_adapters", None) for module in model.modules())
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:Already unmerged")  # PEFT, at a layer that the adapter does not adapt
def test_a_lora_without_schedule_merges_as_ever_beside_one(x):
    model = with_two("LoRA")
    set_strength(model, "default", SCHEDULE)
    model.set_adapter("other")
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


@BOTH
def test_a_deleted_adapter_takes_its_strength_along(kind, x):
    model = with_two(kind)
    model.set_adapter("other")
    clean = trace(with_two(kind)) if kind == "LoRA" else None
    expected = at(model, x) if kind == "NaRA" else model(x)
    set_strength(model, "default", SCHEDULE)
    model.delete_adapter("default")
    assert not any(holder.strengths for holder in find_holders(model))
    assert bool(find_holders(model)) == (kind == "NaRA")
    assert torch.equal(at(model, x) if kind == "NaRA" else model(x), expected)
    assert clean is None or trace(model).keys() < clean.keys()
    model.add_adapter("default", (lora_config if kind == "LoRA" else nara_config)(target_modules=TARGETS))
    disturb(model)
    model.set_adapter("default")
    clone = with_two(kind)
    clone.load_state_dict(model.state_dict())
    assert torch.equal(*(at(m, x) if kind == "NaRA" else m(x) for m in (model, clone)))


@BOTH
def test_an_unloaded_model_has_no_trace_of_a_strength(kind, x):
    model = model_of(kind)
    set_strength(model, "default", SCHEDULE)
    base = model.unload()
    assert trace(base) == trace(TwoLayers())
    base(x)


@BOTH
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_have_the_strength_and_are_independent(kind, way, x):
    model = model_of(kind)
    set_strength(model, "default", SCHEDULE)
    expected = at(model, x)
    if way == "deepcopy":
        clone = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        clone = torch.load(buffer, weights_only=False)
    assert torch.equal(at(clone, x), expected)
    set_strength(clone, "default", OTHER)
    assert not torch.equal(at(clone, x), expected)
    assert torch.equal(at(model, x), expected)


def test_weighted_sums_refuse_a_scheduled_lora():
    model = with_two("LoRA")
    set_strength(model, "default", SCHEDULE)
    with pytest.raises(ValueError, match="add_weighted_adapter would ignore the strength of adapter 'default'"):
        model.add_weighted_adapter(["other", "default"], [0.5, 0.5], "sum", "cat")
    assert list(model.peft_config) == ["default", "other"]
    set_strength(model, "default", None)
    model.add_weighted_adapter(["other", "default"], [0.5, 0.5], "sum", "cat")


def test_the_core_that_one_looks_at_is_without_strength():
    model = model_of("NaRA")
    expected = core_matrix(model, LEVELS, module="second")
    set_strength(model, "default", SCHEDULE)
    assert torch.equal(core_matrix(model, LEVELS, module="second"), expected)


def test_ablations_see_the_strength_as_a_part_of_the_core(x):
    model = model_of("LoRA")
    set_strength(model, "default", SCHEDULE)
    expected = at(model, x, 0.33)
    with changed_noise(model, constant_noise(0.33)):
        assert torch.equal(at(model, x), expected)
    grid = torch.linspace(0, 1, 11)
    with mean_core(model, grid), torch.no_grad():
        mean = model(x)
    set_strength(model, "default", strength_by_hand(grid).mean().item())
    assert relative_error(mean, model(x)) < 2e-6


# ---------------------------------------------------------------------- the default that is saved


def test_a_nara_s_schedule_is_saved_loaded_and_overridden(tmp_path: Path, x):
    model = model_of("NaRA")
    set_strength(model, "default", SCHEDULE)
    expected = at(model, x)
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert told["strength"] == SCHEDULE.as_lists()
    torch.manual_seed(7)
    loaded = PeftModel.from_pretrained(TwoLayers(), tmp_path)
    assert torch.equal(at(loaded, x), expected)
    loaded.load_adapter(tmp_path, "again")
    loaded.set_adapter("again")
    assert torch.equal(at(loaded, x), expected)
    set_strength(loaded, "again", 1.0)
    plain = at(model_of("NaRA"), x)
    assert torch.equal(at(loaded, x), plain)
    assert loaded.peft_config["again"].strength == SCHEDULE.as_lists()  # a number is for now
    loaded.set_adapter("default")
    set_strength(loaded, "default", None)
    assert torch.equal(at(loaded, x), plain)
    loaded.save_pretrained(tmp_path / "none", selected_adapters=["default"])
    assert json.loads((tmp_path / "none" / "adapter_config.json").read_text())["strength"] is None


@pytest.mark.parametrize("core_type", ["hypernetwork", "identity"])
def test_a_configuration_s_schedule_holds_from_the_start(core_type, x):
    torch.manual_seed(7)
    config = nara_config(target_modules=TARGETS, core_type=core_type, strength=SCHEDULE)
    model = get_peft_model(TwoLayers(), config).eval()
    disturb(model)
    clone = model_of("NaRA", core_type=core_type) if core_type == "hypernetwork" else model_of("identity")
    set_strength(clone, "default", SCHEDULE)
    assert torch.equal(at(model, x), at(clone, x))
    assert config.strength == SCHEDULE.as_lists()
    set_strength(model, "default", 0.6)
    set_strength(clone, "default", 0.6)
    outputs = [at(m, x) if core_type == "hypernetwork" else m(x) for m in (model, clone)]
    assert torch.equal(*outputs)


def test_a_schedule_is_not_given_to_other_models_of_the_same_configuration():
    config = nara_config(target_modules=TARGETS)
    one, two = (get_peft_model(TwoLayers(), config) for _ in range(2))
    set_strength(one, "default", SCHEDULE)
    assert one.peft_config["default"].strength == SCHEDULE.as_lists()
    assert two.peft_config["default"].strength is None is config.strength
    assert one.base_model.model.peft_config["default"].strength == SCHEDULE.as_lists()


def test_an_identity_with_a_schedule_keeps_the_definition_of_its_level(tmp_path: Path):
    class Source:
        def __init__(self, convention: str) -> None:
            self.convention = convention

        def __call__(self, module: Any, args: Any, kwargs: Any) -> NoiseSignals:
            return NoiseSignals(LEVELS)

    model = model_of("identity")
    set_noise_source(model, Source("mine"))
    set_strength(model, "default", SCHEDULE)
    assert model.peft_config["default"].noise_convention == "mine"
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(TwoLayers(), tmp_path)
    with pytest.raises(ValueError, match="trained with λ defined as 'mine'"):
        set_noise_source(loaded, Source("theirs"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strength": [[0.2, 1.0], [0.1, 2.0]]}, r"strength is \[\[0.2, 1.0\].*ascending λ"),
        ({"strength": 0.5}, "strength is 0.5: points is 0.5: pass pairs"),
        ({"strength": [[2, 1.0]]}, "λ is 2"),
        ({"strength": SCHEDULE, "lora_bias": True}, r"would not reach the bias of B \(lora_bias=True\)"),
        ({"strength": SCHEDULE, "bias": "all"}, "would not reach the biases that are trained"),
        ({"strength": SCHEDULE, "modules_to_save": ["second"]}, "would not reach modules"),
        ({"strength": SCHEDULE, "core_type": "identity", "init_lora_weights": "pissa"}, "out of the base weights"),
        ({"strength": SCHEDULE, "core_type": "identity", "use_qalora": True}, "use_qalora.*or use strength=None"),
    ],
)
def test_a_configuration_refuses_a_strength_that_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        nara_config(target_modules=["first"], **changes)


def test_a_file_with_a_damaged_strength_is_refused_by_name(tmp_path: Path):
    model_of("NaRA").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"strength": [[0.5, None]]}))
    with pytest.raises(ValueError, match=r"adapter_config.json.*strength is \[\[0.5, None\]\]"):
        PeftModel.from_pretrained(TwoLayers(), tmp_path)


# ---------------------------------------------------------------------- refused


class WithAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        (WithAttention, {"target_modules": ["first", "attention"]}, "layer 'attention' .MultiheadAttention"),
        (
            TwoLayers,
            {"target_modules": ["first"], "lora_bias": True},
            r"the bias of B \(lora_bias=True\) of layer 'fir",
        ),
        (TwoLayers, {"target_modules": ["first"], "bias": "lora_only"}, r"biases that it trains \(bias='lora_only'\)"),
        (TwoLayers, {"target_modules": ["first"], "modules_to_save": ["second"]}, "'second', which is trained"),
        (TwoLayers, {"target_modules": ["first"], "alora_invocation_tokens": [1]}, "ALoraLinearVariant"),
        (TwoLayers, {"target_parameters": ["first.weight"], "target_modules": []}, "ParamWrapper"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_lora_that_a_schedule_would_not_reach_is_refused_and_left_alone(base, options, message):
    model = get_peft_model(base(), lora_config(**options))
    before = trace(model)
    with pytest.raises(ValueError, match=message) as error:
        set_strength(model, "default", SCHEDULE)
    assert "cannot have a strength that depends on λ" in str(error.value)
    assert "give this adapter a float" in str(error.value)
    assert trace(model) == before


def test_other_tuners_are_refused():
    model = get_peft_model(TwoLayers(), LoHaConfig(r=2, target_modules=["first"]))
    with pytest.raises(ValueError, match="layer 'first', which is adapted by PEFT's Linear and not by a LoRA"):
        set_strength(model, "default", SCHEDULE)


@pytest.mark.parametrize("strength", ["0.5", True, float("nan"), [(0, 1.0)], {"first": SCHEDULE}])
def test_what_is_no_strength_is_refused(strength):
    with pytest.raises(ValueError, match=r"strength is .*: pass StrengthSchedule"):
        set_strength(model_of("LoRA"), "default", strength)


def test_an_adapter_that_is_not_there_is_refused():
    model = with_two("LoRA")
    with pytest.raises(ValueError, match="has no adapter 'third': it has 'default', 'other'"):
        set_strength(model, "third", SCHEDULE)
    with pytest.raises(ValueError, match="TwoLayers has no adapter 'default': it has none"):
        set_strength(TwoLayers(), "default", SCHEDULE)
    with pytest.raises(ValueError, match=r"str is no torch.nn.Module"):
        set_strength("pipe", "default", SCHEDULE)  # type: ignore[arg-type]
