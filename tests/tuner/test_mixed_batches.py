"""One adapter a sample: each at its own λ, in batches of any layer that can have them, and in generation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nara_diffusion import noise_level
from tests.helpers.adapted import OneLayer, TwoLayers, adapted, disturb, nara_config, relative_error
from tests.tuner.three_adapters import LEVELS, TARGETS, by_hand, three_adapters


def test_a_mixed_batch_needs_a_level_only_if_one_of_its_adapters_does():
    model = three_adapters()
    x = torch.randn(2, 7)
    expected = by_hand(model, x, [["plain"], []], torch.zeros(2))
    assert relative_error(model(x, adapter_names=["plain", "__base__"]), expected) < 5e-6
    with pytest.raises(ValueError, match=r"λ is not known, but adapter.* 'other' depend"):
        model(x, adapter_names=["plain", "other"])
    with noise_level(model, LEVELS), pytest.raises(ValueError, match="3 values, but adapter_names has 2"):
        model(x, adapter_names=["default", "other"])
    with pytest.raises(ValueError, match=r"non-existing adapter.*nobody"):
        model(x, adapter_names=["default", "nobody"])
    model.set_adapter("plain")
    assert model(x).shape == (2, 5)  # a refused batch leaves nothing behind


def test_mixed_batches_of_convolutions_and_tokens():
    model = adapted(OneLayer(nn.Conv2d(7, 5, 3)), target_modules=["layer"])
    model.add_adapter("other", nara_config(target_modules=["layer"], r=2))
    disturb(model, seed=4)
    x = torch.randn(3, 7, 6, 5)
    with noise_level(model, LEVELS):
        mixed = model(x, adapter_names=["other", "default", "other"])
    for i, name in enumerate(["other", "default", "other"]):
        model.set_adapter(name)
        with noise_level(model, float(LEVELS[i])):
            torch.testing.assert_close(mixed[i : i + 1], model(x[i : i + 1]), rtol=1e-5, atol=1e-5)


def test_mixed_batches_with_dora_or_embeddings_are_refused():
    dora = adapted(TwoLayers(), target_modules=TARGETS, use_dora=True)
    with noise_level(dora, LEVELS), pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA is enabled"):
        dora(torch.randn(3, 7), adapter_names=["default"] * 3)
    embedding = adapted(OneLayer(nn.Embedding(13, 5)), target_modules=["layer"])
    ids = torch.randint(13, (3, 4))
    with noise_level(embedding, LEVELS), pytest.raises(ValueError, match="embedding 'layer' is adapted with NaRA"):
        embedding(ids, adapter_names=["default"] * 3)
    with noise_level(embedding, LEVELS):
        assert embedding(ids).shape == (3, 4, 5)  # the refusals leave no hook behind


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_with_one_adapter_a_sample_and_beams(tiny_llama, num_beams):
    tiny_llama.config.is_causal = True
    model = adapted(tiny_llama, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model.add_adapter("other", nara_config(target_modules=["o_proj"]))
    disturb(model, seed=5)
    ids = torch.randint(1, 49, (3, 4))
    names = ["default", "other", "__base__"]
    options = {"max_new_tokens": 4, "num_beams": num_beams, "do_sample": False, "eos_token_id": None}
    levels = torch.tensor([0.2, 0.5, 0.8])
    with noise_level(model, levels.repeat_interleave(num_beams)):
        mixed = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **options)
    for i, name in enumerate(names):
        single = {"input_ids": ids[i : i + 1], "attention_mask": torch.ones(1, 4, dtype=torch.long), **options}
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(**single)
        else:
            model.set_adapter(name)
            with noise_level(model, float(levels[i])):
                alone = model.generate(**single)
        assert torch.equal(mixed[i : i + 1], alone)


def test_generation_reads_the_level_of_the_context(tiny_llama):
    model = adapted(tiny_llama, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
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
