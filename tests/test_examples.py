"""Each example runs through its `main`, as a newcomer would run it, or with fewer steps."""

import io
import re
import sys
from importlib import import_module  # the names of the examples start with their numbers
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model

from nara_diffusion import core_matrix
from nara_diffusion.dllm import load_backbone
from tests.helpers.adapted import disturb, nara_config
from tests.helpers.small_pipelines import small_sdxl

EXAMPLES = Path(__file__).parents[1] / "examples"
SHOWN_FILE_BY_FILE = {".", "benchmarks", "assets", "assets/makers"}


def test_the_readme_of_the_examples_names_every_file_or_the_folder_that_holds_it():
    """Every program and what makes the assets by itself, a benchmark's code and the models by their folder."""
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    names = set(re.findall(r"[\w.-]+/?", text))
    files = [path.relative_to(EXAMPLES) for path in EXAMPLES.rglob("*") if path.is_file()]
    files = [path for path in files if not {"__pycache__", "outputs", "README.md"} & set(path.parts)]
    assert len(files) > 100

    def is_named(path: Path) -> bool:
        folders = [folder for folder in path.parents if folder.as_posix() not in SHOWN_FILE_BY_FILE]
        return path.name in names or any(f"{folder.name}/" in names for folder in folders)

    assert [str(path) for path in files if not is_named(path)] == []
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [link for link in links if not (EXAMPLES / link).exists()] == []


def test_the_readme_of_the_examples_has_them_in_their_order():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(\d\d_\w+\.py)\]", text, re.MULTILINE) == sorted(p.name for p in EXAMPLES.glob("0*.py"))


def test_first_example_moves_the_points_and_keeps_them_when_saved(tmp_path, capsys):
    results = import_module("01_first_nara_adapter").main(steps=300, output_dir=tmp_path)
    assert results["after"] < results["before"]
    printed = capsys.readouterr().out
    assert "gives the ring again: True" in printed
    assert "gives the same points: True" in printed
    assert (tmp_path / "01_first_nara_adapter.png").stat().st_size > 0


def test_generation_example_shows_each_step_and_compares_ways(capsys):
    found = import_module("02_generate_with_llada").main(n=20)
    printed = capsys.readouterr().out
    assert "λ = 1.00   ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒ ▒" in printed
    assert "answer     tenalp" in printed
    forwards = {name: count for name, (_, count) in found.items()}
    assert forwards["one token a step"] == 12
    assert forwards["all at once"] == 1
    assert forwards["every token above 0.9"] < 12


def test_loss_over_noise_example_draws_its_picture(tmp_path, capsys):
    results = import_module("03_loss_over_noise").main(steps=2, n=8, output_dir=tmp_path)
    assert set(results) == {"before", "after"}
    assert "right answers: " in capsys.readouterr().out
    assert (tmp_path / "03_loss_over_noise.png").stat().st_size > 0


def test_several_adapters_example_trains_switches_and_merges(capsys):
    table = import_module("04_several_adapters").main(steps=2, n=4)
    assert set(table) == {"shift", "upper", "plain", "none"}
    printed = capsys.readouterr().out
    assert "merging without a noise level: λ is not known" in printed
    assert "merged at λ = 0.5" in printed


def test_pipeline_example_loads_samples_and_unloads(tmp_path, capsys):
    small_sdxl().save_pretrained(tmp_path / "sdxl")
    example = import_module("05_load_nara_weights")
    found = example.main(model=tmp_path / "sdxl", steps=3, sample_steps=2, output_dir=tmp_path)
    assert list(found) == [0.0, 0.5, 1.0]
    assert len({tuple(image.tobytes() for image in images) for images in found.values()}) == 3
    printed = capsys.readouterr().out
    assert "active adapters: ['subject']" in printed
    assert "gives the base's pixels again: True" in printed
    assert (tmp_path / "05_load_nara_weights.png").stat().st_size > 0
    again = example.main(tmp_path / "05_load_nara_weights", tmp_path / "sdxl", sample_steps=2, output_dir=tmp_path)
    assert [image.tobytes() for image in again[1.0]] == [image.tobytes() for image in found[1.0]]


