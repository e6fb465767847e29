"""benchmark_alternatives.py on few questions and random latents: its runs, records and table."""

from dataclasses import replace

import benchmark_alternatives as alternatives
import pytest
import torch
from diffusers import DDPMScheduler
from quality import results
from quality.regimes.images.conversion import Conversion
from quality.regimes.images.objectives import CONVERSIONS
from quality.regimes.runs import REGIMES
from quality.regimes.text.corruption import REPLACED
from quality.regimes.text.denoising import Denoising

TIME, TOKEN = ("eps_to_v", "LoRA, time layers too, r 12"), ("blind_open", "LoRA, λ as a token, r 4")
PLAIN = ("zero_snr", "NaRA, r 4")


@pytest.fixture(autouse=True)
def _few(monkeypatch, data, text_data):
    told = Denoising(replace(REPLACED, corrupt=alternatives.told), lambda: text_data)
    monkeypatch.setitem(alternatives.TOLD_REGIME, alternatives.TOLD, told)
    monkeypatch.setitem(REGIMES, alternatives.TEXT, Denoising(REPLACED, lambda: text_data))
    for name in CONVERSIONS:
        monkeypatch.setitem(REGIMES, name, Conversion(name, lambda: data))


def test_main_makes_what_the_records_lack_and_prints_the_table(monkeypatch, tmp_path, capsys):
    whole = alternatives.trained
    monkeypatch.setattr(
        alternatives, "trained", lambda n: [arm for arm in whole(n) if (arm.regime, arm.title) in (TIME, TOKEN, PLAIN)]
    )
    output, command = tmp_path / "alternatives.jsonl", ["--seeds", "3", "--steps", "1", "--output"]
    alternatives.main([*command, str(output)])
    table = capsys.readouterr().out
    records = results.read(output)
    assert [(record["stage"], record["arm"], record["seed"]) for record in records] == [
        *(("alternatives", title, None) for _, title in alternatives.UNTRAINED),
        *(("tune", "lora", 10) for _ in range(4)),
        *(("alternatives", arm, 3) for arm in ("lora", "nara", "lora")),
    ]
    needed = {"command", "commit", "versions", "hardware", "seconds", "losses", "score"}
    assert all(needed <= set(record) for record in records)
    trained = records[len(alternatives.UNTRAINED) :]
    tuned = min(trained[:2], key=lambda record: record["score"])
    assert trained[4]["rates"] == tuned["rates"]  # the better of two
    assert trained[5]["rates"] == {"learning_rate": 0.01, "core_learning_rate": 0.001}  # which the regime chose
    assert (
        f"| {' | '.join(TIME)} | {198_144} | {tuned['rates']['learning_rate']:g} | {trained[4]['score']:.3f} |" in table
    )
    assert f"| {' | '.join(PLAIN)} | {203_920} | 0.01 / 0.001 | {trained[5]['score']:.3f} |" in table
    alternatives.main([*command, str(output)])
    assert results.read(output) == records
    assert capsys.readouterr().out == table


def test_identity_reads_what_the_base_says_as_v(data):
    scheduler = DDPMScheduler.from_config(data.pipe.scheduler.config)
    expected = []
    for clean in data.held_out:
        alpha = scheduler.alphas_cumprod[clean.indices].double()[:, None, None, None]
        x, noise = clean.clean.double(), clean.noise.double()
        shown = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
        hidden, pooled = clean.embeddings
        conditions = {"text_embeds": pooled, "time_ids": clean.time_ids}
        with torch.no_grad():
            said = data.pipe.unet(shown.float(), clean.indices, hidden, added_cond_kwargs=conditions).sample.double()
        v = (said - (1 - alpha).sqrt() * shown) / alpha.sqrt()
        expected.append((v - alpha.sqrt() * noise + (1 - alpha).sqrt() * x).square().mean().item())
    assert alternatives.identity("eps_to_v") == pytest.approx(expected, rel=1e-3)


def test_a_seed_on_which_rates_are_chosen_is_refused(capsys):
    with pytest.raises(SystemExit):
        alternatives.main(["--seeds", "20", "10"])
    assert "--seeds has 10, on which rates are chosen: leave it out" in capsys.readouterr().err
