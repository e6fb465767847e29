"""Similarity and alignment against the definitions, written out with the models themselves."""

from __future__ import annotations

import logging
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPProcessor, ConvNextConfig, ConvNextModel, ViTConfig, ViTModel

from nara_diffusion.dreambooth.evaluation.encoders import Encoder
from nara_diffusion.dreambooth.evaluation.metrics import ImageSimilarity, TextAlignment, without_words
from tests.dreambooth.evaluation.small_encoders import (
    TEXT_LENGTH,
    clip_model,
    clip_processor,
    dino_model,
    dino_processor,
    random_images,
    save_clip,
    save_dino,
    tokenizer,
)

PROMPTS = ["a photo of a red cube", "a blue ball", "a photo of a red cube", "sks cube", "blue"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Path:
    return save_dino(tmp_path_factory.mktemp("dino"))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a @ b / a.norm() / b.norm()).item()


@torch.no_grad()
def clip_vectors(pictures: list[Image.Image]) -> list[torch.Tensor]:
    model = clip_model()
    pixels = [clip_processor()(picture, return_tensors="pt").pixel_values for picture in pictures]
    return [model.visual_projection(model.vision_model(p).pooler_output)[0] for p in pixels]


@torch.no_grad()
def dino_vectors(pictures: list[Image.Image]) -> list[torch.Tensor]:
    model = dino_model()
    pixels = [dino_processor()(picture, return_tensors="pt").pixel_values for picture in pictures]
    return [model(p).last_hidden_state[0, 0] for p in pixels]


@pytest.mark.parametrize("kind", ["clip", "dino"])
def test_similarity_is_the_mean_cosine_over_all_pairs(kind, request):
    vectors = {"clip": clip_vectors, "dino": dino_vectors}[kind]
    generated, reference = random_images(5)[:3], random_images(5)[3:]
    pairs = product(vectors(generated), vectors(reference))
    cosines = torch.tensor([cosine(x, y) for x, y in pairs]).view(3, 2)
    measure = ImageSimilarity(request.getfixturevalue(kind), device="cpu", batch_size=2)
    torch.testing.assert_close(measure.similarities(generated, reference), cosines, rtol=0, atol=1e-5)
    assert measure.similarity(generated, reference) == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert cosines.max() - cosines.min() > 1e-2  # the images differ to this encoder


@torch.no_grad()
def test_alignment_is_the_mean_cosine_of_image_and_own_prompt(clip):
    model, words = clip_model(), tokenizer()
    texts = [
        model.text_projection(model.text_model(**words(prompt, return_tensors="pt")).pooler_output)[0]
        for prompt in PROMPTS
    ]
    pictures = random_images(5)
    cosines = torch.tensor([cosine(x, t) for x, t in zip(clip_vectors(pictures), texts, strict=True)])
    measure = TextAlignment(clip, device="cpu", batch_size=2)
    torch.testing.assert_close(measure.alignments(pictures, PROMPTS), cosines, rtol=0, atol=1e-5)
    assert measure.alignment(pictures, PROMPTS) == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert measure.alignment(pictures, PROMPTS[::-1]) != pytest.approx(cosines.mean().item(), abs=1e-4)


def test_one_encoder_serves_both(clip):
    encoder = Encoder(clip, device="cpu")
    pictures = random_images(2)
    assert ImageSimilarity(encoder).similarity(pictures[:1], pictures[:1]) == pytest.approx(1.0)
    assert TextAlignment(encoder).encoder is encoder
    with pytest.raises(ValueError, match="device belong to the making of an Encoder"):
        ImageSimilarity(encoder, device="cpu")


