"""--plan of a command line, and the memory of the real run."""

from __future__ import annotations

from accelerate.state import AcceleratorState

from nara_diffusion.dllm import train as text
from nara_diffusion.dreambooth import train as images
from nara_diffusion.dreambooth.pipelines import modules_of
from nara_diffusion.training.planned_step import StepCounter, tensors_of
from nara_diffusion.training.run import start_run
from nara_flags.parser import parse_arguments

CONFIGURATIONS = ("config.json", "scheduler_config.json", "model_index.json")


def save_configurations(pipe, folder):
    """Save a pipeline's folder without weights and tokenizers."""
    pipe.save_pretrained(folder)
    for file in folder.rglob("*"):
        if file.name not in CONFIGURATIONS and file.is_file():
            file.unlink()


def text_words(model, *more):
    return [
        "--pretrained_model_name_or_path",
        str(model),
        "--target_modules",
        "all-linear",
        "--gen_length",
        "12",
        *more,
    ]


def planned(module, words):
    kind = text.Arguments if module is text else images.DreamBoothArguments
    return module.main(parse_arguments(kind, [*words, "--plan"], defaults=module.shipped_run))


def counted_run(module, args, monkeypatch):
    """The highest live storages of the training loop of a real run, and its adapter's optimizer states."""
    steps, frozen = [], []

    def counted(run, parts, *functions):
        with StepCounter(tensors_of(parts.model, *frozen)) as counter:
            original(run, parts, *functions)
        states = [value for state in parts.optimizer.state.values() for value in state.values()]
        steps.extend([counter.peak, sum(value.nbytes for value in states if value.dim())])

    AcceleratorState._reset_state(True)  # the precision of an earlier test would stay
    original = module.train
    monkeypatch.setattr(module, "train", counted)
    try:
        with start_run(args, "run", module.write_checkpoint) as run:
            if module is text:
                text.fine_tune(text.prepare(args, run))
            else:
                task = images.subject_task(images.load_subject(args, run))
                frozen.extend(modules_of(task.pipe).values())  # encoders run in the loop
                images.teach(task, args, run)
    finally:
        AcceleratorState._reset_state(True)  # nor stays this one's
    return steps
