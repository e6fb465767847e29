"""Each example runs through its `main`, as a newcomer runs it, with fewer steps."""

from __future__ import annotations

import inspect
import io
import json
import re
import sys
from importlib import import_module  # the names of the examples start with their numbers
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.mixtures import LLADA2, write_checkpoint
from tests.helpers.small_pipelines import small_sdxl

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "01_first_nara_adapter": ({"steps": 20}, "gives the ring again: True"),
    "02_generate_with_llada": ({"n": 2}, "answer     tenalp"),
    "03_loss_over_noise": ({"steps": 2, "n": 4}, "right answers: "),
    "04_several_adapters": ({"steps": 2, "n": 4}, "merged at λ = 0.5"),
    "05_load_nara_weights": ({"steps": 3, "sample_steps": 2}, "gives the base's pixels again: True"),
    "06_own_core": ({"steps": 2, "n": 4}, "gives the same logits: True"),
}
"""{example: (arguments of its main, what it prints)}."""


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_example_prints_and_draws_what_it_shows(name, tmp_path, capsys):
    (arguments, printed), main = RUNS[name], import_module(name).main
    places = {"output_dir": tmp_path, "model": tmp_path / "sdxl"}
    places = {place: path for place, path in places.items() if place in inspect.signature(main).parameters}
    if "model" in places:
        small_sdxl().save_pretrained(places["model"])
    main(**arguments, **places)
    assert printed in capsys.readouterr().out
    assert "output_dir" not in places or (tmp_path / f"{name}.png").stat().st_size > 0


@pytest.mark.slow
def test_preferences_go_where_imitation_does_not(capsys):
    """A run of 20 steps of the 80: on held-out pairs, and in what is written."""
    margins = import_module("07_preferences").main(steps=20, n=40, batch_size=8)
    (base, _), (imitated, few), (preferred, many) = margins.values()
    assert base < 0.35
    assert imitated < 0.5
    assert preferred > 0.6
    assert many > few + 0.2
    assert f"preferences: prefers the chosen copy in {preferred:.0%}" in capsys.readouterr().out


@pytest.mark.slow
def test_chat_answers_lines_and_drops_oldest_turns(capsys, monkeypatch):
    lines = [
        "upper: planet",
        "",
        "reverse: planet",
        f"upper: {'x' * 60}",
        "upper: planet",
        "/clear",
        "reverse: planet",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    import_module("chat").main([str(EXAMPLES / "assets" / "llada-tiny"), "--gen_length", "26"])
    printed = capsys.readouterr()
    assert printed.out.rstrip("\n").split("\n") == ["PLANET", "tenalp", "PLANET", "tenalp"]
    assert printed.err.count("(the conversation is too long: its oldest turns were dropped)") == 2
    assert re.search("^error: the longest prompt has .* 64 positions: .*$", printed.err, re.MULTILINE)


@pytest.mark.parametrize("name", ["gemma-tiny", "llada2-tiny", "sdar-tiny"])
def test_chat_answers_by_canvases_and_by_blocks(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("reverse: planet"))
    torch.manual_seed(0)
    import_module("chat").main([str(EXAMPLES / "assets" / name), "--gen_length", "16"])
    assert capsys.readouterr().out == "tenalp\n"


def test_chat_keeps_system_message_and_the_runs_length(tmp_path, capsys, monkeypatch):
    chat, seen = import_module("chat"), []
    (tmp_path / "config.yaml").write_text("gen_length: 12\n")
    monkeypatch.setattr(chat.PeftModel, "from_pretrained", lambda model, folder: model)
    monkeypatch.setattr(chat, "answer", lambda model, tokenizer, turns, **kept: seen.append((list(turns), kept)) or "A")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n/clear\ntwo"))
    chat.main([str(EXAMPLES / "assets" / "llada-tiny"), "--adapter", str(tmp_path), "--system", "be short"])
    contents = [[turn["content"] for turn in turns] for turns, _ in seen]
    assert contents == [["be short", "one"], ["be short", "two"]]
    assert {kept["gen_length"] for _, kept in seen} == {12}


def test_chat_gives_llada2_the_blocks_of_run(tmp_path, monkeypatch):
    chat, seen = import_module("chat"), []
    write_checkpoint(tmp_path / "model", LLADA2 | {"block_length": 4})
    (tmp_path / "config.yaml").write_text("block_length: 2\ngen_length: 8\n")
    monkeypatch.setattr(chat.PeftModel, "from_pretrained", lambda model, folder: model)
    monkeypatch.setattr(chat, "answer", lambda model, *_, **kept: seen.append(model.config.block_length) or "A")
    for flags in ([], ["--block_length", "8"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("one"))
        chat.main([str(tmp_path / "model"), "--adapter", str(tmp_path), *flags])
    assert seen == [2, 8]


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    book = json.loads((EXAMPLES / "nara_on_cpu.ipynb").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"]).replace('"num_inference_steps": 12', '"num_inference_steps": 1')
            exec(compile(source, "cell", "exec"), names)
            plt.close("all")


def test_entry_for_pefts_comparison_is_a_nara_config():
    from peft import PeftConfig

    folder = EXAMPLES / "peft_method_comparison/experiments/nara/flux2-klein-default"
    config = PeftConfig.from_pretrained(folder)
    assert (type(config).__name__, config.r, config.core_type) == ("NaraConfig", 32, "hypernetwork")


def test_readme_of_the_examples_names_every_program():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    programs = [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("benchmarks/*.py"), *EXAMPLES.glob("assets/makers/*.py")]
    assert [path.name for path in programs if path.name not in text] == []
    numbered = re.findall(r"^\| \[(\d\d_\w+\.py)\]", text, re.MULTILINE)
    assert numbered == sorted(path.name for path in EXAMPLES.glob("0*.py"))
