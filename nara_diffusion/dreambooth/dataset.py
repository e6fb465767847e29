"""Training samples: all that position p of the stream holds is a function of (seed, p).

Position → image, crop, flip, prompt and time_ids, with a class image beside it (prior preservation), which has a stream
of its own, and is cut to its instance image's bucket: one forward takes both.

    (H, W) --scale by s = max(h / H, w / W)--> (H', W') --mirror?--> --cut at (top, left)--> (h, w)
    time_ids = (H, W, top, left, h, w)

as in SDXL's training (arXiv 2307.01952, section 2.2): the original size is that of the upright file, top and left are
counted in the scaled, already mirrored image. `draws` has the random numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import find_nearest_bucket
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from nara_diffusion.training.loop import ShuffledStream
from nara_diffusion.utils.naming import counted

from .draws import numpy_generator
from .image_records import ImageRecord, Size

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingSample:
    """One training sample, without its pixels."""

    image: ImageRecord  # that it is cut from
    target: Size  # (h, w)
    top: int  # where the cut begins, in the scaled and mirrored image
    left: int
    flip: bool  # whether the image is mirrored
    position: int  # in the training stream; with `role`, the key of its random numbers
    role: str  # "instance" or "class"
    prompt: str  # its caption, or "" where that is dropped

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """(H, W, top, left, h, w), which SDXL's UNet reads."""
        return (*self.image.size, self.top, self.left, *self.target)

    @property
    def key(self) -> str:
        """A name for the pixels: content, scaling, cut and flip."""
        return f"{self.image.key} {self.target} {self.top} {self.left} {self.flip}"

    def pixel_values(self) -> torch.Tensor:
        """(3, h, w) float32 in [−1, 1]. Scaling and cutting are one resampling."""
        image, (height, width), (h, w) = (
            self.image.load(),
            scaled_size(self.image.size, self.target),
            self.target,
        )
        left = width - w - self.left if self.flip else self.left  # in the image as it is
        x, y = image.width / width, image.height / height
        box = (
            left * x,
            self.top * y,
            min((left + w) * x, image.width),
            min((self.top + h) * y, image.height),
        )
        cut = image.resize((w, h), Image.Resampling.LANCZOS, box=box)
        values = np.array(
            ImageOps.mirror(cut) if self.flip else cut, dtype=np.float32
        )  # (h, w, 3) in 0 … 255
        return (torch.from_numpy(values) / 127.5 - 1).permute(2, 0, 1).contiguous()


def scaled_size(original: Size, target: Size) -> Size:
    """(H', W'): `original` scaled so that it just covers `target`."""
    scale = max(target[0] / original[0], target[1] / original[1])
    return max(target[0], round(original[0] * scale)), max(target[1], round(original[1] * scale))


def left_out(original: Size, target: Size) -> float:
    """The share of an image that a crop to `target` leaves out."""
    height, width = scaled_size(original, target)
    return 1 - target[0] * target[1] / (height * width)


class BucketOrder:
    """`order[p]` is the number of the image at position p, in batches that hold one bucket each.

    Let bucket c hold n_c of the n images. Batch m, of positions m·b … (m + 1)·b − 1, belongs to round ⌊m / n⌋; a round
    is n batches, n_c of them bucket c's, in an order drawn from (seed, round). The j-th batch of bucket c takes the
    samples j·b … (j + 1)·b − 1 of that bucket's own endless stream of permutations. So each round shows every image
    exactly b times, whatever the buckets' sizes. With one bucket it is `ShuffledStream`'s order.
    """

    def __init__(self, buckets: Sequence[Size], batch_size: int, seed: int) -> None:
        self.batch_size, self.seed = batch_size, seed
        sizes = sorted(set(buckets))
        self._batches = [
            sizes.index(bucket) for bucket in buckets
        ]  # the bucket of each of a round's batches
        members = [[i for i, bucket in enumerate(buckets) if bucket == size] for size in sizes]
        self._streams = [
            ShuffledStream(images, seed + number) for number, images in enumerate(members)
        ]

    def __getitem__(self, position: int) -> int:
        batch, offset = divmod(position, self.batch_size)
        number, nth = divmod(batch, len(self._batches))
        order = numpy_generator(self.seed, "buckets", number).permutation(self._batches)
        bucket = int(order[nth])
        j = number * self._batches.count(bucket) + int((order[:nth] == bucket).sum())
        images: Any = self._streams[bucket]
        return images.samples[images.sample_at(j * self.batch_size + offset)]


