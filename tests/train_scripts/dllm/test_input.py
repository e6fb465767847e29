"""Bad input: a clear message, and nothing half-written."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from nara_diffusion.training.oom import OutOfMemory
from tests.train_scripts.conftest import copy_tokenizer, shipped_config
from train_scripts.dllm import Arguments, main


def refused(args: Arguments, message: str, error: type[Exception] = ValueError) -> None:
    """`main` raises `message` and leaves no output folder."""
    with pytest.raises(error, match=message):
        main(args)
    assert not Path(args.output_dir).exists()


GOOD = '{"instruction": "upper: ab", "output": "AB", "answer": "AB"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"there is no file .*train.jsonl"),
        ("", r"train.jsonl is empty"),
        (GOOD + GOOD + '{"instruction": "upper: cd", "outp\n', r"train.jsonl breaks at line 3"),
        (f"[{GOOD.strip()},\n {GOOD.strip()},\n {{]", r"train.jsonl breaks at line 3"),
        (
            GOOD + '{"instruction": "upper: ab", "answer": "AB"}\n',
            r"record 2 of .*: its output, field 'output', is missing",
        ),
        (
            GOOD + '{"instruction": "upper: ab", "output": "AB"}\n',
            r"record 2 of .*: its answer, field 'answer', is missing",
        ),
        (GOOD + '{"instruction": "", "output": "AB", "answer": "AB"}\n', r"its instruction, .* is empty"),
    ],
)
def test_bad_data_files(arguments, tmp_path, content: str | None, message: str) -> None:
    file = tmp_path / "train.jsonl"
    if content is not None:
        file.write_text(content)
    refused(arguments(train_file=str(file)), message)


def test_too_few_records_to_hold_some_out(arguments) -> None:
    refused(
        arguments(validation_file=None, validation_samples=11), r"11 training records can't spare 11 for validation"
    )


def test_cut_answers_are_counted(arguments, caplog) -> None:
    with caplog.at_level(logging.INFO):
        main(arguments(max_length=20, max_train_steps=1))
    kept = [record for record in caplog.messages if record.startswith("11 records: ")]
    assert kept
    assert "0 of them cut, 0 dropped" not in kept[0]


def test_nothing_left_after_cutting(arguments) -> None:
    refused(arguments(max_length=5), r"none of 11 records is left: their prompts alone have 5 tokens \(max_length\)")


@pytest.fixture
def bert_folder(tmp_path_factory) -> Path:
    """A BERT of random weights with 48 positions, and the shipped tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = BertConfig(vocab_size=shipped_config()["vocab_size"], **sizes, max_position_embeddings=48)
    BertForMaskedLM(config).save_pretrained(folder)
    copy_tokenizer(folder)
    return folder


def test_main_with_max_length_beyond_learned_positions_is_refused(arguments, bert_folder) -> None:
    bert = {"pretrained_model_name_or_path": str(bert_folder), "max_train_steps": 1}
    message = r"max_length is 49, and the model has a table of 48 positions.*--max_length 48"
    refused(arguments(**bert, max_length=49, trained_padding="max_length"), message)
    assert main(arguments(**bert, max_length=48, trained_padding="max_length"))["n"] == 5


def test_main_with_another_head_in_the_checkpoint_trains_when_it_is_ignored(arguments, bert_folder, tmp_path) -> None:
    file = bert_folder / "model.safetensors"
    save_file(load_file(file) | {"classifier.weight": torch.ones(2, 24)}, file, metadata={"format": "pt"})
    bert = {"pretrained_model_name_or_path": str(bert_folder), "max_train_steps": 1}
    refused(arguments(**bert), "--ignore_tensors classifier of train_scripts/dllm.py")
    assert main(arguments(**bert, ignore_tensors=["classifier"]))["n"] == 5
    assert "ignore_tensors=['classifier'])" in (tmp_path / "run" / "README.md").read_text()


def test_main_with_samples_beyond_rotary_positions_warns(arguments, llada_folder, tmp_path, caplog) -> None:
    folder = tmp_path / "short"
    shutil.copytree(llada_folder, folder)
    fields = json.loads((folder / "config.json").read_text()) | {"max_sequence_length": 46}
    (folder / "config.json").write_text(json.dumps(fields))
    changes = {"pretrained_model_name_or_path": str(folder), "max_train_steps": 1}
    main(arguments(**changes, max_length=64))
    assert [message for message in caplog.messages if "positions" in message] == []
    main(arguments(**changes, max_length=64, trained_padding="max_length", output_dir=str(tmp_path / "padded")))
    (message,) = [message for message in caplog.messages if "positions" in message]
    assert "samples have up to 64 tokens, and the model knows 46 positions" in message


