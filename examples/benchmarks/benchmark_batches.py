"""Positions that forwards take for each real token: batches by length, random ones, and transformers' own grouping.

    python examples/benchmarks/benchmark_batches.py                              # the table, in a minute
    python examples/benchmarks/benchmark_batches.py --first_step_records 100000  # and the start of a run on them

8 000 rows have lognormal lengths with a mean of 202 tokens, at most 811; two fifths of a row are its prompt. All
orders of an epoch go through the same collator:

    by length     `GlobalBatchStream` with lengths, the default of dllm.py
    random        --group_by_length false
    transformers  `LengthGroupedSampler`, the group_by_length of its Trainer, which dllm uses
    needed        no padding but the trained one

With --first_step_records N, a copy of llada-tiny with 1 024 positions takes one step of 8 on N records of such
lengths: the processor time of the whole program, with reading, tokenising and measuring, and the largest resident
memory of one of its processes.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_record import ROOT, run_command, save_record
from datasets import Dataset
from transformers.trainer_pt_utils import LengthGroupedSampler

from nara_diffusion.dllm import AnswerCollator
from nara_diffusion.dllm.batches import GlobalBatchStream

END = 1
GEN_LENGTH = 128
BATCHES = ((8, 1), (8, 4), (4, 1))  # (samples of a forward, forwards of a step)
Rows = Sequence[Mapping[str, Any]]


def lognormal_lengths(count: int) -> np.ndarray:
    drawn = np.random.default_rng(0).lognormal(np.log(202) - 0.18, 0.6, count)
    return drawn.round().clip(8, 811).astype(int)


def rows_of(lengths: np.ndarray) -> Dataset:
    columns = {
        "input_ids": [[0] * (length - 1) + [END] for length in lengths],
        "prompt_length": 2 * lengths // 5,
        "record": np.arange(len(lengths)),
        "length": lengths,
    }
    return Dataset.from_dict(columns)


def positions(rows: Rows, order: Sequence[int], size: int, collator: AnswerCollator) -> int:
    """The positions of all forwards of `size` rows in this order."""
    starts = range(0, len(order), size)
    forwards = [[rows[i] for i in order[start : start + size]] for start in starts]
    return sum(collator(forward)["input_ids"].numel() for forward in forwards)


def compare(rows: Dataset, size: int, forwards: int, collator: AnswerCollator) -> dict[str, float]:
    """Positions a real token in each order of an epoch."""
    lengths, together = collator.row_lengths(rows), size * forwards
    generator = torch.Generator().manual_seed(0)
    theirs = LengthGroupedSampler(together, lengths=lengths.tolist(), generator=generator)
    streams = {
        "by length": GlobalBatchStream(rows, 0, together, lengths),
        "random": GlobalBatchStream(rows, 0, together),
    }
    orders = {name: stream.order_of(0) for name, stream in streams.items()}
    orders["transformers"] = list(theirs)
    listed, tokens = rows.to_list(), sum(rows["length"])
    shares = {name: positions(listed, order, size, collator) / tokens for name, order in orders.items()}
    return shares | {"needed": int(lengths.sum()) / tokens}


def first_step(records: int) -> dict[str, float]:
    """Seconds of processor time and GB of resident memory of a run of one step; see the module."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = folder / "model", folder / "data.jsonl"
        shutil.copytree(ROOT / "examples" / "assets" / "llada-tiny", model)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"max_sequence_length": 1024}))
        random = np.random.default_rng(1)
        with data.open("w") as file:
            for length in lognormal_lengths(records).tolist():
                letters = random.integers(97, 123, max(2, length - 12), dtype=np.uint8).tobytes().decode()
                question, answer = letters[: 2 * length // 5 + 1], letters[2 * length // 5 + 1 :] or "a"
                file.write(json.dumps({"instruction": question, "output": answer}) + "\n")
        flags = {
            "pretrained_model_name_or_path": model,
            "train_file": data,
            "output_dir": folder / "out",
            "max_train_steps": 1,
            "train_batch_size": 8,
            "max_length": 896,
            "validation_samples": 8,
            "test_samples": 1,
            "curve_points": 1,
            "generation_steps": 4,
        }
        words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
        script = ROOT / "train_scripts" / "dllm.py"
        environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, script, *words], check=True, env=environment, capture_output=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"records": records, "seconds": used.ru_utime + used.ru_stime, "gb": used.ru_maxrss * 1024 / 1e9}


def main(records: int = 8000, first_step_records: int = 0, output_dir: str = "outputs/benchmarks") -> dict[str, Any]:
    """Print the table, save it as JSON, return the figures."""
    rows, table = rows_of(lognormal_lengths(records)), []
    figures: dict[str, Any] = {"records": records, "gen_length": GEN_LENGTH, "table": table}
    print("| batch | trained_padding | by length | random | transformers | needed |")
    print("|---|---|---:|---:|---:|---:|")
    for padding in ("longest", "gen_length"):
        collator = AnswerCollator(END, padding, GEN_LENGTH)
        for size, forwards in BATCHES:
            shares = compare(rows, size, forwards, collator)
            table.append({"batch": [size, forwards], "trained_padding": padding, **shares})
            numbers = " | ".join(f"{share:.3f}" for share in shares.values())
            print(f"| {size} × {forwards} | {padding} | {numbers} |", flush=True)
    if first_step_records:
        figures["first_step"] = first_step(first_step_records)
        print("first step: {records} records, {seconds:.0f} s of CPU, {gb:.2f} GB".format(**figures["first_step"]))
    print(f"saved to {save_record('benchmark_batches', figures, output_dir)}")
    return figures


if __name__ == "__main__":
    run_command(main)
