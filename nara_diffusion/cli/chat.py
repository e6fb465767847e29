"""Chat with a masked-diffusion language model (LLaDA, Dream, …) in the terminal.

    nara chat GSAI-ML/LLaDA-8B-Instruct
    nara chat GSAI-ML/LLaDA-8B-Instruct --adapter outputs/dllm-1 --strength 0.8
    nara chat MODEL --gen_length 256 --steps 64 --block_length 32 --temperature 0.7 --seed 1
    echo "reverse: planet" | nara chat examples/assets/llada-tiny --gen_length 12

Each line is a turn. An answer begins as masks (▒), which are filled in step by step, most confident tokens first; fewer
--steps fill in more tokens at once. The conversation so far is part of the prompt, by the tokenizer's chat template;
the oldest turns are left out if the model has no positions for them. /clear starts a new conversation, Ctrl-C stops the
answer, /exit or the end of the input ends the program. Piped, it writes the answers alone. --adapter takes any adapter
that PEFT loads; a NaRA is told λ, the masked share of the answer, at each step.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from nara_diffusion.dllm import Generation, GenerationStep, generate, stop_token_ids
from nara_diffusion.dllm.evaluation.exact_match import decode_answer
from nara_diffusion.dllm.models.positions import position_limit
from nara_diffusion.dllm.sampler_config import REMASKING, Sampling
from nara_diffusion.harness.loading import load_model
from nara_diffusion.harness.prompts import encode, templated
from nara_diffusion.tuner.strength.set_strength import set_strength

from .errors import in_one_line

MASK = "▒"
Turn = dict[str, str]


class Chat:
    """A conversation with one model.

    Args:
        model: a masked language model in evaluation mode. tokenizer: the model's.
        sampling: arguments of `generate`, gen_length among them. system: the system message, or None.
    """

    def __init__(self, model: Any, tokenizer: Any, sampling: dict[str, Any], system: str | None = None) -> None:
        self.model, self.tokenizer, self.sampling, self.system = model, tokenizer, sampling, system
        self.ends = stop_token_ids(model, tokenizer)
        self.turns: list[Turn] = []

    def clear(self) -> None:
        """Forget all turns."""
        self.turns = []

    def answer(self, text: str, show: Callable[[str], None] | None = None) -> str:
        """The model's answer to `text`; both become turns of the conversation.

        Args:
            show: called after each step with the answer so far, with `MASK` for each masked token.

        Raises:
            ValueError: `text` alone is too long for the model.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        ids, turns = self._fitting(turns)

        def on_step_end(step: GenerationStep) -> None:
            if show is not None:
                show(self._so_far(step.sequences[0, len(ids) :], step.masked[0]))

        found = generate(
            self.model,
            torch.tensor([ids], device=next(self.model.parameters()).device),
            eos_token_id=self.ends,
            return_stats=True,
            on_step_end=on_step_end,
            **self.sampling,
        )
        assert isinstance(found, Generation)
        answer = decode_answer(self.tokenizer, found.answers[0].tolist(), self.ends)
        self.turns = [*turns, {"role": "assistant", "content": answer}]
        return answer

    def _fitting(self, turns: list[Turn]) -> tuple[list[int], list[Turn]]:
        """The token ids of the prompt, and its turns: the latest that fit into the model's positions, at least one."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        limit = position_limit(self.model)
        while True:
            text = templated(self.tokenizer, [*first, *turns])
            ids = encode(self.tokenizer, text, has_template=True)
            if limit is None or len(turns) == 1 or len(ids) + self.sampling["gen_length"] <= limit:
                return ids, turns
            turns = turns[2:]

    def _so_far(self, tokens: torch.Tensor, masked: torch.Tensor) -> str:
        parts: list[str] = []
        run: list[int] = []
        for token, is_masked in zip(tokens.tolist(), masked.tolist(), strict=True):
            if is_masked:
                parts += [self.tokenizer.decode(run, skip_special_tokens=True), MASK]
                run = []
            else:
                run.append(token)
        return "".join([*parts, self.tokenizer.decode(run, skip_special_tokens=True)])


# ---------------------------------------------------------------------- the terminal


def talk(chat: Chat) -> None:
    """Answer each line of the standard input, until it ends or a line is /exit.

    Raises:
        ValueError: an unknown command, or see `Chat.answer`; in a terminal the message is shown and the chat goes on.
    """
    is_shown = sys.stdout.isatty()
    for line in _lines():
        if line == "/exit":
            return
        if line == "/clear":
            chat.clear()
            continue
        if line.startswith("/"):
            _complain(f"unknown command {line.split()[0]}: type /clear or /exit")
            continue
        try:
            answer = chat.answer(line, _show if is_shown else None)
        except KeyboardInterrupt:  # this answer is not wanted
            sys.stdout.write("\n")
            continue
        except ValueError as error:
            _complain(str(error))
            continue
        sys.stdout.write(f"{_CLEAR if is_shown else ''}{answer}\n")
        sys.stdout.flush()


_CLEAR = "\r\x1b[2K"


def _show(text: str) -> None:
    """Show the end of the answer so far in one line of the terminal."""
    width = shutil.get_terminal_size().columns - 1
    sys.stdout.write(_CLEAR + " ".join(text.split())[-width:])
    sys.stdout.flush()


def _lines() -> Iterator[str]:
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")
            return
        if not line and not sys.stdin.isatty():
            return
        if line.strip():
            yield line.strip()


def _complain(message: str) -> None:
    if not sys.stdin.isatty():
        raise ValueError(message)
    sys.stderr.write(f"error: {message}\n")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "nara chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, or a repository on the Hub")
    parser.add_argument("--adapter", help="folder or repository of an adapter: NaRA, LoRA, …")
    parser.add_argument(
        "--strength",
        type=float,
        help="factor of the adapter's update, times the strength over λ that it brings (default: 1)",
    )
    parser.add_argument("--system", help="system message before all turns")
    parser.add_argument("--gen_length", type=int, default=128, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="sampling steps of an answer (default: one for each token)")
    parser.add_argument(
        "--block_length",
        type=int,
        help="tokens of a block; blocks are filled in from left to right (default: one block)",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    parser.add_argument("--cfg_scale", type=float, default=0.0, help="classifier-free guidance, 0 is none (default: 0)")
    parser.add_argument(
        "--remasking",
        choices=REMASKING,
        default="low_confidence",
        help="which tokens stay masked (default: %(default)s)",
    )
    parser.add_argument(
        "--confidence_threshold", type=float, help="instead of --steps: fill in all tokens above this probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --temperature and random remasking (default: 0)")
    parser.add_argument("--dtype", default="auto", help="of the weights, such as bfloat16 (default: the checkpoint's)")
    parser.add_argument("--mask_token", help="the mask token, if the checkpoint doesn't name it")
    return parser.parse_args(argv)


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `generate`. Raises ValueError for values that it would refuse, before the model is loaded."""
    options = {
        name: getattr(args, name)
        for name in ("gen_length", "steps", "temperature", "cfg_scale", "remasking", "confidence_threshold")
    }
    options["block_length"] = args.gen_length if args.block_length is None else args.block_length
    Sampling(**options)
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """The command `nara chat`."""
    args = parse_arguments(argv)
    with in_one_line():
        sampling = _sampling(args)
        if args.strength is not None and args.adapter is None:
            raise ValueError("--strength is for an adapter: give --adapter too.")
        options = {} if args.mask_token is None else {"mask_token": args.mask_token}
        model, tokenizer = load_model(args.model, args.adapter, dtype=args.dtype, **options)
        if args.strength is not None:
            set_strength(model, "default", args.strength)
        device = next(model.parameters()).device
        sampling["generator"] = torch.Generator(device).manual_seed(args.seed)
        talk(Chat(model, tokenizer, sampling, args.system))
