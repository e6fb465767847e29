"""Subject fidelity and prompt fidelity, measured over several training seeds.

Three seeds of one method, measured with the encoders of DreamBooth's paper (arXiv 2208.12242, section 4.1):
    nara-metrics --generated out-seed-0/samples-after out-seed-1/samples-after out-seed-2/samples-after \\
        --reference dog_images --clip openai/clip-vit-base-patch32 --dino facebook/dino-vits16 --identifier sks \\
        --output results.json --device cuda

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
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from nara_diffusion.dreambooth.data.captions import own_captions
from nara_diffusion.dreambooth.data.image_records import image_files, load_image, to_rgb
from nara_diffusion.utils.statistics import interval

MEASURES = {
    "dino_similarity": "DINO image similarity",
    "clip_similarity": "CLIP image similarity",
    "text_alignment": "CLIP text alignment",
}
"""Keys of the figures, and their names for people."""

Images = Sequence[Image | str | Path]
"""PIL images, or files of images."""


class Encoder:
    """Pictures and texts as unit vectors, by CLIP (projected features) or DINO and DINOv2 (the last layer's CLS token).

    Images are prepared by the model's own image processor, in its PIL form: figures don't depend on whether torchvision
    is installed, whose resizing differs in the last bits.

    Args:
        model_path: a folder, or a repository on the Hub, with the model and its processor.
        device: where it runs; None is CUDA if there is one, else the CPU.
        batch_size: images or texts of one forward.

    Raises:
        ValueError: a model of another type, or weights that don't fill the model.
        OSError: as `from_pretrained`.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        device: str | torch.device | None = None,
        batch_size: int = 32,
    ) -> None:
        self.name, self.batch_size = str(model_path), batch_size
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model, loading = AutoModel.from_pretrained(self.name, dtype=torch.float32, output_loading_info=True)
        self.kind = model.config.model_type
        if self.kind not in ("clip", "vit", "dinov2"):
            raise ValueError(f"{self.name} is a {type(model).__name__}, expected CLIP, DINO or DINOv2")
        # DINO's checkpoints lack the pooling layer of the class that reads them, which isn't used here
        missing = sorted(key for key in loading["missing_keys"] if "pooler" not in key)
        if missing:
            raise ValueError(f"the weights of {self.name} lack {len(missing)} tensors, such as {missing[0]}")
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.processor = AutoImageProcessor.from_pretrained(self.name, backend="pil")

    def images(self, images: Images) -> torch.Tensor:
        """(n, d) float32 on the CPU, each row of length 1; files are opened batch by batch."""

        def embed(batch: list[Image | str | Path]) -> torch.Tensor:
            loaded = [to_rgb(image) if isinstance(image, Image) else load_image(image) for image in batch]
            inputs = self.processor(images=loaded, return_tensors="pt").to(self.device)
            if self.kind == "clip":
                return self.model.get_image_features(**inputs).pooler_output  # (b, d)
            return self.model(**inputs).last_hidden_state[:, 0]  # (b, l, d) → (b, d)

        return self._embed(images, embed)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """(n, d) float32 on the CPU, each row of length 1, to be compared with those of images.

        Raises:
            ValueError: the model has no text tower.
        """
        self.check_text()
        tokenizer = AutoTokenizer.from_pretrained(self.name)
        length = self.model.config.text_config.max_position_embeddings

        def embed(batch: list[str]) -> torch.Tensor:
            inputs = tokenizer(batch, padding=True, truncation=True, max_length=length, return_tensors="pt")
            return self.model.get_text_features(**inputs.to(self.device)).pooler_output  # (b, d)

        return self._embed(texts, embed)

    def check_text(self) -> None:
        """Raises ValueError if the model has no text tower."""
        if self.kind != "clip":
            raise ValueError(f"{self.name} is a {type(self.model).__name__}, which has no text tower: give CLIP")

    @torch.no_grad()
    def _embed(self, items: Sequence[Any], forward: Callable[[list[Any]], torch.Tensor]) -> torch.Tensor:
        batches = [list(items[i : i + self.batch_size]) for i in range(0, len(items), self.batch_size)]
        found = torch.cat([forward(batch).cpu() for batch in batches])  # (n, d)
        return F.normalize(found, dim=1)


def image_similarity(encoder: Encoder, generated: Images, reference: Images) -> float:
    """Subject fidelity: the mean cosine over all pairs of a generated image and an image of the subject, in [−1, 1]."""
    return (encoder.images(generated) @ encoder.images(reference).T).mean().item()


def text_alignment(encoder: Encoder, images: Images, prompts: Sequence[str], identifier: Iterable[str] = ()) -> float:
    """Prompt fidelity: the mean cosine of each image and its own prompt, in [−1, 1].

    Args:
        encoder: a CLIP.
        identifier: words left out of the prompts, such as the subject's rare token, which CLIP doesn't know.

    Raises:
        ValueError: `encoder` has no text tower.
    """
    texts = encoder.texts([without_words(prompt, identifier) for prompt in prompts])
    return (encoder.images(images) * texts).sum(1).mean().item()


def without_words(prompt: str, words: Iterable[str]) -> str:
    """`prompt` without `words`, whatever their case and the commas and full stops after them."""
    dropped = {word.lower() for word in words}
    return " ".join(word for word in prompt.split() if word.strip(",.").lower() not in dropped)


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
    own = {key: encoder.images(image_files(reference)) for key, encoder in encoders.items()}  # (m, d) each
    seeds = []
    for folder in generated:
        images = image_files(folder)
        figures: dict[str, Any] = {"folder": str(folder), "images": len(images)}
        figures |= {key: (e.images(images) @ own[key].T).mean().item() for key, e in encoders.items()}
        prompts = own_captions(images)
        if clip is not None and any(prompts):
            if not all(prompts):
                raise ValueError(f"{folder} has prompts of {sum(map(bool, prompts))} of its {len(images)} images")
            figures["text_alignment"] = text_alignment(clip, images, prompts, identifier)
        seeds.append(figures)
    measured = [key for key in MEASURES if all(key in seed for seed in seeds)]
    over_seeds = {key: _interval([seed[key] for seed in seeds]) for key in measured}
    among = {key: _among_themselves(vectors) for key, vectors in own.items() if len(vectors) > 1}
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
        found = figures[key]
        spread = "one seed, no interval"
        if found["std"] is not None:
            spread = f"± {found['std']:.4f}, 95 % interval {found['low']:.4f} to {found['high']:.4f}"
        each = " ".join(f"{value:.3f}" for value in found["values"])
        lines.append(f"{MEASURES[key]:21s} {found['mean']:7.4f} ({spread}); each seed {each}")
    own = [f"{MEASURES[key]} {value:.3f}" for key, value in figures["reference"].items()]
    return "\n".join([*lines, *([f"The subject's own images among themselves: {', '.join(own)}."] if own else [])])


def main(argv: Sequence[str] | None = None) -> None:
    """The command `nara-metrics`."""
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
    sys.stdout.write(table(figures) + "\n")


if __name__ == "__main__":
    main()
