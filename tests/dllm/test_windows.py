"""Windows of λ for text: which masked shares are drawn, and the loss that holds the base outside, written out."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.dllm import mask_answers, masked_diffusion_loss
from nara_diffusion.dllm.masking import MIN_NOISE_LEVEL, check_drawable, draw_noise_levels
from nara_diffusion.noise.window import NoiseWindow

from .conftest import disturb, enable_checkpointing
from .small_models import ATTENTION_MASK, BATCH, INPUT_IDS, MASK, PROMPT_LENGTHS, close, dream, gradients, llama

ANSWERS = [int(ATTENTION_MASK[row].sum()) - PROMPT_LENGTHS[row] for row in range(3)]
HOLD = NoiseWindow(0.3, 0.7, hold_weight=2.5)
SEED = 5


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.4), (0.25, 0.5), (0.6, 1.0)])
def test_stratified_levels_in_a_window_take_every_stratum_of_it_once(low: float, high: float) -> None:
    n, first = 7, max(low, MIN_NOISE_LEVEL)
    levels = draw_noise_levels(range(20 * n), seed=5, group_size=n, window=NoiseWindow(low, high)).view(20, n)
    for group in levels.double():
        assert sorted(((group - first) / (high - first) * n).floor().int().tolist()) == list(range(n))


def test_levels_with_the_base_held_are_stratified_inside_and_outside() -> None:
    window = NoiseWindow(0.3, 0.5, hold_weight=1.0, outside_share=0.25)
    levels = draw_noise_levels(range(400), seed=5, group_size=8, window=window).view(50, 8)
    lower = 0.3 - MIN_NOISE_LEVEL
    for group in levels.double():
        held = window.held(group)
        assert sorted(((group[~held] - 0.3) / 0.2 * 6).floor().int().tolist()) == list(range(6))
        outside = torch.where(group[held] < 0.4, group[held] - MIN_NOISE_LEVEL, group[held] - 0.5 + lower)
        assert sorted((outside / (lower + 0.5) * 2).floor().int().tolist()) == [0, 1]


def test_base_held_by_default_spreads_levels_as_without_a_window() -> None:
    levels = draw_noise_levels(range(4000), seed=5, group_size=4000, window=NoiseWindow(0.4, 0.5, hold_weight=1.0))
    expected = MIN_NOISE_LEVEL + (1 - MIN_NOISE_LEVEL) * (torch.arange(4000) + 0.5) / 4000
    assert (levels.sort().values - expected).abs().max() < 2 / 4000


@pytest.mark.parametrize("window", [NoiseWindow(0.3, 0.7), NoiseWindow(0.3, 0.7, hold_weight=1.0)])
def test_complementary_masks_keep_to_a_symmetric_window(window: NoiseWindow) -> None:
    batch = mask_answers(
        INPUT_IDS.repeat(20, 1), [3] * 60, mask_token_id=MASK, seed=1, complementary=True, window=window
    )
    first, second = window.contains(batch.noise_level).chunk(2)
    assert torch.equal(first, second)
    assert first.all() == (window.hold_weight is None)


@pytest.mark.parametrize(
    ("window", "complementary", "message"),
    [
        (
            NoiseWindow(0.0, 0.0005),
            False,
            r"max_noise_level 0\.0005, but masked shares are drawn from 0\.001 to 1, and none",
        ),
        (NoiseWindow(0.9995, 1.0), True, r"drawn from 0\.001 to 0\.999, and none lies between"),
        (NoiseWindow(0.0005, 1.0, hold_weight=1.0), False, r"none lies outside of them for hold_base_outside"),
        (NoiseWindow(0.2, 0.7), True, r"leave complementary out, or take a window .* as from 0\.2 to 0\.8"),
    ],
)
def test_window_that_nothing_is_drawn_in_is_refused(window: NoiseWindow, complementary: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_drawable(window, complementary)


LORA = {"r": 3, "lora_alpha": 5}
NARA = {**LORA, "core_hidden_dims": (8, 8)}
MAKERS = {
    "lora": (llama, LoraConfig(**LORA, target_modules=["q_proj", "down_proj"])),
    "dora": (llama, LoraConfig(**LORA, target_modules=["q_proj"], use_dora=True)),
    "nara": (llama, NaraConfig(**NARA, target_modules=["q_proj", "v_proj"])),
    "nara-on-head": (llama, NaraConfig(**NARA, target_modules=["q_proj", "lm_head"])),
    "lora-on-head": (llama, LoraConfig(**LORA, target_modules=["q_proj", "lm_head"])),
    "trained-head": (llama, LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "dream": (dream, LoraConfig(**LORA, target_modules=["q_proj"])),
    "prompt": (llama, PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")),
    "p-tuning": (llama, PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=10, task_type="CAUSAL_LM")),
}


def made(name: str) -> tuple[PeftModel, nn.Module]:
    """The adapted model, disturbed, in float64 but for the core, and its base, which never had an adapter."""
    make, config = MAKERS[name]
    torch.manual_seed(3)
    base = make().double()
    disturb(base, 0.1)
    base.config.mask_token_id = MASK
    model = get_peft_model(deepcopy(base), config).double()
    disturb(model, 0.3)
    return model.eval(), base.eval()


def formula(model: PeftModel, base: nn.Module, name: str, complementary: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(per sample, whether held): one row at a time, without padding, logits at all positions, sums over words."""
    batch = mask_answers(**BATCH, mask_token_id=MASK, seed=SEED, complementary=complementary, window=HOLD)
    losses, held = [], []
    for row, level in enumerate(batch.noise_level.tolist()):
        length = int(ATTENTION_MASK[row % 3].sum())
        ids = batch.input_ids[row : row + 1, :length]
        with noise_level(model, level) if name.startswith("nara") else torch.enable_grad():
            log_p = F.log_softmax(model(ids).logits[0, -length:], -1)
        with torch.no_grad():
            log_p0 = F.log_softmax(base(ids).logits[0], -1)
        held.append(not 0.3 <= level < 0.7)
        total = torch.zeros((), dtype=torch.float64)
        for j in (ids[0] == MASK).nonzero().flatten().tolist():
            if held[-1]:
                total = total + 2.5 * (log_p0[j].exp() * (log_p0[j] - log_p[j])).sum()
            else:
                total = total - log_p[j, INPUT_IDS[row % 3, j]]
        losses.append(total / level / ANSWERS[row % 3])
    return torch.stack(losses), torch.tensor(held)


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_held_base_loss_and_gradients_are_those_of_the_formula(name: str, complementary: bool) -> None:
    model, base = made(name)
    expected, held = formula(model, base, name, complementary)
    assert held.any()
    assert not held.all()
    expected_gradients = gradients(model, expected.mean())
    for logits in ("masked", "all"):
        options = {"seed": SEED, "complementary": complementary, "logits": logits, "chunk_size": 4}
        result = masked_diffusion_loss(model, **BATCH, **options, window=HOLD)
        assert close(result.per_sample, expected, name), logits
        assert close(result.loss, expected.mean(), name), logits
        assert result.split is not None
        assert torch.equal(result.split.held, held)
        assert close(result.split.weighted(2.5), expected, name)
        actual = gradients(model, result.loss)
        for key, gradient in expected_gradients.items():
            assert close(actual[key], gradient, name), (logits, key)
    trained = [key for key, gradient in expected_gradients.items() if gradient.any()]
    assert trained


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    model, _ = made("nara-on-head")
    options = {**BATCH, "seed": SEED, "window": HOLD, "chunk_size": 3}
    expected = gradients(model, masked_diffusion_loss(model, **options).loss)
    enable_checkpointing(model, {"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model.train()
    masked_diffusion_loss(model, **options).loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert close(grad, expected[key], "nara"), key


def test_the_base_has_no_dropout_and_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(3)
    model = get_peft_model(
        llama(attention_dropout=0.5), LoraConfig(**LORA, target_modules=["q_proj"], lora_dropout=0.5)
    )
    model.config.mask_token_id = MASK
    seen = []
    layer = next(m for m in model.modules() if isinstance(m, BaseTunerLayer))
    layer.register_forward_pre_hook(lambda module, args: seen.append((module.training, module.disable_adapters)))
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    masked_diffusion_loss(model.train(), **BATCH, seed=SEED, window=HOLD).loss.backward()
    assert seen == [(False, True), (True, False)]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert all(module.training for module in model.modules())
    assert not any(m.disable_adapters for m in model.modules() if isinstance(m, BaseTunerLayer))


def test_window_without_a_weight_runs_no_base() -> None:
    model, _ = made("lora")
    forwards = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    result = masked_diffusion_loss(model, **BATCH, seed=SEED, window=NoiseWindow(0.3, 0.7))
    assert len(forwards) == 1
    assert result.split is None
    assert ((result.noise_level >= 0.3) & (result.noise_level < 0.7)).all()


def test_a_base_to_hold_needs_an_adapter() -> None:
    """Without one the distance is 0, whatever is trained."""
    model, base = made("lora")
    masked_diffusion_loss(model, **BATCH, seed=SEED, window=HOLD)
    masked_diffusion_loss(base, **BATCH, seed=SEED, window=NoiseWindow(0.3, 0.7))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no adapter: add one, or leave hold_weight out"):
        masked_diffusion_loss(base, **BATCH, seed=SEED, window=HOLD)
