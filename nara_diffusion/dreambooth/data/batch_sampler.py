"""The order of training images in batches that hold one bucket each, as a function of (seed, position) alone.

Let bucket c hold n_c of the n images. Batch m, of positions m·b … (m + 1)·b − 1, belongs to round ⌊m / n⌋; a round
is n batches, of which n_c are bucket c's, in an order drawn from (seed, round). The j-th batch of bucket c takes the
samples j·b … (j + 1)·b − 1 of that bucket's own endless stream of permutations. So in each round every image is seen
exactly b times, whatever the buckets' sizes, and nothing is left over. With one bucket it is `ShuffledStream`'s order.

A forward's batch is one m on whatever process it runs: accelerate deals out whole batches. To resume, start at a
position; nothing that came before is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from nara_diffusion.dreambooth.seeding import numpy_generator
from nara_diffusion.training.stream import ShuffledStream


class BucketBatchSampler:
    """`order[p]` is the number of the image at position p.

    Args:
        buckets: the bucket of each image.
        batch_size: b, the samples of one forward on one process; they share a bucket.
        seed: of all permutations.
    """

    def __init__(self, buckets: Sequence[Hashable], batch_size: int, seed: int) -> None:
        if not buckets:
            raise ValueError("there are no training images.")
        kinds = sorted(set(buckets), key=str)
        members = [[{"image": i} for i, bucket in enumerate(buckets) if bucket == kind] for kind in kinds]
        self._streams = [
            ShuffledStream(images, seed if len(kinds) == 1 else seed + number) for number, images in enumerate(members)
        ]
        self._batches = [number for number, images in enumerate(members) for _ in images]
        self.batch_size = batch_size
        self.seed = seed
        self._round = -1
        self._plan: list[tuple[int, int]] = []

    def __getitem__(self, position: int) -> int:
        batch, offset = divmod(position, self.batch_size)
        number, nth = divmod(batch, len(self._batches))
        if number != self._round:
            self._plan, self._round = self._plan_round(number), number
        bucket, j = self._plan[nth]
        return self._streams[bucket][j * self.batch_size + offset]["image"]

    def _plan_round(self, number: int) -> list[tuple[int, int]]:
        """(bucket, how many batches of it came before) of the round's n batches."""
        sizes = Counter(self._batches)
        seen = {bucket: number * size for bucket, size in sizes.items()}
        plan = []
        for bucket in numpy_generator(self.seed, "buckets", number).permutation(self._batches).tolist():
            plan.append((bucket, seen[bucket]))
            seen[bucket] += 1
        return plan
