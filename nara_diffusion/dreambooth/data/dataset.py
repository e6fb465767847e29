"""Training samples: position in the stream → image, crop, flip, prompt and time_ids, with a class image beside it.

Position p takes its image from `BucketBatchSampler` and its crop and flip from (seed, p): the same in every process,
with any number of workers, and after a resume. A class image (prior preservation) comes from a stream of its own and is
cut to the bucket of the instance image that it stands beside, so that one forward takes both.

Crops. "center" cuts the middle, as --center_crop; "random" takes one of `crops_per_image` positions, drawn once
for each image; which one is drawn anew each time. That makes a cache of latents worth having: 5 images × 4 crops × 2
flips are 40 latents, at 1024² 20 MiB. `crops_per_image=None` takes any position; then most samples miss the cache.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset

from nara_diffusion.dreambooth.seeding import numpy_generator
from nara_diffusion.training.stream import ShuffledStream

from .batch_sampler import BucketBatchSampler
from .buckets import Size, nearest_bucket
from .caption_changes import UNCHANGED, CaptionChanges
from .crops import Crop, center_crop, crop_image, enlargement, random_crop, to_pixels
from .images import ImageError
from .records import ImageRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingSample:
    """One training sample, without its pixels.

    Attributes:
        image: the record that it is cut from.
        crop: how.
        position: in the training stream; with `role`, the key of its random numbers.
        role: "instance" or "class".
        caption: what is said of it; None means what the record says.
    """

    image: ImageRecord
    crop: Crop
    position: int = 0
    role: str = "instance"
    caption: str | None = None

    @property
    def prompt(self) -> str:
        return self.image.prompt if self.caption is None else self.caption

    @property
    def original_size(self) -> Size:
        """(H, W) of the upright image."""
        return self.crop.original

    @property
    def crop_top_left(self) -> tuple[int, int]:
        """(y, x) in the scaled and mirrored image."""
        return self.crop.top, self.crop.left

    @property
    def target_size(self) -> Size:
        """(h, w)."""
        return self.crop.target

    @property
    def key(self) -> str:
        """Names the pixels: content, scaling, cut and flip."""
        crop = self.crop
        return f"{self.image.key}-{crop.target[0]}x{crop.target[1]}-{crop.top}-{crop.left}-{'m' if crop.flip else 'o'}"

    def pixel_values(self) -> torch.Tensor:
        """(3, h, w) float32 in [−1, 1]. Raises ImageError if the file was changed or removed since the run began."""
        image = self.image.source.load()
        if (image.height, image.width) != self.image.size:
            raise ImageError(f"{self.image.source.name} was changed since the run began: start again.")
        return to_pixels(crop_image(image, self.crop))


class DreamBoothDataset(Dataset):
    """`dataset[p]` is the sample at position p, for `stream_loader`: {"samples": [instance] or [instance, class], …}.

    Args:
        instances: the subject's images; one with `repeats` N comes N times as often as one with 1.
        buckets: sizes (h, w) to train at; one for a fixed resolution.
        batch_size: samples of one forward on one process (`train_batch_size`), which share a bucket.
        seed: of order, crops and flips.
        class_images: for prior preservation, or none.
        crop: "center" or "random".
        crops_per_image: positions of random crops, or None for any.
        flip: mirror half of the samples.
        captions: how captions of instances change from sample to sample.
        load_pixels: also put "pixel_values" of each sample in, as a run without a latent cache wants its workers to.

    Raises:
        ValueError: no images, no buckets, an unknown `crop`, crops_per_image below 1, captions without tags to shuffle.
    """

    def __init__(
        self,
        instances: Sequence[ImageRecord],
        buckets: Sequence[Size],
        *,
        batch_size: int,
        seed: int,
        class_images: Sequence[ImageRecord] = (),
        crop: str = "center",
        crops_per_image: int | None = 4,
        flip: bool = False,
        captions: CaptionChanges = UNCHANGED,
        load_pixels: bool = False,
    ) -> None:
        if crop not in ("center", "random"):
            raise ValueError(f"crop is {crop!r}, expected center or random.")
        if crops_per_image is not None and crops_per_image < 1:
            raise ValueError(f"crops_per_image is {crops_per_image}, expected 1 or more, or none.")
        if not buckets:
            raise ValueError("there are no buckets: give one size (h, w) at least.")
        self.instances, self.buckets, self.class_images = list(instances), list(buckets), list(class_images)
        self.crop, self.crops_per_image, self.flip, self.load_pixels = crop, crops_per_image, flip, load_pixels
        self.seed, self.captions = seed, captions
        captions.check(image.prompt for image in self.instances)
        self.instance_buckets = [nearest_bucket(image.size, self.buckets) for image in self.instances]
        self._numbers = [i for i, image in enumerate(self.instances) for _ in range(image.repeats)]
        self._order = BucketBatchSampler([self.instance_buckets[i] for i in self._numbers], batch_size, seed)
        numbers = [{"image": i} for i in range(len(self.class_images))]
        self._class_order = ShuffledStream(numbers, seed + 1) if numbers else None
        self._warn()

    def __getitem__(self, position: int) -> dict[str, Any]:
        samples = self.samples_at(position)
        item: dict[str, Any] = {"samples": samples}
        if self.load_pixels:
            item["pixel_values"] = [sample.pixel_values() for sample in samples]
        return item

    def samples_at(self, position: int) -> list[TrainingSample]:
        """The instance at `position`, and the class image beside it if there are any."""
        number = self._numbers[self._order[position]]
        target = self.instance_buckets[number]
        image = self.instances[number]
        caption = self.captions.apply(image.prompt, self.seed, position)
        samples = [replace(self._sample(image, target, position, "instance"), caption=caption)]
        if self._class_order is not None:
            image = self.class_images[self._class_order[position]["image"]]
            samples.append(self._sample(image, target, position, "class"))
        return samples

    def plain_samples(self) -> list[TrainingSample]:
        """Each instance image once, its middle, as it is: for a validation loss. `position` counts them."""
        return [
            TrainingSample(image, center_crop(image.size, target), number)
            for number, (image, target) in enumerate(zip(self.instances, self.instance_buckets, strict=True))
        ]

    def possible_samples(self) -> Iterator[TrainingSample]:
        """Every sample that can ever occur; their `position` means nothing.

        Raises:
            ValueError: with random crops at any position they can't be listed.
        """
        if self.crop == "random" and self.crops_per_image is None:
            raise ValueError("random crops at any position can't be listed: set crops_per_image.")
        targets = sorted(set(self.instance_buckets))
        pairs = [(image, [target]) for image, target in zip(self.instances, self.instance_buckets, strict=True)]
        seen = set()
        for image, sizes in [*pairs, *((image, targets) for image in self.class_images)]:
            for target in sizes:
                for flip in (False, True) if self.flip else (False,):
                    for choice in range(1 if self.crop == "center" else self.crops_per_image or 1):
                        sample = TrainingSample(image, self._crop(image, target, choice, flip))
                        if sample.key not in seen:
                            seen.add(sample.key)
                            yield sample

    def distinct_samples(self, positions: Iterable[int]) -> Iterator[TrainingSample]:
        """The samples at `positions`, each crop of an image once: to fill a latent cache with what a run will need."""
        seen = set()
        for position in positions:
            for sample in self.samples_at(position):
                if sample.key not in seen:
                    seen.add(sample.key)
                    yield sample

    def _warn(self) -> None:
        """Log a warning about data that train badly: one image alone, and images that have to be enlarged."""
        if len(self.instances) == 1:
            logger.warning("there is one image only: the adapter will learn that picture rather than its subject")
        pairs = zip(self.instances, self.instance_buckets, strict=True)
        small = [(image, target) for image, target in pairs if enlargement(image.size, target) > 1]
        if small:
            (height, width), target = small[0][0].size, small[0][1]
            logger.warning(
                "%d of %d images are enlarged, and teach blur: %s has %d x %d pixels and is trained at %d x %d. Lower "
                "--resolution, or use larger images",
                len(small), len(self.instances), small[0][0].source.name, height, width, *target,
            )  # fmt: skip

    def _sample(self, image: ImageRecord, target: Size, position: int, role: str) -> TrainingSample:
        generator = numpy_generator(self.seed, f"crop {role}", position)
        flip = bool(generator.random() < 0.5) and self.flip
        if self.crop == "random" and self.crops_per_image is None:
            return TrainingSample(image, random_crop(image.size, target, generator, flip), position, role)
        choice = int(generator.integers(self.crops_per_image or 1))
        return TrainingSample(image, self._crop(image, target, choice, flip), position, role)

    def _crop(self, image: ImageRecord, target: Size, choice: int, flip: bool) -> Crop:
        """The `choice`-th crop of an image: the middle, or one of its random positions, which its content decides."""
        if self.crop == "center":
            return center_crop(image.size, target, flip)
        generator = numpy_generator(self.seed, f"position {image.key} {target} {flip}", choice)
        return random_crop(image.size, target, generator, flip)


def collate_samples(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items of one bucket → a batch of B rows: all b instances, then, with prior preservation, their b class images.

    Returns:
        samples: the B samples.
        prompts: their B prompts.
        time_ids: (B, 6) float32, (H, W, top, left, h, w).
        sample_indices: (B,) int64, positions in the training stream; a class image has that of its instance.
        is_class: (B,) bool.
        pixel_values: (B, 3, h, w), if the dataset loads pixels.
    """
    order = [(item, i) for i in range(len(items[0]["samples"])) for item in items]
    samples = [item["samples"][i] for item, i in order]
    batch: dict[str, Any] = {
        "samples": samples,
        "prompts": [sample.prompt for sample in samples],
        "time_ids": torch.tensor([sample.crop.time_ids for sample in samples], dtype=torch.float32),
        "sample_indices": torch.tensor([sample.position for sample in samples]),
        "is_class": torch.tensor([sample.role == "class" for sample in samples]),
    }
    if "pixel_values" in items[0]:
        batch["pixel_values"] = torch.stack([item["pixel_values"][i] for item, i in order])
    return batch