def test_modes_of_an_image_do_not_matter(dino):
    encoder = Encoder(dino, device="cpu")
    grey = random_images(1)[0].convert("L")
    expected = encoder.images([grey.convert("RGB")])
    for mode in ("L", "RGBA", "P"):
        torch.testing.assert_close(encoder.images([grey.convert(mode)]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_give_nearly_the_same(clip, dtype):
    pictures = random_images(3)
    wide, narrow = (ImageSimilarity(clip, device="cpu", dtype=kind) for kind in (torch.float32, dtype))
    assert narrow.encoder.model.dtype == dtype
    assert narrow.encoder.images(pictures).dtype == torch.float32
    assert narrow.similarity(pictures[:2], pictures[2:]) == pytest.approx(
        wide.similarity(pictures[:2], pictures[2:]), abs=0.02
    )


def test_values_that_are_not_finite_are_refused(clip):
    encoder = Encoder(clip, device="cpu", dtype=torch.float16)
    with torch.no_grad():
        encoder.model.visual_projection.weight.fill_(6e4)
    with pytest.raises(ValueError, match=r"torch.float16 gives values that aren't finite for images \[0, 1\]"):
        encoder.images(random_images(2))


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(clip, caplog):
    encoder = Encoder(clip, device="cpu")
    long = "a red cube " * 4
    with caplog.at_level(logging.WARNING):
        found = encoder.texts([long, "a red cube"])
    assert f"has 14 tokens, {clip} reads the first {TEXT_LENGTH}" in caplog.text
    assert caplog.text.count("tokens") == 1
    torch.testing.assert_close(found[:1], encoder.texts(["a red cube a red cube a red cube"]))


def test_progress_is_shown_over_several_batches_only(clip, capsys):
    encoder = Encoder(clip, device="cpu", batch_size=2)
    capsys.readouterr()
    encoder.images(random_images(2))
    assert capsys.readouterr().err == ""
    encoder.images(random_images(3))
    assert "3/3" in capsys.readouterr().err
    encoder.progress = False
    encoder.images(random_images(3))
    assert capsys.readouterr().err == ""


def test_the_identifier_is_taken_out_of_a_prompt():
    assert without_words("a photo of sks cube, Sks", ["sks"]) == "a photo of cube,"
    assert without_words("a photo of skies", ["sks"]) == "a photo of skies"


def test_empty_and_mismatched_input_is_refused(clip):
    measure, pictures = TextAlignment(clip, device="cpu"), random_images(2)
    with pytest.raises(ValueError, match="there are no images to embed"):
        ImageSimilarity(measure.encoder).similarity([], pictures)
    with pytest.raises(ValueError, match="there are 2 images and 1 prompts: give a list with one prompt"):
        measure.alignment(pictures, ["a"])
    with pytest.raises(ValueError, match="there are 2 images and 'ab': give a list with one prompt"):
        measure.alignment(pictures, "ab")
    with pytest.raises(ValueError, match="image 1 is a Tensor, expected a PIL image or a file"):
        measure.encoder.images([pictures[0], torch.zeros(3, 8, 8)])
    with pytest.raises(ValueError, match=r"no_picture.png"):
        measure.encoder.images([pictures[0], "no_picture.png"])
    with pytest.raises(ValueError, match="batch_size is 0"):
        Encoder(clip, batch_size=0)


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(clip, device):
    with pytest.raises(ValueError, match=f"device '{device}' can't be used: "):
        Encoder(clip, device=device)


def test_a_path_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"transformers can't load a model from {tmp_path / 'none'}"):
        Encoder(tmp_path / "none")
    with pytest.raises(ValueError, match=f"transformers can't load a model from {tmp_path}"):
        Encoder(tmp_path)


def test_a_model_of_another_type_is_refused(tmp_path):
    ConvNextModel(ConvNextConfig(hidden_sizes=[4, 6], depths=[1, 1], num_stages=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a ConvNextModel, expected CLIP, DINO or DINOv2"):
        Encoder(tmp_path)


@torch.no_grad()
def test_first_dino_gives_its_class_token(tmp_path):
    config = ViTConfig(hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=3, image_size=16)
    model = ViTModel(config).eval()
    for part in (model, dino_processor()):
        part.save_pretrained(tmp_path)
    (picture,) = random_images(1)
    pixels = dino_processor()(picture, return_tensors="pt").pixel_values
    expected = F.normalize(model(pixels).last_hidden_state[:, 0])
    torch.testing.assert_close(Encoder(tmp_path, device="cpu").images([picture]), expected)


def test_a_model_without_text_tower_is_refused(dino):
    with pytest.raises(ValueError, match="is a Dinov2Model, which has no text tower"):
        TextAlignment(dino)


def test_a_folder_without_processor_is_refused(tmp_path):
    dino_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no image processor that transformers can load"):
        Encoder(tmp_path)


def test_a_folder_without_tokenizer_is_refused_when_texts_are_asked_for(tmp_path):
    for part in (clip_model(), clip_processor()):
        part.save_pretrained(tmp_path)
    encoder = Encoder(tmp_path, device="cpu")
    encoder.images(random_images(1))
    with pytest.raises(ValueError, match="has no files of a tokenizer: save the model's processor beside it"):
        encoder.texts(["a"])


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    save_clip(tmp_path)
    other = tokenizer()
    other.add_tokens(["green"])
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a token 12, its text tower 12 tokens"):
        Encoder(tmp_path, device="cpu").texts(["green"])


@pytest.mark.parametrize("misshapen", [False, True])
def test_weights_that_are_missing_or_misshapen_are_named(tmp_path, misshapen):
    model = dino_model()
    state = model.state_dict()
    del state["layernorm.weight"]
    if misshapen:
        state["layernorm.weight"] = torch.ones(5)
    model.save_pretrained(tmp_path, state_dict=state)
    dino_processor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lack 1 tensors of Dinov2Model, or .* another shape \(layernorm.weight\)"):
        Encoder(tmp_path)


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    save_dino(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"transformers can't load a model from {tmp_path}"):
        Encoder(tmp_path)


def test_a_processor_saved_as_one_file_is_read_too(tmp_path, clip):
    clip_model().save_pretrained(tmp_path)
    CLIPProcessor(clip_processor(), tokenizer()).save_pretrained(tmp_path)
    encoder = Encoder(tmp_path, device="cpu")
    pictures = random_images(2)
    found = TextAlignment(encoder).alignments(pictures, PROMPTS[:2])
    torch.testing.assert_close(found, TextAlignment(clip, device="cpu").alignments(pictures, PROMPTS[:2]))
