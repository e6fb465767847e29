"""Each example runs through its `main`, as a newcomer runs it, with fewer steps."""

from __future__ import annotations

import asyncio
import io
import json
import re
import sys
from importlib import import_module  # the names of the examples start with their numbers
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from tests.helpers.small_pipelines import small_sdxl

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "01_first_nara_adapter": ({"steps": 20}, "gives the ring again: True"),
    "02_generate_with_llada": ({"n": 2}, "answer     tenalp"),
    "03_loss_over_noise": ({"steps": 2, "n": 4}, "right answers: "),
    "04_several_adapters": ({"steps": 2, "n": 4}, "merged at λ = 0.5"),
    "06_own_core": ({"steps": 2, "n": 4}, "gives the same logits: True"),
}
"""{example: (arguments of its main, what it prints)}."""
PICTURES: dict[str, tuple[dict[str, Any], str]] = {
    "05_load_nara_weights": ({"steps": 3, "sample_steps": 2}, "gives the base's pixels again: True"),
    "07_convert_a_model": ({"steps": 8, "n": 8, "sample_steps": 2}, "gives the base's pixels again: True"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_example_of_text_prints_what_it_shows(name, tmp_path, capsys):
    arguments, shown = RUNS[name]
    main = import_module(name).main
    draws = "output_dir" in main.__code__.co_varnames
    main(**arguments, **({"output_dir": tmp_path} if draws else {}))
    assert shown in capsys.readouterr().out
    assert not draws or (tmp_path / f"{name}.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_example_of_images_prints_what_it_shows(name, tmp_path, capsys):
    small_sdxl().save_pretrained(tmp_path / "sdxl")
    arguments, shown = PICTURES[name]
    import_module(name).main(model=tmp_path / "sdxl", output_dir=tmp_path, **arguments)
    assert shown in capsys.readouterr().out
    assert (tmp_path / f"{name}.png").stat().st_size > 0


def test_chat_answers_each_line_by_the_conversation_so_far(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("upper: planet\n\n/clear\nreverse: planet"))
    import_module("chat").main([str(EXAMPLES / "assets" / "llada-tiny"), "--gen_length", "12"])
    assert capsys.readouterr().out.rstrip("\n").split("\n") == ["PLANET", "tenalp"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # PEFT, of a second adapter
def test_app_samples_before_and_after_adapters(tmp_path):
    app, session = import_module("app"), import_module("app_session").Session()
    nara, lora = session.load(str(app.MODEL), [str(app.ADAPTER)]), save_lora(tmp_path / "lora")
    assert max(nara[0].distance) > 0.1
    call = {"seed": 1, "num_inference_steps": 2, "guidance_scale": 2.0}
    pictures = {}
    for strength in (0.0, 1.0):
        points = app.points_of([[1, 0, 0.0], [1, 1, strength]], nara)
        before, pictures[strength] = session.sample("a photo of sks toy", points, lambda *_: None, **call)
    assert pictures[0.0].tobytes() == before.tobytes() != pictures[1.0].tobytes()
    both = session.load(str(app.MODEL), [str(app.ADAPTER), str(lora)])
    assert [adapter.summary.partition(":")[0] for adapter in both] == ["NaRA", "LoRA"]
    assert app.with_a_point([[1, 0, 1], [2, 1, 0.3]]) == [[1, 0, 1], [2, 1, 0.3], [2, 0.5, 0.3]]
    with pytest.raises(ValueError, match=r"Row 1 of the strengths is \[3, 0, 1\], expected adapter \(1 to 2\)"):
        app.points_of([[3, 0, 1]], both)

    async def built() -> None:  # in an event loop, since Gradio makes one that it never closes where there is none
        app.build()

    asyncio.run(built())


def save_lora(folder: Path) -> Path:
    """A plain LoRA of the shipped SDXL."""
    pipe = import_module("app_session").load_pipeline(str(EXAMPLES / "assets" / "sdxl-tiny"))
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    pipe.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    return folder


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
