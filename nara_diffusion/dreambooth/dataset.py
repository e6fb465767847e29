"""Training samples: everything at position p of the stream depends only on (seed, p).

A position determines an image, crop, flip, prompt and time_ids. With prior preservation, it also
determines a class image, from a separate stream. The class image is cut to the bucket of its
instance image, so that one forward can take both.

    (H, W) --scale by s = max(h / H, w / W)--> (H', W') --mirror?--> --cut at (top, left)--> (h, w)
    time_ids = (H, W, top, left, h, w)

SDXL was trained in this way (arXiv 2307.01952, section 2.2). The original size (H, W) is that of
the upright image; top and left are counted in the scaled and mirrored image. The random numbers
come from `draws`.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import find_nearest_bucket
from PIL import Image, ImageOps
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import Dataset

from nara_diffusion.utils.data_order import ShuffledStream
from nara_diffusion.utils.wording import counted

from .draws import numpy_generator
from .image_records import ImageRecord, Size

logger = logging.getLogger(__name__)

CROPS = 4
"""The number of places for random crops of an image, which limits the cache of latents."""


@dataclass(frozen=True)
class TrainingSample:
    """One training sample, without its pixels."""

    image: ImageRecord  # the image that the sample is cut from
    target: Size  # (h, w)
    top: int  # the start of the cut, in the scaled and mirrored image
    left: int
    flip: bool  # whether the image is mirrored
    position: int  # in the training stream; random numbers depend on it and on `role`
    role: str  # "instance" or "class"
    prompt: str  # its caption, or "" if the caption is dropped

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """(H, W, top, left, h, w), which SDXL's UNet reads."""
        return (*self.image.size, self.top, self.left, *self.target)

    @property
    def key(self) -> str:
        """The key of the pixels in caches: content, scaling, cut and flip."""
        return f"{self.image.key} {self.target} {self.top} {self.left} {self.flip}"

    @property
    def source_sizes(self) -> tuple[Size, ...]:
        """The sizes of `source_images`."""
        return source_sizes(self.image, self.target)

    @property
    def source_keys(self) -> list[str]:
        """The keys of `source_images` in caches."""
        return [f"{source.key} for {self.key}" for source in self.image.sources]

    def cut_image(self) -> Image.Image:
        """Return the image, scaled and cut in one resampling."""
        return self._cut(self.image.load())

    def source_images(self) -> list[Image.Image]:
        """Return the sources: of the image's proportions, cut like it; otherwise whole.

        They have the area of the target. Then the model's pipeline resizes them.
        """
        images = []
        for source, size in zip(self.image.sources, self.source_sizes, strict=True):
            image = source.load()
            if size == self.target:
                images.append(self._cut(image))
            else:
                scaled = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
                images.append(ImageOps.mirror(scaled) if self.flip else scaled)
        return images

    def pixel_values(self) -> torch.Tensor:
        """Return the pixels (3, h, w) of `cut_image`, float32 in [−1, 1]."""
        values = np.array(self.cut_image(), dtype=np.float32)  # (h, w, 3) in 0 … 255
        return (torch.from_numpy(values) / 127.5 - 1).permute(2, 0, 1).contiguous()

    def mask_values(self, grid: Size) -> tuple[torch.Tensor]:
        """Return the mask (1, *grid), float32 in [0, 1], cut like the image; ones without a mask.

        Each value is the mean over an area; sharper filters give weight to pixels beyond an edge.
        """
        if self.image.mask is None:
            return (torch.ones(1, *grid),)
        cut = self._cut(self.image.mask.load().convert("L").convert("F"), Image.Resampling.BOX)
        values = torch.from_numpy(np.array(cut) / 255)
        return (adaptive_avg_pool2d(values[None], grid),)

    def _cut(
        self, image: Image.Image, resampling: Image.Resampling = Image.Resampling.LANCZOS
    ) -> Image.Image:
        """Return the sample's part of an image with the proportions of `self.image`."""
        height, width = scaled_size(self.image.size, self.target)
        h, w = self.target
        left = width - w - self.left if self.flip else self.left  # before mirroring
        x, y = image.width / width, image.height / height
        right = min((left + w) * x, image.width)
        bottom = min((self.top + h) * y, image.height)
        box = (left * x, self.top * y, right, bottom)
        cut = image.resize((w, h), resampling, box=box)
        return ImageOps.mirror(cut) if self.flip else cut


def scaled_size(original: Size, target: Size) -> Size:
    """Return (H', W'), the size `original` scaled to just cover `target`."""
    scale = max(target[0] / original[0], target[1] / original[1])
    height, width = round(original[0] * scale), round(original[1] * scale)
    return max(target[0], height), max(target[1], width)


