"""The maker of llada-tiny: its questions, its rows, and runs that stop and go on."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("reasoning_gym")

import make_llada_tiny
from make_llada_tiny import Arguments, main
from tiny_text import data, tasks
from tiny_text.backbones import build_llada
from tiny_text.checkpoint import save_llada_checkpoint
from tiny_text.tokenizer import build_tokenizer

from nara_diffusion.dllm import load_backbone


def small_run(directory: Path, **changes: object) -> Arguments:
    sizes = {"train_batch_size": 6, "train_size": 40, "validation_size": 2, "lr_warmup_steps": 2}
    return Arguments(output_dir=directory, **{**sizes, "validation_steps": 3, "checkpointing_steps": 2, **changes})


@pytest.mark.parametrize(
    ("family", "letters", "answer"),
    [
        ("copy", "planet", "planet"),
        ("upper", "planet", "PLANET"),
        ("shift", "plzaet", "qmabfu"),
        ("unshift", "planet", "okzmds"),
        ("reverse", "planet", "tenalp"),
        ("swap", "planets", "lpnates"),
        ("rotate", "planet", "lanetp"),
        ("sort", "planet", "aelnpt"),
        ("double", "sun", "sunsun"),
        ("palindrome", "sun", "sunnus"),
    ],
)
def test_letter_families(family: str, letters: str, answer: str) -> None:
    assert tasks.LETTER_FAMILIES[family](letters) == answer


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_questions_follow_from_the_seed_and_fit_a_row(family: str) -> None:
    first = tasks.questions(family, 50, seed=3)
    assert first == tasks.questions(family, 50, seed=3)
    assert first != tasks.questions(family, 50, seed=4)
    rows = data.encode(first, build_tokenizer())
    assert int(rows.ends.max()) + data.LONGEST_TAIL <= data.MAX_TOKENS


def test_gym_answers_answer_the_shortened_questions() -> None:
    for question, answer in tasks.questions("spell_backward", 20, seed=1):
        assert answer == question.removeprefix("spell backward: ")[::-1]
    for question, answer in tasks.questions("letter_counting", 20, seed=1):
        letter, word = question.removeprefix("count ").split(": ")
        assert int(answer) == word.lower().count(letter.lower())
    for question, answer in tasks.questions("number_sorting", 20, seed=1):
        direction, numbers = question.split(": ")
        assert answer.split() == sorted(numbers.split(), reverse=direction == "descending")


def test_a_row_is_prompt_answer_and_trained_padding() -> None:
    tokenizer = build_tokenizer()
    rows = data.encode([("copy: ab", "ab"), ("double: abcd", "abcdabcd")], tokenizer)
    input_ids, prompt_lengths = rows.batch(torch.tensor([0, 1]), tail=2)
    assert input_ids.shape == (2, int(rows.ends[1]) + 2)
    assert tokenizer.decode(input_ids[0, prompt_lengths[0] :]) == "ab<|eot_id|>" + "<|endoftext|>" * 10
    with pytest.raises(ValueError, match="a row holds 36: shorten it"):
        data.encode([("copy: " + "a" * 40, "a")], tokenizer)


def test_validation_questions_are_held_out() -> None:
    train, validation = data.training_and_validation(40, 5, seed=0)
    closed = {"chain_sum", "products"}
    held_out = {item for name, items in validation.items() if name not in closed for item in items}
    assert len(held_out) == 5 * (len(tasks.FAMILIES) - len(closed))
    assert held_out.isdisjoint(train)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    results = main(small_run(whole, max_train_steps=5, decay_share=0.6))
    train_step = make_llada_tiny.Run.train_step

    def stop_at_step_three(run: make_llada_tiny.Run, rows: data.Rows) -> float:
        if run.step == 3:
            raise KeyboardInterrupt
        return train_step(run, rows)

    with monkeypatch.context() as patch:
        patch.setattr(make_llada_tiny.Run, "train_step", stop_at_step_three)
        with pytest.raises(KeyboardInterrupt):
            main(small_run(stopped, max_train_steps=5, decay_share=0.6))
    with pytest.raises(ValueError, match="holds a run: add --resume"):
        main(small_run(stopped, max_train_steps=5, decay_share=0.6))
    with pytest.raises(ValueError, match="was written with another learning_rate"):
        main(small_run(stopped, max_train_steps=5, decay_share=0.6, learning_rate=1e-4, resume=True))
    resumed = main(small_run(stopped, max_train_steps=5, decay_share=0.6, resume=True))

    assert (whole / "model.safetensors").read_bytes() == (stopped / "model.safetensors").read_bytes()
    assert resumed["validation_loss"] == results["validation_loss"]
    assert set(results["exact_match"]) == set(tasks.FAMILIES)
    assert "| reverse | own |" in (whole / "README.md").read_text()


def test_resuming_needs_a_state(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="doesn't exist: start without --resume"):
        main(small_run(tmp_path, resume=True))


def test_a_checkpoint_loads_back_as_the_same_model(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    model = build_llada(len(tokenizer))
    save_llada_checkpoint(model, tokenizer, tmp_path)
    assert all(name.startswith("model.transformer.") for name in load_file(tmp_path / "model.safetensors"))
    loaded, _ = load_backbone(tmp_path)
    input_ids = torch.arange(24).reshape(2, 12)
    torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits, rtol=0, atol=0)
    assert loaded.config.mask_token_id == tokenizer.mask_token_id
