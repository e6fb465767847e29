"""lm-eval's interface to a masked-diffusion language model, with or without an adapter.

    generate_until          answers by `nara_diffusion.dllm.generate`
    loglikelihood           the bound of `nara_diffusion.dllm.log_likelihood`, and whether greedy sampling agrees
    loglikelihood_rolling   the same bound for whole texts, in windows of `max_length` tokens

λ is the masked share of the answer, which those functions set at each forward for each sample. Requests are sorted by
length; a result doesn't depend on the other requests of its batch. Under `accelerate launch` each process has all of
the model and a part of the requests.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from datetime import timedelta
from itertools import groupby
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import InitProcessGroupKwargs, gather, gather_object
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tqdm.auto import tqdm

from nara_diffusion.dllm import log_likelihood, stop_token_ids
from nara_diffusion.dllm.evaluation.exact_match import answer_prompts, text_before_end
from nara_diffusion.dllm.models.backbone import Backbone

from .harness_text import ALPACA, SETTINGS, encode, encode_pair, read_gen_kwargs, templated
from .load_model import load_model

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
        ValueError: as `load_model`; batch_size="auto"; sampler settings, which belong to --gen_kwargs.
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
        if not str(batch_size).isdecimal() or max_batch_size is not None:
            raise ValueError(f"--batch_size {batch_size}: nara_dllm doesn't look for one, name it: --batch_size 8")
        self.batch_size, self.samples, self.seed, self.greedy = int(batch_size), int(samples), int(seed), bool(greedy)
        patience = InitProcessGroupKwargs(timeout=timedelta(days=7)).to_kwargs()  # for others' longer questions
        is_cpu = str(device) == "cpu" or not torch.accelerator.is_available()
        self.processes = PartialState(cpu=is_cpu, **patience)
        self._rank, self._world_size = self.processes.process_index, self.processes.num_processes
        is_own = self._world_size > 1 or device in (None, "auto")
        place: Any = self.processes.device if is_own else device
        self.model, self.tokenizer = load_model(pretrained, peft, device=place, **loading)
        self.backbone = Backbone(self.model)
        self._device = self.backbone.device
        limit = max_length or self.backbone.position_limit
        if limit is None:
            raise ValueError("the model's configuration has no limit of positions: add max_length=N to --model_args")
        self.max_length = int(limit)
        self.ends = stop_token_ids(self.model, self.tokenizer)
        # Dream's own evaluation opens each text by a BOS token, since it predicts the next token
        bos: Any = self.tokenizer.bos_token_id
        self.opening: list[int] = [bos] if self.backbone.is_shifted and bos is not None else []
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
        return str(self.tokenizer.chat_template or ALPACA) if self.has_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text, in the form that training used."""
        self.has_template = True
        return templated(self.tokenizer, chat_history, add_generation_prompt=add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """The key of lm-eval's cache of prompts."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def _opened(self, prompt: list[int]) -> list[int]:
        """`prompt` behind the BOS token; in a template it stays as in training."""
        is_open = prompt[:1] == self.opening or (self.has_template and prompt)
        return prompt if is_open else [*self.opening, *prompt]

    def _fitting(self, prompts: Sequence[list[int]], rooms: Sequence[int]) -> list[list[int]]:
        """The last tokens of each prompt, as many as there is room for."""
        longer = sum(len(prompt) > room for prompt, room in zip(prompts, rooms, strict=True))
        if longer:
            logger.warning(
                "%d prompts don't fit into %d tokens with their answers, and lose their start", longer, self.max_length
            )
        return [prompt[max(len(prompt) - room, 0) :] for prompt, room in zip(prompts, rooms, strict=True)]

    # generation

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each request: the text before an end token and before any of the request's `until`."""
        given: list[Any] = [request.args for request in requests]  # (prompt, gen_kwargs)
        how = [read_gen_kwargs(gen_kwargs) for _, gen_kwargs in given]
        longest = max((sampling["gen_length"] for _, sampling in how), default=0)
        if longest >= self.max_length:
            raise ValueError(
                f"gen_length is {longest} and the model has {self.max_length} positions for prompt and answer "
                "together: lower it with --gen_kwargs gen_length=N"
            )
        prompts = [self._opened(encode(self.tokenizer, prompt, has_template=self.has_template)) for prompt, _ in given]
        prompts = self._fitting(prompts, [self.max_length - sampling["gen_length"] for _, sampling in how])
        answers: list[str] = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (repr(how[i]), -len(prompts[i])))
        vocabulary = self.tokenizer.get_vocab()
        with self._progress(len(requests), "generate") as bar:
            for _, group in groupby(order, key=lambda i: how[i]):
                for batch in _split(list(group), self.batch_size):
                    until, sampling = how[batch[0]]
                    special = [vocabulary[stop] for stop in until if stop in self.tokenizer.all_special_tokens]
                    ends = [*self.ends, *special]
                    found = answer_prompts(self.model, [prompts[i] for i in batch], eos_token_id=ends, **sampling)
                    for i, answer in zip(batch, found.answers.tolist(), strict=True):
                        answers[i] = _cut(text_before_end(self.tokenizer, answer, ends), until)
                        self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
                    bar.update(len(batch))
        return answers

    # likelihood

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy sampling gives it) of each request's continuation.

        Raises:
            ValueError: a continuation is longer than `max_length`.
        """
        pairs = [encode_pair(self.tokenizer, *request.args, has_template=self.has_template) for request in requests]
        answers = [answer for _, answer in pairs]
        room, beside = self.max_length - len(self.opening), " beside the BOS token" if self.opening else ""
        longest = max(map(len, answers), default=0)
        if longest > room:
            raise ValueError(
                f"a continuation has {longest} tokens, and the model {room} positions{beside}: leave the task out, or "
                "raise max_length in --model_args"
            )
        rooms = [self.max_length - len(answer) for answer in answers]
        pairs = list(zip(self._fitting([self._opened(prompt) for prompt, _ in pairs], rooms), answers, strict=True))
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
                (text,) = request.args
                opening, tokens = encode_pair(self.tokenizer, "", text, has_template=False) if text else ([], [])
                windows = _windows(self._opened(opening), tokens, self.max_length)
                totals.append(sum(self._log_likelihoods(windows)) if text else 0.0)
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
                bar.update()
        return totals

    def _log_likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """The likelihood bound of each (prompt, answer), in nats."""
        input_ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor([*prompt, *answer]) for prompt, answer in pairs], True
        )
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
                prompts = [pairs[i][0] for i in batch]
                result = answer_prompts(self.model, prompts, gen_length=length, stop_at_eos=False)
                for i, answer in zip(batch, result.answers.tolist(), strict=True):
                    found[i] = answer == pairs[i][1]
        return found

    def _progress(self, total: int, what: str) -> tqdm:
        return tqdm(total=total, desc=what, unit="request", disable=self.rank != 0)

    # several processes

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return gather(tensor)  # type: ignore[return-value]

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any]:
        return gather_object([obj])

    def barrier(self) -> None:
        self.processes.wait_for_everyone()


def _split(items: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _cut(text: str, until: Sequence[str]) -> str:
    """`text` up to the first occurrence of any text in `until`."""
    places = [text.find(stop) for stop in until if stop]
    return text[: min((place for place in places if place >= 0), default=len(text))]


def _windows(opening: list[int], tokens: list[int], size: int) -> list[tuple[list[int], list[int]]]:
    """Pairs (context, tokens to score) that score each token once; `opening` is the context of the first."""
    first = size - len(opening)
    step = max(size - size // 2, 1)
    later = range(first, len(tokens), step)
    pairs = [(tokens[max(start + step - size, 0) : start], tokens[start : start + step]) for start in later]
    return [(opening, tokens[:first]), *pairs]