def source_sizes(image: ImageRecord, target: Size) -> tuple[Size, ...]:
    """Return the sizes (h, w) of an image's sources for samples of the size `target`."""
    sizes = []
    for height, width in (source.size for source in image.sources):
        has_same_proportion = abs(height * image.size[1] / (width * image.size[0]) - 1) < 0.01
        scale = math.sqrt(target[0] * target[1] / (height * width))
        whole = (round(height * scale), round(width * scale))
        sizes.append(target if has_same_proportion else whole)
    return tuple(sizes)


class BucketOrder:
    """The order of the images: `order[p]` is the index of the image at position p.

    All images of a batch are in the same bucket. Let bucket c have n_c of the n images. Batch m has
    the positions m·b … (m + 1)·b − 1 and belongs to round ⌊m / n⌋. A round has n batches, n_c of
    them from bucket c, in an order drawn from (seed, round). The j-th batch of bucket c takes the
    samples j·b … (j + 1)·b − 1 of an endless stream of permutations of that bucket. Each round
    therefore shows every image exactly b times, for any sizes of the buckets. With one bucket, this
    is the order of `ShuffledStream`.
    """

    def __init__(self, buckets: Sequence[tuple[Any, ...]], batch_size: int, seed: int) -> None:
        self.batch_size, self.seed = batch_size, seed
        sizes = sorted(set(buckets))
        # the bucket of each batch of a round, before shuffling
        self._batches = [sizes.index(bucket) for bucket in buckets]
        self._images = [
            [i for i, bucket in enumerate(self._batches) if bucket == number]
            for number in range(len(sizes))
        ]
        self._streams = [ShuffledStream(same, seed + i) for i, same in enumerate(self._images)]

    def __getitem__(self, position: int) -> int:
        batch, offset = divmod(position, self.batch_size)
        number, nth = divmod(batch, len(self._batches))
        order = numpy_generator(self.seed, "buckets", number).permutation(self._batches)
        bucket = int(order[nth])
        j = number * self._batches.count(bucket) + int((order[:nth] == bucket).sum())
        index = self._streams[bucket].sample_at(j * self.batch_size + offset)
        return self._images[bucket][index]


