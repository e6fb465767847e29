"""Two processes of dreambooth_sdxl.py, resumed half-way, train as one does, with all options that draw or average."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from nara_diffusion.training.formats import TRAINABLE
from nara_diffusion.training.weight_average import AVERAGE
from tests.helpers.engines import in_two_processes
from tests.train_scripts.dreambooth_runs import WEIGHTS, tiny_arguments, write_pictures
from train_scripts.dreambooth_sdxl import main

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")]

OPTIONS: dict[str, Any] = {
    "caption_dropout": 0.3,
    "snr_gamma": 5.0,
    "min_noise_level": 0.2,
    "use_ema": True,
}


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_resumed_end_as_one_that_never_stopped(sdxl_folder, tmp_path) -> None:
    write_pictures(tmp_path / "subject", 3)

    def arguments(name: str, **changes: Any) -> DreamBoothArguments:
        shown = {"validation_prompts": ["a toy"], "num_validation_images": 1}
        every = {"curve_points": 2, "checkpointing_steps": 2, "validation_steps": 4}
        return tiny_arguments(
            sdxl_folder, tmp_path / "subject", tmp_path / name, **OPTIONS, **shown, **every, **changes
        )

    main(arguments("one", train_batch_size=4))
    again = {"train_batch_size": 2, "resume_from_checkpoint": str(tmp_path / "two" / "checkpoint-2")}
    in_two_processes(main, [("ddp", arguments("two", train_batch_size=2)), ("ddp", arguments("resumed", **again))])
    one, two, resumed = (metrics(tmp_path / name) for name in ("one", "two", "resumed"))
    assert resumed == two[-3:]
    for mine, theirs in zip(two, one, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    for file in (Path(WEIGHTS), Path("checkpoint-4") / AVERAGE, Path("checkpoint-4") / TRAINABLE):
        expected, found, last = (load_file(tmp_path / name / file) for name in ("one", "two", "resumed"))
        assert found.keys() == expected.keys() == last.keys()
        for name, value in found.items():
            assert torch.equal(value, last[name]), name
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
