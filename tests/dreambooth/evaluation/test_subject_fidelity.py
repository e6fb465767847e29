"""Figures over several seeds and subjects against single measurements, and what is refused before any encoding."""

from __future__ import annotations

import json
import re
from importlib import import_module
from itertools import combinations
from pathlib import Path
from statistics import fmean

import pytest

from nara_diffusion.dreambooth.data.images import load_image
from nara_diffusion.dreambooth.evaluation.cli import MetricsArguments, main, measure
from nara_diffusion.dreambooth.evaluation.encoders import Encoder
from nara_diffusion.dreambooth.evaluation.metrics import ImageSimilarity, TextAlignment
from nara_diffusion.dreambooth.evaluation.subject_fidelity import PromptSource, evaluate, table
from nara_diffusion.utils.statistics import interval
from tests.dreambooth.evaluation.small_encoders import random_images, save_clip, save_dino

PROMPTS = ["a red cube", "a blue ball", "a photo of a ball"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Encoder:
    return Encoder(save_clip(tmp_path_factory.mktemp("clip")), device="cpu", batch_size=2, progress=False)


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Encoder:
    return Encoder(save_dino(tmp_path_factory.mktemp("dino")), device="cpu", batch_size=2, progress=False)


def fill(folder: Path, n: int, first: int = 0, prompts: list[str] | None = None) -> Path:
    """n images, other ones for another `first`, named by their numbers, with prompts in a metadata.jsonl."""
    folder.mkdir(parents=True)
    for number, image in enumerate(random_images(first + n)[first:]):
        image.save(folder / f"{number}.png")
    if prompts is not None:
        rows = [{"file_name": f"{i}.png", "text": prompt} for i, prompt in enumerate(prompts)]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pictures(folder: Path, n: int) -> list:
    return [load_image(folder / f"{number}.png") for number in range(n)]


def test_each_seed_is_measured_and_then_their_interval(tmp_path, clip, dino):
    seeds = [fill(tmp_path / f"seed-{seed}", 3, 5 * seed, PROMPTS) for seed in range(3)]
    reference = fill(tmp_path / "subject", 2, 20)
    figures = evaluate(seeds, reference, clip=clip, dino=dino)
    expected = {
        "dino_similarity": [
            ImageSimilarity(dino).similarity(pictures(seed, 3), pictures(reference, 2)) for seed in seeds
        ],
        "clip_similarity": [
            ImageSimilarity(clip).similarity(pictures(seed, 3), pictures(reference, 2)) for seed in seeds
        ],
        "text_alignment": [TextAlignment(clip).alignment(pictures(seed, 3), PROMPTS) for seed in seeds],
    }
    for key, values in expected.items():
        assert figures[key]["values"] == pytest.approx(values, abs=1e-6)
        found = [figures[key][name] for name in ("mean", "std", "low", "high")]
        assert found == pytest.approx(list(interval(values)), abs=1e-5)
        assert figures[key]["std"] > 1e-3
    assert [seed["folder"] for seed in figures["seeds"]] == [str(seed) for seed in seeds]
    assert [seed["images"] for seed in figures["seeds"]] == [3, 3, 3]
    assert figures["seeds"][1]["text_alignment"] == pytest.approx(expected["text_alignment"][1], abs=1e-6)


def test_several_subjects_are_measured_apart_and_averaged(tmp_path, dino):
    for name, n, first in (("dog", 2, 0), ("mug", 3, 4)):
        fill(tmp_path / "generated" / name, n, first)
        fill(tmp_path / "reference" / name, 2, first + 10)
    figures = evaluate([tmp_path / "generated"], tmp_path / "reference", dino=dino)
    apart = [
        ImageSimilarity(dino).similarity(
            pictures(tmp_path / "generated" / name, n), pictures(tmp_path / "reference" / name, 2)
        )
        for name, n in (("dog", 2), ("mug", 3))
    ]
    (seed,) = figures["seeds"]
    assert seed["images"] == 5
    assert [seed["subjects"][name]["dino_similarity"] for name in ("dog", "mug")] == pytest.approx(apart, abs=1e-6)
    assert figures["dino_similarity"]["mean"] == pytest.approx(sum(apart) / 2, abs=1e-6)
    assert figures["dino_similarity"]["low"] is None


def test_how_alike_the_subjects_own_images_are(tmp_path, dino):
    for name, n in (("dog", 3), ("mug", 2), ("hat", 1)):
        fill(tmp_path / "generated" / name, 1)
        fill(tmp_path / "reference" / name, n, 5)
    figures = evaluate([tmp_path / "generated"], tmp_path / "reference", dino=dino)
    means = []
    for name, n in (("dog", 3), ("mug", 2)):
        vectors = dino.images(pictures(tmp_path / "reference" / name, n))
        means.append(fmean((vectors[i] @ vectors[j]).item() for i, j in combinations(range(n), 2)))
    assert figures["reference"] == {"dino_similarity": pytest.approx(fmean(means), abs=1e-6)}
    assert f"among themselves: DINO image similarity {fmean(means):.3f}." in table(figures)


def test_prompts_of_a_file_are_dealt_out_in_the_order_of_the_numbers(tmp_path):
    folder = fill(tmp_path / "images", 12)
    file = tmp_path / "prompts.txt"
    file.write_text("a red cube\n\na sks ball\na photo of a ball\n")
    images = sorted(folder.glob("*.png"), key=lambda path: int(path.stem))
    source = PromptSource(file, identifier=["sks"])
    assert source.prompts_of(images) == ["a red cube"] * 4 + ["a ball"] * 4 + ["a photo of a ball"] * 4


def test_images_are_taken_in_the_order_of_their_numbers(tmp_path, clip):
    """10.png comes after 9.png, although "1" comes before "9"."""
    prompts = [*PROMPTS, "blue", "red", "cube", "ball", "a", "photo", "of", "a cube"]
    folder, reference = fill(tmp_path / "images", 11), fill(tmp_path / "subject", 1, 20)
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts))
    figures = evaluate([folder], reference, clip=clip, prompts=PromptSource(file))
    expected = TextAlignment(clip).alignment(pictures(folder, 11), prompts)
    assert figures["text_alignment"]["mean"] == pytest.approx(expected, abs=1e-6)


