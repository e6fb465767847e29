"""Folders of generated images → the three figures of each training seed, and their interval over the seeds.

A folder is one training seed: its images are those of all prompts. A folder whose images lie in subfolders holds
several subjects, as DreamBooth's own 30 do: each is compared with the reference subfolder of its name, and the seed's
figure is the mean over its subjects. The interval is over seeds and not over images: images of one run share what
went right or wrong in it, so that counting them would make the interval too narrow.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from nara_diffusion.dreambooth.data.captions import METADATA_FILE, captions_for, have_text_files
from nara_diffusion.dreambooth.data.images import image_files
from nara_diffusion.utils.statistics import interval

from .encoders import Encoder
from .metrics import without_words

MEASURES = {
    "dino_similarity": "DINO image similarity",
    "clip_similarity": "CLIP image similarity",
    "text_alignment": "CLIP text alignment",
}
"""Keys of the figures, and their names for people."""


@dataclass(frozen=True)
class PromptSource:
    """The rule by which the prompts of generated images are found.

    Attributes:
        file: one prompt a line: of p lines and p · k images, in the order of their names and of the numbers in them,
            the first k images belong to the first line. None takes metadata.jsonl or text files beside the images.
        caption_column: the key of the prompts in metadata.jsonl; None means "text".
        identifier: words left out of the prompts, such as the subject's rare token, which CLIP doesn't know.
    """

    file: Path | None = None
    caption_column: str | None = None
    identifier: Sequence[str] = ()

    def prompts_of(self, images: Sequence[Path]) -> list[str] | None:
        """The prompt of each image; None if nothing says it.

        Raises:
            ValueError: a number of images that isn't a multiple of the number of prompts, a file that can't be read, or
                captions that lack some image.
        """
        folder = images[0].parent
        if self.file is not None:
            prompts = _dealt_out(self.file, images)
        elif (folder / METADATA_FILE).exists() or have_text_files(images):
            prompts = captions_for(images, prompt=None, caption_column=self.caption_column)
        else:
            return None
        return [without_words(prompt, self.identifier) for prompt in prompts]


@dataclass(frozen=True)
class SubjectImages:
    """Images of one subject of one seed, and their prompts, or None."""

    files: Sequence[Path]
    prompts: Sequence[str] | None


def evaluate(
    generated: Sequence[str | Path],
    reference: str | Path,
    *,
    clip: Encoder | None = None,
    dino: Encoder | None = None,
    prompts: PromptSource | None = None,
) -> dict[str, Any]:
    """Figures of each folder in `generated`, and over all of them.

    Args:
        generated: a folder for each training seed.
        reference: the subject's own images.
        clip: for image similarity and text alignment.
        dino: for image similarity.
        prompts: where they come from; default: beside the images.

    Returns:
        {"dino_similarity": {"mean", "std", "low", "high", "values"}, …, "seeds": [{"folder", "images", …}, …],
        "reference": {"dino_similarity", …}}: the last is how alike the subject's own images are, each to the others,
        which is what similarity can be expected to reach. What an absent encoder, prompts that nothing tells, or a
        single image of the subject leave unmeasured is absent; std, low and high of one seed are None.

    Raises:
        ValueError: no encoder, no folder, one given twice, missing images, prompts that don't fit or are known for some
            folders only or to an encoder without a text tower, subjects that don't match.
    """
    folders = [Path(folder) for folder in generated]
    if clip is None and dino is None:
        raise ValueError("there is no encoder to measure with: give CLIP, DINO or both")
    if not folders or len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"generated is {[str(f) for f in folders]}, expected one folder or more, each once")
    subjects = _images_by_subject(Path(reference))
    source = prompts or PromptSource()
    runs = {folder: _match(folder, subjects.keys(), source if clip else None) for folder in folders}
    if clip is not None and _prompts_known(runs):
        clip.check_text()
    evaluators = {name: _Evaluator(clip, dino, images) for name, images in subjects.items()}
    seeds = [_seed(folder, run, evaluators) for folder, run in runs.items()]
    figures = {key: _over_seeds([seed[key] for seed in seeds]) for key in MEASURES if key in seeds[0]}
    return {
        **figures,
        "seeds": seeds,
        "reference": _means([evaluator.among_themselves() for evaluator in evaluators.values()]),
    }


class _Evaluator:
    """The embeddings of one subject by each encoder, and the figures of images compared with them."""

    def __init__(self, clip: Encoder | None, dino: Encoder | None, reference: Sequence[Path]) -> None:
        self.encoders = {key: e for key, e in (("dino_similarity", dino), ("clip_similarity", clip)) if e is not None}
        self.reference = {key: encoder.images(reference) for key, encoder in self.encoders.items()}  # (m, d) each

    def figures(self, images: SubjectImages) -> dict[str, float]:
        """CLIP sees each image once, for both of its figures."""
        found = {}
        for key, encoder in self.encoders.items():
            vectors = encoder.images(images.files)  # (n, d)
            found[key] = (vectors @ self.reference[key].T).mean().item()
            if key == "clip_similarity" and images.prompts is not None:
                found["text_alignment"] = (vectors * encoder.texts(images.prompts)).sum(1).mean().item()
        return found

    def among_themselves(self) -> dict[str, float]:
        """The mean over pairs of different images of the subject; nothing if there is one image."""
        found = {}
        for key, vectors in self.reference.items():
            count = len(vectors)
            if count > 1:
                found[key] = (((vectors @ vectors.T).sum() - count) / (count * (count - 1))).item()
        return found


def table(figures: Mapping[str, Any]) -> str:
    """Format the findings of `evaluate` as lines for a terminal."""
    lines = [f"{'':22s} {'mean':>7s} {'std':>7s}   {'95 % interval':17s}  each seed"]
    for key, name in MEASURES.items():
        if key not in figures:
            lines.append(f"{name:22s} not measured")
            continue
        found = figures[key]
        std = bounds = "–"
        if found["std"] is not None:
            std, bounds = f"{found['std']:.4f}", f"{found['low']:.4f} to {found['high']:.4f}"
        each = " ".join(f"{value:.3f}" for value in found["values"])
        lines.append(f"{name:22s} {found['mean']:7.4f} {std:>7s}   {bounds:17s}  {each}")
    if figures["reference"]:
        own = ", ".join(f"{MEASURES[key]} {value:.3f}" for key, value in figures["reference"].items())
        lines.append(f"The subject's own images among themselves: {own}.")
    if len(figures["seeds"]) == 1:
        lines.append("One seed has no interval: give one folder for each of several training seeds.")
    return "\n".join(lines)


def _seed(folder: Path, run: Mapping[str, SubjectImages], evaluators: Mapping[str, _Evaluator]) -> dict[str, Any]:
    """The means over its subjects, and, of several, the figures of each."""
    subjects = {name: evaluators[name].figures(images) for name, images in run.items()}
    figures = {"folder": str(folder), "images": sum(len(images.files) for images in run.values())}
    return {**figures, **_means(list(subjects.values())), **({"subjects": subjects} if len(subjects) > 1 else {})}


def _means(subjects: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Over the subjects that have the figure, which are all, but for a subject with a single image of its own."""
    keys = [key for key in MEASURES if any(key in found for found in subjects)]
    return {key: fmean(found[key] for found in subjects if key in found) for key in keys}


