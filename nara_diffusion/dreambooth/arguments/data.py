"""The arguments of the images that are trained on, those of the class included, and of their captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nara_diffusion.dreambooth.data.captions import check_prompt
from nara_diffusion.training.arguments.checks import require
from nara_diffusion.training.arguments.cli import option


@dataclass
class DataArguments:
    """Images and captions"""

    instance_data_dir: str | None = option(
        None,
        "Folder with images of the subject.",
        content="training data",
    )
    instance_prompt: str | None = option(
        None, "What they show, with a rare word for the subject: 'a photo of sks dog'. Images without caption get it."
    )
    dataset_name: str | None = option(
        None, "Data set on the Hub, or a folder that `datasets` reads, in place of it.", content="training data"
    )
    dataset_config_name: str | None = option(None, "Configuration of that data set.")
    image_column: str = option("image", "Column of that data set with the images.")
    caption_column: str | None = option(None, "Column with the captions, there or in metadata.jsonl.")
    repeats: int = option(1, "How often an epoch shows each image.", unit="times")
    resolution: int = option(1024, "Side of the square that images are scaled and cut to.", unit="pixels")
    aspect_ratio_buckets: str | None = option(
        None, "Sizes height,width;height,width;… of which each image takes the nearest, or auto; none means the square."
    )
    center_crop: bool = option(False, "Cut the middle; otherwise one of --crops_per_image random places at each draw.")
    crops_per_image: int | None = option(
        4, "Places of random crops, to bound the cache of latents; none means anywhere, anew each time.", unit="places"
    )
    random_flip: bool = option(False, "Mirror half of the samples.")
    cache_latents: bool = option(True, "Keep what the autoencoder says of each crop instead of running it each step.")
    cache_memory: float = option(1024, "Most that each cache, of latents and of prompts, holds in memory.", unit="MiB")
    cache_folder: str | None = option(None, "Keep the caches in this folder too, for later runs.", resumable=True)


@dataclass
class CaptionArguments:
    """Captions that change from sample to sample (docs/dreambooth.md)"""

    caption_dropout: float = option(
        0.0,
        "Probability that a sample has the empty prompt in place of its caption; class images keep theirs.",
        unit="probability",
    )


@dataclass
class PriorArguments:
    """Prior preservation"""

    with_prior_preservation: bool = option(False, "Train on images of the class too, lest the model forgets it.")
    class_data_dir: str | None = option(
        None, "Folder of the class images; those that it lacks are generated.", content="training data"
    )
    class_prompt: str | None = option(None, "What they show: 'a photo of a dog'.")
    num_class_images: int = option(100, "Class images that have to be there.", unit="images")
    prior_loss_weight: float = option(1.0, "What the loss on class images counts.")
    prior_generation_precision: str | None = option(
        None,
        "Precision in which they are generated; none means that of the training.",
        choices=("no", "fp32", "fp16", "bf16"),
    )


def check_data(args: Any) -> None:
    if (args.instance_data_dir is None) == (args.dataset_name is None):
        got = "neither" if args.instance_data_dir is None else "both"
        raise ValueError(f"images come from instance_data_dir or from dataset_name: give one of them, got {got}.")
    if args.instance_prompt is not None:
        check_prompt(args.instance_prompt, "instance_prompt")
    for name in ("text_encoder_lr", "adam_weight_decay_text_encoder"):
        if getattr(args, name) is not None and not args.train_text_encoder:
            raise ValueError(f"{name} is set, but the text encoders aren't trained: add train_text_encoder.")


def check_captions(args: Any) -> None:
    """Raises ValueError for values that no run can use."""
    require(args, "caption_dropout", 0 <= args.caption_dropout <= 1, "in [0, 1], a probability")


def check_prior(args: Any) -> None:
    missing = [name for name in ("class_data_dir", "class_prompt") if getattr(args, name) is None]
    if args.with_prior_preservation and missing:
        raise ValueError(f"with_prior_preservation needs {' and '.join(missing)}.")
    if not args.with_prior_preservation and len(missing) < 2:
        raise ValueError(
            "class images are for prior preservation: add with_prior_preservation, or leave class_data_dir and "
            "class_prompt out."
        )
    if args.with_prior_preservation:
        check_prompt(args.class_prompt, "class_prompt")
        require(args, "num_class_images", args.num_class_images >= 1, "at least 1")
