"""The base model and the data of a text run: records, held-out ones, rows of tokens, lengths.

Without a validation file, some records are held out of training. Rows of tokens that equal held-out
ones are removed from training, whether their records are copies or become equal only as tokens.
Validation and test files that the user gives aren't changed; the run warns if they repeat training
rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nara_diffusion.training.engines import check_whole, loading_in
from nara_diffusion.training.run import Run
from nara_diffusion.utils.quantised import prepare_quantised
from nara_diffusion.utils.repositories import local_folder
from nara_diffusion.utils.wording import counted

from .batches import AnswerCollator, with_longest
from .decoding import Sampling
from .encoding import EncodedRecords, encode_records
from .kinds import kind_of
from .kinds.text_kind import TextKind
from .models.backbone import Backbone
from .models.pretrained import load_backbone
from .prompt_places import check_canvas, check_positions, checked_lengths
from .record_forms import FIELDS, PAIR_FIELDS
from .records import column_batches, read_records, with_column
from .text_arguments import Arguments
from .tokenizer import end_token_id

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class TextBase:
    """A loaded base model.

    Attributes:
        sampling: the settings of generation, with the model's own values for some of them.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    kind: TextKind
    sampling: Sampling


def load_base(args: Arguments, run: Run[Arguments]) -> TextBase:
    """Load the base model, and record the digest of its files.

    Raises:
        ValueError: see `load_backbone`; or the model doesn't take an argument.
    """
    with loading_in(run.accelerator, run.weights_dtype):
        model, tokenizer = load_model(args, run.weights_dtype, run.accelerator.device)
    backbone = Backbone(model)
    kind = kind_of(backbone, args)
    if kind.whole_because:
        check_whole(run.accelerator, kind.whole_because)
    if args.bits:
        prepare_quantised(model)
    folder = local_folder(args.pretrained_model_name_or_path, revision=args.revision)
    run.record_base_digests({"": folder})
    is_chat = tokenizer.chat_template is not None
    return TextBase(model, tokenizer, kind, kind.sampling(backbone, args.sampling(), is_chat))


