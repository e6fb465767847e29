"""The order of the data as a function of (seed, position)."""

import pytest

from nara_diffusion.training.stream import ShuffledStream, count_steps, stream_loader

SAMPLES = [{"value": value} for value in range(7)]


def values(stream: ShuffledStream, positions: range) -> list[int]:
    return [stream[position]["value"] for position in positions]


def test_each_epoch_is_another_permutation() -> None:
    stream = ShuffledStream(SAMPLES, seed=3)
    first, second = values(stream, range(7)), values(stream, range(7, 14))
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    assert first != list(range(7))


def test_a_position_always_holds_the_same_sample() -> None:
    stream = ShuffledStream(SAMPLES, seed=3)
    expected = values(stream, range(30))
    assert [stream[position]["value"] for position in reversed(range(30))] == expected[::-1]
    assert values(ShuffledStream(SAMPLES, seed=3), range(11, 30)) == expected[11:]
    assert values(ShuffledStream(SAMPLES, seed=4), range(30)) != expected


def test_the_loader_starts_anywhere_and_fills_batches_across_epochs() -> None:
    stream = ShuffledStream(SAMPLES, seed=3)
    everything = [
        [sample["position"] for sample in batch]
        for batch in stream_loader(stream, list, batch_size=3, first=0, stop=12)
    ]
    assert everything == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    rest = list(stream_loader(stream, list, batch_size=3, first=6, stop=12))
    assert [[sample["position"] for sample in batch] for batch in rest] == everything[2:]


def test_workers_give_the_same_order() -> None:
    stream = ShuffledStream(SAMPLES, seed=3)
    with_workers = stream_loader(stream, list, batch_size=2, first=2, stop=20, num_workers=2)
    assert list(with_workers) == list(stream_loader(stream, list, batch_size=2, first=2, stop=20))


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no training samples"):
        ShuffledStream([], seed=0)


@pytest.mark.parametrize(
    ("limit", "epochs", "expected"), [(5, 10.0, 5), (None, 1.0, 4), (None, 2.5, 9), (None, 0.01, 1)]
)
def test_number_of_steps(limit: int | None, epochs: float, expected: int) -> None:
    assert count_steps(samples=10, global_batch=3, max_train_steps=limit, num_train_epochs=epochs) == expected
