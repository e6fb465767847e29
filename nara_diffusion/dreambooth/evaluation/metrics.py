"""The figures of a subject's fine-tuning: subject fidelity and prompt fidelity.

    similarity   mean of cos(e(x), e(y)) over all pairs of a generated image x and an image y of the subject;
                 "DINO" with e of a DINO model, "CLIP-I" with e of CLIP's image tower
    alignment    mean of cos(e(x), e(prompt of x)), "CLIP-T" with CLIP's two towers

as DreamBooth defines them (arXiv 2208.12242, section 4.1). Both lie in [−1, 1]. Their level depends on the encoder: a
figure says something beside another of the same encoder only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from nara_diffusion.utils.statistics import Interval, interval

from .encoders import Encoder

__all__ = ["ImageSimilarity", "Interval", "TextAlignment", "interval", "without_words"]

Images = Sequence[Image | str | Path]
"""PIL images, or files of images."""


class ImageSimilarity:
    """Subject fidelity: the similarity of generated images to those of the subject.

    Args:
        encoder: a path or Hub repository of a CLIP or DINO; or an `Encoder`, to share one.
        **options: of `Encoder`: device, dtype, batch_size, progress, revision, …

    Raises:
        ValueError: as `Encoder`.
    """

    def __init__(self, encoder: str | Path | Encoder, **options: Any) -> None:
        self.encoder = _encoder(encoder, options)

    def similarity(self, generated: Images, reference: Images) -> float:
        """Mean cosine over all pairs of a generated image and a reference image."""
        return self.similarities(generated, reference).mean().item()

    def similarities(self, generated: Images, reference: Images) -> torch.Tensor:
        """(generated, reference) cosines."""
        return self.encoder.images(generated) @ self.encoder.images(reference).T


class TextAlignment:
    """Agreement of images with their prompts.

    Args:
        encoder: a path or Hub repository of a CLIP; or an `Encoder`, to share one.
        **options: of `Encoder`.

    Raises:
        ValueError: as `Encoder`, and for a model without a text tower.
    """

    def __init__(self, encoder: str | Path | Encoder, **options: Any) -> None:
        self.encoder = _encoder(encoder, options)
        self.encoder.check_text()

    def alignment(self, images: Images, prompts: Sequence[str]) -> float:
        """Mean cosine of each image and its own prompt."""
        return self.alignments(images, prompts).mean().item()

    def alignments(self, images: Images, prompts: Sequence[str]) -> torch.Tensor:
        """(n,) cosines of image i and prompt i."""
        if isinstance(prompts, str) or len(prompts) != len(images):
            given = repr(prompts) if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise ValueError(f"there are {len(images)} images and {given}: give a list with one prompt for each image")
        distinct = list(dict.fromkeys(prompts))
        texts = self.encoder.texts(distinct)[[distinct.index(prompt) for prompt in prompts]]  # (n, d)
        return (self.encoder.images(images) * texts).sum(1)


def without_words(prompt: str, words: Iterable[str]) -> str:
    """`prompt` without `words`, such as the subject's rare identifier, which means nothing to CLIP."""
    dropped = {word.lower() for word in words}
    return " ".join(word for word in prompt.split() if word.strip(",.").lower() not in dropped)


def _encoder(encoder: str | Path | Encoder, options: dict[str, Any]) -> Encoder:
    if not isinstance(encoder, Encoder):
        return Encoder(encoder, **options)
    if options:
        raise ValueError(f"{', '.join(options)} belong to the making of an Encoder, and this one is made already")
    return encoder
