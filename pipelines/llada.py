"""Text from a masked-diffusion language model (LLaDA, Dream, …) as a Diffusers pipeline.

    from pipelines.llada import LLaDAPipeline

    name = "GSAI-ML/LLaDA-8B-Instruct"
    pipe = LLaDAPipeline.from_pretrained(name, dtype=torch.bfloat16).to("cuda")
    pipe.load_nara_weights("outputs/dllm-1")  # the folder that train_scripts/dllm.py wrote
    print(pipe("How many days has a leap year?", gen_length=64, steps=32).texts[0])

`from_pretrained` also loads a folder that `pipe.save_pretrained(folder)` wrote. If the folder of
this file isn't on the Python path, use:

    DiffusionPipeline.from_pretrained(
        folder, custom_pipeline="pipelines/llada.py", trust_remote_code=True
    )

The sampler is `nara_diffusion.dllm.generate`. At every step, adapters run at λ, the masked share of
each answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nara_diffusion.dllm import GenerationStep, encode_prompts, load_backbone, prompt_text
from nara_diffusion.dllm.models.backbone import Backbone
from nara_diffusion.dllm.models.pretrained import HUB_ARGUMENTS
from nara_diffusion.dllm.prompt_places import check_canvas
from nara_diffusion.dllm.sampler import answer_prompts
from nara_diffusion.dllm.tokenizer import chat_text, decode_answer, stop_token_ids
from nara_diffusion.loaders.weights import load_nara_weights, save_nara_weights, unload_nara_weights

Chat = Sequence[Mapping[str, str]]
"""The turns of a conversation, {"role": …, "content": …} each."""


@dataclass
class LLaDAPipelineOutput(BaseOutput):
    """The output of the pipeline.

    Attributes:
        texts: the answers, each up to its first end token. All answers to the first prompt come
            first.
        sequences: (b, l) token ids: prompt, answer, padding.
        answers: (b, gen_length) token ids.
        prompt_lengths: (b,) the starts of the answers in `sequences`.
        forwards: the number of forwards of the model.
    """

    texts: list[str]
    sequences: torch.Tensor
    answers: torch.Tensor
    prompt_lengths: torch.Tensor
    forwards: int


class LLaDAPipeline(LoraBaseMixin, DiffusionPipeline):
    """Answer questions and chats by unmasking tokens.

    Diffusers' own methods, such as `set_adapters`, `delete_adapters` and `disable_lora`, work on the
    adapters that `load_nara_weights` loaded.

    Args:
        transformer: a bidirectional language model with a mask token in its configuration, as
            `load_backbone` returns it.
        tokenizer: the tokenizer of the model. Chats need a tokenizer with a chat template.

    Raises:
        ValueError: the model is causal, has no mask token, or is wrapped by PEFT.
    """

    model_cpu_offload_seq = "transformer"
    _lora_loadable_modules = ("transformer",)
    _callback_tensor_inputs = ("sequences", "masked")

    load_nara_weights = load_nara_weights
    save_nara_weights = save_nara_weights
    unload_nara_weights = unload_nara_weights

    def __init__(self, transformer: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        kind = type(transformer).__name__
        is_causal = "CausalLM" in kind and getattr(transformer.config, "is_causal", True)
        if not isinstance(transformer, PreTrainedModel) or is_causal:
            raise ValueError(
                f"transformer is a {kind}, expected a model of transformers that sees both sides of "
                "a token. Load it with LLaDAPipeline.from_pretrained(…) or "
                "nara_diffusion.dllm.load_backbone(…). Instead of a PeftModel, pass its base model, and "
                "load the saved adapter with pipe.load_nara_weights(folder)."
            )
        Backbone(transformer).mask_token_id()
        self.register_modules(transformer=transformer, tokenizer=tokenizer)
        self._interrupt = False

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> LLaDAPipeline:
        """Load a saved pipeline, or a language model from its own folder or repository.

        A saved pipeline takes the arguments of `DiffusionPipeline.from_pretrained`. A language
        model (LLaDA, Dream, Llama, Qwen2, BERT, …) takes the arguments of `load_backbone`.
        """
        name = str(pretrained_model_name_or_path)
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        try:
            cls.load_config(name, **hub)
        except OSError:  # no model_index.json
            return cls(*load_backbone(name, **kwargs))
        return super().from_pretrained(name, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Chat | Sequence[str] | Sequence[Chat],
        *,
        gen_length: int = 128,
        num_answers_per_prompt: int = 1,
        apply_template: bool = True,
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("sequences",),
        **sampling: Any,
    ) -> LLaDAPipelineOutput | tuple[list[str], torch.Tensor]:
        """Answer one prompt or several.

        Args:
            prompt: one or several questions, or one or several chats. A chat is a list of
                {"role": …, "content": …} that ends with the user's turn.
            gen_length: the number of tokens of an answer.
            num_answers_per_prompt: the number of answers to each prompt. They differ if the
                temperature is above 0.
            apply_template: True to put questions into the tokenizer's chat template as in training,
                or into Alpaca's if the tokenizer has none. False to use the texts unchanged.
            return_dict: False to return (texts, sequences).
            callback_on_step_end: a function f(pipe, step, noise_level, tensors) that is called
                after each step. noise_level (b,) is the λ that the model ran at. tensors are those
                of the next argument. If the function returns a dict with "sequences", they replace
                the current ones. If it sets `pipe._interrupt = True`, sampling stops, and masks
                that are left remain.
            callback_on_step_end_tensor_inputs: the names of tensors for the function, among
                "sequences" (b, l) and "masked" (b, gen_length).
            **sampling: arguments of `nara_diffusion.dllm.generate`: stop_at_eos, generator, and the
                settings of `Sampling`, such as steps and temperature. With a chat template, the
                default of `block_length` is the published value for the model's chat (LLaDA: 32),
                if it divides `gen_length`.

        Raises:
            ValueError: a prompt or an argument is invalid.
        """
        is_one = isinstance(prompt, str) or (prompt and isinstance(prompt[0], Mapping))
        prompts: list[Any] = [prompt] if is_one else list(prompt)
        texts: list[str] = []
        for one in prompts:
            texts += [self.prompt_text(one, apply_template)] * num_answers_per_prompt
        if not texts:
            raise ValueError(
                f"prompt is {prompt!r}, expected one or several texts, or one or several chats."
            )
        check_canvas(self.transformer, 0, gen_length)
        ends = stop_token_ids(self.transformer, self.tokenizer)
        self._interrupt = False
        progress_bar: Any = self.progress_bar
        # the bar counts tokens, since the number of steps isn't known
        with progress_bar(total=len(texts) * gen_length) as bar:

            def step_end(step: GenerationStep) -> None:
                bar.update(step.masked.numel() - int(step.masked.sum()) - bar.n)
                if callback_on_step_end is not None:
                    names = callback_on_step_end_tensor_inputs
                    tensors = {name: getattr(step, name) for name in names}
                    changed = callback_on_step_end(self, step.index, step.noise_level, tensors)
                    step.sequences = (changed or {}).get("sequences", step.sequences)
                step.stop = self._interrupt

            options = {
                "gen_length": gen_length,
                "eos_token_id": ends,
                "on_step_end": step_end,
                "chat": apply_template and bool(self.tokenizer.chat_template),
                **sampling,
            }
            ids = encode_prompts(self.tokenizer, texts)
            result = answer_prompts(self.transformer, ids, device=self._execution_device, **options)
        self.maybe_free_model_hooks()
        answers = [decode_answer(self.tokenizer, ids, ends) for ids in result.answers.tolist()]
        if not return_dict:
            return answers, result.sequences
        return LLaDAPipelineOutput(
            answers, result.sequences, result.answers, result.prompt_lengths, result.forwards
        )

    def prompt_text(self, prompt: str | Chat, apply_template: bool = True) -> str:
        """Return the text that the model reads before it answers one question or chat.

        Raises:
            ValueError: the prompt is empty, a chat doesn't end with the user's turn, or there is no
                chat template for a chat.
        """
        can_chat = apply_template and self.tokenizer.chat_template
        if isinstance(prompt, str):
            if prompt.strip():
                return prompt_text(self.tokenizer, prompt) if apply_template else prompt
        elif can_chat and prompt and prompt[-1]["role"] == "user":
            return chat_text(self.tokenizer, prompt)
        raise ValueError(
            f"prompt {prompt!r} is empty, is a chat that doesn't end with the user's turn, or is a "
            "chat for a tokenizer without a chat template."
        )
