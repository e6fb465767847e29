"""Processor time of a training step of LoRA on llada-tiny's task: dllm.py, dllm's trainer, and a bare loop.

    python examples/benchmarks/benchmark_text_training.py
    python examples/benchmarks/benchmark_text_training.py --dllm CHECKOUT --dllm_packages FOLDER

    dllm.py    train_scripts/dllm.py: batches by length, padded to their longest sample
    random     the same with --group_by_length false
    bare loop  the same model and losses in plain PyTorch: batches made before, as by length, all logits, AdamW
    dllm       MDLMTrainer of https://github.com/ZHZisZZ/dllm with its own model, collator and group_by_length, as its
               examples/llada/sft.py has them; FOLDER holds the packages that it pins (pip install --target FOLDER …)

Each is a program of its own on one thread. They take turns: a turn is some steps, from one call of the optimizer to
another, with loading, logging and schedule. All log every ten steps and neither validate nor save. The first turn isn't
counted; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).parents[2]
MODEL, DATA = ROOT / "examples" / "assets" / "llada-tiny", ROOT / "examples" / "assets" / "two-step"
RANK, RATE = 8, 1e-2
BATCHES = ((8, 1), (8, 4), (32, 1))  # (samples of a forward, forwards of a step)
FORWARDS = 24  # of a turn


# ---------------------------------------------------------------- the programs


def run_dllm_py(rows: str, size: int, forwards: int, steps: int, grouped: str = "true") -> None:
    flags = {
        "pretrained_model_name_or_path": MODEL,
        "train_file": DATA / "train.jsonl",
        "validation_file": DATA / "validation.jsonl",
        "output_dir": Path(rows).parent / f"dllm_py_{grouped}_{size}_{forwards}",
        "adapter": "lora",
        "target_modules": "all-linear",
        "rank": RANK,
        "learning_rate": RATE,
        "lr_scheduler": "cosine",
        "trained_padding": "longest",
        "group_by_length": grouped,
        "train_batch_size": size,
        "gradient_accumulation_steps": forwards,
        "max_train_steps": steps,
        "logging_steps": 10,
        "validation_steps": "none",
        "checkpointing_steps": "none",
        "validation_samples": 8,
        "test_samples": 1,
        "curve_points": 1,
        "generation_steps": 4,
        "gen_length": 12,
    }
    script = str(ROOT / "train_scripts" / "dllm.py")
    sys.argv = [script, *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
    runpy.run_path(script, run_name="__main__")


def run_random(rows: str, size: int, forwards: int, steps: int) -> None:
    run_dllm_py(rows, size, forwards, steps, grouped="false")


def run_bare_loop(rows: str, size: int, forwards: int, steps: int) -> None:
    import torch.nn.functional as F
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model

    from nara_diffusion.dllm import AnswerCollator, load_backbone
    from nara_diffusion.dllm.batches import GlobalBatchStream

    base, tokenizer = load_backbone(str(MODEL))
    mask: Any = base.config.mask_token_id
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)
    samples = Dataset.from_list(json.loads(Path(rows).read_text()))
    collator = AnswerCollator(tokenizer.eos_token_id, "longest")
    stream = GlobalBatchStream(samples, 0, size * forwards, collator.row_lengths(samples))
    epochs = range(steps * size * forwards // len(samples) + 1)
    order = [place for epoch in epochs for place in stream.order_of(epoch)]
    starts = range(0, steps * size * forwards, size)
    batches = [collator([samples[place] for place in order[start : start + size]]) for start in starts]
    for number, batch in enumerate(batches, 1):
        ids, prompts, ends = batch["input_ids"], batch["prompt_lengths"], batch["answer_lengths"]
        places, level = torch.arange(ids.shape[1]), torch.rand(len(ids), 1) * 0.999 + 0.001
        prompts, lengths = torch.as_tensor(prompts)[:, None], torch.as_tensor(ends)[:, None]
        is_answer = (places >= prompts) & (places < prompts + lengths)
        masked = is_answer & (torch.rand(ids.shape) < level)
        logits = model(ids.where(~masked, mask)).logits
        losses = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none") * masked / level / lengths
        (losses.sum() / len(ids) / forwards).backward()
        if number % forwards == 0:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()


def run_dllm(rows: str, size: int, forwards: int, steps: int) -> None:
    import dllm
    import transformers
    from datasets import Dataset
    from dllm.pipelines.llada import LLaDAConfig, LLaDAModelLM
    from dllm.pipelines.llada.models import modeling_llada
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    config = LLaDAConfig.from_pretrained(MODEL)
    sizes = modeling_llada.create_model_config_from_pretrained_config(config)
    sizes.init_device = "cpu"  # the class itself asks for CUDA
    model: Any = LLaDAModelLM(config, modeling_llada.LLaDAModel(sizes, init_params=False))
    model.load_state_dict(load_file(MODEL / "model.safetensors"))
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    end, mask = model.config.eos_token_id, model.config.mask_token_id
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(MODEL / "tokenizer.json"), padding_side="right")
    for name, token in {"eos": end, "pad": end, "bos": end, "mask": mask}.items():
        setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token))
    samples = json.loads(Path(rows).read_text())
    dataset = [
        {"input_ids": row["input_ids"], "labels": [-100] * prompt + row["input_ids"][prompt:]}
        for row in samples
        for prompt in (row["prompt_length"],)
    ]
    arguments = dllm.core.trainers.MDLMConfig(
        output_dir=str(Path(rows).parent / "dllm"),
        group_by_length=True,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=forwards,
        max_steps=steps,
        learning_rate=RATE,
        bf16=False,
        use_cpu=True,
        report_to="none",
        eval_strategy="no",
        save_strategy="no",
        logging_steps=10,
        loss_norm_type="sequence",
    )
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=end)
    trainer = dllm.core.trainers.MDLMTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=Dataset.from_list(dataset),
        args=arguments,
        data_collator=dllm.utils.NoAttentionMaskWrapper(collator),
    )
    trainer.train()


PROGRAMS: dict[str, Callable[[str, int, int, int], None]] = {
    "dllm.py": run_dllm_py,
    "random": run_random,
    "bare loop": run_bare_loop,
    "dllm": run_dllm,
}


def work(program: str, rows: str, size: int, forwards: int, turns: int) -> None:
    """Run a program. Before each turn, wait for a line; after it, print its seconds."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the program prints goes elsewhere
    torch.set_num_threads(1)
    steps, done, start = FORWARDS // forwards, 0, 0.0

    def count(*_: object) -> None:
        nonlocal done, start
        if done % steps == 0:
            print(time.process_time() - start, file=lines, flush=True)
            sys.stdin.readline()
            start = time.process_time()
        done += 1

    register_optimizer_step_post_hook(count)
    PROGRAMS[program](rows, size, forwards, turns * steps + 1)


