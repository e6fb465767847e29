"""b(λ) on the logit of the token that DiffusionGemma's canvas shows, against one-hot sums of the test's own."""

import copy
import json
import math
import threading
from fractions import Fraction

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
)

import nara_command
from nara_diffusion import NaraConfig, StrengthSchedule, noise_level, set_strength
from nara_diffusion.dllm.block_loss import canvas_loss
from nara_diffusion.dllm.uniform import corrupt_canvases
from nara_diffusion.loaders.hotswap import check_swappable, part_of
from nara_diffusion.strict import check_loaded
from nara_diffusion.tuner.holder import holder_of
from nara_diffusion.tuner.logit_bias import bias_at
from tests.helpers.adapted import TwoLayers
from tests.helpers.tiny_gemma import CANVAS, VOCABULARY, tiny_gemma

TARGETS = r".*(encoder\.language_model|decoder)\.layers\..*(q_proj|o_proj)"
BINS, KEY, CAP = 4, "nara_core.logit_bias", 30.0
LEVELS = torch.tensor([0.9, 0.25, 0.6])


def config(**fields):
    return NaraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": TARGETS, "logit_bias_bins": BINS, **fields})


def adapted(disturbed=True, **fields):
    torch.manual_seed(5)
    model = get_peft_model(tiny_gemma(), config(**fields)).eval()
    if disturbed:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def numbers_of(model, name="default"):
    return holder_of(model.get_base_model()).cores[name].logit_bias


def inputs():
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (3, 8), generator=generator)
    return {"input_ids": ids, "decoder_input_ids": torch.randint(0, VOCABULARY, (3, CANVAS), generator=generator)}


def recorded(base):
    """(canvas, output of the head before all other hooks, capped logits) of each later forward."""
    calls, forward, head = [], base.forward, []
    base.lm_head.register_forward_hook(lambda module, args, z: head.append(z.detach().double()), prepend=True)

    def run(**given):
        output = forward(**given)
        calls.append((given["decoder_input_ids"].clone(), head[-1], output.logits.detach().clone()))
        return output

    base.forward = run
    return calls


def check(calls, levels, numbers):
    """Compare each call with cap tanh((z + 10 p_k onehot) / cap): k by fractions, λ (b,) or of positions (b, c)."""
    assert len(calls) == len(levels)
    numbers = numbers.tolist()
    for (canvas, z, logits), level in zip(calls, levels, strict=True):
        level = level[:, None].expand(canvas.shape) if level.dim() == 1 else level
        bias = []
        for each in level.flatten().tolist():
            place = math.floor(Fraction(each).limit_denominator(1000) * len(numbers))
            bias.append(10 * numbers[min(place, len(numbers) - 1)])
        bias = torch.tensor(bias, dtype=torch.float64).view(*canvas.shape, 1)
        expected = torch.tanh((z + bias * nn.functional.one_hot(canvas, VOCABULARY)) / CAP) * CAP
        torch.testing.assert_close(logits, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"core_type": "identity"}, {"core_type": "knots", "use_dora": True}])
@torch.no_grad()
def test_the_token_that_is_shown_gets_the_number_of_its_bin(fields):
    model, given = adapted(**fields), inputs()
    copied = copy.deepcopy(model)
    calls = recorded(model.get_base_model())
    levels = [LEVELS, torch.tensor([1.0, 0.0, 0.749]), torch.tensor([0.5])]
    for level in levels:
        with noise_level(model, level), noise_level(copied, level):
            assert torch.equal(copied(**given).logits, model(**given).logits)
    check(calls, [level.expand(3) for level in levels], numbers_of(model))


@torch.no_grad()
def test_a_level_on_the_edge_of_a_bin_belongs_to_the_upper_one_and_nan_to_none():
    numbers = torch.arange(10.0)
    edges = torch.cat([torch.arange(11) / 10, 1 - torch.arange(11) / 10])  # 1 − 0.8 is below 0.2 in float32
    upper = torch.tensor([*range(10), 9, *(min(10 - k, 9) for k in range(11))])
    assert torch.equal(bias_at(numbers, edges), 10.0 * upper)
    assert bias_at(numbers, torch.tensor([torch.nan])).isnan()


