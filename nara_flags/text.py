"""The flags of train_scripts/dllm.py, in groups, with the checks that need only their values."""

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata, not a shared default)
from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .options import Count, NotNegative, Positive, Range, defaults_of, option
from .training import TrainingArguments

REMASKING = ("low_confidence", "random", "maskgit_plus", "topk_margin", "entropy")
"""The orders of placing tokens, those of `nara_diffusion.dllm.decoding`."""
TopP = Annotated[float, Range("above 0 and at most 1", lambda value: 0 < value <= 1)]


@dataclass
class ModelArguments:
    """Model"""

    pretrained_model_name_or_path: str = option(
        "", "Folder or Hub id of the model to adapt; none runs the shipped one."
    )
    revision: str | None = option(None, "Branch, tag or commit of the model on the Hub.", rare=True)
    mask_token: str | None = option(
        None, "Text of the mask token, if the checkpoint doesn't name it.", rare=True
    )
    train_on_encoder: bool = option(
        True,
        "DiffusionGemma: adapt its encoder, too, by the adapter of its decoder.",
        rare=True,
    )
    encoder_loss_weight: NotNegative | None = option(
        None,
        "DiffusionGemma: weight of the encoder's next-token loss; none takes 1 if it is adapted, else 0.",
        rare=True,
    )
    encoder_loss_on: str = option(
        "answer",
        "DiffusionGemma: tokens of that loss: of the answer, or of the text, prompt included.",
        choices=("answer", "text"),
        rare=True,
    )


@dataclass
class DataArguments:
    """Data"""

    dataset_name: str | None = option(
        None, "Data set on the Hub, or NAME:SPLIT, instead of a file."
    )
    train_file: str | None = option(
        None, "File of records: JSON list, JSON Lines or CSV, gzip of one, parquet; or a folder."
    )
    max_train_samples: Count | None = option(
        None, "Number of training records to take from the start; none takes all.", unit="records"
    )
    train_on: str = option(
        "last",
        "Answers of a conversation to train on: the last; or all, and each pass draws one of them.",
        choices=("last", "all"),
    )
    validation_file: str | None = option(
        None, "Records for the validation loss; none holds out --validation_samples."
    )
    test_file: str | None = option(
        None, "Records for exact match, before and after; none takes the validation ones."
    )
    validation_samples: Count | None = option(
        None,
        "Records held out of the training data if there is no file; none takes a tenth, at most 128.",
        unit="records",
        rare=True,
    )
    test_samples: Count | None = option(
        None,
        "Number of test records to take from the start; none takes all.",
        unit="records",
        rare=True,
    )
    dataset_config_name: str | None = option(
        None, "Configuration of data sets on the Hub.", rare=True
    )
    messages_field: str | None = option(
        None, "Field of a record with a conversation; none finds the usual names.", rare=True
    )
    instruction_field: str | None = option(None, "Field with the question.", rare=True)
    input_field: str | None = option(
        None, "Field with the question's second part; records may lack it.", rare=True
    )
    output_field: str | None = option(None, "Field with what the model learns to write.", rare=True)
    text_field: str | None = option(None, "Field with a text that has no prompt.", rare=True)
    answer_field: str | None = option(None, "Field that a generation is compared with.", rare=True)
    max_prompt_length: Count | None = option(
        None,
        "Records with longer prompts are left out; none keeps all that fit.",
        unit="tokens",
        rare=True,
    )
    max_length: Count | None = option(
        None,
        "Length of prompt and answer together, without padding; longer answers are cut. None takes "
        "512, or the model's positions if it has fewer.",
        unit="tokens",
    )
    group_by_length: bool = option(
        True,
        "Form global batches of samples of similar lengths, in random order, so that forwards have little padding.",
        rare=True,
    )


@dataclass
class ObjectiveArguments:
    """Objective"""

    trained_padding: str = option(
        "gen_length",
        "End tokens after an answer that are trained on: gen_length, up to the length of generated "
        "answers (DiffusionGemma: to the end of a canvas); longest, up to the longest of the "
        "--train_batch_size samples of a forward, hence few with --group_by_length and none at 1; or a number.",
        unit="tokens",
        rare=True,
    )
    objective: str = option(
        "llada",
        "Weights of masked tokens: llada, 1 / noise level, for levels up to 1; or for LLaDA2 dfactory, equal "
        "weights, for one level from 0.3 to 0.8 in all blocks of an answer. Or dpo: preferences, from pairs.",
        choices=("llada", "dfactory", "dpo"),
        rare=True,
    )
    dpo_beta: Positive = option(
        0.1, "For dpo: weight of the difference of log-likelihood ratios, in 1 / nats.", rare=True
    )
    dpo_draws: Count = option(
        8,
        "For dpo: masks of each answer; a forward has 2 x draws x --train_batch_size rows.",
        unit="masks",
        rare=True,
    )
    complementary: bool = option(
        False, "Train on each sample twice, with complementary masks.", rare=True
    )