def load_model(
    args: Arguments, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and the tokenizer that the arguments name.

    Args:
        device: the device of quantised weights, which can't be moved later. transformers would take
            a GPU even in a run on the CPU.
    """
    names = ("mask_token", "load_in_4bit", "load_in_8bit", "revision")
    options = {name: value for name, value in vars(args).items() if name in names and value}
    if args.bits:
        options["device_map"] = {"": str(device)}
    model, tokenizer = load_backbone(args.pretrained_model_name_or_path, dtype=dtype, **options)
    model.config.update(kind_of(Backbone(model)).changed_fields(args))
    return model, tokenizer


logger = logging.getLogger(__name__)


_MOST_HELD_OUT = 128  # records; the default is to hold out a tenth, but not more than this


def hold_out(records: Dataset, number: int | None, seed: int) -> tuple[Dataset, Dataset]:
    """Return (training, validation) records.

    Args:
        number: the number of records to hold out. None holds out a tenth, 128 at most.

    Raises:
        ValueError: more records would be held out than left for training.
    """
    held_out = number or max(1, min(_MOST_HELD_OUT, len(records) // 10))
    left = len(records) - held_out
    if left < held_out:
        remedy = "lower validation_samples, or " if len(records) > 1 else ""
        raise ValueError(
            f"training records: {len(records)}. {held_out} can't be spared for validation, "
            f"since that leaves {max(left, 0)}: {remedy}give a validation_file"
        )
    parts = records.train_test_split(test_size=held_out, seed=seed)
    return parts["train"], parts["test"]


def without_held_out(training: EncodedRecords, held_out: EncodedRecords) -> EncodedRecords:
    """Return `training` without the rows that are also in `held_out`.

    Raises:
        ValueError: fewer than half of the rows are left.
    """
    held_out_keys = set(_row_keys(held_out.rows))
    places = [i for i, key in enumerate(_row_keys(training.rows)) if key not in held_out_keys]
    size = len(training.rows)
    if len(places) == size:
        return training
    dropped = size - len(places)
    if 2 * dropped > size:
        raise ValueError(
            f"training data: {dropped} of {counted(size, 'row')} of tokens equal held-out ones: "
            "remove the copies and give --num_train_epochs, give more varied records, or a "
            "validation_file"
        )
    logger.warning(
        "training data: %d of %d rows equal held-out ones and are left out", dropped, size
    )
    return replace(training, rows=training.rows.select(places))


def rows_in_training(training: Dataset, **measured: Dataset) -> list[str]:
    """Return a warning for each of the `measured` data sets that repeats rows of `training`."""
    trained = set(_row_keys(training))
    repeated = {name: sum(key in trained for key in _row_keys(measured[name])) for name in measured}
    return [
        f"{number} of {counted(len(measured[name]), f'{name} row')} are training rows too: figures "
        "on them don't show what the model does with new records."
        for name, number in repeated.items()
        if number
    ]


def _row_keys(rows: Dataset) -> Iterator[bytes]:
    """Yield a digest of each row, made from its tokens and the start of its answer."""
    for table in column_batches(rows, ("input_ids", "prompt_length")):
        ids = table["input_ids"].combine_chunks()
        ends = ids.value_lengths().to_numpy().cumsum()
        tokens = np.split(ids.flatten().to_numpy(), ends[:-1])
        for start, of_row in zip(table["prompt_length"].to_pylist(), tokens, strict=True):
            yield sha256(f"{start} ".encode() + of_row.tobytes()).digest()


class TextRecords(NamedTuple):
    """The records of a run; `test` is `validation` if no others were given."""

    training: Dataset
    validation: Dataset
    test: Dataset


def load_records(args: Arguments) -> TextRecords:
    """Return the records that a run's arguments name.

    Raises:
        ValueError: see `read_records` and `hold_out`.
    """
    given = {part: getattr(args, f"{part}_field") for part in FIELDS}
    fields = {part: name for part, name in given.items() if name is not None}
    if args.objective == "dpo":
        fields = PAIR_FIELDS | fields
    config, source = args.dataset_config_name, args.dataset_name or args.train_file
    assert source is not None  # the arguments' own check
    records = read_records(source, fields, config=config, limit=args.max_train_samples)
    records = with_column(records, "number", range(len(records)))
    if args.validation_file is None:
        records, validation = hold_out(records, args.validation_samples, args.seed)
        validation.info.description += ", held out of the training data"
    else:
        validation = read_records(args.validation_file, fields, config=config)
    test = validation
    if args.test_file is not None:
        test = read_records(args.test_file, fields, config=config)
    if args.test_samples is not None:
        test = test.select(range(min(len(test), args.test_samples)))
    if "turns" in records.column_names:
        records.info.description += f", train_on {args.train_on}"
    return TextRecords(records, validation, test)


@dataclass(frozen=True)
class TextData:
    """The rows of a run, and the lengths that they need.

    Attributes:
        validation_rows: the rows of `validation`, with "longest" for the collator.
        padded: the number of tokens of the longest sample with its trained padding.
        canvases: the part of the data whose longest prompt becomes the longest canvas.
        warnings: warnings about rows that are both trained on and measured.
    """

    training: EncodedRecords
    validation: EncodedRecords
    test: EncodedRecords
    validation_rows: Dataset
    collator: AnswerCollator
    padded: int
    canvases: EncodedRecords
    gen_length: int
    warnings: list[str]

    def check_positions(self, model: nn.Module) -> None:
        """Raise ValueError if `model` has too few positions for the samples or a canvas.

        An adapter may take some positions.
        """
        prompt, record = self.canvases.longest_prompt, self.canvases.longest_prompt_in
        check_canvas(model, prompt, self.gen_length, record)
        samples = f"samples have up to {self.padded} tokens"
        check_positions(model, self.padded, samples, "lower --max_length")


def encode_data(
    args: Arguments, run: Run[Arguments], base: TextBase, records: TextRecords
) -> TextData:
    """Turn records into rows, and record their digests.

    Raises:
        ValueError: see `encode_records`.
    """
    encode = partial(
        encode_records,
        tokenizer=base.tokenizer,
        max_length=checked_lengths(base.model, args.max_length, args.gen_length),
        max_prompt_length=args.max_prompt_length,
        train_on=args.train_on,
    )
    with run.accelerator.main_process_first():
        training = encode(records.training, name="training data")
        validation = test = encode(records.validation, name="validation data")
        if records.test is not records.validation:
            test = encode(records.test, name="test data")
    if args.validation_file is None:
        training = without_held_out(training, validation)
    run.record_data_digest("training data", [training.digest()])
    run.record_data_digest("validation data", [validation.digest()])
    measured = {"validation": validation.rows}
    if test is not validation:
        measured["test"] = test.rows
    collator = base.kind.collator(Backbone(base.model), args, end_token_id(base.tokenizer))
    parts = (training, validation, test)
    longest = max(part.longest for part in parts)
    padded = collator.padded_length(longest, max(part.longest_prompt for part in parts), longest)
    # training makes each prompt a canvas if it pads as far as generation does
    generated = parts if args.trained_padding == "gen_length" else (test,)
    return TextData(
        training,
        validation,
        test,
        validation_rows=with_longest(validation.rows, args.train_batch_size, args.group_by_length),
        collator=collator,
        padded=padded,
        canvases=max(generated, key=lambda part: part.longest_prompt),
        gen_length=args.gen_length,
        warnings=rows_in_training(training.rows, **measured),
    )
