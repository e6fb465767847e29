"""The arguments that both train scripts share, in three groups; a script adds its own by inheriting from them."""

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata, not a shared default)
from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from nara_diffusion import NaraConfig
from nara_diffusion.cores.custom import check_core_type
from nara_diffusion.training.adapters.custom_core import import_core_module
from nara_diffusion.training.adapters.methods import METHODS, check_flags, check_method, effective

from .cli import option
from .foreign_names import OTHER_NAMES


def core_option(name: str, unit: str = "", more: str = "") -> Any:
    """An argument that is a field of NaraConfig, with that field's default and choices, and its help, then `more`."""
    field = {field.name: field for field in dataclasses.fields(NaraConfig)}[name]
    hint = get_type_hints(NaraConfig)[name]
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    return option(default, field.metadata["help"] + more, unit=unit, choices=choices)


@dataclass
class AdapterArguments:
    """Adapter"""

    other_names: ClassVar[Mapping[str, str]] = OTHER_NAMES

    adapter: str = option("nara", "How to fine-tune: NaRA, a method of PEFT, or all weights.", choices=tuple(METHODS))
    rank: int = option(8, "Inner size r of A (r, d_in), C (r, r) and B (d_out, r).")
    lora_alpha: float | None = option(
        None, "The update is scaled by lora_alpha / rank; none means rank, so by 1 as in the paper."
    )
    lora_dropout: float = option(0.0, "Dropout on the input of A.", unit="probability")
    use_rslora: bool = option(False, "Scale the update by lora_alpha / sqrt(rank) instead.")
    target_modules: list[str] = option(
        ["q_proj", "k_proj", "v_proj", "o_proj"], "Names of the modules to adapt, or all-linear."
    )
    use_dora: bool = option(False, "NaRA-DoRA: learn the norm of each output row beside the update.")
    num_virtual_tokens: int = option(20, "Of prompt_tuning and p_tuning: what is put before each text.", unit="tokens")
    adapter_options: list[str] | None = option(
        None,
        "Further fields of PEFT's configuration of the adapter, each NAME=VALUE: init_r=12, oft_block_size=16, ….",
        sentences=True,
    )
    core_type: str = core_option("core_type", more=" Or a core of your own: the name that --core_module registers.")
    core_module: str | None = option(
        None,
        "Module, or path of a .py file, that is imported first and calls nara_diffusion.register_core; docs/cores.md "
        "has one.",
        resumable=True,
    )
    core_scale: float = core_option("core_scale")
    core_hidden_dims: list[int] = core_option("core_hidden_dims", unit="features")
    core_init: str = core_option("core_init")
    core_input: str = core_option("core_input")
    core_sharing: str = core_option("core_sharing")
    layer_embedding_dim: int = core_option("layer_embedding_dim", unit="features")
    core_normalization: str = core_option("core_normalization")
    lora_a_init: str = core_option("lora_a_init")
    rank_mask_min: int | None = core_option("rank_mask_min", unit="directions")
    core_bins: int = core_option("core_bins", unit="bins")
    core_knots: int = core_option("core_knots", unit="knots")
    noise_scale: str = core_option("noise_scale")
    noise_embedding: str = core_option("noise_embedding")
    noise_embedding_dim: int = core_option("noise_embedding_dim", unit="features")
    fourier_scale: float = core_option("fourier_scale", unit="radians per unit of λ")
    mask_density_radius: int = core_option("mask_density_radius", unit="tokens")

    def check_flags(self, flags: Mapping[str, Any]) -> None:
        """Refuses flags that contradict `adapter` (see `methods.check_flags`) or `global_batch_size`, at their default
        too.

        Raises:
            ValueError: naming the flag.
        """
        check_flags(self, flags)
        if "gradient_accumulation_steps" in flags and getattr(self, "global_batch_size", None) is not None:
            _refuse_both(self)


