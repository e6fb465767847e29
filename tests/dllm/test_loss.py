"""The masked-diffusion loss against its formula over all positions, on every kind of head, with gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn

from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.dllm import mask_answers, mask_density, masked_diffusion_loss
from nara_diffusion.dllm.models.lm_head import head_of

from .conftest import disturb, enable_checkpointing
from .small_models import ATTENTION_MASK, BATCH, INPUT_IDS, MASK, MODELS, PROMPT_LENGTHS, close, gradients, llama, make


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


@pytest.mark.parametrize(
    ("options", "message"), [({"logits": "some"}, "logits is 'some'"), ({"chunk_size": 0}, "chunk_size is 0")]
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masked_diffusion_loss(make("untied"), **BATCH, **options)
