"""Captions that change from sample to sample: the empty prompt in their place, or their tags in another order.

Both are functions of (seed, position in the training stream), so a sample meets the same caption in any process, with
any number of workers, and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nara_diffusion.dreambooth.seeding import numpy_generator


@dataclass(frozen=True)
class CaptionChanges:
    """`changes.apply(caption, seed, position)` is the caption of that sample.

    Attributes:
        dropout: probability of the empty prompt, in [0, 1].
        shuffle: put the tags of a caption, which commas separate, in a random order.
        keep_tokens: how many of the first tags stay where they are.
    """

    dropout: float = 0.0
    shuffle: bool = False
    keep_tokens: int = 0

    def apply(self, caption: str, seed: int, position: int) -> str:
        """`caption`, changed as the sample at `position` of the stream has it."""
        # a generator each, so that neither option changes what the other does
        if self.dropout and numpy_generator(seed, "caption dropout", position).random() < self.dropout:
            return ""
        if not self.shuffle:
            return caption
        tags = tags_of(caption)
        rest = tags[self.keep_tokens :]
        order = numpy_generator(seed, "caption order", position).permutation(len(rest))
        return ", ".join([*tags[: self.keep_tokens], *(rest[i] for i in order)])

    def check(self, captions: Iterable[str]) -> None:
        """Raises ValueError for a shuffle if none of `captions` has two tags after the kept ones."""
        most = max((len(tags_of(caption)) for caption in captions), default=0)
        if self.shuffle and most < self.keep_tokens + 2:
            raise ValueError(
                f"shuffle_caption puts tags, separated by commas, in another order, and keep_tokens is "
                f"{self.keep_tokens}, but no caption has more than {most} of them: give captions of more tags, lower "
                "keep_tokens, or leave shuffle_caption out."
            )


UNCHANGED = CaptionChanges()


def tags_of(caption: str) -> list[str]:
    """Split `caption` at its commas; white space around tags and empty tags are left out."""
    return [tag for tag in (part.strip() for part in caption.split(",")) if tag]