@dataclass
class OptimizationArguments:
    """Optimization"""

    train_batch_size: int = option(4, "Samples of one forward on one process.", unit="samples")
    gradient_accumulation_steps: int = option(1, "Forwards that make one optimizer step.", unit="forwards")
    global_batch_size: int | None = option(
        None,
        "Samples of one optimizer step over all processes, however many there are; in place of "
        "--gradient_accumulation_steps, which then follows from it.",
        unit="samples",
    )
    max_train_steps: int | None = option(
        None, "Optimizer steps to train; none leaves it to --num_train_epochs.", unit="optimizer steps"
    )
    num_train_epochs: float = option(
        1.0, "Passes over the training data, where --max_train_steps is none.", unit="epochs"
    )
    learning_rate: float = option(1e-4, "Peak learning rate of A and B.")
    core_learning_rate: float | None = option(None, "Peak learning rate of the core's F; none means --learning_rate.")
    core_start_step: int = option(
        0, "Train A and B alone, with C = I, up to this step, then all: the paper's two stages.", unit="optimizer steps"
    )
    lr_scheduler: str = option(
        "linear",
        "Shape of the learning rate, by transformers.get_scheduler: linear, cosine, cosine_with_restarts, polynomial, "
        "constant, constant_with_warmup or inverse_sqrt.",
    )
    lr_warmup_steps: float = option(
        0.0, "Steps over which the learning rate rises from 0; below 1, a share of all steps.", unit="optimizer steps"
    )
    lr_num_cycles: int = option(1, "Restarts of the schedule cosine_with_restarts.", unit="cycles")
    lr_power: float = option(1.0, "Exponent of the schedule polynomial.")
    scale_lr: bool = option(False, "Multiply the learning rates by the samples of an optimizer step.")
    optimizer: str = option(
        "AdamW", "AdamW, or Prodigy, which finds its own rate: give it --learning_rate 1.", choices=("AdamW", "prodigy")
    )
    use_8bit_adam: bool = option(False, "AdamW with its state in 8 bits, from bitsandbytes.")
    adam_beta1: float = option(0.9, "The optimizer's decay of the gradients' mean.")
    adam_beta2: float = option(0.999, "The optimizer's decay of the gradients' mean square.")
    adam_epsilon: float = option(1e-8, "The optimizer's guard against division by zero.")
    weight_decay: float = option(0.0, "The optimizer's decoupled weight decay.", aliases=("adam_weight_decay",))
    prodigy_beta3: float | None = option(None, "Prodigy's decay of its step size; none means sqrt(--adam_beta2).")
    prodigy_decouple: bool = option(True, "Prodigy's weight decay is AdamW's rather than Adam's.")
    prodigy_use_bias_correction: bool = option(True, "Prodigy corrects its means' start, as Adam does.")
    prodigy_safeguard_warmup: bool = option(True, "Prodigy doesn't take a warm-up for a small step size.")
    max_grad_norm: float | None = option(1.0, "Norm to which gradients are clipped; none disables it.")
    mixed_precision: str | None = option(
        None, "Precision of the forward; none means what `accelerate config` says.", choices=("no", "fp16", "bf16")
    )
    allow_tf32: bool = option(False, "Let float32 products on recent NVIDIA GPUs round to TF32: faster.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward: less memory, more time.")
    dataloader_num_workers: int = option(
        0, "Processes that prepare batches; 0 does it in the main one.", resumable=True
    )


@dataclass
class RunArguments:
    """Run, checkpoints and reports"""

    output_dir: str | None = option(
        None, "Folder of everything that is written; none makes a fresh numbered one under outputs/.", resumable=True
    )
    seed: int = option(0, "Seed of the weights, the order of the data, masks and dropout.")
    check: bool = option(
        False,
        "Measure whether λ can help this training, write check.json and check.png, and stop before it; docs/check.md.",
        resumable=True,
    )
    logging_steps: int = option(10, "Write to metrics.jsonl every so often.", unit="optimizer steps", resumable=True)
    validation_steps: int | None = option(
        100, "Measure the validation loss every so often; none never.", unit="optimizer steps", resumable=True
    )
    checkpointing_steps: int | None = option(
        500, "Write a checkpoint-N folder every so often; none never.", unit="optimizer steps", resumable=True
    )
    checkpoints_total_limit: int | None = option(
        2, "Checkpoints to keep, oldest deleted first; none keeps all.", unit="folders", resumable=True
    )
    resume_from_checkpoint: str | None = option(
        None, "Continue from this checkpoint-N folder; latest: the one of --output_dir written last.", resumable=True
    )
    report_to: list[str] | None = option(
        None, "Trackers beside metrics.jsonl: tensorboard, wandb, or others of accelerate.", resumable=True
    )
    logging_dir: str | None = option(
        None, "Folder of the trackers' files, within the output folder; none means that one itself.", resumable=True
    )
    push_to_hub: bool = option(
        False, "Upload the output folder, without checkpoints, to the Hugging Face Hub.", resumable=True
    )
    hub_model_id: str | None = option(
        None, "Repository to upload to; none means the name of the output folder.", resumable=True
    )