# ---------------------------------------------------------------- taking turns


def take_turns(environments: dict[str, dict[str, str]], rows: Path, size: int, forwards: int, rounds: int) -> Any:
    """{program: [seconds of a step in each round]}."""
    workers: dict[str, Any] = {}
    for program, environment in environments.items():
        words = ["--worker", program, str(rows), str(size), str(forwards), str(rounds + 2)]
        with (rows.parent / f"{program}.log").open("w") as log:
            command = [sys.executable, "-W", "ignore", __file__, *words]
            pipe = subprocess.PIPE
            workers[program] = subprocess.Popen(
                command, env=environment, stdin=pipe, stdout=pipe, stderr=log, text=True
            )

    def turn(program: str) -> float:
        worker = workers[program]
        worker.stdin.write("go\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
        if not line:
            raise RuntimeError(f"{program} has stopped:\n" + (rows.parent / f"{program}.log").read_text()[-2000:])
        return float(line) / (FORWARDS // forwards)

    try:
        for program in workers:
            for _ in range(2):  # its start, and a turn to warm up
                turn(program)
        shuffler, times = random.Random(0), {program: [] for program in workers}
        for _ in range(rounds):
            for program in shuffler.sample(list(workers), k=len(workers)):
                times[program].append(turn(program))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()  # closes its pipes
    return times


def main(
    rounds: int = 20, dllm: str = "", dllm_packages: str = "", output_dir: str = "outputs/benchmarks"
) -> dict[str, Any]:
    """Print the table, save it as JSON, return the figures."""
    from benchmark_record import median_ratio, save_record

    sys.path.append(str(ROOT / "examples"))
    from shipped_task import load_rows, load_shipped_model

    ours = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environments = {"dllm.py": ours, "random": ours, "bare loop": ours}
    if dllm:
        environments["dllm"] = {**ours, "PYTHONPATH": os.pathsep.join(filter(None, [dllm, dllm_packages]))}
    table: list[dict[str, Any]] = []
    figures: dict[str, Any] = {"rounds": rounds, "forwards_of_a_turn": FORWARDS, "table": table}
    print("| batch | milliseconds of dllm.py |", *(f"dllm.py / {name} |" for name in list(environments)[1:]))
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        rows.write_text(json.dumps(load_rows(load_shipped_model()[1], "train").to_list()))
        for size, forwards in BATCHES:
            times = take_turns(environments, rows, size, forwards, rounds)
            seconds = {program: statistics.median(values) for program, values in times.items()}
            ratios = {name: median_ratio(times["dllm.py"], times[name]) for name in list(times)[1:]}
            table.append({"batch": [size, forwards], "seconds": seconds, "ratios": ratios})
            numbers = " | ".join(f"{ratio:.3f}" for ratio in ratios.values())
            print(f"| {size} × {forwards} | {1000 * seconds['dllm.py']:.1f} | {numbers} |", flush=True)
            file = save_record("benchmark_text_training", figures, output_dir)
            print(f"saved to {file}")
    return figures


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:4], *map(int, sys.argv[4:]))  # type: ignore[arg-type]
    else:
        from benchmark_record import run_command

        run_command(main)
