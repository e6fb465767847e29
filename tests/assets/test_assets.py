"""The shipped models, pictures and questions: they load, are small, and do what their cards say."""

from __future__ import annotations

import json
from pathlib import Path

import make_subject
import make_two_step
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from make_clip_tiny import retrieval, words
from PIL import Image
from tiny_drawings.subjects import SUBJECTS
from tiny_images.evaluation import GUIDANCE
from transformers import CLIPModel, CLIPProcessor

from nara_diffusion.dllm import generate, load_backbone

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
MEGABYTES = {"llada-tiny": 6, "dream-tiny": 6, "uniform-tiny": 6, "clip-tiny": 3, "sdxl-tiny": 13, "sd-tiny-flow": 8}
MEGABYTES |= {"kontext-tiny": 7, "sdar-tiny": 3}
PROMPTS = (
    "a photo of a red car on the beach",
    "a photo of a blue house in the snow",
    "a photo of a large yellow balloon in the desert",
    "a photo of a purple flower on the grass",
)


@pytest.mark.parametrize("name", MEGABYTES)
def test_folder_is_small_and_card_has_its_figures(name):
    assert sum(path.stat().st_size for path in (ASSETS / name).rglob("*") if path.is_file()) < MEGABYTES[name] * 2**20
    results, card = json.loads((ASSETS / name / "results.json").read_text()), (ASSETS / name / "README.md").read_text()
    assert name.startswith(("clip", "sdxl", "sd-", "dream")) or f"{results['validation_loss']:.3f}" in card
    assert not list((ASSETS / name).rglob("*.bin")) + list((ASSETS / name).rglob("*.pt"))


def test_tiny_models_reverse_or_repair_a_word():
    """llada-tiny does the first in its pipeline."""
    model, tokenizer = load_backbone(str(ASSETS / "dream-tiny"))
    chat = [{"role": "user", "content": "reverse: planet"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    answer = generate(model, tokens, gen_length=12)[0, tokens.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "tenalp"
    model, tokenizer = load_backbone(ASSETS / "uniform-tiny")
    tokens = tokenizer(prompt + "te7alz<|eot_id|>", add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        predicted = model(tokens).logits[0, -7:].argmax(-1)
    assert tokenizer.decode(predicted) == "tenalp<|eot_id|>"


@pytest.fixture(scope="module")
def clip():
    folder = ASSETS / "clip-tiny"
    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(), CLIPProcessor.from_pretrained(folder)


@pytest.mark.slow
def test_clip_retrieves_as_its_card_says(clip):
    recorded = json.loads((ASSETS / "clip-tiny" / "results.json").read_text())["retrieval_among_64"]
    measured = retrieval(*clip, batches=2)
    assert all(value == pytest.approx(recorded[name], abs=0.05) for name, value in measured.items())
    assert all(len(clip[1].tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in words())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [("sdxl-tiny", {}), ("sd-tiny-flow", {"max_sequence_length": 0})],
)
def test_pictures_show_what_their_prompts_say(name, options, clip):
    absent = {} if name == "sdxl-tiny" else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = DiffusionPipeline.from_pretrained(ASSETS / name, dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(number) for number in range(len(PROMPTS))]
    sampling = {"num_inference_steps": 8, "guidance_scale": GUIDANCE, "generator": generators}
    images = pipe(list(PROMPTS), **sampling, **options).images
    model, processor = clip
    with torch.no_grad():
        output = model(**processor(text=list(PROMPTS), images=images, padding=True, return_tensors="pt"))
    cosines = output.image_embeds @ output.text_embeds.T
    assert (cosines.argmax(1) == torch.arange(len(PROMPTS))).sum() >= len(PROMPTS) - 1


def test_subject_is_what_its_maker_draws(tmp_path):
    for subject in SUBJECTS.values():
        make_subject.main(tmp_path, subject.kind)
        shipped = ASSETS / ("subject" if subject.kind == "toy" else f"subject-{subject.kind}")
        for number in range(1, 6):
            drawn, file = (np.asarray(Image.open(folder / f"{number}.png")) for folder in (tmp_path, shipped))
            assert (drawn == file).all()


def test_two_step_is_what_its_maker_makes(tmp_path):
    pytest.importorskip("reasoning_gym")
    make_two_step.main(tmp_path)
    for name in make_two_step.SPLITS:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (ASSETS / "two-step" / f"{name}.jsonl").read_bytes()
