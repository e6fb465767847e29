"""Merging an update that depends on λ: at one λ, undone exactly, and refused without a λ."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from nara_diffusion import noise_level, set_noise_source
from nara_diffusion.noise.signals import NoiseSignals
from nara_diffusion.noise.sources import is_noise_aware
from tests.helpers.adapted import (
    OneLayer,
    TwoLayers,
    adapted,
    default_core,
    disturb,
    lora_config,
    nara_config,
    relative_error,
)
from tests.tuner.merging.merged import tensors_of_base, unmerged_output

pytestmark = pytest.mark.filterwarnings(
    "ignore:Already following adapters were merged"
)  # PEFT tells of each further one

LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), torch.randn(3, 4, 7)),
    "transformers Conv1D": (lambda: Conv1D(5, 7), torch.randn(3, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(7, 5, 3), torch.randn(3, 7, 6, 5)),
    "conv1d": (lambda: nn.Conv1d(7, 5, 3), torch.randn(3, 7, 6)),
    "embedding": (lambda: nn.Embedding(13, 5), torch.randint(13, (3, 4))),
}
LAYERS_WITH_DORA = [
    pytest.param(make, x, dora, id=f"{name}{'-DoRA' * dora}")
    for name, (make, x) in LAYERS.items()
    for dora in (False, True)
    if not (dora and name == "embedding")
]


@pytest.mark.parametrize("safe_merge", [False, True], ids=["", "safe"])
@pytest.mark.parametrize("by_argument", [False, True], ids=["context", "argument"])
@pytest.mark.parametrize(("make", "x", "dora"), LAYERS_WITH_DORA)
def test_merging_equals_the_forward_at_that_level_and_is_undone(make, x, dora, by_argument, safe_merge):
    fan_in_fan_out = isinstance(make(), Conv1D)
    model = adapted(OneLayer(make()), target_modules=["layer"], use_dora=dora, fan_in_fan_out=fan_in_fan_out)
    before, expected = tensors_of_base(model), unmerged_output(model, x, 0.35)
    if by_argument:
        model.merge_adapter(noise_level=0.35, safe_merge=safe_merge)
    else:
        with noise_level(model, 0.35):
            model.merge_adapter(safe_merge=safe_merge)
    assert not is_noise_aware(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)  # no λ is needed any more
    torch.testing.assert_close(unmerged_output(model, x, 0.35), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    for name, tensor in tensors_of_base(model).items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    other = unmerged_output(model, x, 0.8)
    assert (other - expected).abs().max() > 1e-2
    torch.testing.assert_close(unmerged_output(model, x, 0.35), expected, rtol=1e-5, atol=1e-5)


def test_the_merged_weight_is_that_of_the_formula():
    model = adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"])
    layer = model.base_model.model.layer
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    C = default_core(model, torch.tensor([0.35]))[0]
    expected = layer.get_base_layer().weight.double() + 6 / 4 * B @ C @ A
    merged = model.merge_and_unload(noise_level=0.35)
    assert relative_error(merged.layer.weight, expected) < 1e-6


@pytest.mark.parametrize("safe_merge", [False, True], ids=["", "safe"])
@pytest.mark.parametrize(("make", "x", "dora"), LAYERS_WITH_DORA)
def test_merge_and_unload_leaves_a_plain_model_of_that_level(make, x, dora, safe_merge):
    fan_in_fan_out = isinstance(make(), Conv1D)
    base = OneLayer(make())
    names = set(base.state_dict())
    model = adapted(base, target_modules=["layer"], use_dora=dora, fan_in_fan_out=fan_in_fan_out)
    expected = unmerged_output(model, x, 0.35)
    merged = model.merge_and_unload(noise_level=0.35, safe_merge=safe_merge)
    assert merged is base
    assert set(merged.state_dict()) == names
    assert not hasattr(merged, "nara_core")
    assert not merged._forward_pre_hooks
    assert not merged._forward_hooks
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="holds no NaRA adapter"), noise_level(merged, 0.3):
        pass


def test_merging_lora_bias():
    model = adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"], lora_bias=True)
    x = torch.randn(3, 7)
    expected = unmerged_output(model, x, 0.35)
    model.merge_adapter(noise_level=0.35)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_without_a_level_merging_raises_and_says_what_to_do(merge):
    model = adapted(TwoLayers(), target_modules=["first", "second"])
    before = tensors_of_base(model)
    with pytest.raises(
        ValueError, match=r"only be merged at one λ\. Pass noise_level=.*with noise_level\(model, value\)"
    ):
        getattr(model, merge)()
    with pytest.raises(ValueError, match="merging needs a single value"), noise_level(model, torch.tensor([0.1, 0.2])):
        getattr(model, merge)()
    with pytest.raises(ValueError, match="has to lie in"):
        getattr(model, merge)(noise_level=1.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of_base(model).items())
    assert is_noise_aware(model)


def test_a_level_repeated_for_each_sample_is_a_single_level():
    model = adapted(TwoLayers(), target_modules=["first", "second"])
    x = torch.randn(3, 7)
    expected = unmerged_output(model, x, 0.35)
    with noise_level(model, torch.full((3,), 0.35)):
        model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_a_source_does_not_stand_in_for_the_level_of_a_merge():
    model = adapted(TwoLayers(), target_modules=["first"])

    def source(module: nn.Module, args: Any, kwargs: Any) -> NoiseSignals:
        return NoiseSignals(torch.tensor([0.5]))

    source.convention = "any"
    set_noise_source(model, source)
    with pytest.raises(ValueError, match="only be merged at one λ"):
        model.merge_adapter()


def test_a_forward_at_another_level_while_merged_raises():
    model = adapted(TwoLayers(), target_modules=["first", "second"])
    x = torch.randn(2, 7)
    model.merge_adapter(noise_level=0.35)
    for other in (0.36, torch.tensor([0.35, 0.4])):
        with (
            noise_level(model, other),
            pytest.raises(ValueError, match=r"merged at noise_level 0\.35.*unmerge_adapter"),
        ):
            model(x)
    with pytest.raises(ValueError, match=r"merged at noise_level 0\.35, not 0\.5"):
        model.merge_adapter(noise_level=0.5)
    model.unmerge_adapter()
    model.merge_adapter(noise_level=0.5)
    model.unmerge_adapter()
    with noise_level(model, 0.36):
        model(x)


def test_a_merge_reads_the_mask_density_from_the_context():
    model = adapted(TwoLayers(), target_modules=["first"], core_input="both")
    x = torch.randn(2, 7)
    with noise_level(model, 0.35, mask_density=0.6):
        expected = model(x)
    with pytest.raises(ValueError, match="mask density is not known"):
        model.merge_adapter(noise_level=0.35)
    with noise_level(model, 0.35, mask_density=0.6):
        model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("core_type", ["constant", "identity"])
def test_a_core_without_noise_input_merges_without_a_level(core_type):
    model = adapted(TwoLayers(), target_modules=["first", "second"], core_type=core_type)
    x = torch.randn(2, 7)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    with noise_level(model, 0.9):
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings=True`")
def test_a_tied_embedding_merges_into_both_places(tiny_llama):
    config = copy.deepcopy(tiny_llama.config)
    config.tie_word_embeddings = True
    base = type(tiny_llama)(config).eval()
    model = adapted(base, target_modules=["embed_tokens"])
    ids = torch.randint(50, (2, 5))
    merged = model.merge_and_unload(noise_level=0.35)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged(ids).logits.shape == (2, 5, 50)


@pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("options", "tied"),
    [
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"trainable_token_indices": [3, 7]}, True),
        ({}, True),
    ],
)
def test_embeddings_that_are_tied_no_longer_are_untied_in_the_configuration_as_by_lora(tiny_llama, options, tied):
    config = copy.deepcopy(tiny_llama.config)
    config.tie_word_embeddings = True
    ids = torch.randint(50, (2, 5))
    for kind in (lora_config, nara_config):
        model: Any = get_peft_model(
            type(tiny_llama)(copy.deepcopy(config)), kind(target_modules=["q_proj"], **options)
        ).eval()
        disturb(model)
        with noise_level(model, 0.35) if kind is nara_config else nullcontext(), torch.no_grad():
            expected = model(ids).logits
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            merged = model.merge_and_unload(**({"noise_level": 0.35} if kind is nara_config else {}))
        messages = [str(warning.message) for warning in caught]
        assert merged.config.tie_word_embeddings is tied
        assert [m.startswith("Input and output embeddings are no longer tied") for m in messages] == [True] * (not tied)
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- while merged


def test_disabling_while_merged_gives_the_base_model_and_enabling_the_adapter():
    base = TwoLayers()
    x = torch.randn(3, 7)
    plain = base(x)
    model = adapted(base, target_modules=["first", "second"])
    expected = unmerged_output(model, x, 0.35)
    model.merge_adapter(noise_level=0.35)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), plain, rtol=1e-5, atol=1e-5)
    # PEFT takes the merge back as soon as a disabled layer runs: the model depends on λ again
    torch.testing.assert_close(unmerged_output(model, x, 0.35), expected, rtol=1e-5, atol=1e-5)
    assert (unmerged_output(model, x, 0.9) - expected).abs().max() > 1e-2
    with pytest.raises(ValueError, match="λ is not known"):
        model(x)


def test_a_merged_adapter_cannot_be_deleted():
    model = adapted(TwoLayers(), target_modules=["first"])
    model.merge_adapter(noise_level=0.35)
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")


def test_a_merged_model_saves_the_adapter_that_it_had(tmp_path):
    model = adapted(TwoLayers(), target_modules=["first"])
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter(noise_level=0.35)
    model.save_pretrained(tmp_path / "after")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("before", "after")]
    assert files[0] == files[1]


def test_a_merged_model_can_be_copied():
    model = adapted(TwoLayers(), target_modules=["first"])
    x = torch.randn(3, 7)
    model.merge_adapter(noise_level=0.35)
    expected = model(x)
    clone = copy.deepcopy(model)
    model.unmerge_adapter()
    assert torch.equal(clone(x), expected)
    with noise_level(clone, 0.5), pytest.raises(ValueError, match=r"merged at noise_level 0\.35"):
        clone(x)
    clone.unmerge_adapter()
    torch.testing.assert_close(unmerged_output(clone, x, 0.8), unmerged_output(model, x, 0.8), rtol=1e-5, atol=1e-6)
