"""The arguments that both train scripts share, in three groups; a script adds its own by inheriting from them."""

from __future__ import annotations

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata, not a shared default)
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from nara_diffusion import NaraConfig
from nara_diffusion.training.adapters.methods import METHODS, check_flags
from nara_diffusion.training.arguments.cli import option
from nara_diffusion.training.arguments.foreign_names import OTHER_NAMES


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
    removed_arguments: ClassVar[Mapping[str, str | None]] = {
        "core_normalization": "none",
        "noise_scale": "linear",
        "layer_embedding_dim": None,
    }

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
    init_adapter: str | None = option(
        None,
        "Start from this adapter: a LoRA's file or folder (PEFT's, Diffusers', …), whose core starts as C = I, or a "
        "NaRA of this package. Its layers, rank, lora_alpha and DoRA have to be those of the flags.",
        resumable=True,
    )
    core_type: str = core_option("core_type", more=" Or a custom core: the name that --core_module registers.")
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
    lora_a_init: str = core_option("lora_a_init")
    rank_mask_min: int | None = core_option("rank_mask_min", unit="directions")
    core_bins: int = core_option("core_bins", unit="bins")
    core_knots: int = core_option("core_knots", unit="knots")
    noise_embedding: str = core_option("noise_embedding")
    noise_embedding_dim: int = core_option("noise_embedding_dim", unit="features")
    fourier_scale: float = core_option("fourier_scale", unit="radians per unit of λ")
    mask_density_radius: int = core_option("mask_density_radius", unit="tokens")

    def check_flags(self, flags: Mapping[str, Any]) -> None:
        """Raises ValueError for flags that contradict `adapter` or `global_batch_size`, at their default too."""
        check_flags(self, flags)
        if "gradient_accumulation_steps" in flags and getattr(self, "global_batch_size", None) is not None:
            refuse_both_batch_sizes(self)


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
        "AdamW",
        "AdamW; Prodigy, which finds its own rate: give it --learning_rate 1; or Adafactor at the given rate, without "
        "momentum and with a row and a column in place of each matrix of mean squares.",
        choices=("AdamW", "prodigy", "adafactor"),
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
        None,
        "Precision of the forward; none means what `accelerate config` says. fp16 is refused under DeepSpeed.",
        choices=("no", "fp16", "bf16"),
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
        None,
        "Continue from this checkpoint-N, a folder or one of --output_dir; latest: the one there written last.",
        resumable=True,
    )
    report_to: list[str] | None = option(
        None,
        "Trackers beside metrics.jsonl: tensorboard, which [train] installs, wandb, or others of accelerate.",
        resumable=True,
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


def refuse_both_batch_sizes(args: Any) -> None:
    """Raises ValueError: one of the two follows from the other."""
    raise ValueError(
        f"gradient_accumulation_steps is {args.gradient_accumulation_steps} and global_batch_size "
        f"{args.global_batch_size}, from which the former follows: give one of the two (--global_batch_size none)."
    )
