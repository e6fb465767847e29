"""How many processes `accelerate launch` starts for the paper's experiments.

accelerate launch would start a process on each GPU. But an optimizer step has `global_batch_size` samples, which not
every number of processes can share evenly, so the number is always passed.
"""

from __future__ import annotations

from collections.abc import Sequence

# Flags with which `accelerate launch` starts several processes, as many as it decides.
_SEVERAL = ("--multi_gpu", "--config_file", "--tpu", "--use_deepspeed", "--use_fsdp", "--use_megatron_lm")


def with_processes(given: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """The arguments of `accelerate launch`, with `--num_processes 1` unless `given` has a number, and the number.

    Raises:
        ValueError: the number is no whole number, 1 or more, or it is missing beside flags for several processes.
    """
    named = values_of(given)
    if "--num_processes" not in named:
        several = [flag for flag in _SEVERAL if flag in named]
        if several:
            raise ValueError(
                f"launch_arguments has {several[0]} and no --num_processes N: add it, since the batch of each process "
                "depends on it"
            )
        return (*given, "--num_processes", "1"), 1
    number = named["--num_processes"]
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"launch_arguments has --num_processes {number!r}, expected a whole number, 1 at least")
    return tuple(given), int(number)


def check_processes(processes: int, global_batch: int, batch: int, where: str) -> None:
    """Raises ValueError if the processes can't share the samples of an optimizer step evenly.

    Args:
        global_batch: samples of an optimizer step (`global_batch_size`).
        batch: samples of one forward on one process (`train_batch_size`).
        where: the name of the configuration, for the message.

    Raises:
        ValueError: with the numbers of processes that can.
    """
    forwards = global_batch // batch
    if global_batch % (processes * batch):
        fitting = [str(n) for n in range(1, forwards + 1) if global_batch % (n * batch) == 0]
        raise ValueError(
            f"num_processes is {processes}, and {where} has steps of {global_batch} samples, {batch} a forward, which "
            f"{' or '.join([', '.join(fitting[:-1]), *fitting[-1:]])} processes can share evenly: "
            "set such a number in --launch_arguments, or another --global_batch_size in --train_arguments"
        )


def values_of(arguments: Sequence[str]) -> dict[str, str]:
    """{flag: value} of a command line. Dashes in flags become underscores, since accelerate takes both."""
    found = {}
    for word, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            found[f"--{flag[2:].replace('-', '_')}"] = value if equals else following
    return found