class DreamBoothDataset(Dataset):
    """Map each position p of the training stream to {"samples": …}, for `stream_loader`.

    Args:
        instances: the images of the subject.
        buckets: the sizes (h, w) to train at; a single size for a fixed resolution.
        batch_size: the number of samples in one forward on one process (`train_batch_size`). They
            are all in the same bucket, and so are their sources.
        seed: the seed of order, crops, flips and dropped captions.
        class_images: the images for prior preservation; empty without prior preservation.
        crop: "center", or "random" for one of `CROPS` places of each image. An image with sources is
            cut in the middle.
        flip: True to mirror half of the samples.
        caption_dropout: the probability that an instance gets the empty prompt instead of its
            caption.
        repeats: how often an epoch shows each image.

    `add` adds further folders of images, which have their own sizes, class images and repeats.
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
        flip: bool = False,
        caption_dropout: float = 0.0,
        repeats: int = 1,
    ) -> None:
        self.batch_size, self.seed = batch_size, seed
        self.crop, self.flip = crop, flip
        self.caption_dropout = caption_dropout
        self.instances: list[ImageRecord] = []
        self.class_images: list[ImageRecord] = []
        self.targets: list[Size] = []
        self.epoch: list[int] = []  # the index of each instance, as often as an epoch shows it
        self._class_orders: list[ShuffledStream | None] = []  # of each instance
        self.add(instances, buckets, class_images, repeats)

    def add(
        self,
        instances: Sequence[ImageRecord],
        buckets: Sequence[Size],
        class_images: Sequence[ImageRecord] = (),
        repeats: int = 1,
    ) -> None:
        """Add a folder of images. All samples of a batch have a class image, or none has."""
        class_order = ShuffledStream(class_images, self.seed + 1) if class_images else None
        self._class_orders += [class_order] * len(instances)
        nearest = [find_nearest_bucket(*image.size, buckets) or 0 for image in instances]
        self.targets += [buckets[number] for number in nearest]
        added = range(len(self.instances), len(self.targets))
        self.epoch += [number for number in added for _ in range(repeats)]
        self.instances += instances
        self.class_images += class_images
        triples = zip(self.targets, self._class_orders, self.instances, strict=True)
        shapes = [
            (size, order is not None, source_sizes(image, size)) for size, order, image in triples
        ]
        batches = [shapes[number] for number in self.epoch]
        self._order = BucketOrder(batches, self.batch_size, self.seed)

    def log_sizes(self) -> None:
        """Log a table of the sizes. Warn of images that are enlarged, or much cropped at random."""
        images = list(zip(self.instances, self.targets, strict=True))
        small = [image.name for image, (h, w) in images if image.size[0] < h or image.size[1] < w]
        shares = [
            1 - math.prod(target) / math.prod(scaled_size(image.size, target))
            for image, target in images
        ]
        lines = ["height x width  images  cropped away"]
        for size, number in self.buckets.items():
            total = sum(x for x, target in zip(shares, self.targets, strict=True) if target == size)
            title = f"{size[0]} x {size[1]}"
            lines.append(f"{title:>14}  {number:6}  {100 * total / number:10.0f} %")
        logger.info("sizes of training images\n%s", "\n".join(lines))
        count = counted(len(shares), "image")
        if small:
            logger.warning(
                "%d of %s (such as %s) are smaller than --resolution and were enlarged, so the model learns blur. "
                "Lower --resolution, or remove small images.",
                *(len(small), count, small[0]),
            )
        cropped = sum(share > 0.2 for share in shares)
        if self.crop == "random" and cropped and not self.has_sources:
            logger.warning(
                "random crops remove more than a fifth of %d of %s, and up to %.0f %%. --aspect_ratio_buckets auto "
                "removes less, --center_crop keeps the middle.",
                *(cropped, count, 100 * max(shares)),
            )

    @property
    def has_sources(self) -> bool:
        """Whether the images are made from sources."""
        return bool(self.instances[0].sources)

    @property
    def buckets(self) -> dict[Size, int]:
        """{size: number of instances} of the sizes that are trained at, the most frequent first."""
        images = Counter(self.targets)
        epoch = Counter(self.targets[number] for number in self.epoch)
        return {size: images[size] for size, _ in epoch.most_common()}

    @property
    def sample_size(self) -> Size:
        """The size of samples: the most frequent one of training."""
        return next(iter(self.buckets))

    def __getitem__(self, position: int) -> dict[str, list[TrainingSample]]:
        return {"samples": self.samples_at(position)}

    def samples_at(self, position: int) -> list[TrainingSample]:
        """Return the instance at `position`, followed by its class image, if there are any."""
        number = self.epoch[self._order[position]]
        image, target = self.instances[number], self.targets[number]
        u = numpy_generator(self.seed, "caption dropout", position).random()
        prompt = "" if u < self.caption_dropout else image.prompt
        samples = [self._sample(image, target, position, "instance", prompt)]
        class_order = self._class_orders[number]
        if class_order is not None:
            prior: Any = class_order.samples[class_order.sample_at(position)]
            samples.append(self._sample(prior, target, position, "class", prior.prompt))
        return samples

    def plain_samples(self) -> list[TrainingSample]:
        """Return one unmirrored centre crop of each instance image, for a validation loss.

        The `position` of a sample is the index of its image.
        """
        pairs = zip(self.instances, self.targets, strict=True)
        return [
            TrainingSample(
                image, target, *_middle(image, target), False, number, "instance", image.prompt
            )
            for number, (image, target) in enumerate(pairs)
        ]

    def _sample(
        self, image: ImageRecord, target: Size, position: int, role: str, prompt: str
    ) -> TrainingSample:
        generator = numpy_generator(self.seed, f"crop {role}", position)
        flip = bool(generator.random() < 0.5) and self.flip
        top, left = _middle(image, target)
        if self.crop == "random" and not image.sources:
            choice = int(generator.integers(CROPS))
            place = f"position {image.key} {target} {flip}"
            generator = numpy_generator(self.seed, place, choice)
            height, width = scaled_size(image.size, target)
            top = int(generator.integers(height - target[0] + 1))
            left = int(generator.integers(width - target[1] + 1))
        return TrainingSample(image, target, top, left, flip, position, role, prompt)


def _middle(image: ImageRecord, target: Size) -> tuple[int, int]:
    """Return (top, left) of the centre crop."""
    height, width = scaled_size(image.size, target)
    return (height - target[0]) // 2, (width - target[1]) // 2


def collate_samples(items: Sequence[Mapping[str, list[TrainingSample]]]) -> dict[str, Any]:
    """Return the batch of b items: "samples", "prompts" and "time_ids" (B, 6) float32.

    The B rows are the b instances, followed by their b class images with prior preservation.
    """
    roles = zip(*(item["samples"] for item in items), strict=True)
    samples = [sample for role in roles for sample in role]
    time_ids = torch.tensor([sample.time_ids for sample in samples], dtype=torch.float32)
    prompts = [sample.prompt for sample in samples]
    return {"samples": samples, "prompts": prompts, "time_ids": time_ids}
