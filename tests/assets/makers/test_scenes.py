"""The renderer: scenes follow from their numbers, captions say what is drawn, and the tokenizer knows every word."""

from pathlib import Path

import make_clip_tiny
import numpy as np
import pytest
from PIL import Image, ImageDraw
from tiny_clip import retrieval
from tiny_clip.vocabulary import MAX_TOKENS, build_tokenizer, learn_merges, save_tokenizer, words
from tiny_drawings.objects import COLOURS, KINDS, USUAL_ACCENT
from tiny_drawings.pen import Pen
from tiny_drawings.places import PLACES
from tiny_drawings.scenes import Scene, crop_of, distinct_scenes, render, scene, scenes, training_caption
from tiny_images import evaluation, latents, vae
from transformers import CLIPTokenizer


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_a_scene_and_its_picture_follow_from_split_seed_and_number() -> None:
    first = scene("some", 4, 7)
    assert first == scene("some", 4, 7)
    assert (array(render(first)) == array(render(first))).all()
    others = [scene("other", 4, 7), scene("some", 5, 7), scene("some", 4, 8)]
    assert all((array(render(other)) != array(render(first))).any() for other in others)
    assert scenes("some", 4, 3, start=6)[1] == first


def test_no_two_makers_draw_from_the_same_split() -> None:
    splits = [
        make_clip_tiny.SPLIT,
        retrieval.SPLIT,
        vae.SPLIT,
        vae.VALIDATION_SPLIT,
        latents.SPLIT,
        f"{latents.SPLIT}-validation",
        evaluation.SPLIT,
    ]
    assert len(set(splits)) == len(splits)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_shows_both_of_its_colours(kind: str) -> None:
    """The picture in blue and yellow has many pixels of either colour, far from any that the place has."""
    drawn = array(render(Scene(kind, "blue", "yellow", "large", "", "in the snow", "shown")))
    for colour in ("blue", "yellow"):
        near = np.abs(drawn - COLOURS[colour]).max(-1) <= 30
        assert near.sum() >= 15, f"{near.sum()} {colour} pixels"


def test_size_side_and_place_are_what_the_caption_says() -> None:
    def redness(size: str, side: str) -> np.ndarray:
        drawn = array(render(Scene("ball", "red", "white", size, side, "on the grass", "shown")))
        return np.argwhere((drawn[..., 0] > 180) & (drawn[..., 1] < 90))[:, 1]  # columns of red pixels

    assert len(redness("small", "")) < len(redness("", "")) < len(redness("large", ""))
    assert redness("", "on the left").mean() < 24 < redness("", "").mean() < 40 < redness("", "on the right").mean()
    skies = [array(render(Scene("ball", "red", "white", "", "", place, "shown")))[:4].mean((0, 1)) for place in PLACES]
    distances = [np.abs(a - b).max() for number, a in enumerate(skies) for b in skies[:number]]
    assert min(distances) > 3


def test_a_caption_names_what_is_there() -> None:
    plain = Scene("car", "orange", USUAL_ACCENT["car"], "", "", "on the beach", "x")
    assert plain.caption == "a photo of an orange car on the beach"
    full = Scene("toy", "red", "yellow", "small", "on the left", "in space", "x")
    assert full.caption == "a photo of a small red and yellow toy on the left in space"
    assert full.words("", colours=False, place=False) == "a small toy on the left"


def test_training_captions_leave_things_out_now_and_then() -> None:
    shown = scenes("captions", 0, 600)
    captions = [training_caption(item) for item in shown]
    colourless = sum(not set(caption.split()) & set(COLOURS) for caption in captions) / 600
    placeless = sum(item.place not in caption for item, caption in zip(shown, captions, strict=True)) / 600
    assert 0.14 < colourless < 0.26
    assert 0.06 < placeless < 0.14
    assert all(item.kind in caption for item, caption in zip(shown, captions, strict=True))


def test_a_crop_is_a_window_of_the_larger_picture() -> None:
    shown = scene("some", 0, 0)
    whole = array(render(shown, 80))
    assert whole.shape == (80, 80, 3)
    assert (array(crop_of(shown, 80, 5, 11)) == whole[5:69, 11:75]).all()


def test_a_mirrored_pen_draws_the_mirror_image() -> None:
    pictures = []
    for mirrored in (False, True):
        image = Image.new("RGB", (129, 129))
        pen = Pen(ImageDraw.Draw(image), (64, 64), 48, mirrored)
        pen.sector((-1, -1, 1, 1), 10, 100, (255, 0, 0))
        pen.polygon([(-1, 0), (-0.5, 0), (-1, -0.5)], (0, 0, 255))
        pictures.append(array(image))
    difference = np.abs(pictures[0][:, ::-1] - pictures[1]).max(-1) > 0
    assert difference.mean() < 0.01, "only the edges' rounding may differ"
    assert (np.abs(pictures[0] - pictures[1]).max(-1) > 0).mean() > 0.1


def test_distinct_scenes_have_distinct_captions() -> None:
    captions = [item.caption for item in distinct_scenes("some", 0, 300)]
    assert len(set(captions)) == 300


def test_merges_are_those_of_a_worked_example() -> None:
    """ "a b" is met twice; all other pairs once, so that the lesser comes first, "a" before "ab" before "abc"."""
    merges = learn_merges(["ab", "abc", "abcd"])
    assert merges == [("a", "b"), ("a", "b</w>"), ("ab", "c"), ("ab", "c</w>"), ("abc", "d</w>")]
    assert build_tokenizer().get_vocab() == build_tokenizer().get_vocab()


def test_every_word_is_one_token_and_any_text_comes_back(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in words())
    captions = [caption for item in scenes("tokens", 0, 200) for caption in (item.caption, training_caption(item))]
    for text in [*captions, "a photo of sks toy", "naïve übergrößen 中文", "x9!"]:
        ids = tokenizer(text).input_ids
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.unk_token_id not in ids[1:-1]
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    assert max(len(tokenizer(caption).input_ids) for caption in captions) <= MAX_TOKENS
    assert not any("sks" in caption for caption in captions)

    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").unlink()  # CLIP's own two files are enough
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded(captions).input_ids == tokenizer(captions).input_ids
