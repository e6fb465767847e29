"""Similarity and alignment against the definitions, written out with the models themselves; figures over seeds."""

from __future__ import annotations

import json
from itertools import combinations, product
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mean_interval import Interval, interval
from PIL import Image
from subject_metrics import evaluate, main, table
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from nara_diffusion.dreambooth.encoders import Encoder, image_similarity, load_encoders, text_alignment, without_words
from tests.dreambooth.pictures import noise

CLIP_TINY = Path(__file__).parents[2] / "examples" / "assets" / "clip-tiny"
PROMPTS = ["a photo of a red car", "a blue house in the snow", "a photo of a ball"]


def pictures(count: int) -> list[Image.Image]:
    """Of unlike colours, with some texture, in sizes that no model takes as they are."""
    colours = np.random.default_rng(1).integers(0, 256, (count, 3)).tolist()
    return [
        Image.blend(Image.new("RGB", (70, 60 + number), tuple(colour)), noise(70, 60 + number, seed=number), 0.2)
        for number, colour in enumerate(colours)
    ]


@pytest.fixture(scope="module")
def clip() -> Encoder:
    return Encoder(CLIP_TINY, device="cpu", batch_size=2)


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Encoder:
    """A small DINOv2 whose weights are as large as trained ones: to a fresh ViT all images look alike."""
    folder = tmp_path_factory.mktemp("dino")
    config = Dinov2Config(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=8)
    model, generator = Dinov2Model(config), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    model.save_pretrained(folder)
    processor = BitImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(folder)
    return Encoder(folder, device="cpu", batch_size=2)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a @ b / a.norm() / b.norm()).item()


@torch.no_grad()
def clip_vectors(images: list[Image.Image]) -> list[torch.Tensor]:
    model, processor = (
        CLIPModel.from_pretrained(CLIP_TINY, dtype=torch.float32),
        CLIPImageProcessorPil.from_pretrained(CLIP_TINY),
    )
    pixels = [processor(image, return_tensors="pt").pixel_values for image in images]
    return [model.visual_projection(model.vision_model(p).pooler_output)[0] for p in pixels]


def test_similarity_is_the_mean_cosine_over_all_pairs(clip, dino) -> None:
    def dino_vectors(images: list[Image.Image]) -> list[torch.Tensor]:
        pixels = [dino.processor(image, return_tensors="pt").pixel_values for image in images]
        return [dino.model(p).last_hidden_state[0, 0] for p in pixels]

    generated, reference = pictures(5)[:3], pictures(5)[3:]
    for encoder, vectors in ((clip, clip_vectors), (dino, dino_vectors)):
        cosines = [cosine(x, y) for x, y in product(vectors(generated), vectors(reference))]
        assert image_similarity(encoder, generated, reference) == pytest.approx(fmean(cosines), abs=1e-5)
        assert max(cosines) - min(cosines) > 1e-2  # the images differ to this encoder


@torch.no_grad()
def test_alignment_is_mean_cosine_of_image_and_prompt(clip) -> None:
    model, words, images = clip.model, CLIPTokenizer.from_pretrained(CLIP_TINY), pictures(3)
    tokens = [words(prompt, return_tensors="pt") for prompt in PROMPTS]
    texts = [model.text_projection(model.text_model(**ids).pooler_output)[0] for ids in tokens]
    expected = fmean(cosine(x, t) for x, t in zip(clip_vectors(images), texts, strict=True))
    prompts = ["a photo of a Sks red car", "a sks, blue house in the snow", "a photo of a ball"]
    assert text_alignment(clip, images, prompts, ["sks"]) == pytest.approx(expected, abs=1e-5)
    assert text_alignment(clip, images, PROMPTS[::-1]) != pytest.approx(expected, abs=1e-4)
    assert without_words("a photo of SKS, toy.", ["sks"]) == "a photo of toy."


def test_models_that_cannot_measure_are_refused(dino, tmp_path) -> None:
    with pytest.raises(ValueError, match="is a Dinov2Model, which can't encode text"):
        dino.texts(["a"])
    model = dino.model
    tensors = {name: value for name, value in model.state_dict().items() if "layernorm.weight" not in name}
    model.save_pretrained(tmp_path / "part", state_dict=tensors)
    with pytest.raises(ValueError, match=r"part lacks 1 tensors of its weights, such as layernorm.weight"):
        Encoder(tmp_path / "part")
    CLIPModel.from_pretrained(CLIP_TINY).text_model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"is a CLIPTextModel\. Expected CLIP, DINO or DINOv2"):
        Encoder(tmp_path / "other")


def test_unreachable_encoder_is_named_with_the_way_without() -> None:
    args = SimpleNamespace(similarity_model="some/dino", alignment_model=None)
    message = r"The encoder some/dino can't be loaded \(the Hub can't be reached\)\. .* --alignment_model none"
    with pytest.raises(ValueError, match=message):
        load_encoders(args, torch.device("cpu"))


def test_program_measures_each_seed_and_then_their_interval(tmp_path, clip, capsys) -> None:
    folders = [tmp_path / name for name in ("one", "other", "subject")]
    for folder, drawn in zip(folders, (pictures(9)[:3], pictures(9)[3:6], pictures(9)[6:]), strict=True):
        lines = [json.dumps({"file_name": f"{i}.png", "text": prompt}) for i, prompt in enumerate(PROMPTS)]
        folder.mkdir()
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        for number, image in enumerate(drawn):
            image.save(folder / f"{number}.png")
    one, other, subject = (sorted(folder.glob("*.png")) for folder in folders)
    words = ["--generated", *map(str, folders[:2]), "--reference", str(folders[2]), "--output", str(tmp_path / "out")]
    main([*words, "--clip", clip.name, "--device", "cpu"])
    figures, printed = json.loads((tmp_path / "out").read_text()), capsys.readouterr().out
    for key, values in {
        "clip_similarity": [image_similarity(clip, seed, subject) for seed in (one, other)],
        "text_alignment": [text_alignment(clip, seed, PROMPTS) for seed in (one, other)],
    }.items():
        assert figures[key]["values"] == pytest.approx(values, abs=1e-6)
        assert [figures[key][name] for name in Interval._fields] == pytest.approx(list(interval(values)), abs=1e-5)
    similarity = fmean(cosine(x, y) for x, y in combinations(clip.images(subject), 2))
    assert f"among themselves: CLIP image similarity {similarity:.3f}" in printed
    assert f"{figures['text_alignment']['low']:.4f} to {figures['text_alignment']['high']:.4f}" in printed
    with pytest.raises(SystemExit):
        main(words)
    assert "name at least one model to measure with: --clip, --dino" in capsys.readouterr().err
    for folder in folders:
        (folder / "metadata.jsonl").unlink()
    assert "alignment" not in (printed_table := table(evaluate([folders[0]], folders[2], clip=clip)))
    assert "one seed, no interval" in printed_table
    (folders[0] / "0.txt").write_text("a red car")
    with pytest.raises(ValueError, match="has prompts of 1 of its 3 images"):
        evaluate([folders[0]], folders[2], clip=clip)