def test_own_core_example_trains_saves_and_loads_its_rotation(tmp_path, capsys):
    results = import_module("06_own_core").main(steps=2, n=8, output_dir=tmp_path)
    assert results["after"] == results["loaded"]
    assert "gives the same logits: True" in capsys.readouterr().out
    assert (tmp_path / "06_own_core.png").stat().st_size > 0
    assert '"core_type": "rotation"' in (tmp_path / "06_own_core" / "adapter_config.json").read_text()


def test_own_core_example_keeps_the_norm_of_the_identity_by_its_other_core(tmp_path):
    results = import_module("06_own_core").main("constant_norm", steps=2, n=8, output_dir=tmp_path)
    assert results["after"] == results["loaded"]
    folder = tmp_path / "06_own_core"
    loaded = PeftModel.from_pretrained(import_module("shipped_task").load_shipped_model()[0], folder)
    assert loaded.peft_config["default"].core_type == "constant_norm"
    core = core_matrix(loaded, torch.linspace(0, 1, 11)).detach().double()
    torch.testing.assert_close(core.flatten(1).norm(dim=1), torch.full((11,), 8.0).double().sqrt(), rtol=1e-6, atol=0)
    assert (core - core.mean(0)).abs().max() > 0


def test_conversion_example_brings_its_scheduler_and_takes_it_back(tmp_path, capsys):
    small_sdxl().save_pretrained(tmp_path / "sdxl")
    main = import_module("07_convert_a_model").main
    losses = main(model=tmp_path / "sdxl", steps=8, n=8, sample_steps=2, output_dir=tmp_path)
    assert losses["after"] < losses["before"]
    printed = capsys.readouterr().out
    assert "samples by DPMSolverMultistepScheduler, prediction: flow_prediction" in printed
    assert "samples by EulerDiscreteScheduler and gives the base's pixels again: True" in printed
    assert (tmp_path / "07_convert_a_model.png").stat().st_size > 0


def test_chat_answers_each_line_by_the_conversation_so_far_and_its_adapter(tmp_path, capsys, monkeypatch):
    model, shown = str(EXAMPLES / "assets" / "llada-tiny"), []
    chat = import_module("chat")
    adapted = get_peft_model(load_backbone(model)[0], nara_config(target_modules=["q_proj", "down_proj"]))
    disturb(adapted)
    adapted.save_pretrained(tmp_path)

    def said(text: str, *words: str, terminal: bool = False) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        chat.main([model, "--gen_length", "12", *words])
        return capsys.readouterr().out.rstrip("\n").split("\n")

    assert said("upper: planet\n\n/clear\nreverse: planet") == ["PLANET", "tenalp"]
    adapter = ["--adapter", str(tmp_path), "--strength"]
    assert said("upper: planet", *adapter, "0") == ["PLANET"]
    assert said("upper: planet", *adapter, "1") != ["PLANET"]
    frames = said("upper: planet", terminal=True)[0].split("\r\x1b[2K")
    counts = [frame.count("▒") for frame in frames[1:]]
    assert max(counts) >= 4
    assert counts == sorted(counts, reverse=True)
    assert frames[-1] == "PLANET"

    encode = chat.encode_prompts
    monkeypatch.setattr(
        chat, "encode_prompts", lambda tokenizer, texts: shown.extend(texts) or encode(tokenizer, texts)
    )
    first, _ = said("copy: ab\ncopy: cd")
    turns = [("user", "copy: ab"), ("assistant", first), ("user", "copy: cd"), ("assistant", "")]
    expected = "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>" for role, text in turns)
    assert shown[1] == "<|startoftext|>" + expected.removesuffix("<|eot_id|>")
