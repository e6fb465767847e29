"""The masked-diffusion loss against its formula over all positions, on every kind of head, with gradients."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    Qwen2Config,
    RobertaConfig,
    RobertaForMaskedLM,
)

from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.dllm import mask_answers, mask_density, masked_cross_entropy, masked_diffusion_loss
from nara_diffusion.dllm.heads import head_of
from nara_diffusion.dllm.shifted import ShiftedQwen2ForCausalLM

from .conftest import disturb, enable_checkpointing

MASK = 49
SIZES = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
INPUT_IDS = torch.randint(2, MASK, (3, 14), generator=torch.Generator().manual_seed(0))
PROMPT_LENGTHS = [3, 6, 1]
ATTENTION_MASK = torch.tensor([[1] * 14, [1] * 9 + [0] * 5, [1] * 12 + [0] * 2])
BATCH = {"input_ids": INPUT_IDS, "prompt_lengths": PROMPT_LENGTHS, "attention_mask": ATTENTION_MASK}


def llama(**kwargs) -> LlamaForCausalLM:
    config = LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64, use_cache=False, **kwargs)
    config.is_causal = False
    return LlamaForCausalLM(config)


def dream() -> ShiftedQwen2ForCausalLM:
    config = Qwen2Config(**SIZES, num_key_value_heads=2, max_position_embeddings=64, use_cache=False)
    config.is_causal = False
    return ShiftedQwen2ForCausalLM(config)


def lora_on_head() -> PeftModel:
    return get_peft_model(llama(), LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "lm_head"]))


def trained_head() -> PeftModel:
    return get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]))


def nara_on_head() -> PeftModel:
    config = NaraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "lm_head"], core_hidden_dims=(8, 8))
    return get_peft_model(llama(), config)


def modernbert() -> ModernBertForMaskedLM:
    config = ModernBertConfig(**SIZES, max_position_embeddings=64, pad_token_id=0, local_attention=8)
    return ModernBertForMaskedLM(config)


MODELS = {
    "untied": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "dream": dream,
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=64)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES, max_position_embeddings=64, pad_token_id=0)),
    "modernbert": modernbert,
    "lora-on-head": lora_on_head,
    "trained-head": trained_head,
    "nara-on-head": nara_on_head,
}


def make(name: str) -> nn.Module:
    torch.manual_seed(3)
    model = MODELS[name]().double()
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    inner.config.mask_token_id = MASK
    disturb(model, 0.1)
    return model.eval()


def formula(model: nn.Module, seed: int, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, per sample): Σ CE / t / answer length, sample by sample, with logits at all positions."""
    batch = mask_answers(**BATCH, mask_token_id=MASK, seed=seed, **options)
    losses = []
    for row in range(len(batch.targets)):
        source = row % 3
        length = int(ATTENTION_MASK[source].sum())
        with noise_level(model, batch.noise_level[row].item()) if _is_nara(model) else _nothing():
            logits = model(batch.input_ids[row : row + 1, :length]).logits[0]
        total = torch.zeros((), dtype=torch.float64)
        for j in range(length):
            if batch.input_ids[row, j] == MASK:
                total = total - F.log_softmax(logits[j], -1)[INPUT_IDS[source, j]]
        losses.append(total / batch.noise_level[row].double() / (length - PROMPT_LENGTHS[source]))
    return torch.stack(losses).mean(), torch.stack(losses)


def _is_nara(model: nn.Module) -> bool:
    return any("nara_core." in name for name, _ in model.named_parameters())


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def close(actual: torch.Tensor, expected: torch.Tensor, name: str) -> bool:
    """To float64's accuracy; to float32's where C(λ), which is always computed in it, has a part."""
    tolerance = 1e-5 if name.startswith("nara") else 1e-9
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max() + 1e-12)


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), grads, strict=True)
    }


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_formula(name: str, complementary: bool) -> None:
    model = make(name)
    expected, per_sample = formula(model, 5, complementary=complementary)
    expected_gradients = gradients(model, expected)
    assert head_of(model) is not None
    for logits in ("masked", "all"):
        result = masked_diffusion_loss(model, **BATCH, seed=5, complementary=complementary, logits=logits, chunk_size=4)
        assert close(result.per_sample, per_sample, name)
        assert close(result.loss, expected, name)
        actual = gradients(model, result.loss)
        for key, gradient in expected_gradients.items():
            assert close(actual[key], gradient, name), (logits, key)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in [head_of(model)])


