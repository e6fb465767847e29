"""The output head at chosen positions: chunks, threads, wrappers, and models where it can't be reached."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    LlamaForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from nara_diffusion.dllm import generate, mask_answers, masked_cross_entropy, masked_diffusion_loss
from nara_diffusion.dllm.models.lm_head import head_of
from tests.dllm.small_models import BATCH, INPUT_IDS, MASK, PROMPT_LENGTHS, gradients, make


@pytest.mark.parametrize("chunk_size", [1, 5, 1000])
def test_chunks_change_nothing(chunk_size: int) -> None:
    model = make("untied")
    one = masked_diffusion_loss(model, **BATCH, seed=2).per_sample
    assert torch.allclose(masked_diffusion_loss(model, **BATCH, seed=2, chunk_size=chunk_size).per_sample, one)


def test_the_outermost_call_is_entered() -> None:
    model = make("untied")

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    wrapper = Wrapper(model)
    loss = masked_diffusion_loss(wrapper, **BATCH, seed=4).loss
    assert wrapper.calls == 1
    assert torch.equal(loss, masked_diffusion_loss(model, **BATCH, seed=4).loss)


def test_autocast_computes_the_head_in_low_precision_and_the_loss_in_float32() -> None:
    model = make("untied").float()
    with torch.autocast("cpu", torch.bfloat16):
        masked = masked_diffusion_loss(model, **BATCH, seed=4, chunk_size=4)
        every = masked_diffusion_loss(model, **BATCH, seed=4, logits="all")
    assert masked.loss.dtype == torch.float32
    assert torch.allclose(masked.loss, every.loss, rtol=1e-5)
    masked_gradients, every_gradients = gradients(model, masked.loss), gradients(model, every.loss)
    for key, gradient in every_gradients.items():
        assert torch.allclose(masked_gradients[key], gradient, atol=0.02 * gradient.abs().max()), key


def test_threads_don_t_see_each_others_targets() -> None:
    model = make("untied")
    model.requires_grad_(False)
    expected = [masked_diffusion_loss(model, **BATCH, seed=seed).loss for seed in range(4)]
    wrong = []

    def work(seed: int) -> None:
        for _ in range(15):
            if not torch.equal(masked_diffusion_loss(model, **BATCH, seed=seed).loss, expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_models_whose_logits_change_after_the_head_take_all_of_them() -> None:
    model = make("untied")
    model.config.final_logit_softcapping = 30.0
    assert head_of(model) is None
    result = masked_diffusion_loss(model, **BATCH, seed=4)
    assert torch.equal(result.loss, masked_diffusion_loss(model, **BATCH, seed=4, logits="all").loss)


@pytest.mark.parametrize("how", ["torch.compile(model)", "model.compile()", "a wrapper around it"])
def test_compiled_models_take_all_logits(how: str) -> None:
    model = make("untied")
    expected = masked_diffusion_loss(model, **BATCH, seed=4).loss
    compiled = copy.deepcopy(model)
    if how == "model.compile()":
        compiled.compile(backend="eager")
    else:
        compiled = torch.compile(compiled, backend="eager")
    if how == "a wrapper around it":
        compiled = nn.ModuleDict({"inner": compiled})
    assert head_of(compiled) is None
    assert head_of(model) is not None
    if how != "a wrapper around it":
        assert torch.allclose(masked_diffusion_loss(compiled, **BATCH, seed=4).loss, expected)


def test_a_model_that_changes_logits_unannounced_is_refused() -> None:
    class Doubled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = torch.cat([output.logits, output.logits], -1)
            return output

    model = Doubled(make("untied").config)
    with pytest.raises(ValueError, match=r'Doubled changes what its output head returns.*pass logits="all"'):
        masked_diffusion_loss(model, **BATCH, seed=0)


def test_a_model_that_packs_its_batch_is_refused() -> None:
    class Packed(LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            hidden = self.model(input_ids).last_hidden_state
            return CausalLMOutputWithPast(logits=self.lm_head(hidden.flatten(0, 1)).unflatten(0, input_ids.shape))

    model = Packed(make("untied").config)
    with pytest.raises(ValueError, match=r"hidden states of shape \(42, 24\), expected \(3, length, width\)"):
        masked_diffusion_loss(model, **BATCH, seed=0)
    with pytest.raises(ValueError, match="another attn_implementation"):
        generate(model, INPUT_IDS, gen_length=2)
    assert masked_diffusion_loss(model, **BATCH, seed=0, logits="all").loss > 0


def test_models_that_are_no_transformers_return_bare_logits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50))
    batch = mask_answers(INPUT_IDS, PROMPT_LENGTHS, mask_token_id=MASK, seed=1)
    expected = F.cross_entropy(model(batch.input_ids).transpose(1, 2), batch.targets, reduction="none") * batch.masked
    assert torch.allclose(masked_cross_entropy(model, batch), expected)
    with pytest.raises(ValueError, match="no mask_token_id"):
        masked_diffusion_loss(model, INPUT_IDS, PROMPT_LENGTHS)


def test_a_copied_model_has_its_own_head() -> None:
    model = make("untied")
    masked_diffusion_loss(model, **BATCH, seed=0)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.mul_(2)
    assert masked_diffusion_loss(copied, **BATCH, seed=0).loss != masked_diffusion_loss(model, **BATCH, seed=0).loss
