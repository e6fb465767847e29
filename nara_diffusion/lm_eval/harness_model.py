"""Implement lm-eval's interface for a masked-diffusion model, which is loaded with its adapter.

    generate_until   answers from `nara_diffusion.dllm.generate`
    loglikelihood    the bound from `nara_diffusion.dllm.log_likelihood`, and whether greedy
                     sampling gives the text

λ is the masked share of the answer. These two functions set λ in each forward for each sample.
Requests are sorted by length. A result doesn't depend on the other requests in its batch. Under
`accelerate launch`, each process has the whole model and a part of the requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import groupby
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import InitProcessGroupKwargs, gather, gather_object
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

import nara_diffusion  # noqa: F401 (registers NaRA with PEFT)
from nara_diffusion.dllm import load_backbone, log_likelihood, stop_token_ids
from nara_diffusion.dllm.models.backbone import Backbone
from nara_diffusion.dllm.sampler import answer_prompts
from nara_diffusion.dllm.tokenizer import decode_answer
from nara_diffusion.loaders.tensor_files import load_peft_adapter
from nara_diffusion.utils.repositories import naming_source

from .harness_text import (
    ALPACA,
    SETTINGS,
    encode,
    encode_pair,
    read_gen_kwargs,
    templated,
    truncated_prompts,
    up_to_stop,
)


def load_adapted(
    pretrained: str | None,
    peft: str | None,
    device: str | torch.device | None,
    *,
    dtype: str = "auto",
    peft_revision: str | None = None,
    **backbone: Any,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Return the model with its active adapter, and its tokenizer.

    The model is on its device and in evaluation mode.
    """
    if pretrained is None and peft is not None:
        with naming_source(peft, CONFIG_NAME, "an adapter of PEFT's"):
            config = PeftConfig.from_pretrained(peft, revision=peft_revision)
            pretrained = config.base_model_name_or_path
    if not pretrained:
        raise ValueError(
            "--model_args names no model, nor does an adapter. Add pretrained=FOLDER_OR_REPOSITORY."
        )
    if backbone.get("load_in_8bit") or backbone.get("load_in_4bit"):
        # quantised weights can't be moved later
        backbone.setdefault("device_map", {"": str(device)})
    loaded, tokenizer = load_backbone(pretrained, dtype=dtype, **backbone)
    model: Any = loaded
    if "device_map" not in backbone:
        model = model.to(device)
    if peft is not None:
        model = load_peft_adapter(model, peft, revision=peft_revision)
    return model.eval(), tokenizer


def checked_max_length(given: int | None, limit: int | None) -> int:
    """Return max_length, which is `given` or, if None, the model's limit of positions."""
    if limit is None and given is None:
        raise ValueError(
            "The model's configuration has no limit of positions. Add max_length=N to --model_args."
        )
    length = int(given or limit or 0)
    if limit is not None and length > limit:
        raise ValueError(
            f"max_length is {given}, but the model has {limit} positions. Leave it out."
        )
    return length


# requests of one call of log_likelihood: those of equal length share forwards
_GROUP = 64


