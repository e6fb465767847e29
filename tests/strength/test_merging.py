"""Merging, mixing and deleting adapters whose strength depends on λ."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nara_diffusion import noise_level, set_strength
from nara_diffusion.noise.level import find_holders
from tests.helpers.adapted import TwoLayers, disturb, lora_config, nara_config, relative_error
from tests.strength.models import (
    BOTH,
    OTHER,
    SCHEDULE,
    TARGETS,
    adapted_by,
    at,
    by_numbers,
    model_of,
    trace,
    with_two,
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