def test_prompts_beside_the_images(tmp_path):
    folder = fill(tmp_path / "images", 2)
    images = [folder / "0.png", folder / "1.png"]
    assert PromptSource().prompts_of(images) is None
    for image, text in zip(images, PROMPTS, strict=False):
        image.with_suffix(".txt").write_text(text)
    assert PromptSource().prompts_of(images) == PROMPTS[:2]
    for image in images:
        image.with_suffix(".txt").rename(image.with_suffix(".caption"))
    assert PromptSource().prompts_of(images) == PROMPTS[:2]
    rows = [{"file_name": image.name, "prompt": f"{image.stem} sks"} for image in images]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert PromptSource(caption_column="prompt", identifier=["sks"]).prompts_of(images) == ["0", "1"]


def test_without_prompts_alignment_is_not_measured(tmp_path, clip):
    folder, reference = fill(tmp_path / "images", 2), fill(tmp_path / "subject", 1, 9)
    figures = evaluate([folder], reference, clip=clip)
    assert set(figures) == {"clip_similarity", "seeds", "reference"}
    assert "CLIP text alignment    not measured" in table(figures)
    assert "DINO image similarity  not measured" in table(figures)
    assert "One seed has no interval" in table(figures)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no encoder", "there is no encoder to measure with"),
        ("no folder", "expected one folder or more, each once"),
        ("one folder twice", "expected one folder or more, each once"),
        ("missing folder", "doesn't exist"),
        ("empty folder", "holds no images, nor do its subfolders"),
        ("other subjects", r"have to hold the same subjects.*only one of the two has images without a subfolder, dog"),
        ("wrong number of prompts", "holds 3 images and .* 2 prompts: the number of images has to be a multiple"),
        ("empty prompts", "is empty: write one prompt a line"),
        ("missing prompts", "can't be read"),
        ("prompts for some", r"1 of 2 folders don't say .*second"),
        ("no text tower", "is a Dinov2Model, which has no text tower"),
        ("a caption is missing", r"1 of 3 images \(2.png\) have no caption in metadata.jsonl"),
    ],
)
def test_refused(tmp_path, clip, dino, monkeypatch, case, message):
    def no_encoding(*_):
        raise AssertionError("encoded before the input was checked")

    for encoder in (clip, dino):
        monkeypatch.setattr(encoder, "_embed", no_encoding)
    reference = fill(tmp_path / "subject", 1)
    first, second = fill(tmp_path / "first", 3, prompts=PROMPTS), fill(tmp_path / "second", 3)
    few, empty, nothing = tmp_path / "few.txt", tmp_path / "empty.txt", tmp_path / "nothing"
    few.write_text("a\nb\n")
    empty.write_text("\n")
    nothing.mkdir()
    short = fill(tmp_path / "short", 3, prompts=PROMPTS[:2])
    fill(tmp_path / "subjects" / "dog", 1)
    calls = {
        "no encoder": lambda: evaluate([first], reference),
        "no folder": lambda: evaluate([], reference, clip=clip),
        "one folder twice": lambda: evaluate([first, tmp_path / "subject" / ".." / "first"], reference, clip=clip),
        "missing folder": lambda: evaluate([first, tmp_path / "none"], reference, clip=clip),
        "empty folder": lambda: evaluate([first, nothing], reference, clip=clip),
        "other subjects": lambda: evaluate([tmp_path / "subjects"], reference, clip=clip),
        "wrong number of prompts": lambda: evaluate([first], reference, clip=clip, prompts=PromptSource(few)),
        "empty prompts": lambda: evaluate([first], reference, clip=clip, prompts=PromptSource(empty)),
        "missing prompts": lambda: evaluate([first], reference, clip=clip, prompts=PromptSource(tmp_path / "no.txt")),
        "prompts for some": lambda: evaluate([first, second], reference, clip=clip),
        "no text tower": lambda: evaluate([first], reference, clip=dino),
        "a caption is missing": lambda: evaluate([short], reference, clip=clip),
    }
    with pytest.raises(ValueError, match=message):
        calls[case]()


