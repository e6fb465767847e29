"""examples/benchmarks/benchmark_dreambooth_step.py at a tiny size: both steps train, and their record is written."""

import json

import benchmark_dreambooth_step as benchmark
import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.small_pipelines import small_sdxl


@pytest.fixture
def folders(tmp_path):
    small_sdxl().save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    return {"model": tmp_path / "model", "images": tmp_path / "images", "output_dir": tmp_path / "out"}


def test_it_measures_and_writes(folders, capsys) -> None:
    threads = torch.get_num_threads()
    figures = benchmark.main(rounds=2, batches=[1, 2], rank=2, resolution=16, **folders)
    record = json.loads((folders["output_dir"] / "benchmark_dreambooth_step.json").read_text())
    assert record["ratio_by_batch"] == figures["ratio_by_batch"]
    assert record["ratio_by_batch"].keys() == {"1", "2"}
    assert all(ratio > 0 for ratio in record["ratio_by_batch"].values())
    assert record["seconds_by_batch"]["2"].keys() == benchmark.STEPS.keys()
    assert "ours / diffusers' script: " in capsys.readouterr().out
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("name", benchmark.STEPS)
def test_each_step_changes_its_adapter_alone(folders, name: str) -> None:
    records = benchmark.records_from_folder(folders["images"], prompt=benchmark.PROMPT, progress=False)
    dataset = benchmark.DreamBoothDataset(records, [(16, 16)], batch_size=2, seed=0)
    pipe = benchmark.load_pipeline(str(folders["model"]), dtype=torch.float32)
    step = benchmark.STEPS[name](pipe, dataset, 2, 2)
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    step()
    changed = {key for key, value in pipe.unet.state_dict().items() if not torch.equal(value, before[key])}
    assert any("lora_B" in key for key in changed)
    assert all("lora_" in key or "nara_core" in key for key in changed)
