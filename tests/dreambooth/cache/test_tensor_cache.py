"""The bound, the disk, and that neither changes a value."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from nara_diffusion.dreambooth.cache.tensor_cache import TensorCache, fingerprint


class Source:
    """Makes entries of 1 KiB and counts how often it had to."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(self, key: str):
        def make() -> dict[str, torch.Tensor]:
            self.made.append(key)
            generator = torch.Generator().manual_seed(sum(key.encode()))
            half = torch.randn(64, 2, generator=generator).to(torch.bfloat16)
            return {"a": torch.randn(12, 16, generator=generator), "b": half.T}  # 768 and 256 bytes

        return make


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].equal(other[name]) for name in one
    )


def test_each_entry_is_made_once() -> None:
    source, cache = Source(), TensorCache(memory_mib=None)
    first = cache.get("x", source("x"))
    assert same(cache.get("x", source("x")), first)
    assert not same(cache.get("y", source("y")), first)
    assert source.made == ["x", "y"]


def test_the_bound_drops_what_was_not_used_for_longest() -> None:
    source, cache = Source(), TensorCache(memory_mib=3 / 1024)
    for key in "abcad":  # d drives out b, since a was used again
        cache.get(key, source(key))
        assert cache.bytes <= 3 * 1024
    assert source.made == ["a", "b", "c", "d"]
    for key in "acd":
        cache.get(key, source(key))
    assert source.made == ["a", "b", "c", "d"]
    fresh = Source()("b")()
    assert same(cache.get("b", source("b")), fresh)
    assert source.made[-1] == "b"
    assert len(cache) == 3
    assert cache.bytes == 3 * 1024


def test_a_full_cache_is_told_once(tmp_path, caplog) -> None:
    source = Source()
    silent = [TensorCache(memory_mib=0), TensorCache(memory_mib=2), TensorCache(memory_mib=1 / 1024, folder=tmp_path)]
    for cache in silent:
        for key in "abab":
            cache.get(key, source(key))
    assert not caplog.text
    assert [cache.full for cache in silent] == [True, False, True]
    cache = TensorCache(memory_mib=1 / 1024, what="latents")
    for key in "abab":
        cache.get(key, source(key))
    assert caplog.text.count("the cache of latents is full at 0 MiB: what doesn't fit is computed again") == 1


@pytest.mark.parametrize("memory", [0.0, 1 / 2048])
def test_a_bound_below_one_entry_keeps_nothing(memory: float) -> None:
    source, cache = Source(), TensorCache(memory_mib=memory)
    values = [cache.get("a", source("a")) for _ in range(3)]
    assert source.made == ["a"] * 3
    assert same(values[0], values[2])
    assert cache.bytes == len(cache) == 0


def test_the_disk_holds_what_memory_does_not(tmp_path) -> None:
    source, cache = Source(), TensorCache(memory_mib=1 / 1024, folder=tmp_path / "cache")
    first = {key: cache.get(key, source(key)) for key in "abc"}
    assert len(cache) == 1
    assert all(same(cache.get(key, source(key)), first[key]) for key in "cba")
    assert source.made == ["a", "b", "c"]
    assert len(list((tmp_path / "cache").iterdir())) == 3
    later = TensorCache(memory_mib=None, folder=tmp_path / "cache")
    assert same(later.get("b", source("b")), first["b"])
    assert source.made == ["a", "b", "c"]


def test_entries_of_another_model_stay_apart(tmp_path) -> None:
    source = Source()
    for label in ("one", "other", "one"):
        TensorCache(memory_mib=None, folder=tmp_path, label=label).get("a", source("a"))
    assert source.made == ["a", "a"]


def test_a_broken_file_is_made_again(tmp_path, caplog) -> None:
    source = Source()
    first = TensorCache(memory_mib=None, folder=tmp_path).get("a", source("a"))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert same(TensorCache(memory_mib=None, folder=tmp_path).get("a", source("a")), first)
    assert source.made == ["a", "a"]
    assert f"{path} can't be read" in caplog.text
    assert same(TensorCache(memory_mib=None, folder=tmp_path).get("a", source("a")), first)
    assert source.made == ["a", "a"]


def test_a_disk_that_fills_up_stops_the_writing_and_not_the_run(tmp_path, caplog, monkeypatch) -> None:
    source, cache = Source(), TensorCache(memory_mib=None, folder=tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    cache.get("a", source("a"))
    cache.get("b", source("b"))
    assert caplog.text.count("can't be written any more ([Errno 28] No space left on device): going on without it") == 1
    assert list(tmp_path.iterdir()) == []
    cache.get("a", source("a"))
    assert source.made == ["a", "b"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"the cache folder .*cache can't be written: Not a directory\. Name another"):
        TensorCache(memory_mib=None, folder=tmp_path / "file" / "cache")
    with pytest.raises(ValueError, match=r"memory is -1 MiB, expected 0 or more, or none"):
        TensorCache(memory_mib=-1)


def test_what_is_kept_does_not_hold_on_to_the_graph() -> None:
    weight = nn.Parameter(torch.ones(3))
    entry = TensorCache(memory_mib=None).get("a", lambda: {"a": weight * 2})
    assert not entry["a"].requires_grad


def test_a_fingerprint_tells_models_apart() -> None:
    def layer() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(3, 5)

    prints = [fingerprint(layer()), fingerprint(layer().to(torch.bfloat16)), fingerprint(layer(), layer())]
    changed = layer()
    with torch.no_grad():
        changed.weight[0, 0] += 1e-6
    assert len({*prints, fingerprint(changed)}) == 4
    assert fingerprint(layer()) == prints[0]


def test_a_fingerprint_reads_the_configuration(tmp_path: Path) -> None:
    from tests.dreambooth.cache.latent_models import vae

    assert fingerprint(vae()) == fingerprint(vae())
    assert fingerprint(vae()) != fingerprint(vae(scaling_factor=0.5))
