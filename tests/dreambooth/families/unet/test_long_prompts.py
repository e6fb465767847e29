"""Prompts in chunks of 75 tokens, against chunks that are split by hand and read by the encoders directly."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nara_diffusion.dreambooth import encode_long_prompts, encode_prompts, long_prompt_call
from nara_diffusion.dreambooth.cache import PromptCache
from nara_diffusion.dreambooth.families.rendering import render
from nara_diffusion.dreambooth.families.table import family_of
from nara_diffusion.dreambooth.families.unet.clip import tokenize_prompts
from nara_diffusion.dreambooth.families.unet.long_prompts import tokenize_chunks
from tests.helpers import small_pipelines

WORDS = ["a", "photo", "of", "toy", "red", "cube", "on", "grass"]
LONG = " ".join(WORDS[(i * i + i // 7) % 8] for i in range(110))
SHORT = "a red toy"


@pytest.fixture
def pipeline(monkeypatch) -> Callable[..., Any]:
    """A tiny pipeline whose CLIPs have 77 places, and pad differently where there are two."""

    def of(name: str, **changes: Any) -> Any:
        monkeypatch.setattr(small_pipelines, "MAX_TOKENS", 77)
        pipe = {"sd": small_pipelines.small_sd, "sdxl": small_pipelines.small_sdxl}[name](**changes)
        if name == "sdxl":
            pipe.tokenizer_2.pad_token = "!"
            assert pipe.tokenizer_2.pad_token_id != pipe.tokenizer.pad_token_id
        return pipe

    return of


def parts_of(pipe: Any) -> tuple[list[Any], list[Any]]:
    suffixes = ["", "_2"] if hasattr(pipe, "text_encoder_2") else [""]
    tokenizers = [getattr(pipe, f"tokenizer{suffix}") for suffix in suffixes]
    return tokenizers, [getattr(pipe, f"text_encoder{suffix}") for suffix in suffixes]


def chunks_by_hand(tokenizer: Any, prompt: str, n: int) -> list[list[int]]:
    begin, *tokens, end = tokenizer(prompt, verbose=False).input_ids
    chunks = []
    for i in range(n):
        chunk = [begin, *tokens[75 * i : 75 * i + 75], end]
        chunks.append(chunk + [tokenizer.pad_token_id] * (77 - len(chunk)))
    return chunks


def reference(pipe: Any, prompt: str, n: int, layer: int | None) -> tuple[Tensor, Tensor]:
    """The states (1, 2 + 75 n, d) at `layer`, or the last ones, and the last encoder's pooled output of chunk one."""
    widths, pooled = [], None
    for tokenizer, encoder in zip(*parts_of(pipe), strict=True):
        pieces = []
        for i, chunk in enumerate(chunks_by_hand(tokenizer, prompt, n)):
            output = encoder(torch.tensor([chunk]), output_hidden_states=True)
            state = output[0] if layer is None else output.hidden_states[layer]
            pieces.append(state[:, (0 if i == 0 else 1) : (77 if i == n - 1 else 76)])
            pooled = output[0] if i == 0 else pooled
        widths.append(torch.cat(pieces, dim=1))
    return torch.cat(widths, dim=2), pooled


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize(("name", "skip"), [("sd", None), ("sdxl", None), ("sdxl", 1)])
@torch.no_grad()
def test_states_are_those_of_chunks_split_by_hand(pipeline, name: str, skip: int | None, n: int) -> None:
    pipe = pipeline(name)
    family = family_of(pipe).with_conditions(max_sequence_length=2 + 75 * n, clip_skip=skip)
    found = family.encode(pipe, [LONG, SHORT])
    layer = None if name == "sd" else -2 - (skip or 0)
    rows = [reference(pipe, prompt, n, layer) for prompt in (LONG, SHORT)]
    expected = [torch.cat(parts) for parts in zip(*rows, strict=True)][: len(found)]
    assert found[0].shape[:2] == (2, 2 + 75 * n)
    assert len(found) == (1 if name == "sd" else 2)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    cut = found[0][:, 76:151] - encode_long_prompts(*parts_of(pipe), [SHORT, SHORT], 2 + 75 * n, skip)[0][:, 76:151]
    assert cut[0].abs().mean() > 1e-2  # the long prompt's second chunk is read
    torch.testing.assert_close(cut[1], torch.zeros_like(cut[1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 74, 75, 76, 150, 151, 400])
def test_token_ids_at_the_ends_of_chunks(pipeline, count: int) -> None:
    prompt = " ".join(WORDS[i % 8] for i in range(count))
    for tokenizer in parts_of(pipeline("sdxl"))[0]:
        assert tokenize_chunks(tokenizer, [prompt], 152).tolist() == [chunks_by_hand(tokenizer, prompt, 2)]
        assert torch.equal(tokenize_chunks(tokenizer, [prompt], 77)[:, 0], tokenize_prompts([tokenizer], [prompt])[0])


@torch.no_grad()
def test_a_length_of_77_is_the_ordinary_encoding_to_the_bit(pipeline) -> None:
    pipe = pipeline("sdxl")
    for skip in (None, 1):
        plain = encode_prompts(*parts_of(pipe), [LONG, SHORT], skip)
        chunked = encode_long_prompts(*parts_of(pipe), [LONG, SHORT], 77, skip)
        assert all(torch.equal(one, other) for one, other in zip(chunked, plain, strict=True))
    sd = pipeline("sd")
    (states,) = encode_long_prompts([sd.tokenizer], [sd.text_encoder], [LONG, SHORT], 77)
    assert torch.equal(states, family_of(sd).encode(sd, [LONG, SHORT])[0])
    for name in ("sd", "sdxl"):
        pipe = pipeline(name)
        plain, told = (family_of(pipe).with_conditions(max_sequence_length=length) for length in (None, 77))
        pairs = zip(plain.encode(pipe, [LONG]), told.encode(pipe, [LONG]), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_what_cannot_be_read_in_chunks_is_refused(pipeline) -> None:
    parts = parts_of(pipeline("sd"))
    with pytest.raises(ValueError, match=r"max_sequence_length is 150, but CLIP reads .* nearest: 77 and 152"):
        encode_long_prompts(*parts, [SHORT], 150)
    with pytest.raises(ValueError, match=r"clip_skip is 1, but of one text encoder the last states are read"):
        encode_long_prompts(*parts, [SHORT], 152, clip_skip=1)
    parts[0][0].model_max_length = 24
    with pytest.raises(ValueError, match=r"this model's CLIP reads 24 tokens, and chunks are made for those .* 77"):
        encode_long_prompts(*parts, [SHORT], 152)


def call_of(monkeypatch, pipe: Any, call: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """What `render` calls the pipeline with, and the images."""
    calls: list[dict[str, Any]] = []
    kind, own = type(pipe), type(pipe).__call__

    def record(self: Any, **told: Any) -> Any:
        calls.append(told)
        return own(self, **told)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "__call__", record)
        images = render(pipe, [LONG, SHORT], [torch.Generator().manual_seed(i) for i in range(2)], call)
    return calls[0], images


CALL = {"height": 16, "width": 16, "num_inference_steps": 1}


@pytest.mark.parametrize(("name", "zeros"), [("sd", False), ("sdxl", False), ("sdxl", True)])
@pytest.mark.parametrize("scale", [1.0, 4.0])
@torch.no_grad()
def test_samples_are_drawn_with_the_long_encoding(pipeline, monkeypatch, name: str, zeros: bool, scale: float) -> None:
    pipe = pipeline(name)
    if name == "sdxl":
        pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    told, images = call_of(monkeypatch, pipe, {**CALL, "guidance_scale": scale, "max_sequence_length": 152})
    layer = None if name == "sd" else -2
    names = ["prompt_embeds", "pooled_prompt_embeds"][: 1 if name == "sd" else 2]
    expected: dict[str, Tensor] = {}
    for prefix, prompts in [("", [LONG, SHORT]), ("negative_", ["", ""])][: 1 if scale == 1 else 2]:
        rows = [reference(pipe, prompt, 2, layer) for prompt in prompts]
        for part, tensors in zip(names, zip(*rows, strict=True), strict=False):
            expected[prefix + part] = torch.cat(tensors) * (0 if prefix and zeros else 1)
    given = {key: value for key, value in told.items() if isinstance(value, Tensor)}
    assert given.keys() == expected.keys()
    assert "prompt" not in told
    assert "max_sequence_length" not in told
    for key, value in expected.items():
        torch.testing.assert_close(given[key], value, rtol=1e-5, atol=1e-5)
    assert np.isfinite(images).all()
    plain, short = call_of(monkeypatch, pipe, {**CALL, "guidance_scale": scale, "max_sequence_length": 77})
    assert plain["prompt"] == [LONG, SHORT]
    assert not any(isinstance(value, Tensor) for value in plain.values())
    assert (images[0] != short[0]).any()


@torch.no_grad()
def test_negative_prompts_and_layers_of_the_call(pipeline) -> None:
    pipe = pipeline("sdxl")
    call = long_prompt_call(pipe, [SHORT], 227, negative_prompts=[LONG], clip_skip=1)
    for prefix, prompt, layer in (("", SHORT, -3), ("negative_", LONG, -2)):
        states, pooled = reference(pipe, prompt, 3, layer)
        torch.testing.assert_close(call[f"{prefix}prompt_embeds"], states, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(call[f"{prefix}pooled_prompt_embeds"], pooled, rtol=1e-5, atol=1e-5)


def test_the_cache_tells_lengths_apart_and_says_what_is_cut(pipeline, tmp_path, caplog) -> None:
    pipe = pipeline("sdxl")
    found = {}
    for length in (None, 152, 227):
        family = family_of(pipe).with_conditions(max_sequence_length=length)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            found[length] = PromptCache(pipe, family, folder=tmp_path).get([LONG, SHORT])
        said = [record.getMessage() for record in caplog.records if "the text encoders read" in record.getMessage()]
        assert bool(said) == (length is None), said
    assert [tensors[0].shape[1] for tensors in found.values()] == [77, 152, 227]
    family = family_of(pipe).with_conditions(max_sequence_length=152)
    with caplog.at_level(logging.WARNING):
        PromptCache(pipe, family, folder=tmp_path).get([f"{LONG} {LONG}"])
    assert "has 222 tokens; the text encoders read 152" in caplog.text