@dataclass
class EvaluationArguments:
    """Evaluation"""

    eval_batch_size: Count = option(16, "Samples of a forward in evaluation.", unit="samples")
    gen_length: Count = option(128, "Length of a generated answer.", unit="tokens")
    generation_steps: Count | None = option(
        None, "Denoising steps of an answer; none takes one for each token.", unit="steps"
    )
    block_length: Count | None = option(
        None,
        "Length of a block, which is finished before the next one starts; none takes that of the "
        "model's own chat (LLaDA: 32) if the tokenizer has a chat template and it divides gen_length, "
        "else one block.",
        unit="tokens",
    )
    extract: str = option(
        "text",
        "What is compared: text, the last number, choice.",
        choices=("text", "number", "choice"),
    )
    temperature: NotNegative = option(
        0.0, "Temperature of sampling; 0 takes the likeliest token.", rare=True
    )
    cfg_scale: NotNegative = option(
        0.0, "Scale of classifier-free guidance; 0 disables it.", rare=True
    )
    top_p: TopP | None = option(
        None,
        "Total probability of the likeliest tokens to draw from; none draws from all.",
        rare=True,
    )
    remasking: str = option(
        "low_confidence",
        "What decides which tokens are placed first.",
        choices=REMASKING,
        rare=True,
    )
    confidence_threshold: float | None = option(
        None,
        "Place all tokens of at least this probability, in place of --generation_steps.",
        unit="probability",
        rare=True,
    )
    factor: float | None = option(
        None,
        "Place n tokens if (n + 1) (1 - probability of the n-th) is below this, in place of --generation_steps.",
        rare=True,
    )
    entropy_bound: float | None = option(
        None,
        "Place the surest tokens while their entropies add up to at most this, in place of --generation_steps.",
        unit="nats",
        rare=True,
    )
    logits_eos_inf: bool = option(False, "Never predict the end token.", rare=True)
    confidence_eos_eot_inf: bool = option(False, "Place end tokens last.", rare=True)
    cache: str | None = option(
        None,
        "Approximate cache of LLaDA and Dream, with --block_length: prefix, or dual (the fastest).",
        choices=("prefix", "dual"),
        rare=True,
    )
    curve_points: Count = option(
        10,
        "Noise levels in the picture of the loss.",
        unit="points",
        rare=True,
    )


@dataclass
class TextFlags(
    ModelArguments, DataArguments, TrainingArguments, ObjectiveArguments, EvaluationArguments
):
    """Fine-tune a masked-diffusion language model (LLaDA, Dream, …) with NaRA or another adapter.

    The shipped model and task, offline, on CPU, in minutes:
        accelerate launch train_scripts/dllm.py
    LLaDA-8B on all GPUs of the machine (--num_processes N: on N of them):
        accelerate launch train_scripts/dllm.py --config
        train_scripts/configs/llada_instruct_math14k.yaml

    If the package is installed without a clone: accelerate launch -m nara_diffusion.dllm.train.
    --adapter lora, dora, …, full trains with another method. --init_adapter starts from a LoRA or NaRA.
    --min_noise_level and --max_noise_level train a part of the noise levels (docs/strength.md).

    The model is measured before and after. The output folder has the adapter in PEFT's format (a model
    folder for --adapter full), README.md (the model card, which says how to load it), config.yaml,
    results.json, metrics.jsonl, noise_level_curve.png, samples.jsonl, and checkpoint-N to resume from.

    The shipped model has its own settings: train_scripts/configs/llada_tiny.yaml.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        has_both = self.train_file is not None and self.dataset_name is not None
        has_none = self.train_file is None and self.dataset_name is None
        if has_both or (has_none and self.plan is None):
            got = "both" if has_both else "neither"
            raise ValueError(
                "training data come from either train_file or dataset_name: give exactly one, "
                f"not {got}."
            )
        padding = self.trained_padding
        if padding not in ("gen_length", "longest") and not padding.isdecimal():
            raise ValueError(
                f"trained_padding is {padding!r}, expected gen_length, longest or a number."
            )
        if self.objective == "dpo":
            self._check_preferences()

    def _check_preferences(self) -> None:
        if self.adapter == "full":
            raise ValueError(
                "adapter is full, and the reference of objective dpo is the base without the "
                "adapter: give nara, lora or another adapter."
            )
        if self.init_adapter is not None:
            raise ValueError(
                f"init_adapter is {self.init_adapter!r}, and the reference of objective dpo is the base without "
                "an adapter: merge a LoRA into the base first, and leave init_adapter out."
            )
        defaults = defaults_of(self)
        for name in ("complementary", "train_on", "min_noise_level", "max_noise_level"):
            value = getattr(self, name)
            if value != defaults[name]:
                raise ValueError(
                    f"{name} is {value}, and objective dpo has no such choice: leave it out."
                )
