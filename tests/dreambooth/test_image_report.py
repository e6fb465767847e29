"""The model card of an image run: the code that loads the adapter, and what is said of the figures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers import StableDiffusionXLPipeline

from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments
from nara_diffusion.dreambooth.image_report import best_by_both, forgetting, loading_code
from nara_diffusion.dreambooth.samples import SampleSettings
from tests.dreambooth.pictures import noise
from tests.helpers.pipelines.edits import small_qwen_plus
from tests.helpers.small_pipelines import small_sdxl


def card_code(**flags: Any) -> str:
    """The code on the card of a run with `flags`."""
    flags = {"pretrained_model_name_or_path": "base", "instance_data_dir": "pictures"} | flags
    args = DreamBoothArguments(**flags)
    settings = SampleSettings(["a toy"], 1, seed=0, batch_size=1, call={"num_inference_steps": 2})
    return loading_code(args, settings, "out", small_sdxl())


def test_card_loads_the_files_of_the_run(tmp_path: Path) -> None:
    small_sdxl().save_pretrained(tmp_path, variant="fp16")
    code = card_code(pretrained_model_name_or_path=str(tmp_path), variant="fp16", revision="main")
    scope: dict[str, Any] = {}
    exec(code.split("```python")[1].partition("\npipe.load_nara_weights")[0], scope)
    assert type(scope["pipe"]) is StableDiffusionXLPipeline
    assert "revision='main', variant='fp16')" in code
    assert "variant" not in card_code()


@pytest.mark.parametrize("count", [1, 2])
def test_card_loads_as_many_sources_as_a_sample(count: int) -> None:
    args = DreamBoothArguments(pretrained_model_name_or_path="base", instance_data_dir="pictures")
    image = noise(8, 8) if count == 1 else [noise(8, 8)] * count
    settings = SampleSettings(["red"], 1, 0, 1, {"num_inference_steps": 2}, [{"image": image}])
    code = loading_code(args, settings, "out", small_qwen_plus())
    images = 'load_image("source.png")' if count == 1 else '[load_image("source-1.png"), load_image("source-2.png")]'
    assert f"    image={images},\n" in code


def measured(similarity: float | None, text_alignment: float | None) -> Any:
    return SimpleNamespace(similarity=similarity, text_alignment=text_alignment)


def test_halved_alignment_beside_rising_similarity_is_warned() -> None:
    (text,) = forgetting(measured(0.26, 0.48), measured(0.7, 0.24))
    assert "alignment with the prompt fell from 0.48 to 0.24" in text
    assert "Train fewer steps (--max_train_steps)" in text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((0.26, 0.48), (0.70, 0.40)),  # it fell a little
        ((0.26, 0.48), (0.25, 0.24)),  # not for the subject
        ((0.26, None), (0.70, None)),
        ((None, 0.48), (None, 0.24)),
    ],
)
def test_other_figures_are_not_warned_of(before: Any, after: Any) -> None:
    assert forgetting(measured(*before), measured(*after)) == []


def test_best_step_is_said_where_similarity_stops() -> None:
    rising = [(0, 0.26, 0.48), (50, 0.50, 0.47), (100, 0.601, 0.46)]
    assert best_by_both(rising) == []
    (text,) = best_by_both([*rising, (150, 0.605, 0.44), (200, 0.59, 0.30)])
    assert "After step 100 the similarity to the subject no longer rises (0.60, at the end 0.59)" in text
    assert "falls (0.46, at the end 0.30). Best by both: step 100." in text
    assert best_by_both([*rising, (150, 0.59, 0.46)]) == []  # the alignment stays
    assert best_by_both([(0, 0.6, 0.5), (50, 0.5, 0.4)]) == []  # it never rose
    assert best_by_both([]) == []
