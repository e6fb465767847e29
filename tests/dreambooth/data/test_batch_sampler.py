"""The order of images in batches of one bucket: complete, even, and a function of the position alone."""

from collections import Counter

import pytest

from nara_diffusion.dreambooth.data.batch_sampler import BucketBatchSampler
from nara_diffusion.training.stream import ShuffledStream

BUCKETS = ["wide", "tall", "wide", "square", "wide", "tall", "wide"]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_a_batch_holds_one_bucket_and_a_round_every_image_equally_often(batch_size: int) -> None:
    order = BucketBatchSampler(BUCKETS, batch_size, seed=3)
    for number in range(4):
        seen: Counter[int] = Counter()
        for batch in range(number * 7, (number + 1) * 7):
            images = [order[batch * batch_size + offset] for offset in range(batch_size)]
            assert len({BUCKETS[image] for image in images}) == 1
            seen.update(images)
        assert seen == Counter(dict.fromkeys(range(7), batch_size))


def test_each_bucket_passes_through_all_its_images_before_one_comes_again() -> None:
    order = BucketBatchSampler(BUCKETS, 3, seed=0)
    images = [order[position] for position in range(3 * 7 * 4)]
    for bucket in set(BUCKETS):
        members = [image for image, kind in enumerate(BUCKETS) if kind == bucket]
        own = [image for image in images if BUCKETS[image] == bucket]
        passes = [own[start : start + len(members)] for start in range(0, len(own), len(members))]
        assert all(sorted(each) == members for each in passes)


def test_a_position_always_holds_the_same_image() -> None:
    expected = [BucketBatchSampler(BUCKETS, 2, seed=3)[position] for position in range(60)]
    order = BucketBatchSampler(BUCKETS, 2, seed=3)
    assert [order[position] for position in reversed(range(60))] == expected[::-1]
    assert [order[position] for position in range(37, 60)] == expected[37:]
    assert [BucketBatchSampler(BUCKETS, 2, seed=4)[position] for position in range(60)] != expected


def test_buckets_come_in_another_order_each_round() -> None:
    order = BucketBatchSampler(BUCKETS, 2, seed=0)
    rounds = [[BUCKETS[order[2 * batch]] for batch in range(7 * number, 7 * number + 7)] for number in range(4)]
    assert len({tuple(each) for each in rounds}) > 1
    assert all(Counter(each) == Counter(BUCKETS) for each in rounds)


def test_with_one_bucket_it_is_the_order_of_the_plain_stream() -> None:
    stream = ShuffledStream([{"image": number} for number in range(5)], seed=9)
    order = BucketBatchSampler([(64, 64)] * 5, 3, seed=9)
    assert [order[position] for position in range(40)] == [stream[position]["image"] for position in range(40)]


def test_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="no training images"):
        BucketBatchSampler([], 2, seed=0)
