"""lm-eval's interface to a masked-diffusion language model, with or without an adapter.

    generate_until          answers by `nara_diffusion.dllm.generate`
    loglikelihood           the bound of `nara_diffusion.dllm.log_likelihood`, and whether greedy sampling agrees

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
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

import nara_diffusion  # noqa: F401 (registers NaRA with PEFT)
from nara_diffusion.dllm import load_backbone, log_likelihood, stop_token_ids
from nara_diffusion.dllm.exact_match import answer_prompts
from nara_diffusion.dllm.models.backbone import Backbone
from nara_diffusion.dllm.tokenizer import decode_answer
from nara_diffusion.loaders.tensor_files import load_peft_adapter
from nara_diffusion.utils.naming import naming_source

from .harness_text import ALPACA, SETTINGS, cut, encode, encode_pair, read_gen_kwargs, templated

logger = logging.getLogger(__name__)

_GROUP = (
    64  # requests whose likelihoods are computed in one call: those of equal length share forwards
)


class NaraDLLM(LM):
    """`--model nara_dllm`.

    Args (--model_args):
        pretrained: folder or repository of the model; left out, it is the one that the adapter names.
        peft, peft_revision: folder or repository of any adapter that PEFT loads, such as a NaRA.
        batch_size: sequences of one forward, 1 or more; also by --batch_size.
        max_length: tokens of prompt and answer together; longer prompts lose their start. Default: the model's limit.
        samples: number of random masks by which a likelihood is estimated, 1 or more; answers with no more possible
            masks than that are scored exactly.
        seed: the seed of those masks.
        cfg_scale: classifier-free guidance in likelihoods; for answers it belongs to --gen_kwargs.
        greedy: whether loglikelihood also checks if greedy sampling gives the text, which costs one forward for each
            token; some tasks report it (LAMBADA's acc), most don't.
        device: of the model, unless there is a device_map.
        **backbone: further arguments of `load_backbone`: dtype, load_in_8bit, load_in_4bit, mask_token,
            revision, attn_implementation, device_map, ….

    Raises:
        ValueError: neither `pretrained` nor `peft`; batch_size="auto"; sampler settings, which belong to --gen_kwargs;
            a max_length beyond the model's positions; see also `load_backbone`.
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
        cfg_scale: float = 0.0,
        greedy: bool = True,
        device: str | torch.device | None = None,
        **backbone: Any,
    ) -> None:
        super().__init__()
        misplaced = sorted(backbone.keys() & set(SETTINGS))
        if misplaced:
            raise ValueError(
                f"{', '.join(misplaced)} in --model_args: the sampler's settings belong to --gen_kwargs"
            )
        if not str(batch_size).isdecimal() or max_batch_size is not None:
            raise ValueError(
                f"--batch_size {batch_size}: nara_dllm doesn't look for one, name it: --batch_size 8"
            )
        self.batch_size, self.samples, self.seed, self.greedy = (
            int(batch_size),
            int(samples),
            int(seed),
            bool(greedy),
        )
        self.cfg_scale = float(cfg_scale)
        patience = InitProcessGroupKwargs(
            timeout=timedelta(days=7)
        ).to_kwargs()  # for others' longer questions
        is_cpu = str(device) == "cpu" or not torch.accelerator.is_available()
        self.processes = PartialState(cpu=is_cpu, **patience)
        self._rank, self._world_size = self.processes.process_index, self.processes.num_processes
        is_own = self._world_size > 1 or device in (None, "auto")
        self.model, self.tokenizer = _load(
            pretrained, peft, self.processes.device if is_own else device, **backbone
        )
        self.backbone = Backbone(self.model)
        self._device = self.backbone.device
        limit = self.backbone.position_limit
        if limit is None and max_length is None:
            raise ValueError(
                "the model's configuration has no limit of positions: add max_length=N to --model_args"
            )
        self.max_length = int(max_length or limit or 0)
        if limit is not None and self.max_length > limit:
            raise ValueError(
                f"max_length is {max_length} and the model has {limit} positions: leave it out"
            )
        self.ends = stop_token_ids(self.model, self.tokenizer)
        # Dream's own evaluation opens each text by a BOS token, since it predicts the next token
        bos: Any = self.tokenizer.bos_token_id
        self.opening: list[int] = [bos] if self.backbone.is_shifted and bos is not None else []
        self.has_template = False

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> NaraDLLM:
        """Create it from --model_args and lm-eval's other flags; --model_args win."""
        others = {
            name: value for name, value in (additional_config or {}).items() if value is not None
        }
        return cls(**{**others, **arg_dict})

    # prompts

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that --apply_chat_template uses; `ALPACA` if the tokenizer has none."""
        self.has_template = bool(chat_template)
        return str(self.tokenizer.chat_template or ALPACA) if self.has_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
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
            counts = (longer, len(prompts), self.max_length)
            logger.warning(
                "%d of %d prompts lose their start: with the answer they exceed %d tokens", *counts
            )
        return [
            prompt[max(len(prompt) - room, 0) :]
            for prompt, room in zip(prompts, rooms, strict=True)
        ]

    # generation

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each request: the text before an end token and before any of the request's `until`."""
        given: list[Any] = [request.args for request in requests]  # (prompt, gen_kwargs)
        how = [read_gen_kwargs(gen_kwargs) for _, gen_kwargs in given]
        longest = max((sampling["gen_length"] for _, sampling in how), default=0)
        if longest >= self.max_length:
            has = f"the model has {self.max_length} positions for prompt and answer together"
            raise ValueError(
                f"gen_length is {longest} and {has}: lower it with --gen_kwargs gen_length=N"
            )
        prompts = [
            self._opened(encode(self.tokenizer, prompt, has_template=self.has_template))
            for prompt, _ in given
        ]
        prompts = self._fitting(
            prompts, [self.max_length - sampling["gen_length"] for _, sampling in how]
        )
        answers: list[str] = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (repr(how[i]), -len(prompts[i])))
        vocabulary, chat = (
            self.tokenizer.get_vocab(),
            self.has_template and bool(self.tokenizer.chat_template),
        )
        with self._progress(len(requests), "generate") as bar:
            for _, group in groupby(order, key=lambda i: how[i]):
                for batch in _split(list(group), self.batch_size):
                    until, sampling = how[batch[0]]
                    special = [
                        vocabulary[stop]
                        for stop in until
                        if stop in self.tokenizer.all_special_tokens
                    ]
                    ends = [*self.ends, *special]
                    options = {"chat": chat, "eos_token_id": ends, **sampling}
                    found = answer_prompts(self.model, [prompts[i] for i in batch], **options)
                    for i, answer in zip(batch, found.answers.tolist(), strict=True):
                        answers[i] = cut(
                            decode_answer(self.tokenizer, answer, ends, strip=False), until
                        )
                        self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
                    bar.update(len(batch))
        return answers

    # likelihood

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy sampling gives it) of each request's continuation.

        Raises:
            ValueError: a continuation is longer than `max_length`.
        """
        pairs = [
            encode_pair(self.tokenizer, *request.args, has_template=self.has_template)
            for request in requests
        ]
        answers = [answer for _, answer in pairs]
        room, beside = (
            self.max_length - len(self.opening),
            " beside the BOS token" if self.opening else "",
        )
        longest = max(map(len, answers), default=0)
        if longest > room:
            raise ValueError(
                f"a continuation has {longest} tokens, and the model {room} positions{beside}: leave the task out, or "
                "raise max_length in --model_args"
            )
        rooms = [self.max_length - len(answer) for answer in answers]
        pairs = list(
            zip(
                self._fitting([self._opened(prompt) for prompt, _ in pairs], rooms),
                answers,
                strict=True,
            )
        )
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        with self._progress(len(pairs), "likelihood") as bar:
            for batch in _split(order, _GROUP):
                chosen = [pairs[i] for i in batch]
                found = self._are_greedy(chosen) if self.greedy else [False] * len(batch)
                for i, value, is_greedy in zip(
                    batch, self._log_likelihoods(chosen), found, strict=True
                ):
                    results[i] = (value, is_greedy)
                    self.cache_hook.add_partial("loglikelihood", requests[i].args, results[i])
                bar.update(len(batch))
        return results

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Refused, as in LLaDA's own evaluation."""
        raise ValueError(
            "perplexities of whole texts (loglikelihood_rolling) aren't measured: the likelihood of a masked-diffusion "
            "model is a bound, and a text's depends on how it is cut into windows. Leave the task out."
        )

    def _log_likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """The likelihood bound of each (prompt, answer), in nats."""
        input_ids = pad_sequence(
            [torch.tensor([*prompt, *answer]) for prompt, answer in pairs], batch_first=True
        )
        estimates = log_likelihood(
            self.model,
            input_ids.to(self._device),
            [len(prompt) for prompt, _ in pairs],
            answer_lengths=[len(answer) for _, answer in pairs],
            samples=self.samples,
            batch_size=self.batch_size,
            seed=self.seed,
            cfg_scale=self.cfg_scale,
            sample_indices=[0]
            * len(pairs),  # so that the choices of a question are compared on equal masks
        )
        return estimates.tolist()

    def _are_greedy(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether sampling at temperature 0, one token a step, gives exactly the answer."""
        found = [False] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][1]), len(pairs[i][0])))
        for length, group in groupby(order, key=lambda i: len(pairs[i][1])):
            for batch in _split(list(group), self.batch_size):
                prompts = [pairs[i][0] for i in batch]
                options = {"gen_length": length, "stop_at_eos": False, "cfg_scale": self.cfg_scale}
                result = answer_prompts(self.model, prompts, **options)
                for i, answer in zip(batch, result.answers.tolist(), strict=True):
                    found[i] = answer == pairs[i][1]
        return found

    def _progress(self, total: int, what: str) -> tqdm:
        return tqdm(total=total, desc=what, unit="request", disable=self.rank != 0)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return gather(tensor)  # type: ignore[return-value]

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any]:
        return gather_object([obj])

    def barrier(self) -> None:
        self.processes.wait_for_everyone()


def _split(items: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _load(
    pretrained: str | None,
    peft: str | None,
    device: str | torch.device | None,
    *,
    dtype: str = "auto",
    peft_revision: str | None = None,
    **backbone: Any,
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The model in evaluation mode on its device, with its adapter active; and its tokenizer."""
    if pretrained is None and peft is None:
        raise ValueError(
            "--model_args names no model: pretrained=FOLDER_OR_REPOSITORY, or peft=ADAPTER, or both"
        )
    if pretrained is None:
        with naming_source(str(peft), CONFIG_NAME, "an adapter of PEFT's"):
            pretrained = PeftConfig.from_pretrained(str(peft)).base_model_name_or_path
    if not pretrained:
        raise ValueError(
            f"the adapter {peft} doesn't name the model it belongs to: add pretrained=… to --model_args"
        )
    if backbone.get("load_in_8bit") or backbone.get("load_in_4bit"):
        backbone.setdefault(
            "device_map", {"": str(device)}
        )  # quantised weights can't be moved later
    model, tokenizer = load_backbone(pretrained, dtype=dtype, **backbone)
    adapted: torch.nn.Module = model if "device_map" in backbone else model.to(device)  # type: ignore[arg-type]
    if peft is not None:
        adapted = load_peft_adapter(
            adapted, peft, **({} if peft_revision is None else {"revision": peft_revision})
        )
    return adapted.eval(), tokenizer
