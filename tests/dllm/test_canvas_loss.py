import pytest
import torch
from transformers import DynamicCache
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaModel

from nara_diffusion.dllm.batches import AnswerCollator
from nara_diffusion.dllm.canvas_loss import block_diffusion_loss, canvas_loss, corrupt_canvases
from nara_diffusion.dllm.loss import noise_level_curve
from nara_diffusion.dllm.models.model_classes import CACHE
from tests.helpers.rounding import assert_near
from tests.helpers.tiny_gemma import CANVAS, VOCABULARY, tiny_gemma

KEY = {"seed": 0, "sample_indices": [10, 11, 12], "canvas_length": CANVAS, "vocab_size": VOCABULARY}


def batch_of(prompts=(4, 9, 5), **options):
    ids = torch.randint(0, VOCABULARY, (3, 25), generator=torch.Generator().manual_seed(1))
    return corrupt_canvases(ids, prompts, answer_lengths=[14, 11, 20], **{**KEY, **options})


def decoder_logits(model, batch, row, conditioning=None):
    """Logits (c, v) of one canvas as `generate` makes them: a cache of the prefix, and the decoder after it."""
    start = int(batch.starts[row])
    cache = DynamicCache(config=model.config.get_text_config())
    model.model.encoder(input_ids=batch.input_ids[row : row + 1, :start], **{CACHE: cache})
    output = model(
        decoder_input_ids=batch.canvas[row : row + 1],
        **{CACHE: cache},
        self_conditioning_logits=conditioning,
        decoder_position_ids=torch.arange(start, start + CANVAS)[None],
    )
    return output.logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_matches_decoder_on_cached_prefix(attention):
    model = tiny_gemma()
    model.set_attn_implementation(attention)
    batch = batch_of()
    batch.self_conditioned[:] = torch.tensor([True, False, True])
    with torch.no_grad():
        loss = canvas_loss(model, batch, encoder_weight=0.3)
        for row in range(3):
            logits = decoder_logits(model, batch, row)
            if batch.self_conditioned[row]:
                logits = decoder_logits(model, batch, row, logits)
            log_p = logits[0].double().log_softmax(-1)
            expected = -log_p.gather(1, batch.targets[row, :, None])[:, 0] * batch.supervised[row]
            assert_near(loss.token_loss[row].double(), expected, model)
            mean = expected.sum() / batch.supervised[row].sum()
            assert_near(loss.per_sample[row].double(), mean, model)
    assert len(set(batch.starts.tolist())) == 3
    assert batch.supervised.sum(1).tolist() == [2, 5, CANVAS]  # two canvases end after their answers
    assert batch.starts.max() > 4  # the window of 5 tokens cuts the prefix
    assert_near(loss.loss, loss.per_sample.mean() + 0.3 * loss.encoder_loss.mean(), model)


@pytest.mark.parametrize(("first_prompt", "whole"), [(4, False), (0, False), (4, True)])
def test_the_encoder_predicts_each_token_after_the_first(first_prompt, whole):
    model, batch = tiny_gemma(), batch_of([first_prompt, 9, 5], predict_prompts=whole)
    with torch.no_grad():
        loss = canvas_loss(model, batch)
        for row, (prompt, end) in enumerate([(first_prompt, first_prompt + 14), (9, 20), (5, 25)]):
            start = 1 if whole else max(prompt, 1)
            ids = batch.input_ids[row : row + 1, :end]
            hidden = model.model.encoder(input_ids=ids).last_hidden_state
            logits = 30 * torch.tanh(model.lm_head(hidden) / 30)
            log_p = logits[0, start - 1 : -1].log_softmax(-1)
            expected = -log_p.gather(1, ids[0, start:, None]).mean()
            assert_near(loss.encoder_loss[row], expected, model)


