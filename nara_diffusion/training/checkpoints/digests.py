"""Digests of a run's data and of its base weights, by which a checkpoint recognises them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

_SUMS = 1024
_CHUNK = 1 << 22  # bytes, a multiple of 8 · _SUMS; small enough for a processor's cache


def digest_texts(texts: Iterable[str]) -> str:
    """SHA-256 of texts in their order."""
    found = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", errors="surrogatepass")
        found.update(len(content).to_bytes(8, "big") + content)
    return found.hexdigest()


def digest_weights(modules: Mapping[str, nn.Module]) -> str:
    """SHA-256 of the name, dtype, shape and values of every parameter and buffer that the modules save.

    A cryptographic hash of all bytes would take minutes for some billion parameters, so the values go in as sums: word
    k of a tensor's memory, 8 bytes as one whole number, is added to sum k mod 1024, mod 2^64. A change of one word
    always shows, and so does one of the order, unless words move by a multiple of 1024. It takes one pass over the
    memory, on the device that holds it.
    """
    found = hashlib.sha256()
    for prefix, module in modules.items():
        for name, value in module.state_dict().items():
            if isinstance(value, Tensor):  # quantised layers save other things too
                found.update(f"{prefix} {name} {value.dtype} {tuple(value.shape)};".encode())
                for part in _sums(value):
                    found.update(part.cpu().numpy().tobytes())
    return found.hexdigest()


def _sums(tensor: Tensor) -> Iterator[Tensor]:
    """The 1024 sums of a tensor's words, and the bytes that are left."""
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = len(content) - len(content) % (8 * _SUMS)
    sums = torch.zeros(_SUMS, dtype=torch.int64, device=tensor.device)
    # a part of other memory, such as a mapped file, needn't begin at a word
    aligned = content if content.storage_offset() % 8 == 0 else content.clone()
    for chunk in aligned[:whole].split(_CHUNK):
        sums += chunk.view(torch.int64).view(-1, _SUMS).sum(0)
    yield sums
    yield content[whole:]