def _over_seeds(values: list[float]) -> dict[str, Any]:
    spread = interval(values)._asdict()
    return {**{name: None if math.isnan(value) else value for name, value in spread.items()}, "values": values}


def _images_by_subject(folder: Path) -> dict[str, list[Path]]:
    """{name: images}: of the folder itself, under the name "", or of each of its subfolders; 2.png before 10.png."""
    images, others = image_files(folder)
    if images:
        return {"": sorted(images, key=_natural)}
    subfolders = [entry for entry in others if entry.is_dir() and not entry.name.startswith(".")]
    found = {entry.name: sorted(image_files(entry)[0], key=_natural) for entry in subfolders}
    found = {name: images for name, images in found.items() if images}
    if not found:
        raise ValueError(
            f"the image folder {folder} holds no images, nor do its subfolders: put .png or .jpg files there"
        )
    return found


def _match(folder: Path, names: Collection[str], source: PromptSource | None) -> dict[str, SubjectImages]:
    generated = _images_by_subject(folder)
    differing = sorted(generated.keys() ^ set(names))
    if differing:
        lonely = [name or "images without a subfolder" for name in differing[:4]]
        raise ValueError(
            f"{folder} and the reference folder have to hold the same subjects, as subfolders of the same names, or "
            f"images of one subject without subfolders; only one of the two has {', '.join(lonely)}"
        )
    return {
        name: SubjectImages(images, source.prompts_of(images) if source else None) for name, images in generated.items()
    }


def _prompts_known(runs: Mapping[Path, Mapping[str, SubjectImages]]) -> bool:
    """Return whether all images have prompts; False if none has."""
    known = {folder / name: images.prompts is not None for folder, run in runs.items() for name, images in run.items()}
    if len(set(known.values())) > 1:
        without = [str(folder) for folder, has_prompts in known.items() if not has_prompts]
        raise ValueError(
            f"{len(without)} of {len(known)} folders don't say what the prompts of their images were "
            f"({', '.join(without[:4])}), others do: write a metadata.jsonl into each, or give a file of prompts"
        )
    return all(known.values())


def _dealt_out(file: Path, images: Sequence[Path]) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the prompts file {file} can't be read: {error}") from error
    if not lines:
        raise ValueError(f"the prompts file {file} is empty: write one prompt a line")
    if len(images) % len(lines):
        raise ValueError(
            f"{images[0].parent} holds {len(images)} images and {file} {len(lines)} prompts: the number of images has "
            "to be a multiple of the number of prompts"
        )
    return [line for line in lines for _ in range(len(images) // len(lines))]


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sorts numbers by their value: a list of (0, number, "") and (1, 0, text)."""
    parts = re.split(r"(\d+)", path.name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]