class NaraDLLM(LM):
    """The lm-eval model `--model nara_dllm`.

    Args (--model_args):
        pretrained: the folder or repository of the model. By default, the adapter names it.
        peft, peft_revision: the folder or repository of any adapter that PEFT loads, such as a
            NaRA, and its revision.
        batch_size: the number of sequences in one forward, at least 1. --batch_size also sets it.
        max_length: the number of tokens in prompt and answer together. Longer prompts lose their
            start. The default is the model's limit.
        samples: the number of random masks for estimating a likelihood, at least 1. Answers with at
            most this many possible masks are scored exactly.
        seed: the seed for these masks.
        cfg_scale: the classifier-free guidance scale for likelihoods. For answers, set it with
            --gen_kwargs.
        greedy: whether loglikelihood also checks if greedy sampling gives the text. This costs one
            forward for each token. Some tasks report it (LAMBADA's acc), but most don't.
        device: the device of the model, unless there is a device_map.
        **backbone: further arguments of `load_backbone`, such as dtype, load_in_8bit, load_in_4bit,
            mask_token, revision, attn_implementation and device_map.

    Raises:
        ValueError: neither `pretrained` nor `peft` is given; batch_size is "auto"; the arguments
            include sampler settings, which belong in --gen_kwargs; max_length exceeds the model's
            positions; or `load_backbone` raises an error.
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
        misplaced = ", ".join(sorted(backbone.keys() & set(SETTINGS)))
        if misplaced:
            raise ValueError(
                f"--model_args has {misplaced}. Settings of the sampler belong in --gen_kwargs."
            )
        if not str(batch_size).isdecimal() or max_batch_size is not None:
            raise ValueError(
                f"--batch_size is {batch_size}, but nara_dllm can't search for one. Give a number, such as "
                "--batch_size 8."
            )
        self.batch_size, self.samples = int(batch_size), int(samples)
        self.seed, self.greedy, self.cfg_scale = int(seed), bool(greedy), float(cfg_scale)
        # other processes may have longer questions
        patience = InitProcessGroupKwargs(timeout=timedelta(days=7)).to_kwargs()
        is_cpu = str(device) == "cpu" or not torch.accelerator.is_available()
        self.processes = PartialState(cpu=is_cpu, **patience)
        self._rank, self._world_size = self.processes.process_index, self.processes.num_processes
        if self._world_size > 1 or device in (None, "auto"):
            device = self.processes.device
        self.model, self.tokenizer = load_adapted(pretrained, peft, device, **backbone)
        self.backbone = Backbone(self.model)
        self._device = self.backbone.device
        self.max_length = checked_max_length(max_length, self.backbone.position_limit)
        self.ends = stop_token_ids(self.model, self.tokenizer)
        # Dream's own evaluation opens each text with a BOS token, since it predicts the next token
        bos: Any = self.tokenizer.bos_token_id
        self.opening: list[int] = [bos] if self.backbone.is_shifted and bos is not None else []
        self.has_template = False

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> NaraDLLM:
        """Create the model from --model_args, which take precedence, and lm-eval's other flags."""
        flags = additional_config or {}
        arguments = {name: value for name, value in flags.items() if value is not None}
        return cls(**arguments | dict(arg_dict))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template for --apply_chat_template, or `ALPACA` if the tokenizer has none."""
        self.has_template = bool(chat_template)
        return str(self.tokenizer.chat_template or ALPACA) if self.has_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the conversation as text, in the form used in training."""
        self.has_template = True
        return templated(self.tokenizer, chat_history, add_generation_prompt=add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """Return the key for lm-eval's cache of prompts."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def _opened(self, prompt: list[int]) -> list[int]:
        """Return `prompt` after the BOS token; in a template it stays as in training."""
        is_open = prompt[:1] == self.opening or (self.has_template and prompt)
        return prompt if is_open else [*self.opening, *prompt]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return an answer to each request, up to an end token or any of the request's `until`."""
        arguments = cast("list[tuple[str, dict[str, Any]]]", [request.args for request in requests])
        settings = [read_gen_kwargs(gen_kwargs) for _, gen_kwargs in arguments]
        lengths = [sampling["gen_length"] for _, sampling in settings]
        if max(lengths, default=0) >= self.max_length:
            raise ValueError(
                f"gen_length is {max(lengths)} and the model has {self.max_length} positions for "
                "prompt and answer together. Lower it with --gen_kwargs gen_length=N."
            )
        prompts = [
            self._opened(encode(self.tokenizer, text, has_template=self.has_template))
            for text, _ in arguments
        ]
        rooms = [self.max_length - length for length in lengths]
        prompts = truncated_prompts(prompts, rooms, self.max_length)
        answers = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (repr(settings[i]), -len(prompts[i])))
        with self._progress(len(requests), "generate") as bar:
            for (until, sampling), group in groupby(order, key=lambda i: settings[i]):
                for batch in BatchSampler(group, self.batch_size, drop_last=False):
                    texts = self._answers([prompts[i] for i in batch], until, sampling)
                    for i, text in zip(batch, texts, strict=True):
                        answers[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(batch))
        return answers

    def _answers(
        self, prompts: list[list[int]], until: Sequence[str], sampling: Mapping[str, Any]
    ) -> list[str]:
        """Return the text of each answer, with its white space."""
        vocabulary, special = self.tokenizer.get_vocab(), self.tokenizer.all_special_tokens
        ends = [*self.ends, *(vocabulary[stop] for stop in until if stop in special)]
        chat = self.has_template and bool(self.tokenizer.chat_template)
        options = {"chat": chat, "eos_token_id": ends, **sampling}
        tokens = answer_prompts(self.model, prompts, **options).answers.tolist()
        texts = [decode_answer(self.tokenizer, answer, ends, strip=False) for answer in tokens]
        return [up_to_stop(text, until) for text in texts]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood in nats, and if greedy sampling gives it.

        Raises:
            ValueError: a continuation is longer than `max_length`.
        """
        pairs = self._pairs(requests)
        results = [(0.0, False)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        with self._progress(len(pairs), "likelihood") as bar:
            for batch in BatchSampler(order, _GROUP, drop_last=False):
                chosen = [pairs[i] for i in batch]
                texts = [torch.tensor([*prompt, *answer]) for prompt, answer in chosen]
                values = log_likelihood(
                    self.model,
                    pad_sequence(texts, batch_first=True).to(self._device),
                    [len(prompt) for prompt, _ in chosen],
                    answer_lengths=[len(answer) for _, answer in chosen],
                    samples=self.samples,
                    batch_size=self.batch_size,
                    seed=self.seed,
                    cfg_scale=self.cfg_scale,
                    # the choices of a question are compared on equal masks
                    sample_indices=[0] * len(chosen),
                ).tolist()
                greedy = self._are_greedy(chosen) if self.greedy else [False] * len(batch)
                for i, value, is_greedy in zip(batch, values, greedy, strict=True):
                    results[i] = (value, is_greedy)
                    self.cache_hook.add_partial("loglikelihood", requests[i].args, results[i])
                bar.update(len(batch))
        return results

    def _pairs(self, requests: Sequence[Instance]) -> list[tuple[list[int], list[int]]]:
        """Return the token ids of each request's prompt and answer."""
        texts = cast("list[tuple[str, str]]", [request.args for request in requests])
        pairs = [
            encode_pair(self.tokenizer, *pair, has_template=self.has_template) for pair in texts
        ]
        answers = [answer for _, answer in pairs]
        room = self.max_length - len(self.opening)
        longest = max(map(len, answers), default=0)
        if longest > room:
            raise ValueError(
                f"A continuation has {longest} tokens, but the model has room for {room}. Leave the task out, or raise "
                "max_length in --model_args."
            )
        rooms = [self.max_length - len(answer) for answer in answers]
        prompts = [self._opened(prompt) for prompt, _ in pairs]
        return list(zip(truncated_prompts(prompts, rooms, self.max_length), answers, strict=True))

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Raise ValueError, as LLaDA's own evaluation does."""
        raise ValueError(
            "Perplexities of whole texts (loglikelihood_rolling) can't be measured, since the likelihood of a "
            "masked-diffusion model is a bound, which depends on how a text is cut into windows. Leave the task out."
        )

    def _are_greedy(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
        """Return whether sampling at temperature 0, one token per step, gives exactly each answer."""
        are_equal = [False] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][1]), len(pairs[i][0])))
        for length, group in groupby(order, key=lambda i: len(pairs[i][1])):
            for batch in BatchSampler(group, self.batch_size, drop_last=False):
                prompts = [pairs[i][0] for i in batch]
                options = {"gen_length": length, "stop_at_eos": False, "cfg_scale": self.cfg_scale}
                result = answer_prompts(self.model, prompts, **options)
                for i, answer in zip(batch, result.answers.tolist(), strict=True):
                    are_equal[i] = answer == pairs[i][1]
        return are_equal

    def _progress(self, total: int, label: str) -> tqdm:
        return tqdm(total=total, desc=label, unit="request", disable=self.rank != 0)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, gather(tensor))

    def gather_object(self, obj: object, dst: int = 0) -> list[Any]:
        return gather_object([obj])

    def barrier(self) -> None:
        self.processes.wait_for_everyone()
