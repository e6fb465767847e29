"""The arguments by which captions change from sample to sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nara_diffusion.dreambooth.data.caption_changes import CaptionChanges
from nara_diffusion.training.arguments.checks import require
from nara_diffusion.training.arguments.cli import option


@dataclass
class CaptionArguments:
    """Captions that change from sample to sample (docs/dreambooth.md)"""

    caption_dropout: float = option(
        0.0,
        "Probability that a sample has the empty prompt in place of its caption; class images keep theirs.",
        unit="probability",
    )
    shuffle_caption: bool = option(
        False, "Put the tags of a caption, which commas separate, in another order each time."
    )
    keep_tokens: int = option(
        0, "How many of a caption's first tags --shuffle_caption leaves where they are.", unit="tags"
    )


def caption_changes(args: Any) -> CaptionChanges:
    """Build the changes of captions that `args`, a `CaptionArguments`, describe."""
    return CaptionChanges(args.caption_dropout, args.shuffle_caption, args.keep_tokens)


def check_captions(args: Any) -> None:
    """Refuses values that no run can use.

    Raises:
        ValueError: naming the argument, its value and what it may be.
    """
    require(args, "caption_dropout", 0 <= args.caption_dropout <= 1, "in [0, 1], a probability")
    require(args, "keep_tokens", args.keep_tokens >= 0, "at least 0")
    if args.keep_tokens and not args.shuffle_caption:
        raise ValueError(
            f"keep_tokens is {args.keep_tokens}, but captions aren't shuffled: add shuffle_caption, or leave it out."
        )
