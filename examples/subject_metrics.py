"""Subject fidelity and prompt fidelity, measured over several training seeds.

Three seeds of one method, measured with the encoders of DreamBooth's paper (arXiv 2208.12242, section 4.1):
    python examples/subject_metrics.py --generated out-seed-0/samples-after out-seed-1/samples-after \\
        out-seed-2/samples-after --reference dog_images --clip openai/clip-vit-base-patch32 \\
        --dino facebook/dino-vits16 --identifier sks --output results.json

What is measured:
    DINO image similarity   mean cosine between generated images and those of the subject: subject fidelity
    CLIP image similarity   the same by CLIP, which sees kinds of things rather than this very one
    CLIP text alignment     mean cosine between a generated image and its prompt: prompt fidelity
Each has a mean, a standard deviation and a 95 % interval (Student's t) over the folders of --generated, one a training
seed: images of one run share what went right or wrong in it, so counting them would make the interval too narrow.
Figures of different encoders can't be compared.

Prompts come from a metadata.jsonl in each generated folder, {"file_name": "00.png", "text": "a photo of sks dog on a
beach"} a line, or from text files beside the images, 00.txt of 00.png. Without them only similarities are measured.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mean_interval import interval

from nara_diffusion.dreambooth.captions import own_captions
from nara_diffusion.dreambooth.encoders import Encoder, text_alignment
from nara_diffusion.dreambooth.image_records import image_files

MEASURES = {
    "dino_similarity": "DINO image similarity",
    "clip_similarity": "CLIP image similarity",
    "text_alignment": "CLIP text alignment",
}
"""Keys of the figures, and their names for people."""


def evaluate(
    generated: Sequence[str | Path],
    reference: str | Path,
    *,
    clip: Encoder | None = None,
    dino: Encoder | None = None,
    identifier: Sequence[str] = (),
) -> dict[str, Any]:
    """Figures of each folder in `generated`, and over all of them.

    Args:
        generated: a folder for each training seed.
        reference: a folder of the subject's own images.
        clip: for image similarity and text alignment.
        dino: for image similarity.
        identifier: words left out of the prompts.

    Returns:
        {"dino_similarity": {"mean", "std", "low", "high", "values"}, …, "seeds": [{"folder", "images", …}, …],
        "reference": {"dino_similarity", …}}: the last is how alike the subject's own images are, each to the others,
        which is what similarity can be expected to reach. Std, low and high of one seed are None.

    Raises:
        ValueError: a folder without images, prompts of some images only, or an encoder without a text tower for them.
    """
    encoders = {key: e for key, e in (("dino_similarity", dino), ("clip_similarity", clip)) if e is not None}
    references = {key: encoder.images(image_files(reference)) for key, encoder in encoders.items()}  # (m, d) each
    seeds = []
    for folder in generated:
        images = image_files(folder)
        figures: dict[str, Any] = {"folder": str(folder), "images": len(images)}
        figures |= {key: (e.images(images) @ references[key].T).mean().item() for key, e in encoders.items()}
        prompts = own_captions(images)
        if clip is not None and any(prompts):
            if not all(prompts):
                raise ValueError(f"{folder} has prompts of {sum(map(bool, prompts))} of its {len(images)} images")
            figures["text_alignment"] = text_alignment(clip, images, prompts, identifier)
        seeds.append(figures)
    measured = [key for key in MEASURES if all(key in seed for seed in seeds)]
    over_seeds = {key: _interval([seed[key] for seed in seeds]) for key in measured}
    among = {key: _among_themselves(vectors) for key, vectors in references.items() if len(vectors) > 1}
    return {**over_seeds, "seeds": seeds, "reference": among}


def _interval(values: list[float]) -> dict[str, Any]:
    spread = interval(values)._asdict()
    return {**(spread if len(values) > 1 else {**dict.fromkeys(spread), "mean": values[0]}), "values": values}


def _among_themselves(vectors: torch.Tensor) -> float:
    """The mean cosine over pairs of different rows (m, d) of length 1."""
    count = len(vectors)
    return (((vectors @ vectors.T).sum() - count) / (count * (count - 1))).item()


def table(figures: Mapping[str, Any]) -> str:
    """Format the findings of `evaluate` as lines for a terminal."""
    lines = []
    for key in [key for key in MEASURES if key in figures]:
        figure = figures[key]
        spread = "one seed, no interval"
        if figure["std"] is not None:
            spread = f"± {figure['std']:.4f}, 95 % interval {figure['low']:.4f} to {figure['high']:.4f}"
        values = " ".join(f"{value:.3f}" for value in figure["values"])
        lines.append(f"{MEASURES[key]:21s} {figure['mean']:7.4f} ({spread}); each seed {values}")
    reference_figures = [f"{MEASURES[key]} {value:.3f}" for key, value in figures["reference"].items()]
    return "\n".join(
        [
            *lines,
            *(
                [f"The subject's own images among themselves: {', '.join(reference_figures)}."]
                if reference_figures
                else []
            ),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line names; print the table."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generated", nargs="+", required=True, help="folders of images, one for each training seed")
    parser.add_argument("--reference", required=True, help="folder of the subject's own images")
    parser.add_argument("--identifier", nargs="+", default=[], help="words to leave out of the prompts, such as sks")
    parser.add_argument("--clip", help="CLIP: a folder, or a repository on the Hub")
    parser.add_argument("--dino", help="DINO or DINOv2: a folder, or a repository on the Hub")
    parser.add_argument("--device", help="where the encoders run (default: cuda if there is one, else cpu)")
    parser.add_argument("--output", type=Path, help="file for all figures as JSON")
    args = parser.parse_args(argv)
    if args.clip is None and args.dino is None:
        parser.error("name at least one model to measure with: --clip, --dino")
    try:
        named = {"clip": args.clip, "dino": args.dino}
        encoders = {key: Encoder(name, device=args.device) for key, name in named.items() if name is not None}
        figures = evaluate(args.generated, args.reference, **encoders, identifier=args.identifier)
        if args.output is not None:
            args.output.write_text(json.dumps({**figures, "arguments": vars(args)}, indent=2, default=str) + "\n")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(table(figures))


if __name__ == "__main__":
    main()
