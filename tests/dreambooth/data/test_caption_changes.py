"""Captions that are dropped or shuffled: how often, which tags, and that only seed and position decide."""

from itertools import pairwise, permutations

import pytest
import torch

from nara_diffusion.dreambooth.data.caption_changes import CaptionChanges
from nara_diffusion.dreambooth.data.dataset import DreamBoothDataset, collate_samples
from nara_diffusion.dreambooth.data.records import class_records, records_from_folder
from nara_diffusion.dreambooth.setup import load_instances, prompt_cache, training_data
from nara_diffusion.training.stream import stream_loader
from tests.dreambooth.data.pictures import folder_of
from tests.helpers.small_pipelines import small_sdxl
from tests.train_scripts.dreambooth_runs import tiny_arguments, write_pictures

TAGS = "sks toy, red,  on grass,, close-up "


def test_captions_are_dropped_as_often_as_asked_and_independently_of_the_shuffle() -> None:
    both = CaptionChanges(dropout=0.3, shuffle=True, keep_tokens=1)
    dropped = [both.apply(TAGS, 7, position) == "" for position in range(2000)]
    assert sum(dropped) / 2000 == pytest.approx(0.3, abs=0.04)
    # neither clustered nor periodic: pairs of neighbours occur as independent draws have them
    pairs = sum(one and other for one, other in pairwise(dropped))
    assert pairs / 1999 == pytest.approx(0.09, abs=0.03)
    for position in range(200):
        assert dropped[position] == (CaptionChanges(dropout=0.3).apply("a toy", 7, position) == "")
        if not dropped[position]:
            alone = CaptionChanges(shuffle=True, keep_tokens=1).apply(TAGS, 7, position)
            assert both.apply(TAGS, 7, position) == alone
    assert [CaptionChanges(dropout=1.0).apply(TAGS, 7, p) for p in range(3)] == [""] * 3
    assert dropped != [both.apply(TAGS, 8, position) == "" for position in range(2000)]


def test_every_order_of_the_tags_after_the_kept_ones_comes_equally_often() -> None:
    changes = CaptionChanges(shuffle=True, keep_tokens=1)
    seen = [changes.apply(TAGS, 3, position) for position in range(1800)]
    expected = {", ".join(["sks toy", *rest]) for rest in permutations(["red", "on grass", "close-up"])}
    assert set(seen) == expected
    assert all(seen.count(caption) == pytest.approx(300, abs=70) for caption in expected)
    assert len({CaptionChanges(shuffle=True).apply(TAGS, 3, position) for position in range(400)}) == 24


def test_a_caption_without_changes_keeps_its_characters() -> None:
    assert CaptionChanges().apply(TAGS, 0, 0) == TAGS
    assert CaptionChanges(shuffle=True, keep_tokens=9).apply("a toy, red", 0, 0) == "a toy, red"


@pytest.mark.parametrize("captions", [["a photo of a toy"], ["a toy, red", "sks, blue"], [""]])
def test_a_shuffle_of_nothing_is_refused(captions: list[str]) -> None:
    with pytest.raises(ValueError, match=r"keep_tokens is 1, but no caption has more than \d of them"):
        CaptionChanges(shuffle=True, keep_tokens=1).check(captions)
    CaptionChanges(shuffle=True, keep_tokens=1).check([*captions, "a, b, c"])


def test_draws_have_them_in_any_loader_and_class_images_do_not(tmp_path) -> None:
    folder = folder_of(tmp_path / "subject", [(20, 20), (18, 18), (16, 20)])
    for number in range(3):
        (folder / f"0{number}.txt").write_text(f"toy {number}, red, on grass, close-up")
    others = class_records(folder_of(tmp_path / "class", [(16, 16)]), prompt="a toy, plain, old", progress=False)
    changes = CaptionChanges(dropout=0.4, shuffle=True, keep_tokens=1)
    records = records_from_folder(folder, progress=False)
    data = DreamBoothDataset(records, [(16, 16)], batch_size=2, seed=5, class_images=others, captions=changes)
    plain = DreamBoothDataset(records, [(16, 16)], batch_size=2, seed=5, class_images=others)

    def read(first: int, size: int, workers: int = 0) -> list[str]:
        loader = stream_loader(data, collate_samples, batch_size=size, first=first, stop=24, num_workers=workers)
        return [prompt for batch in loader for prompt in batch["prompts"][: len(batch["prompts"]) // 2]]

    whole = read(0, 2)
    assert whole == [changes.apply(plain.samples_at(p)[0].prompt, 5, p) for p in range(24)]
    assert "" in whole
    assert read(0, 4) == whole
    assert read(0, 2, workers=2) == whole
    assert read(10, 2) == whole[10:]  # a resumed run
    shares = [read(0, 2)[i::4] for i in range(4)]  # batches of 2, dealt out to two processes
    assert [shares[i][n] for n in range(6) for i in range(4)] == whole
    assert {data.samples_at(p)[1].prompt for p in range(24)} == {"a toy, plain, old"}
    assert [draw.prompt for draw in data.plain_samples()] == [record.prompt for record in records]
    for p in range(24):  # nothing else is drawn otherwise
        assert data.samples_at(p)[0].crop == plain.samples_at(p)[0].crop


def test_the_cache_holds_shuffled_prompts_in_memory_and_warns_once_of_a_cut(tmp_path, caplog) -> None:
    pictures = write_pictures(tmp_path / "toy", 3)
    for number in range(3):
        (pictures / f"{number}.txt").write_text("toy, red, grass, " + " ".join(["toy"] * 20))
    changes = {"shuffle_caption": True, "cache_folder": str(tmp_path / "cache"), "caption_dropout": 0.2}
    args = tiny_arguments(tmp_path / "model", pictures, tmp_path / "out", **changes)
    pipe = small_sdxl()
    data = training_data(args, load_instances(args, False), [], pipe)
    cache = prompt_cache(args, pipe)
    prompts = [data.samples_at(p)[0].prompt for p in range(12)]
    assert len(set(prompts)) > 4
    assert "" in prompts
    embeds, pooled = cache.get(prompts)
    for row, prompt in enumerate(prompts):
        expected, _, pooled_alone, _ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        torch.testing.assert_close(embeds[row : row + 1], expected)
        torch.testing.assert_close(pooled[row : row + 1], pooled_alone)
    assert not (tmp_path / "cache").exists()
    assert caplog.text.count("is ignored") == 1
