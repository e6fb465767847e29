"""Sizes that images are brought to."""

import math

import pytest

from nara_diffusion.dreambooth.data.buckets import make_buckets, nearest_bucket, parse_buckets


@pytest.mark.parametrize(("resolution", "divisor", "max_ratio"), [(1024, 64, 2.0), (64, 8, 2.0), (512, 32, 3.0)])
def test_buckets_are_what_they_promise(resolution: int, divisor: int, max_ratio: float) -> None:
    buckets = make_buckets(resolution, divisor=divisor, max_ratio=max_ratio)
    assert (resolution, resolution) in buckets
    assert len(buckets) == len(set(buckets)) > 2
    for height, width in buckets:
        assert height % divisor == width % divisor == 0
        assert height * width <= resolution**2
        assert 1 / max_ratio <= height / width <= max_ratio
        assert (width, height) in buckets
        # neither side can grow: that would break the bound on pixels or on the ratio
        assert (height + divisor) * width > resolution**2 or (height + divisor) / width > max_ratio
        assert height * (width + divisor) > resolution**2 or (width + divisor) / height > max_ratio


def test_sdxl_s_own_sizes_are_among_them() -> None:
    assert {(832, 1216), (896, 1152), (1024, 1024), (1152, 896), (1216, 832), (768, 1344)} <= set(make_buckets(1024))


def test_ratio_one_leaves_the_square() -> None:
    assert make_buckets(512, max_ratio=1.0) == [(512, 512)]


@pytest.mark.parametrize("size", [(3000, 4000), (4000, 3000), (777, 777), (100, 5000), (1080, 1920), (1000, 1049)])
def test_an_image_goes_where_the_least_is_cut_off(size: tuple[int, int]) -> None:
    buckets = make_buckets(1024)

    def kept(bucket: tuple[int, int]) -> float:
        """Share of the image's pixels that remain."""
        scale = max(bucket[0] / size[0], bucket[1] / size[1])
        return bucket[0] * bucket[1] / (size[0] * size[1] * scale**2)

    chosen = nearest_bucket(size, buckets)
    assert math.isclose(kept(chosen), max(kept(bucket) for bucket in buckets))


def test_ratios_are_compared_as_ratios() -> None:
    """1.45 is nearer to 2 than to 1: it cuts off 27 % there, and 31 % here; as a difference it is nearer to 1."""
    assert nearest_bucket((145, 100), [(64, 64), (128, 64)]) == (128, 64)
    assert nearest_bucket((100, 145), [(64, 64), (64, 128)]) == (64, 128)
    assert nearest_bucket((140, 100), [(64, 64), (128, 64)]) == (64, 64)


def test_of_two_equal_ratios_the_larger_wins() -> None:
    assert nearest_bucket((30, 20), [(96, 64), (48, 32), (64, 96)]) == (96, 64)


def test_buckets_in_words() -> None:
    assert parse_buckets("1216,832; 1024,1024;832,1216;") == [(832, 1216), (1024, 1024), (1216, 832)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no buckets were given: write them as 832,1216;1024,1024"),
        ("1024", "the bucket '1024' isn't height,width"),
        ("1024,a", "the bucket '1024,a' isn't height,width"),
        ("1024x1024;512,512", "the bucket '1024x1024' isn't height,width"),
        (
            "1024,1028",
            "a training size of 1024 x 1028 pixels doesn't fit this model: both sides have to be multiples of 8",
        ),
        ("0,8", "multiples of 8"),
    ],
)
def test_other_words_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_buckets(text)


def test_a_resolution_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1000 x 1000 pixels doesn't fit this model: both sides .* multiples of 64"):
        make_buckets(1000)
    with pytest.raises(ValueError, match=r"max_ratio is 0\.5, expected 1 or more"):
        make_buckets(1024, max_ratio=0.5)
