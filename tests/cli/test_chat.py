"""`nara chat` on the shipped model: turns, history, adapters, the terminal's view, and what is refused in one line."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from nara_diffusion.cli import chat as chat_module
from nara_diffusion.cli.chat import Chat
from nara_diffusion.cli.main import main
from nara_diffusion.dllm import encode_prompts, generate, load_backbone, prompt_text
from tests.helpers.adapted import disturb, nara_config

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "examples" / "assets" / "llada-tiny")
SHORT = ["--gen_length", "12"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def typed(monkeypatch: pytest.MonkeyPatch, text: str, *words: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    main(["chat", MODEL, *SHORT, *words])


@pytest.fixture(scope="module")
def shipped() -> Any:
    return load_backbone(MODEL)


def by_hand(shipped: Any, prompt: str, model: Any = None, **options: Any) -> str:
    """The answer to a prompt that is whole already, up to its first end token."""
    backbone, tokenizer = shipped
    ids = encode_prompts(tokenizer, [prompt])
    ends = [tokenizer.eos_token_id, tokenizer.get_vocab()["<|eot_id|>"]]
    out = generate(model or backbone, torch.tensor(ids), gen_length=12, eos_token_id=ends, **options)
    answer = out[0, len(ids[0]) :].tolist()
    end = next((i for i, token in enumerate(answer) if token in ends), len(answer))
    return tokenizer.decode(answer[:end], skip_special_tokens=True).strip()


def test_each_line_gets_an_answer_and_the_end_of_the_input_ends_it(shipped, monkeypatch, capsys):
    typed(monkeypatch, "upper: planet\n\n/clear\nreverse: planet")
    assert capsys.readouterr().out.splitlines() == ["PLANET", "tenalp"]
    assert by_hand(shipped, prompt_text(shipped[1], "upper: planet")) == "PLANET"


def test_the_conversation_is_part_of_the_prompt_and_clear_forgets_it(shipped):
    chat = Chat(*shipped, {"gen_length": 12, "steps": 6})
    first = chat.answer("copy: ab")
    second = chat.answer("copy: cd")
    turns = [("user", "copy: ab"), ("assistant", first), ("user", "copy: cd")]
    begin = "<|startoftext|>" + "".join(
        f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>" for role, text in turns
    )
    prompt = begin + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert second == by_hand(shipped, prompt, steps=6)
    assert [turn["content"] for turn in chat.turns] == ["copy: ab", first, "copy: cd", second]
    chat.clear()
    assert chat.answer("copy: ab") == first


def test_the_oldest_turns_are_left_out_where_there_is_no_room(shipped):
    chat = Chat(*shipped, {"gen_length": 12})
    chat.turns = [{"role": "user", "content": "copy: ab"}, {"role": "assistant", "content": "ab"}] * 5
    answer = chat.answer("upper: planet")
    kept = len(chat.turns) // 2
    assert 1 < kept < 6

    def length(turns: int) -> int:
        """Of the prompt with as many whole turns before the last one, and the answer, in tokens."""
        tokenizer = shipped[1]
        history = [*chat.turns[:2] * turns, {"role": "user", "content": "upper: planet"}]
        text = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 12

    assert length(kept - 1) <= 64 < length(kept)
    assert chat.turns[-2:] == [{"role": "user", "content": "upper: planet"}, {"role": "assistant", "content": answer}]


def test_a_terminal_sees_masks_being_filled_in_and_goes_on_after_an_error(monkeypatch):
    shown, errors = Terminal(), io.StringIO()
    lines = iter(["/help", "copy: " + 60 * "x", "upper: planet", "/exit", "never"])
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", errors)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    main(["chat", MODEL, *SHORT])
    assert next(lines) == "never"
    frames = shown.getvalue().split("\r\x1b[2K")
    counts = [frame.count("▒") for frame in frames]
    assert max(counts) >= 4
    assert counts == [0, *sorted(counts[1:], reverse=True)]
    assert frames[-1] == "PLANET\n"
    assert "unknown command /help: type /clear or /exit" in errors.getvalue()
    assert "the model has 64 positions" in errors.getvalue()


def test_an_adapter_answers_at_its_strength(shipped, monkeypatch, capsys, tmp_path):
    backbone, tokenizer = load_backbone(MODEL)
    model = get_peft_model(backbone, nara_config(target_modules=["q_proj", "down_proj"]))
    disturb(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.3
    model.save_pretrained(tmp_path)
    expected = by_hand(shipped, prompt_text(tokenizer, "upper: planet"), model)
    typed(monkeypatch, "upper: planet\n", "--adapter", str(tmp_path))
    assert capsys.readouterr().out.strip() == expected
    assert expected != "PLANET"
    typed(monkeypatch, "upper: planet\n", "--adapter", str(tmp_path), "--strength", "0")
    assert capsys.readouterr().out.strip() == "PLANET"


def test_flags_reach_the_sampler(monkeypatch):
    seen: dict[str, Any] = {}
    generated = chat_module.generate

    def spy(model: Any, ids: Any, **options: Any) -> Any:
        seen.update(options)
        return generated(model, ids, **options)

    monkeypatch.setattr(chat_module, "generate", spy)
    words = [
        "--steps",
        "6",
        "--block_length",
        "4",
        "--temperature",
        "0.5",
        "--cfg_scale",
        "0.7",
        "--remasking",
        "random",
    ]
    typed(monkeypatch, "upper: planet\n", *words, "--seed", "3")
    wanted = {
        "gen_length": 12,
        "steps": 6,
        "block_length": 4,
        "temperature": 0.5,
        "cfg_scale": 0.7,
        "remasking": "random",
    }
    assert {name: seen[name] for name in wanted} == wanted
    assert seen["generator"].initial_seed() == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "5", "--block_length", "4"], "error: steps is 5 and there are 3 blocks"),
        (["--block_length", "5"], "error: block_length 5 doesn't divide gen_length 12"),
        (["--strength", "0.5"], "error: --strength is for an adapter: give --adapter too"),
        (["--adapter", "/nowhere"], "error: "),
    ],
)
def test_bad_flags_end_in_one_line(monkeypatch, words, message):
    with pytest.raises(SystemExit) as ended:
        typed(monkeypatch, "upper: planet\n", *words)
    assert str(ended.value).startswith(message)
    assert "\n" not in str(ended.value).strip()


def test_a_system_message_that_the_template_refuses_ends_in_one_line(monkeypatch):
    model, tokenizer = load_backbone(MODEL)
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refusing + str(tokenizer.chat_template)
    monkeypatch.setattr(chat_module, "load_model", lambda *args, **options: (model, tokenizer))
    with pytest.raises(SystemExit, match=r"error: .*refuses the turns 'system', 'user' \(no system role\): leave out"):
        typed(monkeypatch, "reverse: planet\n", "--system", "Be kind")


def test_piped_commands_that_do_not_exist_end_in_one_line(monkeypatch):
    with pytest.raises(SystemExit, match="error: unknown command /quit: type /clear or /exit"):
        typed(monkeypatch, "/quit now\n")


def test_it_works_in_a_pipe():
    command = [sys.executable, "-c", "from nara_diffusion.cli.main import main; main()", "chat", MODEL, *SHORT]
    done = subprocess.run(
        command, input="upper: planet\n/exit\nreverse: planet\n", capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "PLANET\n"


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["chat", "--help"])
    text = capsys.readouterr().out
    assert "nara chat GSAI-ML/LLaDA-8B-Instruct --adapter" in text
    assert all(flag in text for flag in ("--gen_length", "--cfg_scale", "--strength", "--remasking"))


def test_an_interrupt_ends_the_answer_and_not_the_conversation(monkeypatch, capsys):
    asked = []

    def answer(self: Chat, text: str, show: Any = None) -> str:
        asked.append(text)
        if text == "stop me":
            raise KeyboardInterrupt
        return "done"

    monkeypatch.setattr(Chat, "answer", answer)
    typed(monkeypatch, "stop me\ngo on\n")
    assert asked == ["stop me", "go on"]
    assert capsys.readouterr().out == "\ndone\n"
