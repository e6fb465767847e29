"""The paper's experiments (arXiv 2605.29716) as commands: training data, test sets, methods.

Each run (domain, method, seed) has two steps:

    training      train_scripts/dllm.py with the domain's configuration, into FOLDER/training
    evaluation    nara-eval on the domain's test sets, into FOLDER/evaluation

with FOLDER = output_dir/domain/method/seed-N. A step whose result exists is done; one that was stopped is resumed. The
method "base" is the model without training. It has one run, since greedy answers don't depend on the seed: that of the
first seed of the call that evaluated it, which later calls with other seeds use too.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nara_diffusion.training.adapters.methods import METHODS as ADAPTERS

from .launching import check_processes, values_of

_ADAPTERS = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main"
BASE = "base"
TRAINING, EVALUATION = "training", "evaluation"
RESULTS = "**/results_*.json"  # of nara-eval, below EVALUATION

MATH = "minerva_math"  # lm-eval's form of MATH; needs its extra "math"
SAMPLING = "gen_length=512,steps=32,block_length=16"
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch")


@dataclass(frozen=True)
class Domain:
    """Attributes:
    config: the end of the configuration's name.
    train_file: the path of the training file in the data folder.
    source: the URL of that file.
    sets: {column of the table: task of nara-eval}.
    test_files: the folders of those sets in the data folder, each with a test.json; none for sets on the Hub.
    runs_code: whether scoring runs the programs that the model writes.
    """

    config: str
    train_file: str
    source: str
    sets: Mapping[str, str]
    test_files: Sequence[str] = ()
    runs_code: bool = False


def _llm_adapters(**sets: str) -> dict[str, str]:
    return {name.replace("_", "-"): f"llm_adapters_{task}" for name, task in sets.items()}


DOMAINS = {
    "math": Domain(
        "math14k",
        "math_14k.json",
        f"{_ADAPTERS}/ft-training_set/math_14k.json",
        _llm_adapters(
            AddSub="addsub", AQuA="aqua", GSM8K="gsm8k", MultiArith="multiarith", SVAMP="svamp", SingleEq="singleeq"
        ),
        ("AddSub", "AQuA", "gsm8k", "MultiArith", "SVAMP", "SingleEq"),
    ),
    "commonsense": Domain(
        "commonsense170k",
        "commonsense_170k.json",
        f"{_ADAPTERS}/ft-training_set/commonsense_170k.json",
        _llm_adapters(
            ARC_c="arc_challenge",
            ARC_e="arc_easy",
            BoolQ="boolq",
            HellaSwag="hellaswag",
            OBQA="openbookqa",
            PIQA="piqa",
            SIQA="siqa",
            WinoGrande="winogrande",
        ),
        ("ARC-Challenge", "ARC-Easy", "boolq", "hellaswag", "openbookqa", "piqa", "social_i_qa", "winogrande"),
    ),
    "code": Domain(
        "code_feedback",
        "python/train.json",
        "https://huggingface.co/datasets/fxmeng/pissa-dataset/resolve/main/python/train.json",
        {"HumanEval": "nara_humaneval", "MBPP": "nara_mbpp"},
        runs_code=True,
    ),
}

# The paper's rows, and further arguments of their training beside the domain's configuration, whose
# rank and lora_alpha (32) also hold for each of Multi-LoRA's five LoRAs.
METHODS: dict[str, tuple[str, ...]] = {
    BASE: (),
    "prompt_tuning": (),
    "p_tuning": (),
    "lora": (),
    "hira": (),
    "multi_lora": (),
    "nara_c": (),
    "nara": (),
    "dora": (),
    "nara_dora": (),
}


Run = tuple[str, str, int]
"""A run: (domain, method, seed)."""


@dataclass(frozen=True)
class Step:
    """Attributes:
    title: a description for the log.
    command: the command to run.
    folder: the folder that it writes to.
    result: the pattern of the file in `folder` that a finished step has written.
    tasks: the tasks that need a score in that file.
    """

    title: str
    command: tuple[str, ...]
    folder: Path
    result: str
    tasks: tuple[str, ...] = ()

    def is_done(self) -> bool:
        """Whether the result exists and is complete."""
        found = result_of(self.folder, self.result)
        return found is not None and set(self.tasks) <= found.get("results", {}).keys()


@dataclass(frozen=True)
class Plan:
    """The settings that all runs share.

    Attributes:
        output_dir, data_dir: folders.
        script: train_scripts/dllm.py.
        configs: the folder of the configurations.
        model: the beginning of their names.
        pretrained: a model in place of that of the configurations, or None.
        dtype, batch_size: of the evaluation.
        with_math: whether the math domain is evaluated on MATH too.
        launch: arguments of accelerate launch, --num_processes among them.
        processes: the number of processes of training and evaluation.
        training, evaluation: further arguments of the script, and of nara-eval.
        methods: further arguments of the training of one method.
    """

    output_dir: Path
    data_dir: Path
    script: Path
    configs: Path
    model: str
    pretrained: str | None
    dtype: str
    batch_size: int
    with_math: bool = False
    launch: tuple[str, ...] = ("--num_processes", "1")
    processes: int = 1
    training: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()
    methods: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def folder(self, domain: str, method: str, seed: int) -> Path:
        return self.output_dir / domain / method / f"seed-{seed}"

    def config(self, domain: str) -> Path:
        return self.configs / f"{self.model}_{DOMAINS[domain].config}.yaml"

    def runs(self) -> list[Run]:
        """The runs that have a folder, in the order of the tables."""
        methods = list(dict.fromkeys((*METHODS, *ADAPTERS)))
        found = []
        for folder in self.output_dir.glob("*/*/seed-*"):
            domain, method, seed = folder.parts[-3:]
            if domain in DOMAINS and method in methods and re.fullmatch(r"seed--?\d+", seed):
                found.append((domain, method, int(seed.removeprefix("seed-"))))
        return sorted(found, key=lambda run: (list(DOMAINS).index(run[0]), methods.index(run[1]), run[2]))

    def evaluated(self, domain: str, method: str, seed: int) -> dict[str, Any] | None:
        """The results of nara-eval for a run; None unless all sets of the domain have one."""
        found = result_of(self.folder(domain, method, seed) / EVALUATION, RESULTS) or {}
        return found if set(DOMAINS[domain].sets.values()) <= found.get("results", {}).keys() else None

    def base_run(self, domain: str, seed: int) -> Run:
        """The evaluated run of the base model, with any seed, or else the one with `seed`."""
        runs = (run for run in self.runs() if run[:2] == (domain, BASE) and self.evaluated(*run))
        return next(runs, (domain, BASE, seed))

    def steps(self, domain: str, method: str, seed: int) -> list[Step]:
        """Training, unless the method is `BASE`, and evaluation."""
        evaluation = self.evaluation_step(domain, method, seed)
        return [evaluation] if method == BASE else [self.training_step(domain, method, seed), evaluation]

    def pretrained_and_revision(self, domain: str) -> tuple[str, str | None]:
        """The name and the revision of the model that is trained and evaluated."""
        configuration = settings_of(self.config(domain))
        revision = values_of(self.training).get("--revision", configuration.get("revision"))
        pretrained = self.pretrained or configuration["pretrained_model_name_or_path"]
        return pretrained, None if revision in (None, "none") else revision

    def training_step(self, domain: str, method: str, seed: int) -> Step:
        """The training of a run, resumed if there is a checkpoint.

        Raises:
            ValueError: the processes can't share the configuration's batch, and the arguments set no other.
        """
        self._check_batch(domain, method)
        folder = self.folder(domain, method, seed) / TRAINING
        resume = ("--resume_from_checkpoint", "latest") if any(folder.glob("checkpoint-*")) else ()
        command = (
            *(*LAUNCH, *self.launch, str(self.script), "--config", str(self.config(domain))),
            *(() if self.pretrained is None else ("--pretrained_model_name_or_path", self.pretrained)),
            *("--train_file", str(self.data_dir / DOMAINS[domain].train_file)),
            *("--test_file", "none", "--test_samples", "8"),  # nara-eval measures; these show that answers come
            *("--adapter", method, "--seed", str(seed), "--output_dir", str(folder)),
            *(*METHODS.get(method, ()), *self.training, *self.methods.get(method, ()), *resume),
        )
        return Step(f"train {method} on {domain}, seed {seed}", command, folder, "results.json")

    def _check_batch(self, domain: str, method: str) -> None:
        own = values_of((*self.training, *self.methods.get(method, ())))
        if own.keys().isdisjoint(("--global_batch_size", "--train_batch_size")):
            settings, where = settings_of(self.config(domain)), self.config(domain).name
            check_processes(self.processes, settings["global_batch_size"], settings["train_batch_size"], where)

    def evaluation_step(self, domain: str, method: str, seed: int) -> Step:
        """The evaluation of a run."""
        training = self.folder(domain, method, seed) / TRAINING
        folder = self.folder(domain, method, seed) / EVALUATION
        pretrained, revision = self.pretrained_and_revision(domain)
        model = {"pretrained": str(training) if method == "full" else pretrained, "dtype": self.dtype}
        if method != "full" and revision is not None:
            model["revision"] = revision
        if method not in (BASE, "full"):
            model["peft"] = str(training)
        math = self.with_math and domain == "math"
        tasks = (*DOMAINS[domain].sets.values(), *((MATH,) if math else ()))
        command = (
            *(*LAUNCH, *self.launch, "-m", "nara_diffusion.harness.command", "run", "--model", "nara_dllm"),
            *("--model_args", json.dumps(model), "--tasks", ",".join(tasks)),
            *("--apply_chat_template", "--batch_size", str(self.batch_size), "--output_path", str(folder)),
            *("--use_cache", str(folder / "answers")),  # an evaluation that is stopped goes on where it was
            *(("--metadata", json.dumps({"data_dir": str(self.data_dir)})) if DOMAINS[domain].test_files else ()),
            *(("--confirm_run_unsafe_code",) if DOMAINS[domain].runs_code else ()),
            *(("--gen_kwargs", SAMPLING) if math else ()),  # the shipped tasks have these settings themselves
            *self.evaluation,
        )
        return Step(f"evaluate {method} on {domain}, seed {seed}", command, folder, RESULTS, tasks)

    def files(self, domain: str) -> dict[Path, str]:
        """{file in the data folder: its URL} of a domain."""
        tests = {f"{name}/test.json": f"{_ADAPTERS}/dataset/{name}/test.json" for name in DOMAINS[domain].test_files}
        needed = {DOMAINS[domain].train_file: DOMAINS[domain].source, **tests}
        return {self.data_dir / name: source for name, source in needed.items()}


def settings_of(config: Path) -> dict[str, Any]:
    """The arguments in a configuration file."""
    import yaml

    return yaml.safe_load(config.read_text(encoding="utf-8"))


def result_of(folder: Path, pattern: str) -> dict | None:
    """The newest result in `folder` that is whole JSON; None if there is none."""
    for path in sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, OSError):
            continue
    return None
