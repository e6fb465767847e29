"""train_scripts/dreambooth_sdxl.py on images of several shapes: a resumed run is the same run."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from nara_diffusion.dreambooth.training_step import TrainingStep
from nara_diffusion.training.arguments.cli import parse_arguments
from tests.train_scripts.dreambooth_runs import WEIGHTS, fresh_accelerate, tiny_arguments, write_pictures
from train_scripts.dreambooth_sdxl import main

BUCKETS = "16,16;16,24;24,16"


def test_a_resumed_run_with_buckets_meets_the_same_batches_and_ends_with_the_same_bits(
    sdxl_folder, tmp_path, monkeypatch
) -> None:
    for number, size in enumerate([(24, 24), (20, 34), (34, 20)]):
        write_pictures(tmp_path / f"shape-{number}", 3, size, seed=number)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for path in sorted(tmp_path.glob("shape-*/*.png")):
        path.rename(pictures / f"{path.parent.name}-{path.name}")
    seen: list[tuple[int, ...]] = []
    step = TrainingStep.__call__

    def watched(self: TrainingStep, batch: Any) -> Any:
        sizes = {sample.crop.target for sample in batch["samples"]}
        assert len(sizes) == 1  # a batch is of one bucket
        seen.append((*sizes.pop(), *(sample.position for sample in batch["samples"])))
        return step(self, batch)

    monkeypatch.setattr(TrainingStep, "__call__", watched)
    common: dict[str, Any] = {
        "aspect_ratio_buckets": BUCKETS,
        "validation_prompts": ["a toy"],
        "num_validation_images": 1,
        "curve_points": 1,
        "max_train_steps": 6,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": None,
    }
    folder = tmp_path / "run"
    main(tiny_arguments(sdxl_folder, pictures, folder, **common))
    fresh_accelerate()
    whole, batches = load_file(folder / WEIGHTS), list(seen)
    assert len({batch[:2] for batch in batches}) > 1  # several buckets in one run
    seen.clear()
    (folder / WEIGHTS).unlink()
    argv = ["--config", str(folder / "config.yaml"), "--resume_from_checkpoint", str(folder / "checkpoint-2")]
    main(parse_arguments(DreamBoothArguments, argv))
    assert seen == batches[2:]
    resumed = load_file(Path(folder) / WEIGHTS)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