class DreamBoothDataset(Dataset):
    """`dataset[p]` is what position p holds, for `stream_loader`: {"samples": [instance] or [instance, class]}.

    Args:
        instances: the subject's images.
        buckets: sizes (h, w) to train at; one for a fixed resolution.
        batch_size: samples of one forward on one process (`train_batch_size`), which share a bucket.
        seed: of order, crops, flips and dropped captions.
        class_images: for prior preservation, or none.
        crop: "center" or "random".
        crops_per_image: positions of random crops of an image, to bound a cache of latents; None for any position.
        flip: mirror half of the samples.
        caption_dropout: the probability that an instance has the empty prompt in place of its caption.
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
        caption_dropout: float = 0.0,
    ) -> None:
        self.instances, self.class_images = list(instances), list(class_images)
        self.crop, self.crops_per_image, self.flip = crop, crops_per_image, flip
        self.seed, self.caption_dropout = seed, caption_dropout
        self.targets = [
            buckets[find_nearest_bucket(*image.size, buckets) or 0] for image in self.instances
        ]
        self._order = BucketOrder(self.targets, batch_size, seed)
        self._class_order = (
            ShuffledStream(self.class_images, seed + 1) if self.class_images else None
        )
        pairs = zip(self.instances, self.targets, strict=True)
        small = [image.name for image, (h, w) in pairs if image.size[0] < h or image.size[1] < w]
        if small:
            of = f"{len(small)} of {len(self.instances)} images, such as {small[0]}"
            logger.warning(
                "enlarged, which teaches blur: %s; lower --resolution, or leave small images out",
                of,
            )

    def warn_of_crops(self) -> None:
        """Log how much of the images random crops leave out, where that is more than a fifth."""
        pairs = zip(self.instances, self.targets, strict=True)
        shares = [left_out(image.size, target) for image, target in pairs]
        losing = sum(share > 0.2 for share in shares)
        if self.crop == "random" and losing:
            share = f"up to {100 * max(shares):.0f} % of an image"
            which = f"{losing} of {counted(len(shares), 'image')}"
            remedies = "--aspect_ratio_buckets auto leaves out less, --center_crop keeps the middle"
            logger.warning(
                "random crops leave out %s, more than a fifth of %s: %s", share, which, remedies
            )

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {"samples": self.samples_at(position)}

    def samples_at(self, position: int) -> list[TrainingSample]:
        """The instance at `position`, and the class image beside it if there are any."""
        number = self._order[position]
        image, target = self.instances[number], self.targets[number]
        dropped = (
            numpy_generator(self.seed, "caption dropout", position).random() < self.caption_dropout
        )
        samples = [
            self._sample(image, target, position, "instance", "" if dropped else image.prompt)
        ]
        if self._class_order is not None:
            image = self.class_images[self._class_order.sample_at(position)]
            samples.append(self._sample(image, target, position, "class", image.prompt))
        return samples

    def plain_samples(self) -> list[TrainingSample]:
        """Each instance image once, its middle, as it is: for a validation loss. `position` counts them."""
        return [
            TrainingSample(
                image, target, *_middle(image, target), False, number, "instance", image.prompt
            )
            for number, (image, target) in enumerate(zip(self.instances, self.targets, strict=True))
        ]

    def _sample(
        self, image: ImageRecord, target: Size, position: int, role: str, prompt: str
    ) -> TrainingSample:
        generator = numpy_generator(self.seed, f"crop {role}", position)
        flip = bool(generator.random() < 0.5) and self.flip
        top, left = _middle(image, target)
        if self.crop == "random":
            if (
                self.crops_per_image is not None
            ):  # one of the places that the image's content decides
                choice = int(generator.integers(self.crops_per_image))
                generator = numpy_generator(
                    self.seed, f"position {image.key} {target} {flip}", choice
                )
            height, width = scaled_size(image.size, target)
            top, left = (
                int(generator.integers(height - target[0] + 1)),
                int(generator.integers(width - target[1] + 1)),
            )
        return TrainingSample(image, target, top, left, flip, position, role, prompt)


def _middle(image: ImageRecord, target: Size) -> tuple[int, int]:
    """(top, left) of the cut in the middle."""
    height, width = scaled_size(image.size, target)
    return (height - target[0]) // 2, (width - target[1]) // 2


def collate_samples(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items of one bucket → {"samples", "prompts", "time_ids" (B, 6) float32} of B rows: all b instances, then, with
    prior preservation, their b class images."""
    samples = [
        sample for row in zip(*(item["samples"] for item in items), strict=True) for sample in row
    ]
    return {
        "samples": samples,
        "prompts": [sample.prompt for sample in samples],
        "time_ids": torch.tensor([sample.time_ids for sample in samples], dtype=torch.float32),
    }