@torch.no_grad()
def test_parts_of_a_canvas_have_bins_of_their_own():
    model = adapted(core_type="identity")
    levels = torch.tensor([[0.9, 0.2, 0.6], [0.1, 0.7, 0.4], [0.3, 0.8, 0.5]])
    calls = recorded(model.get_base_model())
    with noise_level(model, levels):
        model(**inputs())
    check(calls, [levels.repeat_interleave(CANVAS // 3, 1)], numbers_of(model))


def test_at_first_and_while_disabled_or_deleted_the_model_is_the_base():
    model, given = adapted(disturbed=False, core_type="identity"), inputs()
    with torch.no_grad():
        expected = tiny_gemma()(**given).logits
        with noise_level(model, LEVELS):
            assert torch.equal(model(**given).logits, expected)
            numbers_of(model).add_(0.3)
            assert not torch.equal(model(**given).logits, expected)
            model.get_base_model().model(**given)  # no call of the head takes its bias
            with model.disable_adapter():
                assert torch.equal(model(**given).logits, expected)
        model.add_adapter("other", config(core_type="identity", logit_bias_bins=None))
        model.set_adapter("other")
        assert torch.equal(model(**given).logits, expected)
        model.delete_adapter("default")
        assert torch.equal(model(**given).logits, expected)
        base = model.unload()
        assert torch.equal(base(**given).logits, expected)
    assert not base.lm_head._forward_hooks
    assert not base.model.decoder._forward_pre_hooks


@torch.no_grad()
def test_biases_of_two_active_adapters_are_added():
    model = adapted(core_type="identity")
    model.add_adapter("other", config(core_type="identity", logit_bias_bins=2 * BINS))
    model.base_model.set_adapter(["default", "other"])
    numbers_of(model, "other").copy_(torch.arange(2.0 * BINS) / 10)
    calls = recorded(model.get_base_model())
    with noise_level(model, LEVELS):
        model(**inputs())
    check(calls, [LEVELS], numbers_of(model).repeat_interleave(2) + numbers_of(model, "other"))


def batch_of(**options):
    ids = torch.randint(0, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(1))
    key = {"seed": 3, "sample_indices": range(3), "canvas_length": CANVAS, "vocab_size": VOCABULARY}
    return corrupt_canvases(ids, [4, 9, 5], **key, **options)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_moves_the_numbers_of_the_bins_it_met_and_no_encoders_loss(checkpointing):
    model, batch = adapted(core_type="identity").train(), batch_of(self_conditioning=0.0)
    if checkpointing:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    result = canvas_loss(model, batch)
    result.loss.backward()
    met = {min(int(level * BINS), BINS - 1) for level in batch.noise_level.tolist()}
    assert {index for index, slope in enumerate(numbers_of(model).grad) if slope} == met
    numbers, losses = numbers_of(model), []
    with torch.no_grad():
        for step in (0.001, -0.002):
            numbers.add_(step * numbers.grad / numbers.grad.norm())
            losses.append(canvas_loss(model, batch))
    slope = (losses[0].loss - losses[1].loss).item() / 0.002
    assert slope == pytest.approx(numbers.grad.norm().item(), rel=0.02)
    assert torch.equal(losses[0].encoder_loss, losses[1].encoder_loss)
    calls, batch = recorded(model.get_base_model()), batch_of(self_conditioning=1.0)
    canvas_loss(model, batch)
    check(calls, [batch.noise_level] * 2, numbers)


def test_a_forward_that_fails_leaves_no_bias_behind_and_threads_do_not_meet():
    model, given = adapted(core_type="identity"), inputs()
    base = model.get_base_model()
    hidden = torch.randn(3, CANVAS, 20, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        plain = nn.functional.linear(hidden, base.lm_head.weight)
        with pytest.raises(RuntimeError), noise_level(model, LEVELS):
            model(**given, decoder_attention_mask={"full_attention": torch.ones(1, 1, 1, 2), "sliding_attention": None})
        assert torch.equal(base.lm_head(hidden), plain)
        with noise_level(model, LEVELS):
            expected = model(**given).logits
            assert torch.equal(base.lm_head(hidden), plain)
            base.model(**given)  # no call of the head, and then one of other rows or in another thread
            assert torch.equal(base.lm_head(hidden[:, :2]), nn.functional.linear(hidden[:, :2], base.lm_head.weight))
            found = []
            thread = threading.Thread(target=lambda: found.append(base.lm_head(hidden)))
            thread.start()
            thread.join()
            assert torch.equal(model(**given).logits, expected)
    assert torch.equal(found[0], plain)


@torch.no_grad()
def test_half_precision_rounds_no_number():
    model = adapted(core_type="identity")
    calls = recorded(model.get_base_model())
    with noise_level(model, LEVELS), torch.autocast("cpu", torch.bfloat16):
        model(**inputs())
    assert torch.equal(calls[0][1], calls[0][1].bfloat16().double())
    check(calls, [LEVELS], numbers_of(model))
    assert numbers_of(model.to(torch.bfloat16)).dtype == torch.float32


def test_a_file_has_the_numbers_loads_strictly_and_shows_them(tmp_path, capsys):
    model, given = adapted(core_type="identity"), inputs()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = f"base_model.model.{KEY}"
    assert torch.equal(tensors[key], numbers_of(model))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["noise_convention"] == "corrupted_share"
    other = PeftModel.from_pretrained(tiny_gemma(), tmp_path).eval()
    check_loaded(other, "default", tensors, "the file")
    with torch.no_grad(), noise_level(model, LEVELS), noise_level(other, LEVELS):
        assert torch.equal(other(**given).logits, model(**given).logits)
    nara_command.main(["inspect", str(tmp_path), "--json"])
    shown = json.loads(capsys.readouterr().out)["components"]["model"]
    assert shown["logit_bias"] == pytest.approx((10 * numbers_of(model)).tolist(), abs=1e-4)
    assert shown["parameters"]["core"] == BINS

    save_file({name: tensor for name, tensor in tensors.items() if name != key}, path)
    with pytest.raises(ValueError, match=f"lacks.*{KEY}"):
        PeftModel.from_pretrained(tiny_gemma(), tmp_path)
    adapted(core_type="identity", logit_bias_bins=None).save_pretrained(tmp_path)
    save_file({**load_file(path), key: tensors[key]}, path)
    with pytest.raises(ValueError, match=KEY):
        PeftModel.from_pretrained(tiny_gemma(), tmp_path)


@torch.no_grad()
def test_generate_takes_the_bin_of_the_share_that_is_not_accepted(monkeypatch):
    model = adapted(core_type="identity")
    left, accept = [torch.ones(3)], EntropyBoundSampler.accept_canvas

    def accepting(sampler, *args):
        canvas = accept(sampler, *args)
        left.append(1 - sampler.accepted_token_mask.float().mean(1))
        return canvas

    monkeypatch.setattr(EntropyBoundSampler, "accept_canvas", accepting)
    calls = recorded(model.get_base_model())
    torch.manual_seed(4)
    options = {"sampler_config": EntropyBoundSamplerConfig(entropy_bound=2.0), "t_min": 0.4, "t_max": 0.8}
    options |= {"max_new_tokens": CANVAS, "max_denoising_steps": 4, "eos_token_id": None}
    model.get_base_model().generate(inputs()["input_ids"], **options)
    assert len({tuple(level.tolist()) for level in left}) > 2
    check(calls, left[:-1], numbers_of(model))


def test_what_has_no_canvas_or_no_place_for_the_bias_raises(tmp_path):
    with pytest.raises(ValueError, match=r"logit_bias_bins is for DiffusionGemma.*TwoLayers"):
        get_peft_model(TwoLayers(), config(target_modules=["first"]))
    with pytest.raises(ValueError, match="logit_bias_bins is 0"):
        config(logit_bias_bins=0)
    with pytest.raises(ValueError, match="logit_bias_bins=4"):
        config(strength=[[0, 1], [1, 0]])
    model = adapted(core_type="identity")
    with pytest.raises(ValueError, match="share each weight"):
        model.merge_and_unload(noise_level=0.5)
    with pytest.raises(ValueError, match="core or b"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ValueError, match="logit_bias_bins"):
        set_strength(model, "default", StrengthSchedule([(0, 1), (1, 0.5)]))
    model.save_pretrained(tmp_path / "nara")
    with pytest.raises(SystemExit, match="right for neither its encoder"):
        nara_command.main(["fold", f"{tmp_path}/nara", f"{tmp_path}/lora", "--noise_level", "0.5", "--form", "peft"])


@pytest.mark.parametrize("bins", [BINS + 1, None])
def test_a_hotswap_keeps_the_number_of_bins(bins):
    other = part_of(adapted(logit_bias_bins=bins).get_base_model(), "default")
    with pytest.raises(ValueError, match=f"logit_bias_bins is {bins} in the new adapter but {BINS}"):
        check_swappable(adapted().get_base_model(), "model", "default", other)
