"""The flags that both train scripts share, in groups, with the checks that need only their values."""

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata, not a shared default)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .options import (
    Count,
    Interval,
    NotNegative,
    NotNegativeInt,
    Positive,
    Share,
    ShareBelow1,
    check_ranges,
    option,
)

OPTIMIZERS = {
    "AdamW": ("torch.optim", "AdamW"),
    "AdamW8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "PagedAdamW": ("bitsandbytes.optim", "PagedAdamW"),
    "prodigy": ("prodigyopt", "Prodigy"),
    "adafactor": ("transformers", "Adafactor"),
}
"""{optimizer: (module, class)}."""
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")
"""The schedules that need only the step and the warm-up, unlike transformers' other schedules."""


@dataclass
class AdapterArguments:
    """Adapter"""

    adapter: str = option(
        "nara",
        "How to fine-tune: nara, nara_dora, nara_c, lora, dora, another method of PEFT by its name (hira, vera, oft, "
        "prompt_tuning, …), or full for all weights.",
    )
    rank: Count = option(8, "Inner size r of A (r, d_in), C (r, r) and B (d_out, r).")
    lora_alpha: float | None = option(
        None, "The update is scaled by lora_alpha / rank; none means rank, so by 1 as in the paper."
    )
    lora_dropout: ShareBelow1 = option(0.0, "Dropout on the input of A.", unit="probability")
    target_modules: list[str] = option(
        ["q_proj", "k_proj", "v_proj", "o_proj"], "Names of the modules to adapt, or all-linear."
    )
    adapter_options: dict[str, Any] = option(
        {},
        "Further fields of the adapter's configuration, NaraConfig or PEFT's: core_init=kaiming, use_rslora=true, ….",
    )
    init_adapter: str | None = option(
        None,
        "Start from this adapter: a NaRA of this package, or a LoRA's file or folder (PEFT's, Diffusers', …); the core "
        "then starts as C = I. Its layers, rank, lora_alpha and DoRA have to be those of the flags.",
    )
    core_type: str = option(
        "hypernetwork",
        "What makes C(λ): hypernetwork, constant, identity, knots, rank_mask, bins, or the name that --core_module "
        "registers.",
        rare=True,
    )
    core_module: str | None = option(
        None,
        "Module, or path of a .py file, that is imported first and calls nara_diffusion.register_core; "
        "docs/adapters.md has one.",
        rare=True,
    )


@dataclass
class OptimizationArguments:
    """Optimization"""

    train_batch_size: Count = option(4, "Samples of one forward on one process.", unit="samples")
    gradient_accumulation_steps: Count = option(
        1, "Forwards that make one optimizer step.", unit="forwards"
    )
    global_batch_size: Count | None = option(
        None,
        "Samples of one optimizer step over all processes, however many there are; in place of "
        "--gradient_accumulation_steps, which then follows from it.",
        unit="samples",
    )
    max_train_steps: Count | None = option(
        None,
        "Optimizer steps to train, in place of --num_train_epochs. Without both, dllm.py makes one pass, dreambooth.py "
        "takes 500 steps, and a run without a model as many as its log says.",
        unit="optimizer steps",
    )
    num_train_epochs: Positive | None = option(
        None, "Passes over the training data, where --max_train_steps isn't given.", unit="epochs"
    )
    learning_rate: Positive = option(1e-4, "Peak learning rate of A and B.")
    core_learning_rate: Positive | None = option(
        None, "Peak learning rate of the core's F; none means --learning_rate."
    )
    core_start_step: NotNegativeInt = option(
        0,
        "Train only A and B, with C = I, up to this step, then all: the paper's two stages.",
        unit="optimizer steps",
        rare=True,
    )
    lr_scheduler: str = option(
        "linear",
        "Shape of the learning rate, by transformers.get_scheduler.",
        choices=SCHEDULES,
        rare=True,
    )
    lr_warmup_steps: NotNegative = option(
        0.0,
        "Steps over which the learning rate rises from 0; below 1, a share of all steps.",
        unit="optimizer steps",
        rare=True,
    )
    optimizer: str = option(
        "AdamW",
        "AdamW; AdamW8bit or PagedAdamW, of bitsandbytes; prodigy, which finds its own rate: give it --learning_rate "
        "1; or Adafactor at the given rate, without momentum.",
        choices=tuple(OPTIMIZERS),
        rare=True,
    )
    optimizer_options: dict[str, Any] = option(
        {}, "Further arguments of the optimizer's class: betas=[0.9,0.99], eps=1e-6, ….", rare=True
    )
    weight_decay: NotNegative = option(0.0, "The optimizer's decoupled weight decay.", rare=True)
    max_grad_norm: Positive | None = option(
        1.0, "Largest norm of the gradients, which are clipped to it; none disables it.", rare=True
    )
    ema_decay: ShareBelow1 | None = option(
        None,
        "Measure, sample and save a moving average of the trained weights with this decay, by Diffusers' EMAModel: at "
        "most (1 + step) / (10 + step), .917 at step 100. none saves the last weights.",
        rare=True,
    )
    mixed_precision: str | None = option(
        None,
        "Precision of the forward; none means what `accelerate config` says. fp16 is refused under DeepSpeed.",
        choices=("no", "fp16", "bf16"),
    )


