"""The benchmark of what layers see of λ, on few samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import benchmark_seen_noise
import pytest


@pytest.mark.slow
def test_it_writes_record_and_picture_of_every_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = benchmark_seen_noise.load_task("llada-tiny", "commonsense")
    few = replace(whole, validation=replace(whole.validation, batches=whole.validation.batches[:6]))
    monkeypatch.setattr(benchmark_seen_noise, "load_task", lambda backbone, domain: few)
    monkeypatch.setattr(benchmark_seen_noise, "SUBJECTS", ("toy", "car"))
    figures = benchmark_seen_noise.main(output_dir=tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"benchmark_seen_noise.json", "benchmark_seen_noise.png"}
    assert "lm_head" not in {name for layers in figures["llada-tiny"].values() for name in layers}
    assert figures["llada-tiny"]["q_proj"]["model.layers.0.self_attn.q_proj"] == pytest.approx(0, abs=0.05)
    pixels = figures["sdxl-tiny"]["self-attention"]
    words = figures["sdxl-tiny"]["cross-attention, from words"]
    assert max(pixels.values()) > 0.5 > max(words.values())  # words of the prompt know nothing of the noise
    assert len(words) == 2 * len(pixels) // 4
    assert "sdxl-tiny, cross-attention, from words: R²" in capsys.readouterr().out