@pytest.mark.parametrize("name", ["untied", "dream", "lora-on-head"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    model = make(name)
    expected = gradients(model, masked_diffusion_loss(model, **BATCH, seed=2).loss)
    enable_checkpointing(model, {"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model.train()
    loss = masked_diffusion_loss(model, **BATCH, seed=2, chunk_size=3).loss
    loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert close(grad, expected[key], name), key


def test_two_forwards_then_two_backwards_with_nara_on_the_head() -> None:
    model = make("nara-on-head")
    first = gradients(model, masked_diffusion_loss(model, **BATCH, seed=1).loss)
    second = gradients(model, masked_diffusion_loss(model, **BATCH, seed=2).loss)
    losses = [masked_diffusion_loss(model, **BATCH, seed=seed, chunk_size=4).loss for seed in (1, 2)]
    both = gradients(model, losses[0] + losses[1])
    for key, gradient in both.items():
        assert close(gradient, first[key] + second[key], "nara"), key


@pytest.mark.parametrize("chunk_size", [1, 5, 1000])
def test_chunks_change_nothing(chunk_size: int) -> None:
    model = make("untied")
    one = masked_diffusion_loss(model, **BATCH, seed=2).per_sample
    assert torch.allclose(masked_diffusion_loss(model, **BATCH, seed=2, chunk_size=chunk_size).per_sample, one)


def test_the_model_sees_the_ratio_that_masked_each_sample(adapted_llama: PeftModel) -> None:
    seen = []

    def record(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        seen.append(args[0].detach().flatten().clone())

    embedding = next(m for name, m in adapted_llama.named_modules() if name.endswith("embeddings.noise_level"))
    embedding.register_forward_hook(record)
    result = masked_diffusion_loss(adapted_llama, **BATCH, seed=7)
    assert len(seen) == 1
    assert torch.equal(seen[0], result.noise_level)
    share = result.masked.sum(1) / result.answer.sum(1)
    assert (result.noise_level != share).any()


def test_the_mask_density_is_fed_where_a_core_asks_for_it() -> None:
    model = llama()
    model.config.mask_token_id = MASK
    config = NaraConfig(
        r=3, target_modules=["q_proj"], core_hidden_dims=(8, 8), core_input="both", mask_density_radius=2
    )
    model = get_peft_model(model, config)
    disturb(model)
    result = masked_diffusion_loss(model.eval(), **BATCH, seed=7)
    batch = mask_answers(**BATCH, mask_token_id=MASK, seed=7)
    density = mask_density(result.masked, result.answer, 2)
    losses = []
    for values in (density, 1 - density):
        with noise_level(model, result.noise_level, mask_density=values):
            logits = model(batch.input_ids, attention_mask=ATTENTION_MASK).logits
        losses.append(F.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none") * result.masked)
    assert torch.allclose(result.token_loss, losses[0], atol=1e-5)
    assert not torch.allclose(result.token_loss, losses[1], atol=1e-5)


def test_a_batch_without_masks_has_zero_loss_and_zero_gradients() -> None:
    model = make("untied")
    result = masked_diffusion_loss(model, **BATCH, noise_level=1e-7, seed=0)
    assert not result.masked.any()
    assert result.loss == 0
    result.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


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


@pytest.mark.parametrize(
    ("options", "message"), [({"logits": "some"}, "logits is 'some'"), ({"chunk_size": 0}, "chunk_size is 0")]
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masked_diffusion_loss(make("untied"), **BATCH, **options)
