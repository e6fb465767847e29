"""--plan of text runs against the same counter on real runs, for each kind of model."""

from __future__ import annotations

import json

import pytest

from nara_diffusion.dllm import AnswerCollator
from nara_diffusion.dllm import train as text
from nara_flags.parser import parse_arguments
from tests.acceptance._runs import ASSETS, small_llada
from tests.helpers.mixtures import LLADA2, LLADA_MOE, write_checkpoint
from tests.helpers.plans import counted_run, planned, text_words

RECOMPUTED = ["--gradient_checkpointing", "--lora_dropout", "0.1"]
BF16 = ["--mixed_precision", "bf16"]
# PyTorch's kernel for experts in bf16 reads 16 bytes at a time
WIDE = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
RANDOM = {
    "LLaDA2": LLADA2 | WIDE | {"block_length": 6},
    "LLaDA-MoE": LLADA_MOE | {"hidden_size": 32, "expert_intermediate_size": 16},
}
SLOW = [
    ("small llada", "12", BF16),
    ("llada-tiny", "12", RECOMPUTED),
    ("LLaDA-MoE", "12", []),
    ("LLaDA2", "12", [*BF16, *RECOMPUTED]),
    ("gemma-tiny", "16", BF16),
    ("gemma-tiny", "16", [*RECOMPUTED, "--no_train_on_encoder"]),
]
RUNS = [("LLaDA2", "12", []), *(pytest.param(*run, marks=pytest.mark.slow) for run in SLOW)]


@pytest.mark.parametrize(("name", "generated", "flags"), RUNS)
def test_plan_is_what_the_run_holds(name, generated, flags, tmp_path, monkeypatch):
    """The plan gets the greatest lengths of the run's batches, and neither weights nor tokenizer."""
    folder = small_llada(tmp_path) if name == "small llada" else ASSETS / name
    if name in RANDOM:
        folder = tmp_path / "model"
        write_checkpoint(folder, RANDOM[name])
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((folder / "config.json").read_text())
    lines = []
    for n in range(12):
        question, answer = "a" * (20 - n % 3) + f" {n}", "bca"
        if name in RANDOM:
            # the answers to short questions begin in the first block
            question, answer = " ".join(["w7"] * (9 * (n % 3 > 0)) + [f"w{6 + n}"]), "w20 w21 w22 w20 w21"
        lines.append(json.dumps({"instruction": question, "output": answer}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    words = ["--train_batch_size", "8", "--gen_length", generated, *flags]
    words += ["--adapter_options", "core_hidden_dims=[8,7]"]
    words += ["--train_file", str(tmp_path / "data.jsonl"), "--validation_samples", "2", "--max_train_steps", "1"]
    words += ["--min_noise_level", "0.999", "--validation_steps", "none", "--checkpointing_steps", "none"]
    args = parse_arguments(text.Arguments, text_words(folder, "--output_dir", str(tmp_path / "out"), *words))
    widths, prompts = [], []
    collate = AnswerCollator.__call__

    def measured(self, rows):
        batch = collate(self, rows)
        widths.append(batch["input_ids"].shape[1])
        prompts.extend(int(n) for n in batch["prompt_lengths"])
        return batch

    monkeypatch.setattr(AnswerCollator, "__call__", measured)
    peak, states = counted_run(text, args, monkeypatch)
    lengths = ["--max_length", str(max(widths)), "--max_prompt_length", str(max(prompts))]
    figures = planned(text, [*text_words(tmp_path / "bare"), *words, *lengths])
    assert figures["activations"] == pytest.approx(peak, rel=0.01)
    assert figures["optimizer"] == states


@pytest.mark.slow
def test_suggested_flags_are_never_refused_by_the_run(capsys):
    """A mixture of experts isn't rounded."""
    words = [*text_words(ASSETS / "gemma-tiny"), "--gen_length", "16", "--train_batch_size", "1"]
    with pytest.raises(ValueError, match="4 stacked experts"):
        planned(text, [*words, "--load_in_4bit"])
    text.main(parse_arguments(text.Arguments, [*words, "--plan", "1e-6"]))
    assert "even with --gradient_checkpointing: 0.0 GB. Lower --max_length" in capsys.readouterr().out
