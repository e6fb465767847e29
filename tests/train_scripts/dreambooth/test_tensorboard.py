"""dreambooth_sdxl.py --report_to tensorboard, by the packages of [train]: TensorBoard reads what is logged."""

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.train_scripts.dreambooth_runs import tiny_arguments
from train_scripts.dreambooth_sdxl import main


def test_tensorboard_has_the_values_of_metrics_jsonl_and_the_samples(sdxl_folder, pictures, tmp_path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    options: dict[str, Any] = {"validation_steps": 2, "report_to": ["tensorboard"], "logging_dir": "board"}
    args = tiny_arguments(sdxl_folder, pictures, run, curve_points=1, **options)
    main(args)
    (folder,) = (run / "board").iterdir()  # one a project; the settings lie in a folder of it
    board = reading.EventAccumulator(str(folder))
    board.Reload()
    assert set(board.Tags()["images"]) == {f"validation: {prompt}" for prompt in args.prompts}
    samples = sorted((run / "samples-after").glob("*.png"))
    for number, prompt in enumerate(args.prompts):
        shown = board.Images(f"validation: {prompt}")
        assert [event.step for event in shown] == [2, 4]
        expected = np.concatenate([np.asarray(Image.open(path)) for path in samples[2 * number : 2 * number + 2]], 1)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(shown[-1].encoded_image_string))), expected)
    scalars = {tag: {event.step: event.value for event in board.Scalars(tag)} for tag in board.Tags()["scalars"]}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in line.keys() - {"step"}:
            assert scalars[name][line["step"]] == pytest.approx(line[name], rel=1e-6)
    assert set(scalars["loss"]) == {1, 2, 3, 4}
    assert set(scalars["validation_loss"]) == {2, 4}
