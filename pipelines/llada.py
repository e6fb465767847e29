"""Text from a masked-diffusion language model (LLaDA, Dream, …) as a Diffusers pipeline.

    from pipelines.llada import LLaDAPipeline

    pipe = LLaDAPipeline.from_pretrained("GSAI-ML/LLaDA-8B-Instruct", dtype=torch.bfloat16).to("cuda")
    pipe.load_nara_weights("outputs/dllm-1")  # the folder that train_scripts/dllm.py wrote
    print(pipe("How many days has a leap year?", gen_length=64, steps=32).texts[0])

What `pipe.save_pretrained(folder)` wrote is read by the same call, or without this file's folder on the path by

    DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipelines/llada.py", trust_remote_code=True)

The sampler is `nara_diffusion.dllm.generate`, which tells adapters λ, the masked share of each answer, at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nara_diffusion.dllm import Generation, GenerationStep, encode_prompts, generate, load_backbone, prompt_text
from nara_diffusion.dllm.data.encoding import chat_text
from nara_diffusion.dllm.evaluation.exact_match import decode_answer, stop_token_ids
from nara_diffusion.dllm.models.backbone import Backbone
from nara_diffusion.loaders.weights import load_nara_weights, save_nara_weights, unload_nara_weights

Message = Mapping[str, str]
"""{"role": "system", "user" or "assistant", "content": text}"""

ROLES = ("system", "user", "assistant")
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


@dataclass
class LLaDAPipelineOutput(BaseOutput):
    """Attributes:
    texts: one answer a prompt, up to its first end token; of several a prompt, those of the first prompt come first.
    sequences: (b, l) token ids: prompt, answer, padding.
    answers: (b, gen_length) token ids.
    prompt_lengths: (b,) where the answers start in `sequences`.
    forwards: how often the model ran.
    """

    texts: list[str]
    sequences: torch.Tensor
    answers: torch.Tensor
    prompt_lengths: torch.Tensor
    forwards: int


class LLaDAPipeline(LoraBaseMixin, DiffusionPipeline):
    """Answers questions and chats by unmasking tokens.

    `set_adapters`, `delete_adapters`, `disable_lora`, `enable_lora`, … are Diffusers' own, and work on what
    `load_nara_weights` loaded.

    Args:
        transformer: a bidirectional language model whose configuration names a mask token, as `load_backbone` makes it.
        tokenizer: with a chat template, if it is to chat.

    Raises:
        ValueError: a model that only sees what stands before a token, one without a mask token, or one that PEFT wraps.
    """

    model_cpu_offload_seq = "transformer"
    _lora_loadable_modules = ("transformer",)
    _callback_tensor_inputs = ("sequences", "masked")

    load_nara_weights = load_nara_weights
    save_nara_weights = save_nara_weights
    unload_nara_weights = unload_nara_weights

    def __init__(self, transformer: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        _check_model(transformer)
        self.register_modules(transformer=transformer, tokenizer=tokenizer)
        self._interrupt = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> LLaDAPipeline:
        """A saved pipeline, or a language model's own folder or repository (LLaDA, Dream, Llama, Qwen2, BERT, …).

        Args:
            pretrained_model_name_or_path: a folder, or a repository on the Hub.
            **kwargs: for a pipeline, of `DiffusionPipeline.from_pretrained`; for a language model, of `load_backbone`:
                dtype, quantization_config, mask_token, revision, token, ….

        Raises:
            ValueError, OSError: nothing there that either can load.
        """
        name = str(pretrained_model_name_or_path)
        try:
            cls.load_config(name, **{key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs})
        except OSError:  # no model_index.json
            if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
                raise ValueError(
                    f"{name} holds neither model_index.json, as a pipeline does, nor config.json, as a language model "
                    "does"
                ) from None
            return cls(*load_backbone(name, **kwargs))
        return super().from_pretrained(name, **kwargs)

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop; what is masked then stays so."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | Sequence[Message] | Sequence[Sequence[Message]],
        *,
        gen_length: int = 128,
        steps: int | None = None,
        block_length: int | None = None,
        temperature: float = 0.0,
        cfg_scale: float = 0.0,
        remasking: str = "low_confidence",
        confidence_threshold: float | None = None,
        num_answers_per_prompt: int = 1,
        apply_template: bool = True,
        stop_at_eos: bool = True,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("sequences",),
    ) -> LLaDAPipelineOutput | tuple[list[str], torch.Tensor]:
        """Answer one prompt or several.

        Args:
            prompt: a question, or several; or a chat, a list of {"role": …, "content": …} that ends with the user's
                turn; or several chats.
            gen_length, steps, block_length, temperature, cfg_scale, remasking, confidence_threshold, stop_at_eos: as in
                `nara_diffusion.dllm.generate`: tokens of an answer, forwards in all, tokens of a block, …
            num_answers_per_prompt: how often to answer each; they differ at a temperature above 0.
            apply_template: put questions into the tokenizer's chat template, or into Alpaca's where it has none, as in
                training. False takes the texts as they are.
            generator: seeds temperature and random remasking; on any device.
            return_dict: False returns (texts, sequences).
            callback_on_step_end: called as f(pipe, step, noise_level, tensors) after each step, noise_level (b,) being
                the λ that the model was told, and tensors those of the next argument. A dict that it returns with
                "sequences" replaces them.
            callback_on_step_end_tensor_inputs: of "sequences" (b, l) and "masked" (b, gen_length).

        Raises:
            ValueError: prompts or arguments that can't be; each by name.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_callback(callback_on_step_end_tensor_inputs)
        if num_answers_per_prompt < 1:
            raise ValueError(f"num_answers_per_prompt is {num_answers_per_prompt}, expected 1 at least")
        texts = [text for text in self.prompt_texts(prompt, apply_template) for _ in range(num_answers_per_prompt)]
        input_ids, lengths = self._encode(texts)
        ends = stop_token_ids(self.transformer, self.tokenizer)
        self._interrupt = False
        progress_bar: Any = self.progress_bar
        with progress_bar(total=len(texts) * gen_length) as bar:  # of tokens: the number of steps isn't known

            def step_end(step: GenerationStep) -> None:
                bar.update(step.masked.numel() - int(step.masked.sum()) - bar.n)
                if callback_on_step_end is not None:
                    tensors = {name: getattr(step, name) for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, step.index, step.noise_level, tensors) or {}
                    step.sequences = changed.get("sequences", step.sequences)
                step.stop = self._interrupt

            result = generate(
                self.transformer,
                input_ids,
                gen_length=gen_length,
                steps=steps,
                block_length=block_length,
                temperature=temperature,
                cfg_scale=cfg_scale,
                remasking=remasking,
                confidence_threshold=confidence_threshold,
                prompt_lengths=lengths,
                generator=generator,
                eos_token_id=ends,
                stop_at_eos=stop_at_eos,
                return_stats=True,
                on_step_end=step_end,
            )
        assert isinstance(result, Generation)
        self.maybe_free_model_hooks()
        answers = [decode_answer(self.tokenizer, answer, ends) for answer in result.answers.tolist()]
        if not return_dict:
            return answers, result.sequences
        return LLaDAPipelineOutput(answers, result.sequences, result.answers, result.prompt_lengths, result.forwards)

    def prompt_texts(self, prompt: Any, apply_template: bool = True) -> list[str]:
        """Return the text that the model reads before each answer.

        Raises:
            ValueError: no prompt, an empty one, or something that is neither text nor chat.
        """
        if isinstance(prompt, str):
            prompts: list[Any] = [prompt]
        elif isinstance(prompt, Sequence) and prompt and all(isinstance(part, Mapping) for part in prompt):
            prompts = [prompt]  # one chat
        else:
            prompts = list(prompt) if isinstance(prompt, Sequence) else []
        if not prompts:
            raise ValueError(f"prompt is {prompt!r}, expected a text, a list of texts, a chat, or a list of chats")
        return [self._prompt_text(item, i, apply_template) for i, item in enumerate(prompts)]

    def _prompt_text(self, item: Any, index: int, apply_template: bool) -> str:
        if isinstance(item, str):
            if not item.strip():
                raise ValueError(f"prompt {index} is empty: there is nothing to answer")
            return prompt_text(self.tokenizer, item) if apply_template else item
        if not isinstance(item, Sequence) or not item:
            raise ValueError(f"prompt {index} is {item!r}, expected a text or a chat, a list of messages")
        for message in item:
            _check_message(message, index)
        if item[-1]["role"] != "user":
            raise ValueError(f"the chat of prompt {index} ends with the {item[-1]['role']}'s turn, expected the user's")
        if not apply_template or not self.tokenizer.chat_template:
            reason = "apply_template is False" if not apply_template else "the tokenizer has no chat template"
            raise ValueError(f"prompt {index} is a chat, but {reason}: pass a text")
        try:
            return chat_text(self.tokenizer, item)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from error

    def _encode(self, texts: list[str]) -> tuple[torch.Tensor, list[int]]:
        """Token ids (b, p), padded on the right, and the lengths."""
        encoded = encode_prompts(self.tokenizer, texts)
        lengths = [len(ids) for ids in encoded]
        padding = self.tokenizer.pad_token_id or 0
        rows = [ids + [padding] * (max(lengths) - len(ids)) for ids in encoded]
        return torch.tensor(rows, device=self._execution_device), lengths

    def _check_callback(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {', '.join(map(repr, unknown))}, expected some of "
                f"{', '.join(map(repr, self._callback_tensor_inputs))}"
            )


def _check_model(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"transformer is a {type(model).__name__}, expected a language model of transformers. Of a PeftModel pass "
            "the base model, and load the saved adapter by pipe.load_nara_weights(folder)"
        )
    if "CausalLM" in type(model).__name__ and getattr(model.config, "is_causal", True) is not False:
        raise ValueError(
            f"transformer is a {type(model).__name__} that sees only what stands before each token, and unmasking "
            "needs both sides: load it by LLaDAPipeline.from_pretrained(…) or nara_diffusion.dllm.load_backbone(…)"
        )
    Backbone(model).mask_token_id()


def _check_message(message: Any, index: int) -> None:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ValueError(f"prompt {index} holds {message!r}, expected {{'role': …, 'content': …}}")
    if message["role"] not in ROLES:
        raise ValueError(f"prompt {index} has the role {message['role']!r}, expected one of {', '.join(ROLES)}")
    if not isinstance(message["content"], str) or not message["content"].strip():
        raise ValueError(f"prompt {index} has the content {message['content']!r}, expected a text")
