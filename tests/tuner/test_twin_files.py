"""Files of DiffusionGemma's adapters, which leave out the encoder's factors: hotswap, --init_adapter, from_lora."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from nara_diffusion import NaraConfig, from_lora, noise_level
from nara_diffusion.loaders.insertion import check_swappable, part_of, prepare_swap
from nara_diffusion.training.adapter_weights import start_from
from tests.helpers.adapted import disturb
from tests.helpers.rounding import assert_far, assert_near
from tests.helpers.tiny_gemma import CANVAS, VOCABULARY, tiny_gemma

BOTH = r".*(encoder\.language_model|decoder)\.layers\..*(q_proj|o_proj|down_proj)"
DECODER = r".*decoder\.layers\..*(q_proj|o_proj|down_proj)"
OTHERS = [(BOTH, DECODER), (DECODER, BOTH)]


def adapted(targets: str = BOTH, kind: Any = NaraConfig, seed: int | None = None, **fields: Any) -> Any:
    config = kind(r=3, lora_alpha=7, target_modules=targets, **fields)
    model = get_peft_model(tiny_gemma(), config).eval()
    if seed is not None:
        disturb(model, seed=seed)
    return model


def logits(model: Any, level: Any = (0.9, 0.2, 0.6)) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (3, 8), generator=generator)
    canvas = torch.randint(0, VOCABULARY, (3, CANVAS), generator=generator)
    with torch.no_grad(), noise_level(model, list(level)):
        return model(input_ids=ids, decoder_input_ids=canvas).logits


@pytest.mark.parametrize("targets", [BOTH, DECODER])
def test_hotswap_writes_into_the_same_twins(targets: str) -> None:
    model, other = adapted(targets, seed=1).get_base_model(), adapted(targets, seed=2).get_base_model()
    original, part = logits(model), part_of(other, "default")
    check_swappable(model, "model", "default", part)
    prepare_swap(model, "default", part)()
    assert torch.equal(logits(model), logits(other))
    assert_far(logits(model), original)


@pytest.mark.parametrize(("there", "given"), OTHERS)
def test_hotswap_into_other_twins_is_refused(there: str, given: str) -> None:
    model, part = adapted(there).get_base_model(), part_of(adapted(given).get_base_model(), "default")
    with pytest.raises(ValueError, match=r"'model.encoder.language_model.layers.0.mlp.down_proj'.*without hotswap"):
        check_swappable(model, "model", "default", part)


@pytest.mark.parametrize("targets", [BOTH, DECODER])
def test_run_starts_from_file_of_same_twins(targets: str, tmp_path: Path) -> None:
    source, model = adapted(targets, seed=1), adapted(targets)
    source.save_pretrained(tmp_path)
    start_from({"": model.get_base_model()}, str(tmp_path), model)
    assert torch.equal(logits(model), logits(source))


@pytest.mark.parametrize(("there", "given"), OTHERS)
@pytest.mark.parametrize("kind", [NaraConfig, LoraConfig])
def test_run_does_not_start_from_other_twins(there: str, given: str, kind: Any, tmp_path: Path) -> None:
    adapted(given, kind).save_pretrained(tmp_path)
    model = adapted(there)
    with pytest.raises(ValueError, match=r"layers.*'model\.encoder\.language_model\.layers\.0\.mlp\.down_proj'"):
        start_from({"": model.get_base_model()}, str(tmp_path), model)


def test_file_with_other_encoder_factors_does_not_load(tmp_path: Path) -> None:
    source = adapted(seed=1)
    source.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    encoder = {key.replace(".decoder.", ".encoder.language_model."): tensor for key, tensor in tensors.items()}
    key = next(key for key in encoder if "encoder" in key and "lora_A" in key)
    for factor, fits in ((encoder[key].clone(), True), (encoder[key] + 0.1, False)):
        save_file({**tensors, key: factor}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
        if fits:
            assert torch.equal(logits(PeftModel.from_pretrained(tiny_gemma(), tmp_path).eval()), logits(source))
            continue
        with pytest.raises(ValueError, match=r"of the encoder differs from the decoder's"):
            PeftModel.from_pretrained(tiny_gemma(), tmp_path)


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_with_equal_twin_factors_becomes_nara(use_dora: bool, tmp_path: Path) -> None:
    lora = adapted(kind=LoraConfig, use_dora=use_dora)
    lora.get_base_model().tie_weights()
    disturb(lora, seed=1)
    lora.save_pretrained(tmp_path)
    model = from_lora(tmp_path, tiny_gemma()).eval()
    with torch.no_grad():
        ids = torch.arange(24).view(3, 8)
        expected = lora(input_ids=ids, decoder_input_ids=ids[:, :CANVAS]).logits
        with noise_level(model, 0.4):
            assert_near(model(input_ids=ids, decoder_input_ids=ids[:, :CANVAS]).logits, expected, model)


def test_lora_with_other_encoder_factors_is_refused(tmp_path: Path) -> None:
    adapted(kind=LoraConfig, seed=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"encoder.*one A and one B.*--no_train_on_encoder"):
        from_lora(tmp_path, tiny_gemma())


def test_decoder_lora_becomes_nara_of_the_decoder(tmp_path: Path) -> None:
    adapted(DECODER, LoraConfig, seed=1).save_pretrained(tmp_path)
    model, layer = from_lora(tmp_path, tiny_gemma()), "layers.0.self_attn.q_proj"
    assert hasattr(model.get_base_model().model.decoder.get_submodule(layer), "lora_A")
    assert not hasattr(model.get_base_model().model.encoder.language_model.get_submodule(layer), "lora_A")
