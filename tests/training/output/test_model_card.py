"""Table, page of samples, model card, picture of the curves."""

from typing import Any

import yaml
from huggingface_hub import ModelCard
from matplotlib.axes import Axes
from PIL import Image

from nara_diffusion.noise.window import NoiseWindow
from nara_diffusion.training.output.model_card import format_table, write_model_card, write_samples
from nara_diffusion.training.output.plots import plot_noise_level_curves


def test_table_aligns_columns() -> None:
    assert format_table(["", "before", "after"], [["exact match", "1.0 %", "97.5 %"]]) == (
        "             before   after\n-----------  ------  ------\nexact match   1.0 %  97.5 %"
    )


def test_samples_are_escaped_and_marked(tmp_path) -> None:
    path = tmp_path / "samples.html"
    write_samples(
        path, "Samples", ["question", "answer"], [[("a < b", None), ("<no>", False)], [("c", None), ("d", True)]]
    )
    page = path.read_text()
    assert "a &lt; b" in page
    assert '<td class="wrong">&lt;no&gt;</td>' in page
    assert '<td class="right">d</td>' in page
    assert [entry.name for entry in tmp_path.iterdir()] == ["samples.html"]


def test_card_has_front_matter_that_the_hub_accepts(tmp_path) -> None:
    arguments = {"title": "T", "summary": "S", "tags": ["nara", "text"], "sections": {"How good": "97 %"}}
    write_model_card(tmp_path, base_model="org/model", **arguments)
    _, front, body = (tmp_path / "README.md").read_text().split("---\n", 2)
    wanted = {"library_name": "peft", "tags": ["nara", "text"], "base_model": "org/model"}
    assert yaml.safe_load(front) == {**wanted, "base_model_relation": "adapter"}
    data = ModelCard.load(tmp_path / "README.md").data  # Hugging Face's own reader
    assert (data.library_name, data.base_model, data.tags) == ("peft", "org/model", ["nara", "text"])
    assert body == "\n# T\n\nS\n\n## How good\n\n97 %\n"


def test_card_keeps_widget_and_prompt_and_leaves_out_what_is_none(tmp_path) -> None:
    widget = [{"text": "a photo of “sks”: dog", "output": {"url": "samples-after/00-seed-0.png"}}]
    others = {"widget": widget, "instance_prompt": "a photo of sks dog", "license": None, "relation": "finetune"}
    write_model_card(tmp_path, base_model="org/model", title="T", summary="S", tags=[], sections={}, **others)
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data["widget"] == widget
    assert data["instance_prompt"] == "a photo of sks dog"
    assert data["base_model_relation"] == "finetune"
    assert "license" not in data


def test_card_names_no_path_of_this_disk_as_a_hub_model(tmp_path) -> None:
    write_model_card(tmp_path, base_model=str(tmp_path), title="T", summary="S", tags=[], sections={})
    assert "base_model" not in (tmp_path / "README.md").read_text()


def test_picture_is_written_whole(tmp_path) -> None:
    path = tmp_path / "curve.png"
    plot_noise_level_curves(path, [0.1, 0.5, 0.9], [1.0, 2.0, 3.0], [0.5, 1.0, 2.9], "Loss over λ", "nats per token")
    with Image.open(path) as picture:
        assert picture.size == (1200, 480)
    assert [entry.name for entry in tmp_path.iterdir()] == ["curve.png"]


def test_plot_shades_the_window_that_was_trained(monkeypatch, tmp_path) -> None:
    spans, shade = [], Axes.axvspan

    def watched(self: Axes, *args: float, **options: Any) -> Any:
        spans.append(args)
        return shade(self, *args, **options)

    monkeypatch.setattr(Axes, "axvspan", watched)
    curves = ([0.1, 0.5, 0.9], [1.0, 2.0, 3.0], [0.5, 1.0, 2.9], "Loss over λ", "nats")
    plot_noise_level_curves(tmp_path / "all.png", *curves)
    assert spans == []
    plot_noise_level_curves(tmp_path / "window.png", *curves, NoiseWindow(0.2, 0.7))
    assert spans == [(0.2, 0.7), (0.2, 0.7)]