def test_the_command_writes_its_figures_and_shows_them(tmp_path, clip, dino, capsys):
    seeds = [str(fill(tmp_path / f"seed-{seed}", 3, 5 * seed, PROMPTS)) for seed in range(2)]
    reference, output = fill(tmp_path / "subject", 2, 20), tmp_path / "new" / "results.json"
    words = ["--generated", *seeds, "--reference", str(reference), "--clip", clip.name, "--dino", dino.name]
    main([*words, "--device", "cpu", "--output", str(output)])
    written = json.loads(output.read_text())
    expected = evaluate(seeds, reference, clip=clip, dino=dino)
    for key in ("dino_similarity", "clip_similarity", "text_alignment"):
        assert written[key]["mean"] == pytest.approx(expected[key]["mean"], abs=1e-6)
    assert written["arguments"]["generated"] == seeds
    printed = capsys.readouterr().out
    assert f"{written['text_alignment']['low']:.4f} to {written['text_alignment']['high']:.4f}" in printed
    assert f"all figures are in {output}" in printed
    assert not list(output.parent.glob(".*"))


def test_one_seed_is_strict_json(tmp_path, dino):
    folder, reference = fill(tmp_path / "images", 2), fill(tmp_path / "subject", 1, 9)
    measure(MetricsArguments([str(folder)], str(reference), dino=dino.name, output=str(tmp_path / "results.json")))

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)["dino_similarity"]["std"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--generated is missing"),
        (["--generated", "a"], "--reference is missing"),
        (["--generated", "a", "--reference", "b"], "--clip and --dino are missing"),
        (["--generated", "a", "--reference", "b", "--dino", "d", "--prompts", "p"], "--prompts are for text alignment"),
        (["--generated", "a", "--reference", "b", "--dino", "d", "--dtype", "int8"], "dtype takes one of float32"),
        (["--generated", "a", "--reference", "b", "--dino", "d", "--output", "."], "--output . is a folder"),
        (["--generated", "a", "--reference", "b", "--dino", "/no/model"], "can't load a model from /no/model"),
        (
            ["--generated", "a", "--reference", "b", "--dino", "d", "--output", "/dev/null/x"],
            "--output /dev/null/x can't be written",
        ),
    ],
)
def test_the_command_refuses_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_the_command_is_installed_under_its_name():
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    (module, name) = re.findall(r'^nara-metrics = "(.+):(.+)"$', project, flags=re.MULTILINE)[0]
    assert getattr(import_module(module), name) is main


def test_help_teaches_by_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "--reference dog_images --clip openai/clip-vit-base-patch32" in " ".join(shown.replace("\\\n", " ").split())
    assert "metadata.jsonl" in shown
    assert "--identifier" in shown
