"""lm-eval's interface to a masked-diffusion language model, with or without an adapter.

    generate_until          answers by `nara_diffusion.dllm.generate`
    loglikelihood           the bound of `nara_diffusion.dllm.log_likelihood`, and whether greedy sampling agrees
    loglikelihood_rolling   the same bound for whole texts, in windows of `max_length` tokens

λ is the masked share of the answer, which those functions set at each forward for each sample. Requests are sorted by
length; a result doesn't depend on the other requests of its batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tqdm.auto import tqdm

from nara_diffusion.dllm import generate, log_likelihood, stop_token_ids
from nara_diffusion.dllm.models.lm_head import language_model
from nara_diffusion.dllm.models.positions import position_limit
from nara_diffusion.dllm.models.shifted_logits import ShiftedLogits

from .generation import SETTINGS, HowToAnswer, contradiction, cut, read_gen_kwargs
from .loading import load_model
from .number_arguments import fixed_batch_size, whole_number
from .processes import Processes
from .prompts import ALPACA, encode, encode_pair, shortened, templated

logger = logging.getLogger(__name__)

_GROUP = 64  # requests whose likelihoods are computed in one call: those of equal length share forwards


class NaraDLLM(LM):
    """`--model nara_dllm`.

    Args (--model_args):
        pretrained: folder or repository of the model; left out, it is the one that the adapter names.
        peft: folder or repository of any adapter that PEFT loads, such as a NaRA.
        batch_size: sequences of one forward, 1 or more; also by --batch_size.
        max_length: tokens of prompt and answer together; longer prompts lose their start. Default: the model's limit.
        samples: number of random masks by which a likelihood is estimated, 1 or more; answers with no more possible
            masks than that are scored exactly.
        seed: the seed of those masks.
        greedy: whether loglikelihood also checks if greedy sampling gives the text, which costs one forward for each
            token; some tasks report it (LAMBADA's acc), most don't.
        device, dtype, load_in_8bit, load_in_4bit, revision, peft_revision, **backbone: see `load_model`.

    Raises:
        ValueError: as `load_model`; batch_size="auto"; a number that is not whole or too small; sampler settings, which
            belong to --gen_kwargs.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        peft: str | None = None,
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        samples: int = 128,
        seed: int = 0,
        greedy: bool = True,
        device: str | torch.device | None = None,
        **loading: Any,
    ) -> None:
        super().__init__()
        misplaced = sorted(loading.keys() & set(SETTINGS))
        if misplaced:
            raise ValueError(f"{', '.join(misplaced)} in --model_args: the sampler's settings belong to --gen_kwargs")
        self.batch_size = fixed_batch_size(batch_size, max_batch_size)
        self.samples, self.seed, self.greedy = (
            whole_number("samples", samples, 1),
            whole_number("seed", seed, 0),
            bool(greedy),
        )
        limit = None if max_length is None else whole_number("max_length", max_length, 1)
        self.processes = Processes(device)
        self._rank, self._world_size = self.processes.rank, self.processes.count
        place = self.processes.placement(device)
        self.model, self.tokenizer = load_model(pretrained, peft, device=place, **loading)
        self._device = next(self.model.parameters()).device
        limit = limit or position_limit(self.model)
        if limit is None:
            raise ValueError("the model's configuration has no limit of positions: add max_length=N to --model_args")
        self.max_length = limit
        self.ends = stop_token_ids(self.model, self.tokenizer)
        self.opening = self._opening()
        self.has_template = False

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> NaraDLLM:
        """Create it from --model_args and lm-eval's other flags; --model_args win."""
        others = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**others, **arg_dict})

    # prompts

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that --apply_chat_template uses; `ALPACA` if the tokenizer has none."""
        self.has_template = bool(chat_template)
        return (str(self.tokenizer.chat_template or ALPACA)) if self.has_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text, in the form that training used."""
        self.has_template = True
        return templated(self.tokenizer, chat_history, add_generation_prompt=add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """The key of lm-eval's cache of prompts."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    # generation

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each request: the generated text before an end token and before any of the request's "
        "`until`."""
        given: list[Any] = [request.args for request in requests]  # (prompt, gen_kwargs)
        prompts = [self._opened(encode(self.tokenizer, prompt, has_template=self.has_template)) for prompt, _ in given]
        how = [read_gen_kwargs(gen_kwargs) for _, gen_kwargs in given]
        self._check_lengths(how)
        for message in sorted({contradiction(gen_kwargs) or "" for _, gen_kwargs in given} - {""}):
            logger.warning("%s", message)
        answers: list[str] = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (repr(how[i]), -len(prompts[i])))
        with self._progress(len(requests), "generate") as bar:
            for settings, group in groupby(order, key=lambda i: how[i]):
                for batch in _split(list(group), self.batch_size):
                    for i, text in zip(batch, self._answers([prompts[i] for i in batch], settings), strict=True):
                        answers[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(batch))
        return answers

    def _answers(self, prompts: Sequence[list[int]], how: HowToAnswer) -> list[str]:
        sampling = dict(how.sampling)
        vocabulary = self.tokenizer.get_vocab()
        ends = [*self.ends, *(vocabulary[stop] for stop in how.until if stop in self.tokenizer.all_special_tokens)]
        rows = self._generated(self._fitting(prompts, self.max_length - sampling["gen_length"]), sampling, ends)
        return [cut(self._text(row, ends), how.until) for row in rows]

    def _check_lengths(self, how: Iterable[HowToAnswer]) -> None:
        """Raises ValueError if an answer is longer than the model's positions, before hours of generation."""
        longest = max((dict(settings.sampling)["gen_length"] for settings in how), default=0)
        if longest >= self.max_length:
            raise ValueError(
                f"gen_length is {longest} and the model has {self.max_length} positions for prompt and answer "
                "together: lower it with --gen_kwargs gen_length=N"
            )

    def _text(self, answer: Sequence[int], ends: Sequence[int]) -> str:
        """The text before the first end token, with white space: a program's first line may be indented."""
        length = next((j for j, token in enumerate(answer) if token in ends), len(answer))
        return str(self.tokenizer.decode(list(answer[:length]), skip_special_tokens=True))

    def _generated(self, prompts: Sequence[list[int]], sampling: dict[str, Any], ends: list[int]) -> list[list[int]]:
        lengths = [len(prompt) for prompt in prompts]
        input_ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for row, prompt in zip(input_ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt, dtype=torch.long)
        result: Any = generate(
            self.model,
            input_ids.to(self._device),
            prompt_lengths=lengths,
            eos_token_id=ends,
            return_stats=True,
            **sampling,
        )
        return result.answers.tolist()

    # likelihood

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy sampling gives it) of each request's continuation.

        Raises:
            ValueError: a continuation is longer than `max_length`.
        """
        pairs = [encode_pair(self.tokenizer, *request.args, has_template=self.has_template) for request in requests]
        pairs = [(self._opened(prompt), answer) for prompt, answer in pairs]
        room, beside = self.max_length - len(self.opening), " beside the BOS token" if self.opening else ""
        for _, answer in pairs:
            if len(answer) > room:
                raise ValueError(
                    f"a continuation has {len(answer)} tokens, and the model {room} positions{beside}: leave the task "
                    "out, or raise max_length in --model_args"
                )
        longer = sum(len(prompt) + len(answer) > self.max_length for prompt, answer in pairs)
        if longer:
            logger.warning(
                "%d prompts don't fit into %d tokens with their answers, and lose their start", longer, self.max_length
            )
        pairs = [(shortened(prompt, self.max_length - len(answer)), answer) for prompt, answer in pairs]
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        with self._progress(len(pairs), "likelihood") as bar:
            for batch in _split(order, _GROUP):
                chosen = [pairs[i] for i in batch]
                found = self._are_greedy(chosen) if self.greedy else [False] * len(batch)
                for i, value, is_greedy in zip(batch, self._log_likelihoods(chosen), found, strict=True):
                    results[i] = (value, is_greedy)
                    self.cache_hook.add_partial("loglikelihood", requests[i].args, results[i])
                bar.update(len(batch))
        return results

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """The log-likelihood in nats of each request's text: the sum over windows of `max_length` tokens.

        The first window is scored whole; of each further one the second half is scored, with the first half as context.
        """
        totals = []
        with self._progress(len(requests), "likelihood of texts") as bar:
            for request in requests:
                totals.append(self._text_likelihood(request.args[0]))
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
                bar.update()
        return totals

    def _text_likelihood(self, text: str) -> float:
        if not text:
            return 0.0
        opening, tokens = encode_pair(self.tokenizer, "", text, has_template=False)
        return sum(self._log_likelihoods(_windows(self._opened(opening), tokens, self.max_length)))

    def _log_likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """The likelihood bound of each (prompt, answer), in nats."""
        rows = [[*prompt, *answer] for prompt, answer in pairs]
        input_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, tokens in zip(input_ids, rows, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        estimates = log_likelihood(
            self.model,
            input_ids.to(self._device),
            [len(prompt) for prompt, _ in pairs],
            answer_lengths=[len(answer) for _, answer in pairs],
            samples=self.samples,
            batch_size=self.batch_size,
            seed=self.seed,
            sample_indices=[0] * len(pairs),  # so that the choices of a question are compared on equal masks
        )
        return estimates.tolist()

    def _are_greedy(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether sampling at temperature 0, one token a step, gives exactly the answer."""
        found = [False] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][1]), len(pairs[i][0])))
        for length, group in groupby(order, key=lambda i: len(pairs[i][1])):
            for batch in _split(list(group), self.batch_size):
                sampling = {"gen_length": length, "stop_at_eos": False}
                answers = self._generated([pairs[i][0] for i in batch], sampling, [])
                for i, answer in zip(batch, answers, strict=True):
                    found[i] = answer == pairs[i][1]
        return found

    def _fitting(self, prompts: Sequence[list[int]], room: int) -> list[list[int]]:
        longer = sum(len(prompt) > room for prompt in prompts)
        if longer:
            logger.warning("%d prompts are longer than %d tokens and lose their start", longer, room)
        return [shortened(prompt, room) for prompt in prompts]

    def _opening(self) -> list[int]:
        """The BOS token of a model that predicts the next token (Dream), in whose own evaluation it opens each text."""
        needs_one = isinstance(language_model(self.model), ShiftedLogits) and self.tokenizer.bos_token_id is not None
        return [int(self.tokenizer.bos_token_id)] if needs_one else []  # type: ignore[arg-type]

    def _opened(self, prompt: list[int]) -> list[int]:
        """`prompt` behind the BOS token; in a template it stays as in training."""
        is_open = prompt[:1] == self.opening or (self.has_template and prompt)
        return prompt if is_open else [*self.opening, *prompt]

    def _progress(self, total: int, what: str) -> tqdm:
        return tqdm(total=total, desc=what, unit="request", disable=self.rank != 0)

    # several processes, each with all of the model and a part of the requests

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.processes.gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        return self.processes.gather_object(obj, dst)

    def barrier(self) -> None:
        self.processes.wait()


def _split(items: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _windows(opening: list[int], tokens: list[int], size: int) -> list[tuple[list[int], list[int]]]:
    """Pairs (context, tokens to score) that score each token once; `opening` is the context of the first."""
    first = size - len(opening)
    step = max(size - size // 2, 1)
    later = range(first, len(tokens), step)
    pairs = [(tokens[max(start + step - size, 0) : start], tokens[start : start + step]) for start in later]
    return [(opening, tokens[:first]), *pairs]