def test_zero_encoder_weight_runs_one_pass_without_loss(monkeypatch):
    model, calls = tiny_gemma(), []
    forward = DiffusionGemmaModel.forward
    monkeypatch.setattr(DiffusionGemmaModel, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    loss = canvas_loss(model, batch_of(self_conditioning=0.0), encoder_weight=0.0)
    assert len(calls) == 1
    assert not loss.encoder_loss.any()
    assert torch.equal(loss.loss, loss.per_sample.mean())


def test_encoder_logits_exist_one_chunk_at_a_time():
    model, rows, losses = tiny_gemma(), [], []
    model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel()))
    for size in (64, 5):
        model.zero_grad()
        rows.clear()
        loss = canvas_loss(model, batch_of(), 0.3, chunk_size=size)
        loss.loss.backward()
        of_encoder = [count for count in rows if count != 3 * CANVAS]
        last = min(size, 45)  # backward computes all others again
        assert sum(of_encoder) == 2 * (14 + 11 + 20) - last
        assert max(of_encoder) <= size
        losses.append((loss.encoder_loss, model.model.encoder.language_model.layers[0].mlp.up_proj.weight.grad))
    for one, other in zip(*losses, strict=True):
        assert_near(one, other, model)


def test_an_encoder_that_does_not_learn_runs_once():
    model, runs, losses = tiny_gemma(), [], []
    model.model.encoder.register_forward_hook(lambda *_: runs.append(1))
    for learns in (True, False):
        model.model.encoder.requires_grad_(learns)
        model.model.decoder.self_conditioning.requires_grad_()
        losses.append(canvas_loss(model, batch_of(), 0.3))
    assert len(runs) == 2 + 1
    assert_near(losses[1].token_loss, losses[0].token_loss, model)
    assert_near(losses[1].encoder_loss, losses[0].encoder_loss, model)
    losses[1].loss.backward()
    assert model.model.decoder.self_conditioning.up_proj.weight.grad.any()


def test_the_first_pass_gets_no_gradient():
    model, batch = tiny_gemma(), batch_of()
    batch.self_conditioned[:] = False
    canvas_loss(model, batch, encoder_weight=0.0).loss.backward()
    without = model.model.decoder.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    batch = batch_of(self_conditioning=0.0)
    canvas_loss(model, batch, encoder_weight=0.0).loss.backward()
    assert_near(model.model.decoder.layers[0].mlp.up_proj.weight.grad, without, model)


def test_canvas_and_vocabulary_are_the_models():
    ids = torch.randint(0, VOCABULARY, (3, 25), generator=torch.Generator().manual_seed(1))
    lengths = {"answer_lengths": [14, 11, 20], "seed": 0, "sample_indices": [10, 11, 12]}
    loss = block_diffusion_loss(tiny_gemma(), ids, [4, 9, 5], **lengths)
    expected = batch_of()
    assert torch.equal(loss.canvas, expected.canvas)
    assert torch.equal(loss.starts, expected.starts)


def test_curve_is_mean_over_rows_for_any_batches():
    generator, rows = torch.Generator().manual_seed(4), []
    for prompt, length in [(3, 11), (5, 9), (2, 14), (4, 20), (6, 13)]:
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "prompt_length": prompt})
    model, collator = tiny_gemma(), AnswerCollator(2, trained_padding=0, multiple=CANVAS)
    options = {"collator": collator, "seed": 7, "progress": False, "loss": block_diffusion_loss}
    actual = noise_level_curve(model, rows, [0.3, 1.0], batch_size=2, **options)
    for level, mean in zip([0.3, 1.0], actual, strict=True):
        losses = []
        for index, row in enumerate(rows):
            with torch.no_grad():
                batch = collator([{**row, "position": index}])
                losses.append(block_diffusion_loss(model, **batch, seed=7, noise_level=level).per_sample.item())
        assert mean == pytest.approx(sum(losses) / 5, rel=1e-4)
    assert actual[0] != pytest.approx(actual[1], rel=1e-3)