def test_target_modules_that_match_nothing(arguments) -> None:
    refused(arguments(target_modules=["attn_out"]), r"target_modules attn_out match no module.*o_proj, q_proj")


def test_a_model_without_mask_token(arguments, llada_folder, tmp_path) -> None:
    folder = tmp_path / "maskless"
    shutil.copytree(llada_folder, folder)
    for name in ("config.json", "tokenizer_config.json"):
        fields = json.loads((folder / name).read_text())
        fields.pop("mask_token_id", None)
        fields.pop("mask_token", None)
        (folder / name).write_text(json.dumps(fields))
    refused(arguments(pretrained_model_name_or_path=str(folder)), r"names a mask token.*mask_token=")
    args = arguments(pretrained_model_name_or_path=str(folder), mask_token="<|mdm_mask|>", max_train_steps=1)
    assert main(args)["n"] == 5


def test_a_folder_with_another_run(arguments) -> None:
    args = arguments(max_train_steps=1)
    main(args)
    before = (Path(args.output_dir) / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"already holds another run or other files \(README.md"):
        main(args)
    assert (Path(args.output_dir) / "adapter_model.safetensors").read_bytes() == before


def test_resuming_another_configuration(arguments) -> None:
    args = arguments(max_train_steps=1, checkpointing_steps=1)
    main(args)
    with pytest.raises(ValueError, match=r"another configuration \(rank: 3 there, 4 now\)"):
        main(arguments(max_train_steps=1, rank=4, resume_from_checkpoint="latest"))


def test_a_corrupt_checkpoint(arguments) -> None:
    args = arguments(max_train_steps=1, checkpointing_steps=1)
    main(args)
    weights = Path(args.output_dir) / "checkpoint-1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"checkpoint-1/adapter_model.safetensors is corrupt"):
        main(arguments(max_train_steps=1, resume_from_checkpoint="latest"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": "org/data"}, "from train_file or from dataset_name: give one of them, got both"),
        ({"train_file": None}, "from train_file or from dataset_name: give one of them, got neither"),
        ({"pretrained_model_name_or_path": ""}, "pretrained_model_name_or_path must be given"),
        (
            {"trained_padding": "shortest"},
            "trained_padding is 'shortest', expected gen_length, longest, max_length or a number",
        ),
        ({"validation_samples": 0}, "validation_samples must be at least 1, or none, got 0"),
        ({"test_samples": 0}, "test_samples must be at least 1, or none, got 0"),
        ({"curve_points": 0}, "curve_points must be at least 1, got 0"),
        ({"gen_length": 0}, "gen_length must be at least 1, got 0"),
    ],
)
def test_impossible_arguments(arguments, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(**changes)


def test_choices_of_the_adapter_are_refused_before_anything_is_loaded(arguments, tmp_path) -> None:
    refused(arguments(core_scale=-1.0, pretrained_model_name_or_path=str(tmp_path / "nothing")), "core_scale is -1.0")


def test_impossible_generation_settings_are_refused_before_training(arguments) -> None:
    refused(arguments(gen_length=10, block_length=4), "block_length")


def test_a_prompt_that_is_too_long_for_sampling_is_found_before_training(arguments, tmp_path) -> None:
    record = {"instruction": "upper: ab", "output": "AB", "answer": "AB"}
    long = {**record, "instruction": "upper: " + "ab" * 500}
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps(record) + "\n" + json.dumps(long) + "\n")
    refused(arguments(test_file=str(file), max_length=1024, gen_length=16), "the longest prompt has .* 1024 positions")


def test_other_data_in_the_same_file_are_not_resumed(arguments, data, tmp_path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(Path(data["train_file"]).read_text())
    main(arguments(train_file=str(file), max_train_steps=1, checkpointing_steps=1))
    file.write_text(file.read_text().replace("upper", "UPPER", 1))
    with pytest.raises(ValueError, match="checkpoint-1 belongs to a run with other training data"):
        main(arguments(train_file=str(file), max_train_steps=1, resume_from_checkpoint="latest"))


def test_fp16_without_a_gpu(arguments) -> None:
    refused(arguments(mixed_precision="fp16"), "mixed_precision fp16 needs a GPU")


def test_out_of_memory_says_what_to_turn_on(arguments, monkeypatch) -> None:
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("train_scripts.dllm.masked_diffusion_loss", full)
    with pytest.raises(OutOfMemory, match=r"--mixed_precision bf16; --gradient_checkpointing; --train_batch_size 1"):
        main(arguments())