def check_arguments(args: Any) -> None:
    """Refuses values that no run can use; called from the `__post_init__` of a script's arguments.

    Raises:
        ValueError: naming the argument, its value and what it may be.
    """
    if args.core_module is not None:
        import_core_module(args.core_module)
    check_core_type(args.core_type)
    check_method(args)
    for name in (
        "rank",
        "num_virtual_tokens",
        "train_batch_size",
        "gradient_accumulation_steps",
        "logging_steps",
        "lr_num_cycles",
    ):
        require(args, name, getattr(args, name) >= 1, "at least 1")
    if args.global_batch_size is not None and args.gradient_accumulation_steps != 1:
        _refuse_both(args)
    for name in (
        "global_batch_size",
        "max_train_steps",
        "validation_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
    ):
        value = getattr(args, name)
        require(args, name, value is None or value >= 1, "at least 1, or none")
    for name in ("learning_rate", "num_train_epochs", "lr_power"):
        require(args, name, getattr(args, name) > 0, "above 0")
    for name in ("core_start_step", "lr_warmup_steps", "weight_decay", "dataloader_num_workers"):
        require(args, name, getattr(args, name) >= 0, "at least 0")
    require(
        args, "core_learning_rate", args.core_learning_rate is None or args.core_learning_rate > 0, "above 0, or none"
    )
    require(args, "seed", 0 <= args.seed < 2**32, "from 0 to 4294967295, as NumPy's generator takes it")
    require(args, "lora_dropout", 0 <= args.lora_dropout < 1, "in [0, 1)")
    require(args, "max_grad_norm", args.max_grad_norm is None or args.max_grad_norm > 0, "above 0, or none")
    if args.check:
        _check_checkable(args)
    if args.use_8bit_adam and args.optimizer != "AdamW":
        raise ValueError(
            f"use_8bit_adam is a form of AdamW, but the optimizer is {args.optimizer}: give one of the two."
        )
    if args.push_to_hub and args.hub_model_id is None and args.output_dir is None:
        raise ValueError(
            "push_to_hub needs the name of a repository: give hub_model_id (or output_dir, which names one)."
        )
    has_init = effective(args, "core_type") in ("hypernetwork", "constant")
    if args.core_start_step and has_init and args.core_init == "kaiming":
        raise ValueError(
            "core_start_step trains A and B with C = I first, but core_init 'kaiming' starts from another C: "
            "use core_init 'zero_last', or core_start_step 0."
        )


def _check_checkable(args: Any) -> None:
    if METHODS[args.adapter].family in ("prompt", "full"):
        raise ValueError(
            f"check asks what λ tells a low-rank adapter, but adapter is {args.adapter!r}: give nara, or lora."
        )
    for name in ("resume_from_checkpoint", "push_to_hub"):
        if getattr(args, name):
            raise ValueError(f"check measures before a training, and {name} is {getattr(args, name)!r}: leave it out.")


def _refuse_both(args: Any) -> None:
    raise ValueError(
        f"gradient_accumulation_steps is {args.gradient_accumulation_steps} and global_batch_size "
        f"{args.global_batch_size}, from which the former follows: give one of the two (--global_batch_size none)."
    )


def config_differences(args: Any, saved: Mapping[str, Any], digests: Collection[str]) -> dict[str, tuple[Any, Any]]:
    """{name: (saved value, current value)} of the arguments that a resumed run may not change.

    Args:
        digests: contents that are compared in place of their names, see `option`.
    """
    fields = [field for field in dataclasses.fields(args) if not field.metadata.get("resumable")]
    return _differences(args, saved, [field.name for field in fields if field.metadata.get("content") not in digests])


def content_differences(args: Any, saved: Mapping[str, Any], content: str) -> dict[str, tuple[Any, Any]]:
    """The same for the arguments that name `content`."""
    fields = dataclasses.fields(args)
    return _differences(args, saved, [field.name for field in fields if field.metadata.get("content") == content])


def _differences(args: Any, saved: Mapping[str, Any], names: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    current = dataclasses.asdict(args)
    return {name: (saved.get(name), current[name]) for name in names if saved.get(name) != current[name]}


def require(args: Any, name: str, holds: bool, expected: str) -> None:
    """Raises ValueError with the argument's name, its value and what was `expected`, unless `holds`."""
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {getattr(args, name)}.")
