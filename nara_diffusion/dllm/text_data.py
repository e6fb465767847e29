"""The data of a text run: its records, their rows of tokens, and the lengths of its texts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from nara_diffusion.training.run import Run

from .batches import AnswerCollator, with_longest
from .encoding import EncodedRecords, encode_records
from .held_out import hold_out, rows_in_training, without_held_out
from .models.backbone import Backbone
from .record_forms import FIELDS, PAIR_FIELDS
from .records import read_records, with_column
from .text_arguments import Arguments
from .text_base import TextBase
from .text_lengths import check_canvas, check_positions, checked_lengths
from .tokenizer import end_token_id

if TYPE_CHECKING:
    from datasets import Dataset


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
    fields: dict[str, str] = {}
    for part in FIELDS:
        name = getattr(args, f"{part}_field")
        if name is not None:
            fields[part] = name
    if args.objective == "dpo":
        fields = PAIR_FIELDS | fields
    config, source = args.dataset_config_name, args.dataset_name or args.train_file
    assert source is not None  # the arguments' own check
    records = read_records(source, fields, config=config, limit=args.max_train_samples)
    records = with_column(records, "number", range(len(records)))
    if args.validation_file is None:
        records, validation = hold_out(records, args.validation_samples, args.seed)
    else:
        validation = read_records(args.validation_file, fields, config=config)
    test = validation
    if args.test_file is not None:
        test = read_records(args.test_file, fields, config=config)
    if args.test_samples is not None:
        test = test.select(range(min(len(test), args.test_samples)))
    return TextRecords(records, validation, test)


@dataclass(frozen=True)
class TextData:
    """The rows of a run, and the lengths that they need.

    Attributes:
        validation_rows: the rows of `validation`, with "longest" for the collator.
        descriptions: what the training data and the validation data are, for the report.
        padded: the number of tokens of the longest sample with its trained padding.
        canvases: the part of the data whose longest prompt becomes the longest canvas.
        warnings: warnings about rows that are both trained on and measured.
    """

    training: EncodedRecords
    validation: EncodedRecords
    test: EncodedRecords
    validation_rows: Dataset
    descriptions: tuple[str, str]
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
        descriptions=_descriptions(args, records),
        collator=collator,
        padded=padded,
        canvases=max(generated, key=lambda part: part.longest_prompt),
        gen_length=args.gen_length,
        warnings=rows_in_training(training.rows, **measured),
    )


def _descriptions(args: Arguments, records: TextRecords) -> tuple[str, str]:
    training = records.training.info.description
    validation = records.validation.info.description
    if "turns" in records.training.column_names:
        training = f"{training}, train_on {args.train_on}"
    if not args.validation_file:
        validation = f"{validation}, held out of the training data"
    return training, validation
