"""The arguments of dllm/train.py."""

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata, not a shared default)
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from nara_diffusion.training.adapters import check_adapter
from nara_diffusion.training.arguments import (
    CONFIGS,
    TrainingArguments,
    check_arguments,
    require,
    shipped_settings,
    window_of,
)
from nara_diffusion.training.command import option, spread_options

from .decoding import REMASKING, Sampling
from .masking import check_drawable

_COUNTS = (
    "max_length",
    "eval_batch_size",
    "gen_length",
    "curve_points",
    "validation_samples",
    "test_samples",
    "max_train_samples",
    "max_prompt_length",
)


@dataclass
class ModelArguments:
    """Model and data"""

    pretrained_model_name_or_path: str = option(
        "", "Folder or Hub id of the model to adapt; none runs the shipped one."
    )
    load_in_4bit: bool = option(
        False,
        "Round the frozen weights to 4 bits, NF4 with double quantisation, by bitsandbytes.",
        rare=True,
    )
    load_in_8bit: bool = option(
        False, "Round the frozen weights to 8 bits, by bitsandbytes.", rare=True
    )
    model_options: dict[str, Any] = option({}, "How the model is loaded and adapted:", rare=True)
    revision: str | None = option(None, "branch, tag or commit on the Hub", within="model_options")
    mask_token: str | None = option(
        None, "text of the mask token, if the checkpoint doesn't name it", within="model_options"
    )
    train_on_encoder: bool = option(
        True,
        "DiffusionGemma: adapt its encoder, too, by the adapter of its decoder",
        within="model_options",
    )
    encoder_loss_weight: float | None = option(
        None,
        "weight of its next-token loss; none takes 1 if it is adapted, else 0",
        within="model_options",
    )
    dataset_name: str | None = option(
        None, "Data set on the Hub, or NAME:SPLIT, instead of a file."
    )
    train_file: str | None = option(
        None, "File of records: JSON list, JSON Lines or CSV, gzip of one, or parquet."
    )
    max_train_samples: int | None = option(
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
    validation_samples: int | None = option(
        None,
        "Records held out of the training data if there is no file; none takes a tenth, at most 128.",
        unit="records",
        rare=True,
    )
    test_samples: int | None = option(
        None,
        "Number of test records to take from the start; none takes all.",
        unit="records",
        rare=True,
    )
    data_options: dict[str, Any] = option({}, "How the data are read:", rare=True)
    dataset_config_name: str | None = option(
        None, "configuration of data sets on the Hub", within="data_options"
    )
    messages_field: str | None = option(
        None, "field of a record with a conversation", within="data_options"
    )
    instruction_field: str | None = option(None, "field with the question", within="data_options")
    input_field: str | None = option(
        None, "field with its second part; records may lack it", within="data_options"
    )
    output_field: str | None = option(
        None, "field with what the model learns to write", within="data_options"
    )
    text_field: str | None = option(
        None, "field with a text that has no prompt", within="data_options"
    )
    answer_field: str | None = option(
        None, "field that a generation is compared with", within="data_options"
    )
    max_prompt_length: int | None = option(
        None, "tokens; records with longer prompts are left out", within="data_options"
    )
    max_length: int | None = option(
        None,
        "Length of prompt and answer together, without padding; longer answers are cut. None takes "
        "512, or the model's positions if it has fewer.",
        unit="tokens",
    )


@dataclass
class ObjectiveArguments:
    """Objective and evaluation"""

    trained_padding: str = option(
        "gen_length",
        "End tokens after an answer that are trained on: gen_length, up to the length of generated "
        "answers (DiffusionGemma: to the end of a canvas); longest, up to the longest sample of the "
        "global batch; or a number.",
        unit="tokens",
        rare=True,
    )
    complementary: bool = option(
        False, "Train on each sample twice, with complementary masks.", rare=True
    )
    eval_batch_size: int = option(16, "Samples of a forward in evaluation.", unit="samples")
    gen_length: int = option(128, "Length of a generated answer.", unit="tokens")
    generation_steps: int | None = option(
        None, "Denoising steps of an answer; none takes one for each token.", unit="steps"
    )
    block_length: int | None = option(
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
    evaluation_options: dict[str, Any] = option(
        {}, "How answers are generated and losses measured:", rare=True
    )
    temperature: float = option(
        0.0, "of sampling; 0 takes the likeliest token", within="evaluation_options"
    )
    cfg_scale: float = option(
        0.0, "classifier-free guidance; 0 disables it", within="evaluation_options"
    )
    top_p: float | None = option(
        None, "of sampling; none draws from all tokens", within="evaluation_options"
    )
    remasking: str = option(
        "low_confidence",
        "the order of placing tokens",
        choices=REMASKING,
        within="evaluation_options",
    )
    confidence_threshold: float | None = option(
        None, "instead of generation_steps", within="evaluation_options"
    )
    factor: float | None = option(None, "instead of generation_steps", within="evaluation_options")
    entropy_bound: float | None = option(
        None, "instead of generation_steps", within="evaluation_options"
    )
    logits_eos_inf: bool = option(False, "never predict the end token", within="evaluation_options")
    confidence_eos_eot_inf: bool = option(
        False, "place end tokens last", within="evaluation_options"
    )
    curve_points: int = option(
        10,
        "noise levels in the picture of the loss",
        unit="points",
        within="evaluation_options",
    )


@dataclass
class Arguments(ModelArguments, TrainingArguments, ObjectiveArguments):
    def __post_init__(self) -> None:
        spread_options(self)
        if not self.pretrained_model_name_or_path:
            raise ValueError("pretrained_model_name_or_path is empty: name the model to adapt.")
        check_arguments(self)
        check_adapter(self)
        check_drawable(window_of(self), self.complementary)
        require(self, "at least 1", lambda value: value >= 1, *_COUNTS)
        require(self, "0 or more", lambda value: value >= 0, "encoder_loss_weight")
        has_both = self.train_file is not None and self.dataset_name is not None
        has_none = self.train_file is None and self.dataset_name is None
        if has_both or (has_none and self.plan is None):
            got = "both" if has_both else "neither"
            raise ValueError(
                "training data come from train_file or from dataset_name: give one of them, "
                f"got {got}."
            )
        is_both = self.load_in_4bit and self.load_in_8bit
        if self.is_quantised and (self.adapter == "full" or is_both):
            raise ValueError(
                "load_in_4bit and load_in_8bit quantise the weights that an adapter leaves frozen: "
                f"give one of them, and an adapter, not {self.adapter}."
            )
        padding = self.trained_padding
        if padding not in ("gen_length", "longest") and not padding.isdecimal():
            raise ValueError(
                f"trained_padding is {padding!r}, expected gen_length, longest or a number."
            )

    @property
    def is_quantised(self) -> bool:
        """True if the frozen weights are loaded in 4 or 8 bits."""
        return self.load_in_4bit or self.load_in_8bit

    def sampling(self) -> Sampling:
        """Return the settings of generation."""
        settings: dict[str, Any] = {"steps": self.generation_steps}
        for field in fields(Sampling):
            if field.name != "steps":
                settings[field.name] = getattr(self, field.name)
        return Sampling(**settings)


def shipped_run(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the shipped run if no model is `given`.

    Its data are left out if other data are given.
    """
    if "pretrained_model_name_or_path" in given:
        return {}
    source = "dataset_name" if "dataset_name" in given else "train_file"
    return shipped_settings(
        CONFIGS / "llada_tiny.yaml",
        given,
        (source, "train_file", "validation_file", "test_file"),
        toy="a toy of 64 positions (5 of them a message, and one a letter)",
        shown="max_train_steps train_batch_size learning_rate gen_length checkpointing_steps",
        advice="LLaDA-8B add --pretrained_model_name_or_path GSAI-ML/LLaDA-8B-Instruct",
    )