@dataclass
class MemoryArguments:
    """Memory"""

    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward: less memory, more time."
    )
    load_in_4bit: bool = option(
        False,
        "Round the frozen weights to 4 bits, NF4 with double quantisation, by bitsandbytes.",
        rare=True,
    )
    load_in_8bit: bool = option(
        False, "Round the frozen weights to 8 bits, by bitsandbytes.", rare=True
    )


@dataclass
class WindowArguments:
    """Window of noise levels (docs/strength.md)"""

    min_noise_level: Share | None = option(
        None,
        "Train only where the noise level λ, 1 at pure noise, is at least this; none is 0.",
        unit="λ",
        rare=True,
    )
    max_noise_level: Share | None = option(
        None,
        "Train only where λ is below this; none means 1, which is included.",
        unit="λ",
        rare=True,
    )


@dataclass
class RunArguments:
    """Run, checkpoints and reports"""

    output_dir: str | None = option(
        None,
        "Folder of everything that is written; none makes a fresh numbered one under outputs/.",
    )
    seed: NotNegativeInt = option(
        0, "Seed of the weights, the order of the data, masks and dropout."
    )
    plan: Positive | None = option(
        None,
        "Print the memory and FLOPs that this training needs, from its configurations only, and stop before it; with a "
        "size, such as --plan 24, also the cheapest flags that fit; docs/runs.md.",
        unit="GB",
        bare="inf",
    )
    logging_steps: Count = option(
        10, "Write to metrics.jsonl every so often.", unit="optimizer steps", rare=True
    )
    validation_steps: Interval | None = option(
        100,
        "Measure the validation loss every so often; below 1, a share of all steps; none never.",
        unit="optimizer steps",
    )
    checkpointing_steps: Count | None = option(
        500,
        "Write a checkpoint-N folder every so often, and at the end; none never.",
        unit="optimizer steps",
    )
    checkpoints_total_limit: Count | None = option(
        2, "Checkpoints to keep, oldest deleted first; none keeps all.", unit="folders", rare=True
    )
    resume_from_checkpoint: str | None = option(
        None,
        "Continue from this checkpoint-N, a folder or one of --output_dir; latest: the one there written last, or the "
        "start where there is none. A longer --max_train_steps and other data are allowed; docs/runs.md.",
    )
    report_to: list[str] | None = option(
        None,
        "Trackers beside metrics.jsonl: tensorboard, which [train] installs, wandb, or others of accelerate.",
        rare=True,
    )
    hub_model_id: str | None = option(
        None,
        "Repository on the Hub to upload the output folder to, without checkpoints; none uploads nothing.",
        rare=True,
    )


@dataclass
class TrainingArguments(
    AdapterArguments, OptimizationArguments, MemoryArguments, WindowArguments, RunArguments
):
    """The arguments that all training runs share."""

    pretrained_model_name_or_path: str = option("", "Folder or Hub id of the model to adapt.")

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.pretrained_model_name_or_path:
            raise ValueError("pretrained_model_name_or_path is empty: name the model to adapt.")
        if self.global_batch_size is not None and self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps} and global_batch_size "
                f"{self.global_batch_size}, which already determines it: give only one of the two."
            )
        if self.lr_scheduler == "constant" and self.lr_warmup_steps > 0:
            raise ValueError(
                f"lr_scheduler 'constant' has no warm-up, but lr_warmup_steps is {self.lr_warmup_steps:g}: use "
                "constant_with_warmup."
            )
        is_both = self.load_in_4bit and self.load_in_8bit
        if self.bits and (self.adapter == "full" or is_both):
            raise ValueError(
                "load_in_4bit and load_in_8bit quantise the weights that an adapter leaves frozen: "
                f"give one of them, and an adapter, not {self.adapter}."
            )

    @property
    def bits(self) -> int | None:
        """The bits of the frozen weights if they are quantised."""
        if self.load_in_4bit:
            return 4
        return 8 if self.load_in_8bit else None
