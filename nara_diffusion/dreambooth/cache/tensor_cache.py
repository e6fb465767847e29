"""Tensors that are costly to compute, kept by name: the newest used in memory up to a bound, all on disk if wanted.

Whether an entry was cached never changes its value: it is computed from its key's content alone, and stored as it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

logger = logging.getLogger(__name__)

Entry = dict[str, torch.Tensor]


class TensorCache:
    """`cache.get(key, make)` returns the entry of `key`, on the CPU, and calls `make()` only if it isn't known.

    Args:
        memory_mib: bound on what is kept in memory, in MiB; 0 keeps nothing, None everything.
        folder: keep all entries there too, one file each, for this run and later ones; several processes may share
            it. What doesn't fit in memory is read from there.
        label: what makes entries of different models different: put into each file's name.
        what: it holds, for messages.

    Attributes:
        full: whether something had to leave memory.

    Raises:
        ValueError: a negative bound, or a folder that can't be written.
    """

    def __init__(
        self,
        *,
        memory_mib: float | None,
        folder: str | Path | None = None,
        label: str = "",
        what: str = "entries",
    ) -> None:
        if memory_mib is not None and memory_mib < 0:
            raise ValueError(f"the cache's memory is {memory_mib} MiB, expected 0 or more, or none for no bound.")
        self.limit = None if memory_mib is None else int(memory_mib * 2**20)
        self.folder = None if folder is None else _writable(Path(folder))
        self.label = label
        self.what = what
        self.bytes = 0
        self.full = False
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str, make: Callable[[], Entry]) -> Entry:
        """The entry of `key`: from memory, else from disk, else made."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        entry = self._read(key)
        if entry is None:
            entry = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
            self._write(key, entry)
        self._keep(key, entry)
        return entry

    def _keep(self, key: str, entry: Entry) -> None:
        self._entries[key] = entry
        self.bytes += _size(entry)
        while self.limit is not None and self.bytes > self.limit:
            self.bytes -= _size(self._entries.popitem(last=False)[1])
            self._tell_of_bound()

    def _tell_of_bound(self) -> None:
        """Once, and not where nobody asked for a cache or the disk has it."""
        if not self.full and self.limit and self.folder is None:
            logger.warning(
                "the cache of %s is full at %d MiB: what doesn't fit is computed again at each use. Allow it more, or "
                "give it a folder",
                self.what, self.limit // 2**20,
            )  # fmt: skip
        self.full = True

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        name = hashlib.blake2b(f"{self.label}\n{key}".encode(), digest_size=16).hexdigest()
        return self.folder / f"{name}.safetensors"

    def _read(self, key: str) -> Entry | None:
        if self.folder is None or not self._path(key).is_file():
            return None
        try:
            return load_file(self._path(key))
        except Exception as error:  # safetensors has an error class of its own for a broken file
            logger.warning("%s can't be read (%s): it is made again", self._path(key), error)
            return None

    def _write(self, key: str, entry: Entry) -> None:
        if self.folder is None:
            return
        path = self._path(key)
        partial = path.with_name(f".partial-{os.getpid()}-{path.name}")  # other processes may write the same entry
        try:
            save_file(entry, partial)
            os.replace(partial, path)
        except Exception as error:
            partial.unlink(missing_ok=True)
            logger.warning("the cache %s can't be written any more (%s): going on without it", self.folder, error)
            self.folder = None


def fingerprint(*modules: nn.Module) -> str:
    """A name for what modules compute: their configuration, weights and dtypes."""
    digest = hashlib.blake2b(digest_size=16)
    for module in modules:
        config: Any = getattr(module, "config", None) or {}
        described = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        digest.update(json.dumps(described, sort_keys=True, default=str).encode())
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _size(entry: Entry) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in entry.values())


def _writable(folder: Path) -> Path:
    probe = folder / f".partial-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"the cache folder {folder} can't be written: {error.strerror}. Name another, or none to keep the cache in "
            "memory."
        ) from error
    return folder
