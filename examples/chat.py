"""Talk with a diffusion language model (LLaDA, Dream, DiffusionGemma, …) in the terminal, with or without an adapter.

    python examples/chat.py GSAI-ML/LLaDA-8B-Instruct --adapter my-answers --strength 0.8 --steps 64
    python examples/chat.py examples/assets/llada-tiny --adapter outputs/dllm-1 --system "Answer in a word."
    echo "reverse: planet" | python examples/chat.py examples/assets/llada-tiny --gen_length 12

Each line is a turn; the conversation so far is part of the prompt, without its oldest turns if it is longer than the
model's positions. A terminal shows how the masks (▒) of an answer are filled in. /clear starts a new conversation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel

from nara_diffusion import set_strength
from nara_diffusion.dllm import GenerationStep, encode_prompts, load_backbone, prompt_text, stop_token_ids
from nara_diffusion.dllm.decoding import CACHES
from nara_diffusion.dllm.models.backbone import Backbone
from nara_diffusion.dllm.prompt_places import check_canvas
from nara_diffusion.dllm.sampler import answer_prompts

Turns = list[dict[str, str]]
"""A conversation, {"role": …, "content": …} a turn."""


def readable(tokenizer: Any, tokens: torch.Tensor, masked: torch.Tensor) -> str:
    """The text of an answer (g,), with ▒ for each masked token."""
    text = ""
    for is_masked, run in groupby(zip(tokens.tolist(), masked.tolist(), strict=True), key=lambda pair: pair[1]):
        ids = [token for token, _ in run]
        text += "▒" * len(ids) if is_masked else tokenizer.decode(ids, skip_special_tokens=True)
    return text


def prompt_ids(tokenizer: Any, turns: Turns) -> list[int]:
    """The tokens of a conversation, or of its last question if the model has no chat template."""
    text = prompt_text(tokenizer, turns if tokenizer.chat_template else turns[-1]["content"])
    return encode_prompts(tokenizer, [text])[0]


def that_fit(model: Any, tokenizer: Any, turns: Turns, opening: int, gen_length: int) -> Turns:
    """The turns without the oldest questions and answers after the opening, so that an answer fits the model."""
    while len(turns) > opening + 1:
        try:
            check_canvas(model, len(prompt_ids(tokenizer, turns)), gen_length)
            break
        except ValueError:
            turns = turns[:opening] + turns[opening + 2 :]
    return turns


def answer(model: Any, tokenizer: Any, turns: Turns, **sampling: Any) -> str:
    """The model's answer to a conversation."""
    ids = prompt_ids(tokenizer, turns)

    def show(step: GenerationStep) -> None:
        text = readable(tokenizer, step.sequences[0, len(ids) :], step.masked[0]) if step.masked.any() else ""
        print(f"\r\x1b[2K{' '.join(text.split())[-79:]}", end="", flush=True)

    sampling |= {"eos_token_id": stop_token_ids(model, tokenizer), "chat": bool(tokenizer.chat_template)}
    if Backbone(model).traits.has_masks:
        sampling |= {"on_step_end": show if sys.stdout.isatty() else None}
    answers = answer_prompts(model, [ids], **sampling).answers  # (1, g)
    return tokenizer.decode(answers[0], skip_special_tokens=True).strip()


def of_run(adapter: str | None, name: str) -> int | None:
    """A setting of the run that made the adapter, if its folder has that run's config.yaml."""
    config = None if adapter is None else Path(adapter) / "config.yaml"
    return yaml.safe_load(config.read_text(encoding="utf-8")).get(name) if config and config.is_file() else None


def main(argv: Sequence[str] | None = None) -> None:
    """Answer each line of the standard input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or a repository on the Hub")
    parser.add_argument("--adapter", help="folder or repository of any adapter that PEFT loads")
    parser.add_argument("--strength", type=float, help="factor of the adapter's update (default: 1)")
    parser.add_argument("--system", help="a system message, for a chat template that knows it")
    parser.add_argument("--gen_length", type=int, help="tokens of an answer (default: as the adapter's run, or 128)")
    parser.add_argument("--steps", type=int, help="forwards of an answer (default: one for each token)")
    parser.add_argument("--block_length", type=int, help="tokens of a block (default: as in the model's own chat)")
    parser.add_argument("--cache", choices=CACHES, help="LLaDA and Dream: an approximate cache, with --block_length")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    args = parser.parse_args(argv)
    model, tokenizer = load_backbone(args.model, dtype="auto")
    if args.adapter is not None:
        model = PeftModel.from_pretrained(model, args.adapter)
        if args.strength is not None:
            set_strength(model, "default", args.strength)
    blocks = args.block_length or of_run(args.adapter, "block_length")
    if blocks and Backbone(model).traits.attends_by_blocks:  # LLaDA2's attention has the blocks of its training
        model.config.block_length = blocks
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()  # type: ignore[arg-type]
    sampling = {name: getattr(args, name) for name in ("steps", "block_length", "temperature", "cache")}
    positions = getattr(model.config, "max_position_embeddings", 512)
    default = max(getattr(model.config, "canvas_length", 0), min(128, positions // 4))
    sampling["gen_length"] = args.gen_length or of_run(args.adapter, "gen_length") or default
    opening = [] if args.system is None else [{"role": "system", "content": args.system}]
    turns = list(opening)
    for line in filter(None, map(str.strip, sys.stdin)):
        if line == "/clear":
            turns = list(opening)
            continue
        conversation = [*turns, {"role": "user", "content": line}]
        fitting = that_fit(model, tokenizer, conversation, len(opening), sampling["gen_length"])
        try:
            text = answer(model, tokenizer, fitting, **sampling)
        except ValueError as error:
            if turns == opening:
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)
            continue
        if len(fitting) < len(conversation):
            print("(the conversation is too long: its oldest turns were dropped)", file=sys.stderr, flush=True)
        print(text, flush=True)
        turns = [*fitting, {"role": "assistant", "content": text}]


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
